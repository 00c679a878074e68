// SPDX-License-Identifier: Apache-2.0
// Quantize on AVX-512.
//
// MXFP4 is quantized four blocks at a time, in 16-bit lanes: a block is one vector of bfloat16. Wider inputs are cut to
// bfloat16, with the last bit set where anything was cut off. No rounding of MXFP4 can tell the difference: all of them look at
// the first two bits of a mantissa, and at whether the others are zero. FP-Quant's rules, which multiply and add, take the
// generic way. MXINT8 is quantized as float32, a group at a time.
#pragma once
#include "avx512_output.h"
#include "generic_fp_quant.h"
#include "mxint8_groups.h"

namespace xpu_fp4::cpu {
namespace {

// The words of sixteen floats, in dwords.
__m512i cut(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x), word = _mm512_srli_epi32(bits, 16);
  const __mmask16 inexact = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0xFFFF));
  return _mm512_mask_or_epi32(word, inexact, word, _mm512_set1_epi32(1));
}

// How far ahead of its use memory is fetched.
constexpr int kPrefetchBytes = 2048;

template <DType T>
__m512i load_words(const void* x, int64_t block) {
  if constexpr (T == DType::bf16) return _mm512_loadu_si512(static_cast<const uint16_t*>(x) + block * kBlock);
  const __m512i low = cut(load_floats<T>(x, block * kBlock, 0xFFFF));
  const __m512i high = cut(load_floats<T>(x, block * kBlock + 16, 0xFFFF));
  // Packing takes four of each in turn.
  return _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), _mm512_packus_epi32(low, high));
}

__m512i magnitude_words(__m512i x) { return _mm512_and_si512(x, _mm512_set1_epi16(0x7FFF)); }

__m512i max_of_halves(__m512i a, __m512i b) {
  return _mm512_max_epu16(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xEE));
}

// The largest word of each of four blocks, in every word of the 128-bit lane of the block's number.
__m512i amax_words(const __m512i (&x)[4]) {
  const __m512i ab = max_of_halves(magnitude_words(x[0]), magnitude_words(x[1]));
  const __m512i cd = max_of_halves(magnitude_words(x[2]), magnitude_words(x[3]));
  __m512i lanes = _mm512_max_epu16(_mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xDD));
  lanes = _mm512_max_epu16(lanes, _mm512_shuffle_epi32(lanes, _MM_PERM_BADC));
  lanes = _mm512_max_epu16(lanes, _mm512_shuffle_epi32(lanes, _MM_PERM_CDAB));
  return _mm512_max_epu16(lanes, _mm512_rol_epi32(lanes, 16));
}

// bfloat16's mantissa, and the exponent below which every y = x / scale has code 0.
constexpr int kMantissaBits = 7, kLeastExponent = -3;

// The code of y by its step: from 2^kLeastExponent up, each power of two has four steps.
alignas(64) constexpr auto kCodeOfStep = [] {
  std::array<uint16_t, 32> table{};
  for (unsigned step = 0; step < table.size(); ++step) {
    const float middle = float_of(bits_of(pow2(kLeastExponent)) + ((2 * step + 1) << 20));
    table[step] = static_cast<uint16_t>(e2m1::encode_magnitude(middle));
  }
  return table;
}();

// The codes of a block, in words. origin is the word of 2^kLeastExponent * scale, and 1 more.
__m512i encode(__m512i x, __m512i origin) {
  const __m512i magnitude = magnitude_words(x);
  // Halfway cases begin a step. Those whose mantissa begins with 1 are rounded up; the others belong to the step before.
  const __mmask32 up = _mm512_test_epi16_mask(x, _mm512_set1_epi16(1 << (kMantissaBits - 1)));
  const __m512i y = _mm512_subs_epu16(_mm512_mask_add_epi16(magnitude, up, magnitude, _mm512_set1_epi16(1)), origin);
  const __m512i code = _mm512_permutexvar_epi16(_mm512_srli_epi16(y, kMantissaBits - 2), _mm512_load_si512(kCodeOfStep.data()));
  // The low three bits of code, and the sign above them.
  return _mm512_ternarylogic_epi32(_mm512_set1_epi16(7), code, _mm512_srli_epi16(x, 12), 0xCA);
}

// Two blocks' packed bytes, in words.
__m512i pack_two(__m512i a, __m512i b) {
  return _mm512_maddubs_epi16(_mm512_packus_epi16(a, b), _mm512_set1_epi16(0x1001));  // even + 16 * odd
}

// Bytes that four vectors of dwords (or words, by twos) were packed to: dword b of lane i is dword i of vector b.
__m512i packed_order() { return _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0); }

// Four blocks of codes to packed bytes; dwords outside the mask are zero.
__m512i pack(const __m512i (&codes)[4], __mmask16 mask) {
  const __m512i ab = pack_two(codes[0], codes[1]), cd = pack_two(codes[2], codes[3]);
  return _mm512_maskz_permutexvar_epi32(mask, packed_order(), _mm512_packus_epi16(ab, cd));
}

// Quantizes up to four blocks. Returns whether any may be wrong: so small that 2^kLeastExponent * scale, or an element, is
// subnormal, so that its word has no exponent.
template <DType T>
[[gnu::always_inline]] inline bool quantize_blocks(const Quantize& args, __m512i rounding, int64_t first, int blocks) {
  const char* const ahead = static_cast<const char*>(args.x) + first * kBlock * size_of(T) + kPrefetchBytes;
  for (int line = 0; line < 4 * kBlock * size_of(T); line += 64) _mm_prefetch(ahead + line, _MM_HINT_T0);
  __m512i x[4];
  for (int b = 0; b < 4; ++b) x[b] = b < blocks ? load_words<T>(args.x, first + b) : _mm512_setzero_si512();
  const __m512i amax = amax_words(x);
  const __mmask16 finite = _mm512_cmplt_epu32_mask(amax, _mm512_set1_epi32(0x7F807F80));
  const __m512i exponent = _mm512_srli_epi16(_mm512_add_epi16(amax, rounding), kMantissaBits);
  const __m512i least = _mm512_subs_epu16(exponent, _mm512_set1_epi16(e8m0::kMaxExponent - kLeastExponent));
  const __m512i origin = _mm512_add_epi16(_mm512_slli_epi16(least, kMantissaBits), _mm512_set1_epi16(1));
  const __m512i codes[4] = {
      encode(x[0], _mm512_shuffle_i32x4(origin, origin, 0x00)), encode(x[1], _mm512_shuffle_i32x4(origin, origin, 0x55)),
      encode(x[2], _mm512_shuffle_i32x4(origin, origin, 0xAA)), encode(x[3], _mm512_shuffle_i32x4(origin, origin, 0xFF))};
  const __mmask16 present = static_cast<__mmask16>((1u << (4 * blocks)) - 1u);
  // A masked store is not forwarded to who reads it next.
  if (blocks == 4) {
    _mm512_storeu_si512(args.codes + first * kBlockBytes, pack(codes, finite));
  } else {
    _mm512_mask_storeu_epi32(args.codes + first * kBlockBytes, present, pack(codes, finite));
  }

  const __m512i scale = _mm512_subs_epu16(exponent, _mm512_set1_epi16(e8m0::kMaxExponent));
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_mask_mov_epi32(_mm512_set1_epi32(e8m0::kNan), finite, scale));
  const int32_t scales = _mm_cvtsi128_si32(_mm_shuffle_epi8(bytes, _mm_set1_epi32(0x0C080400)));
  std::memcpy(args.scale + first, &scales, static_cast<size_t>(blocks));
  return _mm512_mask_testn_epi32_mask(_mm512_test_epi32_mask(amax, amax), least, least) != 0;
}

template <DType T>
[[gnu::noinline]] void requantize_small(const Quantize& args, Range blocks) {
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    if (args.scale[block] > e8m0::kMaxExponent - kLeastExponent) continue;
    store_codes(load_block<T>(args.x, block), args.scale[block], args.codes + block * kBlockBytes, quantize_element);
  }
}

void quantize_mxfp4(const Quantize& args, Range blocks) {
  with_dtype(args.dtype, [&](auto dtype) __attribute__((flatten)) {
    const __m512i rounding = _mm512_set1_epi16(static_cast<int16_t>(e8m0::rounding(args.to.mode) >> 16));
    int64_t block = blocks.begin;
    bool small = false;
    for (; block + 4 <= blocks.end; block += 4) small |= quantize_blocks<dtype>(args, rounding, block, 4);
    if (block < blocks.end) small |= quantize_blocks<dtype>(args, rounding, block, static_cast<int>(blocks.end - block));
    if (small) requantize_small<dtype>(args, blocks);
  });
}

// ---- MXINT8 ----

// Elements times the scale's reciprocal, which is two factors (format/mxint8.h), as the nearest integers.
__m512i to_integers(__m512 x, const mxint8::Reciprocal& reciprocal) {
  return _mm512_cvtps_epi32(
      _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(reciprocal.first)), _mm512_set1_ps(reciprocal.second)));
}

// A group of kBlocks blocks, two vectors each.
template <DType T, int kBlocks>
[[gnu::always_inline]] inline void quantize_group(const Quantize& args, int64_t first) {
  const char* const ahead = static_cast<const char*>(args.x) + first * kBlock * size_of(T) + kPrefetchBytes;
  for (int line = 0; line < kBlocks * kBlock * size_of(T); line += 64) _mm_prefetch(ahead + line, _MM_HINT_T0);
  __m512 x[2 * kQuad];
  __m512i most = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < 2 * kQuad; ++i) {
    x[i] = i < 2 * kBlocks ? load_floats<T>(args.x, first * kBlock + 16 * i, 0xFFFF) : _mm512_setzero_ps();
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(x[i]), _mm512_set1_epi32(0x7FFFFFFF)));
  }
  const uint8_t scale = mxint8::scale_byte(_mm512_reduce_max_epu32(most));
  const mxint8::Reciprocal reciprocal = mxint8::reciprocal(scale);
  const __mmask16 finite = scale == e8m0::kNan ? 0 : 0xFFFF;
#pragma GCC unroll 2
  for (int i = 0; i < 2 * kBlocks; i += 4) {
    const __m512i ab = _mm512_packs_epi32(to_integers(x[i], reciprocal), to_integers(x[i + 1], reciprocal));
    const __m512i cd = _mm512_packs_epi32(to_integers(x[i + 2], reciprocal), to_integers(x[i + 3], reciprocal));
    const __m512i bytes = _mm512_maskz_permutexvar_epi32(finite, packed_order(), _mm512_packs_epi16(ab, cd));
    const __mmask16 present = 2 * kBlocks - i >= 4 ? 0xFFFF : 0x00FF;
    const __m512i codes = _mm512_max_epi8(bytes, _mm512_set1_epi8(-127));
    uint8_t* const to = args.codes + first * kBlock + 16 * i;
    present == 0xFFFF ? _mm512_storeu_si512(to, codes) : _mm512_mask_storeu_epi32(to, present, codes);
  }
  std::memset(args.scale + first, scale, kBlocks);
}

void quantize_mxint8(const Quantize& args, Range blocks) {
  with_dtype(args.dtype, [&](auto dtype) {
    for_groups(args, blocks, [&](int64_t first, auto count) { quantize_group<dtype, count>(args, first); });
  });
}

void quantize(const Quantize& given, Range blocks) {
  const Quantize args = given;  // a copy: the bytes that are stored cannot change it
  if (args.to.format == Format::mxint8) return quantize_mxint8(args, blocks);
  fp_quant::is_rule(args.to.mode) ? quantize_fp_quant(args, blocks) : quantize_mxfp4(args, blocks);
}

}  // namespace
}  // namespace xpu_fp4::cpu
