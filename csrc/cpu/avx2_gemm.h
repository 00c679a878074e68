// SPDX-License-Identifier: Apache-2.0
// W4A4 and W4A8 on vectors of 256 bits. Their instructions multiply unsigned by signed bytes, so W's integers are stored 12 too
// large, and a block's sum starts from -12 times the sum of A's integers. Sums says which instruction adds the products up:
// AVX2's to int16, where shifted integers would overflow, so blocks are scaled one by one; AVX-VNNI's to int32. A tile is four
// rows by sixteen columns. As few rows as one tile has take the direct way: W is decoded in registers, half of a strip's
// columns at a time.
#pragma once
#include "avx2_quantize.h"
#include "avx2_strips.h"
#include "generic_output.h"
#include "operand_source.h"

namespace xpu_fp4::cpu {
namespace {

// The integer of each e2m1 code, and a bias.
constexpr std::array<int8_t, 16> integers_of_codes(int bias) {
  std::array<int8_t, 16> table{};
  for (unsigned code = 0; code < 16; ++code) table[code] = static_cast<int8_t>(bias + e2m1::twice(code));
  return table;
}

constexpr int kWeightBias = 12;

// How a block's products are added up. A policy has
//   start(pairs)     the dword that a row's sums start from; the first dword of pairs has the sums of the block's integers of A
//                    in the first two and in the last two of every four K
//   add(sum, w, a)   adds the products of four K: unsigned W, signed A
//   magic_of(sum)    kMagicBits plus the block's sum, without W's bias

// vpmaddubsw adds pairs of products to int16, and a block's eight pairs are added modulo 2^16: what they end at is the sum
// without the bias, at most 16 * 128 * 12 = 24576. It is widened once a block.
struct Int16Sums {
  static int32_t start(__m128i pairs) { return _mm_cvtsi128_si32(_mm_mullo_epi16(pairs, _mm_set1_epi16(-kWeightBias))); }
  static __m256i add(__m256i sum, __m256i w, __m256i a) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, a)); }
  static __m256i magic_of(__m256i sum) {
    return _mm256_add_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), _mm256_set1_epi32(kMagicBits));
  }
};

// vpdpbusd adds all four products to int32, so that a sum starts from kMagicBits and is done when the products are.
template <class Instruction>
struct Int32Sums {
  static int32_t start(__m128i pairs) {
    return kMagicBits + _mm_cvtsi128_si32(_mm_madd_epi16(pairs, _mm_set1_epi16(-kWeightBias)));
  }
  static __m256i add(__m256i sum, __m256i w, __m256i a) { return Instruction::vpdpbusd(sum, w, a); }
  static __m256i magic_of(__m256i sum) { return sum; }
};

template <class Sums>
struct Avx2 {
  static constexpr char kSource[] = "avx2_gemm.h";
  static constexpr int kGroupRows = 4, kPanelStrips = 1, kPanelQuads = 8, kDirectRows = 4, kBlockRows = 512;
  using GroupQuad = ActivationQuad<kGroupRows>;
  using StripQuad = WeightQuad;
  struct Session {};

  static void expand(const Activations& source, int64_t block, int blocks, GroupQuad& out, int row) {
    with_codes<quantize>(source, block, blocks, [&](const uint8_t* codes, const uint8_t* scale) {
      const Format format = source.to.format;
      unsigned zero_blocks = 0;
      int32_t starts[kQuad];
      for (int b = 0; b < kQuad; ++b) {
        const __m256i integers =
            format == Format::mxint8 ? integers_of_int8(codes + b * kBlock) : integers_of_e2m1(codes + b * kBlockBytes);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.at(row, b * kBlock)), integers);
        zero_blocks |= static_cast<unsigned>(_mm256_testz_si256(integers, integers)) << b;
        starts[b] = start_of(integers);
      }
      const Alignment alignment = align(scale, zero_blocks, 0);
      const IntegerForm form = integer_form(format, kWeightBias, 0);
      for (int b = 0; b < kQuad; ++b) out.block[row][b] = block_factor(alignment.base[b], starts[b], form);
      out.set_level(row, alignment.level);
    });
  }
  static void pad(GroupQuad&, int) {}

  static Level fill(const Weight& w, int64_t strip, int64_t quad, StripQuad& out) {
    alignas(64) uint8_t buffer[strips::kRecordBytes];
    const uint8_t* record = fetched_record(w, strip, quad, buffer);
    for (int d = 0; d < kQuadBytes / 4; ++d) {
      for (int half = 0; half < kHalves; ++half) {
        const Integers integers = decode(record, d, half);
        _mm256_store_si256(reinterpret_cast<__m256i*>(out.codes[2 * d][kHalf * half]), integers.low);
        _mm256_store_si256(reinterpret_cast<__m256i*>(out.codes[2 * d + 1][kHalf * half]), integers.high);
      }
    }
    for (int half = 0; half < kHalves; ++half) {
      for (int b = 0; b < kQuad; ++b) _mm256_store_ps(out.factor[b] + kHalf * half, factor_of<true>(record, b, half));
    }
    return level_of(record);
  }

  static void add_quads(const GroupQuad* a, int64_t, int rows, const StripQuad* w, int, const Level* levels, int depth,
                        float* acc) {
    for (int q = 0; q < depth; ++q) {
      const bool general = std::max(levels[q], a[q].level) == Level::general;
      kTiles[static_cast<size_t>(rows - 1)][general ? 1 : 0](a[q], w[q], acc, strips::kColumns);
    }
  }

  // All quads of one strip for up to kDirectRows rows; acc has a row of a strip for each.
  static void add_strip(const GroupQuad* a, int rows, const Weight& w, int64_t strip, float* acc) {
    static constexpr Direct kDirect[kDirectRows] = {add_rows<1>, add_rows<2>, add_rows<3>, add_rows<4>};
    kDirect[rows - 1](a, w, strip, acc);
  }

 private:
  static constexpr auto kBiased = integers_of_codes(kWeightBias), kTwice = integers_of_codes(0);

  // Holds dword d of the codes of a half's columns as integers kWeightBias too large: those of the low nibbles of each of its
  // bytes, and of the high ones.
  struct Integers {
    __m256i low, high;
  };
  [[gnu::always_inline]] static Integers decode(const uint8_t* record, int d, int half) {
    const __m256i codes = codes_of(record, d, half);
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kBiased.data())));
    const __m256i nibble = _mm256_set1_epi8(15);
    return {_mm256_shuffle_epi8(table, _mm256_and_si256(codes, nibble)),
            _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble))};
  }

  static Level level_of(const uint8_t* record) {
    const __m256i window = _mm256_set1_epi8(kLargestSafeByte - kLeastSafeByte);
    const auto beyond = [&](int half) {
      const __m256i from_least = _mm256_sub_epi8(scales_of(record, half), _mm256_set1_epi8(kLeastSafeByte));
      return _mm256_subs_epu8(from_least, window);
    };
    const __m256i any = _mm256_or_si256(beyond(0), beyond(1));
    return _mm256_testz_si256(any, any) != 0 ? Level::block : Level::general;
  }

  // The integers of a block of A in the order of panels.h.
  static __m256i integers_of_e2m1(const uint8_t* packed) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)), nibble = _mm_set1_epi8(15);
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kTwice.data()));
    const __m128i low = _mm_shuffle_epi8(table, _mm_and_si128(bytes, nibble));
    const __m128i high = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble));
    return _mm256_set_m128i(_mm_unpackhi_epi32(low, high), _mm_unpacklo_epi32(low, high));
  }
  static __m256i integers_of_int8(const uint8_t* codes) {
    const __m128i even_then_odd = _mm_set_epi8(15, 13, 11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0);
    return _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)),
                               _mm256_broadcastsi128_si256(even_then_odd));
  }

  static int32_t start_of(__m256i integers) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), integers);
    __m128i sums = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0x4E));
    sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0xB1));
    return Sums::start(sums);
  }

  // Four K of a row of A in every dword.
  static __m256i four_of(const GroupQuad& a, int row, int position) {
    int32_t dword;
    std::memcpy(&dword, a.at(row, position), sizeof(dword));
    return _mm256_set1_epi32(dword);
  }

  using Tile = void (*)(const GroupQuad&, const StripQuad&, float*, int64_t);

  // p: the block's product or, in the safe window, where products are exact, its sum with the pair's first.
  template <bool kGeneral>
  static __m256 product(__m256i sum, const BlockFactor& f, __m256 w, bool second, __m256 pair) {
    const __m256 scale = _mm256_set1_ps(f.scale);
    const __m256 u = _mm256_fmadd_ps(_mm256_castsi256_ps(sum), scale, _mm256_mul_ps(scale, _mm256_set1_ps(-kMagic)));
    if constexpr (kGeneral) {
      const __m256 lowered = _mm256_mul_ps(u, _mm256_set1_ps(f.before()));
      const __m256 p = _mm256_mul_ps(_mm256_mul_ps(lowered, w), _mm256_set1_ps(f.after()));
      return second ? _mm256_add_ps(pair, p) : p;
    }
    return second ? _mm256_fmadd_ps(u, w, pair) : _mm256_mul_ps(u, w);
  }

  template <int R, bool kGeneral>
  static void tile(const GroupQuad& a, const StripQuad& w, float* acc, int64_t stride) {
    __m256 pair[2][R][2];
    for (int b = 0; b < kQuad; ++b) {
      __m256i sum[R][2];
      for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm256_set1_epi32(a.block[r][b].start);
#pragma GCC unroll 4
      for (int i = 0; i < kBlock / 4; ++i) {
        const int step = b * kBlock / 4 + i;
        const __m256i left = _mm256_load_si256(reinterpret_cast<const __m256i*>(w.codes[step][0]));
        const __m256i right = _mm256_load_si256(reinterpret_cast<const __m256i*>(w.codes[step][8]));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m256i row = four_of(a, r, 4 * step);
          sum[r][0] = Sums::add(sum[r][0], left, row);
          sum[r][1] = Sums::add(sum[r][1], right, row);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const BlockFactor& f = a.block[r][b];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          __m256& out = pair[b / 2][r][half];
          out = product<kGeneral>(Sums::magic_of(sum[r][half]), f, _mm256_load_ps(w.factor[b] + 8 * half), b % 2 != 0, out);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int half = 0; half < 2; ++half) {
        float* at = acc + r * stride + 8 * half;
        _mm256_store_ps(at, _mm256_add_ps(_mm256_load_ps(at), _mm256_add_ps(pair[0][r][half], pair[1][r][half])));
      }
    }
  }

  using Direct = void (*)(const GroupQuad*, const Weight&, int64_t, float*);

  template <int R>
  static void add_rows(const GroupQuad* a, const Weight& w, int64_t strip, float* acc) {
    alignas(64) uint8_t buffer[strips::kRecordBytes];
    for (int64_t quad = 0; quad < strips::quads(w.k); ++quad) {
      const uint8_t* record = fetched_record(w, strip, quad, buffer);
      if (std::max(level_of(record), a[quad].level) == Level::general) {
        add_general<R>(a[quad], record, acc);
      } else {
        add_quad<R, false>(a[quad], record, acc);
      }
    }
  }

  template <int R>
  [[gnu::noinline]] static void add_general(const GroupQuad& a, const uint8_t* record, float* acc) {
    add_quad<R, true>(a, record, acc);
  }

  // acc += one quad of a strip.
  template <int R, bool kGeneral>
  [[gnu::always_inline]] static void add_quad(const GroupQuad& a, const uint8_t* record, float* acc) {
    __m256 pair[2][R][kHalves];
#pragma GCC unroll 4
    for (int b = 0; b < kQuad; ++b) add_block<R, kGeneral>(a, record, b, pair[b / 2]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int half = 0; half < kHalves; ++half) {
        float* at = acc + r * strips::kColumns + kHalf * half;
        _mm256_store_ps(at, _mm256_add_ps(_mm256_load_ps(at), _mm256_add_ps(pair[0][r][half], pair[1][r][half])));
      }
    }
  }

  template <int R, bool kGeneral>
  [[gnu::always_inline]] static void add_block(const GroupQuad& a, const uint8_t* record, int b, __m256 (&pair)[R][kHalves]) {
    __m256i sum[R][kHalves];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm256_set1_epi32(a.block[r][b].start);
#pragma GCC unroll 4
    for (int d = 4 * b; d < 4 * b + 4; ++d) {
      const Integers left = decode(record, d, 0), right = decode(record, d, 1);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m256i low = four_of(a, r, 8 * d), high = four_of(a, r, 8 * d + 4);
        sum[r][0] = Sums::add(Sums::add(sum[r][0], left.low, low), left.high, high);
        sum[r][1] = Sums::add(Sums::add(sum[r][1], right.low, low), right.high, high);
        asm("" : "+x"(sum[r][0]), "+x"(sum[r][1]));
      }
    }
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) {
      const __m256 factor = factor_of<kGeneral>(record, b, half);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        __m256& out = pair[r][half];
        out = product<kGeneral>(Sums::magic_of(sum[r][half]), a.block[r][b], factor, b % 2 != 0, out);
      }
    }
  }

  static constexpr Tile kTiles[kGroupRows][2] = {{tile<1, false>, tile<1, true>},
                                                 {tile<2, false>, tile<2, true>},
                                                 {tile<3, false>, tile<3, true>},
                                                 {tile<4, false>, tile<4, true>}};
};

}  // namespace
}  // namespace xpu_fp4::cpu
