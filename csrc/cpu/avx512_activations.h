// SPDX-License-Identifier: Apache-2.0
// A for W4A4 and W4A8 on AVX-512: a row's quad of MXFP4 or MXINT8 codes to the integers and factors of panels.h.
#pragma once
#include "avx512_operands.h"
#include "avx512_quantize.h"
#include "operand_source.h"

namespace xpu_fp4::cpu {
namespace {

// align() for a row; zero_blocks() is asked only where the scales alone do not decide.
template <class ZeroBlocks>
Alignment align_row(const uint8_t* scale, int max_shift, const ZeroBlocks& zero_blocks) {
  const auto [low, high] = std::minmax({scale[0], scale[1], scale[2], scale[3]});
  if (low < kLeastSafeByte || high > kLargestSafeByte || high - low > max_shift) return align(scale, zero_blocks(), max_shift);
  // Four bytes at once: what is stored byte by byte cannot be forwarded to a load of all of them, which waits for every store
  // before it.
  Alignment out;
  out.level = Level::quad;
  uint32_t scales;
  std::memcpy(&scales, scale, sizeof(scales));
  const uint32_t base = low * 0x01010101u, shift = scales - base;
  std::memcpy(out.base, &base, sizeof(base));
  std::memcpy(out.shift, &shift, sizeof(shift));
  return out;
}

// The blocks that have no bit set among their kBits of a mask.
template <int kBits>
unsigned clear_blocks(uint32_t mask) {
  unsigned clear = 0;
  for (int b = 0; b < kQuad; ++b) clear |= ((mask >> (kBits * b) & ((1u << kBits) - 1u)) == 0 ? 1u : 0u) << b;
  return clear;
}

// Each dword of a 128-bit lane: the sum of the lane's four.
__m512i sum_lanes(__m512i x) {
  x = _mm512_add_epi32(x, _mm512_shuffle_epi32(x, _MM_PERM_CDAB));
  return _mm512_add_epi32(x, _mm512_shuffle_epi32(x, _MM_PERM_BADC));
}

// The factors of a row whose blocks have one base, a safe one or NaN: set_factors() for what is common. Lane b of sums is
// block b's.
inline void set_shared_factors(uint8_t base, __m512i sums, const IntegerForm& form, QuadFactor& quad,
                               BlockFactor (&block)[kQuad]) {
  const BlockFactor shared = block_factor(base, 0, form);
  const __m512i start = _mm512_sub_epi32(_mm512_set1_epi32(kMagicBits), _mm512_mullo_epi32(_mm512_set1_epi32(form.bias), sums));
  constexpr __mmask16 kStart = 0x8888;  // the last member of four
  static_assert(offsetof(BlockFactor, start) == 12 && sizeof(BlockFactor) == 16);
  _mm512_storeu_si512(
      block,
      _mm512_mask_mov_epi32(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(&shared))), kStart, start));
  const int32_t sum = _mm512_mask_reduce_add_epi32(kStart, sums);
  quad = {shared.scale, -kMagic * shared.scale, kMagicBits - form.bias * sum};
}

// A row's level and factors. Every dword of lane b of sums is the sum of block b's integers.
template <class GroupQuad>
void set_row_factors(const Alignment& alignment, __m512i sums, const IntegerForm& form, GroupQuad& out, int row) {
  if (alignment.level == Level::quad) {
    set_shared_factors(alignment.base[0], sums, form, out.quad[row], out.block[row]);
  } else {
    alignas(16) int32_t of_blocks[kQuad];
    _mm_store_si128(reinterpret_cast<__m128i*>(of_blocks), _mm512_castsi512_si128(_mm512_maskz_compress_epi32(0x1111, sums)));
    set_factors(alignment, of_blocks, form, out.quad[row], out.block[row]);
  }
  out.set_level(row, alignment.level);
}

// Expands one row's quad: 64 packed bytes and its scales.
template <class GroupQuad>
void expand_e2m1(const uint8_t* packed, const uint8_t* scale, const IntegerForm& form, GroupQuad& out, int row) {
  const __m512i bytes = _mm512_loadu_si512(packed);
  // A block is one 128-bit lane, four of the sixteen dwords.
  const Alignment alignment =
      align_row(scale, kMaxShift, [&] { return clear_blocks<4>(_mm512_test_epi32_mask(bytes, _mm512_set1_epi8(0x77))); });

  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i low = _mm512_shuffle_epi8(twice_table(), _mm512_and_si512(bytes, nibble));
  __m512i high = _mm512_shuffle_epi8(twice_table(), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble));
  uint32_t shifts;
  std::memcpy(&shifts, alignment.shift, sizeof(shifts));
  if (shifts != 0) {
    const __m512i lane = _mm512_set_epi64(0x0303030303030303, 0x0303030303030303, 0x0202020202020202, 0x0202020202020202,
                                          0x0101010101010101, 0x0101010101010101, 0, 0);
    const __m512i counts = _mm512_shuffle_epi8(_mm512_set1_epi32(static_cast<int>(shifts)), lane);
    low = shift_bytes(low, counts);
    high = shift_bytes(high, counts);
  }
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  _mm512_store_si512(out.at(row, 0), _mm512_permutex2var_epi32(low, first, high));
  _mm512_store_si512(out.at(row, 64), _mm512_permutex2var_epi32(low, second, high));

  const __m512i ones = _mm512_set1_epi8(1);
  const __m512i sums = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, low), ones, high);
  set_row_factors(alignment, sum_lanes(sums), form, out, row);
}

// Expands one row's quad: 128 codes, which are the integers, and its scales.
template <class GroupQuad>
void expand_int8(const uint8_t* codes, const uint8_t* scale, const IntegerForm& form, GroupQuad& out, int row) {
  const __m512i even_then_odd = _mm512_broadcast_i32x4(_mm_set_epi8(15, 13, 11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0));
  const __m512i first = _mm512_shuffle_epi8(_mm512_loadu_si512(codes), even_then_odd);
  const __m512i second = _mm512_shuffle_epi8(_mm512_loadu_si512(codes + 64), even_then_odd);
  _mm512_store_si512(out.at(row, 0), first);
  _mm512_store_si512(out.at(row, 64), second);
  // A block is two 128-bit lanes, eight of the 32 dwords.
  const Alignment alignment = align_row(scale, max_shift(Format::mxint8), [&] {
    const uint32_t low = _mm512_test_epi32_mask(first, first), high = _mm512_test_epi32_mask(second, second);
    return clear_blocks<8>(low | high << 16);
  });

  const __m512i zero = _mm512_setzero_si512(), ones = _mm512_set1_epi8(1);
  const __m512i low = _mm512_dpbusd_epi32(zero, ones, first), high = _mm512_dpbusd_epi32(zero, ones, second);
  // The even lanes of both, and the odd ones: one of each is a block's.
  const __m512i sums = _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xDD));
  set_row_factors(alignment, sum_lanes(sums), form, out, row);
}

// A row's quad, which begins at a block of A, for W whose integers are kBias too large.
template <int kBias, class GroupQuad>
void expand_quad(const Activations& source, int64_t block, int blocks, GroupQuad& out, int row) {
  with_codes<quantize>(source, block, blocks, [&](const uint8_t* codes, const uint8_t* scale) {
    const IntegerForm form = integer_form(source.to.format, kBias, kFactorExponent);
    source.to.format == Format::mxint8 ? expand_int8(codes, scale, form, out, row) : expand_e2m1(codes, scale, form, out, row);
  });
}

}  // namespace
}  // namespace xpu_fp4::cpu
