// SPDX-License-Identifier: Apache-2.0
// Products: from stored operands, or from expanded ones.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "../../format/integer.h"
#include "launch.h"

namespace xpu_fp4::syclrt::launch {
namespace {

StoredOperand stored(const Weight& w) { return {w.codes, w.scale, w.scale_row_stride, w.scale_block_stride}; }
StoredOperand stored(const Activations& a) { return {static_cast<const uint8_t*>(a.data), a.scale, a.k / kBlock, 1}; }

OutputArguments output_of(const Product& product, const Grouped& grouped = {}) {
  const Output& out = product.output;
  return {out.bias.data,    out.bias.row_stride, out.bias.column_stride, out.y, product.activations.m,
          product.weight.n, out.factor,          grouped.tiles};
}

// The program for the product's output.
Variant for_output(Variant variant, const Output& out) {
  return out.factor == 1.0f ? variant : with_factor(std::move(variant));
}

Weights weights_of(const Weight& w) {
  if (w.k % kQuadElements != 0) return Weights::any;
  const bool dwords = reinterpret_cast<uintptr_t>(w.scale) % 4 == 0 && w.scale_row_stride % 4 == 0 && w.scale_block_stride == 1;
  return dwords ? Weights::scales_together : Weights::whole_quads;
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

// What `launch` returns, a function of the operand that weights are decoded to. The int8 form takes over where the device's
// compiler does not take the int4 one, which a driver may lack the function for, unless someone asked for that very kernel.
template <class Launch>
std::string launch_decoding(const Architecture& architecture, const Launch& launch) {
  const std::optional<WeightOperand> asked = weight_operand_override();
  const WeightOperand first = asked.value_or(architecture.weight_operand);
  try {
    return launch(first);
  } catch (const CannotBuild& error) {
    if (first == WeightOperand::int8 || asked || variant_override().architecture != nullptr) throw;
    const std::string why = error.what();
    std::string label;
    try {
      label = launch(WeightOperand::int8);
    } catch (const CannotBuild& also) {
      throw CannotBuild(why + "\n" + also.what());
    }
    warn(why +
         "\nxpu_fp4: few rows are multiplied by weights as int8 instead, which takes more instructions for the same bits; " +
         "XPU_FP4_WEIGHT_OPERAND=int8 asks for that at once");
    return label;
  }
}

}  // namespace

void warn(const std::string& text) {
  static std::mutex& mutex = *new std::mutex;
  static auto& said = *new std::set<std::string>;
  const std::lock_guard lock(mutex);
  if (said.insert(text).second) std::fprintf(stderr, "%s\n", text.c_str());
}

Expanded allocate_expanded(const Queue& queue, const ExpandedLayout& layout) {
  std::shared_ptr<void> memory = queue.allocate(Expanded::bytes(layout));
  void* at = memory.get();
  return {layout, at, std::move(memory)};
}

Expanded expand_activations(const Queue& queue, Gpu gpu, const Activations& a, ElementOrder order, int64_t tile_rows) {
  const Expanded out =
      allocate_expanded(queue, {a.m, round_up(a.m, tile_rows), ceil_div(a.k, kQuadElements), gpu.architecture->sub_group});
  const ExpandedLayout& layout = out.layout;
  const int64_t rows = order == ElementOrder::apart ? layout.padded_rows : layout.rows;
  const Range range = expand_range(order, layout.lanes, rows, layout.quads);
  const Transform& transform = a.to.transform;
  const std::optional<Floats> floats = a.are_codes ? std::nullopt : std::optional(Floats{a.dtype, !transform.is_none()});
  const Variant of_codes = expand_activations_variant(gpu, a.to.format, floats, order,
                                                      alignment_of({a.data, a.are_codes ? nullptr : transform.offset}));
  const Variant variant = floats ? for_rule(of_codes, a.to) : of_codes;
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

std::string gemm(const Queue& queue, const Product& product, const Grouped& grouped) {
  const auto& [a, w, out] = product;
  const Target target = {queue.target().sub_group, false};  // whatever the device's compiler makes of a matrix unit
  const Variant variant = for_output(gemm_variant(target, a.to.format, alignment_of({w.codes}), grouped.kind()), out);
  queue.launch(variant, "gemm", grid(ceil_div(a.m, target.sub_group), w.n),
               GemmArguments{stored(a), stored(w), output_of(product, grouped), w.k, static_cast<int>(out.dtype)});
  return variant.label;
}

std::string gemm_w4a16(const Queue& queue, const Product& product, const Grouped& grouped) {
  const auto& [a, w, out] = product;
  const Variant variant =
      for_output(gemm_w4a16_variant(queue.target(), a.dtype, out.dtype, alignment_of({w.codes}), grouped.kind()), out);
  queue.launch(variant, "gemm_w4a16", grid(a.m, w.n), GemmW4a16Arguments{a.data, stored(w), output_of(product, grouped), w.k});
  return variant.label;
}

std::string gemm_w4a16_matrix(const Queue& queue, Gpu gpu, const GemmPlan& plan, const Product& product,
                              const Grouped& grouped) {
  const auto& [a, w, out] = product;
  const bool split = plan.kernel == Kernel::small;
  const int64_t lanes = gpu.architecture->sub_group;
  const Variant variant =
      for_output(gemm_w4a16_matrix_variant(gpu, plan.tile, split ? plan.group_columns : 1, a.dtype, out.dtype,
                                           starts_cache_line(a.data), alignment_of({w.codes}), grouped.kind()),
                 out);
  // A work-group's sub-groups share one tile's K, or have a tile each.
  Range range = tiles(product, plan.tile, lanes, plan.group_columns);
  if (split) range.global[1] = ceil_div(w.n, plan.tile.columns(lanes)) * plan.group_columns * lanes;
  queue.launch(variant, "gemm_w4a16_matrix", range, GemmW4a16Arguments{a.data, stored(w), output_of(product, grouped), w.k});
  return variant.label;
}

std::string gemm_bdpas(const Queue& queue, Gpu gpu, const GemmPlan& plan, const Product& product) {
  const auto& [a, w, out] = product;
  const Variant variant = for_output(gemm_bdpas_variant(gpu, plan.tile, out.dtype), out);
  queue.launch(variant, "gemm_bdpas", tiles(product, plan.tile, gpu.architecture->sub_group, plan.group_columns),
               GemmArguments{stored(a), stored(w), output_of(product), w.k, static_cast<int>(out.dtype)});
  return variant.label;
}

std::string gemm_small(const Queue& queue, Gpu gpu, const GemmPlan& plan, const Product& product) {
  const int64_t padding = round_up(plan.rows, gpu.architecture->sub_group);
  return gemm_small(queue, gpu, plan, product,
                    expand_activations(queue, gpu, product.activations, ElementOrder::packed, padding));
}

std::string gemm_small(const Queue& queue, Gpu gpu, const GemmPlan& plan, const Product& product, const Expanded& a,
                       const Grouped& grouped) {
  const auto& [activations, w, out] = product;
  const int64_t lanes = gpu.architecture->sub_group;
  const Variant int4 = gemm_small_variant(gpu, activations.to.format, plan.rows, weights_of(w), out.dtype,
                                          alignment_of({w.codes}), grouped.kind());
  const int64_t group_lanes = lanes * small_split(plan.rows);
  const int64_t rows = grouped.kind() == RowTiles::dense     ? ceil_div(activations.m, plan.rows)
                       : grouped.kind() == RowTiles::grouped ? grouped.count
                                                             : grouped.count / grouped.combined->top_k;  // tokens
  const Range range = {2, {rows, ceil_div(w.n, lanes) * group_lanes}, {1, group_lanes}};
  const GemmSmallArguments arguments = {a.arrays, stored(w), output_of(product, grouped), w.k, kStartBits, grouped.combined};
  return launch_decoding(*gpu.architecture, [&](WeightOperand operand) {
    const Variant variant = for_output(with_weight_operand(int4, operand), out);
    queue.launch(variant, "gemm_small", range, arguments);
    return variant.label;
  });
}

std::string gemm_large(const Queue& queue, Gpu gpu, const GemmPlan& plan, const Product& product) {
  return gemm_large(queue, gpu, plan, product,
                    expand_activations(queue, gpu, product.activations, ElementOrder::apart, plan.tile.rows()));
}

// Experts are expanded as one weight with all of their rows, of which each has whole tiles: n is a multiple of kColumnPadding.
std::string gemm_large(const Queue& queue, Gpu gpu, const GemmPlan& plan, const Product& product, const Expanded& a,
                       const Grouped& grouped) {
  const auto& [activations, w, out] = product;
  const int64_t lanes = gpu.architecture->sub_group;
  Weight all = w;
  if (grouped.kind() != RowTiles::dense) all.n *= grouped.experts;
  const Expanded b = expanded_weight(queue, gpu, all);
  const Variant variant = for_output(gemm_large_variant(gpu, activations.to.format, plan.tile, out.dtype, grouped.kind()), out);
  // Work-groups of a panel's rows follow one another, then those of the next columns (docs/GPU.md).
  const int64_t rows = ceil_div(ceil_div(activations.m, plan.tile.rows()), plan.group_rows);
  const int64_t columns = ceil_div(ceil_div(w.n, plan.tile.columns(lanes)), plan.group_columns);
  const int64_t panels = ceil_div(rows, kPanelRows), group_lanes = plan.group_columns * lanes;
  const Range range = {3,
                       {panels, columns * plan.group_rows, ceil_div(rows, std::max<int64_t>(panels, 1)) * group_lanes},
                       {1, plan.group_rows, group_lanes}};
  queue.launch(
      variant, "gemm_large", range,
      GemmLargeArguments{a.arrays, b.arrays, output_of(product, grouped), static_cast<uint32_t>(a.layout.quads), kStartBits});
  return variant.label;
}

}  // namespace xpu_fp4::syclrt::launch
