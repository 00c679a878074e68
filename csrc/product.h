// SPDX-License-Identifier: Apache-2.0
// What is computed, without torch: activations, a weight, an output. The torch binding fills these structs, every backend takes
// them. A new combination is a new value of a field. All matrices are row-major and dense unless strides (in elements) say
// otherwise.
#pragma once
#include <cstddef>
#include <cstdint>

#include "format/e8m0.h"
#include "format/float_bits.h"
#include "format/formats.h"
#include "format/gate.h"

namespace xpu_fp4 {

/// A row of floats goes through this first. A gate makes the row of k out of one of 2k, rounded to the row's dtype
/// (format/gate.h). Then x -> (x - offset) x H, in float32 (format/hadamard.h): `hadamard` is the size of H's blocks, of which
/// k is a multiple, or 0 where there is no H. offset [k] is null where there is none.
struct Transform {
  int hadamard = 0;
  const float* offset = nullptr;
  Gate gate = {};

  constexpr bool turns() const { return hadamard != 0 || offset != nullptr; }
  constexpr bool is_none() const { return !turns() && gate.is_none(); }
};

/// How floats become codes and scales of a format: MXFP4 with a rule for its scales (format/e8m0.h, format/fp_quant.h), or
/// MXINT8 whose scales are shared by a group of 32 or 128 elements (format/mxint8.h). A transform comes before; its result is
/// quantized as float32.
struct Quantizer {
  Format format;
  ScaleMode mode = ScaleMode::even;
  int group = kDefaultGroup;
  Transform transform = {};

  static constexpr Quantizer mxfp4(ScaleMode mode, const Transform& transform = {}) {
    return {Format::mxfp4, mode, kDefaultGroup, transform};
  }
  static constexpr Quantizer mxint8(int group, const Transform& transform = {}) {
    return {Format::mxint8, ScaleMode::even, group, transform};
  }
};

/// A [m, k], k % 32 == 0. Either codes of the format `to.format`, [m, code_bytes(k)], with scale bytes [m, k/32]; or floats of
/// `dtype`, which are quantized by `to` on the way or, where to.format is none, multiplied as they are or, transformed, rounded
/// to `dtype`. With a gate, a row has 2k floats. Row i of A is row rows[i] of the data, times factors[i] and rounded to `dtype`
/// before all else.
struct Activations {
  bool are_codes;
  const void* data;
  const uint8_t* scale;  // of codes
  DType dtype;           // of floats
  Quantizer to;
  int64_t m, k;
  const int32_t* rows = nullptr;   // [m]; null: row i is the data's row i
  const float* factors = nullptr;  // [m], of floats without a gate; null: none

  static constexpr Activations codes(Format format, const uint8_t* data, const uint8_t* scale, int64_t m, int64_t k) {
    return {true, data, scale, DType::f32, {format}, m, k};
  }
  static constexpr Activations floats(const void* data, DType dtype, const Quantizer& to, int64_t m, int64_t k) {
    return {false, data, nullptr, dtype, to, m, k};
  }
};

/// The forms of a weight: as checkpoints store it; as strips (format/strips.h), the native kernels' layout; stored and expanded
/// beside that, which saves the SYCL kernels for many rows a pre-pass.
enum class WeightForm : int { stored, strips, expanded };

/// An MXFP4 weight W [n, k]. `codes` are packed, [n, k/2], and `scale` bytes have a stride per row of W and one per block
/// of 32. `prepared` is what Backend::prepare made of them: strips stand in their place, the expanded form beside them.
struct Weight {
  WeightForm form;
  int64_t n, k;
  const uint8_t* codes;
  const uint8_t* scale;
  int64_t scale_row_stride, scale_block_stride;
  const uint8_t* prepared = nullptr;

  constexpr const uint8_t* strips() const { return form == WeightForm::strips ? prepared : nullptr; }
  constexpr const uint8_t* expanded() const { return form == WeightForm::expanded ? prepared : nullptr; }
};

/// A float32 bias over the output [m, n]; data is null where there is none.
struct Bias {
  const float* data;
  int64_t row_stride, column_stride;
};

/// Y [m, n] of dtype. What the operands stand for times their real values is undone by `factor`, positive.
struct Output {
  void* y;
  DType dtype;
  Bias bias;
  float factor = 1.0f;
};

/// Y = factor * (A x W^T) + bias, the sum in the order of format/accumulate.h. activations.k == weight.k.
struct Product {
  Activations activations;
  Weight weight;
  Output output;
};

/// A layer of experts, for every token t and its slots j < top_k: expert e = ids[t, j], u = W13[e] x_t + bias rounded to dtype,
/// h = gate(u) rounded to dtype, v_j = W2[e] h + bias in float32; y_t = the sum of weights[t, j] * v_j, an fma each, by
/// ascending j from +0, rounded once to dtype. Both products quantize by `to`, which has no offset. With router_on_input, x_t
/// is multiplied by weights[t, j] and rounded to dtype on the way in, and the sum's factor is 1. A slot whose id is not one of
/// the experts adds nothing. Each product has an input offset of its own or none, the same for all experts.
struct Experts {
  const void* x;  // [tokens, w13.k]
  DType dtype;
  int64_t tokens;
  Quantizer to;
  const int32_t* ids;    // [tokens, top_k]
  const float* weights;  // [tokens, top_k]
  int64_t top_k;
  const int32_t* map;  // [ids that there are] -> the expert here or -1; null: ids are the experts'
  int64_t map_size;
  int64_t experts;
  Weight w13, w2;  // of the first expert, [2 w2.k, w13.k] and [w13.k, w2.k]; stored or strips, and the others follow densely
  const float *w13_bias, *w2_bias;  // [experts, n], null where there is none
  Gate gate;
  bool router_on_input;
  const float *w13_offset, *w2_offset;  // [w13.k] and [w2.k], null where there is none
  void* y;                              // [tokens, w2.n]

  constexpr Quantizer quantizer_of_x() const { return with_offset(w13_offset); }
  constexpr Quantizer quantizer_of_h() const { return with_offset(w2_offset); }
  constexpr bool turns() const { return to.transform.turns() || w13_offset != nullptr || w2_offset != nullptr; }

 private:
  constexpr Quantizer with_offset(const float* offset) const {
    Quantizer own = to;
    own.transform.offset = offset;
    return own;
  }
};

/// x [rows, k] of dtype, or [rows, 2k] with a gate -> codes [rows, code_bytes(k)] of the quantizer's format and scale bytes
/// [rows, k/32]. k % 32 == 0.
struct Quantize {
  const void* x;
  DType dtype;
  Quantizer to;
  int64_t rows, k;
  uint8_t* codes;
  uint8_t* scale;
};

/// The way back: codes of the format and scale bytes -> out [rows, k] of dtype.
struct Dequantize {
  Format format;
  const uint8_t* codes;
  const uint8_t* scale;
  int64_t rows, k;
  void* out;
  DType dtype;
};

/// The numbers of vllm-xpu-kernels (format/block.h, group_quant): scales are float32 and may be column-major.
struct GroupQuantize {
  const void* x;
  DType dtype;
  int64_t rows, k;
  uint8_t scale_floor;  // the least scale byte
  uint8_t* codes;
  float* scale;
  int64_t scale_row_stride, scale_block_stride;
};

}  // namespace xpu_fp4
