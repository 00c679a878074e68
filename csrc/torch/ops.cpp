// SPDX-License-Identifier: Apache-2.0
#include "ops.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <utility>

#include "../cpu/prepack.h"
#include "../format/block.h"

namespace xpu_fp4::ops {
namespace {

using at::IntArrayRef;
using at::ScalarType;

// ---- checks ----

// An argument with its place, for the messages: "mxfp4_gemm: b_scale".
struct Argument {
  const char *op, *name;
  const Tensor& tensor;
};

#define XPU_FP4_CHECK(argument, condition, ...) TORCH_CHECK(condition, (argument).op, ": ", (argument).name, " ", __VA_ARGS__)

void check_device(const Argument& arg, const at::Device& device) {
  XPU_FP4_CHECK(arg, arg.tensor.device() == device, "is on ", arg.tensor.device(), ", expected ", device,
                " like the first argument");
}

void check_contiguous(const Argument& arg) {
  XPU_FP4_CHECK(arg, arg.tensor.is_contiguous(), "must be contiguous, got shape ", arg.tensor.sizes(), " with strides ",
                arg.tensor.strides());
}

void check_rank_at_least(const Argument& arg, int64_t rank) {
  XPU_FP4_CHECK(arg, arg.tensor.dim() >= rank, "must have at least ", rank, " dimension(s), got shape ", arg.tensor.sizes());
}

void check_shape(const Argument& arg, IntArrayRef expected, const char* meaning) {
  XPU_FP4_CHECK(arg, arg.tensor.sizes() == expected, "has shape ", arg.tensor.sizes(), ", expected ", expected, " (", meaning,
                ")");
}

bool is_float(ScalarType type) { return type == at::kFloat || type == at::kHalf || type == at::kBFloat16; }

void check_float(const Argument& arg) {
  XPU_FP4_CHECK(arg, is_float(arg.tensor.scalar_type()), "must be float32, float16 or bfloat16, got ",
                arg.tensor.scalar_type());
}

void check_codes(const Argument& arg) {
  const ScalarType type = arg.tensor.scalar_type();
  XPU_FP4_CHECK(arg, type == at::kFloat4_e2m1fn_x2 || type == at::kByte, "must be float4_e2m1fn_x2 or uint8, got ", type);
}

void check_scales(const Argument& arg) {
  const ScalarType type = arg.tensor.scalar_type();
  XPU_FP4_CHECK(arg, type == at::kFloat8_e8m0fnu || type == at::kByte, "must be float8_e8m0fnu or uint8, got ", type);
}

// K of a tensor of elements, or of packed codes (two to an entry), in its last dimension.
int64_t check_k(const Argument& arg, int64_t elements_per_entry) {
  check_rank_at_least(arg, 1);
  const int64_t k = arg.tensor.size(-1) * elements_per_entry;
  XPU_FP4_CHECK(arg, k % kBlock == 0, "has ", k, " elements in its last dimension, expected a multiple of ", kBlock);
  return k;
}

ScaleMode parse_scale_mode(const char* op, std::string_view mode) {
  if (mode == "floor") return ScaleMode::floor;
  if (mode == "ceil") return ScaleMode::ceil;
  if (mode == "even") return ScaleMode::even;
  if (mode == "rceil") return ScaleMode::rceil;
  TORCH_CHECK(false, op, ": scale_mode is \"", std::string(mode), "\", expected \"floor\", \"ceil\", \"even\" or \"rceil\"");
}

DType dtype_of(ScalarType type) { return type == at::kFloat ? DType::f32 : type == at::kHalf ? DType::f16 : DType::bf16; }

DType check_out_dtype(const char* op, const char* name, ScalarType type) {
  TORCH_CHECK(is_float(type), op, ": ", name, " must be float32, float16 or bfloat16, got ", type);
  return dtype_of(type);
}

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

// The bytes from the first to the last element.
std::pair<const uint8_t*, const uint8_t*> byte_range(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const auto* first = static_cast<const uint8_t*>(tensor.const_data_ptr());
  return {first, first + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

void check_no_overlap(const Argument& written, const Argument& other) {
  if (written.tensor.numel() == 0 || other.tensor.numel() == 0) return;
  const auto [first, last] = byte_range(written.tensor);
  const auto [other_first, other_last] = byte_range(other.tensor);
  XPU_FP4_CHECK(written, last <= other_first || other_last <= first, "shares memory with ", other.name);
}

constexpr char kNoExpandedForm[] =
    "only the SYCL kernels for GPUs with a matrix unit have an expanded form; this device's kernels read a weight as it is "
    "stored";

// ---- shapes ----

std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> shape = tensor.sizes().vec();
  shape.back() = last;
  return shape;
}

// Rows of a matrix whose leading dimensions count as one.
int64_t rows_of(const Tensor& tensor) {
  const IntArrayRef sizes = tensor.sizes();
  return c10::multiply_integers(sizes.begin(), sizes.end() - 1);
}

const uint8_t* bytes(const Tensor& tensor) { return static_cast<const uint8_t*>(tensor.const_data_ptr()); }

// ---- what several ops share ----

struct Quantized {
  Tensor q, scale;
};

Quantized quantize_checked(const Backend& backend, const Tensor& x, ScaleMode mode) {
  const int64_t k = x.size(-1);
  const Tensor dense = x.contiguous();
  const Tensor q = at::empty(with_last(x, k / 2), x.options().dtype(at::kFloat4_e2m1fn_x2));
  const Tensor scale = at::empty(with_last(x, k / kBlock), x.options().dtype(at::kFloat8_e8m0fnu));
  backend.quantize({dense.const_data_ptr(), dtype_of(x.scalar_type()), rows_of(x), k, mode, static_cast<uint8_t*>(q.data_ptr()),
                    static_cast<uint8_t*>(scale.data_ptr())});
  return {q, scale};
}

// A float32 bias, kept alive, and its strides over the output's rows and columns.
struct HeldBias {
  Tensor tensor;
  Bias view{nullptr, 0, 0};
};

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
  // Of a single row the stride means nothing, and the linears give one row for all of theirs.
  const int64_t row_stride = matrix[0] == 1 ? 0 : spread.stride(0);
  if (y_shape.size() > 2 && row_stride != 0) {
    // Rows are counted through the batch: write the repetition out.
    const Tensor full = spread.expand(y_shape).contiguous();
    return {full, {full.const_data_ptr<float>(), y_shape.back(), 1}};
  }
  return {spread, {spread.const_data_ptr<float>(), row_stride, spread.stride(1)}};
}

HeldBias hold_linear_bias(const Argument& arg, int64_t n) {
  check_shape(arg, {n}, "[N]");
  return hold_bias(arg, {n});
}

// A weight and whatever must stay alive for it.
struct HeldWeight {
  Weight view;
  int64_t n;
  Tensor codes, scale;
};

// A weight [N, K/2] with scales [N, K/32], as checkpoints store it.
HeldWeight hold_rows(const Argument& w_arg, const Argument& scale_arg, int64_t k, const at::Device& device) {
  const Tensor &weight = w_arg.tensor, &scale = scale_arg.tensor;
  check_device(w_arg, device);
  check_codes(w_arg);
  XPU_FP4_CHECK(w_arg, weight.dim() == 2, "must be [N, K/2], got shape ", weight.sizes());
  const int64_t n = weight.size(0);
  check_shape(w_arg, {n, k / 2}, "[N, K/2], K is the last dimension of x");
  check_contiguous(w_arg);
  check_device(scale_arg, device);
  check_scales(scale_arg);
  check_shape(scale_arg, {n, k / kBlock}, "[N, K/32]");
  check_contiguous(scale_arg);
  return {{bytes(weight), bytes(scale), k / kBlock, 1}, n, weight, scale};
}

void check_prepacked(const Argument& arg, int64_t n, int64_t k) {
  TORCH_CHECK(n >= 0, arg.op, ": out_features is ", n, ", expected 0 or more");
  XPU_FP4_CHECK(arg, arg.tensor.device().is_cpu(), "is on ", arg.tensor.device(),
                ", expected cpu: the layout is the native kernels'");
  XPU_FP4_CHECK(arg, arg.tensor.scalar_type() == at::kByte, "must be uint8, got ", arg.tensor.scalar_type());
  check_shape(arg, {strips::count(n), strips::strip_bytes(k)}, "what mxfp4_prepack returns for this N and K");
  check_contiguous(arg);
}

std::tuple<Tensor, Tensor> unpack(const Tensor& prepacked, int64_t n, int64_t k) {
  const Tensor codes = at::empty({n, k / 2}, prepacked.options()), scale = at::empty({n, k / kBlock}, prepacked.options());
  Weight w{};
  w.strips = bytes(prepacked);
  at::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    cpu::unpack_rows(w, k, {begin, end}, codes.mutable_data_ptr<uint8_t>(), scale.mutable_data_ptr<uint8_t>());
  });
  return {codes, scale};
}

// What expand returns for this weight, with the same backend.
void check_expanded(const Backend& backend, const Argument& arg, int64_t n, int64_t k, const at::Device& device) {
  const auto shape = backend.expanded_shape(n, k);
  check_device(arg, device);
  XPU_FP4_CHECK(arg, shape.has_value(), "is of no use here: ", kNoExpandedForm);
  XPU_FP4_CHECK(arg, arg.tensor.scalar_type() == at::kByte, "must be uint8, got ", arg.tensor.scalar_type());
  check_shape(arg, {shape->groups, shape->group_bytes}, "what mxfp4_expand returns for this weight on this device");
  check_contiguous(arg);
  XPU_FP4_CHECK(arg, reinterpret_cast<uintptr_t>(arg.tensor.const_data_ptr()) % 64 == 0,
                "begins at an address that is no multiple of 64, expected what mxfp4_expand returned");
}

// A prepacked weight; for a backend that does not take it, unpacked again.
HeldWeight hold_prepacked(const Backend& backend, const Argument& arg, int64_t n, int64_t k) {
  check_prepacked(arg, n, k);
  if (backend.takes_strips()) {
    HeldWeight held{{}, n, arg.tensor, {}};
    held.view.strips = bytes(arg.tensor);
    return held;
  }
  const auto [codes, scale] = unpack(arg.tensor, n, k);
  return {{bytes(codes), bytes(scale), k / kBlock, 1}, n, codes, scale};
}

int64_t check_x(const Argument& x_arg) {
  check_float(x_arg);
  return check_k(x_arg, 1);
}

HeldBias check_linear_bias(const char* op, const Tensor& x, const std::optional<Tensor>& bias, int64_t n) {
  if (!bias) return {};
  const Argument arg{op, "bias", *bias};
  check_device(arg, x.device());
  return hold_linear_bias(arg, n);
}

// W4A4 of checked arguments: in one go where the backend can.
Tensor run_linear(const Backend& backend, const Tensor& x, const HeldWeight& weight, const HeldBias& bias, ScaleMode mode) {
  const DType dtype = dtype_of(x.scalar_type());
  const int64_t m = rows_of(x), k = x.size(-1);
  const Tensor dense = x.contiguous();
  const Tensor y = at::empty(with_last(x, weight.n), x.options());
  if (!backend.linear({dense.const_data_ptr(), dtype, mode, weight.view, bias.view, y.data_ptr(), m, weight.n, k})) {
    const auto [q, scale] = quantize_checked(backend, dense, mode);
    backend.gemm({bytes(q), bytes(scale), weight.view, bias.view, y.data_ptr(), dtype, m, weight.n, k});
  }
  return y;
}

Tensor run_linear_w4a16(const Backend& backend, const Tensor& x, const HeldWeight& weight, const HeldBias& bias) {
  const Tensor dense = x.contiguous();
  const Tensor y = at::empty(with_last(x, weight.n), x.options());
  backend.gemm_w4a16({dense.const_data_ptr(), dtype_of(x.scalar_type()), weight.view, bias.view, y.data_ptr(), rows_of(x),
                      weight.n, x.size(-1)});
  return y;
}

// The second half of both products of codes: what is left to check, and the product.
Tensor run_gemm(const Backend& backend, const GemmNames& names, const Tensor& a, const Tensor& a_scale,
                const HeldWeight& weight, int64_t k, std::optional<ScalarType> out_dtype, const std::optional<Tensor>& bias) {
  const Argument a_scale_arg{names.op, names.a_scale, a_scale};
  check_device(a_scale_arg, a.device());
  check_scales(a_scale_arg);
  check_shape(a_scale_arg, with_last(a, k / kBlock), "the codes', with K/32 last");
  const ScalarType y_type = out_dtype.value_or(at::kHalf);
  const DType y_dtype = check_out_dtype(names.op, "out_dtype", y_type);
  const std::vector<int64_t> y_shape = with_last(a, weight.n);
  if (bias) check_device({names.op, names.bias, *bias}, a.device());
  const HeldBias held = bias ? hold_bias({names.op, names.bias, *bias}, y_shape) : HeldBias{};
  const Tensor dense_a = a.contiguous(), dense_a_scale = a_scale.contiguous();
  const Tensor y = at::empty(y_shape, a.options().dtype(y_type));
  backend.gemm({bytes(dense_a), bytes(dense_a_scale), weight.view, held.view, y.data_ptr(), y_dtype, rows_of(a), weight.n, k});
  return y;
}

}  // namespace

std::tuple<Tensor, Tensor> quantize(const Backend& backend, const Tensor& x, std::string_view scale_mode) {
  const Argument arg{"mxfp4_quantize", "x", x};
  check_float(arg);
  check_k(arg, 1);
  const auto [q, scale] = quantize_checked(backend, x, parse_scale_mode(arg.op, scale_mode));
  return {q, scale};
}

Tensor dequantize(const Backend& backend, const Tensor& q, const Tensor& scale, ScalarType dtype) {
  const char* op = "mxfp4_dequantize";
  const Argument q_arg{op, "q", q}, scale_arg{op, "scale", scale};
  check_codes(q_arg);
  const int64_t k = check_k(q_arg, 2);
  check_device(scale_arg, q.device());
  check_scales(scale_arg);
  check_shape(scale_arg, with_last(q, k / kBlock), "q's, with K/32 last");
  const DType out_dtype = check_out_dtype(op, "dtype", dtype);
  const Tensor dense_q = q.contiguous(), dense_scale = scale.contiguous();
  const Tensor out = at::empty(with_last(q, k), q.options().dtype(dtype));
  backend.dequantize({bytes(dense_q), bytes(dense_scale), rows_of(q), k, out.data_ptr(), out_dtype});
  return out;
}

Tensor gemm(const Backend& backend, const GemmNames& names, const Tensor& a, const Tensor& b, const Tensor& a_scale,
            const Tensor& b_scale, std::optional<ScalarType> out_dtype, const std::optional<Tensor>& bias) {
  const Argument a_arg{names.op, names.a, a}, b_arg{names.op, names.b, b};
  const Argument b_scale_arg{names.op, names.b_scale, b_scale};
  check_codes(a_arg);
  const int64_t k = check_k(a_arg, 2);
  check_device(b_arg, a.device());
  check_codes(b_arg);
  XPU_FP4_CHECK(b_arg, b.dim() == 2 && b.size(0) == k / 2, "has shape ", b.sizes(), ", expected [K/2, N] with K/2 = ", k / 2,
                ", the last dimension of ", names.a);
  XPU_FP4_CHECK(b_arg, b.t().is_contiguous(), "must be the .t() view of a contiguous [N, K/2], got shape ", b.sizes(),
                " with strides ", b.strides());
  const int64_t n = b.size(1);
  check_device(b_scale_arg, a.device());
  check_scales(b_scale_arg);
  check_shape(b_scale_arg, {k / kBlock, n}, "[K/32, N], the transpose of a checkpoint's scales, made contiguous");
  check_contiguous(b_scale_arg);
  const HeldWeight weight = {{bytes(b), bytes(b_scale), 1, n}, n, b, b_scale};
  return run_gemm(backend, names, a, a_scale, weight, k, out_dtype, bias);
}

Tensor gemm_prepacked(const Backend& backend, const Tensor& a, const Tensor& a_scale, const Tensor& b, int64_t out_features,
                      std::optional<ScalarType> out_dtype, const std::optional<Tensor>& bias) {
  const GemmNames names = {"mxfp4_gemm_prepacked", "a", "b", "a_scale", "", "bias"};
  const Argument a_arg{names.op, names.a, a};
  check_codes(a_arg);
  const int64_t k = check_k(a_arg, 2);
  const HeldWeight weight = hold_prepacked(backend, {names.op, names.b, b}, out_features, k);
  return run_gemm(backend, names, a, a_scale, weight, k, out_dtype, bias);
}

Tensor linear(const Backend& backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
              const std::optional<Tensor>& bias, std::string_view scale_mode) {
  const char* op = "mxfp4_linear";
  const int64_t k = check_x({op, "x", x});
  const HeldWeight held = hold_rows({op, "weight", weight}, {op, "weight_scale", weight_scale}, k, x.device());
  const ScaleMode mode = parse_scale_mode(op, scale_mode);
  return run_linear(backend, x, held, check_linear_bias(op, x, bias, held.n), mode);
}

Tensor expand(const Backend& backend, const Tensor& weight, const Tensor& weight_scale) {
  const char* op = "mxfp4_expand";
  const Argument w_arg{op, "weight", weight};
  check_codes(w_arg);
  const int64_t k = check_k(w_arg, 2);
  const HeldWeight held = hold_rows(w_arg, {op, "weight_scale", weight_scale}, k, weight.device());
  const auto shape = backend.expanded_shape(held.n, k);
  XPU_FP4_CHECK(w_arg, shape.has_value(), "cannot be expanded: ", kNoExpandedForm);
  // Zeros, since levels have padding: the same weight is to give the same bytes.
  const Tensor out = at::zeros({shape->groups, shape->group_bytes}, weight.options().dtype(at::kByte));
  backend.expand(held.view, held.n, k, out.mutable_data_ptr<uint8_t>());
  return out;
}

Tensor linear_expanded(const Backend& backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                       const Tensor& expanded, const std::optional<Tensor>& bias, std::string_view scale_mode) {
  const char* op = "mxfp4_linear_expanded";
  const int64_t k = check_x({op, "x", x});
  HeldWeight held = hold_rows({op, "weight", weight}, {op, "weight_scale", weight_scale}, k, x.device());
  check_expanded(backend, {op, "expanded", expanded}, held.n, k, x.device());
  held.view.expanded = bytes(expanded);
  const ScaleMode mode = parse_scale_mode(op, scale_mode);
  return run_linear(backend, x, held, check_linear_bias(op, x, bias, held.n), mode);
}

Tensor linear_prepacked(const Backend& backend, const Tensor& x, const Tensor& weight, int64_t out_features,
                        const std::optional<Tensor>& bias, std::string_view scale_mode) {
  const char* op = "mxfp4_linear_prepacked";
  const int64_t k = check_x({op, "x", x});
  const HeldWeight held = hold_prepacked(backend, {op, "weight", weight}, out_features, k);
  const ScaleMode mode = parse_scale_mode(op, scale_mode);
  return run_linear(backend, x, held, check_linear_bias(op, x, bias, held.n), mode);
}

Tensor linear_w4a16(const Backend& backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                    const std::optional<Tensor>& bias) {
  const char* op = "mxfp4_linear_w4a16";
  const int64_t k = check_x({op, "x", x});
  const HeldWeight held = hold_rows({op, "weight", weight}, {op, "weight_scale", weight_scale}, k, x.device());
  return run_linear_w4a16(backend, x, held, check_linear_bias(op, x, bias, held.n));
}

Tensor linear_w4a16_prepacked(const Backend& backend, const Tensor& x, const Tensor& weight, int64_t out_features,
                              const std::optional<Tensor>& bias) {
  const char* op = "mxfp4_linear_w4a16_prepacked";
  const int64_t k = check_x({op, "x", x});
  const HeldWeight held = hold_prepacked(backend, {op, "weight", weight}, out_features, k);
  return run_linear_w4a16(backend, x, held, check_linear_bias(op, x, bias, held.n));
}

Tensor prepack(const Tensor& weight, const Tensor& weight_scale) {
  const char* op = "mxfp4_prepack";
  const Argument w_arg{op, "weight", weight};
  check_codes(w_arg);
  const int64_t k = check_k(w_arg, 2);
  const HeldWeight held = hold_rows(w_arg, {op, "weight_scale", weight_scale}, k, weight.device());
  const int64_t quads = strips::quads(k);
  const Tensor out = at::empty({strips::count(held.n), strips::strip_bytes(k)}, weight.options().dtype(at::kByte));
  auto* records = out.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, strips::count(held.n) * quads, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t strip = i / quads, quad = i % quads;
      cpu::prepack_record(held.view, held.n, k, strip, quad, strips::blocks_of(k, quad),
                          records + strips::record_offset(strip, quad, k));
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> unprepack(const Tensor& prepacked, int64_t out_features, int64_t in_features) {
  const char* op = "mxfp4_unprepack";
  TORCH_CHECK(in_features >= 0 && in_features % kBlock == 0, op, ": in_features is ", in_features, ", expected a multiple of ",
              kBlock);
  check_prepacked({op, "prepacked", prepacked}, out_features, in_features);
  return unpack(prepacked, out_features, in_features);
}

void group_quant(const Backend& backend, const Tensor& input, const Tensor& output_q, const Tensor& output_s,
                 int64_t group_size, double eps) {
  const char* op = "per_token_group_quant_mxfp4";
  const Argument in_arg{op, "input", input}, q_arg{op, "output_q", output_q}, s_arg{op, "output_s", output_s};
  TORCH_CHECK(group_size == kBlock, op, ": group_size is ", group_size, ", expected ", kBlock);
  TORCH_CHECK(eps > 0 && std::isfinite(eps), op, ": eps is ", eps, ", expected a positive finite number");
  for (const Argument& arg : {in_arg, q_arg, s_arg}) {
    XPU_FP4_CHECK(arg, !arg.tensor.is_neg(), "is a lazily negated view, expected a plain tensor (resolve_neg())");
  }
  check_float(in_arg);
  const int64_t k = check_k(in_arg, 1);
  check_contiguous(in_arg);
  check_device(q_arg, input.device());
  XPU_FP4_CHECK(q_arg, output_q.scalar_type() == at::kByte, "must be uint8, got ", output_q.scalar_type());
  check_shape(q_arg, with_last(input, k / 2), "input's, with K/2 last");
  check_contiguous(q_arg);
  check_device(s_arg, input.device());
  XPU_FP4_CHECK(s_arg, output_s.scalar_type() == at::kFloat, "must be float32, got ", output_s.scalar_type());
  check_shape(s_arg, with_last(input, k / kBlock), "input's, with K/32 last");
  const bool by_columns = check_scale_layout(s_arg);
  check_no_overlap(q_arg, in_arg);
  check_no_overlap(s_arg, in_arg);
  check_no_overlap(s_arg, q_arg);
  const int64_t row_stride = output_s.dim() == 2 ? output_s.stride(0) : k / kBlock;
  backend.group_quant({input.const_data_ptr(), dtype_of(input.scalar_type()), rows_of(input), k,
                       group_quant::floor_from_eps(eps), static_cast<uint8_t*>(output_q.data_ptr()), output_s.data_ptr<float>(),
                       row_stride, by_columns ? output_s.stride(1) : 1});
}

}  // namespace xpu_fp4::ops
