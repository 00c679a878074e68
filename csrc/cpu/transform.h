// SPDX-License-Identifier: Apache-2.0
// What comes before a quantizer: a gate makes one row of two, or a factor scales a row; an offset is subtracted, then blocks of
// the row are multiplied by a Hadamard matrix. Results go through a buffer in the first-level cache, so that no kernel behind
// it knows of them.
#pragma once
#include "gate.h"

namespace xpu_fp4::cpu {
namespace {

// x * signs + y, rounded once: the product with 1 or -1 is exact.
[[gnu::always_inline]] inline Lanes add_signed(Lanes y, Lanes x, Lanes signs) {
#if XPU_FP4_FLOAT_LANES == 16
  return _mm512_fmadd_ps(x, signs, y);
#elif XPU_FP4_FLOAT_LANES == 8
  return _mm256_fmadd_ps(x, signs, y);
#else
  return y + x * signs;
#endif
}

// Does one butterfly between a vector's lanes. Where bit `distance` of a lane's number is set, the lane holds v of a pair (u,
// v) and becomes u - v.
template <int distance, int... lane>
[[gnu::always_inline]] inline Lanes butterfly(Lanes x, std::integer_sequence<int, lane...>) {
  constexpr Lanes kSigns = {((lane & distance) != 0 ? -1.0f : 1.0f)...};
  return add_signed(__builtin_shufflevector(x, x, (lane ^ distance)...), x, kSigns);
}

[[gnu::always_inline]] inline Lanes butterflies_within(Lanes x) {
  constexpr auto kLane = std::make_integer_sequence<int, kFloatLanes>();
  x = butterfly<2>(butterfly<1>(x, kLane), kLane);
  if constexpr (kFloatLanes > 4) x = butterfly<4>(x, kLane);
  if constexpr (kFloatLanes > 8) x = butterfly<8>(x, kLane);
  return x;
}

template <int count>
[[gnu::always_inline]] inline void butterflies_between(Lanes (&v)[count]) {
#pragma GCC unroll 4
  for (int distance = 1; distance < count; distance *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      if ((i & distance) != 0) continue;
      const Lanes u = v[i], w = v[i + distance];
      v[i] = u + w;
      v[i + distance] = u - w;
    }
  }
}

template <int count>
[[gnu::always_inline]] inline void store_vectors(const Lanes (&v)[count], float factor, int stride, float* out) {
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) {
    const Lanes scaled = v[i] * factor;
    std::memcpy(out + i * stride, &scaled, sizeof(scaled));
  }
}

// `size` neighbouring elements times an orthonormal Sylvester matrix, in the order of format/hadamard.h: pairs one element
// apart first. As many as eight vectors hold are taken as far as they go; what is left are butterflies between those parts.
template <DType T, int size>
[[gnu::always_inline]] inline void turn(const void* x, int64_t first, const float* offset, float* out) {
  constexpr int kPart = std::min(size, 8 * kFloatLanes), kVectors = kPart / kFloatLanes;
  for (int part = 0; part < size; part += kPart) {
    Lanes v[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      v[i] = load_lanes<T>(x, first + part + i * kFloatLanes);
      if (offset != nullptr) v[i] -= load_lanes<DType::f32>(offset, part + i * kFloatLanes);
      v[i] = butterflies_within(v[i]);
    }
    butterflies_between(v);
    store_vectors(v, kPart == size ? hadamard::factor(size) : 1.0f, kFloatLanes, out + part);
  }
  if constexpr (kPart < size) {
    for (int i = 0; i < kPart; i += kFloatLanes) {
      Lanes v[size / kPart];
#pragma GCC unroll 4
      for (int part = 0; part < size / kPart; ++part) v[part] = load_lanes<DType::f32>(out, part * kPart + i);
      butterflies_between(v);
      store_vectors(v, hadamard::factor(size), kPart, out + i);
    }
  }
}

template <DType T, int size>
void turn_blocks(const void* x, int64_t first, const float* offset, int count, float* out) {
  for (int i = 0; i < count; i += size) turn<T, size>(x, first + i, offset == nullptr ? nullptr : offset + i, out + i);
}

// Elements [first, first + count) of x, whose first is in this column of its row, to out, where x may lie itself. Both are
// multiples of the transform's blocks.
void turn_elements(const Transform& transform, const void* x, DType dtype, int64_t first, int64_t column, int count,
                   float* out) {
  const float* offset = transform.offset == nullptr ? nullptr : transform.offset + column;
  with_dtype(dtype, [&](auto type) {
    switch (transform.hadamard) {
      case 32: return turn_blocks<type, 32>(x, first, offset, count, out);
      case 64: return turn_blocks<type, 64>(x, first, offset, count, out);
      case 128: return turn_blocks<type, 128>(x, first, offset, count, out);
    }
    for (int i = 0; i < count; ++i) out[i] = load<type>(x, first + i) - offset[i];
  });
}

// Elements [first, first + count) of x times a factor, rounded to x's dtype.
void scale_elements(float factor, const void* x, DType dtype, int64_t first, int count, float* out) {
  with_dtype(dtype, [&](auto type) {
    for (int i = 0; i < count; i += kFloatLanes) {
      const Lanes scaled = rounded<type>(load_lanes<type>(x, first + i) * factor);
      std::memcpy(out + i, &scaled, sizeof(scaled));
    }
  });
}

void round_elements(DType dtype, int count, float* x) {
  with_dtype(dtype, [&](auto type) {
    for (int i = 0; i < count; i += kFloatLanes) {
      const Lanes value = rounded<type>(load_lanes<DType::f32>(x, i));
      std::memcpy(x + i, &value, sizeof(value));
    }
  });
}

// Elements [column, column + count) of a row of x [rows, k], or [rows, 2k] with a gate; all are multiples of 32.
void transform_elements(const Transform& transform, const void* x, DType dtype, int64_t row, int64_t k, int64_t column,
                        int count, float* out) {
  if (transform.gate.is_none()) return turn_elements(transform, x, dtype, row * k + column, column, count, out);
  gate_elements(transform.gate, x, dtype, row, k, column, count, out);
  if (transform.turns()) turn_elements(transform, out, DType::f32, 0, column, count, out);
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
    const int64_t row = block / row_blocks, column = block % row_blocks;
    const int64_t count = std::min<int64_t>({kMostBlocks, row_blocks - column, blocks.end - block});
    transform_elements(args.to.transform, args.x, args.dtype, row, args.k, column * kBlock, static_cast<int>(count * kBlock),
                       floats);
    quantize(
        {floats, DType::f32, to, 1, count * kBlock, args.codes + code_bytes(to.format, block * kBlock), args.scale + block},
        {0, count});
    block += count;
  }
}

// Calls function(activations, block) for a quad of a row of A, which has so many blocks: it begins at that block of the
// activations, whose transform and factors have been applied. Where there is nothing to quantize to, elements are of A's dtype.
template <class Function>
void with_transformed(const Activations& source, int64_t row, int64_t quad, int blocks, const Function& function) {
  const Transform& transform = source.to.transform;
  const int64_t column = quad * kQuadElements, at = source.rows == nullptr ? row : source.rows[row];
  if (source.are_codes || (transform.is_none() && source.factors == nullptr)) {
    return function(source, (at * source.k + column) / kBlock);
  }
  alignas(64) float floats[kQuadElements];
  const int count = blocks * kBlock;
  if (source.factors == nullptr) {
    transform_elements(transform, source.data, source.dtype, at, source.k, column, count, floats);
  } else {
    scale_elements(source.factors[row], source.data, source.dtype, at * source.k + column, count, floats);
    if (transform.turns()) turn_elements(transform, floats, DType::f32, 0, column, count, floats);
  }
  if (source.to.format == Format::none && transform.turns()) round_elements(source.dtype, count, floats);
  Activations plain = source;
  plain.data = floats;
  plain.dtype = DType::f32;
  plain.to.transform = {};
  function(plain, 0);
}

}  // namespace
}  // namespace xpu_fp4::cpu
