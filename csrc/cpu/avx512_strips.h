// SPDX-License-Identifier: Apache-2.0
// The quads of a strip of W for AVX-512, as they lie prepacked or out of rows that are transposed first. Included after a
// target pragma, like avx512_operands.h.
#pragma once
#include "simd_includes.h"

namespace xpu_fp4::cpu {
namespace {

// How far ahead of its use a record of prepacked weights is fetched.
constexpr int kPrefetchQuads = 4;

// A quad of a strip: dword d of every column's packed bytes, and the dwords of four scale bytes. Of prepacked weights the codes
// are read where they are used; those of rows are transposed first.
struct PrepackedStrip {
  const uint8_t* record;
  __m512i codes(int d) const { return _mm512_loadu_si512(record + 64 * d); }
  // Byte j of each dword comes lowest, for those who look no further: loads have time where shifts have not.
  __m512i from_byte(int d, int j) const { return _mm512_loadu_si512(record + 64 * d + j); }
  __m512i scales() const { return _mm512_loadu_si512(record + strips::kCodeBytes); }
};

struct TransposedStrip {
  __m512i dwords[16], scale_bytes;
  __m512i codes(int d) const { return dwords[d]; }
  __m512i from_byte(int d, int j) const { return _mm512_srli_epi32(dwords[d], 8 * j); }
  __m512i scales() const { return scale_bytes; }
};

// rows[i] dword j -> rows[j] dword i.
void transpose(__m512i (&rows)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(rows[i], rows[i + 1]), b = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]), d = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c);
    t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d);
    t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  // t[4g + j], lane l: dwords 4l + j of rows 4g .. 4g + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88), b = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xDD);
    const __m512i c = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88), d = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xDD);
    rows[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(a, c, 0xDD);
    rows[12 + j] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
}

// A column's blocks beyond K take the scale of its last one (as format/strips.h says).
uint32_t repeat_last(uint32_t scales, int blocks) {
  const uint32_t last = scales >> (8 * (blocks - 1)) & 0xFFu;
  for (int b = blocks; b < kQuad; ++b) scales |= last << (8 * b);
  return scales;
}

__m512i load_scales(const Weight& w, int64_t column, int columns, int64_t block, int blocks) {
  const uint8_t* scale = w.scale + column * w.scale_row_stride + block * w.scale_block_stride;
  if (w.scale_row_stride == 1) {  // a block's scales of all columns lie side by side
    const __mmask16 mask = static_cast<__mmask16>((1u << columns) - 1u);
    __m512i out = _mm512_setzero_si512(), last = out;
    for (int b = 0; b < kQuad; ++b) {
      if (b < blocks)
        last = _mm512_cvtepu8_epi32(_mm_mask_loadu_epi8(_mm_set1_epi8(127), mask, scale + b * w.scale_block_stride));
      out = _mm512_or_si512(out, _mm512_sllv_epi32(last, _mm512_set1_epi32(8 * b)));
    }
    return out;
  }
  alignas(64) uint32_t words[strips::kColumns];
  for (int c = 0; c < strips::kColumns; ++c) {
    words[c] = 0x7F7F7F7Fu;
    if (c >= columns) continue;
    const uint8_t* of_column = scale + c * w.scale_row_stride;
    if (w.scale_block_stride == 1 && blocks == kQuad) {
      std::memcpy(&words[c], of_column, sizeof(uint32_t));
    } else {
      words[c] = 0;
      for (int b = 0; b < blocks; ++b) words[c] |= static_cast<uint32_t>(of_column[b * w.scale_block_stride]) << (8 * b);
      words[c] = repeat_last(words[c], blocks);
    }
  }
  return _mm512_load_si512(words);
}

TransposedStrip load_rows(const Weight& w, int64_t strip, int64_t quad) {
  TransposedStrip out;
  const int64_t column = strip * strips::kColumns, stride = w.k / 2;
  const int columns = static_cast<int>(std::min<int64_t>(strips::kColumns, w.n - column));
  const int blocks = strips::blocks_of(w.k, quad);
  const uint8_t* codes = w.codes + column * stride + quad * kQuadBytes;
  // The quad that is read soon: of this strip or, past its end, of the next.
  const int64_t soon = quad + kPrefetchQuads, past = soon - strips::quads(w.k);
  const uint8_t* next =
      codes + (past < 0 ? kPrefetchQuads : past - quad) * kQuadBytes + (past < 0 ? 0 : strips::kColumns * stride);
#pragma GCC unroll 16
  for (int c = 0; c < strips::kColumns; ++c) _mm_prefetch(next + c * stride, _MM_HINT_T1);
  if (columns == strips::kColumns && blocks == kQuad) {
    for (int c = 0; c < strips::kColumns; ++c) out.dwords[c] = _mm512_loadu_si512(codes + c * stride);
  } else {
    const __mmask16 present = static_cast<__mmask16>((1u << (blocks * 4)) - 1u);
    for (int c = 0; c < strips::kColumns; ++c) {
      out.dwords[c] = c < columns ? _mm512_maskz_loadu_epi32(present, codes + c * stride) : _mm512_setzero_si512();
    }
  }
  transpose(out.dwords);
  out.scale_bytes = load_scales(w, column, columns, quad * kQuad, blocks);
  return out;
}

// Calls function with the quad of a strip, whichever layout it comes from.
template <class Function>
[[gnu::always_inline]] inline void with_strip(const Weight& w, int64_t strip, int64_t quad, const Function& function) {
  if (w.strips() == nullptr) return function(load_rows(w, strip, quad));
  const uint8_t* record = w.strips() + strips::record_offset(strip, quad, w.k);
  // This strip is read on after the other strips of its panels.
#pragma GCC unroll 17
  for (int line = 0; line < strips::kRecordBytes; line += 64) {
    _mm_prefetch(record + kPrefetchQuads * strips::kRecordBytes + line, _MM_HINT_T1);
  }
  alignas(64) uint8_t whole[strips::kRecordBytes];
  if (const int blocks = strips::blocks_of(w.k, quad); blocks < kQuad) {
    complete_record(record, blocks, whole);
    record = whole;
  }
  function(PrepackedStrip{record});
}

}  // namespace
}  // namespace xpu_fp4::cpu
