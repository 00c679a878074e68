// SPDX-License-Identifier: Apache-2.0
// A layer of experts, with stored and prepacked weights.
#include <ATen/ops/empty.h>

#include <limits>

#include "../format/fp_quant.h"
#include "../format/strips.h"
#include "cpu_backends.h"
#include "multiply.h"
#include "ops.h"

namespace xpu_fp4::ops {
namespace {

// Both ops take this beside the weights.
struct LayerArguments {
  const char* op;
  const Tensor &x, &topk_ids, &topk_weights;
  const std::optional<Tensor>&w13_bias, &w2_bias;
  std::string_view activation;
  bool interleaved;
  double alpha, limit;
  std::string_view mode, scale_mode;
  int64_t group, hadamard;
  const std::optional<Tensor>& expert_map;
  bool router_on_input;
  const std::optional<Tensor>&w13_offset, &w2_offset;
};

Gate check_gate(const LayerArguments& layer) {
  const auto with = [&](GateKind kind) {
    return Gate{kind, layer.interleaved, static_cast<float>(layer.alpha), static_cast<float>(layer.limit)};
  };
  if (layer.activation == "silu_mul") return with(GateKind::silu_mul);
  TORCH_CHECK(layer.activation == "swiglu_oai", layer.op, ": activation is \"", std::string(layer.activation),
              "\", expected \"silu_mul\" or \"swiglu_oai\"");
  TORCH_CHECK(layer.limit >= 0, layer.op, ": limit is ", layer.limit, ", expected 0 or more");
  return with(GateKind::swiglu_oai);
}

Quantizer check_quantizer(const LayerArguments& layer) {
  const ScaleMode scale_mode = check_scale_mode(layer.op, layer.scale_mode);
  TORCH_CHECK(!fp_quant::is_rule(scale_mode), layer.op, ": scale_mode is \"", std::string(layer.scale_mode),
              "\", one of FP-Quant's, expected \"floor\", \"ceil\", \"even\" or \"rceil\": experts have no global scales");
  const int group = check_group(layer.op, layer.group);
  if (layer.mode == "w4a16") return kAsTheyAre;
  if (layer.mode == "w4a8") return Quantizer::mxint8(group);
  TORCH_CHECK(layer.mode == "w4a4", layer.op, ": mode is \"", std::string(layer.mode),
              "\", expected \"w4a16\", \"w4a8\" or \"w4a4\"");
  return Quantizer::mxfp4(scale_mode);
}

// int32, contiguous; an id that does not fit int32 is none of any expert's.
Tensor hold_ids(const Argument& arg) {
  const at::ScalarType type = arg.tensor.scalar_type();
  XPU_FP4_CHECK(arg, type == at::kInt || type == at::kLong, "must be int32 or int64, got ", type);
  if (type == at::kInt) return arg.tensor.contiguous();
  return arg.tensor.clamp(-1, std::numeric_limits<int32_t>::max()).to(at::kInt).contiguous();
}

// [experts, n] as float32, and its data: null where there is none.
Tensor hold_bias(const char* op, const char* name, const std::optional<Tensor>& bias, const Tensor& x, int64_t experts,
                 int64_t n) {
  if (!bias) return {};
  const Argument arg{op, name, *bias};
  check_device(arg, x.device());
  check_float(arg);
  check_shape(arg, {experts, n}, "[E, N]");
  return bias->to(at::kFloat).contiguous();
}
const float* data_of(const Tensor& bias) { return bias.defined() ? bias.const_data_ptr<float>() : nullptr; }

// The experts' weights, whose shapes and devices have been checked.
struct HeldExperts {
  int64_t experts;
  Weight w13, w2;
  std::array<Tensor, 4> tensors;
};

int64_t check_x(const LayerArguments& layer) {
  const int64_t k = k_of_floats(layer.op, layer.x);
  XPU_FP4_CHECK((Argument{layer.op, "x", layer.x}), layer.x.dim() == 2, "must be [T, H], got shape ", layer.x.sizes());
  return k;
}

Tensor run(const Backend& backend, const LayerArguments& layer, const HeldExperts& held) {
  const char* op = layer.op;
  const Tensor& x = layer.x;
  const Argument ids_arg{op, "topk_ids", layer.topk_ids}, weights_arg{op, "topk_weights", layer.topk_weights};
  check_device(ids_arg, x.device());
  XPU_FP4_CHECK(ids_arg, layer.topk_ids.dim() == 2 && layer.topk_ids.size(0) == x.size(0), "has shape ", layer.topk_ids.sizes(),
                ", expected [T, top_k] with T = ", x.size(0));
  const Tensor ids = hold_ids(ids_arg);
  check_device(weights_arg, x.device());
  check_float(weights_arg);
  check_shape(weights_arg, ids.sizes(), "topk_ids'");
  const Tensor weights = layer.topk_weights.to(at::kFloat).contiguous();
  Tensor map;
  if (layer.expert_map) {
    const Argument arg{op, "expert_map", *layer.expert_map};
    check_device(arg, x.device());
    XPU_FP4_CHECK(arg, arg.tensor.scalar_type() == at::kInt, "must be int32, got ", arg.tensor.scalar_type());
    XPU_FP4_CHECK(arg, arg.tensor.dim() == 1, "must have one dimension, got shape ", arg.tensor.sizes());
    map = arg.tensor.contiguous();
  }
  const Gate gate = check_gate(layer);
  Quantizer to = check_quantizer(layer);
  to.transform = check_transform({op, "x", x}, layer.hadamard, std::nullopt).view;
  TORCH_CHECK(layer.hadamard == 0 || held.w2.k % layer.hadamard == 0, op, ": the experts have ", held.w2.k,
              " columns in w2, expected a multiple of hadamard, ", layer.hadamard);
  Tensor w13_offset, w2_offset;
  if (layer.w13_offset) w13_offset = hold_offset({op, "w13_offset", *layer.w13_offset}, x, held.w13.k, "[H], of x [T, H]");
  if (layer.w2_offset)
    w2_offset = hold_offset({op, "w2_offset", *layer.w2_offset}, x, held.w2.k, "[I], of the I columns of w2");
  const Tensor w13_bias = hold_bias(op, "w13_bias", layer.w13_bias, x, held.experts, held.w13.n);
  const Tensor w2_bias = hold_bias(op, "w2_bias", layer.w2_bias, x, held.experts, held.w2.n);
  const Tensor dense = x.contiguous(), y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  backend.experts({dense.const_data_ptr(), dtype_of(x.scalar_type()), x.size(0), to, ids.const_data_ptr<int32_t>(),
                   weights.const_data_ptr<float>(), ids.size(1), map.defined() ? map.const_data_ptr<int32_t>() : nullptr,
                   map.defined() ? map.size(0) : 0, held.experts, held.w13, held.w2, data_of(w13_bias), data_of(w2_bias), gate,
                   layer.router_on_input, offset_data(w13_offset), offset_data(w2_offset), y.data_ptr()});
  return y;
}

Weight stored(const Tensor& codes, const Tensor& scale, int64_t n, int64_t k) {
  return {WeightForm::stored, n, k, bytes(codes), bytes(scale), k / kBlock, 1};
}

void check_experts_weight(const Argument& codes, const Argument& scale, const Tensor& x, at::IntArrayRef shape,
                          const char* meaning) {
  check_device(codes, x.device());
  check_weight_codes(codes);
  check_shape(codes, shape, meaning);
  check_contiguous(codes);
  check_device(scale, x.device());
  check_scales(scale);
  check_shape(scale, {shape[0], shape[1], shape[2] * 2 / kBlock}, "[E, N, K/32] of the weight's [E, N, K/2]");
  check_contiguous(scale);
}

HeldExperts hold_stored(const LayerArguments& layer, const Tensor& w13, const Tensor& w13_scale, const Tensor& w2,
                        const Tensor& w2_scale) {
  const char* op = layer.op;
  const int64_t hidden = check_x(layer);
  const Argument w2_arg{op, "w2", w2};
  check_weight_codes(w2_arg);
  XPU_FP4_CHECK(w2_arg, w2.dim() == 3, "must be [E, H, I/2], got shape ", w2.sizes());
  const int64_t experts = w2.size(0), inner = check_k(w2_arg, 2);
  check_experts_weight({op, "w13", w13}, {op, "w13_scale", w13_scale}, layer.x, {experts, 2 * inner, hidden / 2},
                       "[E, 2I, H/2], H is the last dimension of x, E and I are w2's");
  check_experts_weight(w2_arg, {op, "w2_scale", w2_scale}, layer.x, {experts, hidden, inner / 2},
                       "[E, H, I/2], H is the last dimension of x");
  return {
      experts, stored(w13, w13_scale, 2 * inner, hidden), stored(w2, w2_scale, hidden, inner), {w13, w13_scale, w2, w2_scale}};
}

// Stacked strips [experts, strips, bytes].
Weight check_stacked_strips(const Argument& arg, int64_t experts, int64_t n, int64_t k) {
  XPU_FP4_CHECK(arg, arg.tensor.device().is_cpu(), "is on ", arg.tensor.device(),
                ", expected cpu: the layout is the native kernels'");
  check_bytes(arg);
  check_shape(arg, {experts, strips::count(n), strips::strip_bytes(k)}, "what mxfp4_prepack returns for each expert, stacked");
  check_contiguous(arg);
  return {WeightForm::strips, n, k, nullptr, nullptr, 0, 0, bytes(arg.tensor)};
}

std::pair<Tensor, Tensor> restore(const Tensor& stacked, const Weight& strips) {
  const int64_t experts = stacked.size(0);
  const Tensor codes = at::empty({experts, strips.n, strips.k / 2}, stacked.options());
  const Tensor scale = at::empty({experts, strips.n, strips.k / kBlock}, stacked.options());
  Weight w = strips;
  for (int64_t e = 0; e < experts && codes.numel() != 0; ++e) {
    w.prepared = bytes(stacked) + e * stacked.stride(0);
    native_backend().restore(w, codes.mutable_data_ptr<uint8_t>() + e * codes.stride(0),
                             scale.mutable_data_ptr<uint8_t>() + e * scale.stride(0));
  }
  return {codes, scale};
}

// The weights are stored again for a backend that does not take strips.
HeldExperts hold_prepacked(const Backend& backend, const LayerArguments& layer, const Tensor& w13, const Tensor& w2,
                           int64_t inner) {
  const char* op = layer.op;
  const int64_t hidden = check_x(layer);
  TORCH_CHECK(inner >= 0 && inner % kBlock == 0, op, ": intermediate_size is ", inner, ", expected a multiple of ", kBlock);
  const Argument w13_arg{op, "w13", w13}, w2_arg{op, "w2", w2};
  XPU_FP4_CHECK(w13_arg, w13.dim() == 3, "must be [E, ceil(2I/16), bytes], got shape ", w13.sizes());
  const int64_t experts = w13.size(0);
  const HeldExperts held = {experts,
                            check_stacked_strips(w13_arg, experts, 2 * inner, hidden),
                            check_stacked_strips(w2_arg, experts, hidden, inner),
                            {w13, w2}};
  if (!refusal(backend, WeightForm::strips, held.w13.n, held.w13.k)) return held;
  const auto [w13_codes, w13_scale] = restore(w13, held.w13);
  const auto [w2_codes, w2_scale] = restore(w2, held.w2);
  return {experts,
          stored(w13_codes, w13_scale, held.w13.n, held.w13.k),
          stored(w2_codes, w2_scale, held.w2.n, held.w2.k),
          {w13_codes, w13_scale, w2_codes, w2_scale}};
}

}  // namespace

Tensor mxfp4_experts(const Backend& backend, const Tensor& x, const Tensor& topk_ids, const Tensor& topk_weights,
                     const Tensor& w13, const Tensor& w13_scale, const Tensor& w2, const Tensor& w2_scale,
                     const std::optional<Tensor>& w13_bias, const std::optional<Tensor>& w2_bias, std::string_view activation,
                     bool interleaved, double alpha, double limit, std::string_view mode, std::string_view scale_mode,
                     int64_t group, int64_t hadamard, const std::optional<Tensor>& expert_map, bool router_on_input,
                     const std::optional<Tensor>& w13_offset, const std::optional<Tensor>& w2_offset) {
  const LayerArguments layer = {"mxfp4_experts", x,           topk_ids,   topk_weights,    w13_bias,   w2_bias,
                                activation,      interleaved, alpha,      limit,           mode,       scale_mode,
                                group,           hadamard,    expert_map, router_on_input, w13_offset, w2_offset};
  return run(backend, layer, hold_stored(layer, w13, w13_scale, w2, w2_scale));
}

Tensor mxfp4_experts_prepacked(const Backend& backend, const Tensor& x, const Tensor& topk_ids, const Tensor& topk_weights,
                               const Tensor& w13, const Tensor& w2, int64_t intermediate_size,
                               const std::optional<Tensor>& w13_bias, const std::optional<Tensor>& w2_bias,
                               std::string_view activation, bool interleaved, double alpha, double limit, std::string_view mode,
                               std::string_view scale_mode, int64_t group, int64_t hadamard,
                               const std::optional<Tensor>& expert_map, bool router_on_input,
                               const std::optional<Tensor>& w13_offset, const std::optional<Tensor>& w2_offset) {
  const LayerArguments layer = {"mxfp4_experts_prepacked",
                                x,
                                topk_ids,
                                topk_weights,
                                w13_bias,
                                w2_bias,
                                activation,
                                interleaved,
                                alpha,
                                limit,
                                mode,
                                scale_mode,
                                group,
                                hadamard,
                                expert_map,
                                router_on_input,
                                w13_offset,
                                w2_offset};
  return run(backend, layer, hold_prepacked(backend, layer, w13, w2, intermediate_size));
}

}  // namespace xpu_fp4::ops
