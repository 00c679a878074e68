// SPDX-License-Identifier: Apache-2.0
// W4A16 of bfloat16 activations on AMX-BF16 tiles. Four tiles of sums, 32 rows by two strips, share two tiles of A and two of
// W, as for W4A4. W becomes bfloat16 with its scale, which is exact: an element has two significant bits. So a tile needs no
// scale of its own, and sums stay in the tiles for kPanelQuads quads.
//
// A tile product takes K = 32: the even and the odd elements are a chain of sixteen fma each, onto +0; the two are added, and
// their sum is added to the tile's. It flushes subnormals, and products are of the whole weight, so tiles get what stays far
// from both ends of float32: weights of 2^-59 up to 6 * 2^55 and activations of 2^-60 up to 2^60, whose sums are multiples of
// 2^-126 and below 2^128. Then nothing is flushed and nothing overflows, and float32 fma with the scale applied behind them
// give a tile's bits: few rows are computed so, W decoded in registers. The rest takes the float32 way of avx512_w4a16.h:
// - a strip's quad with a scale outside, but for blocks of zeros, which fit any: by W alone;
// - a row's quad with an element outside, but for zeros: by that row alone. Tiles get zeros in its place.
//
// Order of an output's sum, the same for every shape: kPanelQuads quads chained in a tile, then their sum is added to the
// accumulator, then those of its quads that took the float32 way, in order. So the longest path has at most
// 15 + 4 kPanelQuads + K / (128 kPanelQuads) roundings, or 16 for K = 32 and 19 for K = 128, below 4 sqrt(K); where every quad
// took the float32 way, what that has: adding an empty tile's +0 rounds nothing.
#pragma once
#include "amx_tiles.h"
#include "avx512_output.h"
#include "avx512_w4a16.h"

namespace xpu_fp4::cpu {
namespace {

struct AmxBf16 {
  static constexpr char kSource[] = "amx_w4a16.h";
  static constexpr int kTile = 16, kGroupRows = 2 * kTile, kPanelStrips = 2, kPanelQuads = 4, kDirectRows = 4, kBlockRows = 256;
  using Session = TileSession;

  struct alignas(64) Tiles {
    uint16_t x[kQuad][kGroupRows][kBlock];
  };

  // Bit r of `apart`: row r takes the float32 way. It is zero in `few`, the first rows as float32, and not yet in the tiles.
  struct alignas(64) GroupQuad {
    Tiles tiles;
    float few[kDirectRows][kQuadElements];
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
    bool apart = false;
    for (int b = 0; b < kQuad; ++b) {
      const __m512i words = b < blocks ? load_words(source, (block + b) * kBlock) : _mm512_setzero_si512();
      _mm512_store_si512(out.tiles.x[b][row], words);
      apart |= !all_fit(words);
    }
    out.apart |= static_cast<uint32_t>(apart) << row;
    if (row >= kDirectRows) return;
    for (int i = 0; i < kQuadElements; i += 16)
      _mm512_store_ps(out.few[row] + i, apart ? _mm512_setzero_ps() : floats(out, row, i));
  }

  // Rows that are missing from a tile may hold anything: no other row's sums depend on them.
  static void pad(GroupQuad&, int) {}

  static Level fill(const Weight& w, int64_t strip, int64_t quad, StripQuad& out) {
    with_strip(w, strip, quad, [&](const auto& packed) {
      out.apart = !fits(packed);
      if (!out.apart) fill_pairs(packed, out);
    });
    if (!out.apart) return Level::quad;
    std::memset(out.pairs, 0, sizeof(out.pairs));
    Avx512Float::fill(w, strip, quad, out.floats);
    return Level::general;
  }

  static void add_quads(const GroupQuad* a, int64_t, int rows, const StripQuad* w, int panel_strips, const Level* levels,
                        int depth, float* acc) {
    const Tiles* tiles[kPanelQuads];
    Tiles cleared[kPanelQuads];
    for (int q = 0; q < depth; ++q) {
      tiles[q] = &a[q].tiles;
      if (a[q].apart == 0) continue;
      clear_apart(a[q], cleared[q]);
      tiles[q] = &cleared[q];
    }
    if (rows > kTile) {
      panel_strips > 1 ? add_tiles<2, 2>(tiles, rows, w, depth, acc) : add_tiles<2, 1>(tiles, rows, w, depth, acc);
    } else {
      panel_strips > 1 ? add_tiles<1, 2>(tiles, rows, w, depth, acc) : add_tiles<1, 1>(tiles, rows, w, depth, acc);
    }
    for (int q = 0; q < depth; ++q) {
      if (levels[q] == Level::quad && a[q].apart == 0) continue;
      for (int s = 0; s < panel_strips; ++s) add_apart(a[q], rows, w[q * panel_strips + s], acc + s * strips::kColumns);
    }
  }

  // All quads of one strip for up to kDirectRows rows; acc has a row of kPanelStrips strips for each.
  static void add_strip(const GroupQuad* a, int rows, const Weight& w, int64_t strip, float* acc) {
    static constexpr Direct kDirect[kDirectRows] = {add_strip<1>, add_strip<2>, add_strip<3>, add_strip<4>};
    kDirect[rows - 1](a, w, strip, acc);
  }

 private:
  using Direct = void (*)(const GroupQuad*, const Weight&, int64_t, float*);

  static constexpr int kLeastExponent = -58, kLargestExponent = 55;  // of the scales that fit
  static constexpr uint8_t kLeastByte = e8m0::kBias + kLeastExponent, kLargestByte = e8m0::kBias + kLargestExponent;

  // Elements times the largest scale as bfloat16, twice: a permutation looks at the low five bits of its index.
  alignas(64) static constexpr auto kWords = [] {
    std::array<uint16_t, 32> table{};
    for (unsigned i = 0; i < 32; ++i) {
      const float scaled = e2m1::value(i & 15u) * pow2(kLargestExponent);
      table[i] = scaled == 0.0f ? 0 : static_cast<uint16_t>(bits_of(scaled) >> 16);
    }
    return table;
  }();

  // A block's elements, which a transform hands over as float32.
  static __m512i load_words(const Activations& source, int64_t i) {
    if (source.dtype == DType::bf16) return _mm512_loadu_si512(static_cast<const uint16_t*>(source.data) + i);
    const auto half = [&](int64_t from) {
      return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_loadu_si512(static_cast<const float*>(source.data) + from), 16));
    };
    return _mm512_inserti64x4(_mm512_castsi256_si512(half(i)), half(i + 16), 1);
  }

  static bool all_fit(__m512i words) {
    constexpr int kLeast = (127 - 60) << 7, kEnd = (127 + 60) << 7;
    const __m512i magnitude = _mm512_and_si512(words, _mm512_set1_epi16(0x7FFF));
    return _mm512_mask_cmpge_epu16_mask(_mm512_test_epi16_mask(magnitude, magnitude),
                                        _mm512_sub_epi16(magnitude, _mm512_set1_epi16(kLeast)),
                                        _mm512_set1_epi16(kEnd - kLeast)) == 0;
  }

  static bool all_fit_as_scales(__m512i bytes) {
    return all_within(_mm512_sub_epi8(bytes, _mm512_set1_epi8(kLeastByte)), kLargestByte - kLeastByte);
  }
  template <class Strip>
  static bool fits(const Strip& packed) {
    return all_fit_as_scales(packed.scales()) || fits_but_for_zeros(packed);
  }
  template <class Strip>
  [[gnu::noinline]] static bool fits_but_for_zeros(const Strip& packed) {
    __mmask16 zero[kQuad];
    zero_columns(packed, zero);
    __m512i scales = packed.scales();
    if (_mm512_cmpeq_epi8_mask(scales, _mm512_set1_epi8(-1)) != 0) return false;
    for (int b = 0; b < kQuad; ++b) {
      const __m512i others = _mm512_set1_epi32(static_cast<int>(~(0xFFu << (8 * b))));
      const __m512i one = _mm512_set1_epi32(e8m0::kBias << (8 * b));
      scales = _mm512_mask_or_epi32(scales, zero[b], _mm512_and_si512(scales, others), one);
    }
    return all_fit_as_scales(scales);
  }

  // Sixteen elements of a row as float32.
  static __m512 floats(const GroupQuad& a, int row, int i) {
    return load_floats<DType::bf16>(a.tiles.x[i / kBlock][row], i % kBlock, 0xFFFF);
  }

  [[gnu::noinline]] static void clear_apart(const GroupQuad& a, Tiles& out) {
    out = a.tiles;
    for (int row = 0; row < kGroupRows; ++row) {
      if ((a.apart >> row & 1u) == 0) continue;
      for (auto& block : out.x) std::memset(block[row], 0, sizeof(block[row]));
    }
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
  static void add_tiles(const Tiles* const* a, int rows, const StripQuad* w, int depth, float* acc) {
    constexpr int kRowBytes = 64;
    alignas(64) float sums[kGroups][kStrips][kTile][kTile];
    std::atomic_signal_fence(std::memory_order_seq_cst);  // GCC 12 does not know that tile loads read memory
    _tile_zero(0);
    if constexpr (kStrips > 1) _tile_zero(1);
    if constexpr (kGroups > 1) _tile_zero(2);
    if constexpr (kGroups > 1 && kStrips > 1) _tile_zero(3);
    for (int q = 0; q < depth; ++q, w += kStrips) {
#pragma GCC unroll 4
      for (int b = 0; b < kQuad; ++b) {
        _tile_loadd(4, a[q]->x[b][0], kRowBytes);
        _tile_loadd(6, w[0].pairs[b * kBlock / 2], kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kStrips > 1) {
          _tile_loadd(7, w[1].pairs[b * kBlock / 2], kRowBytes);
          _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (kGroups > 1) {
          _tile_loadd(5, a[q]->x[b][kTile], kRowBytes);
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
    Avx512Float::GroupQuad x;
    int of_x[Avx512Float::kGroupRows], count = 0;
    const auto flush = [&] {
      alignas(64) float sums[Avx512Float::kGroupRows][Avx512Float::kPanelStrips][strips::kColumns] = {};
      Avx512Float::add_quads(&x, 0, count, w.apart ? &w.floats : &widened, 1, nullptr, 1, sums[0][0]);
      for (int i = 0; i < count; ++i) add(acc + of_x[i] * kPanelStrips * strips::kColumns, sums[i][0]);
      count = 0;
    };
    for (int row = 0; row < rows; ++row) {
      if (!w.apart && (a.apart >> row & 1u) == 0) continue;
      for (int i = 0; i < kQuadElements; i += 16) _mm512_store_ps(x.x[count] + i, floats(a, row, i));
      of_x[count++] = row;
      if (count == Avx512Float::kGroupRows) flush();
    }
    if (count > 0) flush();
  }

  // The pairs as float32.
  static void widen(const StripQuad& w, Avx512Float::StripQuad& out) {
    for (int i = 0; i < kQuadElements / 2; ++i) {
      const __m512i pairs = _mm512_load_si512(w.pairs[i]);
      _mm512_store_si512(out.codes[2 * i], _mm512_slli_epi32(pairs, 16));
      _mm512_store_si512(out.codes[2 * i + 1], _mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
    }
    for (auto& factor : out.factor) _mm512_store_ps(factor, _mm512_set1_ps(1.0f));
  }

  template <int R>
  static void add_strip(const GroupQuad* a, const Weight& w, int64_t strip, float* acc) {
    const int64_t quads = strips::quads(w.k);
    for (int64_t first = 0; first < quads; first += kPanelQuads) {
      const int depth = static_cast<int>(std::min<int64_t>(kPanelQuads, quads - first));
      alignas(64) float sums[R][strips::kColumns] = {};
      uint32_t apart = 0;  // bit q: a quad of which something takes the float32 way
      for (int q = 0; q < depth; ++q) {
        bool fit = true;
        with_strip(w, strip, first + q, [&](const auto& packed) {
          fit = fits(packed);
          if (fit) add_strip_quad<R>(a[first + q], packed, sums);
        });
        apart |= static_cast<uint32_t>(!fit || a[first + q].apart != 0) << q;
      }
      for (int r = 0; r < R; ++r) add(acc + r * kPanelStrips * strips::kColumns, sums[r]);
      for (int q = 0; q < depth && apart != 0; ++q) {
        if ((apart >> q & 1u) != 0) add_apart(a[first + q], R, w, strip, first + q, acc);
      }
    }
  }

  [[gnu::noinline]] static void add_apart(const GroupQuad& a, int rows, const Weight& w, int64_t strip, int64_t quad,
                                          float* acc) {
    StripQuad filled;
    fill(w, strip, quad, filled);
    add_apart(a, rows, filled, acc);
  }

  // Adds what four tile products would to the sums.
  template <int R, class Strip>
  [[gnu::always_inline]] static void add_strip_quad(const GroupQuad& a, const Strip& packed,
                                                    float (&sums)[R][strips::kColumns]) {
    const StripAlignment scales = as_they_are(packed.scales());
    unroll<kQuad>([&](auto b) __attribute__((always_inline)) {
      __m512 chain[2][R] = {};
      unroll<4>([&](auto d) __attribute__((always_inline)) {
        unroll<8>([&](auto i) __attribute__((always_inline)) {
          const __m512 w = Avx512Float::value<i % 2>(packed.from_byte(4 * b + d, i / 2));
          unroll<R>([&](auto r) __attribute__((always_inline)) {
            chain[i % 2][r] = _mm512_fmadd_ps(_mm512_set1_ps(a.few[r][b * kBlock + 8 * d + i]), w, chain[i % 2][r]);
          });
        });
      });
      const __m512 factor = column_factor(scales, b);
      unroll<R>([&](auto r) __attribute__((always_inline)) {
        _mm512_store_ps(sums[r], _mm512_fmadd_ps(_mm512_add_ps(chain[0][r], chain[1][r]), factor, _mm512_load_ps(sums[r])));
      });
    });
  }
};

}  // namespace
}  // namespace xpu_fp4::cpu
