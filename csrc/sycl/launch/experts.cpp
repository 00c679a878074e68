// SPDX-License-Identifier: Apache-2.0
// A layer of experts. Nothing comes back to the host: ranges are those of the most tiles that there can be.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "../../format/integer.h"
#include "launch.h"

namespace xpu_fp4::syclrt::launch {
namespace {

// As many tiles of so many rows as slots can need: each expert's last one may have a single row.
int64_t most_tiles(int64_t slots, int64_t experts, int64_t height) {
  return (slots + (height - 1) * std::min(slots, experts)) / height;
}

class Layer {
 public:
  Layer(const Queue& queue, const ExpertsPlan& plan, const Experts& args)
      : queue_(queue), plan_(plan), args_(args), slots_(args.experts == 0 ? 0 : args.tokens * args.top_k) {
    rows_.height = tile_rows();
    // gemm_small's exponents come in groups of lanes.
    const bool groups = is_small() && args.to.format != Format::none;
    rows_.stride = groups ? round_up(rows_.height, plan.gpu->architecture->sub_group) : rows_.height;
    rows_.tiles = plan.sorted ? most_tiles(slots_, args.experts, rows_.height) : slots_;
    if (rows() + slots_ > std::numeric_limits<int32_t>::max()) {
      throw std::runtime_error("xpu_fp4: " + std::to_string(slots_) + " slots of experts are more than 32 bits count");
    }
  }

  std::string run() {
    if (slots_ > 0) {
      allocate_rows();
      if (plan_.sorted) sort();
      const std::shared_ptr<void> u = allocate_floats(args_.w13.n, args_.dtype);
      multiply_tokens(u.get());
      if (!plan_.sorted) {
        multiply_gated(u.get(), args_.y, args_.dtype);
        return steps_;
      }
      v_ = allocate_floats(args_.w2.n, DType::f32);
      multiply_gated(u.get(), v_.get(), DType::f32);
    }
    launch(experts_variant(queue_.target(), args_.dtype), "combine_slots", grid(args_.tokens, args_.w2.n),
           CombineArguments{static_cast<const float*>(v_.get()), rows_.row_of_slot, slot_weights(), args_.y, args_.w2.n});
    return steps_;
  }

 private:
  int64_t rows() const { return rows_.tiles * rows_.stride; }
  int tile_rows() const {
    if (plan_.gpu) return plan_.product.kernel == Kernel::small ? plan_.product.rows : plan_.product.tile.rows();
    return args_.to.format == Format::none ? 1 : queue_.target().sub_group;
  }

  TokensArguments tokens() const { return {args_.x, args_.router_on_input ? args_.weights : nullptr, args_.top_k}; }
  RoutingArguments routing() const { return {args_.ids, args_.map, args_.map_size, args_.experts}; }
  SlotWeights slot_weights() const { return {args_.router_on_input ? nullptr : args_.weights, slots_ == 0 ? 0 : args_.top_k}; }
  GateFields gate() const {
    const Gate& gate = args_.gate;
    return {static_cast<int>(gate.kind), gate.interleaved, gate.alpha, gate.limit};
  }

  std::shared_ptr<void> allocate_floats(int64_t columns, DType dtype) const {
    return queue_.allocate(rows() * columns * size_of(dtype));
  }

  // The arrays that say where rows are, one after the other, and the sort's scratch memory.
  void allocate_rows() {
    const int64_t tiles = rows_.tiles, chunks = std::min<int64_t>(slots_, kSortLanes);
    const int64_t of_sort = plan_.sorted ? rows() + slots_ + (chunks + 1) * args_.experts : 0;
    memory_ = queue_.allocate(4 * (2 * tiles + of_sort));
    rows_.tile = static_cast<ExpertTile*>(memory_.get());
    if (!plan_.sorted) return;
    rows_.slot_of_row = reinterpret_cast<int32_t*>(rows_.tile + tiles);
    rows_.row_of_slot = rows_.slot_of_row + rows();
  }

  void sort() {
    int32_t* counts = rows_.row_of_slot + slots_;
    int32_t* first_tiles = counts + std::min<int64_t>(slots_, kSortLanes) * args_.experts;
    launch(experts_variant(queue_.target(), args_.dtype), "sort_slots", {1, {kSortLanes}, {kSortLanes}},
           SortArguments{routing(), rows_, slots_, counts, first_tiles});
  }

  // The quantizer reads rows where they are and writes them where they belong, if it need not transform them.
  bool is_fused(const Quantizer& to) const { return plan_.gpu && to.format != Format::none && to.transform.is_none(); }

  void multiply_tokens(void* u) {
    const Weight& w = args_.w13;
    const Quantizer to = args_.quantizer_of_x();
    if (is_fused(to)) {
      const Expanded a = expanded(w.k);
      launch(quantizer(alignment_of({args_.x})), "gather_quantize_expand", range_of(a),
             GatherQuantizeExpandArguments{tokens(), routing(), rows_, a.arrays, w.k, mode(), args_.to.group});
      return multiply(a, w, {u, args_.dtype, {args_.w13_bias, 0, 1}}, nullptr);
    }
    const std::shared_ptr<void> x = allocate_floats(w.k, args_.dtype);
    launch(experts_variant(queue_.target(), args_.dtype), "gather_rows", grid(rows(), w.k),
           GatherArguments{tokens(), rows_.slot_of_row, x.get(), w.k});
    multiply(x.get(), to, w, {u, args_.dtype, {args_.w13_bias, 0, 1}});
  }

  void multiply_gated(const void* u, void* v, DType dtype) {
    const Weight& w = args_.w2;
    const Quantizer to = args_.quantizer_of_h();
    const Output out = {v, dtype, {args_.w2_bias, 0, 1}};
    if (is_fused(to)) {
      const Expanded a = expanded(w.k);
      launch(quantizer(16), "gate_quantize_expand", range_of(a),
             GateQuantizeExpandArguments{u, gate(), rows_, a.arrays, w.k, mode(), args_.to.group});
      const SlotWeights weights = slot_weights();
      return multiply(a, w, out, plan_.sorted ? nullptr : &weights);
    }
    const std::shared_ptr<void> h = allocate_floats(w.k, args_.dtype);
    launch(experts_variant(queue_.target(), args_.dtype), "gate_rows", grid(rows(), w.k),
           GateArguments{u, gate(), rows_.slot_of_row, h.get(), w.k});
    multiply(h.get(), to, w, out);
  }

  int mode() const { return static_cast<int>(args_.to.mode); }
  bool is_small() const { return plan_.product.kernel == Kernel::small; }
  ElementOrder order() const { return is_small() ? ElementOrder::packed : ElementOrder::apart; }
  Variant quantizer(int alignment) const {
    return expand_experts_variant(*plan_.gpu, args_.to.format, args_.dtype, order(), alignment);
  }
  Range range_of(const Expanded& a) const { return expand_range(order(), a.layout.lanes, rows(), a.layout.quads); }
  Expanded expanded(int64_t k) const {
    return allocate_expanded(queue_, {rows(), rows(), ceil_div(k, kQuadElements), plan_.gpu->architecture->sub_group});
  }

  // Each row times its expert's weight.
  void multiply(const Expanded& a, const Weight& w, const Output& out, const SlotWeights* combined) {
    const Product product = {Activations::codes(args_.to.format, nullptr, nullptr, rows(), w.k), w, out};
    const Grouped grouped = {rows_.tile, rows_.tiles, args_.experts, combined};
    if (is_small()) return note("gemm_small", gemm_small(queue_, *plan_.gpu, plan_.product, product, a, grouped));
    note("expand");
    note("gemm_large", gemm_large(queue_, *plan_.gpu, plan_.product, product, a, grouped));
  }

  // The same of a [rows, k] of x's type.
  void multiply(const void* a, const Quantizer& to, const Weight& w, const Output& out) {
    const Activations floats = Activations::floats(a, args_.dtype, to, rows(), w.k);
    if (to.format == Format::none) return multiply_floats(floats, w, out);
    if (plan_.gpu) {
      note(to.transform.is_none() ? "quantize_expand" : "transform_quantize_expand");
      return multiply(expand_activations(queue_, *plan_.gpu, floats, order(), rows_.stride), w, out, nullptr);
    }
    const std::shared_ptr<void> codes = queue_.allocate(rows() * code_bytes(to.format, w.k));
    const std::shared_ptr<void> scale = queue_.allocate(rows() * w.k / kBlock);
    auto *codes_at = static_cast<uint8_t*>(codes.get()), *scale_at = static_cast<uint8_t*>(scale.get());
    quantize(queue_, {a, args_.dtype, to, rows(), w.k, codes_at, scale_at});
    note("quantize");
    note("gemm", gemm(queue_, {Activations::codes(to.format, codes_at, scale_at, rows(), w.k), w, out}, grouped()));
  }

  void multiply_floats(const Activations& a, const Weight& w, const Output& out) {
    Activations floats = a;
    std::shared_ptr<void> transformed;
    if (!a.to.transform.is_none()) {
      transformed = allocate_floats(w.k, args_.dtype);
      transform(queue_, {a.data, a.dtype, a.to, a.m, a.k, static_cast<uint8_t*>(transformed.get()), nullptr});
      note("transform");
      floats = Activations::floats(transformed.get(), a.dtype, {Format::none}, a.m, a.k);
    }
    const Product product = {floats, w, out};
    if (!plan_.gpu) return note("gemm_w4a16", gemm_w4a16(queue_, product, grouped()));
    note("gemm_w4a16_matrix", gemm_w4a16_matrix(queue_, *plan_.gpu, plan_.product, product, grouped()));
  }

  Grouped grouped() const { return {rows_.tile, rows_.tiles, args_.experts}; }

  template <class Arguments>
  void launch(const Variant& variant, const char* kernel, const Range& range, const Arguments& arguments) {
    queue_.launch(variant, kernel, range, arguments);
    note(kernel);
  }

  void note(const std::string& kernel, const std::string& label = {}) {
    steps_ += (steps_.empty() ? "" : ", ") + kernel + (label.empty() ? "" : " (" + label + ")");
  }

  const Queue& queue_;
  const ExpertsPlan& plan_;
  const Experts& args_;
  int64_t slots_;
  GroupedRows rows_ = {};
  std::shared_ptr<void> memory_, v_;
  std::string steps_;
};

}  // namespace

std::string experts(const Queue& queue, const ExpertsPlan& plan, const Experts& args) { return Layer(queue, plan, args).run(); }

}  // namespace xpu_fp4::syclrt::launch
