// SPDX-License-Identifier: Apache-2.0
#include "operands.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

namespace xpu_fp4::ops {
namespace {

using at::IntArrayRef;

void check_form(const Backend& backend, const char* op, WeightForm form, int64_t n, int64_t k) {
  const auto reason = refusal(backend, form, n, k);
  TORCH_CHECK(!reason, op, ": weight ", *reason);
}

}  // namespace

std::optional<std::string> refusal(const Backend& backend, WeightForm form, int64_t n, int64_t k) {
  Product product{};
  product.activations.to = Quantizer::mxfp4(ScaleMode::even);
  product.weight.form = form;
  product.weight.n = n;
  product.weight.k = k;
  return backend.refusal(product);
}

HeldWeight held_stored(const Tensor& codes, const Tensor& scale, int64_t n, int64_t k) {
  return {{WeightForm::stored, n, k, bytes(codes), bytes(scale), k / kBlock, 1}, {codes, scale}};
}

HeldWeight hold_stored(const char* op, const Tensor& weight, const Tensor& weight_scale, int64_t k, const at::Device& device) {
  const Argument w_arg{op, "weight", weight}, scale_arg{op, "weight_scale", weight_scale};
  check_device(w_arg, device);
  check_weight_codes(w_arg);
  XPU_FP4_CHECK(w_arg, weight.dim() == 2, "must be [N, K/2], got shape ", weight.sizes());
  const int64_t n = weight.size(0);
  check_shape(w_arg, {n, k / 2}, "[N, K/2], K is the last dimension of x");
  check_contiguous(w_arg);
  check_device(scale_arg, device);
  check_scales(scale_arg);
  check_shape(scale_arg, {n, k / kBlock}, "[N, K/32]");
  check_contiguous(scale_arg);
  return held_stored(weight, weight_scale, n, k);
}

HeldWeight hold_alone(const char* op, const Tensor& weight, const Tensor& weight_scale) {
  const Argument arg{op, "weight", weight};
  check_weight_codes(arg);
  return hold_stored(op, weight, weight_scale, check_k(arg, elements_of_entry(Format::mxfp4)), weight.device());
}

HeldWeight hold_expanded(const Backend& backend, const char* op, const Tensor& weight, const Tensor& weight_scale,
                         const Tensor& expanded, int64_t k, const at::Device& device) {
  HeldWeight held = hold_stored(op, weight, weight_scale, k, device);
  const Argument arg{op, "expanded", expanded};
  check_device(arg, device);
  check_form(backend, op, WeightForm::expanded, held.view.n, k);
  check_bytes(arg);
  const PreparedShape shape = backend.prepared_shape(WeightForm::expanded, held.view.n, k);
  check_shape(arg, {shape.rows, shape.row_bytes}, "what mxfp4_expand returns for this weight on this device");
  check_contiguous(arg);
  XPU_FP4_CHECK(arg, reinterpret_cast<uintptr_t>(expanded.const_data_ptr()) % 64 == 0,
                "begins at an address that is no multiple of 64, expected what mxfp4_expand returned");
  held.view.form = WeightForm::expanded;
  held.view.prepared = bytes(expanded);
  held.tensors[2] = expanded;
  return held;
}

Tensor prepare(const Backend& backend, const char* op, const HeldWeight& weight, WeightForm form) {
  check_form(backend, op, form, weight.view.n, weight.view.k);
  const PreparedShape shape = backend.prepared_shape(form, weight.view.n, weight.view.k);
  // Zeros, since a form may have padding: the same weight is to give the same bytes.
  const Tensor out = at::zeros({shape.rows, shape.row_bytes}, weight.tensors[0].options().dtype(at::kByte));
  if (out.numel() != 0) backend.prepare(weight.view, form, out.mutable_data_ptr<uint8_t>());
  return out;
}

HeldBias hold_bias(const Argument& arg, IntArrayRef y_shape) {
  check_float(arg);
  // The last two dimensions of y, of which a vector has one row; a 3-D y repeats the bias for every matrix of the batch.
  const std::vector<int64_t> matrix = {y_shape.size() > 1 ? y_shape[y_shape.size() - 2] : 1, y_shape.back()};
  const IntArrayRef sizes = arg.tensor.sizes();
  bool fits = sizes.size() <= matrix.size();
  for (size_t i = 1; fits && i <= sizes.size(); ++i) {
    fits = sizes[sizes.size() - i] == 1 || sizes[sizes.size() - i] == matrix[matrix.size() - i];
  }
  XPU_FP4_CHECK(arg, fits, "has shape ", sizes,
                ", expected a scalar, [N], [M, 1] or [M, N] with [M, N] = ", IntArrayRef(matrix));
  const Tensor spread = arg.tensor.to(at::kFloat).expand(matrix);
  // A one-row bias is broadcast: the linears give one row for all of theirs.
  const int64_t row_stride = matrix[0] == 1 ? 0 : spread.stride(0);
  if (y_shape.size() > 2 && row_stride != 0) {
    // Rows are counted through the batch: write the repetition out.
    const Tensor full = spread.expand(y_shape).contiguous();
    return {full, {full.const_data_ptr<float>(), y_shape.back(), 1}};
  }
  return {spread, {spread.const_data_ptr<float>(), row_stride, spread.stride(1)}};
}

HeldBias hold_linear_bias(const char* op, const Tensor& x, const std::optional<Tensor>& bias, int64_t n) {
  if (!bias) return {};
  const Argument arg{op, "bias", *bias};
  check_device(arg, x.device());
  check_shape(arg, {n}, "[N]");
  return hold_bias(arg, {n});
}

}  // namespace xpu_fp4::ops
