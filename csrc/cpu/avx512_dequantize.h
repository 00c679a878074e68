// SPDX-License-Identifier: Apache-2.0
// Dequantize on AVX-512.
#pragma once
#include "avx512_output.h"

namespace xpu_fp4::cpu {
namespace {

alignas(64) constexpr auto kValues = [] {
  std::array<float, 16> table{};
  for (unsigned code = 0; code < 16; ++code) table[code] = e2m1::value(code);
  return table;
}();

// What the sixteen codes of a block stand for is scaled and rounded once; elements are looked up. A permutation looks at the
// low bits of its index only: four of a dword, five of a word. So a byte that stands twice in a wider lane, the second time
// four bits lower, is the indices of its two elements.
template <DType T>
void dequantize_block(const Dequantize& args, int64_t block) {
  const __m512 values = _mm512_mul_ps(_mm512_load_ps(kValues.data()), _mm512_set1_ps(e8m0::value(args.scale[block])));
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(args.codes + block * kBlockBytes));
  if constexpr (T == DType::f32) {
    const __m512 table = canonical_nan(values);
    const __m512i low = _mm512_cvtepu8_epi64(packed), high = _mm512_cvtepu8_epi64(_mm_unpackhi_epi64(packed, packed));
    float* out = static_cast<float*>(args.out) + block * kBlock;
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(_mm512_or_si512(low, _mm512_slli_epi64(low, 28)), table));
    _mm512_storeu_ps(out + 16, _mm512_permutexvar_ps(_mm512_or_si512(high, _mm512_slli_epi64(high, 28)), table));
  } else {
    const __m512i table = _mm512_broadcast_i64x4(round_to_words<T>(values)), bytes = _mm512_cvtepu8_epi32(packed);
    const __m512i indices = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
    _mm512_storeu_si512(static_cast<uint16_t*>(args.out) + block * kBlock, _mm512_permutexvar_epi16(indices, table));
  }
}

// Dequantizes a block of int8 codes. A code times 2^(e - 6) is exact, or Inf.
template <DType T>
void dequantize_int8_block(const Dequantize& args, int64_t block) {
  const uint8_t scale = args.scale[block];
  const float unit = scale == e8m0::kNan ? float_of(kNanBits) : pow2(e8m0::exponent(scale) + integer_exponent(Format::mxint8));
  for (int64_t i = block * kBlock; i < (block + 1) * kBlock; i += 16) {
    const __m512i codes = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(args.codes + i)));
    store_floats<T>(args.out, i, 0xFFFF, _mm512_mul_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(unit)));
  }
}

void dequantize(const Dequantize& given, Range blocks) {
  const Dequantize args = given;
  with_dtype(args.dtype, [&](auto dtype) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      args.format == Format::mxint8 ? dequantize_int8_block<dtype>(args, block) : dequantize_block<dtype>(args, block);
    }
  });
}

}  // namespace
}  // namespace xpu_fp4::cpu
