// SPDX-License-Identifier: Apache-2.0
// Quantize on AVX-512, a block at a time: its 32 elements as two vectors of float32, one of the even elements and one of the
// odd, so that the two codes of a packed byte meet in one lane.
#pragma once
#include "avx512_output.h"

namespace xpu_fp4::cpu {
namespace {

struct BlockPair {
  __m512 even, odd;
};

template <DType T>
BlockPair load_pairs(const void* x, int64_t block) {
  if constexpr (T == DType::f32) {
    const float* p = static_cast<const float*>(x) + block * kBlock;
    const __m512 low = _mm512_loadu_ps(p), high = _mm512_loadu_ps(p + 16);
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return {_mm512_permutex2var_ps(low, even, high),
            _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high)};
  } else {
    const __m512i halves = _mm512_loadu_si512(static_cast<const uint16_t*>(x) + block * kBlock);
    if constexpr (T == DType::bf16) {
      return {_mm512_castsi512_ps(_mm512_slli_epi32(halves, 16)),
              _mm512_castsi512_ps(_mm512_and_si512(halves, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
    } else {
      return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(halves)),
              _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(halves, 16)))};
    }
  }
}

// The bits of the block's largest magnitude. Those of a 16-bit float order like its value, so the largest is found first and
// converted then.
template <DType T>
uint32_t amax_bits(const void* x, int64_t block, const BlockPair& pair) {
  if constexpr (T == DType::bf16) {
    const __m512i halves =
        _mm512_and_si512(_mm512_loadu_si512(static_cast<const uint16_t*>(x) + block * kBlock), _mm512_set1_epi16(0x7FFF));
    const __m256i of_16 = _mm256_max_epu16(_mm512_castsi512_si256(halves), _mm512_extracti64x4_epi64(halves, 1));
    const __m128i of_8 = _mm_max_epu16(_mm256_castsi256_si128(of_16), _mm256_extracti128_si256(of_16, 1));
    // The only horizontal instruction gives the least: of the complements.
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(of_8, _mm_set1_epi16(-1)));
    return (~static_cast<uint32_t>(_mm_cvtsi128_si32(least)) & 0xFFFFu) << 16;
  } else {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    return _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(pair.even), magnitude),
                                                    _mm512_and_si512(_mm512_castps_si512(pair.odd), magnitude)));
  }
}

// e2m1 codes of y in the low four bits of each lane. Representable magnitudes are multiples of 0.5 below 2, of 1 below 4 and of
// 2 above: adding 2^22 * max(1, 2^floor(log2 |y|)) rounds to them, ties to even, and leaves their number in the sum's last
// bits. Each step of the exponent adds two to the code; the three more units below make up for the exponent's own offset,
// modulo 8.
__m512i encode(__m512 y) {
  const __m512i bits = _mm512_castps_si512(y);
  const __m512 magnitude = _mm512_min_ps(_mm512_abs_ps(y), _mm512_set1_ps(6.0f));
  const __m512i exponent = _mm512_and_si512(_mm512_castps_si512(magnitude), _mm512_set1_epi32(static_cast<int>(kInfBits)));
  const __m512 power = _mm512_max_ps(_mm512_castsi512_ps(exponent), _mm512_set1_ps(1.0f));
  const __m512i sum = _mm512_castps_si512(_mm512_fmadd_ps(power, _mm512_set1_ps(4194304.0f + 3.0f), magnitude));
  const __m512i code = _mm512_add_epi32(sum, _mm512_srli_epi32(sum, 22));
  // The low three bits of code, and the sign above them.
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(7), code, _mm512_srli_epi32(bits, 28), 0xCA);
}

template <DType T>
void quantize_block(const QuantizeArgs& args, int64_t block) {
  const BlockPair x = load_pairs<T>(args.x, block);
  const uint8_t scale = e8m0::from_amax(amax_bits<T>(args.x, block, x), args.mode);
  args.scale[block] = scale;
  __m128i* q = reinterpret_cast<__m128i*>(args.q + block * kBlockBytes);
  if (scale == e8m0::kNan) {
    _mm_storeu_si128(q, _mm_setzero_si128());
    return;
  }
  const __m512 reciprocal = _mm512_set1_ps(e8m0::reciprocal(scale));
  const __m512i even = encode(_mm512_mul_ps(x.even, reciprocal)), odd = encode(_mm512_mul_ps(x.odd, reciprocal));
  _mm_storeu_si128(
      q, _mm512_cvtepi32_epi8(_mm512_or_si512(_mm512_and_si512(even, _mm512_set1_epi32(15)), _mm512_slli_epi32(odd, 4))));
}

void quantize(const QuantizeArgs& given, Range blocks) {
  const QuantizeArgs args = given;  // a copy: the bytes that are stored cannot change it
  with_dtype(args.x_dtype, [&](auto dtype) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) quantize_block<dtype>(args, block);
  });
}

// ---- dequantize ----

alignas(64) constexpr auto kValues = [] {
  std::array<float, 16> table{};
  for (unsigned code = 0; code < 16; ++code) table[code] = e2m1::value(code);
  return table;
}();

template <DType T>
void dequantize_block(const DequantizeArgs& args, int64_t block) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(args.q + block * kBlockBytes)));
  const __m512 table = _mm512_load_ps(kValues.data()), scale = _mm512_set1_ps(e8m0::value(args.scale[block]));
  // A permutation looks at the low four bits of its index.
  const __m512 even = _mm512_mul_ps(_mm512_permutexvar_ps(bytes, table), scale);
  const __m512 odd = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table), scale);
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  store_floats<T>(args.out, block * kBlock, 0xFFFF, _mm512_permutex2var_ps(even, first, odd));
  store_floats<T>(args.out, block * kBlock + 16, 0xFFFF,
                  _mm512_permutex2var_ps(even, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd));
}

void dequantize(const DequantizeArgs& given, Range blocks) {
  const DequantizeArgs args = given;
  with_dtype(args.out_dtype, [&](auto dtype) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) dequantize_block<dtype>(args, block);
  });
}

}  // namespace
}  // namespace xpu_fp4::cpu
