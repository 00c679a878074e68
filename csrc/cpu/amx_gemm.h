// SPDX-License-Identifier: Apache-2.0
// W4A4 on AMX int8 tiles. A tile of sums is 16 x 16; four of them, 32 rows by two strips, share two tiles of A and two of W. A
// tile product takes K = 64, so an aligned quad is two chained products, a pair one; unaligned blocks take products of K = 32,
// which cost as much. Sums leave through memory: tiles have no path to the vector registers.
#pragma once
#include "avx512_epilogue.h"

namespace xpu_fp4::cpu {
namespace {

// What LDTILECFG reads. Tiles 0 to 3 are sums, 4 and 5 rows of A, 6 and 7 strips of W.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit constexpr TileConfig(int depth) {
    for (int tile = 0; tile < 8; ++tile) {
      row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? depth : 64);
      rows[tile] = static_cast<uint8_t>(tile >= 6 ? depth / 4 : 16);
    }
  }
};

struct Amx {
  static constexpr int kTile = 16, kGroupRows = 2 * kTile, kPanelStrips = 2;
  using Activations = ActivationQuad<kGroupRows>;
  using Weights = WeightQuad;

  // Tiles are configured while a product runs.
  struct Session {
    Session() { configure(64); }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  static void expand(const uint8_t* packed, const uint8_t* scale, Activations& out, int row) { expand_row(packed, scale, 0, out, row); }

  // Rows that are missing from a tile are zero.
  static void pad(Activations& a, int rows) {
    const int end = (rows + kTile - 1) / kTile * kTile;
    std::memset(a.codes[rows], 0, static_cast<size_t>(end - rows) * sizeof(a.codes[0]));
    for (int row = rows; row < end; ++row) {
      a.quad[row] = {};
      for (BlockFactor& f : a.block[row]) f = {};
    }
  }

  static Level fill(const Weight& w, int64_t n, int64_t k, int64_t strip, int64_t quad, Weights& out) {
    return fill_quad<0, true>(w, n, k, strip, quad, out);
  }

  static void add_quad(const Activations& a, int rows, const Weights* w, int strips, Level level, float* acc, int64_t stride) {
    alignas(64) int32_t sums[kQuad][4][kTile][kTile];
    const bool two_groups = rows > kTile, two_strips = strips > 1;
    if (level == Level::quad) {
      multiply<64>(a, w, 0, 2, two_groups, two_strips, sums[0]);
    } else if (level == Level::pair) {
      for (int half = 0; half < 2; ++half) multiply<64>(a, w, half, half + 1, two_groups, two_strips, sums[half]);
    } else {
      configure(32);
      for (int b = 0; b < kQuad; ++b) multiply<32>(a, w, b, b + 1, two_groups, two_strips, sums[b]);
      configure(64);
    }
    for (int row = 0; row < rows; ++row) {
      for (int s = 0; s < strips; ++s) {
        float* out = acc + row * stride + s * strips::kColumns;
        _mm512_store_ps(out, add_sums(a, row, w[s], level, &sums[0][row / kTile * 2 + s][row % kTile], _mm512_load_ps(out)));
      }
    }
  }

 private:
  static void configure(int depth) {
    static constexpr TileConfig kFull(64), kHalf(32);
    _tile_loadconfig(depth == 64 ? &kFull : &kHalf);
  }

  // The sums over parts [first, last) of kDepth elements: out[2 * group + strip].
  template <int kDepth>
  static void multiply(const Activations& a, const Weights* w, int first, int last, bool two_groups, bool two_strips,
                       int32_t (*out)[kTile][kTile]) {
    constexpr int kRowBytes = kQuadElements, kStepBytes = strips::kColumns * 4, kOutBytes = kTile * 4;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int part = first; part < last; ++part) {
      const int8_t* rows = a.codes[0] + part * kDepth;
      const int step = part * (kDepth / 4);
      _tile_loadd(4, rows, kRowBytes);
      _tile_loadd(6, w[0].codes[step], kStepBytes);
      _tile_dpbssd(0, 4, 6);
      if (two_strips) {
        _tile_loadd(7, w[1].codes[step], kStepBytes);
        _tile_dpbssd(1, 4, 7);
      }
      if (two_groups) {
        _tile_loadd(5, rows + kTile * kRowBytes, kRowBytes);
        _tile_dpbssd(2, 5, 6);
        if (two_strips) _tile_dpbssd(3, 5, 7);
      }
    }
    _tile_stored(0, out[0], kOutBytes);
    if (two_strips) _tile_stored(1, out[1], kOutBytes);
    if (two_groups) {
      _tile_stored(2, out[2], kOutBytes);
      if (two_strips) _tile_stored(3, out[3], kOutBytes);
    }
  }

  // acc + what the sums of one row and strip say; those of the next part lie 4 tiles further on.
  static __m512 add_sums(const Activations& a, int row, const Weights& w, Level level, const int32_t (*sums)[kTile], __m512 acc) {
    constexpr int kPart = 4 * kTile;
    const auto integer = [&](int part) { return _mm512_cvtepi32_ps(_mm512_load_si512(sums[part * kPart])); };
    const auto factor = [&](int b) { return _mm512_load_ps(w.factor[b]); };
    const auto scaled = [&](int part, int b) { return _mm512_mul_ps(integer(part), _mm512_set1_ps(a.block[row][b].scale)); };
    if (level == Level::quad) {
      return _mm512_fmadd_ps(_mm512_mul_ps(integer(0), _mm512_set1_ps(a.quad[row].scale)), factor(0), acc);
    }
    if (level == Level::pair) {
      return _mm512_add_ps(acc, _mm512_fmadd_ps(scaled(1, 2), factor(2), _mm512_mul_ps(scaled(0, 0), factor(0))));
    }
    return level == Level::block ? add_four<false>(a.block[row], factor, scaled, acc) : add_four<true>(a.block[row], factor, scaled, acc);
  }

  template <bool kGuarded, class Factor, class Scaled>
  static __m512 add_four(const BlockFactor* f, const Factor& factor, const Scaled& scaled, __m512 acc) {
    __m512 pair[2] = {};
    for (int p = 0; p < 2; ++p) {
      pair[p] = add_block<kGuarded, true>(pair[p], scaled(2 * p, 2 * p), f[2 * p], factor(2 * p));
      pair[p] = add_block<kGuarded, false>(pair[p], scaled(2 * p + 1, 2 * p + 1), f[2 * p + 1], factor(2 * p + 1));
    }
    return _mm512_add_ps(acc, _mm512_add_ps(pair[0], pair[1]));
  }
};

}  // namespace
}  // namespace xpu_fp4::cpu
