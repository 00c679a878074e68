// SPDX-License-Identifier: Apache-2.0
// The loop nest of W4A4 around an instruction set's tile. Included by the files that are compiled for one instruction set; all
// of it has internal linkage.
//
// A is expanded once, group of rows by group of rows (expand). Then each task owns some groups and panels of columns: for each
// panel and each kPanelQuads quads it unpacks W to first-level cache, and multiplies all its groups with it. W stands in memory
// as four bits only.
//
// An Isa has: kGroupRows, kPanelStrips; expand(packed, scale, activations, row) for a row's quad; pad(activations, rows) for the
// rows that are missing; fill(w, n, k, strip, quad, out) -> Level; add_quads(activations, rows, w, strips, levels,
// depth, acc) for `depth` quads of one group and one panel, whose strips lie side by side: levels are W's, and acc has a row
// of kPanelStrips strips for each row; and Session, which lives as long as a task.
#pragma once
#include "simd_includes.h"

namespace xpu_fp4::cpu {
namespace {

// Quads of W that are unpacked at a time, to stay in the first-level cache: with three strips 27 KiB.
constexpr int kPanelQuads = 4;

void free_aligned(void* memory) { std::free(memory); }

template <class T>
using Buffer = std::unique_ptr<T[], void (*)(void*)>;

template <class T>
Buffer<T> allocate(int64_t count) {
  void* memory = std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return {static_cast<T*>(memory), free_aligned};
}

template <class Isa, void (*quantize)(const QuantizeArgs&, Range)>
void expand_group(const ActivationSource& source, int64_t first_row, int rows, void* activations) {
  auto* out = static_cast<typename Isa::Activations*>(activations);
  for (int64_t quad = 0; quad < strips::quads(source.k); ++quad, ++out) {
    const int blocks = static_cast<int>(std::min<int64_t>(kQuad, source.k / kBlock - quad * kQuad));
    out->level = Level::quad;
    for (int row = 0; row < rows; ++row) {
      alignas(64) uint8_t packed[kQuadBytes] = {}, scale[kQuad] = {e8m0::kBias, e8m0::kBias, e8m0::kBias, e8m0::kBias};
      const int64_t block = (first_row + row) * (source.k / kBlock) + quad * kQuad;
      if (source.x != nullptr) {
        const void* x = static_cast<const char*>(source.x) + block * kBlock * size_of(source.x_dtype);
        quantize({x, source.x_dtype, 1, blocks * kBlock, source.mode, packed, scale}, {0, blocks});
      } else {
        const uint8_t *codes = source.codes + block * kBlockBytes, *scales = source.scale + block;
        if (blocks == kQuad) {
          Isa::expand(codes, scales, *out, row);
          continue;
        }
        std::memcpy(packed, codes, static_cast<size_t>(blocks * kBlockBytes));
        std::memcpy(scale, scales, static_cast<size_t>(blocks));
      }
      Isa::expand(packed, scale, *out, row);
    }
    Isa::pad(*out, rows);
  }
}

// The rows that share a pass over W, and the panels that share a pass over A: the activations of kPanelQuads quads and the
// accumulators stay in the second-level cache, 0.3 + 0.4 MiB of it.
constexpr int64_t kBlockRows = 512, kBlockPanels = 4;

template <class Isa>
class Product {
 public:
  using Finish = void (*)(const ProductArgs&, int64_t row, int64_t column, int columns, const float* acc);

  Product(const ProductArgs& args, const void* activations, int64_t first_row, Finish finish, int64_t rows)
      : acc_size_(std::min(kBlockRows, (rows + kGroupRows - 1) / kGroupRows * kGroupRows) * kPanelColumns),
        args_(args),
        activations_(static_cast<const typename Isa::Activations*>(activations)),
        first_row_(first_row),
        quads_(strips::quads(args.k)),
        finish_(finish) {}

  void multiply(Range rows, Range panels) {
    for (int64_t row = rows.begin; row < rows.end; row += kBlockRows) {
      for (int64_t panel = panels.begin; panel < panels.end; panel += kBlockPanels) {
        multiply_block({row, std::min(row + kBlockRows, rows.end)}, {panel, std::min(panel + kBlockPanels, panels.end)});
      }
    }
  }

 private:
  static constexpr int kGroupRows = Isa::kGroupRows, kPanelColumns = Isa::kPanelStrips * strips::kColumns;

  void multiply_block(Range rows, Range panels) {
    for (int64_t panel = 0; panel < panels.end - panels.begin; ++panel) {
      std::fill_n(acc_.get() + panel * acc_size_, (rows.end - rows.begin) * kPanelColumns, 0.0f);
    }
    for (int64_t quad = 0; quad < quads_; quad += kPanelQuads) {
      const Range depth = {quad, std::min(quad + kPanelQuads, quads_)};
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        fill(panel, depth);
        multiply_panel(rows, strips_of(panel), depth, acc_.get() + (panel - panels.begin) * acc_size_);
      }
    }
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        const int64_t column = panel * kPanelColumns;
        finish_(args_, first_row_ + row, column, static_cast<int>(std::min<int64_t>(kPanelColumns, args_.n - column)),
                acc_.get() + (panel - panels.begin) * acc_size_ + (row - rows.begin) * kPanelColumns);
      }
    }
  }

  int strips_of(int64_t panel) const {
    return static_cast<int>(std::min<int64_t>(Isa::kPanelStrips, strips::count(args_.n) - panel * Isa::kPanelStrips));
  }

  void fill(int64_t panel, Range depth) {
    const int count = strips_of(panel);
    for (int64_t quad = depth.begin; quad < depth.end; ++quad) {
      Level& level = levels_[quad - depth.begin];
      level = Level::quad;
      for (int s = 0; s < count; ++s) {
        auto& out = panel_[(quad - depth.begin) * count + s];
        level = std::max(level, Isa::fill(args_.w, args_.n, args_.k, panel * Isa::kPanelStrips + s, quad, out));
      }
    }
  }

  void multiply_panel(Range rows, int panel_strips, Range depth, float* acc) const {
    const auto* group = activations_ + rows.begin / kGroupRows * quads_;
    for (int64_t row = rows.begin; row < rows.end; row += kGroupRows, group += quads_, acc += kGroupRows * kPanelColumns) {
      const int group_rows = static_cast<int>(std::min<int64_t>(kGroupRows, rows.end - row));
      // The next group is far away for the hardware's prefetcher.
      if (row + kGroupRows < rows.end) {
        for (int64_t quad = depth.begin; quad < depth.end; ++quad) group[quads_ + quad].prefetch();
      }
      const auto* w = panel_.get();
      Isa::add_quads(group + depth.begin, group_rows, w, panel_strips, levels_, static_cast<int>(depth.end - depth.begin), acc);
    }
  }

  int64_t acc_size_;  // of one panel
  const ProductArgs& args_;
  const typename Isa::Activations* activations_;
  int64_t first_row_, quads_;
  Finish finish_;
  Level levels_[kPanelQuads];
  Buffer<typename Isa::Weights> panel_ = allocate<typename Isa::Weights>(kPanelQuads * Isa::kPanelStrips);
  Buffer<float> acc_ = allocate<float>(acc_size_ * kBlockPanels);
};

template <class Isa, typename Product<Isa>::Finish finish>
void multiply(const ProductArgs& args, const void* activations, int64_t first_row, Range rows, Range panels) {
  [[maybe_unused]] const typename Isa::Session session;
  Product<Isa>(args, activations, first_row, finish, rows.end - rows.begin).multiply(rows, panels);
}

template <class Isa, void (*quantize)(const QuantizeArgs&, Range), typename Product<Isa>::Finish finish>
constexpr W4A4Kernels w4a4_kernels = {Isa::kGroupRows, Isa::kPanelStrips * strips::kColumns, sizeof(typename Isa::Activations),
                                      expand_group<Isa, quantize>, multiply<Isa, finish>};

}  // namespace
}  // namespace xpu_fp4::cpu
