// SPDX-License-Identifier: Apache-2.0
// Products, of codes and of floats that are quantized on the way or multiplied as they are, with stored and expanded weights.
#include <ATen/ops/empty.h>

#include "../format/fp_quant.h"
#include "multiply.h"
#include "ops.h"

namespace xpu_fp4::ops {
namespace {

using at::ScalarType;

void multiply(const Backend& backend, const char* op, const Product& product) {
  const auto reason = backend.refusal(product);
  TORCH_CHECK(!reason, op, ": weight ", *reason);
  // Rows without columns may be said to be as many as 2^63. Where only K is 0 there is a bias to write.
  if (product.activations.m == 0 || product.weight.n == 0) return;
  backend.multiply(product);
}

}  // namespace

int64_t k_of_codes(const Argument& arg) { return check_k(arg, elements_of_entry(check_codes(arg))); }

Tensor multiply_codes(const Backend& backend, const GemmNames& names, const Tensor& a, const Tensor& a_scale,
                      const HeldWeight& weight, std::optional<ScalarType> out_dtype, const std::optional<Tensor>& bias) {
  const int64_t k = weight.view.k;
  const Argument a_scale_arg{names.op, names.a_scale, a_scale};
  check_device(a_scale_arg, a.device());
  check_scales(a_scale_arg);
  check_shape(a_scale_arg, with_last(a, k / kBlock), "the codes', with K/32 last");
  const ScalarType y_type = out_dtype.value_or(at::kHalf);
  const DType y_dtype = check_out_dtype(names.op, "out_dtype", y_type);
  const std::vector<int64_t> y_shape = with_last(a, weight.view.n);
  if (bias) check_device({names.op, names.bias, *bias}, a.device());
  const HeldBias held = bias ? hold_bias({names.op, names.bias, *bias}, y_shape) : HeldBias{};
  const Tensor dense_a = a.contiguous(), dense_a_scale = a_scale.contiguous();
  const Tensor y = at::empty(y_shape, a.options().dtype(y_type));
  const Format format = a.scalar_type() == at::kChar ? Format::mxint8 : Format::mxfp4;
  multiply(backend, names.op,
           {Activations::codes(format, bytes(dense_a), bytes(dense_a_scale), rows_of(a), k),
            weight.view,
            {y.data_ptr(), y_dtype, held.view}});
  return y;
}

int64_t k_of_floats(const char* op, const Tensor& x) {
  const Argument arg{op, "x", x};
  check_float(arg);
  return check_k(arg, 1);
}

Tensor linear(const Backend& backend, const char* op, const Tensor& x, Quantizer to, const TransformArguments& before,
              const HeldWeight& weight, const std::optional<Tensor>& bias, double weight_global_scale) {
  const float global_scale = check_global_scale(op, weight_global_scale) * fp_quant::global_scale(to.mode);
  const HeldTransform transform = check_transform({op, "x", x}, before.hadamard, before.input_offset);
  to.transform = transform.view;
  const HeldBias held = hold_linear_bias(op, x, bias, weight.view.n);
  const Tensor dense = x.contiguous();
  const Tensor y = at::empty(with_last(x, weight.view.n), x.options());
  const DType dtype = dtype_of(x.scalar_type());
  multiply(backend, op,
           {Activations::floats(dense.const_data_ptr(), dtype, to, rows_of(x), weight.view.k),
            weight.view,
            {y.data_ptr(), dtype, held.view, 1.0f / global_scale}});
  return y;
}

namespace {

Tensor gemm(const Backend& backend, const GemmNames& names, const Tensor& a, const Tensor& b, const Tensor& a_scale,
            const Tensor& b_scale, std::optional<ScalarType> out_dtype, const std::optional<Tensor>& bias) {
  const Argument b_arg{names.op, names.b, b}, b_scale_arg{names.op, names.b_scale, b_scale};
  const int64_t k = k_of_codes({names.op, names.a, a});
  check_device(b_arg, a.device());
  check_weight_codes(b_arg);
  XPU_FP4_CHECK(b_arg, b.dim() == 2 && b.size(0) == k / 2, "has shape ", b.sizes(), ", expected [K/2, N] with K/2 = ", k / 2,
                ", of the K in the last dimension of ", names.a);
  XPU_FP4_CHECK(b_arg, b.t().is_contiguous(), "must be the .t() view of a contiguous [N, K/2], got shape ", b.sizes(),
                " with strides ", b.strides());
  const int64_t n = b.size(1);
  check_device(b_scale_arg, a.device());
  check_scales(b_scale_arg);
  check_shape(b_scale_arg, {k / kBlock, n}, "[K/32, N], the transpose of a checkpoint's scales, made contiguous");
  check_contiguous(b_scale_arg);
  const HeldWeight weight = {{WeightForm::stored, n, k, bytes(b), bytes(b_scale), 1, n}, {b, b_scale}};
  return multiply_codes(backend, names, a, a_scale, weight, out_dtype, bias);
}

Tensor linear_stored(const Backend& backend, const char* op, const Tensor& x, const Quantizer& to,
                     const TransformArguments& before, const Tensor& weight, const Tensor& weight_scale,
                     const std::optional<Tensor>& bias, double weight_global_scale) {
  const int64_t k = k_of_floats(op, x);
  return linear(backend, op, x, to, before, hold_stored(op, weight, weight_scale, k, x.device()), bias, weight_global_scale);
}

Tensor linear_expanded(const Backend& backend, const char* op, const Tensor& x, const Quantizer& to,
                       const TransformArguments& before, const Tensor& weight, const Tensor& weight_scale,
                       const Tensor& expanded, const std::optional<Tensor>& bias, double weight_global_scale) {
  const int64_t k = k_of_floats(op, x);
  return linear(backend, op, x, to, before, hold_expanded(backend, op, weight, weight_scale, expanded, k, x.device()), bias,
                weight_global_scale);
}

}  // namespace

Tensor mxfp4_gemm(const Backend& backend, const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                  std::optional<ScalarType> out_dtype, const std::optional<Tensor>& bias) {
  const GemmNames names = {"mxfp4_gemm", "a", "b", "a_scale", "b_scale", "bias"};
  return gemm(backend, names, a, b, a_scale, b_scale, out_dtype, bias);
}

Tensor fp4_gemm(const Backend& backend, const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                std::optional<ScalarType> out_dtype, const std::optional<Tensor>& bias) {
  const GemmNames names = {"fp4_gemm", "A", "B", "A_scale", "B_scale", "bias_"};
  return gemm(backend, names, a, b, a_scale, b_scale, out_dtype, bias);
}

Tensor mxfp4_linear(const Backend& backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                    const std::optional<Tensor>& bias, std::string_view scale_mode, int64_t hadamard,
                    const std::optional<Tensor>& input_offset, double weight_global_scale) {
  const char* op = "mxfp4_linear";
  return linear_stored(backend, op, x, Quantizer::mxfp4(check_scale_mode(op, scale_mode)), {hadamard, input_offset}, weight,
                       weight_scale, bias, weight_global_scale);
}

Tensor mxfp4_linear_expanded(const Backend& backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                             const Tensor& expanded, const std::optional<Tensor>& bias, std::string_view scale_mode,
                             int64_t hadamard, const std::optional<Tensor>& input_offset, double weight_global_scale) {
  const char* op = "mxfp4_linear_expanded";
  return linear_expanded(backend, op, x, Quantizer::mxfp4(check_scale_mode(op, scale_mode)), {hadamard, input_offset}, weight,
                         weight_scale, expanded, bias, weight_global_scale);
}

Tensor mxfp4_linear_w4a8(const Backend& backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                         const std::optional<Tensor>& bias, int64_t group, int64_t hadamard,
                         const std::optional<Tensor>& input_offset, double weight_global_scale) {
  const char* op = "mxfp4_linear_w4a8";
  return linear_stored(backend, op, x, Quantizer::mxint8(check_group(op, group)), {hadamard, input_offset}, weight,
                       weight_scale, bias, weight_global_scale);
}

Tensor mxfp4_linear_w4a8_expanded(const Backend& backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                                  const Tensor& expanded, const std::optional<Tensor>& bias, int64_t group, int64_t hadamard,
                                  const std::optional<Tensor>& input_offset, double weight_global_scale) {
  const char* op = "mxfp4_linear_w4a8_expanded";
  return linear_expanded(backend, op, x, Quantizer::mxint8(check_group(op, group)), {hadamard, input_offset}, weight,
                         weight_scale, expanded, bias, weight_global_scale);
}

Tensor mxfp4_linear_w4a16(const Backend& backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                          const std::optional<Tensor>& bias, int64_t hadamard, const std::optional<Tensor>& input_offset,
                          double weight_global_scale) {
  const char* op = "mxfp4_linear_w4a16";
  return linear_stored(backend, op, x, kAsTheyAre, {hadamard, input_offset}, weight, weight_scale, bias, weight_global_scale);
}

Tensor mxfp4_expand(const Backend& backend, const Tensor& weight, const Tensor& weight_scale) {
  const char* op = "mxfp4_expand";
  return prepare(backend, op, hold_alone(op, weight, weight_scale), WeightForm::expanded);
}

}  // namespace xpu_fp4::ops
