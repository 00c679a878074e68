// SPDX-License-Identifier: Apache-2.0
// Binds the ops to a device. GetBackend is a stateless function object: GetBackend{}() gives something that points to the
// Backend for the current device and thread.
#pragma once
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "ops.h"

namespace xpu_fp4 {

template <class GetBackend>
void bind_ops(torch::Library& library) {
  using at::Tensor;
  library.impl("mxfp4_quantize", [](const Tensor& x, std::string_view scale_mode) {
    const c10::DeviceGuard guard(x.device());
    return ops::quantize(*GetBackend{}(), x, scale_mode);
  });
  library.impl("mxfp4_dequantize", [](const Tensor& q, const Tensor& scale, at::ScalarType dtype) {
    const c10::DeviceGuard guard(q.device());
    return ops::dequantize(*GetBackend{}(), q, scale, dtype);
  });
  library.impl("mxfp4_gemm", [](const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                                std::optional<at::ScalarType> out_dtype, const std::optional<Tensor>& bias) {
    const c10::DeviceGuard guard(a.device());
    const ops::GemmNames names = {"mxfp4_gemm", "a", "b", "a_scale", "b_scale", "bias"};
    return ops::gemm(*GetBackend{}(), names, a, b, a_scale, b_scale, out_dtype, bias);
  });
  library.impl("mxfp4_linear", [](const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                                  const std::optional<Tensor>& bias, std::string_view scale_mode) {
    const c10::DeviceGuard guard(x.device());
    return ops::linear(*GetBackend{}(), x, weight, weight_scale, bias, scale_mode);
  });
  library.impl("mxfp4_expand", [](const Tensor& weight, const Tensor& weight_scale) {
    const c10::DeviceGuard guard(weight.device());
    return ops::expand(*GetBackend{}(), weight, weight_scale);
  });
  library.impl("mxfp4_linear_expanded",
               [](const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& expanded,
                  const std::optional<Tensor>& bias, std::string_view scale_mode) {
    const c10::DeviceGuard guard(x.device());
    return ops::linear_expanded(*GetBackend{}(), x, weight, weight_scale, expanded, bias, scale_mode);
  });
  library.impl("mxfp4_linear_w4a16",
               [](const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>& bias) {
    const c10::DeviceGuard guard(x.device());
    return ops::linear_w4a16(*GetBackend{}(), x, weight, weight_scale, bias);
  });
}

// Prepacked weights are the native kernels', so these are for CPU tensors.
template <class GetBackend>
void bind_prepacked_ops(torch::Library& library) {
  using at::Tensor;
  library.impl("mxfp4_prepack", ops::prepack);
  library.impl("mxfp4_unprepack", ops::unprepack);
  library.impl("mxfp4_gemm_prepacked", [](const Tensor& a, const Tensor& a_scale, const Tensor& b, int64_t out_features,
                                          std::optional<at::ScalarType> out_dtype, const std::optional<Tensor>& bias) {
    return ops::gemm_prepacked(*GetBackend{}(), a, a_scale, b, out_features, out_dtype, bias);
  });
  library.impl("mxfp4_linear_prepacked", [](const Tensor& x, const Tensor& weight, int64_t out_features,
                                            const std::optional<Tensor>& bias, std::string_view scale_mode) {
    return ops::linear_prepacked(*GetBackend{}(), x, weight, out_features, bias, scale_mode);
  });
  library.impl("mxfp4_linear_w4a16_prepacked",
               [](const Tensor& x, const Tensor& weight, int64_t out_features, const std::optional<Tensor>& bias) {
    return ops::linear_w4a16_prepacked(*GetBackend{}(), x, weight, out_features, bias);
  });
}

template <class GetBackend>
void bind_fp4_gemm(torch::Library& library) {
  using at::Tensor;
  library.impl("fp4_gemm", [](const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                              std::optional<at::ScalarType> out_dtype, const std::optional<Tensor>& bias) {
    const c10::DeviceGuard guard(a.device());
    const ops::GemmNames names = {"fp4_gemm", "A", "B", "A_scale", "B_scale", "bias_"};
    return ops::gemm(*GetBackend{}(), names, a, b, a_scale, b_scale, out_dtype, bias);
  });
}

template <class GetBackend>
void bind_group_quant(torch::Library& library) {
  using at::Tensor;
  library.impl("per_token_group_quant_mxfp4",
               [](const Tensor& input, const Tensor& output_q, const Tensor& output_s, int64_t group_size, double eps) {
    const c10::DeviceGuard guard(input.device());
    ops::group_quant(*GetBackend{}(), input, output_q, output_s, group_size, eps);
  });
}

}  // namespace xpu_fp4
