// SPDX-License-Identifier: Apache-2.0
// Prepacked weights, whose layout is the native kernels': ops for CPU tensors.
#include <ATen/ops/empty.h>

#include "../format/strips.h"
#include "cpu_backends.h"
#include "multiply.h"
#include "ops.h"

namespace xpu_fp4::ops {
namespace {

Weight strips_of(const Tensor& prepacked, int64_t n, int64_t k) {
  return {WeightForm::strips, n, k, nullptr, nullptr, 0, 0, bytes(prepacked)};
}

void check_prepacked(const Argument& arg, int64_t n, int64_t k) {
  TORCH_CHECK(n >= 0, arg.op, ": out_features is ", n, ", expected 0 or more");
  XPU_FP4_CHECK(arg, arg.tensor.device().is_cpu(), "is on ", arg.tensor.device(),
                ", expected cpu: the layout is the native kernels'");
  check_bytes(arg);
  check_shape(arg, {strips::count(n), strips::strip_bytes(k)}, "what mxfp4_prepack returns for this N and K");
  check_contiguous(arg);
}

// Codes and scales, uint8, of a checked prepacked weight.
std::pair<Tensor, Tensor> restore(const Tensor& prepacked, int64_t n, int64_t k) {
  const Tensor codes = at::empty({n, k / 2}, prepacked.options()), scale = at::empty({n, k / kBlock}, prepacked.options());
  if (codes.numel() == 0) return {codes, scale};
  native_backend().restore(strips_of(prepacked, n, k), codes.mutable_data_ptr<uint8_t>(), scale.mutable_data_ptr<uint8_t>());
  return {codes, scale};
}

// The weight is stored again for a backend that does not take strips.
HeldWeight hold_prepacked(const Backend& backend, const Argument& arg, int64_t n, int64_t k) {
  check_prepacked(arg, n, k);
  if (!refusal(backend, WeightForm::strips, n, k)) return {strips_of(arg.tensor, n, k), {arg.tensor}};
  const auto [codes, scale] = restore(arg.tensor, n, k);
  return held_stored(codes, scale, n, k);
}

Tensor linear_prepacked(const Backend& backend, const char* op, const Tensor& x, const Quantizer& to,
                        const TransformArguments& before, const Tensor& weight, int64_t out_features,
                        const std::optional<Tensor>& bias, double weight_global_scale) {
  const int64_t k = k_of_floats(op, x);
  return linear(backend, op, x, to, before, hold_prepacked(backend, {op, "weight", weight}, out_features, k), bias,
                weight_global_scale);
}

}  // namespace

Tensor mxfp4_prepack(const Backend& native, const Tensor& weight, const Tensor& weight_scale) {
  const char* op = "mxfp4_prepack";
  return prepare(native, op, hold_alone(op, weight, weight_scale), WeightForm::strips);
}

std::tuple<Tensor, Tensor> mxfp4_unprepack(const Backend&, const Tensor& prepacked, int64_t out_features, int64_t in_features) {
  const char* op = "mxfp4_unprepack";
  TORCH_CHECK(in_features >= 0 && in_features % kBlock == 0, op, ": in_features is ", in_features, ", expected a multiple of ",
              kBlock);
  check_prepacked({op, "prepacked", prepacked}, out_features, in_features);
  return restore(prepacked, out_features, in_features);
}

Tensor mxfp4_gemm_prepacked(const Backend& backend, const Tensor& a, const Tensor& a_scale, const Tensor& b,
                            int64_t out_features, std::optional<at::ScalarType> out_dtype, const std::optional<Tensor>& bias) {
  const GemmNames names = {"mxfp4_gemm_prepacked", "a", "b", "a_scale", "", "bias"};
  const int64_t k = k_of_codes({names.op, names.a, a});
  const HeldWeight weight = hold_prepacked(backend, {names.op, names.b, b}, out_features, k);
  return multiply_codes(backend, names, a, a_scale, weight, out_dtype, bias);
}

Tensor mxfp4_linear_prepacked(const Backend& backend, const Tensor& x, const Tensor& weight, int64_t out_features,
                              const std::optional<Tensor>& bias, std::string_view scale_mode, int64_t hadamard,
                              const std::optional<Tensor>& input_offset, double weight_global_scale) {
  const char* op = "mxfp4_linear_prepacked";
  return linear_prepacked(backend, op, x, Quantizer::mxfp4(check_scale_mode(op, scale_mode)), {hadamard, input_offset}, weight,
                          out_features, bias, weight_global_scale);
}

Tensor mxfp4_linear_w4a8_prepacked(const Backend& backend, const Tensor& x, const Tensor& weight, int64_t out_features,
                                   const std::optional<Tensor>& bias, int64_t group, int64_t hadamard,
                                   const std::optional<Tensor>& input_offset, double weight_global_scale) {
  const char* op = "mxfp4_linear_w4a8_prepacked";
  return linear_prepacked(backend, op, x, Quantizer::mxint8(check_group(op, group)), {hadamard, input_offset}, weight,
                          out_features, bias, weight_global_scale);
}

Tensor mxfp4_linear_w4a16_prepacked(const Backend& backend, const Tensor& x, const Tensor& weight, int64_t out_features,
                                    const std::optional<Tensor>& bias, int64_t hadamard,
                                    const std::optional<Tensor>& input_offset, double weight_global_scale) {
  const char* op = "mxfp4_linear_w4a16_prepacked";
  return linear_prepacked(backend, op, x, kAsTheyAre, {hadamard, input_offset}, weight, out_features, bias,
                          weight_global_scale);
}

}  // namespace xpu_fp4::ops
