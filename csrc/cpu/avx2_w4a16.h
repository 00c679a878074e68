// SPDX-License-Identifier: Apache-2.0
// W4A16 on AVX2: float32 products. A code's value is a bfloat16, and so the upper half of a float32: two byte permutations look
// up both of its bytes for 32 codes at a time, and joining them gives pairs of values, of which one has to be shifted up and
// the other only to be masked. So a vector holds two elements of four columns, and the sums of its two elements are added at a
// block's end. Many rows: a quad of a strip is unpacked to the first-level cache, and tiles of up to four rows go over it. Few
// rows: the same vectors are made where they are used.
//
// Order of an output's sum, the same for every shape: a block in two runs of sixteen products, each by fma; blocks by scale,
// pairwise; quads one after the other. So the error is below (16 + 4 + K / 128) 2^-24 sum |x w|.
#pragma once
#include "avx2_strips.h"
#include "generic_w4a16.h"

namespace xpu_fp4::cpu {
namespace {

// One byte of each code's value as bfloat16.
constexpr std::array<uint8_t, 16> bytes_of_values(int byte) {
  std::array<uint8_t, 16> table{};
  for (unsigned code = 0; code < 16; ++code) table[code] = static_cast<uint8_t>(bits_of(e2m1::value(code)) >> (16 + 8 * byte));
  return table;
}

struct Avx2Float {
  static constexpr char kSource[] = "avx2_w4a16.h";
  static constexpr int kGroupRows = 4, kPanelStrips = 2, kPanelQuads = 1, kDirectRows = 4, kBlockRows = 512;
  // X in the order in which two elements share a vector.
  using GroupQuad = FloatQuad<kGroupRows>;
  struct Session {};

  // Steps of two elements, kStepsOfDword for each dword of codes: two vectors for each half of the columns. factor is 2^ew.
  static constexpr int kStepsOfDword = 4, kSteps = kQuadElements / 2;
  struct alignas(64) StripQuad {
    float values[kHalves][kSteps][2][8];
    float factor[kQuad][strips::kColumns];
  };

  static void expand(const Activations& source, int64_t block, int blocks, GroupQuad& out, int row) {
    expand_floats(source, block, blocks, out, row);
    const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);
    for (int i = 0; i < kQuadElements; i += 8) {
      _mm256_storeu_ps(out.x[row] + i, _mm256_permutevar8x32_ps(_mm256_loadu_ps(out.x[row] + i), order));
    }
  }
  static void pad(GroupQuad&, int) {}

  static Level fill(const Weight& w, int64_t strip, int64_t quad, StripQuad& out) {
    alignas(64) uint8_t buffer[strips::kRecordBytes];
    const uint8_t* record = fetched_record(w, strip, quad, buffer);
    for (int half = 0; half < kHalves; ++half) {
      for (int b = 0; b < kQuad; ++b) _mm256_store_ps(out.factor[b] + kHalf * half, factor_of<true>(record, b, half));
      for (int d = 0; d < kQuadBytes / 4; ++d) {
        auto& steps = out.values[half];
        decode(record, d, half, [&](int step, __m256 first, __m256 second) __attribute__((always_inline)) {
          _mm256_store_ps(steps[step][0], first);
          _mm256_store_ps(steps[step][1], second);
        });
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
  static constexpr auto kLow = bytes_of_values(0), kHigh = bytes_of_values(1);

  // The sums of R rows over the two vectors of a step.
  template <int R>
  using Sums = __m256[R][2];

  static __m256i table(const std::array<uint8_t, 16>& bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes.data())));
  }

  // Calls function(step, first, second) for the steps of dword d of a half's columns: of the low nibbles, then of the high
  // ones. Columns c, c + 1, c + 4, c + 5 of the half have two lanes each, in this order, for c = 0 in the first vector and c =
  // 2 in the second.
  template <class Function>
  [[gnu::always_inline]] static void decode(const uint8_t* record, int d, int half, const Function& function) {
    const __m256i codes = codes_of(record, d, half), nibble = _mm256_set1_epi8(15);
    decode_nibbles(_mm256_and_si256(codes, nibble), kStepsOfDword * d, function);
    decode_nibbles(_mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble), kStepsOfDword * d + 2, function);
  }
  template <class Function>
  [[gnu::always_inline]] static void decode_nibbles(__m256i nibbles, int step, const Function& function) {
    const __m256i low = _mm256_shuffle_epi8(table(kLow), nibbles), high = _mm256_shuffle_epi8(table(kHigh), nibbles);
    const __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
    function(step, _mm256_castsi256_ps(_mm256_slli_epi32(first, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(second, 16)));
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
    function(step + 1, _mm256_castsi256_ps(_mm256_and_si256(first, upper)),
             _mm256_castsi256_ps(_mm256_and_si256(second, upper)));
  }

  // Adds a step's products.
  template <int R>
  [[gnu::always_inline]] static void add_step(const GroupQuad& a, int step, __m256 first, __m256 second, Sums<R>& sum) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      double two;
      std::memcpy(&two, &a.x[r][2 * step], sizeof(two));
      const __m256 x = _mm256_castpd_ps(_mm256_set1_pd(two));
      sum[r][0] = _mm256_fmadd_ps(x, first, sum[r][0]);
      sum[r][1] = _mm256_fmadd_ps(x, second, sum[r][1]);
    }
  }

  // Adds a block's sums, two of each column, to a pair of blocks.
  static __m256 add_block(int b, const __m256 (&sum)[2], __m256 factor, __m256 pair) {
    const __m256 of_columns = _mm256_add_ps(_mm256_shuffle_ps(sum[0], sum[1], 0x88), _mm256_shuffle_ps(sum[0], sum[1], 0xDD));
    return b % 2 == 0 ? _mm256_mul_ps(of_columns, factor) : _mm256_fmadd_ps(of_columns, factor, pair);
  }

  static void add_pairs(float* acc, __m256 left, __m256 right) {
    _mm256_storeu_ps(acc, _mm256_add_ps(_mm256_loadu_ps(acc), _mm256_add_ps(left, right)));
  }

  template <int R>
  static void add_tile(const GroupQuad& a, const StripQuad& w, float* acc) {
    for (int half = 0; half < kHalves; ++half) {
      __m256 pair[2][R];
#pragma GCC unroll 4
      for (int b = 0; b < kQuad; ++b) {
        Sums<R> sum = {};
#pragma GCC unroll 2
        for (int step = b * kBlock / 2; step < (b + 1) * kBlock / 2; ++step) {
          const auto& values = w.values[half][step];
          add_step<R>(a, step, _mm256_load_ps(values[0]), _mm256_load_ps(values[1]), sum);
        }
        const __m256 factor = _mm256_load_ps(w.factor[b] + kHalf * half);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) pair[b / 2][r] = add_block(b, sum[r], factor, pair[b / 2][r]);
      }
      for (int r = 0; r < R; ++r) {
        add_pairs(acc + r * kPanelStrips * strips::kColumns + kHalf * half, pair[0][r], pair[1][r]);
      }
    }
  }

  template <int R>
  static void add_strip(const GroupQuad* a, const Weight& w, int64_t strip, float* acc) {
    alignas(64) uint8_t buffer[strips::kRecordBytes];
    for (int64_t quad = 0; quad < strips::quads(w.k); ++quad) {
      const uint8_t* record = fetched_record(w, strip, quad, buffer);
      for (int half = 0; half < kHalves; ++half) add_half<R>(a[quad], record, half, acc + kHalf * half);
    }
  }

  template <int R>
  [[gnu::always_inline]] static void add_half(const GroupQuad& a, const uint8_t* record, int half, float* acc) {
    __m256 pair[2][R];
#pragma GCC unroll 4
    for (int b = 0; b < kQuad; ++b) {
      Sums<R> sum = {};
#pragma GCC unroll 4
      for (int d = 4 * b; d < 4 * b + 4; ++d) {
        decode(record, d, half, [&](int step, __m256 first, __m256 second) __attribute__((always_inline)) {
          add_step<R>(a, step, first, second, sum);
        });
      }
      const __m256 factor = factor_of<true>(record, b, half);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) pair[b / 2][r] = add_block(b, sum[r], factor, pair[b / 2][r]);
    }
    for (int r = 0; r < R; ++r) add_pairs(acc + r * kPanelStrips * strips::kColumns, pair[0][r], pair[1][r]);
  }
};

}  // namespace
}  // namespace xpu_fp4::cpu
