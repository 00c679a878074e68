// SPDX-License-Identifier: Apache-2.0
// W4A4 and W4A8 on AMX int8 tiles. A tile of sums is 16 x 16; four of them, 32 rows by two strips, share two tiles of A and two
// of W. A tile product takes K = 64, so an aligned quad is two chained products, a pair one; unaligned blocks take products of
// K = 32, which cost as much. Sums leave through memory: tiles have no path to the vector registers. Between the tile products
// of an aligned quad, the sums of the quad before are added to the accumulators, so that both units work all the time.
#pragma once
#include "amx_tiles.h"
#include "avx512_activations.h"
#include "avx512_epilogue.h"
#include "avx512_tile.h"
#include "loop_nest.h"

namespace xpu_fp4::cpu {
namespace {

struct Amx {
  static constexpr char kSource[] = "amx_gemm.h";
  static constexpr int kTile = 16, kGroupRows = 2 * kTile, kPanelStrips = 2, kPanelQuads = 8, kDirectRows = 0, kBlockRows = 256;
  using GroupQuad = ActivationQuad<kGroupRows, 64>;
  using StripQuad = WeightQuad;
  using Session = TileSession;

  static void expand(const Activations& source, int64_t block, int blocks, GroupQuad& out, int row) {
    expand_quad<0>(source, block, blocks, out, row);
  }

  // Rows that are missing from a tile are zero.
  static void pad(GroupQuad& a, int rows) {
    const int end = (rows + kTile - 1) / kTile * kTile;
    for (int row = rows; row < end; ++row) {
      for (auto& run : a.codes) std::memset(run[row], 0, sizeof(run[row]));
      a.quad[row] = {};
      for (BlockFactor& f : a.block[row]) f = {};
    }
  }

  static Level fill(const Weight& w, int64_t strip, int64_t quad, StripQuad& out) {
    return fill_quad<0, true>(w, strip, quad, out);
  }

  static void add_quads(const GroupQuad* a, int64_t, int rows, const StripQuad* w, int panel_strips, const Level* levels,
                        int depth, float* acc) {
    if (rows > kTile) {
      panel_strips > 1 ? add_quads<2, 2>(a, w, levels, depth, acc) : add_quads<2, 1>(a, w, levels, depth, acc);
    } else {
      panel_strips > 1 ? add_quads<1, 2>(a, w, levels, depth, acc) : add_quads<1, 1>(a, w, levels, depth, acc);
    }
  }

 private:
  // Sums of a part of a quad (all of it, a half, a block) for each group of sixteen rows and each strip.
  template <int kGroups, int kStrips>
  struct alignas(64) Sums {
    int32_t tile[kGroups][kStrips][kTile][kTile];
  };

  template <int kGroups, int kStrips>
  static void add_quads(const GroupQuad* a, const StripQuad* w, const Level* levels, int depth, float* acc) {
    using Sums = Sums<kGroups, kStrips>;
    Sums sums[2][kQuad];
    const auto level = [&](int q) { return std::max(levels[q], a[q].level); };
    const auto add = [&](int q) { add_sums(a[q], w + q * kStrips, level(q), sums[q % 2], acc); };
    for (int q = 0; q < depth; ++q) {
      const bool pending = q > 0;
      if (pending && level(q) == Level::quad && level(q - 1) == Level::quad) {
        constexpr int kRows = kTile / 2;  // two products for each tile of sums
        multiply<64, 2>(a[q], w + q * kStrips, 0, sums[q % 2][0], [&](auto product) __attribute__((always_inline)) {
          constexpr int kSum = product / 2;
          add_rows<Level::quad, kRows>(a[q - 1], w + (q - 1) * kStrips, sums[(q - 1) % 2], acc, kSum / kStrips, kSum % kStrips,
                                       product % 2 * kRows);
        });
      } else {
        if (pending) add(q - 1);
        multiply_quad(a[q], w + q * kStrips, level(q), sums[q % 2]);
      }
    }
    add(depth - 1);
  }

  template <int kGroups, int kStrips>
  static void multiply_quad(const GroupQuad& a, const StripQuad* w, Level level, Sums<kGroups, kStrips> (&out)[kQuad]) {
    const auto nothing = [](auto) {};
    if (level == Level::quad) return multiply<64, 2>(a, w, 0, out[0], nothing);
    if (level == Level::pair) {
      for (int half = 0; half < 2; ++half) multiply<64, 1>(a, w, 64 * half, out[half], nothing);
      return;
    }
    configure_tiles(32);
    for (int b = 0; b < kQuad; ++b) multiply<32, 1>(a, w, kBlock * b, out[b], nothing);
    configure_tiles(64);
  }

  // The sums over kParts parts of kDepth elements each, from a position on. After each tile product `between` is called with
  // its number.
  template <int kDepth, int kParts, int kGroups, int kStrips, class Between>
  [[gnu::always_inline]] static void multiply(const GroupQuad& a, const StripQuad* w, int position, Sums<kGroups, kStrips>& out,
                                              const Between& between) {
    constexpr int kRowBytes = 64, kStepBytes = strips::kColumns * 4, kOutBytes = kTile * 4;
    std::atomic_signal_fence(std::memory_order_seq_cst);  // GCC 12 does not know that tile loads read memory
    _tile_zero(0);
    if constexpr (kStrips > 1) _tile_zero(1);
    if constexpr (kGroups > 1) _tile_zero(2);
    if constexpr (kGroups > 1 && kStrips > 1) _tile_zero(3);
    unroll<kParts>([&](auto part) __attribute__((always_inline)) {
      constexpr int kFirst = part * kGroups * kStrips;
      const int from = position + part * kDepth;
      _tile_loadd(4, a.at(0, from), kRowBytes);
      _tile_loadd(6, w[0].codes[from / 4], kStepBytes);
      _tile_dpbssd(0, 4, 6);
      between(std::integral_constant<int, kFirst>{});
      if constexpr (kStrips > 1) {
        _tile_loadd(7, w[1].codes[from / 4], kStepBytes);
        _tile_dpbssd(1, 4, 7);
        between(std::integral_constant<int, kFirst + 1>{});
      }
      if constexpr (kGroups > 1) {
        _tile_loadd(5, a.at(kTile, from), kRowBytes);
        _tile_dpbssd(2, 5, 6);
        between(std::integral_constant<int, kFirst + kStrips>{});
      }
      if constexpr (kGroups > 1 && kStrips > 1) {
        _tile_dpbssd(3, 5, 7);
        between(std::integral_constant<int, kFirst + 3>{});
      }
    });
    _tile_stored(0, out.tile[0][0], kOutBytes);
    if constexpr (kStrips > 1) _tile_stored(1, out.tile[0][1], kOutBytes);
    if constexpr (kGroups > 1) _tile_stored(2, out.tile[1][0], kOutBytes);
    if constexpr (kGroups > 1 && kStrips > 1) _tile_stored(3, out.tile[1][1], kOutBytes);
  }

  template <int kGroups, int kStrips>
  static void add_sums(const GroupQuad& a, const StripQuad* w, Level level, const Sums<kGroups, kStrips> (&sums)[kQuad],
                       float* acc) {
    switch (level) {
      case Level::quad: return add_sums<Level::quad>(a, w, sums, acc);
      case Level::pair: return add_sums<Level::pair>(a, w, sums, acc);
      case Level::block: return add_sums<Level::block>(a, w, sums, acc);
      case Level::general: return add_sums<Level::general>(a, w, sums, acc);
    }
  }

  template <Level kLevel, int kGroups, int kStrips>
  static void add_sums(const GroupQuad& a, const StripQuad* w, const Sums<kGroups, kStrips> (&sums)[kQuad], float* acc) {
    for (int group = 0; group < kGroups; ++group) {
      for (int s = 0; s < kStrips; ++s) add_rows<kLevel, kTile>(a, w, sums, acc, group, s, 0);
    }
  }

  // kRows rows of a tile, from `first` on. Missing ones are added too.
  template <Level kLevel, int kRows, int kGroups, int kStrips>
  [[gnu::always_inline]] static void add_rows(const GroupQuad& a, const StripQuad* w,
                                              const Sums<kGroups, kStrips> (&sums)[kQuad], float* acc, int group, int s,
                                              int first) {
    constexpr int kParts = kLevel == Level::quad ? 1 : kLevel == Level::pair ? 2 : 4;
    __m512 factor[kParts];
    for (int i = 0; i < kParts; ++i) factor[i] = _mm512_load_ps(w[s].factor[i * kQuad / kParts]);
    for (int i = first; i < first + kRows; ++i) {
      const int row = group * kTile + i;
      const auto scaled = [&](int part, float scale) __attribute__((always_inline)) {
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[part].tile[group][s][i])), _mm512_set1_ps(scale));
      };
      float* out = acc + (row * kPanelStrips + s) * strips::kColumns;
      _mm512_store_ps(out, add_row<kLevel>(scaled, a.quad[row], a.block[row], factor, _mm512_load_ps(out)));
    }
  }

  template <Level kLevel, class Scaled>
  static __m512 add_row(const Scaled& scaled, const QuadFactor& quad, const BlockFactor* block, const __m512* w, __m512 acc) {
    if constexpr (kLevel == Level::quad) {
      return _mm512_fmadd_ps(scaled(0, quad.scale), w[0], acc);
    } else if constexpr (kLevel == Level::pair) {
      const __m512 left = _mm512_mul_ps(scaled(0, block[0].scale), w[0]);
      return _mm512_add_ps(acc, _mm512_fmadd_ps(scaled(1, block[2].scale), w[1], left));
    } else {
      constexpr bool kGuarded = kLevel == Level::general;
      __m512 pair[2] = {};
      for (int p = 0; p < 2; ++p) {
        const int first = 2 * p, second = first + 1;
        pair[p] = add_block<kGuarded, true>(pair[p], scaled(first, block[first].scale), block[first], w[first]);
        pair[p] = add_block<kGuarded, false>(pair[p], scaled(second, block[second].scale), block[second], w[second]);
      }
      return _mm512_add_ps(acc, _mm512_add_ps(pair[0], pair[1]));
    }
  }
};

}  // namespace
}  // namespace xpu_fp4::cpu
