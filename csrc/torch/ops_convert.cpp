// SPDX-License-Identifier: Apache-2.0
// Floats to codes and scales, and back.
#include <ATen/ops/empty.h>

#include <cmath>

#include "../format/block.h"
#include "checks.h"
#include "ops.h"

namespace xpu_fp4::ops {
namespace {

using at::ScalarType;

// Scales of the compatibility quantizer: contiguous, or with two dimensions rows or columns at any distance. Returns whether it
// is by columns.
bool check_scale_layout(const Argument& arg) {
  const Tensor& s = arg.tensor;
  const bool by_rows = s.is_contiguous() || (s.dim() == 2 && s.stride(1) == 1 && s.stride(0) >= s.size(1));
  const bool by_columns = s.dim() == 2 && s.stride(0) == 1 && s.stride(1) >= s.size(0);
  XPU_FP4_CHECK(arg, by_rows || by_columns, "must be contiguous or, with two dimensions, row-major or column-major, got shape ",
                s.sizes(), " with strides ", s.strides());
  return !by_rows;
}

ScalarType code_type(Format format) { return format == Format::mxfp4 ? at::kFloat4_e2m1fn_x2 : at::kChar; }

std::tuple<Tensor, Tensor> quantize(const Backend& backend, const Argument& arg, Quantizer to, int64_t hadamard,
                                    const std::optional<Tensor>& input_offset) {
  const Tensor& x = arg.tensor;
  const DType dtype = check_float(arg);
  const int64_t k = check_k(arg, 1);
  const HeldTransform transform = check_transform(arg, hadamard, input_offset);
  to.transform = transform.view;
  const Tensor dense = x.contiguous();
  // Memory is made as bytes: torch fills what is empty where algorithms are to be deterministic, and has no value of MXFP4's
  // codes.
  const auto empty = [&](int64_t last, ScalarType type) {
    return at::empty(with_last(x, last), x.options().dtype(at::kByte)).view(type);
  };
  const Tensor q = empty(code_bytes(to.format, k), code_type(to.format)), scale = empty(k / kBlock, at::kFloat8_e8m0fnu);
  if (x.numel() == 0) return {q, scale};
  backend.quantize({dense.const_data_ptr(), dtype, to, rows_of(x), k, static_cast<uint8_t*>(q.data_ptr()),
                    static_cast<uint8_t*>(scale.data_ptr())});
  return {q, scale};
}

Tensor dequantize(const Backend& backend, const char* op, Format format, const Tensor& q, const Tensor& scale,
                  ScalarType dtype) {
  const Argument q_arg{op, "q", q}, scale_arg{op, "scale", scale};
  const int64_t k = check_k(q_arg, elements_of_entry(format));
  check_device(scale_arg, q.device());
  check_scales(scale_arg);
  check_shape(scale_arg, with_last(q, k / kBlock), "q's, with K/32 last");
  const DType out_dtype = check_out_dtype(op, "dtype", dtype);
  const Tensor dense_q = q.contiguous(), dense_scale = scale.contiguous();
  const Tensor out = at::empty(with_last(q, k), q.options().dtype(dtype));
  if (out.numel() == 0) return out;
  backend.dequantize({format, bytes(dense_q), bytes(dense_scale), rows_of(q), k, out.data_ptr(), out_dtype});
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> mxfp4_quantize(const Backend& backend, const Tensor& x, std::string_view scale_mode,
                                          int64_t hadamard, const std::optional<Tensor>& input_offset) {
  const Argument arg{"mxfp4_quantize", "x", x};
  check_float(arg);
  check_k(arg, 1);
  return quantize(backend, arg, Quantizer::mxfp4(check_scale_mode(arg.op, scale_mode)), hadamard, input_offset);
}

Tensor mxfp4_dequantize(const Backend& backend, const Tensor& q, const Tensor& scale, ScalarType dtype) {
  const char* op = "mxfp4_dequantize";
  check_weight_codes({op, "q", q});
  return dequantize(backend, op, Format::mxfp4, q, scale, dtype);
}

std::tuple<Tensor, Tensor> mxint8_quantize(const Backend& backend, const Tensor& x, int64_t group, int64_t hadamard,
                                           const std::optional<Tensor>& input_offset) {
  const Argument arg{"mxint8_quantize", "x", x};
  check_float(arg);
  check_k(arg, 1);
  return quantize(backend, arg, Quantizer::mxint8(check_group(arg.op, group)), hadamard, input_offset);
}

Tensor mxint8_dequantize(const Backend& backend, const Tensor& q, const Tensor& scale, ScalarType dtype) {
  const Argument arg{"mxint8_dequantize", "q", q};
  XPU_FP4_CHECK(arg, q.scalar_type() == at::kChar, "must be int8, got ", q.scalar_type());
  return dequantize(backend, arg.op, Format::mxint8, q, scale, dtype);
}

void per_token_group_quant_mxfp4(const Backend& backend, const Tensor& input, const Tensor& output_q, const Tensor& output_s,
                                 int64_t group_size, double eps) {
  const char* op = "per_token_group_quant_mxfp4";
  const Argument in_arg{op, "input", input}, q_arg{op, "output_q", output_q}, s_arg{op, "output_s", output_s};
  TORCH_CHECK(group_size == kBlock, op, ": group_size is ", group_size, ", expected ", kBlock);
  TORCH_CHECK(eps > 0 && std::isfinite(eps), op, ": eps is ", eps, ", expected a positive finite number");
  for (const Argument& arg : {in_arg, q_arg, s_arg}) {
    XPU_FP4_CHECK(arg, !arg.tensor.is_neg(), "is a lazily negated view, expected a plain tensor (resolve_neg())");
  }
  const DType dtype = check_float(in_arg);
  const int64_t k = check_k(in_arg, 1);
  check_contiguous(in_arg);
  check_device(q_arg, input.device());
  check_bytes(q_arg);
  check_shape(q_arg, with_last(input, k / 2), "input's, with K/2 last");
  check_contiguous(q_arg);
  check_device(s_arg, input.device());
  XPU_FP4_CHECK(s_arg, output_s.scalar_type() == at::kFloat, "must be float32, got ", output_s.scalar_type());
  check_shape(s_arg, with_last(input, k / kBlock), "input's, with K/32 last");
  const bool by_columns = check_scale_layout(s_arg);
  check_no_overlap(q_arg, in_arg);
  check_no_overlap(s_arg, in_arg);
  check_no_overlap(s_arg, q_arg);
  if (input.numel() == 0) return;
  const int64_t row_stride = output_s.dim() == 2 ? output_s.stride(0) : k / kBlock;
  backend.group_quantize({input.const_data_ptr(), dtype, rows_of(input), k, group_quant::floor_from_eps(eps),
                          static_cast<uint8_t*>(output_q.data_ptr()), output_s.data_ptr<float>(), row_stride,
                          by_columns ? output_s.stride(1) : 1});
}

}  // namespace xpu_fp4::ops
