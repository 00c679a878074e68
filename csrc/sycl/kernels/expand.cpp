// SPDX-License-Identifier: Apache-2.0
// Writes the expanded form (layout.hpp) of an operand of many rows: `expand` from codes and scales, `quantize_expand` from
// floats in one go, `transform_quantize_expand` from floats that are transformed before. A lane does one row of one quad; a
// sub-group, the kLanes rows of a group. Memory traffic per quad and row: 68 bytes of MXFP4 or 132 of MXINT8 in
// (quantize_expand: the floats, of MXINT8 twice), 132 out. Few rows: expand_row.cpp.
// Macros: XPU_FP4_FORMAT; XPU_FP4_ARRANGEMENT; XPU_FP4_DTYPE for floats; XPU_FP4_TRANSFORM for transform_quantize_expand alone;
// XPU_FP4_EXPERTS for gather_quantize_expand and gate_quantize_expand alone, which read the rows of a layer of experts.
#include "alignment.hpp"
#ifdef XPU_FP4_EXPERTS
#include "experts.hpp"
#endif
#ifdef XPU_FP4_DTYPE
#include "quantizer.hpp"
#else
#include "common.hpp"
#endif
#include "twice.hpp"

using namespace xpu_fp4;

typedef uint32_t Dwords4 __attribute__((ext_vector_type(4)));
typedef uint32_t Dwords8 __attribute__((ext_vector_type(8)));

constexpr auto kArrangement = static_cast<Arrangement>(XPU_FP4_ARRANGEMENT);
constexpr int kLanes = kSubGroup;
constexpr AlignmentRule kRule = alignment_rule(kArrangement, kFormat);
constexpr int kBlockDwords = code_bytes(kFormat, kBlock) / 4;

/// Holds one row's quad. Blocks beyond the last have codes 0.
struct RowQuad {
  uint32_t codes[kQuad][kBlockDwords];
  uint32_t scale[kQuad];
};

inline bool is_zero(const uint32_t (&codes)[kBlockDwords]) {
  uint32_t any = 0;
#pragma unroll
  for (int i = 0; i < kBlockDwords; ++i) any |= codes[i];
  return (any & (kFormat == Format::mxfp4 ? 0x77777777u : 0xFFFFFFFFu)) == 0;  // -0 is zero too
}

inline Alignment alignment_of(const RowQuad& quad) {
  bool zero[kQuad];
#pragma unroll
  for (int b = 0; b < kQuad; ++b) zero[b] = is_zero(quad.codes[b]);
  return align(kRule, quad.scale, zero);
}

/// Dword i of a block, its elements apart: of MXFP4,
inline uint32_t expanded4(const uint32_t (&codes)[4], int i, uint32_t shift) {
  return twice4(codes[i / 2] >> 4 * (i % 2) & 0x0F0F0F0Fu, shift);
}
/// and of MXINT8, which is not shifted.
inline uint32_t expanded4(const uint32_t (&codes)[8], int i, uint32_t) {
  // Every other byte of two dwords.
  const auto half = [&](uint32_t x) { return x >> 8 * (i % 2) & 0x00FF00FFu; };
  const auto close = [](uint32_t x) { return (x | x >> 8) & 0xFFFFu; };
  return close(half(codes[i & ~1])) | close(half(codes[i | 1])) << 16;
}

struct Expanded : ExpandedOperand {
  uint32_t quads;

  /// Whole sub-groups only: the levels are those of the group. `real`: not a row of the padding.
  inline void store(const RowQuad& in, int64_t row, uint32_t quad, bool real) const {
    const Alignment alignment = alignment_of(in);
    const int64_t group = row / kLanes;
    const uint32_t* e = alignment.exponent;
    exponents[(group * quads + quad) * kLanes + row % kLanes] = e[0] | e[1] << 8 | e[2] << 16 | e[3] << 24;
    const uint32_t ruled_out = sycl::reduce_over_group(this_sub_group(), alignment.levels, sycl::bit_or<uint32_t>());
    const uint32_t pitch = round_up(quads, uint32_t{kLanes});
    if (row % kLanes == 0) levels[group * pitch + quad] = ruled_out;
    if (kArrangement == Arrangement::rows && !real) return;
#pragma unroll
    for (int b = 0; b < kQuad; ++b) {
      // The shift of a block of zeros, whose exponent may be above its scale, does not matter; NaN's codes are not read.
      const uint32_t shift = (in.scale[b] - e[b]) & kRule.shift;
      Dwords8 out;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        out[i] = expanded4(in.codes[b], i, shift);
      }
      store_block(out, row, quad, b);
    }
  }

 private:
  inline void store_block(Dwords8 block, int64_t row, uint32_t quad, int b) const {
    if constexpr (kArrangement == Arrangement::rows) {
      *(Dwords8*)(codes + (row * quads + quad) * kQuadElements + b * kBlock) = block;
    } else if constexpr (kArrangement == Arrangement::row_fragments) {
      *(Dwords8*)(codes + ((row / kRowUnit * quads + quad) * kQuad + b) * (kRowUnit * kBlock) + row % kRowUnit * kBlock) =
          block;
    } else {
      auto* out = (uint32_t*)codes + ((row / kLanes * quads + quad) * kQuad + b) * (8 * kLanes) + row % kLanes;
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i * kLanes] = block[i];
    }
  }
};

struct Place {
  int64_t row;
  uint32_t quad;
};
inline Place this_place() {
  const auto item = syclext::this_work_item::get_nd_item<2>();
  return {static_cast<int64_t>(item.get_global_id(1)), static_cast<uint32_t>(item.get_global_id(0))};
}

#if !defined XPU_FP4_TRANSFORM && !defined XPU_FP4_EXPERTS
XPU_FP4_KERNEL(2)
expand(XPU_FP4_STORED_PARAMETERS(in), XPU_FP4_EXPANDED_PARAMETERS(out), int64_t rows, int64_t padded_rows, int64_t k) {
  const StoredOperand from = XPU_FP4_STORED(in);
  const auto [row, quad] = this_place();
  if (row >= padded_rows) return;  // whole sub-groups
  const int64_t blocks = k / kBlock;
  RowQuad in;
#pragma unroll
  for (int b = 0; b < kQuad; ++b) {
    const int64_t block = int64_t{quad} * kQuad + b;
    const bool real = row < rows && block < blocks;
#pragma unroll
    for (int part = 0; part < kBlockDwords / 4; ++part) {
      Bytes16 bytes = {};
      if (real) bytes = load16(from.codes + (row * blocks + block) * (4 * kBlockDwords) + 16 * part);
      const auto dwords = __builtin_bit_cast(Dwords4, bytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) in.codes[b][4 * part + i] = dwords[i];
    }
    in.scale[b] = real ? from.scale[row * from.scale_row_stride + block * from.scale_block_stride] : uint8_t{e8m0::kBias};
  }
  Expanded{XPU_FP4_EXPANDED(out), static_cast<uint32_t>(ceil_div(blocks, kQuad))}.store(in, row, quad, row < rows);
}
#endif

#ifdef XPU_FP4_DTYPE
using BlockValues = Values<kBlock>;

/// A row's quad of which `blocks` exist; block(b) gives the values of one.
template <class Block, class Quad>
inline void quantize_quad(const Block& block, int64_t blocks, QuadQuantizer to, Quad& in) {
  if constexpr (kFormat == Format::mxfp4) {
#pragma unroll
    for (int b = 0; b < kQuad; ++b) {
      if (b >= blocks) break;
      const BlockValues values = block(b);
      const uint8_t scale = mxfp4_scale(values, values.amax_bits, to.mode);
      encode(values, Mxfp4Encoder(scale), in.codes[b]);
      in.scale[b] = scale;
    }
  } else {
    // The floats are passed twice: a group's would not stay in registers.
    uint32_t amax_bits[kQuad], all = 0;
#pragma unroll
    for (int b = 0; b < kQuad; ++b) {
      amax_bits[b] = b < blocks ? block(b).amax_bits : 0;
      all = sycl::max(all, amax_bits[b]);
    }
#pragma unroll
    for (int b = 0; b < kQuad; ++b) {
      if (b >= blocks) break;
      in.scale[b] = mxint8::scale_byte(to.group == kBlock ? amax_bits[b] : all);
      encode(block(b), Mxint8Encoder(in.scale[b]), in.codes[b]);
    }
  }
}

/// quantize(in): of the row's quad, where the row is real.
template <class QuantizeQuad>
inline void expand_quantized(const ExpandedOperand& out, Place at, int64_t blocks, bool real, const QuantizeQuad& quantize) {
  RowQuad in = {};
#pragma unroll
  for (int b = 0; b < kQuad; ++b) in.scale[b] = e8m0::kBias;
  if (real) quantize(in);
  Expanded{out, static_cast<uint32_t>(ceil_div(blocks, kQuad))}.store(in, at.row, at.quad, real);
}

/// Expands rows that lie densely. quantize(x, blocks, in) does so with the row's quad from x on, of which `blocks` exist.
template <class QuantizeQuad>
inline void expand_quantized(const QuantizeExpandArguments& args, Place at, const QuantizeQuad& quantize) {
  if (at.row >= args.padded_rows) return;  // whole sub-groups
  const int64_t blocks = args.k / kBlock, first = int64_t{at.quad} * kQuad;
  const uint8_t* from = static_cast<const uint8_t*>(args.x) + (at.row * blocks + first) * kBlock * size_of(kDType);
  expand_quantized(args.out, at, blocks, at.row < args.rows, [&](RowQuad& in) { quantize(from, blocks - first, in); });
}

#if defined XPU_FP4_EXPERTS
/// Rows of tokens at their sorted places.
XPU_FP4_KERNEL(2)
gather_quantize_expand(XPU_FP4_TOKENS_PARAMETERS, XPU_FP4_ROUTING_PARAMETERS, XPU_FP4_GROUPED_ROWS_PARAMETERS,
                       XPU_FP4_EXPANDED_PARAMETERS(out), int64_t k, int mode, int group) {
  const Place at = this_place();
  const GroupedRows rows = XPU_FP4_GROUPED_ROWS;
  if (at.row >= rows.tiles * rows.stride) return;  // whole sub-groups
  const int32_t slot = slot_of_row[at.row];
  const int64_t blocks = k / kBlock, first = int64_t{at.quad} * kQuad;
  const Tokens tokens = Tokens(XPU_FP4_TOKENS);
  expand_quantized(XPU_FP4_EXPANDED(out), at, blocks, slot >= 0, [&](RowQuad& in) {
    quantize_quad([&](int b) { return tokens.elements<kDType, kBlock>(slot, (first + b) * kBlock, k); }, blocks - first,
                  {mode, group}, in);
  });
}

/// h of rows of u [rows, 2k], rounded to u's type.
XPU_FP4_KERNEL(2)
gate_quantize_expand(const void* u, XPU_FP4_GATE_PARAMETERS, XPU_FP4_GROUPED_ROWS_PARAMETERS, XPU_FP4_EXPANDED_PARAMETERS(out),
                     int64_t k, int mode, int group) {
  const Place at = this_place();
  const GroupedRows rows = XPU_FP4_GROUPED_ROWS;
  if (at.row >= rows.tiles * rows.stride) return;  // whole sub-groups
  const ExpertTile own = rows.tile[at.row / rows.stride];
  const int64_t blocks = k / kBlock, first = int64_t{at.quad} * kQuad;
  const Gate gate = XPU_FP4_GATE;
  const auto block = [&](int b) { return gated<kDType, kBlock>(gate, u, at.row, (first + b) * kBlock, k); };
  expand_quantized(XPU_FP4_EXPANDED(out), at, blocks, own.expert >= 0 && at.row < own.end, [&](RowQuad& in) {
    if constexpr (kFormat == Format::mxfp4) {
      quantize_quad(block, blocks - first, {mode, group}, in);
    } else {
      // Its floats are read twice: in registers, so that the gate is computed once.
      float h[kQuadElements];
#pragma unroll(kUnroll)
      for (int b = 0; b < kQuad; ++b) {
        if (b >= blocks - first) break;
        const BlockValues values = block(b);
#pragma unroll(kUnroll)
        for (int i = 0; i < kBlock; ++i) h[b * kBlock + i] = values.x[i];
      }
      quantize_quad([&](int b) { return BlockValues(h + b * kBlock); }, blocks - first, {mode, group}, in);
    }
  });
}
#elif defined XPU_FP4_TRANSFORM
/// A lane has its whole quad in registers, since a block of H may be that large.
XPU_FP4_KERNEL(2)
transform_quantize_expand(const void* x, XPU_FP4_EXPANDED_PARAMETERS(out), int64_t rows, int64_t padded_rows, int64_t k,
                          int mode, int group, XPU_FP4_TRANSFORM_PARAMETERS) {
  const QuantizeExpandArguments args = {x, XPU_FP4_EXPANDED(out), rows, padded_rows, k, mode, group};
  // All lanes have the same quad, and so the same offsets.
  const Place at = {this_place().row, sycl::group_broadcast(this_sub_group(), this_place().quad, 0)};
  if (offset != nullptr) offset += int64_t{at.quad} * kQuadElements;
  expand_quantized(args, at, [&](const uint8_t* from, int64_t blocks, RowQuad& in) {
    const Values<kQuadElements> all(from, {offset, hadamard}, blocks);
    quantize_quad([&](int b) { return BlockValues(all.x + b * kBlock); }, blocks, {mode, group}, in);
  });
}
#else
XPU_FP4_KERNEL(2)
quantize_expand(const void* x, XPU_FP4_EXPANDED_PARAMETERS(out), int64_t rows, int64_t padded_rows, int64_t k, int mode,
                int group) {
  const QuantizeExpandArguments args = {x, XPU_FP4_EXPANDED(out), rows, padded_rows, k, mode, group};
  expand_quantized(args, this_place(), [&](const uint8_t* from, int64_t blocks, RowQuad& in) {
    quantize_quad([&](int b) { return BlockValues(from + b * kBlock * size_of(kDType)); }, blocks, {mode, group}, in);
  });
}
#endif
#endif
