// SPDX-License-Identifier: Apache-2.0
#include "variants.h"

#include <algorithm>
#include <stdexcept>

namespace xpu_fp4::syclrt {
namespace {

constexpr int kLargeRegisters = 256, kSmallRegisters = 128;

const char* name_of(DType type) { return type == DType::f32 ? "f32" : type == DType::f16 ? "f16" : "bf16"; }

// Part of a label, where the activations are not MXFP4.
const char* suffix(Format of) { return of == Format::mxint8 ? ", W4A8" : ""; }

std::string name_of(Tile tile, int lanes) { return std::to_string(tile.rows()) + "x" + std::to_string(tile.columns(lanes)); }

Macros target_macros(Target target, int alignment) {
  return {{"SUB_GROUP", target.sub_group}, {"MATRIX_UNIT", target.matrix_unit}, {"ALIGNMENT", alignment}};
}

Macros gpu_macros(Gpu gpu, int alignment, Macros own) {
  Macros macros = target_macros({gpu.architecture->sub_group, gpu.matrix_unit}, alignment);
  macros.emplace_back("BLOCK_2D", gpu.architecture->block_2d);
  macros.insert(macros.end(), own.begin(), own.end());
  return macros;
}

Macros with(Macros macros, const char* name, int value) {
  macros.emplace_back(name, value);
  return macros;
}

// A product whose output has another type than its floats.
Macros with_output(Macros macros, DType of, DType out) {
  return of == out ? macros : with(std::move(macros), "Y_DTYPE", static_cast<int>(out));
}

// With the macros and the label of its tiles of rows.
Variant of_tiles(RowTiles tiles, Variant variant) {
  if (tiles == RowTiles::dense) return variant;
  variant.macros.emplace_back("GROUPED", 1);
  variant.label += ", experts";
  if (tiles == RowTiles::combined) {
    variant.macros.emplace_back("COMBINED", 1);
    variant.label += " combined";
  }
  return variant;
}

Macros tile_macros(Tile tile, DType type, int registers) {
  return {{"DTYPE", static_cast<int>(type)},
          {"ROW_UNITS", tile.row_units},
          {"COLUMN_UNITS", tile.column_units},
          {"REGISTERS", registers}};
}

}  // namespace

Variant with_factor(Variant variant) {
  variant.macros.emplace_back("FACTOR", 1);
  variant.label += ", scaled";
  return variant;
}

Variant with_weight_operand(Variant variant, WeightOperand operand) {
  for (auto& [name, value] : variant.macros) {
    if (name == "WEIGHT_OPERAND") value = static_cast<int>(operand);
  }
  if (operand == WeightOperand::int8) variant.label += ", W as int8";
  return variant;
}

Variant with_scale_mode(Variant variant, ScaleMode rule) {
  variant.macros.emplace_back("SCALE_MODE", static_cast<int>(rule));
  variant.label += rule == ScaleMode::abs_max ? ", abs_max" : ", quest";
  return variant;
}

Variant quantize_variant(Target target, DType of, int alignment) {
  return {"quantize.cpp",
          with(target_macros(target, alignment), "DTYPE", static_cast<int>(of)),
          name_of(of),
          {"quantize", "group_quantize", "quantize_mxint8"}};
}

Variant transform_variant(Target target, DType of, int alignment) {
  return {"transform.cpp",
          with(target_macros(target, alignment), "DTYPE", static_cast<int>(of)),
          name_of(of),
          {"transform", "transform_quantize", "transform_quantize_mxint8"}};
}

Variant dequantize_variant(Target target, DType to) {
  return {"dequantize.cpp",
          with(target_macros(target, 16), "DTYPE", static_cast<int>(to)),
          name_of(to),
          {"dequantize", "dequantize_mxint8"}};
}

Variant gemm_variant(Target target, Format of, int alignment, RowTiles tiles) {
  return of_tiles(tiles, {"gemm.cpp",
                          with(target_macros(target, alignment), "FORMAT", static_cast<int>(of)),
                          std::string("no matrix unit") + suffix(of),
                          {"gemm"}});
}

Variant gemm_w4a16_variant(Target target, DType of, DType out, int alignment, RowTiles tiles) {
  return of_tiles(tiles, {"gemm_w4a16.cpp",
                          with_output(with(target_macros(target, alignment), "DTYPE", static_cast<int>(of)), of, out),
                          "no matrix unit",
                          {"gemm_w4a16"}});
}

Variant experts_variant(Target target, DType of) {
  return {"experts.cpp",
          with(target_macros(target, 16), "DTYPE", static_cast<int>(of)),
          name_of(of),
          {"sort_slots", "gather_rows", "gate_rows", "combine_slots"}};
}

Variant expand_weight_variant(Gpu gpu, int alignment) {
  return {"expand.cpp",
          gpu_macros(
              gpu, alignment,
              {{"ARRANGEMENT", static_cast<int>(Arrangement::column_fragments)}, {"FORMAT", static_cast<int>(Format::mxfp4)}}),
          "W",
          {"expand"}};
}

Variant expand_activations_variant(Gpu gpu, Format of, std::optional<Floats> floats, ElementOrder order, int alignment) {
  const Arrangement arrangement = gpu.architecture->block_2d ? Arrangement::rows : Arrangement::row_fragments;
  const bool few_rows = order == ElementOrder::packed;
  Macros own = {{"ARRANGEMENT", static_cast<int>(arrangement)}, {"FORMAT", static_cast<int>(of)}};
  std::string label = few_rows ? "A for few rows" : "A";
  std::vector<std::string> kernels = {"expand"};
  if (floats) {
    own.emplace_back("DTYPE", static_cast<int>(floats->dtype));
    label += std::string(", ") + name_of(floats->dtype);
    kernels.emplace_back("quantize_expand");
  }
  if (floats && floats->transformed) {
    own.emplace_back("TRANSFORM", 1);
    if (!few_rows) own.emplace_back("REGISTERS", kLargeRegisters);
    kernels = {"transform_quantize_expand"};
  }
  return {few_rows ? "expand_row.cpp" : "expand.cpp", gpu_macros(gpu, alignment, own), label + suffix(of), kernels};
}

Variant expand_experts_variant(Gpu gpu, Format of, DType dtype, ElementOrder order, int alignment) {
  Variant variant = expand_activations_variant(gpu, of, Floats{dtype, false}, order, alignment);
  variant.macros.emplace_back("EXPERTS", 1);
  if (of == Format::mxint8 && order == ElementOrder::apart) variant.macros.emplace_back("REGISTERS", kLargeRegisters);
  variant.label += ", experts";
  variant.kernels = {"gather_quantize_expand", "gate_quantize_expand"};
  return variant;
}

Variant gemm_small_variant(Gpu gpu, Format of, int rows, Weights weights, DType out, int alignment, RowTiles tiles) {
  const char* known = weights == Weights::any ? ", any K" : weights == Weights::whole_quads ? ", scales apart" : "";
  return of_tiles(tiles, {"gemm_small.cpp",
                          gpu_macros(gpu, alignment,
                                     {{"DTYPE", static_cast<int>(out)},
                                      {"ROWS", rows},
                                      {"WEIGHTS", static_cast<int>(weights)},
                                      {"WEIGHT_OPERAND", static_cast<int>(WeightOperand::int4)},
                                      {"FORMAT", static_cast<int>(of)}}),
                          std::to_string(rows) + " rows" + known + suffix(of),
                          {"gemm_small"}});
}

Variant gemm_large_variant(Gpu gpu, Format of, Tile tile, DType out, RowTiles tiles) {
  return of_tiles(tiles, {"gemm_large.cpp",
                          gpu_macros(gpu, 16, with(tile_macros(tile, out, kLargeRegisters), "FORMAT", static_cast<int>(of))),
                          name_of(tile, gpu.architecture->sub_group) + " " + name_of(out) + suffix(of),
                          {"gemm_large"}});
}

Variant gemm_bdpas_variant(Gpu gpu, Tile tile, DType out) {
  return {"gemm_bdpas.cpp",
          gpu_macros(gpu, 16, tile_macros(tile, out, kLargeRegisters)),
          name_of(tile, gpu.architecture->sub_group) + " " + name_of(out),
          {"gemm_bdpas"}};
}

Variant gemm_w4a16_matrix_variant(Gpu gpu, Tile tile, int split, DType of, DType out, bool aligned_rows, int alignment,
                                  RowTiles tiles) {
  Macros own = with_output(tile_macros(tile, of, split > 1 ? kSmallRegisters : kLargeRegisters), of, out);
  own.insert(own.end(), {{"SPLIT", split}, {"ALIGNED_ROWS", aligned_rows}});
  const std::string types = out == of ? name_of(of) : std::string(name_of(of)) + " to " + name_of(out);
  return of_tiles(tiles, {"gemm_w4a16_matrix.cpp",
                          gpu_macros(gpu, alignment, own),
                          name_of(tile, gpu.architecture->sub_group) + " " + types + (split > 1 ? ", K split" : ""),
                          {"gemm_w4a16_matrix"}});
}

// ---- all of them, for `make isa` ----

namespace {

// In the form that the device takes unless someone asks for the other.
Variant usual_small_variant(Gpu gpu, Format of, int rows, Weights weights, DType out) {
  return with_weight_operand(gemm_small_variant(gpu, of, rows, weights, out, 16), gpu.architecture->weight_operand);
}

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};
constexpr Format kFormats[] = {Format::mxfp4, Format::mxint8};

struct Counted {
  Variant variant;
  bool budgeted = true;  // held to the budgets of its kernels; without, to soundness alone
};

void add_products(const Architecture& architecture, std::vector<Counted>& all) {
  const Gpu gpu = {&architecture, true};
  for (const Format of : kFormats) {
    for (const DType out : kDTypes) all.push_back({gemm_large_variant(gpu, of, architecture.large, out)});
    all.push_back({gemm_large_variant(gpu, of, architecture.medium, DType::bf16), false});
    for (const int rows : kSmallTiles) {
      for (const Weights weights : {Weights::scales_together, Weights::whole_quads}) {
        all.push_back({gemm_small_variant(gpu, of, rows, weights, DType::bf16, 16)});
      }
    }
    for (const int rows : {8, 32}) all.push_back({gemm_small_variant(gpu, of, rows, Weights::any, DType::bf16, 16)});
    for (const int rows : kSmallTiles) {
      if (rows != 1 && rows != 32 && architecture.weight_operand == WeightOperand::int4) continue;
      const Variant small = gemm_small_variant(gpu, of, rows, Weights::scales_together, DType::bf16, 16);
      all.push_back({with_weight_operand(small, WeightOperand::int8)});
    }
  }
  for (const DType of : {DType::bf16, DType::f16}) {
    all.push_back({gemm_w4a16_matrix_variant(gpu, architecture.w4a16, 1, of, of, true, 16)});
  }
  for (const int row_units : {1, 2, 4}) {
    all.push_back({gemm_w4a16_matrix_variant(gpu, {row_units, 1}, kSmallSplit, DType::bf16, DType::bf16, true, 16)});
  }
  all.push_back({with_factor(gemm_large_variant(gpu, Format::mxfp4, architecture.large, DType::bf16)), false});
  all.push_back({with_factor(gemm_small_variant(gpu, Format::mxfp4, 8, Weights::scales_together, DType::bf16, 16)), false});
  if (architecture.bdpas.row_units > 0) all.push_back({gemm_bdpas_variant(gpu, architecture.bdpas, DType::bf16)});
}

// Of experts: what their tiles add to the dense kernels, in a few of them.
void add_experts(const Architecture& architecture, std::vector<Counted>& all) {
  const Gpu gpu = {&architecture, true};
  const RowTiles grouped = RowTiles::grouped;
  const Weights together = Weights::scales_together;
  all.push_back({gemm_large_variant(gpu, Format::mxfp4, architecture.large, DType::bf16, grouped)});
  all.push_back({gemm_large_variant(gpu, Format::mxint8, architecture.large, DType::f32, grouped)});
  for (const Format of : kFormats)
    all.push_back({gemm_small_variant(gpu, of, 1, together, DType::bf16, 16, RowTiles::combined)});
  all.push_back({gemm_small_variant(gpu, Format::mxint8, 1, together, DType::bf16, 16, grouped)});
  for (const int rows : {8, 32})
    all.push_back({gemm_small_variant(gpu, Format::mxint8, rows, Weights::any, DType::bf16, 16, grouped)});
  all.push_back({gemm_w4a16_matrix_variant(gpu, architecture.w4a16, 1, DType::bf16, DType::f32, true, 16, grouped)});
  all.push_back({gemm_w4a16_matrix_variant(gpu, {1, 1}, kSmallSplit, DType::bf16, DType::f32, true, 16, grouped)});
  for (const Format of : kFormats) {
    for (const ElementOrder order : {ElementOrder::apart, ElementOrder::packed}) {
      all.push_back({expand_experts_variant(gpu, of, DType::bf16, order, 16)});
    }
  }
  all.push_back({experts_variant({architecture.sub_group, true}, DType::bf16)});
}

// Where devices differ little, one with each sub-group stands for the others.
bool stands_for_others(const Architecture& architecture) {
  const std::string name = architecture.name;
  return name == "bmg" || name == "dg2";
}

// Kernels that stream through memory.
void add_streams(const Architecture& architecture, std::vector<Counted>& all) {
  const Gpu gpu = {&architecture, true};
  const Target target = {architecture.sub_group, true};
  all.push_back({expand_weight_variant(gpu, 16)});
  for (const DType dtype : kDTypes) {
    if (dtype != DType::bf16 && !stands_for_others(architecture)) continue;
    for (const Format of : kFormats) {
      for (const ElementOrder order : {ElementOrder::apart, ElementOrder::packed}) {
        for (const bool transformed : {false, true}) {
          all.push_back({expand_activations_variant(gpu, of, Floats{dtype, transformed}, order, 16)});
        }
      }
    }
    all.push_back({quantize_variant(target, dtype, 16)});
    all.push_back({transform_variant(target, dtype, 16)});
    all.push_back({dequantize_variant(target, dtype)});
  }
}

// Quantizers by FP-Quant's rules.
void add_rules(const Architecture& architecture, std::vector<Counted>& all) {
  if (!stands_for_others(architecture)) return;
  const Gpu gpu = {&architecture, true};
  const Target target = {architecture.sub_group, true};
  for (const ScaleMode rule : {ScaleMode::abs_max, ScaleMode::quest}) {
    const Floats floats = {DType::bf16, true};
    for (const Variant& variant : {expand_activations_variant(gpu, Format::mxfp4, floats, ElementOrder::apart, 16),
                                   quantize_variant(target, DType::bf16, 16), transform_variant(target, DType::bf16, 16)}) {
      all.push_back({with_scale_mode(variant, rule), false});
    }
  }
}

// For GPUs without a matrix unit, which we do not know: compiled for ones that we do.
void add_portable(const Architecture& architecture, std::vector<Counted>& all) {
  if (!stands_for_others(architecture)) return;
  const Target target = {architecture.sub_group, false};
  for (const RowTiles tiles : {RowTiles::dense, RowTiles::grouped}) {
    for (const Format of : kFormats) all.push_back({gemm_variant(target, of, 16, tiles)});
    all.push_back({gemm_w4a16_variant(target, DType::bf16, tiles == RowTiles::dense ? DType::bf16 : DType::f32, 16, tiles)});
  }
}

// ---- those that are compiled when the library is built ----

constexpr DType kHalves[] = {DType::bf16, DType::f16};

// What a list has already is left out: architectures share programs.
void add(std::vector<Variant>& all, Variant variant) {
  const auto same = [&](const Variant& known) { return known.file == variant.file && known.macros == variant.macros; };
  if (std::none_of(all.begin(), all.end(), same)) all.push_back(std::move(variant));
}

// Of a linear whose x has that type.
void add_linear(Gpu gpu, DType of, std::vector<Variant>& all) {
  const Architecture& architecture = *gpu.architecture;
  for (const Format format : kFormats) {
    for (const ElementOrder order : {ElementOrder::apart, ElementOrder::packed}) {
      add(all, expand_activations_variant(gpu, format, Floats{of, false}, order, 16));
    }
    for (const Tile tile : {architecture.large, architecture.medium}) add(all, gemm_large_variant(gpu, format, tile, of));
    for (const int rows : kSmallTiles) {
      add(all, usual_small_variant(gpu, format, rows, Weights::scales_together, of));
    }
  }
  add(all, gemm_w4a16_matrix_variant(gpu, architecture.w4a16, 1, of, of, true, 16));
  for (const int row_units : {1, 2, 4}) {
    add(all, gemm_w4a16_matrix_variant(gpu, {row_units, 1}, kSmallSplit, of, of, true, 16));
  }
}

// What `xpu-fp4 doctor` takes beside that: float32, a Hadamard, K within a quad, weights as int8, the portable kernels.
void add_doctor(Gpu gpu, std::vector<Variant>& all) {
  const Target target = {gpu.architecture->sub_group, true};
  for (const Format format : kFormats) {
    for (const ElementOrder order : {ElementOrder::apart, ElementOrder::packed}) {
      add(all, expand_activations_variant(gpu, format, Floats{DType::bf16, true}, order, 16));
    }
    add(all, expand_activations_variant(gpu, format, Floats{DType::f32, false}, ElementOrder::packed, 16));
    add(all, usual_small_variant(gpu, format, 32, Weights::scales_together, DType::f32));
    for (const int rows : {8, 32}) add(all, usual_small_variant(gpu, format, rows, Weights::any, DType::bf16));
    for (const WeightOperand operand : {WeightOperand::int4, WeightOperand::int8}) {
      add(all, with_weight_operand(gemm_small_variant(gpu, format, 8, Weights::any, DType::bf16, 16), operand));
    }
    add(all, gemm_variant({target.sub_group, false}, format, 16));
  }
  for (const DType of : kHalves) add(all, gemm_w4a16_variant(target, of, of, 16));
  for (const DType of : {DType::bf16, DType::f32}) add(all, quantize_variant(target, of, 16));
  add(all, transform_variant(target, DType::bf16, 16));
}

std::vector<Variant> ahead_for_gpus() {
  std::vector<Variant> all;
  for (const Architecture& architecture : architectures()) {
    const Gpu gpu = {&architecture, true};
    add(all, expand_weight_variant(gpu, 16));
    for (const DType of : kHalves) add_linear(gpu, of, all);
    add_doctor(gpu, all);
  }
  return all;
}

// A few of each source but those that take the CPU device's compiler long.
std::vector<Variant> ahead_for_tests() {
  const Target target = {16, false};
  std::vector<Variant> all;
  for (const DType of : kDTypes) {
    add(all, dequantize_variant(target, of));
    for (const int alignment : {16, 1}) add(all, quantize_variant(target, of, alignment));
  }
  add(all, transform_variant(target, DType::bf16, 16));
  for (const ScaleMode rule : {ScaleMode::abs_max, ScaleMode::quest}) {
    add(all, with_scale_mode(quantize_variant(target, DType::bf16, 16), rule));
  }
  for (const Architecture& architecture : architectures()) {
    const Gpu gpu = {&architecture, false};
    for (const int alignment : {16, 1}) add(all, expand_weight_variant(gpu, alignment));
    if (!stands_for_others(architecture)) continue;
    for (const DType of : kHalves) add(all, gemm_w4a16_matrix_variant(gpu, {1, 1}, kSmallSplit, of, of, true, 16));
  }
  return all;
}

std::string quoted(const std::string& text) { return '"' + text + '"'; }

template <class Items, class Render>
std::string joined(const Items& items, const Render& render) {
  std::string text;
  for (const auto& item : items) text += (text.empty() ? "" : ", ") + render(item);
  return text;
}

std::string json(const Counted& counted) {
  const Variant& variant = counted.variant;
  const std::string macros = joined(
      variant.macros, [](const auto& macro) { return quoted(std::string(macro.first)) + ": " + std::to_string(macro.second); });
  return "{\"file\": " + quoted(variant.file) + ", \"label\": " + quoted(variant.label) + ", \"macros\": {" + macros +
         "}, \"kernels\": [" + joined(variant.kernels, quoted) + "], \"budgeted\": " + (counted.budgeted ? "true" : "false") +
         "}";
}

std::string json(const Architecture& architecture) {
  std::vector<Counted> all;
  add_products(architecture, all);
  add_experts(architecture, all);
  add_streams(architecture, all);
  add_rules(architecture, all);
  add_portable(architecture, all);
  const Costs& costs = architecture.costs;
  const std::string splits =
      joined(kSmallTiles, [](int rows) { return "[" + std::to_string(rows) + ", " + std::to_string(small_split(rows)) + "]"; });
  return "{\"name\": " + quoted(architecture.name) + ", \"block_2d\": " + (architecture.block_2d ? "true" : "false") +
         ", \"small_split\": [" + splits + "], \"fetched_ahead\": " + std::to_string(kMostRowsFetchedAhead) +
         ", \"weights_as_int8\": " + (architecture.weight_operand == WeightOperand::int8 ? "true" : "false") +
         ", \"group\": [" + std::to_string(architecture.group_rows) + ", " + std::to_string(kGroupColumns) +
         "], \"panel\": " + std::to_string(kPanelRows) + ", \"costs\": {\"matrix\": " + std::to_string(costs.matrix) +
         ", \"bytes\": " + std::to_string(costs.bytes) + ", \"small\": " + std::to_string(costs.small) +
         ", \"small_row\": " + std::to_string(costs.small_row) + "}, \"programs\": [" +
         joined(all, [](const Counted& counted) { return json(counted); }) + "]}";
}

}  // namespace

std::vector<Variant> ahead_of_time(const std::string& whom) {
  if (whom == "gpus") return ahead_for_gpus();
  if (whom == "tests") return ahead_for_tests();
  throw std::runtime_error("xpu_fp4: programs are compiled ahead of time for \"gpus\" or for \"tests\", not for \"" + whom +
                           "\"");
}

std::string variants_json() {
  return "[" + joined(architectures(), [](const Architecture& architecture) { return json(architecture); }) + "]";
}

}  // namespace xpu_fp4::syclrt
