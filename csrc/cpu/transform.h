// SPDX-License-Identifier: Apache-2.0
// The transform that comes before a quantizer: an offset is subtracted, then blocks of a row are multiplied by a Hadamard
// matrix. Its results go through a buffer in the first-level cache, so that no kernel behind it knows of it.
#pragma once
#include "with_dtype.h"

namespace xpu_fp4::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kFloatLanes = 16;
#elif defined(__AVX2__)
constexpr int kFloatLanes = 8;
#else
constexpr int kFloatLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * kFloatLanes)));
typedef int32_t LaneBits __attribute__((vector_size(4 * kFloatLanes)));

template <DType T>
void load_floats_to(const void* x, int64_t first, int count, float* out) {
#if defined(__F16C__)
  if constexpr (T == DType::f16) {
    const uint16_t* halves = static_cast<const uint16_t*>(x) + first;
    for (int i = 0; i < count; i += 8) {
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
    }
    return;
  }
#endif
  for (int i = 0; i < count; ++i) out[i] = load<T>(x, first + i);
}

// One butterfly between the lanes of a vector. Where bit `distance` of a lane's number is set, the lane holds v of a pair (u,
// v) and becomes u - v; changing v's sign is exact.
template <int distance, int... lane>
[[gnu::always_inline]] inline Lanes butterfly(Lanes x, std::integer_sequence<int, lane...>) {
  constexpr LaneBits kSigns = {((lane & distance) != 0 ? std::numeric_limits<int32_t>::min() : 0)...};
  const auto signed_x = reinterpret_cast<Lanes>(reinterpret_cast<LaneBits>(x) ^ kSigns);
  return __builtin_shufflevector(x, x, (lane ^ distance)...) + signed_x;
}

// `size` neighbouring elements times an orthonormal Sylvester matrix, in the order of format/hadamard.h: pairs one element
// apart first. In place.
template <int size>
void multiply_by_hadamard(float* x) {
  constexpr int kVectors = size / kFloatLanes;
  constexpr auto kLane = std::make_integer_sequence<int, kFloatLanes>();
  Lanes v[kVectors];
  std::memcpy(v, x, sizeof(v));
#pragma GCC unroll 32
  for (int i = 0; i < kVectors; ++i) {
    v[i] = butterfly<1>(v[i], kLane);
    v[i] = butterfly<2>(v[i], kLane);
    if constexpr (kFloatLanes > 4) v[i] = butterfly<4>(v[i], kLane);
    if constexpr (kFloatLanes > 8) v[i] = butterfly<8>(v[i], kLane);
  }
#pragma GCC unroll 8
  for (int distance = 1; distance < kVectors; distance *= 2) {
#pragma GCC unroll 32
    for (int i = 0; i < kVectors; ++i) {
      if ((i & distance) != 0) continue;
      const Lanes u = v[i], w = v[i + distance];
      v[i] = u + w;
      v[i + distance] = u - w;
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kVectors; ++i) v[i] *= hadamard::factor(size);
  std::memcpy(x, v, sizeof(v));
}

template <int size>
void multiply_blocks_by_hadamard(float* x, int count) {
  for (int i = 0; i < count; i += size) multiply_by_hadamard<size>(x + i);
}

// Elements [first, first + count) of x, whose first is in this column of its row, to out. Both are multiples of the transform's
// blocks.
void transform_elements(const Transform& transform, const void* x, DType dtype, int64_t first, int64_t column, int count,
                        float* out) {
  with_dtype(dtype, [&](auto type) { load_floats_to<type>(x, first, count, out); });
  if (transform.offset != nullptr) {
    for (int i = 0; i < count; ++i) out[i] -= transform.offset[column + i];
  }
  switch (transform.hadamard) {
    case 32: return multiply_blocks_by_hadamard<32>(out, count);
    case 64: return multiply_blocks_by_hadamard<64>(out, count);
    case 128: return multiply_blocks_by_hadamard<128>(out, count);
  }
}

// A quantizer that transforms first where it is to.
template <void (*quantize)(const Quantize&, Range)>
void transform_and_quantize(const Quantize& args, Range blocks) {
  if (args.to.transform.is_none()) return quantize(args, blocks);
  constexpr int kMostBlocks = 8 * kQuad;  // 4 KiB of floats, whole groups and whole blocks of H
  alignas(64) float floats[kMostBlocks * kBlock];
  const int64_t row_blocks = args.k / kBlock;
  Quantizer to = args.to;
  to.transform = {};
  for (int64_t block = blocks.begin; block < blocks.end;) {
    const int64_t column = block % row_blocks;
    const int64_t count = std::min<int64_t>({kMostBlocks, row_blocks - column, blocks.end - block});
    transform_elements(args.to.transform, args.x, args.dtype, block * kBlock, column * kBlock, static_cast<int>(count * kBlock),
                       floats);
    quantize(
        {floats, DType::f32, to, 1, count * kBlock, args.codes + code_bytes(to.format, block * kBlock), args.scale + block},
        {0, count});
    block += count;
  }
}

// Calls function(activations, block) for a quad of A's row: that begins at this block of A and in this column, and has so many
// blocks. What function gets has no transform left; where there is nothing to quantize to, its elements are of A's dtype.
template <class Function>
void with_transformed(const Activations& source, int64_t block, int64_t column, int blocks, const Function& function) {
  if (source.are_codes || source.to.transform.is_none()) return function(source, block);
  alignas(64) float floats[kQuadElements];
  const int count = blocks * kBlock;
  transform_elements(source.to.transform, source.data, source.dtype, block * kBlock, column, count, floats);
  if (source.to.format == Format::none) {
    with_dtype(source.dtype, [&](auto type) {
      uint8_t rounded[sizeof(float)];
      for (int i = 0; i < count; ++i) {
        store<type>(rounded, 0, floats[i]);
        floats[i] = load<type>(rounded, 0);
      }
    });
  }
  Activations plain = source;
  plain.data = floats;
  plain.dtype = DType::f32;
  plain.to.transform = {};
  function(plain, 0);
}

}  // namespace
}  // namespace xpu_fp4::cpu
