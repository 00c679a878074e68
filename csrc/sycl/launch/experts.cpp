// SPDX-License-Identifier: Apache-2.0
// A layer of experts. Nothing comes back to the host: ranges are those of the most tiles that there can be.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <utility>

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
    const int height = tile_rows();
    rows_.height = rows_.stride = height;
    rows_.tiles = most_tiles(slots_, args.experts, height);
    if (rows_.tiles * rows_.stride + slots_ > std::numeric_limits<int32_t>::max()) {
      throw std::runtime_error("xpu_fp4: " + std::to_string(slots_) + " slots of experts are more than 32 bits count");
    }
  }

  std::string run() {
    if (slots_ > 0) {
      allocate_rows();
      sort();
      const int64_t hidden = args_.w13.k, inner = args_.w2.k;
      const std::shared_ptr<void> x = allocate_floats(hidden, args_.dtype);
      launch("gather_rows", grid(rows(), hidden), GatherArguments{tokens(), rows_.slot_of_row, x.get(), hidden});
      const std::shared_ptr<void> u = allocate_floats(2 * inner, args_.dtype);
      multiply(x.get(), args_.w13, args_.w13_bias, u.get(), args_.dtype);
      const std::shared_ptr<void> h = allocate_floats(inner, args_.dtype);
      launch("gate_rows", grid(rows(), inner), GateArguments{u.get(), gate(), rows_.slot_of_row, h.get(), inner});
      v_ = allocate_floats(args_.w2.n, DType::f32);
      multiply(h.get(), args_.w2, args_.w2_bias, v_.get(), DType::f32);
    }
    combine();
    return steps_;
  }

 private:
  int64_t rows() const { return rows_.tiles * rows_.stride; }
  // W4A16's portable kernel has a row in each work-group.
  int tile_rows() const { return args_.to.format == Format::none ? 1 : queue_.target().sub_group; }

  TokensArguments tokens() const { return {args_.x, args_.router_on_input ? args_.weights : nullptr, args_.top_k}; }
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
    map_ = queue_.allocate(4 * (2 * tiles + rows() + slots_ + (chunks + 1) * args_.experts));
    rows_.tile = static_cast<ExpertTile*>(map_.get());
    rows_.slot_of_row = reinterpret_cast<int32_t*>(rows_.tile + tiles);
    rows_.row_of_slot = rows_.slot_of_row + rows();
    counts_ = rows_.row_of_slot + slots_;
    first_tiles_ = counts_ + chunks * args_.experts;
  }

  void sort() {
    launch("sort_slots", {1, {1, kSortLanes}, {1, kSortLanes}},
           SortArguments{{args_.ids, args_.map, args_.map_size, args_.experts}, rows_, slots_, counts_, first_tiles_});
  }

  // a [rows, k] of x's dtype, as the mode has it, times each row's expert.
  void multiply(const void* a, const Weight& w, const float* bias, void* y, DType dtype) {
    Quantizer to = args_.to;
    std::shared_ptr<void> transformed;
    if (to.format == Format::none && !to.transform.is_none()) {
      transformed = allocate_floats(w.k, args_.dtype);
      transform(queue_, {a, args_.dtype, to, rows(), w.k, static_cast<uint8_t*>(transformed.get()), nullptr});
      note("transform");
      a = transformed.get();
    }
    const Output out = {y, dtype, {bias, 0, 1}};
    const Grouped grouped = {rows_.tile, rows_.tiles};
    if (to.format == Format::none) {
      to.transform = {};
      return note("gemm_w4a16", gemm_w4a16(queue_, {Activations::floats(a, args_.dtype, to, rows(), w.k), w, out}, &grouped));
    }
    const std::shared_ptr<void> codes = queue_.allocate(rows() * code_bytes(to.format, w.k));
    const std::shared_ptr<void> scale = queue_.allocate(rows() * w.k / kBlock);
    auto *codes_at = static_cast<uint8_t*>(codes.get()), *scale_at = static_cast<uint8_t*>(scale.get());
    quantize(queue_, {a, args_.dtype, to, rows(), w.k, codes_at, scale_at});
    note("quantize");
    note("gemm", gemm(queue_, {Activations::codes(to.format, codes_at, scale_at, rows(), w.k), w, out}, &grouped));
  }

  void combine() {
    launch(
        "combine_slots", grid(args_.tokens, args_.w2.n),
        CombineArguments{static_cast<const float*>(v_.get()), rows_.row_of_slot,
                         args_.router_on_input ? nullptr : args_.weights, slots_ == 0 ? 0 : args_.top_k, args_.y, args_.w2.n});
  }

  template <class Arguments>
  void launch(const char* kernel, const Range& range, const Arguments& arguments) {
    queue_.launch(experts_variant(queue_.target(), args_.dtype), kernel, range, arguments);
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
  int32_t *counts_ = nullptr, *first_tiles_ = nullptr;
  std::shared_ptr<void> map_, v_;
  std::string steps_;
};

}  // namespace

std::string experts(const Queue& queue, const ExpertsPlan& plan, const Experts& args) { return Layer(queue, plan, args).run(); }

}  // namespace xpu_fp4::syclrt::launch
