// SPDX-License-Identifier: Apache-2.0
// W for AVX-512: packed codes to the integers of panels.h. Included after a target pragma (AVX-512 F, BW, DQ, VL, VNNI; with
// VBMI where the Isa says so); all of it has internal linkage.
#pragma once
#include "avx512_alignment.h"

namespace xpu_fp4::cpu {
namespace {

constexpr auto kTwiceSigned = [] {
  std::array<int8_t, 16> table{};
  for (unsigned code = 0; code < 16; ++code) table[code] = static_cast<int8_t>(e2m1::twice(code));
  return table;
}();

__m512i twice_table() { return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kTwiceSigned.data()))); }

// Signed bytes shifted left by 0 .. 3, the count repeated in every byte of a dword: bits that cross into the next byte are
// cleared.
__m512i shift_bytes(__m512i bytes, __m512i counts) {
  const __m512i kept = _mm512_shuffle_epi8(_mm512_set1_epi32(static_cast<int>(0xF8FCFEFFu)), counts);
  return _mm512_and_si512(_mm512_sllv_epi32(bytes, _mm512_and_si512(counts, _mm512_set1_epi32(3))), kept);
}

// Integers of four codes a column: bias + twice the value << the column's shift.
template <int kBias, bool kVbmi>
struct Decoder;

// Decodes by one table of 64 bytes, indexed by shift << 4 | code.
template <int kBias>
struct Decoder<kBias, true> {
  static constexpr auto kTable = [] {
    std::array<uint8_t, 64> table{};
    for (unsigned i = 0; i < 64; ++i) table[i] = static_cast<uint8_t>(kBias + e2m1::twice(i & 15u) * (1 << (i >> 4)));
    return table;
  }();
  __m512i table = _mm512_loadu_si512(kTable.data());
  __m512i shift;

  explicit Decoder(__m512i shifts) : shift(_mm512_slli_epi16(shifts, 4)) {}
  __m512i operator()(__m512i nibbles) const {
    const __m512i index = _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi8(15), shift, 0xEA);  // (a & b) | c
    return _mm512_permutexvar_epi8(index, table);
  }
};

template <int kBias>
struct Decoder<kBias, false> {
  __m512i shift;

  explicit Decoder(__m512i shifts) : shift(shifts) {}
  __m512i operator()(__m512i nibbles) const {
    const __m512i twice = _mm512_shuffle_epi8(twice_table(), _mm512_and_si512(nibbles, _mm512_set1_epi8(15)));
    return _mm512_add_epi8(shift_bytes(twice, shift), _mm512_set1_epi8(kBias));
  }
};

template <int kBias, bool kVbmi, class Strip>
void fill_quad(const Strip& packed, const StripAlignment& alignment, WeightQuad& out) {
#pragma GCC unroll 4
  for (int b = 0; b < kQuad; ++b) {
    _mm512_store_ps(out.factor[b], column_factor<kFactorExponent>(alignment, b));
    const Decoder<kBias, kVbmi> decode(shifts_of(alignment, b));
#pragma GCC unroll 4
    for (int d = 4 * b; d < 4 * b + 4; ++d) {
      const __m512i codes = packed.codes(d);
      _mm512_store_si512(out.codes[2 * d], decode(codes));
      _mm512_store_si512(out.codes[2 * d + 1], decode(_mm512_srli_epi16(codes, 4)));
    }
  }
}

template <int kBias, bool kVbmi>
Level fill_quad(const Weight& w, int64_t strip, int64_t quad, WeightQuad& out) {
  Level level{};
  with_strip(w, strip, quad, [&](const auto& packed) {
    const StripAlignment alignment = align_strip(packed);
    fill_quad<kBias, kVbmi>(packed, alignment, out);
    level = alignment.level;
  });
  return level;
}

}  // namespace
}  // namespace xpu_fp4::cpu
