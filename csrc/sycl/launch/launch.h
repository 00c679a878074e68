// SPDX-License-Identifier: Apache-2.0
// Launches of the kernels in kernels/: a function each, which chooses the program's variant, the range and the arguments.
#pragma once
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>

#include "../../product.h"
#include "../kernels/arguments.hpp"
#include "../queue.h"

namespace xpu_fp4::syclrt::launch {

/// The alignment variant that these addresses allow.
int alignment_of(std::initializer_list<const void*> addresses);
bool starts_cache_line(const void* address);

/// Rows x lanes in work-groups of one row; enough lanes to fill a core, few enough that small outputs spread over all of them.
Range grid(int64_t rows, int64_t lanes);

/// That of the kernels that write the expanded form of `rows` rows, padded ones among them where the kernel has to see those.
Range expand_range(ElementOrder order, int lanes, int64_t rows, int64_t quads);

/// On stderr, once for each text, however many threads and calls meet its cause.
void warn(const std::string& text);

/// The program of a quantizer that follows its rule for scales.
Variant for_rule(Variant variant, const Quantizer& to);

// ---- conversions ----
/// x, transformed, to codes and scales; where the format is none to floats of its dtype, in the place of codes.
void transform(const Queue& queue, const Quantize& args);
void quantize(const Queue& queue, const Quantize& args);
void group_quantize(const Queue& queue, const GroupQuantize& args);
void dequantize(const Queue& queue, const Dequantize& args);

/// An operand in the expanded form of kernels/layout.hpp. Each array starts on a cache line, as block loads want it.
struct Expanded {
  ExpandedLayout layout;
  ExpandedOperand arrays;
  std::shared_ptr<void> memory;  // null where it is the caller's

  Expanded(const ExpandedLayout& of, void* at, std::shared_ptr<void> owned = nullptr);
  static int64_t bytes(const ExpandedLayout& layout);
};
ExpandedLayout weight_layout(const Architecture& architecture, int64_t n, int64_t k);
void expand_weight(const Queue& queue, Gpu gpu, const Weight& w, const Expanded& out);

// ---- experts ----
/// Tiles of rows with weights of their own, in a product whose m is theirs all and whose weight is the first expert's, of as
/// many as there are. `combined`: a token's slots, a tile of one row each, are added up, and y's rows are tokens.
struct Grouped {
  const ExpertTile* tiles = nullptr;
  int64_t count = 0;  // of tiles
  int64_t experts = 0;
  const SlotWeights* combined = nullptr;

  RowTiles kind() const {
    return tiles == nullptr ? RowTiles::dense : combined == nullptr ? RowTiles::grouped : RowTiles::combined;
  }
};

/// How a layer of experts runs: on the portable kernels where there is no GPU. Slots that are not sorted have a tile each.
struct ExpertsPlan {
  std::optional<Gpu> gpu;
  GemmPlan product;
  bool sorted = true;
};
/// The kernels that ran, in their order.
std::string experts(const Queue& queue, const ExpertsPlan& plan, const Experts& args);

// ---- products on devices without a matrix unit: activations as codes, or as floats ----
std::string gemm(const Queue& queue, const Product& product, const Grouped& grouped = {});
std::string gemm_w4a16(const Queue& queue, const Product& product, const Grouped& grouped = {});

// ---- products on a matrix unit. Each returns the label of the variant that it took ----
std::string gemm_small(const Queue& queue, Gpu gpu, const GemmPlan& plan, const Product& product);
std::string gemm_large(const Queue& queue, Gpu gpu, const GemmPlan& plan, const Product& product);
std::string gemm_bdpas(const Queue& queue, Gpu gpu, const GemmPlan& plan, const Product& product);
std::string gemm_w4a16_matrix(const Queue& queue, Gpu gpu, const GemmPlan& plan, const Product& product,
                              const Grouped& grouped = {});

// ---- and their parts: activations that are expanded already, of product.activations.m padded rows ----
Expanded allocate_expanded(const Queue& queue, const ExpandedLayout& layout);
/// The rows are padded to whole tiles.
Expanded expand_activations(const Queue& queue, Gpu gpu, const Activations& a, ElementOrder order, int64_t tile_rows);
std::string gemm_small(const Queue& queue, Gpu gpu, const GemmPlan& plan, const Product& product, const Expanded& a,
                       const Grouped& grouped = {});
std::string gemm_large(const Queue& queue, Gpu gpu, const GemmPlan& plan, const Product& product, const Expanded& a,
                       const Grouped& grouped = {});

}  // namespace xpu_fp4::syclrt::launch
