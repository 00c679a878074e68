// SPDX-License-Identifier: Apache-2.0
// Conversions between float32 vectors and the tensors' dtypes, and the end of a row of output: factor (1 changes no bit), bias,
// one rounding to the output dtype, store.
#pragma once
#include "with_dtype.h"

namespace xpu_fp4::cpu {
namespace {

// Sixteen elements as float32, exact. Lanes outside the mask are not read and are zero.
template <DType T>
__m512 load_floats(const void* data, int64_t i, __mmask16 mask) {
  if constexpr (T == DType::f32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + i);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + i);
  if constexpr (T == DType::f16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Rounded once to float16 or bfloat16; NaN becomes the canonical one.
template <DType T>
__m256i round_to_words(__m512 x) {
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  if constexpr (T == DType::f16) {
    const __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7E00));
  }
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0)));
}

__m512 canonical_nan(__m512 x) {
  return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_ps(float_of(kNanBits)));
}

// Rounds once and stores the lanes of the mask; NaN becomes the canonical one.
template <DType T>
void store_floats(void* data, int64_t i, __mmask16 mask, __m512 x) {
  if constexpr (T == DType::f32) {
    _mm512_mask_storeu_ps(static_cast<float*>(data) + i, mask, canonical_nan(x));
  } else {
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(data) + i, mask, round_to_words<T>(x));
  }
}

__m512 load_bias(const Bias& bias, int64_t row, int64_t column, __mmask16 mask) {
  const float* data = bias.data + row * bias.row_stride + column * bias.column_stride;
  if (bias.column_stride == 1) return _mm512_maskz_loadu_ps(mask, data);
  if (bias.column_stride == 0) return _mm512_set1_ps(*data);
  alignas(64) float values[16] = {};
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i & 1) != 0) values[i] = data[i * bias.column_stride];
  }
  return _mm512_load_ps(values);
}

template <DType T>
void finish_row_as(const Output& out, int64_t n, int64_t row, int64_t column, int columns, const float* acc) {
  for (int c = 0; c < columns; c += 16) {
    const __mmask16 mask = static_cast<__mmask16>(columns - c >= 16 ? 0xFFFFu : (1u << (columns - c)) - 1u);
    __m512 value = _mm512_mul_ps(_mm512_load_ps(acc + c), _mm512_set1_ps(out.factor));
    if (out.bias.data != nullptr) value = _mm512_add_ps(value, load_bias(out.bias, row, column + c, mask));
    store_floats<T>(out.y, row * n + column + c, mask, value);
  }
}

void finish_row(const Product& product, int64_t row, int64_t column, int columns, const float* acc) {
  with_dtype(product.output.dtype,
             [&](auto dtype) { finish_row_as<dtype>(product.output, product.weight.n, row, column, columns, acc); });
}

}  // namespace
}  // namespace xpu_fp4::cpu
