// SPDX-License-Identifier: Apache-2.0
// The expanded form of an MXFP4 operand: what the pre-pass (expand.cpp) writes and the products with the matrix unit read. Host
// and device.
//
// R rows, padded to whole tiles, in groups of one sub-group (lanes = rows of the group); K in quads of 128. Every array is
// group-major, so that a tile adds one 64-bit offset and walks K with 32 bits.
//   codes      int8, twice the value, shifted left by up to 3 (so |code| <= 96), such that blocks of a quad share an exponent
//              where they can; K rounded up to whole quads, the tail zero. Arranged as Arrangement says
//   exponents  uint32 [group][quad][lane]: the scale bytes of the quad's four blocks, reduced by the shift
//   levels     uint32 [group][quad, rounded up to lanes]: bit l is set if Level l does not apply to all of the group's rows
#pragma once
#include <cstdint>

#include "format/accumulate.h"
#include "format/integer.h"

namespace xpu_fp4 {

/// The bits of 1.25 * 2^23, from which sums start (quad_sum.hpp).
constexpr uint32_t kStartBits = 0x4B200000;

/// Rows of a matrix instruction.
constexpr int kRowUnit = 8;

/// Sub-groups of a work-group of gemm_small.cpp, which share K there.
constexpr int kSmallSplit = 8;

/// How a quad of blocks may be summed, the cheapest first; each level gives the same bits where it applies. A tile takes the
/// first that none of its groups rules out.
enum Level : uint32_t {
  kQuadLevel,  // the four blocks share one exponent: one int32 sum
  kPairLevel,  // blocks 0 and 1 share one, blocks 2 and 3 share one
  kNearLevel,  // a column's blocks share one; two of a row's do, and the others' are not far. 16 numbers: NearOrder
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

/// Unbiased exponents in [-44, 33] need no care for subnormals or overflow. With L = 44 and H = 33 the least bit of any
/// intermediate is 2^-(2L + H) >= 2^-126. Four blocks, in units of a column's exponent that a shift may have reduced by 3, are
/// below 2^(14.2 + 2H + L + 3) < 2^128.
constexpr unsigned kWindowLow = 127 - 44;
constexpr unsigned kWindowHigh = 127 + 33;

/// Of the 32 elements inside of a block: any will do that both operands have.
enum class ElementOrder : int {
  apart,  // as packed dwords come apart: the low nibbles of a dword's four bytes, then the high ones. No nibble has to move
  packed  // as in the checkpoint: for products with operands of four bits
};

/// Of an operand's codes.
enum class Arrangement : int {
  rows,             // [row][K]: A, for devices with 2D block loads
  row_fragments,    // [8 rows][quad][block][row][32]: A, for the others
  column_fragments  // [group][quad][block][dword][lane]: B
};

/// Columns are padded to whole tiles of every device, so that a weight can be expanded once for all products.
constexpr int kColumnPadding = 32;

/// What a kernel that reads W as it is in the checkpoint knows of it.
enum class Weights : int {
  any,
  whole_quads,     // K is a multiple of 128
  scales_together  // and a quad's four scale bytes are an aligned dword
};

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
