// SPDX-License-Identifier: Apache-2.0
// W for AVX-512: packed codes to the integers of panels.h. Included after a target pragma (AVX-512 F, BW, DQ, VL, VNNI; with
// VBMI where the Isa says so); all of it has internal linkage.
#pragma once
#include "simd_includes.h"

namespace xpu_fp4::cpu {
namespace {

constexpr auto kTwiceSigned = [] {
  std::array<int8_t, 16> table{};
  for (unsigned code = 0; code < 16; ++code) table[code] = static_cast<int8_t>(e2m1::twice(code));
  return table;
}();

__m512i twice_table() { return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kTwiceSigned.data()))); }

// Signed bytes shifted left by 0 .. 3, the count repeated in every byte of a dword: bits that cross into the next byte are
// cleared.
__m512i shift_bytes(__m512i bytes, __m512i counts) {
  const __m512i kept = _mm512_shuffle_epi8(_mm512_set1_epi32(static_cast<int>(0xF8FCFEFFu)), counts);
  return _mm512_and_si512(_mm512_sllv_epi32(bytes, _mm512_and_si512(counts, _mm512_set1_epi32(3))), kept);
}

// How far ahead of its use a record of prepacked weights is fetched.
constexpr int kPrefetchQuads = 4;

// The factors of integer products are twice 2^ew, so that they are never subnormal.
constexpr int kFactorExponent = 1;

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

// All four bytes of each dword: the least and the largest of the four.
struct Extremes {
  __m512i least, largest;
};
Extremes of_dwords(__m512i bytes) {
  const __m512i half = _mm512_rol_epi32(bytes, 16);
  const __m512i least = _mm512_min_epu8(bytes, half), largest = _mm512_max_epu8(bytes, half);
  return {_mm512_min_epu8(least, _mm512_rol_epi32(least, 8)), _mm512_max_epu8(largest, _mm512_rol_epi32(largest, 8))};
}
Extremes of_words(__m512i bytes) {
  const __m512i swapped = _mm512_or_si512(_mm512_slli_epi16(bytes, 8), _mm512_srli_epi16(bytes, 8));
  return {_mm512_min_epu8(bytes, swapped), _mm512_max_epu8(bytes, swapped)};
}

bool all_within(__m512i bytes, int limit) {
  return _mm512_cmpgt_epu8_mask(bytes, _mm512_set1_epi8(static_cast<char>(limit))) == 0;
}
bool all_safe(__m512i scales) {
  return all_within(_mm512_sub_epi8(scales, _mm512_set1_epi8(static_cast<char>(kLeastSafeByte))),
                    kLargestSafeByte - kLeastSafeByte);
}

// Per block the columns whose sixteen bytes are all zero.
template <class Strip>
void zero_columns(const Strip& packed, __mmask16 (&zero)[kQuad]) {
  for (int b = 0; b < kQuad; ++b) {
    const __m512i any = _mm512_or_si512(_mm512_or_si512(packed.codes(4 * b), packed.codes(4 * b + 1)),
                                        _mm512_or_si512(packed.codes(4 * b + 2), packed.codes(4 * b + 3)));
    zero[b] = _mm512_testn_epi32_mask(any, _mm512_set1_epi32(0x77777777));
  }
}

// align() for sixteen columns: bytes of base and shift, block b in byte b of a column's dword.
struct StripAlignment {
  Level level;
  __m512i base, shift;
  __mmask16 nan;
};

StripAlignment align_safe(__m512i scales) {
  const Extremes quad = of_dwords(scales);
  if (all_within(_mm512_sub_epi8(quad.largest, quad.least), kMaxShift)) {
    return {Level::quad, quad.least, _mm512_sub_epi8(scales, quad.least), 0};
  }
  const Extremes pair = of_words(scales);
  if (all_within(_mm512_sub_epi8(pair.largest, pair.least), kMaxShift)) {
    return {Level::pair, pair.least, _mm512_sub_epi8(scales, pair.least), 0};
  }
  return {Level::block, scales, _mm512_setzero_si512(), 0};
}

// Scales outside the safe window: NaN columns and zero blocks may take any scale; what is left may need the general path.
template <class Strip>
[[gnu::noinline]] StripAlignment align_unsafe(const Strip& packed) {
  const __m512i given = packed.scales();
  const __m512i nan_bytes = _mm512_movm_epi8(_mm512_cmpeq_epi8_mask(given, _mm512_set1_epi8(-1)));
  const __mmask16 nan = _mm512_test_epi32_mask(nan_bytes, nan_bytes);
  __mmask16 zero[kQuad];
  zero_columns(packed, zero);
  __m512i zero_bytes = _mm512_setzero_si512();
  for (int b = 0; b < kQuad; ++b) {
    zero_bytes = _mm512_mask_or_epi32(zero_bytes, zero[b], zero_bytes, _mm512_set1_epi32(static_cast<int>(0xFFu << (8 * b))));
  }
  // Zero blocks take the largest scale of the column's others, or 1.
  const __m512i others = of_dwords(_mm512_andnot_si512(zero_bytes, given)).largest;
  const __mmask16 all_zero = zero[0] & zero[1] & zero[2] & zero[3];
  const __m512i one = _mm512_set1_epi8(e8m0::kBias);
  __m512i scales = _mm512_ternarylogic_epi32(zero_bytes, others, given, 0xCA);
  scales = _mm512_mask_mov_epi32(scales, all_zero | nan, one);
  StripAlignment out;
  if (all_safe(scales)) {
    out = align_safe(scales);
  } else {  // byte 254 leaves no room for kFactorExponent: it is 253 with integers twice as large
    const __m512i base = _mm512_min_epu8(scales, _mm512_set1_epi8(static_cast<char>(254 - kFactorExponent)));
    out = {Level::general, base, _mm512_sub_epi8(scales, base), 0};
  }
  out.nan = nan;
  return out;
}

// 2^(ew + exponent) of block b, from its base byte; exponent is 0 or 1.
template <int kExponent = 0>
__m512 column_factor(const StripAlignment& alignment, int b) {
  const __m512i byte = _mm512_and_si512(_mm512_srlv_epi32(alignment.base, _mm512_set1_epi32(8 * b)), _mm512_set1_epi32(255));
  __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(byte, _mm512_set1_epi32(kExponent)), 23);
  if constexpr (kExponent == 0) {  // byte 0 is 2^-127, a subnormal
    bits = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(byte, byte), _mm512_set1_epi32(1 << 22));
  }
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, alignment.nan, _mm512_set1_epi32(kNanBits)));
}

// Integers of four codes a column: bias + twice the value << the column's shift.
template <int kBias, bool kVbmi>
struct Decoder;

// Decodes by one table of 64 bytes, indexed by shift << 4 | code.
template <int kBias>
struct Decoder<kBias, true> {
  static constexpr auto kTable = [] {
    std::array<uint8_t, 64> table{};
    for (unsigned i = 0; i < 64; ++i) table[i] = static_cast<uint8_t>(kBias + e2m1::twice(i & 15u) * (1 << (i >> 4)));
    return table;
  }();
  __m512i table = _mm512_loadu_si512(kTable.data());
  __m512i shift;

  explicit Decoder(__m512i shifts) : shift(_mm512_slli_epi16(shifts, 4)) {}
  __m512i operator()(__m512i nibbles) const {
    const __m512i index = _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi8(15), shift, 0xEA);  // (a & b) | c
    return _mm512_permutexvar_epi8(index, table);
  }
};

template <int kBias>
struct Decoder<kBias, false> {
  __m512i shift;

  explicit Decoder(__m512i shifts) : shift(shifts) {}
  __m512i operator()(__m512i nibbles) const {
    const __m512i twice = _mm512_shuffle_epi8(twice_table(), _mm512_and_si512(nibbles, _mm512_set1_epi8(15)));
    return _mm512_add_epi8(shift_bytes(twice, shift), _mm512_set1_epi8(kBias));
  }
};

template <class Strip>
StripAlignment align_strip(const Strip& packed) {
  const __m512i scales = packed.scales();
  return all_safe(scales) ? align_safe(scales) : align_unsafe(packed);
}

// Every block at its own scale, NaN where the column has one anywhere in the quad.
inline StripAlignment as_they_are(__m512i scales) {
  const __mmask64 nan = _mm512_cmpeq_epi8_mask(scales, _mm512_set1_epi8(-1));
  const __m512i nan_bytes = _mm512_movm_epi8(nan);
  return {Level::block, scales, _mm512_setzero_si512(), _mm512_test_epi32_mask(nan_bytes, nan_bytes)};
}

// A column's shift in block b, in all four bytes of its dword.
__m512i shifts_of(const StripAlignment& alignment, int b) {
  const __m512i first_byte = _mm512_broadcast_i32x4(_mm_set_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0));
  return _mm512_shuffle_epi8(alignment.shift, _mm512_add_epi8(first_byte, _mm512_set1_epi8(static_cast<char>(b))));
}

template <int kBias, bool kVbmi, class Strip>
void fill_quad(const Strip& packed, const StripAlignment& alignment, WeightQuad& out) {
#pragma GCC unroll 4
  for (int b = 0; b < kQuad; ++b) {
    _mm512_store_ps(out.factor[b], column_factor<kFactorExponent>(alignment, b));
    const Decoder<kBias, kVbmi> decode(shifts_of(alignment, b));
#pragma GCC unroll 4
    for (int d = 4 * b; d < 4 * b + 4; ++d) {
      const __m512i codes = packed.codes(d);
      _mm512_store_si512(out.codes[2 * d], decode(codes));
      _mm512_store_si512(out.codes[2 * d + 1], decode(_mm512_srli_epi16(codes, 4)));
    }
  }
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

template <int kBias, bool kVbmi>
Level fill_quad(const Weight& w, int64_t strip, int64_t quad, WeightQuad& out) {
  Level level{};
  with_strip(w, strip, quad, [&](const auto& packed) {
    const StripAlignment alignment = align_strip(packed);
    fill_quad<kBias, kVbmi>(packed, alignment, out);
    level = alignment.level;
  });
  return level;
}

}  // namespace
}  // namespace xpu_fp4::cpu
