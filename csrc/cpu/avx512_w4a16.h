// SPDX-License-Identifier: Apache-2.0
// W4A16 on AVX-512: float32 products. Lanes are the sixteen columns of a strip, and a nibble becomes its value by a permutation
// of a table of sixteen floats. Many rows: a quad of three strips is unpacked to the first-level cache, and tiles of up to
// eight rows go over it. Few rows: nibbles are looked up where they are used.
//
// Order of an output's sum, the same for every shape: a block in two runs of sixteen products, each by fma; blocks by scale,
// pairwise; quads one after the other. So the error is below (16 + 4 + K / 128) 2^-24 sum |x w|.
#pragma once
#include "avx512_tile.h"
#include "generic_w4a16.h"

namespace xpu_fp4::cpu {
namespace {

alignas(64) constexpr auto kFloatValues = [] {
  std::array<float, 16> table{};
  for (unsigned code = 0; code < 16; ++code) table[code] = e2m1::value(code);
  return table;
}();

struct Avx512Float {
  static constexpr char kSource[] = "avx512_w4a16.h";
  static constexpr int kGroupRows = 8, kPanelStrips = 3, kPanelQuads = 1, kDirectRows = 4, kBlockRows = 512, kRunLength = 16;
  using GroupQuad = FloatQuad<kGroupRows>;
  struct Session {};

  // codes[k][column]; factor is 2^ew.
  struct alignas(64) StripQuad {
    float codes[kQuadElements][strips::kColumns];
    float factor[kQuad][strips::kColumns];
  };

  static void expand(const Activations& source, int64_t block, int blocks, GroupQuad& out, int row) {
    with_dtype(source.dtype, [&](auto dtype) {
      for (int i = 0; i < kQuadElements; i += 16) {
        const __mmask16 present = i < blocks * kBlock ? 0xFFFF : 0;
        _mm512_store_ps(out.x[row] + i, load_floats<dtype>(source.data, block * kBlock + i, present));
      }
    });
  }
  static void pad(GroupQuad&, int) {}

  static Level fill(const Weight& w, int64_t strip, int64_t quad, StripQuad& out) {
    with_strip(w, strip, quad, [&](const auto& packed) {
      const StripAlignment scales = as_they_are(packed.scales());
      for (int b = 0; b < kQuad; ++b) _mm512_store_ps(out.factor[b], column_factor(scales, b));
      for (int d = 0; d < kQuadBytes / 4; ++d) {
        const __m512i codes = packed.codes(d);
        unroll<8>([&](auto i) __attribute__((always_inline)) { _mm512_store_ps(out.codes[8 * d + i], value<i>(codes)); });
      }
    });
    return Level::quad;
  }

  static void add_quads(const GroupQuad* a, int64_t, int rows, const StripQuad* w, int panel_strips, const Level*, int depth,
                        float* acc) {
    static constexpr Tile kTiles[kGroupRows][kPanelStrips] = {
        {add_tile<1, 1>, add_tile<1, 2>, add_tile<1, 3>}, {add_tile<2, 1>, add_tile<2, 2>, add_tile<2, 3>},
        {add_tile<3, 1>, add_tile<3, 2>, add_tile<3, 3>}, {add_tile<4, 1>, add_tile<4, 2>, add_tile<4, 3>},
        {add_tile<5, 1>, add_tile<5, 2>, add_tile<5, 3>}, {add_tile<6, 1>, add_tile<6, 2>, add_tile<6, 3>},
        {add_tile<7, 1>, add_tile<7, 2>, add_tile<7, 3>}, {add_tile<8, 1>, add_tile<8, 2>, add_tile<8, 3>},
    };
    const Tile tile = kTiles[rows - 1][panel_strips - 1];
    for (int q = 0; q < depth; ++q) tile(a[q], w + q * panel_strips, acc);
  }

  // Nibble i of each dword as its value; a permutation looks at the low four bits of its index.
  template <int i>
  static __m512 value(__m512i codes) {
    const __m512i index = i == 0 ? codes : _mm512_srli_epi32(codes, 4 * i);
    return _mm512_permutexvar_ps(index, _mm512_load_ps(kFloatValues.data()));
  }

  // All quads of one strip for up to kDirectRows rows; acc has a row of kPanelStrips strips for each.
  static void add_strip(const GroupQuad* a, int rows, const Weight& w, int64_t strip, float* acc) {
    static constexpr Direct kDirect[kDirectRows] = {add_strip<1>, add_strip<2>, add_strip<3>, add_strip<4>};
    kDirect[rows - 1](a, w, strip, acc);
  }

 private:
  using Tile = void (*)(const GroupQuad&, const StripQuad*, float*);
  using Direct = void (*)(const GroupQuad*, const Weight&, int64_t, float*);

  // Adds a block's two runs to a pair of blocks.
  static __m512 add_block(int b, __m512 first_run, __m512 second_run, __m512 factor, __m512 pair) {
    const __m512 sum = _mm512_add_ps(first_run, second_run);
    return b % 2 == 0 ? _mm512_mul_ps(sum, factor) : _mm512_fmadd_ps(sum, factor, pair);
  }

  static void add_pairs(float* acc, __m512 left, __m512 right) {
    _mm512_store_ps(acc, _mm512_add_ps(_mm512_load_ps(acc), _mm512_add_ps(left, right)));
  }

  template <int R, int C>
  [[gnu::always_inline]] static void add_run(const GroupQuad& a, const StripQuad* w, int first, __m512 (&out)[R * C]) {
    __m512 sum[R * C];
    unroll<R * C>([&](auto i) __attribute__((always_inline)) { sum[i] = _mm512_setzero_ps(); });
#pragma GCC unroll 2
    for (int k = first; k < first + kRunLength; ++k) {
      __m512 columns[C];
      unroll<C>([&](auto c) __attribute__((always_inline)) { columns[c] = _mm512_load_ps(w[c].codes[k]); });
      unroll<R>([&](auto r) __attribute__((always_inline)) {
        const __m512 x = _mm512_set1_ps(a.x[r][k]);
        unroll<C>([&](auto c) __attribute__((always_inline)) {
          sum[r * C + c] = _mm512_fmadd_ps(x, columns[c], sum[r * C + c]);
          asm("" : "+v"(sum[r * C + c]));  // see sum_blocks
        });
      });
    }
    unroll<R * C>([&](auto i) __attribute__((always_inline)) { out[i] = sum[i]; });
  }

  template <int R, int C>
  static void add_tile(const GroupQuad& a, const StripQuad* w, float* acc) {
    __m512 pair[2][R * C];
    for (int b = 0; b < kQuad; ++b) {
      __m512 first[R * C], second[R * C];
      add_run<R, C>(a, w, b * kBlock, first);
      add_run<R, C>(a, w, b * kBlock + kRunLength, second);
      for (int i = 0; i < R * C; ++i) {
        pair[b / 2][i] = add_block(b, first[i], second[i], _mm512_load_ps(w[i % C].factor[b]), pair[b / 2][i]);
      }
    }
    for (int i = 0; i < R * C; ++i) {
      add_pairs(acc + (i / C * kPanelStrips + i % C) * strips::kColumns, pair[0][i], pair[1][i]);
    }
  }

  template <int R>
  static void add_strip(const GroupQuad* a, const Weight& w, int64_t strip, float* acc) {
    for (int64_t quad = 0; quad < strips::quads(w.k); ++quad) {
      with_strip(w, strip, quad, [&](const auto& packed) { add_strip_quad<R>(a[quad], packed, acc); });
    }
  }

  template <int R, class Strip>
  static void add_strip_quad(const GroupQuad& a, const Strip& packed, float* acc) {
    const StripAlignment scales = as_they_are(packed.scales());
    __m512 pair[2][R];
    unroll<kQuad>([&](auto b) __attribute__((always_inline)) {
      __m512 run[2][R] = {};
      unroll<4>([&](auto d) __attribute__((always_inline)) {
        unroll<8>([&](auto i) __attribute__((always_inline)) {
          const __m512 w = value<i % 2>(packed.from_byte(4 * b + d, i / 2));
          unroll<R>([&](auto r) __attribute__((always_inline)) {
            run[d / 2][r] = _mm512_fmadd_ps(_mm512_set1_ps(a.x[r][b * kBlock + 8 * d + i]), w, run[d / 2][r]);
          });
        });
      });
      const __m512 factor = column_factor(scales, b);
      unroll<R>([&](auto r) __attribute__((always_inline)) {
        pair[b / 2][r] = add_block(b, run[0][r], run[1][r], factor, pair[b / 2][r]);
      });
    });
    for (int r = 0; r < R; ++r) add_pairs(acc + r * kPanelStrips * strips::kColumns, pair[0][r], pair[1][r]);
  }
};

}  // namespace
}  // namespace xpu_fp4::cpu
