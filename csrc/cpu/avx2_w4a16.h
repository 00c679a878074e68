// SPDX-License-Identifier: Apache-2.0
// W4A16 on AVX2: float32 products. Lanes are eight columns, half of a strip; a nibble becomes its value by a permutation of the
// eight magnitudes and a sign. Many rows: a quad of a strip is unpacked to the first-level cache, and tiles of up to four rows
// go over it. Few rows: nibbles are looked up where they are used.
//
// Order of an output's sum, the same for every shape: a block in two runs of sixteen products, each by fma; blocks by scale,
// pairwise; quads one after the other. So the error is below (16 + 4 + K / 128) 2^-24 sum |x w|.
#pragma once
#include "generic_w4a16.h"

namespace xpu_fp4::cpu {
namespace {

struct Avx2Float {
  static constexpr char kSource[] = "avx2_w4a16.h";
  static constexpr int kGroupRows = 4, kPanelStrips = 2, kPanelQuads = 1, kDirectRows = 4, kBlockRows = 512, kRunLength = 16;
  static constexpr int kHalves = 2, kHalf = strips::kColumns / kHalves;
  using GroupQuad = FloatQuad<kGroupRows>;
  struct Session {};

  // codes[k][column]; factor is 2^ew.
  struct alignas(64) StripQuad {
    float codes[kQuadElements][strips::kColumns];
    float factor[kQuad][strips::kColumns];
  };

  static void expand(const Activations& source, int64_t block, int blocks, GroupQuad& out, int row) {
    expand_floats(source, block, blocks, out, row);
  }
  static void pad(GroupQuad&, int) {}

  static Level fill(const Weight& w, int64_t strip, int64_t quad, StripQuad& out) {
    alignas(64) uint8_t buffer[strips::kRecordBytes];
    const uint8_t* record = record_of(w, strip, quad, buffer);
    set_factors(record, out.factor);
    for (int d = 0; d < kQuadBytes / 4; ++d) {
      for (int half = 0; half < kHalves; ++half) {
        const __m256i codes = codes_of(record, d, half);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) _mm256_store_ps(out.codes[8 * d + i] + kHalf * half, value(codes, i));
      }
    }
    return Level::quad;
  }

  static void add_quads(const GroupQuad* a, int64_t, int rows, const StripQuad* w, int panel_strips, const Level*, int depth,
                        float* acc) {
    static constexpr Tile kTiles[kGroupRows] = {add_tile<1>, add_tile<2>, add_tile<3>, add_tile<4>};
    for (int q = 0; q < depth; ++q) {
      for (int s = 0; s < panel_strips; ++s) kTiles[rows - 1](a[q], w[q * panel_strips + s], acc + s * strips::kColumns);
    }
  }

  // All quads of one strip for up to kDirectRows rows; acc has a row of kPanelStrips strips for each.
  static void add_strip(const GroupQuad* a, int rows, const Weight& w, int64_t strip, float* acc) {
    static constexpr Direct kDirect[kDirectRows] = {add_strip<1>, add_strip<2>, add_strip<3>, add_strip<4>};
    kDirect[rows - 1](a, w, strip, acc);
  }

 private:
  using Tile = void (*)(const GroupQuad&, const StripQuad&, float*);
  using Direct = void (*)(const GroupQuad*, const Weight&, int64_t, float*);

  // Loads dword d of the quad's codes, eight elements, of each of a half's columns.
  static __m256i codes_of(const uint8_t* record, int d, int half) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(record + 64 * d + 32 * half));
  }

  // Nibble i of each dword as its value; a permutation looks at the low three bits of its index.
  [[gnu::always_inline]] static __m256 value(__m256i codes, int i) {
    const __m256 magnitudes = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(codes, 28 - 4 * i), _mm256_set1_epi32(INT32_MIN));
    const __m256 magnitude = _mm256_permutevar8x32_ps(magnitudes, _mm256_srli_epi32(codes, 4 * i));
    return _mm256_xor_ps(magnitude, _mm256_castsi256_ps(sign));
  }

  static void set_factors(const uint8_t* record, float (*factor)[strips::kColumns]) {
    for (int c = 0; c < strips::kColumns; ++c) {
      for (int b = 0; b < kQuad; ++b) factor[b][c] = e8m0::value(record[strips::scale_offset(c, b)]);
    }
  }

  // Adds a block's two runs to a pair of blocks.
  static __m256 add_block(int b, __m256 first_run, __m256 second_run, __m256 factor, __m256 pair) {
    const __m256 sum = _mm256_add_ps(first_run, second_run);
    return b % 2 == 0 ? _mm256_mul_ps(sum, factor) : _mm256_fmadd_ps(sum, factor, pair);
  }

  static void add_pairs(float* acc, __m256 left, __m256 right) {
    _mm256_storeu_ps(acc, _mm256_add_ps(_mm256_loadu_ps(acc), _mm256_add_ps(left, right)));
  }

  template <int R>
  [[gnu::always_inline]] static void add_run(const GroupQuad& a, const StripQuad& w, int first, __m256 (&out)[R][kHalves]) {
    __m256 sum[R][kHalves] = {};
#pragma GCC unroll 2
    for (int k = first; k < first + kRunLength; ++k) {
      const __m256 left = _mm256_load_ps(w.codes[k]), right = _mm256_load_ps(w.codes[k] + kHalf);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m256 x = _mm256_broadcast_ss(&a.x[r][k]);
        sum[r][0] = _mm256_fmadd_ps(x, left, sum[r][0]);
        sum[r][1] = _mm256_fmadd_ps(x, right, sum[r][1]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      out[r][0] = sum[r][0];
      out[r][1] = sum[r][1];
    }
  }

  template <int R>
  static void add_tile(const GroupQuad& a, const StripQuad& w, float* acc) {
    __m256 pair[2][R][kHalves];
    for (int b = 0; b < kQuad; ++b) {
      __m256 first[R][kHalves], second[R][kHalves];
      add_run<R>(a, w, b * kBlock, first);
      add_run<R>(a, w, b * kBlock + kRunLength, second);
      for (int r = 0; r < R; ++r) {
        for (int half = 0; half < kHalves; ++half) {
          const __m256 factor = _mm256_load_ps(w.factor[b] + kHalf * half);
          pair[b / 2][r][half] = add_block(b, first[r][half], second[r][half], factor, pair[b / 2][r][half]);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int half = 0; half < kHalves; ++half) {
        add_pairs(acc + r * kPanelStrips * strips::kColumns + kHalf * half, pair[0][r][half], pair[1][r][half]);
      }
    }
  }

  template <int R>
  static void add_strip(const GroupQuad* a, const Weight& w, int64_t strip, float* acc) {
    alignas(64) uint8_t buffer[strips::kRecordBytes];
    alignas(64) float factor[kQuad][strips::kColumns];
    for (int64_t quad = 0; quad < strips::quads(w.k); ++quad) {
      const uint8_t* record = record_of(w, strip, quad, buffer);
      set_factors(record, factor);
      for (int half = 0; half < kHalves; ++half) add_half<R>(a[quad], record, half, factor, acc + kHalf * half);
    }
  }

  template <int R>
  [[gnu::always_inline]] static void add_half(const GroupQuad& a, const uint8_t* record, int half,
                                              const float (*factor)[strips::kColumns], float* acc) {
    __m256 pair[2][R];
    for (int b = 0; b < kQuad; ++b) {
      __m256 run[2][R] = {};
#pragma GCC unroll 4
      for (int d = 0; d < 4; ++d) {
        const __m256i codes = codes_of(record, 4 * b + d, half);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const __m256 w = value(codes, i);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            run[d / 2][r] = _mm256_fmadd_ps(_mm256_broadcast_ss(&a.x[r][b * kBlock + 8 * d + i]), w, run[d / 2][r]);
          }
        }
      }
      const __m256 scale = _mm256_load_ps(factor[b] + kHalf * half);
      for (int r = 0; r < R; ++r) pair[b / 2][r] = add_block(b, run[0][r], run[1][r], scale, pair[b / 2][r]);
    }
    for (int r = 0; r < R; ++r) add_pairs(acc + r * kPanelStrips * strips::kColumns, pair[0][r], pair[1][r]);
  }
};

}  // namespace
}  // namespace xpu_fp4::cpu
