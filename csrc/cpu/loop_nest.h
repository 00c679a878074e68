// SPDX-License-Identifier: Apache-2.0
// The loop nest of all products around an instruction set's tile. Included by the files that are compiled for one instruction
// set; all of it has internal linkage.
//
// A is expanded once, group of rows by group of rows. Then a thread takes one rectangle of Y after the other: for each of its
// panels of columns and each kPanelQuads quads it unpacks W to first-level cache, and multiplies all its groups with it. W
// stands in memory as four bits only. Few rows take the direct way: W is decoded in registers.
//
// An Isa has
//   kSource                                 the name of its file
//   kGroupRows, kPanelStrips, kPanelQuads   the sizes of a group, and of the part of a panel that is unpacked at a time
//   kBlockRows                              rows that share a pass over W: the accumulators of kPanels panels (panels.h) and
//                                           the activations of kPanelQuads quads stay in the second-level cache
//   GroupQuad, StripQuad                    a group's quad, a strip's quad
//   Session                                 lives as long as a thread multiplies
//   expand(source, block, blocks, a, row)   a row's quad, which begins at that block of A
//   pad(a, rows)                            the group has so many rows
//   fill(w, strip, quad, out)         unpacks, and returns the Level
//   add_quads(a, quads, rows, w, strips, levels, depth, acc)   `depth` quads of up to kCallRows rows and a panel, whose strips
//                                           lie side by side; levels are W's; acc has a row of kPanelStrips strips for each
//                                           row; the next group begins at a + quads
//   kDirectRows, add_strip(a, rows, w, strip, acc)   all quads of a strip, for up to so many rows
#pragma once
#include "scratch.h"
#include "transform.h"

namespace xpu_fp4::cpu {
namespace {

// Rows that a call of add_quads takes, whole groups.
template <class Isa>
constexpr int kCallRows = Isa::kGroupRows;

template <class Isa>
void expand_group(const Activations& source, int64_t first_row, int rows, void* activations) {
  auto* out = static_cast<typename Isa::GroupQuad*>(activations);
  for (int64_t quad = 0; quad < strips::quads(source.k); ++quad, ++out) {
    const int blocks = static_cast<int>(std::min<int64_t>(kQuad, source.k / kBlock - quad * kQuad));
    for (int row = 0; row < rows; ++row) {
      with_transformed(source, first_row + row, quad, blocks,
                       [&](const Activations& plain, int64_t block) { Isa::expand(plain, block, blocks, *out, row); });
    }
    Isa::pad(*out, rows);
  }
}

template <class Isa>
class Multiplier {
 public:
  using Finish = void (*)(const Product&, int64_t row, int64_t column, int columns, const float* acc);

  Multiplier(const Product& product, const void* activations, int64_t first_row, Finish finish, int64_t rows, Scratch& scratch)
      : acc_size_((rows + kGroupRows - 1) / kGroupRows * kGroupRows * kPanelColumns),
        product_(product),
        activations_(static_cast<const typename Isa::GroupQuad*>(activations)),
        first_row_(first_row),
        quads_(strips::quads(product.weight.k)),
        finish_(finish) {
    constexpr size_t kPanelBytes = sizeof(typename Isa::StripQuad) * Isa::kPanelQuads * Isa::kPanelStrips;
    static_assert(kPanelBytes % 64 == 0);
    std::byte* memory = scratch.take(kPanelBytes + static_cast<size_t>(acc_size_ * Rectangles::kPanels) * sizeof(float));
    panel_ = reinterpret_cast<typename Isa::StripQuad*>(memory);
    acc_ = reinterpret_cast<float*>(memory + kPanelBytes);
  }

  void multiply(Range rows, Range panels) {
    if (rows.end - rows.begin <= Isa::kDirectRows) {
      multiply_directly(rows, panels);
    } else {
      multiply_panels(rows, panels);
    }
    finish_rows(rows, panels);
  }

 private:
  static constexpr int kGroupRows = Isa::kGroupRows, kPanelColumns = Isa::kPanelStrips * strips::kColumns;

  void multiply_panels(Range rows, Range panels) {
    std::fill_n(acc_, (panels.end - panels.begin) * acc_size_, 0.0f);
    for (int64_t quad = 0; quad < quads_; quad += Isa::kPanelQuads) {
      const Range depth = {quad, std::min(quad + Isa::kPanelQuads, quads_)};
      float* acc = acc_;
      for (int64_t panel = panels.begin; panel < panels.end; ++panel, acc += acc_size_) {
        fill(panel, depth);
        multiply_panel(rows, strips_of(panel), depth, acc);
      }
    }
  }

  // Few rows: a strip after the other from its first quad to its last, so that memory is read in order.
  void multiply_directly(Range rows, Range panels) {
    if constexpr (Isa::kDirectRows > 0) {
      const int count = static_cast<int>(rows.end - rows.begin);
      float* acc = acc_;
      for (int64_t panel = panels.begin; panel < panels.end; ++panel, acc += acc_size_) {
        std::fill_n(acc, count * kPanelColumns, 0.0f);
        for (int s = 0; s < strips_of(panel); ++s) {
          Isa::add_strip(activations_ + rows.begin / kGroupRows * quads_, count, product_.weight, panel * Isa::kPanelStrips + s,
                         acc + s * strips::kColumns);
        }
      }
    }
  }

  // Row by row: a row of Y is many pages away from the next.
  void finish_rows(Range rows, Range panels) const {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const float* acc = acc_ + (row - rows.begin) * kPanelColumns;
      for (int64_t panel = panels.begin; panel < panels.end; ++panel, acc += acc_size_) {
        const int64_t column = panel * kPanelColumns;
        finish_(product_, first_row_ + row, column,
                static_cast<int>(std::min<int64_t>(kPanelColumns, product_.weight.n - column)), acc);
      }
    }
  }

  int strips_of(int64_t panel) const {
    return static_cast<int>(std::min<int64_t>(Isa::kPanelStrips, strips::count(product_.weight.n) - panel * Isa::kPanelStrips));
  }

  void fill(int64_t panel, Range depth) {
    const int count = strips_of(panel);
    for (int64_t quad = depth.begin; quad < depth.end; ++quad) {
      Level& level = levels_[quad - depth.begin];
      level = Level::quad;
      for (int s = 0; s < count; ++s) {
        auto& out = panel_[(quad - depth.begin) * count + s];
        level = std::max(level, Isa::fill(product_.weight, panel * Isa::kPanelStrips + s, quad, out));
      }
    }
  }

  void multiply_panel(Range rows, int panel_strips, Range depth, float* acc) const {
    constexpr int kRows = kCallRows<Isa>;
    const auto* a = activations_ + rows.begin / kGroupRows * quads_ + depth.begin;
    for (int64_t row = rows.begin; row < rows.end; row += kRows) {
      Isa::add_quads(a, quads_, static_cast<int>(std::min<int64_t>(kRows, rows.end - row)), panel_, panel_strips, levels_,
                     static_cast<int>(depth.end - depth.begin), acc);
      a += kRows / kGroupRows * quads_;
      acc += kRows * kPanelColumns;
    }
  }

  int64_t acc_size_;  // of one panel of a rectangle
  const Product& product_;
  const typename Isa::GroupQuad* activations_;
  int64_t first_row_, quads_;
  Finish finish_;
  Level levels_[Isa::kPanelQuads];
  typename Isa::StripQuad* panel_;
  float* acc_;
};

template <class Isa, typename Multiplier<Isa>::Finish finish>
void multiply(const Product& product, const void* activations, int64_t first_row, Rectangles& rectangles, Scratch& scratch) {
  Range rows{}, panels{};
  if (!rectangles.take(rows, panels)) return;
  [[maybe_unused]] const typename Isa::Session session;
  Multiplier<Isa> multiplier(product, activations, first_row, finish, rectangles.rows_each(), scratch);
  do multiplier.multiply(rows, panels);
  while (rectangles.take(rows, panels));
}

template <class Isa, typename Multiplier<Isa>::Finish finish>
constexpr ProductKernels product_kernels = {
    Isa::kSource,
    Isa::kGroupRows,
    Isa::kBlockRows,
    Isa::kDirectRows,
    Isa::kPanelStrips * strips::kColumns,
    sizeof(typename Isa::GroupQuad),
    expand_group<Isa>,
    multiply<Isa, finish>,
};

// A whole record: as it lies, or made in the buffer.
inline const uint8_t* record_of(const Weight& w, int64_t strip, int64_t quad, uint8_t* buffer) {
  if (w.strips() == nullptr) {
    prepack_record(w, strip, quad, kQuad, buffer);
    return buffer;
  }
  const uint8_t* record = w.strips() + strips::record_offset(strip, quad, w.k);
  const int blocks = strips::blocks_of(w.k, quad);
  if (blocks == kQuad) return record;
  complete_record(record, blocks, buffer);
  return buffer;
}

}  // namespace
}  // namespace xpu_fp4::cpu
