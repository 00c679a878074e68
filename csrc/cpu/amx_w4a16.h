// SPDX-License-Identifier: Apache-2.0
// W4A16 of bfloat16 activations on AMX-BF16 tiles. Four tiles of sums, 32 rows by two strips, share two tiles of A and two of
// W, as for W4A4. W becomes bfloat16 with its scale, which is exact: an element has two significant bits. So a tile needs no
// scale of its own, and sums stay in the tiles for kPanelQuads quads.
//
// A tile product takes K = 32: the even and the odd elements are a chain of sixteen fma each, onto +0; the two are added, and
// their sum is added to the tile's. It flushes subnormals, of operands and of every sum. What that would hurt, tiles have as
// zeros, and it takes the float32 way of avx512_w4a16.h instead:
// - a strip's quad in which a scale byte leaves the element no normal bfloat16, or is NaN: by W alone;
// - a row's quad that holds a nonzero |x| < 2^-100, or one that is not finite (times a zero of the tile it would be NaN): by
// that
//   row alone.
//
// Order of an output's sum, the same for every shape: kPanelQuads quads chained in a tile, then their sum is added to the
// accumulator, then those of its quads that took the float32 way, in order. So the longest path has
// 16 + 4 kPanelQuads + K / (128 kPanelQuads) roundings, or 16 for K = 32: below 4 sqrt(K).
#pragma once
#include "amx_tiles.h"
#include "avx512_output.h"
#include "avx512_w4a16.h"

namespace xpu_fp4::cpu {
namespace {

struct AmxBf16 {
  static constexpr int kTile = 16, kGroupRows = 2 * kTile, kPanelStrips = 2, kPanelQuads = 4, kDirectRows = 0, kBlockRows = 256;
  using Session = TileSession;

  // Bit r of `apart`: row r lies in `rows`, and is zero in `tiles`.
  struct alignas(64) GroupQuad {
    uint16_t tiles[kQuad][kGroupRows][kBlock];
    uint16_t rows[kGroupRows][kQuadElements];
    uint32_t apart;
  };

  // pairs[k / 2][column] has element k in its lower half. Where `apart`, they are zero and `floats` has the strip.
  struct alignas(64) StripQuad {
    uint32_t pairs[kQuadElements / 2][strips::kColumns];
    bool apart;
    Avx512Float::StripQuad floats;
  };

  static void expand(const Activations& source, int64_t block, int blocks, GroupQuad& out, int row) {
    if (row == 0) out.apart = 0;
    with_dtype(source.dtype, [&](auto dtype) {
      bool in_tiles = true;
      __m512i words[kQuad];
      for (int b = 0; b < kQuad; ++b) {
        words[b] = load_words<dtype>(source.data, (block + b) * kBlock, b < blocks);
        in_tiles &= all_in_tiles(words[b]);
      }
      for (int b = 0; b < kQuad; ++b) {
        _mm512_store_si512(out.tiles[b][row], in_tiles ? words[b] : _mm512_setzero_si512());
        if (!in_tiles) _mm512_store_si512(out.rows[row] + b * kBlock, words[b]);
      }
      out.apart |= static_cast<uint32_t>(!in_tiles) << row;
    });
  }

  // Rows that are missing from a tile may hold anything: no other row's sums depend on them.
  static void pad(GroupQuad&, int) {}

  static Level fill(const Weight& w, int64_t strip, int64_t quad, StripQuad& out) {
    with_strip(w, strip, quad, [&](const auto& packed) {
      out.apart = !all_within(_mm512_sub_epi8(packed.scales(), _mm512_set1_epi8(kLeastByte)), kLargestByte - kLeastByte);
      if (!out.apart) fill_pairs(packed, out);
    });
    if (!out.apart) return Level::quad;
    std::memset(out.pairs, 0, sizeof(out.pairs));
    Avx512Float::fill(w, strip, quad, out.floats);
    return Level::general;
  }

  static void add_quads(const GroupQuad* a, int64_t, int rows, const StripQuad* w, int panel_strips, const Level* levels,
                        int depth, float* acc) {
    if (rows > kTile) {
      panel_strips > 1 ? add_tiles<2, 2>(a, rows, w, depth, acc) : add_tiles<2, 1>(a, rows, w, depth, acc);
    } else {
      panel_strips > 1 ? add_tiles<1, 2>(a, rows, w, depth, acc) : add_tiles<1, 1>(a, rows, w, depth, acc);
    }
    for (int q = 0; q < depth; ++q) {
      if (levels[q] == Level::quad && a[q].apart == 0) continue;
      for (int s = 0; s < panel_strips; ++s) add_apart(a[q], rows, w[q * panel_strips + s], acc + s * strips::kColumns);
    }
  }

 private:
  using Floats = Avx512Float::GroupQuad;

  // Scale bytes with which every element but zero is a normal bfloat16: 0.5 * 2^-125 up to 6 * 2^125.
  static constexpr uint8_t kLeastByte = e8m0::kBias - 125, kLargestByte = e8m0::kBias + 125;

  // Elements times 2^125 as bfloat16, twice: a permutation looks at the low five bits of its index.
  alignas(64) static constexpr auto kWords = [] {
    std::array<uint16_t, 32> table{};
    for (unsigned i = 0; i < 32; ++i) {
      const float scaled = e2m1::value(i & 15u) * pow2(125);
      table[i] = scaled == 0.0f ? 0 : static_cast<uint16_t>(bits_of(scaled) >> 16);
    }
    return table;
  }();

  // A block's elements of bfloat16, which a transform hands over as float32.
  template <DType T>
  static __m512i load_words(const void* data, int64_t i, bool present) {
    const auto half = [&](int64_t from) __attribute__((always_inline)) {
      const __m512 floats = load_floats<T>(data, from, present ? 0xFFFF : 0);
      return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(floats), 16));
    };
    return _mm512_inserti64x4(_mm512_castsi256_si512(half(i)), half(i + 16), 1);
  }

  static bool all_in_tiles(__m512i words) {
    constexpr int kLeast = (127 - 100) << 7, kInfinity = 0x7F80;
    const __m512i magnitude = _mm512_and_si512(words, _mm512_set1_epi16(0x7FFF));
    return _mm512_mask_cmpge_epu16_mask(_mm512_test_epi16_mask(magnitude, magnitude),
                                        _mm512_sub_epi16(magnitude, _mm512_set1_epi16(kLeast)),
                                        _mm512_set1_epi16(kInfinity - kLeast)) == 0;
  }

  // The table's words are the largest scale's; a smaller one is taken off their exponents, and zero stays zero by saturation.
  template <class Strip>
  static void fill_pairs(const Strip& packed, StripQuad& out) {
    const __m512i words = _mm512_load_si512(kWords.data());
    constexpr unsigned kWiden = 0x80008000u, kStep = 0x00040004u;  // a dword's first byte as both of its words
    const __m512i first_byte =
        _mm512_broadcast_i32x4(_mm_set_epi32(static_cast<int>(kWiden + 3 * kStep), static_cast<int>(kWiden + 2 * kStep),
                                             static_cast<int>(kWiden + kStep), static_cast<int>(kWiden)));
    for (int b = 0; b < kQuad; ++b) {
      const __m512i scale =
          _mm512_shuffle_epi8(packed.scales(), _mm512_add_epi8(first_byte, _mm512_set1_epi8(static_cast<char>(b))));
      const __m512i less = _mm512_slli_epi16(_mm512_sub_epi16(_mm512_set1_epi16(kLargestByte), scale), 7);
      for (int d = 4 * b; d < 4 * b + 4; ++d) {
        const __m512i codes = packed.codes(d);
        unroll<4>([&](auto i) __attribute__((always_inline)) {
          // Byte i of each dword: its low nibble to the lower word, its high one to the upper.
          constexpr int64_t kFrom = 8 * i | (8 * i + 4) << 16 | int64_t{32 + 8 * i} << 32 | int64_t{36 + 8 * i} << 48;
          const __m512i index = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(kFrom), codes);
          _mm512_store_si512(out.pairs[4 * d + i], _mm512_subs_epu16(_mm512_permutexvar_epi16(index, words), less));
        });
      }
    }
  }

  template <int kGroups, int kStrips>
  static void add_tiles(const GroupQuad* a, int rows, const StripQuad* w, int depth, float* acc) {
    constexpr int kRowBytes = 64;
    const int a_stride = rows == 1 ? 0 : kRowBytes;  // a tile full of one row, whose other sums nobody reads
    alignas(64) float sums[kGroups][kStrips][kTile][kTile];
    std::atomic_signal_fence(std::memory_order_seq_cst);  // GCC 12 does not know that tile loads read memory
    _tile_zero(0);
    if constexpr (kStrips > 1) _tile_zero(1);
    if constexpr (kGroups > 1) _tile_zero(2);
    if constexpr (kGroups > 1 && kStrips > 1) _tile_zero(3);
    for (int q = 0; q < depth; ++q, w += kStrips) {
#pragma GCC unroll 4
      for (int b = 0; b < kQuad; ++b) {
        _tile_loadd(4, a[q].tiles[b][0], a_stride);
        _tile_loadd(6, w[0].pairs[b * kBlock / 2], kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kStrips > 1) {
          _tile_loadd(7, w[1].pairs[b * kBlock / 2], kRowBytes);
          _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (kGroups > 1) {
          _tile_loadd(5, a[q].tiles[b][kTile], kRowBytes);
          _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (kGroups > 1 && kStrips > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums[0][0], kRowBytes);
    if constexpr (kStrips > 1) _tile_stored(1, sums[0][1], kRowBytes);
    if constexpr (kGroups > 1) _tile_stored(2, sums[1][0], kRowBytes);
    if constexpr (kGroups > 1 && kStrips > 1) _tile_stored(3, sums[1][1], kRowBytes);
    std::atomic_signal_fence(std::memory_order_seq_cst);
    for (int row = 0; row < rows; ++row) {
      for (int s = 0; s < kStrips; ++s) {
        add(acc + (row * kPanelStrips + s) * strips::kColumns, sums[row / kTile][s][row % kTile]);
      }
    }
  }

  static void add(float* acc, const float* sum) {
    _mm512_store_ps(acc, _mm512_add_ps(_mm512_load_ps(acc), _mm512_load_ps(sum)));
  }

  // A quad of a strip by float32 products, for those rows that tiles have as zeros: all of them where W is apart.
  [[gnu::noinline]] static void add_apart(const GroupQuad& a, int rows, const StripQuad& w, float* acc) {
    Avx512Float::StripQuad widened;
    if (!w.apart) widen(w, widened);
    Floats x;
    int of_x[Avx512Float::kGroupRows], count = 0;
    const auto flush = [&] {
      alignas(64) float sums[Avx512Float::kGroupRows][Avx512Float::kPanelStrips][strips::kColumns] = {};
      Avx512Float::add_quads(&x, 0, count, w.apart ? &w.floats : &widened, 1, nullptr, 1, sums[0][0]);
      for (int i = 0; i < count; ++i) add(acc + of_x[i] * kPanelStrips * strips::kColumns, sums[i][0]);
      count = 0;
    };
    for (int row = 0; row < rows; ++row) {
      const bool apart = (a.apart >> row & 1u) != 0;
      if (!apart && !w.apart) continue;
      for (int b = 0; b < kQuad; ++b) {
        for (int i = 0; i < kBlock; i += 16) {
          const uint16_t* words = apart ? a.rows[row] + b * kBlock : a.tiles[b][row];
          _mm512_store_ps(x.x[count] + b * kBlock + i, load_floats<DType::bf16>(words, i, 0xFFFF));
        }
      }
      of_x[count++] = row;
      if (count == Avx512Float::kGroupRows) flush();
    }
    if (count > 0) flush();
  }

  static void widen(const StripQuad& w, Avx512Float::StripQuad& out) {
    for (int i = 0; i < kQuadElements / 2; ++i) {
      const __m512i pairs = _mm512_load_si512(w.pairs[i]);
      _mm512_store_si512(out.codes[2 * i], _mm512_slli_epi32(pairs, 16));
      _mm512_store_si512(out.codes[2 * i + 1], _mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
    }
    for (auto& factor : out.factor) _mm512_store_ps(factor, _mm512_set1_ps(1.0f));
  }
};

}  // namespace
}  // namespace xpu_fp4::cpu
