// SPDX-License-Identifier: Apache-2.0
// What vllm-xpu-kernels' class for experts calls, for CPU tensors: rows are sorted by expert, each expert multiplies its own,
// the gate joins the halves, and every token gathers its rows again. Bits are those of a layer of experts (product.h), taken
// apart; sums are of products rounded to their dtype, since that is how they come.
#include <ATen/Parallel.h>

#include <cstring>
#include <limits>

#include "../cpu/float_environment.h"
#include "multiply.h"
#include "ops.h"

namespace xpu_fp4::ops {
namespace {

constexpr int64_t kElementsPerTask = 1 << 14;

// Rows by torch's threads, in the floating-point environment that defines the bits.
template <class Function>
void for_each_row(int64_t rows, int64_t elements, const Function& function) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, elements)),
                   [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    for (int64_t row = begin; row < end; ++row) function(row);
  });
}

// A tensor that the op writes, or reads beside one.
void check_plain(const Argument& arg, const at::Device& device) {
  check_device(arg, device);
  check_contiguous(arg);
  XPU_FP4_CHECK(arg, !arg.tensor.is_neg(), "is a lazily negated view, expected a plain tensor (resolve_neg())");
}

void check_type(const Argument& arg, at::ScalarType type) {
  XPU_FP4_CHECK(arg, arg.tensor.scalar_type() == type, "must be ", type, ", got ", arg.tensor.scalar_type());
}

void check_matrix(const Argument& arg, const char* meaning) {
  XPU_FP4_CHECK(arg, arg.tensor.dim() == 2, "must be ", meaning, ", got shape ", arg.tensor.sizes());
}

float load(DType type, const void* data, int64_t i) {
  if (type == DType::f32) return xpu_fp4::load<DType::f32>(data, i);
  return type == DType::f16 ? xpu_fp4::load<DType::f16>(data, i) : xpu_fp4::load<DType::bf16>(data, i);
}

// ---- sorting ----

// topk_ids as what they are, int32 or int64, through expert_map: the expert here that a slot asks for, or -1.
class Slots {
 public:
  Slots(const Argument& ids, const std::optional<Tensor>& map, int64_t total, int64_t local)
      : ids_(ids.tensor.to(at::kLong)), map_(map ? map->const_data_ptr<int32_t>() : nullptr), total_(total), local_(local) {}

  int64_t expert(int64_t slot) const {
    int64_t id = ids_.const_data_ptr<int64_t>()[slot];
    if (map_ != nullptr) id = id >= 0 && id < total_ ? map_[id] : -1;
    return id >= 0 && id < local_ ? id : -1;
  }

 private:
  Tensor ids_;
  const int32_t* map_;
  int64_t total_, local_;
};

// A row of one tensor -> one of another, whatever its elements are.
class RowCopy {
 public:
  RowCopy(const Tensor& from, const Tensor& to)
      : from_(static_cast<const uint8_t*>(from.const_data_ptr())),
        to_(static_cast<uint8_t*>(to.mutable_data_ptr())),
        bytes_(static_cast<size_t>(from.size(1)) * from.element_size()) {}
  void operator()(int64_t from, int64_t to) const {
    if (bytes_ != 0) std::memcpy(to_ + static_cast<size_t>(to) * bytes_, from_ + static_cast<size_t>(from) * bytes_, bytes_);
  }

 private:
  const uint8_t* from_;
  uint8_t* to_;
  size_t bytes_;
};

void check_copied(const Argument& from, const Argument& to, int64_t rows, int64_t copies, const at::Device& device) {
  check_matrix(from, "a matrix with a row for each token");
  check_plain(from, device);
  check_plain(to, device);
  check_type(to, from.tensor.scalar_type());
  check_shape(from, {rows, from.tensor.size(1)}, "a row for each token");
  check_shape(to, {copies, from.tensor.size(1)}, "a row for each of topk_ids");
  check_no_overlap(to, from);
}

}  // namespace

void remap_hidden_states(const Backend&, const Tensor& hidden_states, const std::optional<Tensor>& hidden_states_scales,
                         const Tensor& remapped_hidden_states, const std::optional<Tensor>& remapped_hidden_states_scales,
                         const std::optional<Tensor>& expert_map, const Tensor& rows_per_expert,
                         const Tensor& unpermuted_row_to_permuted_row, const Tensor& topk_ids, int64_t total_experts_num,
                         int64_t local_experts_num) {
  const char* op = "remap_hidden_states";
  const at::Device device = hidden_states.device();
  const Argument ids_arg{op, "topk_ids", topk_ids}, counts_arg{op, "rows_per_expert", rows_per_expert};
  const Argument places_arg{op, "unpermuted_row_to_permuted_row", unpermuted_row_to_permuted_row};
  check_matrix({op, "hidden_states", hidden_states}, "[T, H]");
  check_matrix(ids_arg, "[T, top_k]");
  check_plain(ids_arg, device);
  XPU_FP4_CHECK(ids_arg, topk_ids.scalar_type() == at::kInt || topk_ids.scalar_type() == at::kLong,
                "must be int32 or int64, got ", topk_ids.scalar_type());
  const int64_t tokens = hidden_states.size(0), top_k = topk_ids.size(1), slots = tokens * top_k;
  check_shape(ids_arg, {tokens, top_k}, "[T, top_k], T is the rows of hidden_states");
  XPU_FP4_CHECK(ids_arg, slots <= std::numeric_limits<int32_t>::max(), "has ", slots, " entries, expected fewer than 2^31");
  check_copied({op, "hidden_states", hidden_states}, {op, "remapped_hidden_states", remapped_hidden_states}, tokens, slots,
               device);
  TORCH_CHECK(hidden_states_scales.has_value() == remapped_hidden_states_scales.has_value(), op,
              ": hidden_states_scales and remapped_hidden_states_scales must both be given or neither");
  if (hidden_states_scales) {
    check_copied({op, "hidden_states_scales", *hidden_states_scales},
                 {op, "remapped_hidden_states_scales", *remapped_hidden_states_scales}, tokens, slots, device);
  }
  TORCH_CHECK(local_experts_num >= 0, op, ": local_experts_num is ", local_experts_num, ", expected 0 or more");
  if (expert_map) {
    const Argument arg{op, "expert_map", *expert_map};
    check_plain(arg, device);
    check_type(arg, at::kInt);
    check_shape(arg, {total_experts_num}, "[total_experts_num]");
  }
  check_plain(counts_arg, device);
  check_type(counts_arg, at::kInt);
  check_shape(counts_arg, {local_experts_num}, "[local_experts_num]");
  check_plain(places_arg, device);
  check_type(places_arg, at::kInt);
  check_shape(places_arg, {tokens, top_k}, "topk_ids'");

  const Slots experts(ids_arg, expert_map, total_experts_num, local_experts_num);
  std::vector<int64_t> next(static_cast<size_t>(local_experts_num) + 1, 0);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t expert = experts.expert(slot);
    if (expert >= 0) ++next[static_cast<size_t>(expert) + 1];
  }
  auto* counts = rows_per_expert.data_ptr<int32_t>();
  for (int64_t e = 0; e < local_experts_num; ++e) counts[e] = static_cast<int32_t>(next[static_cast<size_t>(e) + 1]);
  for (size_t e = 1; e < next.size(); ++e) next[e] += next[e - 1];
  const RowCopy copy(hidden_states, remapped_hidden_states);
  const RowCopy copy_scales = hidden_states_scales ? RowCopy(*hidden_states_scales, *remapped_hidden_states_scales) : copy;
  auto* places = unpermuted_row_to_permuted_row.data_ptr<int32_t>();
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t expert = experts.expert(slot);
    places[slot] = expert < 0 ? -1 : static_cast<int32_t>(next[static_cast<size_t>(expert)]++);
    if (expert < 0) continue;
    copy(slot / top_k, places[slot]);
    if (hidden_states_scales) copy_scales(slot / top_k, places[slot]);
  }
}

void init_expert_map(const Backend&, const Tensor& expert_map, int64_t num_experts, int64_t ep_rank, int64_t ep_size) {
  const char* op = "init_expert_map";
  const Argument arg{op, "expert_map", expert_map};
  check_plain(arg, expert_map.device());
  check_type(arg, at::kInt);
  TORCH_CHECK(num_experts >= 0, op, ": num_experts is ", num_experts, ", expected 0 or more");
  TORCH_CHECK(ep_rank >= 0 && ep_rank < ep_size, op, ": ep_rank is ", ep_rank, ", expected one of ep_size, ", ep_size);
  int64_t all = 0;
  TORCH_CHECK(!__builtin_mul_overflow(num_experts, ep_size, &all), op, ": num_experts is ", num_experts, ", expected fewer");
  check_shape(arg, {all}, "[num_experts * ep_size]");
  auto* map = expert_map.data_ptr<int32_t>();
  for (int64_t id = 0; id < all; ++id) {
    map[id] = id / num_experts == ep_rank ? static_cast<int32_t>(id % num_experts) : -1;
  }
}

// ---- products ----

namespace {

// Rows of floats, or codes with their scales.
Activations check_rows(const Argument& a, const std::optional<Tensor>& scale, int64_t k) {
  const int64_t rows = a.tensor.size(0);
  if (!scale) {
    const DType dtype = check_float(a);
    check_shape(a, {rows, k}, "[rows, K]");
    return Activations::floats(a.tensor.const_data_ptr(), dtype, kAsTheyAre, rows, k);
  }
  const Argument scale_arg{a.op, "ptr_A_scale", *scale};
  const Format format = check_codes(a);
  check_shape(a, {rows, k / elements_of_entry(format)}, "[rows, K] of codes");
  check_plain(scale_arg, a.tensor.device());
  check_scales(scale_arg);
  check_shape(scale_arg, {rows, k / kBlock}, "[rows, K/32]");
  return Activations::codes(format, bytes(a.tensor), bytes(*scale), rows, k);
}

// Gives `count` rows of these activations, from row `first` on.
Activations part_of(Activations rows, int64_t first, int64_t count) {
  const int64_t row_bytes = rows.are_codes ? code_bytes(rows.to.format, rows.k) : rows.k * size_of(rows.dtype);
  rows.data = static_cast<const uint8_t*>(rows.data) + first * row_bytes;
  if (rows.are_codes) rows.scale += first * (rows.k / kBlock);
  rows.m = count;
  return rows;
}

}  // namespace

Tensor cutlass_grouped_gemm_interface(const Backend& backend, const Tensor& a, const std::optional<Tensor>& a_scale,
                                      const Tensor& b, const std::optional<Tensor>& b_scale, const std::optional<Tensor>& bias,
                                      const Tensor& d, const Tensor& rows_per_expert, int64_t n, int64_t k,
                                      int64_t num_experts) {
  const char* op = "cutlass_grouped_gemm_interface";
  const at::Device device = a.device();
  const Argument a_arg{op, "ptr_A", a}, b_arg{op, "ptr_B", b}, d_arg{op, "ptr_D", d};
  const Argument rows_arg{op, "rows_per_expert", rows_per_expert};
  TORCH_CHECK(k >= 0 && k % kBlock == 0, op, ": K is ", k, ", expected a multiple of ", kBlock);
  check_matrix(a_arg, "[rows, K]");
  check_plain(a_arg, device);
  const Activations all = check_rows(a_arg, a_scale, k);
  check_plain(b_arg, device);
  XPU_FP4_CHECK(b_arg, b.scalar_type() == at::kFloat4_e2m1fn_x2, "must be float4_e2m1fn_x2, the only format here, got ",
                b.scalar_type());
  check_shape(b_arg, {num_experts, n, k / 2}, "[num_experts, N, K/2]");
  TORCH_CHECK(b_scale.has_value(), op, ": ptr_B_scale is None, expected [num_experts, N, K/32]");
  const Argument b_scale_arg{op, "ptr_B_scale", *b_scale};
  check_plain(b_scale_arg, device);
  check_scales(b_scale_arg);
  check_shape(b_scale_arg, {num_experts, n, k / kBlock}, "[num_experts, N, K/32]");
  Tensor held_bias;
  if (bias) {
    const Argument arg{op, "ptr_bias", *bias};
    check_device(arg, device);
    check_float(arg);
    check_shape(arg, {num_experts, n}, "[num_experts, N]");
    held_bias = bias->to(at::kFloat).contiguous();
  }
  check_plain(d_arg, device);
  const DType dtype = check_float(d_arg);
  check_shape(d_arg, {all.m, n}, "[rows, N]");
  check_no_overlap(d_arg, a_arg);
  check_plain(rows_arg, device);
  check_type(rows_arg, at::kInt);
  check_shape(rows_arg, {num_experts}, "[num_experts]");
  const auto* counts = rows_per_expert.const_data_ptr<int32_t>();
  int64_t sum = 0;
  for (int64_t e = 0; e < num_experts; sum += counts[e++]) {
    XPU_FP4_CHECK(rows_arg, counts[e] >= 0, "has ", counts[e], " for expert ", e, ", expected 0 or more");
  }
  XPU_FP4_CHECK(rows_arg, sum <= all.m, "adds up to ", sum, ", expected at most the rows of ptr_A, ", all.m);

  for (int64_t e = 0, first = 0; e < num_experts && n != 0; first += counts[e++]) {
    if (counts[e] == 0) continue;
    const Weight weight = {WeightForm::stored, n, k, bytes(b) + e * n * k / 2, bytes(*b_scale) + e * n * k / kBlock,
                           k / kBlock,         1};
    const Bias row = bias ? Bias{held_bias.const_data_ptr<float>() + e * n, 0, 1} : Bias{nullptr, 0, 0};
    void* y = static_cast<uint8_t*>(d.mutable_data_ptr()) + first * n * size_of(dtype);
    const Product product = {part_of(all, first, counts[e]), weight, {y, dtype, row}};
    const auto reason = backend.refusal(product);
    TORCH_CHECK(!reason, op, ": ptr_B ", *reason);
    backend.multiply(product);
  }
  return d;
}

// ---- the gate and the sum ----

void swigluoai_and_mul(const Backend&, const Tensor& out, const Tensor& input, double alpha, double limit) {
  const char* op = "swigluoai_and_mul";
  const Argument out_arg{op, "out", out}, in_arg{op, "input", input};
  TORCH_CHECK(limit >= 0, op, ": limit is ", limit, ", expected 0 or more");
  check_plain(in_arg, out.device());
  const DType dtype = check_float(in_arg);
  XPU_FP4_CHECK(in_arg, input.dim() >= 1 && input.size(-1) % 2 == 0, "must be [..., 2 d], got shape ", input.sizes());
  check_plain(out_arg, out.device());
  check_type(out_arg, input.scalar_type());
  const int64_t d = input.size(-1) / 2;
  check_shape(out_arg, with_last(input, d), "input's, with half of its last dimension");
  check_no_overlap(out_arg, in_arg);
  if (out.numel() == 0) return;
  const Gate gate = {GateKind::swiglu_oai, true, static_cast<float>(alpha), static_cast<float>(limit)};
  const void* x = input.const_data_ptr();
  void* y = out.mutable_data_ptr();
  for_each_row(rows_of(input), d, [&](int64_t row) {
    for (int64_t i = row * d; i < (row + 1) * d; ++i) {
      store(dtype, y, i, gate::apply(gate, load(dtype, x, 2 * i), load(dtype, x, 2 * i + 1)));
    }
  });
}

void moe_gather(const Backend&, const Tensor& output, const Tensor& moe_output, const Tensor& topk_weights,
                const Tensor& unpermuted_row_to_permuted_row, int64_t num_experts) {
  const char* op = "moe_gather";
  const at::Device device = output.device();
  const Argument out_arg{op, "output", output}, in_arg{op, "moe_output", moe_output};
  const Argument weights_arg{op, "topk_weights", topk_weights};
  const Argument places_arg{op, "unpermuted_row_to_permuted_row", unpermuted_row_to_permuted_row};
  check_matrix(in_arg, "[rows, H]");
  check_plain(in_arg, device);
  const DType dtype = check_float(in_arg);
  check_matrix(weights_arg, "[T, top_k]");
  check_plain(weights_arg, device);
  check_type(weights_arg, at::kFloat);
  const int64_t tokens = topk_weights.size(0), top_k = topk_weights.size(1), hidden = moe_output.size(1);
  check_plain(out_arg, device);
  check_type(out_arg, moe_output.scalar_type());
  check_shape(out_arg, {tokens, hidden}, "[T, H]");
  check_no_overlap(out_arg, in_arg);
  check_plain(places_arg, device);
  check_type(places_arg, at::kInt);
  XPU_FP4_CHECK(places_arg, unpermuted_row_to_permuted_row.numel() == tokens * top_k, "has shape ",
                unpermuted_row_to_permuted_row.sizes(), ", expected an entry for each of topk_weights");
  const auto* places = unpermuted_row_to_permuted_row.const_data_ptr<int32_t>();
  for (int64_t slot = 0; slot < tokens * top_k; ++slot) {
    XPU_FP4_CHECK(places_arg, places[slot] >= -1 && places[slot] < moe_output.size(0), "holds ", places[slot],
                  ", expected -1 or a row of moe_output, which has ", moe_output.size(0));
  }
  if (output.numel() == 0) return;
  const auto* weights = topk_weights.const_data_ptr<float>();
  const void* v = moe_output.const_data_ptr();
  void* y = output.mutable_data_ptr();
  for_each_row(tokens, hidden * top_k, [&](int64_t token) {
    for (int64_t i = 0; i < hidden; ++i) {
      float acc = 0.0f;
      for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
        if (places[slot] >= 0) acc = __builtin_fmaf(weights[slot], load(dtype, v, places[slot] * hidden + i), acc);
      }
      store(dtype, y, token * hidden + i, acc);
    }
  });
}

}  // namespace xpu_fp4::ops
