// SPDX-License-Identifier: Apache-2.0
// Quantize on AVX2: MXINT8. A group's largest magnitude is found in the lanes of its dtype; then 32 elements at a time are
// scaled, rounded to integers by the conversion, and packed.
#pragma once
#include "generic_quantize.h"

namespace xpu_fp4::cpu {
namespace {

const __m256i* vector_at(const void* x, int64_t byte) {
  return reinterpret_cast<const __m256i*>(static_cast<const char*>(x) + byte);
}

// Eight elements as float32, exact.
template <DType T>
__m256 load_eight(const void* x, int64_t i) {
  if constexpr (T == DType::f32) return _mm256_loadu_ps(static_cast<const float*>(x) + i);
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(x) + i));
  if constexpr (T == DType::f16) return _mm256_cvtph_ps(words);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

// The bits as float32 of the largest magnitude among kCount elements. Bits of all dtypes order like magnitudes.
template <DType T, int kCount>
uint32_t amax_bits(const void* x, int64_t first) {
  constexpr int kBytes = kCount * size_of(T);
  __m256i most = _mm256_setzero_si256();
  for (int byte = 0; byte < kBytes; byte += 32) {
    const __m256i bits = _mm256_loadu_si256(vector_at(x, first * size_of(T) + byte));
    if constexpr (T == DType::f32) {
      most = _mm256_max_epu32(most, _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)));
    } else {
      most = _mm256_max_epu16(most, _mm256_and_si256(bits, _mm256_set1_epi16(0x7FFF)));
    }
  }
  const __m128i low = _mm256_castsi256_si128(most), high = _mm256_extracti128_si256(most, 1);
  if constexpr (T == DType::f32) {
    __m128i half = _mm_max_epu32(low, high);
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4E));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xB1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(half));
  } else {
    // There is an instruction for the least of eight words: that of the complements is the largest.
    const __m128i complements = _mm_xor_si128(_mm_max_epu16(low, high), _mm_set1_epi16(-1));
    const auto word = static_cast<uint16_t>(~_mm_cvtsi128_si32(_mm_minpos_epu16(complements)));
    return bits_of(load<T>(&word, 0));
  }
}

// A block's codes. The scale's reciprocal is two factors, see format/mxint8.h; packing saturates to -128 .. 127.
template <DType T>
__m256i encode_block(const void* x, int64_t first, const mxint8::Reciprocal& reciprocal) {
  const auto integers = [&](int i) {
    const __m256 scaled = _mm256_mul_ps(load_eight<T>(x, first + i), _mm256_set1_ps(reciprocal.first));
    return _mm256_cvtps_epi32(_mm256_mul_ps(scaled, _mm256_set1_ps(reciprocal.second)));
  };
  const __m256i left = _mm256_packs_epi32(integers(0), integers(8)), right = _mm256_packs_epi32(integers(16), integers(24));
  // Packing takes four of each in turn, from the lower and from the upper half.
  const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
  const __m256i codes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(left, right), order);
  return _mm256_max_epi8(codes, _mm256_set1_epi8(-127));
}

template <DType T, int kBlocks>
void quantize_group(const Quantize& args, int64_t first) {
  const uint8_t scale = mxint8::scale_byte(amax_bits<T, kBlocks * kBlock>(args.x, first * kBlock));
  const mxint8::Reciprocal reciprocal = mxint8::reciprocal(scale);
  for (int b = 0; b < kBlocks; ++b) {
    const __m256i codes =
        scale == e8m0::kNan ? _mm256_setzero_si256() : encode_block<T>(args.x, (first + b) * kBlock, reciprocal);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(args.codes + (first + b) * kBlock), codes);
  }
  std::memset(args.scale + first, scale, kBlocks);
}

void quantize(const Quantize& given, Range blocks) {
  const Quantize args = given;  // a copy: the bytes that are stored cannot change it
  if (args.to.format == Format::mxfp4) return quantize_scalars(args, blocks);
  with_dtype(args.dtype, [&](auto dtype) {
    for_groups(args, blocks, [&](int64_t first, auto count) { quantize_group<dtype, count>(args, first); });
  });
}

}  // namespace
}  // namespace xpu_fp4::cpu
