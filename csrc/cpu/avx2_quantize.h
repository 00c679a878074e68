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

// Sixteen elements as float32, exact, in two vectors that vpackssdw joins in order.
struct Sixteen {
  __m256 first, second;
};
template <DType T>
Sixteen load_sixteen(const void* x, int64_t i) {
  if constexpr (T == DType::f32) {
    const __m256 low = _mm256_loadu_ps(static_cast<const float*>(x) + i);
    const __m256 high = _mm256_loadu_ps(static_cast<const float*>(x) + i + 8);
    return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
  }
  const __m256i words = _mm256_loadu_si256(vector_at(x, i * size_of(T)));
  if constexpr (T == DType::f16) {
    const __m256i order = _mm256_permute4x64_epi64(words, 0xD8);  // the first four of each half before the others
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(order)), _mm256_cvtph_ps(_mm256_extracti128_si256(order, 1))};
  }
  const __m256i zero = _mm256_setzero_si256();
  return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, words)), _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, words))};
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
[[gnu::always_inline]] inline __m256i encode_block(const void* x, int64_t first, __m256 factor, __m256 rest) {
  const auto integers = [&](__m256 of_x) __attribute__((always_inline)) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_mul_ps(of_x, factor), rest));
  };
  __m256i words[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Sixteen floats = load_sixteen<T>(x, first + 16 * i);
    words[i] = _mm256_packs_epi32(integers(floats.first), integers(floats.second));
  }
  const __m256i codes = _mm256_permute4x64_epi64(_mm256_packs_epi16(words[0], words[1]), 0xD8);
  return _mm256_max_epi8(codes, _mm256_set1_epi8(-127));
}

template <DType T, int kBlocks>
[[gnu::always_inline]] inline void quantize_group(const Quantize& args, int64_t first) {
  const uint8_t scale = mxint8::scale_byte(amax_bits<T, kBlocks * kBlock>(args.x, first * kBlock));
  std::memset(args.scale + first, scale, kBlocks);
  uint8_t* codes = args.codes + first * kBlock;
  if (scale == e8m0::kNan) {
    std::memset(codes, 0, kBlocks * kBlock);
    return;
  }
  const mxint8::Reciprocal reciprocal = mxint8::reciprocal(scale);
  const __m256 factor = _mm256_set1_ps(reciprocal.first), rest = _mm256_set1_ps(reciprocal.second);
#pragma GCC unroll 4
  for (int i = 0; i < kBlocks * kBlock; i += kBlock) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), encode_block<T>(args.x, first * kBlock + i, factor, rest));
  }
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
