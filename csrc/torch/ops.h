// SPDX-License-Identifier: Apache-2.0
// The ops over tensors, for any backend: check every argument, allocate, call. An argument that does not fit raises c10::Error
// (RuntimeError in Python), which names the op and the argument, and says what was given and what is expected, before any
// memory is touched.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "../backend.h"

namespace xpu_fp4::ops {

using at::Tensor;

/// x [..., K] float32, float16 or bfloat16, any strides, K % 32 == 0 -> codes [..., K/2] float4_e2m1fn_x2 and scales
/// [..., K/32] float8_e8m0fnu. A block with a NaN or Inf gets a NaN scale and codes 0.
std::tuple<Tensor, Tensor> quantize(const Backend& backend, const Tensor& x, std::string_view scale_mode);

/// Codes [..., K/2] and scales [..., K/32] -> values [..., K] of dtype, each rounded once.
Tensor dequantize(const Backend& backend, const Tensor& q, const Tensor& scale, at::ScalarType dtype);

/// How an op calls its arguments, for the messages.
struct GemmNames {
  const char *op, *a, *b, *a_scale, *b_scale, *bias;
};

/// Y [..., N] = a [..., K] x b [K, N] + bias. a: codes [..., K/2] with scales [..., K/32]; b: codes [K/2, N], the .t() view of
/// a contiguous [N, K/2], with scales [K/32, N], contiguous; bias: broadcastable to [M, N], the last two dimensions of Y,
/// float32, float16 or bfloat16. out_dtype: float32, float16 (the default) or bfloat16.
Tensor gemm(const Backend& backend, const GemmNames& names, const Tensor& a, const Tensor& b, const Tensor& a_scale,
            const Tensor& b_scale, std::optional<at::ScalarType> out_dtype, const std::optional<Tensor>& bias);

/// Y [..., N] = quantize(x) [..., K] x weight [N, K]^T + bias [N], of x's dtype. weight: codes [N, K/2], contiguous;
/// weight_scale [N, K/32], contiguous.
Tensor linear(const Backend& backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
              const std::optional<Tensor>& bias, std::string_view scale_mode);

/// The same with x as it is.
Tensor linear_w4a16(const Backend& backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                    const std::optional<Tensor>& bias);

/// weight [N, K/2] and weight_scale [N, K/32], contiguous -> the form in which W4A4 products for many rows read it, which they
/// otherwise make anew in each call: uint8 and opaque, about one byte an element. Raises where the device's kernels have none.
Tensor expand(const Backend& backend, const Tensor& weight, const Tensor& weight_scale);

/// linear with what expand gave for this weight, for products of many rows; those of few read the weight as it is.
Tensor linear_expanded(const Backend& backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                       const Tensor& expanded, const std::optional<Tensor>& bias, std::string_view scale_mode);

/// weight [N, K/2] and weight_scale [N, K/32], on the CPU, contiguous -> the prepacked layout, uint8 [ceil(N/16), bytes]
/// (format/strips.h).
Tensor prepack(const Tensor& weight, const Tensor& weight_scale);

/// The way back: codes [N, K/2] and scales [N, K/32], both uint8.
std::tuple<Tensor, Tensor> unprepack(const Tensor& prepacked, int64_t out_features, int64_t in_features);

/// gemm, linear and linear_w4a16 with a prepacked weight of out_features rows; a's K tells its columns.
Tensor gemm_prepacked(const Backend& backend, const Tensor& a, const Tensor& a_scale, const Tensor& b, int64_t out_features,
                      std::optional<at::ScalarType> out_dtype, const std::optional<Tensor>& bias);
Tensor linear_prepacked(const Backend& backend, const Tensor& x, const Tensor& weight, int64_t out_features,
                        const std::optional<Tensor>& bias, std::string_view scale_mode);
Tensor linear_w4a16_prepacked(const Backend& backend, const Tensor& x, const Tensor& weight, int64_t out_features,
                              const std::optional<Tensor>& bias);

/// vllm-xpu-kernels' quantizer: input [..., K] contiguous -> output_q uint8 [..., K/2] contiguous and output_s float32
/// [..., K/32], contiguous or, with two dimensions, row-major or column-major with any stride between. group_size must be 32,
/// eps positive and finite. The outputs must not share memory with each other or the input.
void group_quant(const Backend& backend, const Tensor& input, const Tensor& output_q, const Tensor& output_s,
                 int64_t group_size, double eps);

}  // namespace xpu_fp4::ops
