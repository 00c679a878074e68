// SPDX-License-Identifier: Apache-2.0
// W4A4 and W4A8 on AMX int8 tiles. A tile product takes K = 64, so a quad is two. A quad of two strips of W stays in four tiles
// while the rows of a call pass by, sixteen at a time: half as many tile loads as products. Sums leave through memory: tiles
// have no path to the vector registers. The sums of the sixteen rows before are added to the accumulators between the tile
// products, so that both units work all the time. Unaligned blocks take products of K = 32, which cost as much.
#pragma once
#include "amx_tiles.h"
#include "avx512_activations.h"
#include "avx512_epilogue.h"
#include "avx512_tile.h"
#include "loop_nest.h"

namespace xpu_fp4::cpu {
namespace {

// The factors of every base, of an exponent of integer_form().
template <int kExponent>
constexpr auto kFactorsOfBases = [] {
  std::array<BlockFactor, 256> factors{};
  for (unsigned base = 0; base < 256; ++base) factors[base] = block_factor(static_cast<uint8_t>(base), 0, {0, kExponent});
  return factors;
}();

// A quad of 32 rows of A: codes[i] has 64 bytes of each, as tiles read them. Factors of blocks are looked up where they are
// needed, so that less is written and read.
struct alignas(64) TiledQuad {
  static constexpr int kRows = 32;

  int8_t codes[2][kRows][64];
  float scale[kRows];          // where the quad is summed as one
  uint8_t base[kRows][kQuad];  // else, of each block
  const BlockFactor* factors;  // of each base
  Level level;

  int8_t* at(int row, int position) { return codes[position / 64][row] + position % 64; }
  const BlockFactor& factor(int row, int b) const { return factors[base[row][b]]; }
};

// A row's level and factors, for expand_quad().
void set_row_factors(const Alignment& alignment, __m512i, const IntegerForm& form, TiledQuad& out, int row) {
  constexpr int kMxfp4 = integer_form(Format::mxfp4, 0, kFactorExponent).exponent;
  constexpr int kMxint8 = integer_form(Format::mxint8, 0, kFactorExponent).exponent;
  out.factors = (form.exponent == kMxint8 ? kFactorsOfBases<kMxint8> : kFactorsOfBases<kMxfp4>).data();
  std::memcpy(out.base[row], alignment.base, sizeof(alignment.base));
  out.scale[row] = out.factor(row, 0).scale;
  out.level = row == 0 ? alignment.level : std::max(out.level, alignment.level);
}

struct Amx {
  static constexpr char kSource[] = "amx_gemm.h";
  static constexpr int kTile = 16, kGroupRows = TiledQuad::kRows, kPanelStrips = 2, kPanelQuads = 8, kDirectRows = 0,
                       kBlockRows = 256;

  using GroupQuad = TiledQuad;
  using StripQuad = WeightQuad;
  using Session = TileSession;

  static void expand(const Activations& source, int64_t block, int blocks, GroupQuad& out, int row) {
    // The next quad's lines are fetched meanwhile: another core read them last, in the call before.
    for (auto& run : (&out)[1].codes) __builtin_prefetch(run[row], 1);
    expand_quad<0>(source, block, blocks, out, row);
  }

  // Rows that are missing from a tile are zero.
  static void pad(GroupQuad& a, int rows) {
    const int end = (rows + kTile - 1) / kTile * kTile;
    for (int row = rows; row < end; ++row) {
      for (auto& run : a.codes) std::memset(run[row], 0, sizeof(run[row]));
      a.scale[row] = 0.0f;
      std::fill_n(a.base[row], kQuad, uint8_t{e8m0::kBias});
    }
  }

  static Level fill(const Weight& w, int64_t strip, int64_t quad, StripQuad& out) {
    return fill_quad<0, true>(w, strip, quad, out);
  }

  static void add_quads(const GroupQuad* a, int64_t quads, int rows, const StripQuad* w, int panel_strips, const Level* levels,
                        int depth, float* acc) {
    if (panel_strips > 1) {
      add_quads<2>(a, quads, rows, w, levels, depth, acc);
    } else {
      add_quads<1>(a, quads, rows, w, levels, depth, acc);
    }
  }

 private:
  static constexpr int kRowBytes = 64, kOutBytes = kTile * 4, kAccRow = kPanelStrips * strips::kColumns;

  // Sums of a tile's rows and each strip, which have left the tiles, and what they are multiplied by and added to.
  template <int kStrips>
  struct Stored {
    alignas(64) int32_t sum[kStrips][kTile][kTile];
    const float* scale;
    const StripQuad* w;
    float* acc;

    // kRows rows, from `first` on. Missing ones are added too.
    template <int kRows>
    [[gnu::always_inline]] void add(int first) const {
      __m512 factor[kStrips];
      for (int s = 0; s < kStrips; ++s) factor[s] = _mm512_load_ps(w[s].factor[0]);
#pragma GCC unroll 8
      for (int i = first; i < first + kRows; ++i) {
        const __m512 factor_of_row = _mm512_set1_ps(scale[i]);
        for (int s = 0; s < kStrips; ++s) {
          float* out = acc + i * kAccRow + s * strips::kColumns;
          const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sum[s][i])), factor_of_row);
          _mm512_store_ps(out, _mm512_fmadd_ps(scaled, factor[s], _mm512_load_ps(out)));
        }
      }
    }
  };

  template <int kStrips>
  static void add_quads(const GroupQuad* a, int64_t quads, int rows, const StripQuad* w, const Level* levels, int depth,
                        float* acc) {
    Stored<kStrips> stored[2];
    bool pending = false;
    int next = 0;
    const auto add_pending = [&] {
      if (pending) stored[next ^ 1].template add<kTile>(0);
      pending = false;
    };
    for (int q = 0; q < depth; ++q, ++a, w += kStrips) {
      bool kept = false;  // this quad of W is in its tiles
      for (int row = 0; row < rows; row += kTile) {
        const GroupQuad& group = a[row / kGroupRows * quads];
        const int first = row % kGroupRows;
        float* to = acc + row * kAccRow;
        if (const Level level = std::max(levels[q], group.level); level != Level::quad) {
          add_pending();
          kept = false;
          if (rows - row > kTile) {
            add_unaligned<2, kStrips>(group, w, level, to);
            row += kTile;
          } else {
            add_unaligned<1, kStrips>(group, w, level, to);
          }
          continue;
        }
        if (!kept) load_strips<kStrips>(w);
        kept = true;
        Stored<kStrips>& out = stored[next];
        out.scale = &group.scale[first];
        out.w = w;
        out.acc = to;
        if (pending) {
          multiply_rows<kStrips>(group, first, out, [&](auto product) __attribute__((always_inline)) {
            constexpr int kRows = kTile / (2 * kStrips);
            stored[next ^ 1].template add<kRows>(product * kRows);
          });
        } else {
          multiply_rows<kStrips>(group, first, out, [](auto) {});
        }
        pending = true;
        next ^= 1;
      }
    }
    add_pending();
  }

  // A quad of W stays in tiles 4 to 7 while rows pass by.
  template <int kStrips>
  [[gnu::always_inline]] static void load_strips(const StripQuad* w) {
    std::atomic_signal_fence(std::memory_order_seq_cst);  // GCC 12 does not know that tile loads read memory
    _tile_loadd(4, w[0].codes[0], kRowBytes);
    _tile_loadd(5, w[0].codes[kQuadElements / 8], kRowBytes);
    if constexpr (kStrips > 1) {
      _tile_loadd(6, w[1].codes[0], kRowBytes);
      _tile_loadd(7, w[1].codes[kQuadElements / 8], kRowBytes);
    }
  }

  // An aligned quad of sixteen rows of a group, from `first` on. After each tile product `between` is called with its number.
  template <int kStrips, class Between>
  [[gnu::always_inline]] static void multiply_rows(const GroupQuad& a, int first, Stored<kStrips>& out,
                                                   const Between& between) {
    std::atomic_signal_fence(std::memory_order_seq_cst);
    _tile_zero(0);
    if constexpr (kStrips > 1) _tile_zero(1);
    _tile_loadd(2, a.codes[0][first], kRowBytes);
    _tile_dpbssd(0, 2, 4);
    between(std::integral_constant<int, 0>());
    if constexpr (kStrips > 1) {
      _tile_dpbssd(1, 2, 6);
      between(std::integral_constant<int, 1>());
    }
    _tile_loadd(2, a.codes[1][first], kRowBytes);
    _tile_dpbssd(0, 2, 5);
    between(std::integral_constant<int, kStrips>());
    if constexpr (kStrips > 1) {
      _tile_dpbssd(1, 2, 7);
      between(std::integral_constant<int, kStrips + 1>());
    }
    _tile_stored(0, out.sum[0], kOutBytes);
    if constexpr (kStrips > 1) _tile_stored(1, out.sum[1], kOutBytes);
    std::atomic_signal_fence(std::memory_order_seq_cst);
  }

  // ---- quads that are not aligned: 32 rows by two strips, as tiles 4 and 5 of A and 6 and 7 of W ----

  // Sums of a part of a quad (a half, a block) for each sixteen rows and each strip.
  template <int kGroups, int kStrips>
  struct alignas(64) Sums {
    int32_t tile[kGroups][kStrips][kTile][kTile];
  };

  template <int kGroups, int kStrips>
  [[gnu::noinline]] static void add_unaligned(const GroupQuad& a, const StripQuad* w, Level level, float* acc) {
    Sums<kGroups, kStrips> sums[kQuad];
    if (level == Level::pair) {
      for (int half = 0; half < 2; ++half) multiply<64>(a, w, 64 * half, sums[half]);
      return add_sums<Level::pair>(a, w, sums, acc);
    }
    configure_tiles(32);
    for (int b = 0; b < kQuad; ++b) multiply<32>(a, w, kBlock * b, sums[b]);
    configure_tiles(64);
    level == Level::block ? add_sums<Level::block>(a, w, sums, acc) : add_sums<Level::general>(a, w, sums, acc);
  }

  // The sums over kDepth elements from a position on.
  template <int kDepth, int kGroups, int kStrips>
  [[gnu::always_inline]] static void multiply(const GroupQuad& a, const StripQuad* w, int position,
                                              Sums<kGroups, kStrips>& out) {
    std::atomic_signal_fence(std::memory_order_seq_cst);
    _tile_zero(0);
    _tile_loadd(4, a.codes[position / 64][0] + position % 64, kRowBytes);
    _tile_loadd(6, w[0].codes[position / 4], kRowBytes);
    _tile_dpbssd(0, 4, 6);
    if constexpr (kStrips > 1) {
      _tile_zero(1);
      _tile_loadd(7, w[1].codes[position / 4], kRowBytes);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (kGroups > 1) {
      _tile_zero(2);
      _tile_loadd(5, a.codes[position / 64][kTile] + position % 64, kRowBytes);
      _tile_dpbssd(2, 5, 6);
    }
    if constexpr (kGroups > 1 && kStrips > 1) {
      _tile_zero(3);
      _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, out.tile[0][0], kOutBytes);
    if constexpr (kStrips > 1) _tile_stored(1, out.tile[0][1], kOutBytes);
    if constexpr (kGroups > 1) _tile_stored(2, out.tile[1][0], kOutBytes);
    if constexpr (kGroups > 1 && kStrips > 1) _tile_stored(3, out.tile[1][1], kOutBytes);
    std::atomic_signal_fence(std::memory_order_seq_cst);
  }

  // Missing rows of a tile are added too.
  template <Level kLevel, int kGroups, int kStrips>
  static void add_sums(const GroupQuad& a, const StripQuad* w, const Sums<kGroups, kStrips> (&sums)[kQuad], float* acc) {
    constexpr int kParts = kLevel == Level::pair ? 2 : 4;
    __m512 factor[kStrips][kParts];
    for (int s = 0; s < kStrips; ++s) {
      for (int i = 0; i < kParts; ++i) factor[s][i] = _mm512_load_ps(w[s].factor[i * kQuad / kParts]);
    }
    for (int row = 0; row < kGroups * kTile; ++row) {
#pragma GCC unroll 2
      for (int s = 0; s < kStrips; ++s) {
        const auto scaled = [&](int part, float scale) __attribute__((always_inline)) {
          const int32_t* sum = sums[part].tile[row / kTile][s][row % kTile];
          return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sum)), _mm512_set1_ps(scale));
        };
        float* out = acc + row * kAccRow + s * strips::kColumns;
        _mm512_store_ps(out, add_row<kLevel>(scaled, a, row, factor[s], _mm512_load_ps(out)));
      }
    }
  }

  template <Level kLevel, class Scaled>
  static __m512 add_row(const Scaled& scaled, const GroupQuad& a, int row, const __m512* w, __m512 acc) {
    if constexpr (kLevel == Level::pair) {
      const __m512 left = _mm512_mul_ps(scaled(0, a.factor(row, 0).scale), w[0]);
      return _mm512_add_ps(acc, _mm512_fmadd_ps(scaled(1, a.factor(row, 2).scale), w[1], left));
    } else {
      constexpr bool kGuarded = kLevel == Level::general;
      __m512 pair[2] = {};
      for (int p = 0; p < 2; ++p) {
        const int first = 2 * p, second = first + 1;
        const BlockFactor &f = a.factor(row, first), &g = a.factor(row, second);
        pair[p] = add_block<kGuarded, true>(pair[p], scaled(first, f.scale), f, w[first]);
        pair[p] = add_block<kGuarded, false>(pair[p], scaled(second, g.scale), g, w[second]);
      }
      return _mm512_add_ps(acc, _mm512_add_ps(pair[0], pair[1]));
    }
  }
};

// W is loaded to tiles once for so many rows, whose accumulators stay in the first-level cache.
template <>
constexpr int kCallRows<Amx> = 64;

}  // namespace
}  // namespace xpu_fp4::cpu
