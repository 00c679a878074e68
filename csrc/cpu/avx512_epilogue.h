// SPDX-License-Identifier: Apache-2.0
// From integer sums to float32, for sixteen columns of one row: what AVX-512 and AMX tiles share.
#pragma once
#include "avx512_operands.h"

namespace xpu_fp4::cpu {
namespace {

// kMagic + integer, times a scale: exact.
inline __m512 unmagic(__m512i sum, __m512 scale, __m512 offset) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(sum), scale, offset);
}

// Gives one block's product, rounded once; u is the integer times f.scale, w the column's factor. An instruction that makes a
// subnormal out of normal numbers costs Intel's processors over a hundred cycles. So where one may come out, 2^-126 of the same
// sign is added inside the fma: that sum is normal, and its last place is 2^-149, or it is exact, because a block's integer is
// below 2^23. It is taken off again by the bits if a subnormal is left.
__m512 guarded_product(__m512 u, const BlockFactor& f, __m512 w) {
  const __m512i least = _mm512_set1_epi32(1 << 23);  // the bits of 2^-126
  const __mmask16 guarded = _mm512_cmp_ps_mask(w, _mm512_set1_ps(f.underflow), _CMP_LT_OQ);
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(u), _mm512_set1_epi32(static_cast<int>(kSignBit)));
  const __m512 guard = _mm512_castsi512_ps(_mm512_maskz_or_epi32(guarded, sign, least));
  // Below 2^-126 a factor takes any product to zero; as a maximum's second operand a NaN stays.
  if (f.rest < 1.0f) w = _mm512_max_ps(_mm512_set1_ps(0x1p-126f), _mm512_mul_ps(w, _mm512_set1_ps(f.rest)));
  const __m512 sum = _mm512_fmadd_ps(u, w, guard);
  const __m512i bits = _mm512_castps_si512(sum);
  const __mmask16 subnormal = _mm512_mask_testn_epi32_mask(guarded, bits, _mm512_set1_epi32(0x7F000000));
  const __m512 p = _mm512_castsi512_ps(_mm512_mask_sub_epi32(bits, subnormal, bits, least));
  const __m512 q = _mm512_mask_sub_ps(p, _knot_mask16(subnormal), p, guard);
  // Nothing is guarded where rest is above 1: ea is too large then.
  return _mm512_mask_mul_ps(q, _knot_mask16(guarded), q, _mm512_set1_ps(f.after()));
}

// Adds a block's product to what the pair has so far; where it is the first, there is nothing yet. In the safe window products
// are exact, so the second joins the first by fma.
template <bool kGuarded, bool kFirst>
__m512 add_block(__m512 pair, __m512 u, const BlockFactor& f, __m512 w) {
  if constexpr (kGuarded) {
    const __m512 p = guarded_product(u, f, w);
    return kFirst ? p : _mm512_add_ps(pair, p);
  } else {
    return kFirst ? _mm512_mul_ps(u, w) : _mm512_fmadd_ps(u, w, pair);
  }
}

}  // namespace
}  // namespace xpu_fp4::cpu
