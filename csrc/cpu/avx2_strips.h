// SPDX-License-Identifier: Apache-2.0
// The records of W's strips (format/strips.h) for vectors of 256 bits: as they lie prepacked, or out of rows that are
// transposed first. Lanes are eight columns, half of a strip.
#pragma once
#include "loop_nest.h"

namespace xpu_fp4::cpu {
namespace {

constexpr int kHalves = 2, kHalf = strips::kColumns / kHalves;

// How far ahead of its use a record of prepacked weights is fetched: one core has that many lines on their way.
constexpr int kPrefetchQuads = 4;

// Dword d of the codes of a half's columns: eight elements of each.
__m256i codes_of(const uint8_t* record, int d, int half) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(record + 64 * d + 32 * half));
}

__m256i scales_of(const uint8_t* record, int half) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(record + strips::kCodeBytes + 32 * half));
}

// e8m0::value of a half's scales of block b, or any NaN where that is NaN. Without kAll no scale is 2^-127 or NaN.
template <bool kAll>
[[gnu::always_inline]] inline __m256 factor_of(const uint8_t* record, int b, int half) {
  const __m256i scales = scales_of(record, half);
  const __m256i shifted = b == 3 ? _mm256_srli_epi32(scales, 1) : _mm256_slli_epi32(scales, 23 - 8 * b);
  const __m256i bits = _mm256_and_si256(shifted, _mm256_set1_epi32(0x7F800000));
  if constexpr (!kAll) return _mm256_castsi256_ps(bits);
  const __m256i nan = _mm256_cmpeq_epi32(bits, _mm256_set1_epi32(0x7F800000));
  const __m256i finite = _mm256_max_epu32(bits, _mm256_set1_epi32(1 << 22));  // 2^-127 is subnormal
  return _mm256_castsi256_ps(_mm256_or_si256(finite, nan));
}

// rows[i] dword j -> rows[j] dword i.
void transpose(__m256i (&rows)[8]) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256i a = _mm256_unpacklo_epi32(rows[i], rows[i + 1]), b = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    const __m256i c = _mm256_unpacklo_epi32(rows[i + 2], rows[i + 3]), d = _mm256_unpackhi_epi32(rows[i + 2], rows[i + 3]);
    t[i] = _mm256_unpacklo_epi64(a, c);
    t[i + 1] = _mm256_unpackhi_epi64(a, c);
    t[i + 2] = _mm256_unpacklo_epi64(b, d);
    t[i + 3] = _mm256_unpackhi_epi64(b, d);
  }
  for (int j = 0; j < 4; ++j) {
    rows[j] = _mm256_permute2x128_si256(t[j], t[4 + j], 0x20);
    rows[4 + j] = _mm256_permute2x128_si256(t[j], t[4 + j], 0x31);
  }
}

// prepack_record of a whole record, eight dwords of eight rows at a time.
void transpose_record(const Weight& w, int64_t strip, int64_t quad, uint8_t* record) {
  const int64_t column = strip * strips::kColumns, stride = w.k / 2;
  const int columns = static_cast<int>(std::min<int64_t>(strips::kColumns, w.n - column));
  const int blocks = strips::blocks_of(w.k, quad);
  const uint8_t* codes = w.codes + column * stride + quad * kQuadBytes;
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int first = 0; first < kQuadBytes / 4; first += 8) {
    const __m256i present = _mm256_cmpgt_epi32(_mm256_set1_epi32(4 * blocks - first), lane);
    for (int half = 0; half < kHalves; ++half) {
      __m256i rows[8];
      for (int i = 0; i < 8; ++i) {
        const int c = kHalf * half + i;
        rows[i] = c < columns ? _mm256_maskload_epi32(reinterpret_cast<const int*>(codes + c * stride + 4 * first), present)
                              : _mm256_setzero_si256();
      }
      transpose(rows);
      for (int i = 0; i < 8; ++i) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(record + 64 * (first + i) + 32 * half), rows[i]);
      }
    }
  }
  prepack_scales(w, strip, quad, kQuad, record);
}

// A whole record: as it lies, or made in the buffer. The weights that come after it are fetched: of this strip or, past its
// end, of the next.
inline const uint8_t* fetched_record(const Weight& w, int64_t strip, int64_t quad, uint8_t* buffer) {
  if (w.strips() == nullptr) {
    transpose_record(w, strip, quad, buffer);
    return buffer;
  }
  const uint8_t* soon = w.strips() + strips::record_offset(strip, quad, w.k) + kPrefetchQuads * strips::kRecordBytes;
#pragma GCC unroll 17
  for (int line = 0; line < strips::kRecordBytes; line += 64) _mm_prefetch(soon + line, _MM_HINT_T0);
  return record_of(w, strip, quad, buffer);
}

}  // namespace
}  // namespace xpu_fp4::cpu
