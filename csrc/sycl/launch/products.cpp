// SPDX-License-Identifier: Apache-2.0
// Products: from stored operands, or from expanded ones.
#include <cstdint>
#include <optional>

#include "../../format/integer.h"
#include "launch.h"

namespace xpu_fp4::syclrt::launch {
namespace {

StoredOperand stored(const Weight& w) { return {w.codes, w.scale, w.scale_row_stride, w.scale_block_stride}; }
StoredOperand stored(const Activations& a) { return {static_cast<const uint8_t*>(a.data), a.scale, a.k / kBlock, 1}; }

OutputArguments output_of(const Product& product) {
  const Output& out = product.output;
  return {out.bias.data, out.bias.row_stride, out.bias.column_stride, out.y, product.activations.m, product.weight.n};
}

Weights weights_of(const Weight& w) {
  if (w.k % kQuadElements != 0) return Weights::any;
  const bool dwords = reinterpret_cast<uintptr_t>(w.scale) % 4 == 0 && w.scale_row_stride % 4 == 0 && w.scale_block_stride == 1;
  return dwords ? Weights::scales_together : Weights::whole_quads;
}

Expanded allocate_expanded(const Queue& queue, const ExpandedLayout& layout) {
  std::shared_ptr<void> memory = queue.allocate(Expanded::bytes(layout));
  void* at = memory.get();
  return {layout, at, std::move(memory)};
}

// The rows are padded to whole tiles.
Expanded expand_activations(const Queue& queue, Gpu gpu, const Activations& a, ElementOrder order, int64_t tile_rows) {
  const Expanded out =
      allocate_expanded(queue, {a.m, round_up(a.m, tile_rows), ceil_div(a.k, kQuadElements), gpu.architecture->sub_group});
  const ExpandedLayout& layout = out.layout;
  const Range range = grid(layout.quads, layout.padded_rows);
  const Transform& transform = a.to.transform;
  const std::optional<Floats> floats = a.are_codes ? std::nullopt : std::optional(Floats{a.dtype, !transform.is_none()});
  const Variant variant = expand_activations_variant(gpu, a.to.format, floats, order,
                                                     alignment_of({a.data, a.are_codes ? nullptr : transform.offset}));
  if (!floats) {
    queue.launch(variant, "expand", range, ExpandArguments{stored(a), out.arrays, layout.rows, layout.padded_rows, a.k});
    return out;
  }
  const QuantizeExpandArguments arguments = {
      a.data, out.arrays, layout.rows, layout.padded_rows, a.k, static_cast<int>(a.to.mode), a.to.group};
  if (floats->transformed) {
    queue.launch(variant, "transform_quantize_expand", range,
                 TransformQuantizeExpandArguments{arguments, {transform.offset, transform.hadamard}});
  } else {
    queue.launch(variant, "quantize_expand", range, arguments);
  }
  return out;
}

Expanded expanded_weight(const Queue& queue, Gpu gpu, const Weight& w) {
  const ExpandedLayout layout = weight_layout(*gpu.architecture, w.n, w.k);
  if (w.expanded() != nullptr) return {layout, const_cast<uint8_t*>(w.expanded())};  // products only read it
  const Expanded b = allocate_expanded(queue, layout);
  expand_weight(queue, gpu, w, b);
  return b;
}

// One tile per sub-group, `group_columns` of them in a work-group.
Range tiles(const Product& product, Tile tile, int64_t lanes, int64_t group_columns) {
  const int64_t columns = round_up(ceil_div(product.weight.n, tile.columns(lanes)), group_columns);
  return {2, {ceil_div(product.activations.m, tile.rows()), columns * lanes}, {1, group_columns * lanes}};
}

}  // namespace

std::string gemm(const Queue& queue, const Product& product) {
  const auto& [a, w, out] = product;
  const Target target = {queue.target().sub_group, false};  // whatever the device's compiler makes of a matrix unit
  const Variant variant = gemm_variant(target, a.to.format, alignment_of({w.codes}));
  queue.launch(variant, "gemm", grid(ceil_div(a.m, target.sub_group), w.n),
               GemmArguments{stored(a), stored(w), output_of(product), w.k, static_cast<int>(out.dtype)});
  return variant.label;
}

std::string gemm_w4a16(const Queue& queue, const Product& product) {
  const auto& [a, w, out] = product;
  const Variant variant = gemm_w4a16_variant(queue.target(), a.dtype, alignment_of({w.codes}));
  queue.launch(variant, "gemm_w4a16", grid(a.m, w.n), GemmW4a16Arguments{a.data, stored(w), output_of(product), w.k});
  return variant.label;
}

std::string gemm_w4a16_matrix(const Queue& queue, Gpu gpu, const GemmPlan& plan, const Product& product) {
  const auto& [a, w, out] = product;
  const bool split = plan.kernel == Kernel::small;
  const int64_t lanes = gpu.architecture->sub_group;
  const Variant variant = gemm_w4a16_matrix_variant(gpu, plan.tile, split ? plan.group_columns : 1, a.dtype,
                                                    starts_cache_line(a.data), alignment_of({w.codes}));
  // A work-group's sub-groups share one tile's K, or have a tile each.
  Range range = tiles(product, plan.tile, lanes, plan.group_columns);
  if (split) range.global[1] = ceil_div(w.n, plan.tile.columns(lanes)) * plan.group_columns * lanes;
  queue.launch(variant, "gemm_w4a16_matrix", range, GemmW4a16Arguments{a.data, stored(w), output_of(product), w.k});
  return variant.label;
}

std::string gemm_bdpas(const Queue& queue, Gpu gpu, const GemmPlan& plan, const Product& product) {
  const auto& [a, w, out] = product;
  const Variant variant = gemm_bdpas_variant(gpu, plan.tile, out.dtype);
  queue.launch(variant, "gemm_bdpas", tiles(product, plan.tile, gpu.architecture->sub_group, plan.group_columns),
               GemmArguments{stored(a), stored(w), output_of(product), w.k, static_cast<int>(out.dtype)});
  return variant.label;
}

std::string gemm_small(const Queue& queue, Gpu gpu, const GemmPlan& plan, const Product& product) {
  const auto& [activations, w, out] = product;
  const int64_t lanes = gpu.architecture->sub_group;
  const Expanded a = expand_activations(queue, gpu, activations, ElementOrder::packed, round_up(plan.rows, lanes));
  const Variant variant =
      gemm_small_variant(gpu, activations.to.format, plan.rows, weights_of(w), out.dtype, alignment_of({w.codes}));
  const int64_t group_lanes = lanes * kSmallSplit;
  const Range range = {2, {ceil_div(activations.m, plan.rows), ceil_div(w.n, lanes) * group_lanes}, {1, group_lanes}};
  queue.launch(variant, "gemm_small", range, GemmSmallArguments{a.arrays, stored(w), output_of(product), w.k, kStartBits});
  return variant.label;
}

std::string gemm_large(const Queue& queue, Gpu gpu, const GemmPlan& plan, const Product& product) {
  const auto& [activations, w, out] = product;
  const int64_t lanes = gpu.architecture->sub_group;
  const Expanded a = expand_activations(queue, gpu, activations, ElementOrder::apart, plan.tile.rows());
  const Expanded b = expanded_weight(queue, gpu, w);
  const Variant variant = gemm_large_variant(gpu, activations.to.format, plan.tile, out.dtype);
  Range range = tiles(product, plan.tile, lanes, plan.group_columns);
  range.global[0] = round_up(range.global[0], plan.group_rows);
  range.group[0] = plan.group_rows;
  queue.launch(variant, "gemm_large", range,
               GemmLargeArguments{a.arrays, b.arrays, output_of(product), static_cast<uint32_t>(a.layout.quads), kStartBits});
  return variant.label;
}

}  // namespace xpu_fp4::syclrt::launch
