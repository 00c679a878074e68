// SPDX-License-Identifier: Apache-2.0
// W4A4 and W4A8 on AVX-512 VNNI. A tile is up to eight rows by three strips of sixteen columns: 24 integer accumulators in
// registers, so that each step of four K costs 24 vpdpbusd for 3 loads of W and 8 broadcasts of A. The float accumulators stay
// in the first-level cache: they are read and written once a quad, beside 32 steps.
//
// vpdpbusd multiplies unsigned by signed bytes: W's integers are stored 96 too large, and the sums start 96 * sum(a) too low.
#pragma once
#include "avx512_activations.h"
#include "avx512_epilogue.h"
#include "avx512_tile.h"
#include "loop_nest.h"

namespace xpu_fp4::cpu {
namespace {

constexpr int kWeightBias = 12 << kMaxShift;
constexpr int kLanes = strips::kColumns;

constexpr int kBlockSteps = kBlock / 4;

// Sums of the blocks [first, last) of the quad; meanwhile the quad of the next rows is fetched, a line a step. A vpdpbusd takes
// five cycles and two can start in each, so where a tile has few sums each is split into several, by steps.
template <int R, int C>
[[gnu::always_inline]] inline void sum_blocks(const ActivationQuad<8>& a, const char* next, const WeightQuad* w, int first,
                                              int last, __m512i (&out)[R][C]) {
  constexpr int kSplit = R * C <= 3 ? 4 : R * C <= 6 ? 2 : 1;
  __m512i sum[R * C * kSplit];
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    int32_t start = last - first == kQuad ? a.quad[r].start : a.block[r][first].start;
    if (last - first == 2) start += a.block[r][first + 1].start - kMagicBits;
    unroll<C * kSplit>([&](auto i) __attribute__((always_inline)) {
      sum[r * C * kSplit + i] = i < C ? _mm512_set1_epi32(start) : _mm512_setzero_si512();
    });
  });
#pragma GCC unroll 4
  for (int step = first * kBlockSteps; step < last * kBlockSteps; step += kSplit) {
    unroll<kSplit>([&](auto part) __attribute__((always_inline)) {
      _mm_prefetch(next + 64 * (step + part), _MM_HINT_T0);
      __m512i columns[C];
      unroll<C>([&](auto c) __attribute__((always_inline)) { columns[c] = _mm512_load_si512(w[c].codes[step + part]); });
      unroll<R>([&](auto r) __attribute__((always_inline)) {
        int32_t dword;
        std::memcpy(&dword, a.at(r, 4 * (step + part)), sizeof(dword));
        const __m512i row = _mm512_set1_epi32(dword);
        unroll<C>([&](auto c) __attribute__((always_inline)) {
          __m512i& of_tile = sum[r * C * kSplit + part * C + c];
          of_tile = _mm512_dpbusd_epi32(of_tile, columns[c], row);
          asm("" : "+v"(of_tile));  // no instruction, but without it GCC 12 stores every sum in every step
        });
      });
    });
  }
  for_tile<R, C>([&](int r, int c) __attribute__((always_inline)) {
    out[r][c] = sum[r * C * kSplit + c];
    for (int part = 1; part < kSplit; ++part) out[r][c] = _mm512_add_epi32(out[r][c], sum[r * C * kSplit + part * C + c]);
  });
}

__m512 scaled_by_row(__m512i sum, const BlockFactor& f) {
  const __m512 scale = _mm512_set1_ps(f.scale);
  return unmagic(sum, scale, _mm512_mul_ps(scale, _mm512_set1_ps(-kMagic)));
}

// acc += one quad, its four blocks scaled one by one.
template <int R, int C, bool kGuarded>
[[gnu::noinline]] void add_blocks(const ActivationQuad<8>& a, const char* next, const WeightQuad* w, float* acc,
                                  int64_t acc_stride) {
  __m512 pair[2][R][C];
  unroll<kQuad>([&](auto b) __attribute__((always_inline)) {
    __m512i sum[R][C];
    sum_blocks<R, C>(a, next, w, b, b + 1, sum);
    for_tile<R, C>([&](int r, int c) __attribute__((always_inline)) {
      const BlockFactor& f = a.block[r][b];
      __m512& out = pair[b / 2][r][c];
      out = add_block<kGuarded, b % 2 == 0>(out, scaled_by_row(sum[r][c], f), f, _mm512_load_ps(w[c].factor[b]));
    });
  });
  for_tile<R, C>([&](int r, int c) __attribute__((always_inline)) {
    float* at = acc + r * acc_stride + c * kLanes;
    _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), _mm512_add_ps(pair[0][r][c], pair[1][r][c])));
  });
}

// acc[row][strip] of one tile += one quad.
template <int R, int C>
void add_quad_tile(const ActivationQuad<8>& a, const ActivationQuad<8>* next_rows, const WeightQuad* w, Level level, float* acc,
                   int64_t acc_stride) {
  const auto at = [&](int r, int c) { return acc + r * acc_stride + c * kLanes; };
  const char* next = reinterpret_cast<const char*>(next_rows);
  if (level == Level::block) return add_blocks<R, C, false>(a, next, w, acc, acc_stride);
  if (level == Level::general) return add_blocks<R, C, true>(a, next, w, acc, acc_stride);
  __m512i sum[R][C];
  if (level == Level::quad) {
    sum_blocks<R, C>(a, next, w, 0, kQuad, sum);
    for_tile<R, C>([&](int r, int c) __attribute__((always_inline)) {
      const __m512 u = unmagic(sum[r][c], _mm512_set1_ps(a.quad[r].scale), _mm512_set1_ps(a.quad[r].offset));
      _mm512_store_ps(at(r, c), _mm512_fmadd_ps(u, _mm512_load_ps(w[c].factor[0]), _mm512_load_ps(at(r, c))));
    });
    return;
  }
  __m512 left[R][C];
  sum_blocks<R, C>(a, next, w, 0, 2, sum);
  for_tile<R, C>([&](int r, int c) __attribute__((always_inline)) {
    left[r][c] = _mm512_mul_ps(scaled_by_row(sum[r][c], a.block[r][0]), _mm512_load_ps(w[c].factor[0]));
  });
  sum_blocks<R, C>(a, next, w, 2, 4, sum);
  for_tile<R, C>([&](int r, int c) __attribute__((always_inline)) {
    const __m512 u = scaled_by_row(sum[r][c], a.block[r][2]);
    const __m512 both = _mm512_fmadd_ps(u, _mm512_load_ps(w[c].factor[2]), left[r][c]);
    _mm512_store_ps(at(r, c), _mm512_add_ps(_mm512_load_ps(at(r, c)), both));
  });
}

// acc += one quad of one strip, W decoded in registers: aligned quads of few rows. Each row has several sums, see sum_blocks.
template <int R, bool kVbmi, class Strip>
void add_strip_quad(const ActivationQuad<8>& a, const Strip& packed, const StripAlignment& alignment, float* acc,
                    int64_t acc_stride) {
  constexpr int kSplit = R == 1 ? 8 : R == 2 ? 4 : 2;
  __m512i sum[R * kSplit];
  unroll<R * kSplit>([&](auto i) __attribute__((always_inline)) {
    sum[i] = i % kSplit == 0 ? _mm512_set1_epi32(a.quad[i / kSplit].start) : _mm512_setzero_si512();
  });
  unroll<kQuad>([&](auto b) __attribute__((always_inline)) {
    const Decoder<kWeightBias, kVbmi> decode(shifts_of(alignment, b));
    unroll<8>([&](auto i) __attribute__((always_inline)) {
      const __m512i codes = packed.codes(4 * b + i / 2);
      const __m512i columns = decode(i % 2 == 0 ? codes : _mm512_srli_epi16(codes, 4));
      unroll<R>([&](auto r) __attribute__((always_inline)) {
        int32_t dword;
        std::memcpy(&dword, a.at(r, 4 * (8 * b + i)), sizeof(dword));
        __m512i& of_row = sum[r * kSplit + i % kSplit];
        of_row = _mm512_dpbusd_epi32(of_row, columns, _mm512_set1_epi32(dword));
      });
    });
  });
  const __m512 factor = column_factor<kFactorExponent>(alignment, 0);
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    for (int part = 1; part < kSplit; ++part) sum[r * kSplit] = _mm512_add_epi32(sum[r * kSplit], sum[r * kSplit + part]);
    const __m512 u = unmagic(sum[r * kSplit], _mm512_set1_ps(a.quad[r].scale), _mm512_set1_ps(a.quad[r].offset));
    float* at = acc + r * acc_stride;
    _mm512_store_ps(at, _mm512_fmadd_ps(u, factor, _mm512_load_ps(at)));
  });
}

template <bool kVbmi>
struct Vnni {
  static constexpr char kSource[] = "avx512_gemm.h";
  static constexpr int kGroupRows = 8, kPanelStrips = 3, kPanelQuads = 4, kDirectRows = 4, kBlockRows = 512;
  using GroupQuad = ActivationQuad<kGroupRows>;
  using StripQuad = WeightQuad;
  struct Session {};

  static void expand(const Activations& source, int64_t block, int blocks, GroupQuad& out, int row) {
    expand_quad<kWeightBias>(source, block, blocks, out, row);
  }
  static void pad(GroupQuad&, int) {}

  static Level fill(const Weight& w, int64_t strip, int64_t quad, WeightQuad& out) {
    return fill_quad<kWeightBias, kVbmi>(w, strip, quad, out);
  }

  // Rows and strips are few, so each size has its own code.
  static void add_quads(const GroupQuad* a, int64_t quads, int rows, const WeightQuad* w, int panel_strips, const Level* levels,
                        int depth, float* acc) {
    static constexpr Tile kTiles[kGroupRows][kPanelStrips] = {
        {add_quad_tile<1, 1>, add_quad_tile<1, 2>, add_quad_tile<1, 3>},
        {add_quad_tile<2, 1>, add_quad_tile<2, 2>, add_quad_tile<2, 3>},
        {add_quad_tile<3, 1>, add_quad_tile<3, 2>, add_quad_tile<3, 3>},
        {add_quad_tile<4, 1>, add_quad_tile<4, 2>, add_quad_tile<4, 3>},
        {add_quad_tile<5, 1>, add_quad_tile<5, 2>, add_quad_tile<5, 3>},
        {add_quad_tile<6, 1>, add_quad_tile<6, 2>, add_quad_tile<6, 3>},
        {add_quad_tile<7, 1>, add_quad_tile<7, 2>, add_quad_tile<7, 3>},
        {add_quad_tile<8, 1>, add_quad_tile<8, 2>, add_quad_tile<8, 3>},
    };
    const Tile tile = kTiles[rows - 1][panel_strips - 1];
    for (int q = 0; q < depth; ++q) {
      tile(a[q], a + quads + q, w + q * panel_strips, std::max(levels[q], a[q].level), acc, kPanelStrips * strips::kColumns);
    }
  }

  // All quads of one strip for up to kDirectRows rows; acc has a row of kPanelStrips strips for each.
  static void add_strip(const GroupQuad* a, int rows, const Weight& w, int64_t strip, float* acc) {
    static constexpr Direct kDirect[kDirectRows] = {add_strip<1>, add_strip<2>, add_strip<3>, add_strip<4>};
    kDirect[rows - 1](a, w, strip, acc);
  }

 private:
  using Tile = void (*)(const GroupQuad&, const GroupQuad*, const WeightQuad*, Level, float*, int64_t);
  using Direct = void (*)(const GroupQuad*, const Weight&, int64_t, float*);

  template <int R>
  static void add_strip(const GroupQuad* a, const Weight& w, int64_t strip, float* acc) {
    constexpr int64_t kStride = kPanelStrips * strips::kColumns;
    for (int64_t quad = 0; quad < strips::quads(w.k); ++quad) {
      with_strip(w, strip, quad, [&](const auto& packed) {
        const StripAlignment alignment = align_strip(packed);
        const Level level = std::max(alignment.level, a[quad].level);
        if (level == Level::quad) return add_strip_quad<R, kVbmi>(a[quad], packed, alignment, acc, kStride);
        WeightQuad unpacked;
        fill_quad<kWeightBias, kVbmi>(packed, alignment, unpacked);
        add_quad_tile<R, 1>(a[quad], a, &unpacked, level, acc, kStride);
      });
    }
  }
};

}  // namespace
}  // namespace xpu_fp4::cpu
