// SPDX-License-Identifier: Apache-2.0
// What each kernel is given: one struct. Host and device. Matrices are row-major; strides are in elements.
//
// A kernel has a parameter for each field, in the order of each(): of a pointer inside of a struct, Alchemist's compiler does
// not know that a 32-bit offset will do, and its large tile took 7.5 integer instructions per matrix instruction instead
// of 2.7. The macros after a struct that is part of others are its parameters and, from those, its value.
#pragma once
#include <cstdint>

namespace xpu_fp4 {

/// Codes and scale bytes as checkpoints store them, of an operand's rows: packed codes lie densely.
struct StoredOperand {
  const uint8_t* codes;
  const uint8_t* scale;
  int64_t scale_row_stride, scale_block_stride;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(codes), visit(scale), visit(scale_row_stride), visit(scale_block_stride);
  }
};
#define XPU_FP4_STORED_PARAMETERS(x) \
  const uint8_t *x##_codes, const uint8_t *x##_scale, int64_t x##_scale_row_stride, int64_t x##_scale_block_stride
#define XPU_FP4_STORED(x) {x##_codes, x##_scale, x##_scale_row_stride, x##_scale_block_stride}

/// The arrays of layout.hpp.
struct ExpandedOperand {
  uint8_t* codes;
  uint32_t* exponents;
  uint32_t* levels;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(codes), visit(exponents), visit(levels);
  }
};
#define XPU_FP4_EXPANDED_PARAMETERS(x) uint8_t *x##_codes, uint32_t *x##_exponents, uint32_t *x##_levels
#define XPU_FP4_EXPANDED(x) {x##_codes, x##_exponents, x##_levels}

/// Y [m, n] and what is added to it: float32, null where there is none. Sums are multiplied by `factor` before; where it is not
/// 1, the program is another, with XPU_FP4_FACTOR, so that all others do without the parameter and the multiplication.
struct OutputArguments {
  const float* bias;
  int64_t bias_row_stride, bias_column_stride;
  void* y;
  int64_t m, n;
  float factor = 1.0f;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(bias), visit(bias_row_stride), visit(bias_column_stride), visit(y), visit(m), visit(n);
    if (factor != 1.0f) visit(factor);
  }
};
#ifdef XPU_FP4_FACTOR
#define XPU_FP4_OUTPUT_PARAMETERS \
  const float *bias, int64_t bias_row_stride, int64_t bias_column_stride, void *y, int64_t m, int64_t n, float factor
#define XPU_FP4_OUTPUT {bias, bias_row_stride, bias_column_stride, y, m, n, factor}
#else
#define XPU_FP4_OUTPUT_PARAMETERS \
  const float *bias, int64_t bias_row_stride, int64_t bias_column_stride, void *y, int64_t m, int64_t n
#define XPU_FP4_OUTPUT {bias, bias_row_stride, bias_column_stride, y, m, n}
#endif

/// product.h's Transform: float32 per element of a row, null where there is none; and H's size, 0 where there is none.
struct TransformArguments {
  const float* offset;
  int hadamard;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(offset), visit(hadamard);
  }
};
#define XPU_FP4_TRANSFORM_PARAMETERS const float *offset, int hadamard
#define XPU_FP4_TRANSFORM_OF_PARAMETERS {offset, hadamard}

/// quantize.cpp. `vectors`: loads of 16 bytes.
struct QuantizeArguments {
  const void* x;
  uint8_t* codes;
  uint8_t* scale;
  int64_t vectors;
  int mode;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(x), visit(codes), visit(scale), visit(vectors), visit(mode);
  }
};

/// `group` elements of a row share a scale; the last of a row may be fewer.
struct QuantizeMxint8Arguments {
  const void* x;
  uint8_t* codes;
  uint8_t* scale;
  int64_t k;
  int group;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(x), visit(codes), visit(scale), visit(k), visit(group);
  }
};

/// transform.cpp. `out`: codes, or elements of x's dtype, which have no scales.
struct TransformQuantizeArguments {
  const void* x;
  uint8_t* out;
  uint8_t* scale;
  int64_t k;
  int mode, group;  // of MXFP4; of MXINT8
  TransformArguments transform;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(x), visit(out), visit(scale), visit(k), visit(mode), visit(group), transform.each(visit);
  }
};

struct GroupQuantizeArguments {
  const void* x;
  uint8_t* codes;
  float* scale;
  int64_t vectors, row_blocks, scale_row_stride, scale_block_stride;
  uint8_t scale_floor;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(x), visit(codes), visit(scale), visit(vectors), visit(row_blocks), visit(scale_row_stride), visit(scale_block_stride),
        visit(scale_floor);
  }
};

/// dequantize.cpp. A lane does eight elements.
struct DequantizeArguments {
  const uint8_t* codes;
  const uint8_t* scale;
  void* out;
  int64_t lanes;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(codes), visit(scale), visit(out), visit(lanes);
  }
};

/// expand.cpp.
struct ExpandArguments {
  StoredOperand in;
  ExpandedOperand out;
  int64_t rows, padded_rows, k;

  template <class Visit>
  void each(const Visit& visit) const {
    in.each(visit), out.each(visit), visit(rows), visit(padded_rows), visit(k);
  }
};

struct QuantizeExpandArguments {
  const void* x;
  ExpandedOperand out;
  int64_t rows, padded_rows, k;
  int mode, group;  // of MXFP4; of MXINT8

  template <class Visit>
  void each(const Visit& visit) const {
    visit(x), out.each(visit), visit(rows), visit(padded_rows), visit(k), visit(mode), visit(group);
  }
};

struct TransformQuantizeExpandArguments {
  QuantizeExpandArguments expand;
  TransformArguments transform;

  template <class Visit>
  void each(const Visit& visit) const {
    expand.each(visit), transform.each(visit);
  }
};

/// gemm.cpp and gemm_bdpas.cpp. A's scale bytes lie densely.
struct GemmArguments {
  StoredOperand a, w;
  OutputArguments output;
  int64_t k;
  int y_dtype;

  template <class Visit>
  void each(const Visit& visit) const {
    a.each(visit), w.each(visit), output.each(visit), visit(k), visit(y_dtype);
  }
};

/// gemm_small.cpp. `start_bits` is kStartBits of layout.hpp, as in gemm_large.cpp.
struct GemmSmallArguments {
  ExpandedOperand a;
  StoredOperand w;
  OutputArguments output;
  int64_t k;
  uint32_t start_bits;

  template <class Visit>
  void each(const Visit& visit) const {
    a.each(visit), w.each(visit), output.each(visit), visit(k), visit(start_bits);
  }
};

/// gemm_large.cpp.
struct GemmLargeArguments {
  ExpandedOperand a, b;
  OutputArguments output;
  uint32_t quads, start_bits;

  template <class Visit>
  void each(const Visit& visit) const {
    a.each(visit), b.each(visit), output.each(visit), visit(quads), visit(start_bits);
  }
};

/// gemm_w4a16.cpp and gemm_w4a16_matrix.cpp.
struct GemmW4a16Arguments {
  const void* x;
  StoredOperand w;
  OutputArguments output;
  int64_t k;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(x), w.each(visit), output.each(visit), visit(k);
  }
};

}  // namespace xpu_fp4
