// SPDX-License-Identifier: Apache-2.0
// The expanded form of an operand, MXFP4 or of A MXINT8: what the pre-pass (expand.cpp) writes and the products with the matrix
// unit read. Host and device.
//
// R rows, padded to whole tiles, in groups of one sub-group (lanes = rows of the group); K in quads of 128. Every array is
// group-major, so that a tile adds one 64-bit offset and walks K with 32 bits.
//   codes      int8; K rounded up to whole quads, the tail zero. Arranged as Arrangement says. MXFP4: twice the value, shifted
//              left by up to 3 (so |code| <= 96), such that blocks of a quad share an exponent where they can. MXINT8: as they
//              are, which leaves no room for a shift
//   exponents  uint32 [group][quad][lane]: the scale bytes of the quad's four blocks, reduced by the shift
//   levels     uint32 [group][quad, rounded up to lanes]: bit l is set if Level l does not apply to all of the group's rows
// For products of few rows (ElementOrder::packed, expand_row.cpp) no code is shifted, levels mean nothing, nor do padding rows'
// codes.
#pragma once
#include <cstdint>

#include "format/accumulate.h"
#include "format/integer.h"

namespace xpu_fp4 {

/// The bits of 1.25 * 2^23, from which sums start (quad_sum.hpp).
constexpr uint32_t kStartBits = 0x4B200000;

/// Rows of a matrix instruction.
constexpr int kRowUnit = 8;

/// Sub-groups of a work-group that share K: of W4A16's kernel for few rows, and of gemm_small.cpp. That has more of them for
/// the least rows, so that all threads of a device have weights on their way.
constexpr int kSmallSplit = 8;
constexpr int small_split(int rows) { return rows < kRowUnit ? 2 * kSmallSplit : kSmallSplit; }

/// Of gemm_small.cpp. More would take more clocks on Ponte Vecchio than memory does.
constexpr int kMostRowsFetchedAhead = 8;

/// How a quad of blocks may be summed, the cheapest first; each level gives the same bits where it applies. A tile takes the
/// first that none of its groups rules out.
enum Level : uint32_t {
  kQuadLevel,  // the four blocks share one exponent: one int32 sum
  kPairLevel,  // blocks 0 and 1 share one, blocks 2 and 3 share one
  kNearLevel,  // a column's blocks share one; two of a row's do, and the others' are not far. MXFP4 alone. 16 numbers:
               // NearOrder
  kBlockLevel = kNearLevel + 16,  // any exponents inside the window
  kGeneralLevel,                  // an exponent outside of the window, or NaN
};
constexpr uint32_t kOnlyGeneral = (1u << kGeneralLevel) - 1;
constexpr uint32_t kNoNearLevel = (1u << kBlockLevel) - (1u << kNearLevel);

/// The order in which the near level adds: one block, another, and the two that are left, which share an exponent.
struct NearOrder {
  uint32_t block[4];

  constexpr explicit NearOrder(uint32_t level) : block{(level - kNearLevel) / 4, (level - kNearLevel) % 4} {
    const uint32_t a = block[0], b = block[1];
    block[2] = a != 0 && b != 0 ? 0 : a + b != 1 ? 1 : 2;
    block[3] = 6 - a - b - block[2];
  }
};

/// Scale bytes that need no care for subnormals or overflow: unbiased exponents in [-L, H], L = 44. H is 33 for W and for MXFP4
/// activations, 30 for MXINT8. The least bit of any intermediate, in units of a column's exponent, is 2^-(2L + 33) >= 2^-126;
/// MXINT8's 2^-5 enters with the column's exponent at the end, where 2^-(2L + 7) is the least. Four blocks, in units of a
/// column's exponent that a shift may have reduced by 3, are below
///   MXFP4,  |d| <= 4608:    2^(14.2 + 33 + 33 + L + 3) < 2^128
///   MXINT8, |d| <= 49152:   2^(17.6 + 30 + 33 + L + 3) < 2^128
struct Window {
  unsigned low, high;
};
constexpr Window kWeightWindow = {127 - 44, 127 + 33};
constexpr Window activations_window(Format format) {
  return {kWeightWindow.low, format == Format::mxint8 ? 127 + 30 : kWeightWindow.high};
}

/// Order of the 32 elements in a block. Both operands must use the same.
enum class ElementOrder : int {
  apart,  // of eight elements 0 2 4 6 1 3 5 7: the low nibbles of a packed dword, then the high ones, so that none has to move
  packed  // as in the checkpoint: for products with operands of four bits
};

/// Says how an operand's codes lie.
enum class Arrangement : int {
  rows,             // [row][K]: A, for devices with 2D block loads
  row_fragments,    // [8 rows][quad][block][row][32]: A, for the others
  column_fragments  // [group][quad][block][dword][lane]: B
};

/// Columns are padded to whole tiles of every device, so that a weight can be expanded once for all products.
constexpr int kColumnPadding = 32;

/// Says what a kernel that reads W as it is in the checkpoint knows of it.
enum class Weights : int {
  any,
  whole_quads,     // K is a multiple of 128
  scales_together  // and a quad's four scale bytes are an aligned dword
};

/// What gemm_small.cpp decodes W to, for the matrix unit: int4 takes fewer instructions, and its layout is less documented.
enum class WeightOperand : int { int4, int8 };

struct ExpandedLayout {
  int64_t rows, padded_rows, quads;
  int lanes;

  constexpr int64_t groups() const { return padded_rows / lanes; }
  constexpr int64_t level_pitch() const { return round_up(quads, lanes); }
  constexpr int64_t codes_bytes() const { return padded_rows * quads * kQuadElements; }
  constexpr int64_t exponents_bytes() const { return padded_rows * quads * 4; }
  constexpr int64_t levels_bytes() const { return groups() * level_pitch() * 4; }
};

}  // namespace xpu_fp4
