// SPDX-License-Identifier: Apache-2.0
// align() (panels.h) for the sixteen columns of a strip at once, for AVX-512. Included after a target pragma, like
// avx512_operands.h.
#pragma once
#include "avx512_strips.h"

namespace xpu_fp4::cpu {
namespace {

// The factors of integer products are twice 2^ew, so that they are never subnormal.
constexpr int kFactorExponent = 1;

// All four bytes of each dword: the least and the largest of the four.
struct Extremes {
  __m512i least, largest;
};
Extremes of_dwords(__m512i bytes) {
  const __m512i half = _mm512_rol_epi32(bytes, 16);
  const __m512i least = _mm512_min_epu8(bytes, half), largest = _mm512_max_epu8(bytes, half);
  return {_mm512_min_epu8(least, _mm512_rol_epi32(least, 8)), _mm512_max_epu8(largest, _mm512_rol_epi32(largest, 8))};
}
Extremes of_words(__m512i bytes) {
  const __m512i swapped = _mm512_or_si512(_mm512_slli_epi16(bytes, 8), _mm512_srli_epi16(bytes, 8));
  return {_mm512_min_epu8(bytes, swapped), _mm512_max_epu8(bytes, swapped)};
}

bool all_within(__m512i bytes, int limit) {
  return _mm512_cmpgt_epu8_mask(bytes, _mm512_set1_epi8(static_cast<char>(limit))) == 0;
}
bool all_safe(__m512i scales) {
  return all_within(_mm512_sub_epi8(scales, _mm512_set1_epi8(static_cast<char>(kLeastSafeByte))),
                    kLargestSafeByte - kLeastSafeByte);
}

// Per block the columns whose sixteen bytes are all zero.
template <class Strip>
void zero_columns(const Strip& packed, __mmask16 (&zero)[kQuad]) {
  for (int b = 0; b < kQuad; ++b) {
    const __m512i any = _mm512_or_si512(_mm512_or_si512(packed.codes(4 * b), packed.codes(4 * b + 1)),
                                        _mm512_or_si512(packed.codes(4 * b + 2), packed.codes(4 * b + 3)));
    zero[b] = _mm512_testn_epi32_mask(any, _mm512_set1_epi32(0x77777777));
  }
}

// align() for sixteen columns: bytes of base and shift, block b in byte b of a column's dword.
struct StripAlignment {
  Level level;
  __m512i base, shift;
  __mmask16 nan;
};

StripAlignment align_safe(__m512i scales) {
  const Extremes quad = of_dwords(scales);
  if (all_within(_mm512_sub_epi8(quad.largest, quad.least), kMaxShift)) {
    return {Level::quad, quad.least, _mm512_sub_epi8(scales, quad.least), 0};
  }
  const Extremes pair = of_words(scales);
  if (all_within(_mm512_sub_epi8(pair.largest, pair.least), kMaxShift)) {
    return {Level::pair, pair.least, _mm512_sub_epi8(scales, pair.least), 0};
  }
  return {Level::block, scales, _mm512_setzero_si512(), 0};
}

// Scales outside the safe window: NaN columns and zero blocks may take any scale; what is left may need the general path.
template <class Strip>
[[gnu::noinline]] StripAlignment align_unsafe(const Strip& packed) {
  const __m512i given = packed.scales();
  const __m512i nan_bytes = _mm512_movm_epi8(_mm512_cmpeq_epi8_mask(given, _mm512_set1_epi8(-1)));
  const __mmask16 nan = _mm512_test_epi32_mask(nan_bytes, nan_bytes);
  __mmask16 zero[kQuad];
  zero_columns(packed, zero);
  __m512i zero_bytes = _mm512_setzero_si512();
  for (int b = 0; b < kQuad; ++b) {
    zero_bytes = _mm512_mask_or_epi32(zero_bytes, zero[b], zero_bytes, _mm512_set1_epi32(static_cast<int>(0xFFu << (8 * b))));
  }
  // Zero blocks take the largest scale of the column's others, or 1.
  const __m512i others = of_dwords(_mm512_andnot_si512(zero_bytes, given)).largest;
  const __mmask16 all_zero = zero[0] & zero[1] & zero[2] & zero[3];
  const __m512i one = _mm512_set1_epi8(e8m0::kBias);
  __m512i scales = _mm512_ternarylogic_epi32(zero_bytes, others, given, 0xCA);
  scales = _mm512_mask_mov_epi32(scales, all_zero | nan, one);
  StripAlignment out;
  if (all_safe(scales)) {
    out = align_safe(scales);
  } else {  // byte 254 leaves no room for kFactorExponent: it is 253 with integers twice as large
    const __m512i base = _mm512_min_epu8(scales, _mm512_set1_epi8(static_cast<char>(254 - kFactorExponent)));
    out = {Level::general, base, _mm512_sub_epi8(scales, base), 0};
  }
  out.nan = nan;
  return out;
}

// 2^(ew + exponent) of block b, from its base byte; exponent is 0 or 1.
template <int kExponent = 0>
__m512 column_factor(const StripAlignment& alignment, int b) {
  const __m512i byte = _mm512_and_si512(_mm512_srlv_epi32(alignment.base, _mm512_set1_epi32(8 * b)), _mm512_set1_epi32(255));
  __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(byte, _mm512_set1_epi32(kExponent)), 23);
  if constexpr (kExponent == 0) {  // byte 0 is 2^-127, a subnormal
    bits = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(byte, byte), _mm512_set1_epi32(1 << 22));
  }
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, alignment.nan, _mm512_set1_epi32(kNanBits)));
}

template <class Strip>
StripAlignment align_strip(const Strip& packed) {
  const __m512i scales = packed.scales();
  return all_safe(scales) ? align_safe(scales) : align_unsafe(packed);
}

// Every block at its own scale, NaN where the column has one anywhere in the quad.
inline StripAlignment as_they_are(__m512i scales) {
  const __mmask64 nan = _mm512_cmpeq_epi8_mask(scales, _mm512_set1_epi8(-1));
  const __m512i nan_bytes = _mm512_movm_epi8(nan);
  return {Level::block, scales, _mm512_setzero_si512(), _mm512_test_epi32_mask(nan_bytes, nan_bytes)};
}

// A column's shift in block b, in all four bytes of its dword.
__m512i shifts_of(const StripAlignment& alignment, int b) {
  const __m512i first_byte = _mm512_broadcast_i32x4(_mm_set_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0));
  return _mm512_shuffle_epi8(alignment.shift, _mm512_add_epi8(first_byte, _mm512_set1_epi8(static_cast<char>(b))));
}

}  // namespace
}  // namespace xpu_fp4::cpu
