// SPDX-License-Identifier: Apache-2.0
// From integer sums to float32, for sixteen columns of one row: what AVX-512 and AMX tiles share.
#pragma once
#include "avx512_operands.h"

namespace xpu_fp4::cpu {
namespace {

// kMagic + integer, times a scale: exact.
__m512 unmagic(__m512i sum, __m512 scale, __m512 offset) { return _mm512_fmadd_ps(_mm512_castsi512_ps(sum), scale, offset); }

// One block's product, rounded once: u is the integer times 2^(ea - 2) / rest, w is 2^ew. A multiplication with a subnormal
// result costs Intel's processors over a hundred cycles, so where one may come out, 2^-126 of the same sign is added inside the
// fma and taken off again: that sum is normal, and its last place is 2^-149.
__m512 guarded_product(__m512 u, const BlockFactor& f, __m512 w) {
  const __mmask16 guarded = _mm512_cmp_ps_mask(w, _mm512_set1_ps(f.underflow), _CMP_LT_OQ);
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(u), _mm512_set1_epi32(static_cast<int>(kSignBit)));
  const __m512 guard = _mm512_castsi512_ps(_mm512_maskz_or_epi32(guarded, sign, _mm512_set1_epi32(1 << 23)));
  return _mm512_mul_ps(_mm512_sub_ps(_mm512_fmadd_ps(u, w, guard), guard), _mm512_set1_ps(f.rest));
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
