// SPDX-License-Identifier: Apache-2.0
// What each kernel is given: one struct. Host and device. Matrices are row-major; strides are in elements.
//
// A kernel has a parameter for each field, in the order of each(): of a pointer inside of a struct, Alchemist's compiler does
// not know that a 32-bit offset will do, and its large tile took 7.5 integer instructions per matrix instruction instead
// of 2.7. The macros after a struct that is part of others are its parameters and, from those, its value.
#pragma once
#include <cstdint>

#include "format/gate.h"

namespace xpu_fp4 {

/// A tile of sorted rows: the expert whose rows they are, or -1, and the row where they end.
struct ExpertTile {
  int32_t expert, end;
};

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
/// 1, the program is another, with XPU_FP4_FACTOR, so that all others do without the parameter and the multiplication. Only of
/// a grouped product (XPU_FP4_GROUPED), whose weights and biases follow one another: `tiles`, an entry for every tile of rows.
struct OutputArguments {
  const float* bias;
  int64_t bias_row_stride, bias_column_stride;
  void* y;
  int64_t m, n;
  float factor = 1.0f;
  const ExpertTile* tiles = nullptr;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(bias), visit(bias_row_stride), visit(bias_column_stride), visit(y), visit(m), visit(n);
    if (factor != 1.0f) visit(factor);
    if (tiles != nullptr) visit(tiles);
  }
};
#ifdef XPU_FP4_FACTOR
#define XPU_FP4_OUTPUT_PARAMETERS \
  const float *bias, int64_t bias_row_stride, int64_t bias_column_stride, void *y, int64_t m, int64_t n, float factor
#define XPU_FP4_OUTPUT {bias, bias_row_stride, bias_column_stride, y, m, n, factor}
#else
#ifdef XPU_FP4_GROUPED
#define XPU_FP4_OUTPUT_PARAMETERS \
  const float *bias, int64_t bias_row_stride, int64_t bias_column_stride, void *y, int64_t m, int64_t n, const ExpertTile *tiles
#else
#define XPU_FP4_OUTPUT_PARAMETERS \
  const float *bias, int64_t bias_row_stride, int64_t bias_column_stride, void *y, int64_t m, int64_t n
#endif
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

// ---- a layer of experts: experts.cpp ----

/// Lanes of the work-group that sorts.
constexpr int kSortLanes = 256;

/// product.h's Experts: where slots go.
struct RoutingArguments {
  const int32_t* ids;
  const int32_t* map;  // null where there is none
  int64_t map_size, experts;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(ids), visit(map), visit(map_size), visit(experts);
  }
};
#define XPU_FP4_ROUTING_PARAMETERS const int32_t *ids, const int32_t *map, int64_t map_size, int64_t experts
#define XPU_FP4_ROUTING {ids, map, map_size, experts}

/// Rows sorted by expert. Tile t has up to `height` rows from t * stride on, of one expert.
struct GroupedRows {
  ExpertTile* tile;      // [tiles]
  int32_t* slot_of_row;  // [tiles * stride]: -1 for rows of no slot
  int32_t* row_of_slot;  // -1 for slots of no expert here
  int64_t tiles;         // as many as there can be
  int32_t height, stride;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(tile), visit(slot_of_row), visit(row_of_slot), visit(tiles), visit(height), visit(stride);
  }
};
#define XPU_FP4_GROUPED_ROWS_PARAMETERS \
  ExpertTile *tile, int32_t *slot_of_row, int32_t *row_of_slot, int64_t tiles, int32_t height, int32_t stride
#define XPU_FP4_GROUPED_ROWS {tile, slot_of_row, row_of_slot, tiles, height, stride}

/// counts [kSortLanes, experts] and first_tiles [experts] are scratch memory.
struct SortArguments {
  RoutingArguments routing;
  GroupedRows rows;
  int64_t slots;
  int32_t* counts;
  int32_t* first_tiles;

  template <class Visit>
  void each(const Visit& visit) const {
    routing.each(visit), rows.each(visit), visit(slots), visit(counts), visit(first_tiles);
  }
};

/// The tokens' rows. weights [slots]: what a row is multiplied by, null where it is not.
struct TokensArguments {
  const void* x;
  const float* weights;
  int64_t top_k;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(x), visit(weights), visit(top_k);
  }
};
#define XPU_FP4_TOKENS_PARAMETERS const void *x, const float *weights, int64_t top_k
#define XPU_FP4_TOKENS {x, weights, top_k}

struct GatherArguments {
  TokensArguments tokens;
  const int32_t* slot_of_row;
  void* out;
  int64_t k;

  template <class Visit>
  void each(const Visit& visit) const {
    tokens.each(visit), visit(slot_of_row), visit(out), visit(k);
  }
};

/// format/gate.h's Gate.
struct GateFields {
  int kind, interleaved;
  float alpha, limit;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(kind), visit(interleaved), visit(alpha), visit(limit);
  }
};
#define XPU_FP4_GATE_PARAMETERS int gate_kind, int interleaved, float alpha, float limit
#define XPU_FP4_GATE {static_cast<GateKind>(gate_kind), interleaved != 0, alpha, limit}

/// gather_quantize_expand of expand.cpp: rows.slot_of_row is null where slots are not sorted.
struct GatherQuantizeExpandArguments {
  TokensArguments tokens;
  RoutingArguments routing;
  GroupedRows rows;
  ExpandedOperand out;
  int64_t k;
  int mode, group;  // of MXFP4; of MXINT8

  template <class Visit>
  void each(const Visit& visit) const {
    tokens.each(visit), routing.each(visit), rows.each(visit), out.each(visit), visit(k), visit(mode), visit(group);
  }
};

struct GateQuantizeExpandArguments {
  const void* u;
  GateFields gate;
  GroupedRows rows;
  ExpandedOperand out;
  int64_t k;
  int mode, group;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(u), gate.each(visit), rows.each(visit), out.each(visit), visit(k), visit(mode), visit(group);
  }
};

struct GateArguments {
  const void* u;
  GateFields gate;
  const int32_t* slot_of_row;
  void* out;
  int64_t k;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(u), gate.each(visit), visit(slot_of_row), visit(out), visit(k);
  }
};

/// A token's slots are added up by these weights; null where they count as they are.
struct SlotWeights {
  const float* weights;
  int64_t top_k;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(weights), visit(top_k);
  }
};
#define XPU_FP4_SLOT_WEIGHTS_PARAMETERS const float *weights, int64_t top_k

struct CombineArguments {
  const float* v;
  const int32_t* row_of_slot;
  SlotWeights slots;
  void* y;
  int64_t n;

  template <class Visit>
  void each(const Visit& visit) const {
    visit(v), visit(row_of_slot), slots.each(visit), visit(y), visit(n);
  }
};

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

/// gemm_small.cpp. `start_bits` is kStartBits of layout.hpp, as in gemm_large.cpp. `combined` only where slots are added up
/// (XPU_FP4_COMBINED): then output.m are tokens.
struct GemmSmallArguments {
  ExpandedOperand a;
  StoredOperand w;
  OutputArguments output;
  int64_t k;
  uint32_t start_bits;
  const SlotWeights* combined = nullptr;

  template <class Visit>
  void each(const Visit& visit) const {
    a.each(visit), w.each(visit), output.each(visit), visit(k), visit(start_bits);
    if (combined != nullptr) combined->each(visit);
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
