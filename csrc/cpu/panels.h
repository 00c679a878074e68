// SPDX-License-Identifier: Apache-2.0
// What the W4A4 and W4A8 kernels multiply: both operands as small integers with float32 factors, a quad (K = 128) at a time.
//
// A stored integer of MXFP4 is twice the element, shifted left by up to three bits so that neighbouring blocks share a scale;
// one of MXINT8 is the code, which fills its byte, so that neighbours share a scale only where theirs are equal. Where all
// blocks of a quad do (Level::quad), the quad's sum is one integer and costs one conversion; Level::pair and Level::block
// convert two and four sums; Level::general also guards against overflow and underflow. All four give the bits of
// format/accumulate.h: while the four scales of a quad share an exponent window, no addition but the defined ones rounds.
//
// K is stored in the order of W's packed bytes: the low nibbles of four bytes (elements 0 2 4 6 of eight), then the high ones.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../backend.h"
#include "../format/integer.h"
#include "../format/strips.h"
#include "kernels.h"

namespace xpu_fp4::cpu {

enum class Level : uint8_t { quad, pair, block, general };

/// Shifts of up to three bits: 12 << 3 = 96 fits int8. Integers of MXINT8 cannot be shifted.
constexpr int kMaxShift = 3;
constexpr int max_shift(Format format) { return format == Format::mxint8 ? 0 : kMaxShift; }

/// Scale bytes with which no product and no sum of four leaves the normal float32 range. Of W4A4: 2^(-55-55-2) up to
/// 2^(55+55-2) * 4 * 4608 < 2^123. Of W4A8: 2^(-55-55-7) up to 2^(55+55-7) * 4 * 49152 < 2^121.
constexpr uint8_t kLeastSafeByte = e8m0::kBias - 55, kLargestSafeByte = e8m0::kBias + 55;

/// 1.5 * 2^23: an integer below 2^22 added to its bits gives the float 1.5 * 2^23 + integer, so a sum that starts here needs
/// no conversion, only fma(sum, scale, -1.5 * 2^23 * scale), which is exact.
constexpr float kMagic = 12582912.0f;
constexpr int32_t kMagicBits = 0x4B400000;
static_assert(bits_of(kMagic) == kMagicBits);

/// The largest sum of a quad's integers: 128 * 96 * 96 = 1179648 of W4A4, 128 * 128 * 96 = 1572864 of W4A8.
constexpr int largest_sum(Format activations) {
  const int a = largest_integer(activations) << max_shift(activations), w = largest_integer(Format::mxfp4) << kMaxShift;
  return kQuadElements * a * w;
}
static_assert(largest_sum(Format::mxfp4) < 1 << 22 && largest_sum(Format::mxint8) < 1 << 22);

/// Says what the four blocks of a row's quad share, or do not. Block b's integers are shifted left by shift[b] and its
/// remaining scale is byte base[b].
struct Alignment {
  Level level;
  uint8_t shift[kQuad], base[kQuad];
};

/// Zero blocks (bit b of zero_blocks) fit any scale. A NaN scale makes the whole quad NaN, as the sum will be anyway.
constexpr Alignment align(const uint8_t* scale, unsigned zero_blocks, int max_shift) {
  Alignment out{Level::quad, {}, {}};
  uint8_t byte[kQuad] = {};
  for (int b = 0; b < kQuad; ++b) {
    if (scale[b] == e8m0::kNan) {
      for (uint8_t& base : out.base) base = e8m0::kNan;
      return out;
    }
    // A zero block takes its partner's scale, or one of the other pair, or 1.
    byte[b] = e8m0::kBias;
    for (const int other : {b ^ 3, b ^ 2, b ^ 1, b}) {
      if ((zero_blocks >> other & 1u) == 0) byte[b] = scale[other];
    }
  }
  const auto least = [&](int first, int count) { return *std::min_element(byte + first, byte + first + count); };
  const auto spread = [&](int first, int count) {
    return *std::max_element(byte + first, byte + first + count) - least(first, count);
  };
  if (least(0, 4) < kLeastSafeByte || spread(0, 4) > kLargestSafeByte - least(0, 4)) {
    out.level = Level::general;
  } else if (spread(0, 4) > max_shift) {
    out.level = spread(0, 2) > max_shift || spread(2, 2) > max_shift ? Level::block : Level::pair;
  }
  const int shared = out.level == Level::quad ? 4 : out.level == Level::pair ? 2 : 1;
  for (int b = 0; b < kQuad; ++b) {
    out.base[b] = least(b / shared * shared, shared);
    out.shift[b] = static_cast<uint8_t>(byte[b] - out.base[b]);
  }
  return out;
}

/// How a product's integers are stored: W's are `bias` too large, and a sum of products times 2^(ea + exponent) times W's
/// factor is what it stands for.
struct IntegerForm {
  int bias, exponent;
};
/// W's factors are 2^(ew + factor_exponent), which is at most 2^127.
constexpr IntegerForm integer_form(Format activations, int bias, int factor_exponent) {
  return {bias, integer_exponent(activations) + integer_exponent(Format::mxfp4) - factor_exponent};
}

/// Scales and corrections of a row of A where its quad is summed as one integer. `offset` undoes kMagic; `start` is where the
/// integer sum starts, kMagicBits less the bias of W's integers.
struct QuadFactor {
  float scale, offset;
  int32_t start;
};

/// The same for one block. What the integers are too large by is undone here: with W's factors 2^ew, scale * rest is 2^(ea - 2)
/// of MXFP4 and 2^(ea - 7) of MXINT8. The scale is normal and an integer below 2^22 times it is finite: rest is 1 but for the
/// least and the largest scales. A column's factor below `underflow` may give a subnormal product.
struct BlockFactor {
  float scale, rest, underflow;
  int32_t start;

  /// rest is applied before the product's rounding where it is small, and after it where it is large.
  constexpr float before() const { return std::min(rest, 1.0f); }
  constexpr float after() const { return std::max(rest, 1.0f); }
};

/// A quad of up to kRows rows of A, whose rows are cut into runs that each lie together for all rows.
template <int kRows, int kRun = kQuadElements>
struct alignas(64) ActivationQuad {
  int8_t codes[kQuadElements / kRun][kRows][kRun];
  QuadFactor quad[kRows];
  Level level;
  BlockFactor block[kRows][kQuad];  // last: aligned quads do not read it

  int8_t* at(int row, int position) { return codes[position / kRun][row] + position % kRun; }
  const int8_t* at(int row, int position) const { return codes[position / kRun][row] + position % kRun; }

  /// The quad's level is its rows' highest; rows are set in ascending order.
  void set_level(int row, Level of_row) { level = row == 0 ? of_row : std::max(level, of_row); }
};

/// The factor of a block whose remaining scale is byte `base`; e is -135 .. 125.
constexpr BlockFactor block_factor(uint8_t base, int32_t start, const IntegerForm& form) {
  if (base == e8m0::kNan) return {float_of(kNanBits), 1.0f, 0.0f, start};
  const int e = e8m0::exponent(base) + form.exponent, kept = std::clamp(e, -126, 100);
  const int underflow = -126 - e;
  return {pow2(kept), pow2(e - kept), underflow < -149 ? 0.0f : pow2(underflow), start};
}

/// Fills a row's factors. sums[b] is the sum of block b's stored integers.
constexpr void set_factors(const Alignment& row, const int32_t* sums, const IntegerForm& form, QuadFactor& quad,
                           BlockFactor* block) {
  for (int b = 0; b < kQuad; ++b) block[b] = block_factor(row.base[b], kMagicBits - form.bias * sums[b], form);
  const float scale = block[0].scale * block[0].rest;
  quad = {scale, -kMagic * scale, kMagicBits - form.bias * (sums[0] + sums[1] + sums[2] + sums[3])};
}

/// A quad of a strip of W as the inner loops read it: step s holds, of every column, four K whose activations are dword s of a
/// row's codes.
struct alignas(64) WeightQuad {
  uint8_t codes[kQuadElements / 4][strips::kColumns][4];
  float factor[kQuad][strips::kColumns];
};

/// The rectangles of Y that a product is cut into: rows by panels of columns. Threads take one after the other, so that one
/// that is held up does not hold up the rest.
class Rectangles {
 public:
  /// Panels that share a pass over A, at most.
  static constexpr int64_t kPanels = 4;

  /// Each has kernels.block_rows rows at most, and whole groups.
  Rectangles(int64_t rows, int64_t panels, const ProductKernels& kernels) : rows_(rows), panels_(panels) {
    const int64_t groups = ceil_div(rows, kernels.group_rows), parts = ceil_div(rows, kernels.block_rows);
    rows_each_ = ceil_div(groups, parts) * kernels.group_rows;
    count_ = ceil_div(rows, rows_each_) * panels;
  }

  /// The copy has all of them left.
  Rectangles(const Rectangles& other)
      : rows_(other.rows_), panels_(other.panels_), rows_each_(other.rows_each_), count_(other.count_), later_(other.later_) {}
  Rectangles& operator=(const Rectangles&) = delete;

  /// Says that so many rectangles of other products are taken after these.
  void precede(int64_t later) { later_ = later; }

  /// Returns the rows of one row of panels.
  int64_t rows_each() const { return std::min(rows_, rows_each_); }
  /// Counts all panels, once for each of their rectangles.
  int64_t count() const { return count_; }

  bool take(Range& rows, Range& panels) {
    int64_t begin = taken_.load(std::memory_order_relaxed), taken = 0;
    do {
      if (begin >= count_) return false;
      // Small ones towards the end, so that all threads end together.
      taken = std::min(std::clamp<int64_t>((count_ - begin + later_) / 32, 1, kPanels), panels_ - begin % panels_);
    } while (!taken_.compare_exchange_weak(begin, begin + taken, std::memory_order_relaxed));
    const int64_t row = begin / panels_ * rows_each_, panel = begin % panels_;
    rows = {row, std::min(row + rows_each_, rows_)};
    panels = {panel, panel + taken};
    return true;
  }

 private:
  int64_t rows_, panels_, rows_each_ = 0, count_ = 0, later_ = 0;
  std::atomic<int64_t> taken_{0};
};

}  // namespace xpu_fp4::cpu
