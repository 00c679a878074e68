// SPDX-License-Identifier: Apache-2.0
// W4A4 on AVX2. vpmaddubsw multiplies unsigned by signed bytes and adds pairs to int16: with W's integers stored 12 too large a
// block's sums stay below 2^14, so they are added in int16 and widened once a block. Shifts would overflow, so blocks are
// scaled one by one. A tile is four rows by sixteen columns.
#pragma once
#include "generic_w4a4.h"

namespace xpu_fp4::cpu {
namespace {

struct Avx2 {
  static constexpr int kGroupRows = 4, kPanelStrips = 1, kPanelQuads = 8, kDirectRows = 0, kBlockRows = 512, kWeightBias = 12;
  using GroupQuad = ActivationQuad<kGroupRows>;
  using StripQuad = WeightQuad;
  struct Session {};

  static void expand(const Activations& source, int64_t block, int blocks, GroupQuad& out, int row) {
    with_codes<quantize>(source, block, blocks, [&](const uint8_t* packed, const uint8_t* scale) {
      expand_scalars(packed, scale, {kWeightBias, 0}, out, row);
    });
  }
  static void pad(GroupQuad&, int) {}

  static Level fill(const Weight& w, int64_t strip, int64_t quad, StripQuad& out) {
    alignas(64) uint8_t buffer[strips::kRecordBytes];
    const uint8_t* record = record_of(w, strip, quad, buffer);
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kBiased.data())));
    for (int d = 0; d < kQuadBytes / 4; ++d) {
      for (int half = 0; half < 2; ++half) {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(record + 64 * d + 32 * half));
        const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(codes, nibble));
        const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble));
        _mm256_store_si256(reinterpret_cast<__m256i*>(out.codes[2 * d][8 * half]), low);
        _mm256_store_si256(reinterpret_cast<__m256i*>(out.codes[2 * d + 1][8 * half]), high);
      }
    }
    Level level = Level::block;
    for (int c = 0; c < strips::kColumns; ++c) {
      for (int b = 0; b < kQuad; ++b) {
        const uint8_t scale = record[strips::scale_offset(c, b)];
        out.factor[b][c] = e8m0::value(scale);
        if (scale < kLeastSafeByte || scale > kLargestSafeByte) level = Level::general;
      }
    }
    return level;
  }

  static void add_quads(const GroupQuad* a, int64_t, int rows, const StripQuad* w, int, const Level* levels, int depth,
                        float* acc) {
    for (int q = 0; q < depth; ++q) {
      const bool general = std::max(levels[q], a[q].level) == Level::general;
      kTiles[static_cast<size_t>(rows - 1)][general ? 1 : 0](a[q], w[q], acc, strips::kColumns);
    }
  }

 private:
  static constexpr auto kBiased = [] {
    std::array<int8_t, 16> table{};
    for (unsigned code = 0; code < 16; ++code) table[code] = static_cast<int8_t>(kWeightBias + e2m1::twice(code));
    return table;
  }();

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
      for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
      for (int step = b * kBlock / 4; step < (b + 1) * kBlock / 4; ++step) {
        const __m256i left = _mm256_load_si256(reinterpret_cast<const __m256i*>(w.codes[step][0]));
        const __m256i right = _mm256_load_si256(reinterpret_cast<const __m256i*>(w.codes[step][8]));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          int32_t dword;
          std::memcpy(&dword, a.at(r, 4 * step), sizeof(dword));
          const __m256i row = _mm256_set1_epi32(dword);
          sum[r][0] = _mm256_add_epi16(sum[r][0], _mm256_maddubs_epi16(left, row));
          sum[r][1] = _mm256_add_epi16(sum[r][1], _mm256_maddubs_epi16(right, row));
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const BlockFactor& f = a.block[r][b];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m256i wide = _mm256_madd_epi16(sum[r][half], _mm256_set1_epi16(1));
          const __m256i bits = _mm256_add_epi32(wide, _mm256_set1_epi32(f.start));
          __m256& out = pair[b / 2][r][half];
          out = product<kGeneral>(bits, f, _mm256_load_ps(w.factor[b] + 8 * half), b % 2 != 0, out);
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

  static constexpr Tile kTiles[kGroupRows][2] = {{tile<1, false>, tile<1, true>},
                                                 {tile<2, false>, tile<2, true>},
                                                 {tile<3, false>, tile<3, true>},
                                                 {tile<4, false>, tile<4, true>}};
};

}  // namespace
}  // namespace xpu_fp4::cpu
