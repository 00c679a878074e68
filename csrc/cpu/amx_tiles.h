// SPDX-License-Identifier: Apache-2.0
// The tiles of AMX: 0 to 3 are sums, 4 and 5 rows of A, 6 and 7 strips of W.
#pragma once
#include "simd_includes.h"

namespace xpu_fp4::cpu {
namespace {

// LDTILECFG reads this. A tile product has `depth` bytes of K.
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

void configure_tiles(int depth) {
  static constexpr TileConfig kFull(64), kHalf(32);
  _tile_loadconfig(depth == 64 ? &kFull : &kHalf);
}

// Tiles are configured while a product runs.
struct TileSession {
  TileSession() { configure_tiles(64); }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

}  // namespace
}  // namespace xpu_fp4::cpu
