// SPDX-License-Identifier: Apache-2.0
// Writes the expanded form (layout.hpp) of activations for gemm_small.cpp: expand.cpp's kernels, for few rows. A sub-group does
// one row's quad, so that a single row has all of its lanes: a lane has 8 elements, 16 where a sub-group has 8 lanes, and a
// block's lanes exchange what they share. Nothing is aligned and there are no levels, since gemm_small.cpp has a scale per
// block: a block's exponent is its scale byte, and a block of zeros takes one inside of the window. Memory traffic per quad and
// row: 68 bytes of MXFP4 or 132 of MXINT8 in (quantize_expand: the floats), 132 out.
// Macros: as those of expand.cpp.
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

constexpr auto kArrangement = static_cast<Arrangement>(XPU_FP4_ARRANGEMENT);
constexpr int kLanes = kSubGroup;
constexpr int kLaneElements = kQuadElements / kLanes;
constexpr int kBlockLanes = kBlock / kLaneElements;
constexpr int kLaneDwords = kLaneElements / 4;  // of int8

typedef uint32_t LaneDwords __attribute__((ext_vector_type(kLaneDwords)));
constexpr uint32_t kPadding = e8m0::kBias * 0x01010101u;

template <class T>
inline T uniform(T x) {
  return sycl::group_broadcast(this_sub_group(), x, 0);
}

/// Says what a lane does: elements of a row from `first` on, which repeats the last ones beyond K.
struct Place {
  uint64_t row;
  int64_t first;
  uint32_t quad, quads, lane;
  bool real;

  inline explicit Place(int64_t k) : quads(static_cast<uint32_t>(ceil_div(k, kQuadElements))) {
    const auto item = syclext::this_work_item::get_nd_item<2>();
    row = uniform(static_cast<uint64_t>(item.get_global_id(0)));
    quad = uniform(static_cast<uint32_t>(item.get_global_id(1)) / kLanes);
    lane = this_sub_group().get_local_linear_id();
    const int64_t own = int64_t{quad} * kQuadElements + lane * kLaneElements;
    real = own < k;
    first = real ? own : k - kLaneElements;
  }
  /// Launches round lanes up to whole work-groups.
  inline bool is_beyond() const { return quad >= quads; }
};

struct Expanded : ExpandedOperand {
  /// A lane's elements under the scale of its block, which means nothing of lanes beyond K.
  inline void store(const Place& at, LaneDwords values, uint8_t scale) const {
    if (!at.real) values = 0;
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < kLaneDwords; ++i) any |= values[i];
#pragma unroll
    for (int distance = 1; distance < kBlockLanes; distance *= 2) {
      any |= sycl::permute_group_by_xor(this_sub_group(), any, distance);
    }
    const uint8_t exponent = !at.real || (any == 0 && scale != e8m0::kNan) ? uint8_t{e8m0::kBias} : scale;
    const uint32_t block = at.lane / kBlockLanes, in_block = at.lane % kBlockLanes;
    if (in_block == 0) ((uint8_t*)own_exponents(at))[block] = exponent;
    uint64_t to = (at.row * at.quads + at.quad) * kQuadElements + at.lane * kLaneElements;
    if constexpr (kArrangement == Arrangement::row_fragments) {
      to = ((at.row / kRowUnit * at.quads + at.quad) * kQuad + block) * (kRowUnit * kBlock) + at.row % kRowUnit * kBlock +
           in_block * kLaneElements;
    }
    *(LaneDwords*)(codes + to) = values;
  }

  /// For a row that pads: its codes are not read, or no sum of theirs is.
  inline void pad(const Place& at) const {
    if (at.lane == 0) *own_exponents(at) = kPadding;
  }

  /// Pads the groups from the row after the place's on.
  inline void pad_after(const Place& at, uint64_t padded_rows) const {
#pragma nounroll
    for (uint64_t group = (at.row + 1) / kLanes; group < padded_rows / kLanes; ++group) {
      if (group * kLanes + at.lane > at.row) exponents[(group * at.quads + at.quad) * kLanes + at.lane] = kPadding;
    }
  }

 private:
  inline uint32_t* own_exponents(const Place& at) const {
    return exponents + (at.row / kLanes * at.quads + at.quad) * kLanes + at.row % kLanes;
  }
};

#if !defined XPU_FP4_TRANSFORM && !defined XPU_FP4_EXPERTS
/// A lane's codes, to integers.
template <Format format>
inline LaneDwords load_codes(const uint8_t* at) {
  constexpr int bytes = code_bytes(format, kLaneElements);
  struct alignas(XPU_FP4_ALIGNMENT < bytes ? XPU_FP4_ALIGNMENT : bytes) Codes {
    uint8_t byte[bytes];
  };
  const auto codes = *reinterpret_cast<const Codes*>(at);
  if constexpr (format == Format::mxint8) {
    return __builtin_bit_cast(LaneDwords, codes);
  } else {
    LaneDwords values;
#pragma unroll
    for (int i = 0; i < kLaneDwords; ++i) {
      values[i] = twice4(spread4(codes.byte[2 * i] | uint32_t{codes.byte[2 * i + 1]} << 8));
    }
    return values;
  }
}

XPU_FP4_KERNEL(2)
expand(XPU_FP4_STORED_PARAMETERS(in), XPU_FP4_EXPANDED_PARAMETERS(out), int64_t rows, int64_t padded_rows, int64_t k) {
  const StoredOperand from = XPU_FP4_STORED(in);
  const Expanded to = {XPU_FP4_EXPANDED(out)};
  const Place at(k);
  if (at.is_beyond()) return;
  if (at.row + 1 == rows) to.pad_after(at, padded_rows);
  const auto values = load_codes<kFormat>(from.codes + code_bytes(kFormat, at.row * k + at.first));
  to.store(at, values, from.scale[at.row * from.scale_row_stride + at.first / kBlock * from.scale_block_stride]);
}
#endif

#ifdef XPU_FP4_DTYPE
using LaneValues = Values<kLaneElements>;

inline void store_quantized(const Expanded& to, const Place& at, const LaneValues& in, QuadQuantizer how) {
  const uint32_t amax_bits = at.real ? in.amax_bits : 0;
  uint32_t values[kLaneDwords];
  uint8_t scale;
  if constexpr (kFormat == Format::mxfp4) {
    scale = mxfp4_scale(in, largest_of_lanes(amax_bits, kBlockLanes), how.mode);
    encode(in, Mxfp4ByteEncoder(scale), values);
#pragma unroll
    for (int i = 0; i < kLaneDwords; ++i) values[i] = twice4(values[i]);
  } else {
    scale = mxint8::scale_byte(largest_of_lanes(amax_bits, how.group / kLaneElements));
    encode(in, Mxint8Encoder(scale), values);
  }
  LaneDwords all;
#pragma unroll
  for (int i = 0; i < kLaneDwords; ++i) all[i] = values[i];
  to.store(at, all, scale);
}

#if defined XPU_FP4_EXPERTS
/// Rows of tokens at their sorted places. Without slot_of_row slots stay as they come, each with a tile of its own, which its
/// first quad's sub-group writes: of few slots most go to different experts.
XPU_FP4_KERNEL(2)
gather_quantize_expand(XPU_FP4_TOKENS_PARAMETERS, XPU_FP4_ROUTING_PARAMETERS, XPU_FP4_GROUPED_ROWS_PARAMETERS,
                       XPU_FP4_EXPANDED_PARAMETERS(out), int64_t k, int mode, int group) {
  const GroupedRows rows = XPU_FP4_GROUPED_ROWS;
  const Expanded to = {XPU_FP4_EXPANDED(out)};
  const Place at(k);
  if (at.is_beyond()) return;
  int32_t slot = -1;
  if (slot_of_row != nullptr) {
    slot = slot_of_row[at.row];
  } else if (at.row % rows.stride == 0) {
    const auto own = static_cast<int32_t>(at.row / rows.stride), expert = Routing(XPU_FP4_ROUTING).expert_of(own);
    if (expert >= 0) slot = own;
    if (at.quad == 0 && at.lane == 0) rows.tile[own] = {expert, static_cast<int32_t>(at.row) + 1};
  }
  slot = uniform(slot);
  if (slot < 0) return to.pad(at);
  const LaneValues in = Tokens(XPU_FP4_TOKENS).elements<kDType, kLaneElements>(slot, at.first, k);
  store_quantized(to, at, in, {mode, group});
}

/// h of rows of u [rows, 2k], rounded to u's type.
XPU_FP4_KERNEL(2)
gate_quantize_expand(const void* u, XPU_FP4_GATE_PARAMETERS, XPU_FP4_GROUPED_ROWS_PARAMETERS, XPU_FP4_EXPANDED_PARAMETERS(out),
                     int64_t k, int mode, int group) {
  const GroupedRows rows = XPU_FP4_GROUPED_ROWS;
  const Expanded to = {XPU_FP4_EXPANDED(out)};
  const Place at(k);
  if (at.is_beyond()) return;
  const ExpertTile own = rows.tile[at.row / rows.stride];
  if (!uniform(own.expert >= 0 && at.row < own.end)) return to.pad(at);
  store_quantized(to, at, gated<kDType, kLaneElements>(XPU_FP4_GATE, u, at.row, at.first, k), {mode, group});
}
#else
/// in(first): the lane's elements of the row from x on.
template <class Elements>
inline void quantize_row(const QuantizeExpandArguments& args, const Elements& in) {
  const Expanded to = {args.out};
  const Place at(args.k);
  if (at.is_beyond()) return;
  if (at.row + 1 == args.rows) to.pad_after(at, args.padded_rows);
  const auto* from = static_cast<const uint8_t*>(args.x) + (at.row * args.k + at.first) * size_of(kDType);
  store_quantized(to, at, in(from, at.first), {args.mode, args.group});
}

#ifdef XPU_FP4_TRANSFORM
XPU_FP4_KERNEL(2)
transform_quantize_expand(const void* x, XPU_FP4_EXPANDED_PARAMETERS(out), int64_t rows, int64_t padded_rows, int64_t k,
                          int mode, int group, XPU_FP4_TRANSFORM_PARAMETERS) {
  quantize_row({x, XPU_FP4_EXPANDED(out), rows, padded_rows, k, mode, group}, [&](const uint8_t* from, int64_t first) {
    return LaneValues(from, {offset == nullptr ? nullptr : offset + first, hadamard});
  });
}
#else
XPU_FP4_KERNEL(2)
quantize_expand(const void* x, XPU_FP4_EXPANDED_PARAMETERS(out), int64_t rows, int64_t padded_rows, int64_t k, int mode,
                int group) {
  quantize_row({x, XPU_FP4_EXPANDED(out), rows, padded_rows, k, mode, group},
               [](const uint8_t* from, int64_t) { return LaneValues(from); });
}
#endif
#endif
#endif
