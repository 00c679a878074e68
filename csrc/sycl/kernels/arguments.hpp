// SPDX-License-Identifier: Apache-2.0
// What each kernel is given: one struct by value. Host and device. Matrices are row-major; strides are in elements.
#pragma once
#include <cstdint>

namespace xpu_fp4 {

/// Codes and scale bytes as checkpoints store them, of an operand's rows: packed codes lie densely.
struct StoredOperand {
  const uint8_t* codes;
  const uint8_t* scale;
  int64_t scale_row_stride, scale_block_stride;
};

/// The arrays of layout.hpp.
struct ExpandedOperand {
  uint8_t* codes;
  uint32_t* exponents;
  uint32_t* levels;
};

/// Y [m, n] and what is added to it: float32, null where there is none.
struct OutputArguments {
  const float* bias;
  int64_t bias_row_stride, bias_column_stride;
  void* y;
  int64_t m, n;
};

/// quantize.cpp. `vectors`: loads of 16 bytes.
struct QuantizeArguments {
  const uint8_t* x;
  uint8_t* codes;
  uint8_t* scale;
  int64_t vectors;
  int mode;
};

/// `group` elements of a row share a scale; the last of a row may be fewer.
struct QuantizeMxint8Arguments {
  const uint8_t* x;
  uint8_t* codes;
  uint8_t* scale;
  int64_t k;
  int group;
};

struct GroupQuantizeArguments {
  const uint8_t* x;
  uint8_t* codes;
  float* scale;
  int64_t vectors, row_blocks, scale_row_stride, scale_block_stride;
  uint8_t scale_floor;
};

/// dequantize.cpp. A lane does eight elements.
struct DequantizeArguments {
  const uint8_t* codes;
  const uint8_t* scale;
  void* out;
  int64_t lanes;
};

/// expand.cpp.
struct ExpandArguments {
  StoredOperand in;
  ExpandedOperand out;
  int64_t rows, padded_rows, k;
};

struct QuantizeExpandArguments {
  const uint8_t* x;
  ExpandedOperand out;
  int64_t rows, padded_rows, k;
  int mode, group;  // of MXFP4; of MXINT8
};

/// gemm.cpp. A's scale bytes lie densely.
struct GemmArguments {
  StoredOperand a, w;
  OutputArguments output;
  int64_t k;
  int y_dtype;
};

/// gemm_small.cpp. `start_bits` is kStartBits of layout.hpp, as in gemm_large.cpp.
struct GemmSmallArguments {
  ExpandedOperand a;
  StoredOperand w;
  OutputArguments output;
  int64_t k;
  uint32_t start_bits;
};

/// gemm_large.cpp.
struct GemmLargeArguments {
  ExpandedOperand a, b;
  OutputArguments output;
  uint32_t quads, start_bits;
};

/// gemm_bdpas.cpp.
struct GemmBdpasArguments {
  StoredOperand a, w;
  OutputArguments output;
  int64_t k;
};

/// gemm_w4a16.cpp and gemm_w4a16_matrix.cpp.
struct GemmW4a16Arguments {
  const void* x;
  StoredOperand w;
  OutputArguments output;
  int64_t k;
};

}  // namespace xpu_fp4
