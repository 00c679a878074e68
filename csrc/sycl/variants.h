// SPDX-License-Identifier: Apache-2.0
// The programs that kernels/ is compiled to: a source and its macros. The launches (launch/) build what they need through
// these functions; `make isa` compiles all that an architecture can need, from the same ones.
#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../product.h"
#include "architectures.h"
#include "kernels/layout.hpp"

namespace xpu_fp4::syclrt {

/// Macros of kernels/, without the XPU_FP4_ before them. The names are literals: a launch writes such a list, and copies of
/// strings were a third of its time.
using Macros = std::vector<std::pair<std::string_view, int>>;

/// A source, compiled with these macros.
struct Variant {
  std::string file;  // "gemm.cpp"
  Macros macros;
  std::string label = {};                 // of the variants of a source: "64x32 bf16"
  std::vector<std::string> kernels = {};  // that it gives
};

/// How our kernels are compiled for a device where no architecture's own kernels are: 16 lanes, 8 where its matrix unit is so
/// wide or the environment asks for it.
struct Target {
  int sub_group;
  bool matrix_unit;
};

/// Kernels of an architecture, for its matrix unit or for the stand-in of other devices.
struct Gpu {
  const Architecture* architecture;
  bool matrix_unit;
};

/// Of a product whose sums are multiplied by a factor.
Variant with_factor(Variant variant);
/// Of gemm_small whose weights become such operands.
Variant with_weight_operand(Variant variant, WeightOperand operand);
/// Of a quantizer whose MXFP4 scales follow that one of FP-Quant's rules.
Variant with_scale_mode(Variant variant, ScaleMode rule);
/// Whose a product's tiles of rows are: they share a weight; each has an expert's; or that, and a token's tiles are added up.
enum class RowTiles { dense, grouped, combined };

// `alignment`: 16 or 1 (kernels/common.hpp). `of`: the format of the activations.
Variant quantize_variant(Target target, DType of, int alignment);
/// For floats that are transformed first, and then quantized or rounded.
Variant transform_variant(Target target, DType of, int alignment);
Variant dequantize_variant(Target target, DType to);
Variant gemm_variant(Target target, Format of, int alignment, RowTiles tiles = RowTiles::dense);
/// `out`: Y's type, X's or, of experts, float32.
Variant gemm_w4a16_variant(Target target, DType of, DType out, int alignment, RowTiles tiles = RowTiles::dense);
/// What a layer of experts does beside its products.
Variant experts_variant(Target target, DType of);
/// The quantizers of a layer of experts, for products on a matrix unit.
Variant expand_experts_variant(Gpu gpu, Format of, DType dtype, ElementOrder order, int alignment);
Variant expand_weight_variant(Gpu gpu, int alignment);
/// Activations that are quantized on the way.
struct Floats {
  DType dtype;
  bool transformed;
};
/// `floats`: none for codes.
Variant expand_activations_variant(Gpu gpu, Format of, std::optional<Floats> floats, ElementOrder order, int alignment);
Variant gemm_small_variant(Gpu gpu, Format of, int rows, Weights weights, DType out, int alignment,
                           RowTiles tiles = RowTiles::dense);
Variant gemm_large_variant(Gpu gpu, Format of, Tile tile, DType out, RowTiles tiles = RowTiles::dense);
Variant gemm_bdpas_variant(Gpu gpu, Tile tile, DType out);
/// `split`: sub-groups that share K.
Variant gemm_w4a16_matrix_variant(Gpu gpu, Tile tile, int split, DType of, DType out, bool aligned_rows, int alignment,
                                  RowTiles tiles = RowTiles::dense);

/// The programs that are compiled when the library is built. `whom`: "gpus" for those of every GPU that `xpu-fp4 doctor` and
/// dense products of 16-bit floats take, with aligned operands, K in whole quads and scales that lie together; "tests" for some
/// of SYCL's CPU device that take little time to compile. Throws std::runtime_error for others.
std::vector<Variant> ahead_of_time(const std::string& whom);

/// The architectures and, of each, the programs of aligned operands that `make isa` counts, as JSON.
std::string variants_json();

}  // namespace xpu_fp4::syclrt
