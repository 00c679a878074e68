// SPDX-License-Identifier: Apache-2.0
// Vectors of float32 as wide as an instruction set has them: what it takes to write element-wise arithmetic once for all of
// them. No operator contracts, so an fma is one that is written.
#pragma once
#include "with_dtype.h"

namespace xpu_fp4::cpu {
namespace {

// The floats of a vector. A file for one instruction set defines it: g++ 12 evaluates conditions on __AVX2__ before it sees a
// target pragma.
#ifndef XPU_FP4_FLOAT_LANES
#define XPU_FP4_FLOAT_LANES 4
#endif
constexpr int kFloatLanes = XPU_FP4_FLOAT_LANES;
typedef float Lanes __attribute__((vector_size(4 * kFloatLanes)));
typedef uint32_t BitLanes __attribute__((vector_size(4 * kFloatLanes)));
typedef uint16_t WordLanes __attribute__((vector_size(2 * kFloatLanes)));

#if XPU_FP4_FLOAT_LANES == 16
Lanes load_halves(const void* x) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(x))); }
WordLanes to_halves(Lanes x) { return (WordLanes)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
Lanes from_halves(WordLanes x) { return _mm512_cvtph_ps((__m256i)x); }
#elif XPU_FP4_FLOAT_LANES == 8
Lanes load_halves(const void* x) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(x))); }
WordLanes to_halves(Lanes x) { return (WordLanes)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
Lanes from_halves(WordLanes x) { return _mm256_cvtph_ps((__m128i)x); }
#else
WordLanes to_halves(Lanes x) {
  WordLanes out;
  for (int i = 0; i < kFloatLanes; ++i) out[i] = f16_from_float(x[i]);
  return out;
}
Lanes from_halves(WordLanes x) {
  Lanes out;
  for (int i = 0; i < kFloatLanes; ++i) out[i] = float_from_f16(x[i]);
  return out;
}
#endif

// a * b + c, rounded once.
[[gnu::always_inline]] inline Lanes fma(Lanes a, Lanes b, Lanes c) {
#if XPU_FP4_FLOAT_LANES == 16
  return _mm512_fmadd_ps(a, b, c);
#elif XPU_FP4_FLOAT_LANES == 8
  return _mm256_fmadd_ps(a, b, c);
#else
  Lanes out;
  for (int i = 0; i < kFloatLanes; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return out;
#endif
}

[[gnu::always_inline]] inline Lanes all_lanes(float x) { return Lanes{} + x; }

// Neighbouring elements from `first` on, exact.
template <DType T>
[[gnu::always_inline]] inline Lanes load_lanes(const void* x, int64_t first) {
#if XPU_FP4_FLOAT_LANES > 4
  if constexpr (T == DType::f16) return load_halves(static_cast<const uint16_t*>(x) + first);
#endif
  if constexpr (T == DType::f32) {
    Lanes out;
    std::memcpy(&out, static_cast<const float*>(x) + first, sizeof(out));
    return out;
  }
  WordLanes words;
  std::memcpy(&words, static_cast<const uint16_t*>(x) + first, sizeof(words));
  if constexpr (T == DType::f16) return from_halves(words);
  return (Lanes)(__builtin_convertvector(words, BitLanes) << 16);
}

[[gnu::always_inline]] inline Lanes canonical_nans(Lanes x) { return x == x ? x : all_lanes(float_of(kNanBits)); }

// The bits of bfloat16, rounded to nearest even, in the upper words; not of NaN but the canonical one.
[[gnu::always_inline]] inline BitLanes bf16_bits(Lanes x) {
  const BitLanes bits = (BitLanes)x;
  return bits + 0x7FFFu + ((bits >> 16) & 1u);
}

// Rounded once to T and back; NaN becomes the canonical one.
template <DType T>
[[gnu::always_inline]] inline Lanes rounded(Lanes x) {
  x = canonical_nans(x);
  if constexpr (T == DType::bf16) return (Lanes)(bf16_bits(x) & 0xFFFF0000u);
  if constexpr (T == DType::f16) return from_halves(to_halves(x));
  return x;
}

// Rounds once to T and stores; NaN becomes the canonical one.
template <DType T>
[[gnu::always_inline]] inline void store_lanes(void* out, int64_t first, Lanes x) {
  x = canonical_nans(x);
  if constexpr (T == DType::f32) {
    std::memcpy(static_cast<float*>(out) + first, &x, sizeof(x));
  } else {
    const WordLanes words = T == DType::f16 ? to_halves(x) : __builtin_convertvector(bf16_bits(x) >> 16, WordLanes);
    std::memcpy(static_cast<uint16_t*>(out) + first, &words, sizeof(words));
  }
}

}  // namespace
}  // namespace xpu_fp4::cpu
