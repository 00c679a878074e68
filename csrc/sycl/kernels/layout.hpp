// SPDX-License-Identifier: Apache-2.0
// The expanded form of an MXFP4 operand: what the pre-pass (expand.cpp) writes and the products with the matrix unit read. Host
// and device.
//
// R rows, padded to whole tiles, in groups of one sub-group (lanes = rows of the group); K in quads of 128. Every array is
// group-major, so that a tile adds one 64-bit offset and walks K with 32 bits.
//   codes      int8, twice the value, shifted left by what the scales of the row's pair or quad have in common (at most 3, so
//              |code| <= 96); K rounded up to whole quads, the tail zero. Arranged as Arrangement says
//   exponents  uint32 [group][quad][lane]: the scale bytes of the quad's four blocks, reduced by the shift
//   levels     uint8 [group][quad, rounded up to lanes]: the most expensive Level of the group's rows
#pragma once
#include <cstdint>

namespace xpu_fp4 {

/// How a quad of blocks may be summed; each level gives the same bits where it applies.
enum Level : uint8_t {
  kQuadLevel,     // the four blocks share one exponent: one int32 sum
  kPairLevel,     // blocks 0 and 1 share one, blocks 2 and 3 share one
  kBlockLevel,    // any exponents inside the window
  kGeneralLevel,  // an exponent outside of the window, or NaN
};

/// Unbiased exponents in [-44, 34] need no care for subnormals or overflow: with L = 44 and H = 34 the least bit of any
/// intermediate is 2^-(2L + H) >= 2^-126, and the largest is below 2^(2H + L + 13.2) < 2^127.
constexpr unsigned kWindowLow = 127 - 44;
constexpr unsigned kWindowHigh = 127 + 34;

constexpr int kQuadElements = 128;

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
  constexpr int64_t level_pitch() const { return (quads + lanes - 1) / lanes * lanes; }
  constexpr int64_t codes_bytes() const { return padded_rows * quads * kQuadElements; }
  constexpr int64_t exponents_bytes() const { return padded_rows * quads * 4; }
  constexpr int64_t levels_bytes() const { return groups() * level_pitch(); }
};

}  // namespace xpu_fp4
