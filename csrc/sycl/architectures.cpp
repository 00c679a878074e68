// SPDX-License-Identifier: Apache-2.0
#include "architectures.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#include "../format/integer.h"

namespace xpu_fp4::syclrt {
namespace {

// Most rows of a work-group that splits K: of gemm_small.cpp, and of W4A16.
constexpr int kSmallRows = *(std::end(kSmallTiles) - 1);

// Bytes of an element: of a packed weight with its scale, of an expanded one with its exponents.
constexpr double kPackedBytes = 0.53, kExpandedBytes = 1.03;

// Elements of a layer's experts that are expanded for a product, scratch memory of as many bytes: 1 GiB.
constexpr int64_t kMostExpanded = int64_t{1} << 30;

int small_rows(int64_t m) {
  const auto fits = std::find_if(std::begin(kSmallTiles), std::end(kSmallTiles), [&](int rows) { return rows >= m; });
  return fits != std::end(kSmallTiles) ? *fits : kSmallRows;
}

double memory_clocks(const Architecture& architecture, int64_t units, const ProductShape& shape, double bytes_per_weight) {
  return static_cast<double>(shape.n) * static_cast<double>(shape.k) * bytes_per_weight /
         (architecture.costs.bytes * static_cast<double>(units));
}

// Clocks of gemm_small, or of gemm_large with its pre-pass over the weight: arithmetic and memory traffic run beside each
// other, caches do not help. The pre-pass over A, the bias and the stores are alike in all.
double small_clocks(const Architecture& architecture, int64_t units, const ProductShape& shape) {
  const int rows = small_rows(shape.m);
  const int64_t passes = ceil_div(shape.m, rows), groups = passes * ceil_div(shape.n, architecture.sub_group);
  // For any rows as with eight sub-groups that share K: where there are more, they have the same work, or none.
  const int64_t quads_each = ceil_div(ceil_div(shape.k, kQuadElements), kSmallSplit);
  const double per_256_bytes = architecture.costs.small + architecture.costs.small_row * rows;
  const double per_quad = per_256_bytes * architecture.sub_group * (kQuadElements / 2) / 256;
  const double arithmetic = static_cast<double>(ceil_div(groups * kSmallSplit, units) * quads_each) * per_quad;
  return std::max(arithmetic, static_cast<double>(passes) * memory_clocks(architecture, units, shape, kPackedBytes));
}

double large_clocks(const Architecture& architecture, int64_t units, const ProductShape& shape, Tile tile) {
  const int64_t tiles = ceil_div(shape.m, tile.rows()) * ceil_div(shape.n, tile.columns(architecture.sub_group));
  // A vector engine wants two threads, to hide one's latency behind the other's work: one alone takes as long as two.
  const int64_t rounds = std::max<int64_t>(2, ceil_div(tiles, units));
  const auto instructions =
      static_cast<double>(rounds * ceil_div(shape.k, kQuadElements) * kQuad * tile.row_units * tile.column_units);
  const double product =
      std::max(instructions * architecture.costs.matrix, memory_clocks(architecture, units, shape, kExpandedBytes));
  return product + (shape.expanded ? 0 : memory_clocks(architecture, units, shape, kPackedBytes + kExpandedBytes));
}

const Architecture* find(const std::string& name) {
  for (const Architecture& architecture : architectures()) {
    if (name == architecture.name) return &architecture;
  }
  return nullptr;
}

// SYCL numbers a GPU's architecture by its IP version: eight bits each of release and revision below the major number.
struct IpVersion {
  uint64_t major, minor;
};
IpVersion ip_version(uint64_t bits) { return {bits >> 30, (bits >> 22) & 0xFF}; }

// 12.61, the Max without a matrix unit, is not among them.
const char* name_of(IpVersion ip) {
  switch (ip.major) {
    case 12: return ip.minor == 60 ? "pvc" : ip.minor >= 55 && ip.minor <= 59 ? "dg2" : "";
    case 20: return ip.minor >= 4 ? "lnl-m" : "bmg";
    case 30: return "ptl";
    case 35: return "cri";
    default: return "";
  }
}

// Devices that the tables of runtimes in use lack, 2025.3 and 2026.0 for instance. Their ids are those of Intel's
// compute-runtime, device_ids_configs_bmg.h and _ptl.h.
const char* name_of_device(uint32_t id) {
  switch (id) {
    case 0xE220:
    case 0xE221:
    case 0xE222:
    case 0xE223: return "bmg";  // BMG-G31: Arc Pro B70
    case 0xFD80:
    case 0xFD81: return "ptl";  // Wildcat Lake
    default: return "";
  }
}

}  // namespace

const std::vector<Architecture>& architectures() {
  static const std::vector<Architecture> table = {
      {"dg2", 8, false, {2, 4}, {2, 2}, 8, {8, 1}, {}, {16, 0.52, 160, 7.7}},   // Alchemist
      {"pvc", 16, true, {6, 2}, {4, 2}, 4, {16, 1}, {}, {8, 2.0, 82, 3.0}},     // Ponte Vecchio
      {"lnl-m", 16, true, {6, 2}, {4, 2}, 4, {8, 2}, {}, {16, 1.04, 74, 3.0}},  // Xe2: Lunar Lake
      {"bmg", 16, true, {6, 2}, {4, 2}, 4, {8, 2}, {}, {16, 1.07, 74, 3.0}},    // Xe2: Battlemage
      {"ptl", 16, true, {6, 2}, {4, 2}, 4, {8, 2}, {}, {16, 0.64, 74, 3.0}},    // Xe3: Panther Lake
      // Xe3P: Crescent Island. Its compiler emits int8 x int4, which oneDNN says that the hardware lacks (docs/GPU.md).
      {"cri", 16, true, {6, 2}, {4, 2}, 4, {8, 2}, {4, 4}, {16, 1.02, 195, 2.7}, WeightOperand::int8},
  };
  return table;
}

const Architecture* architecture_of(uint64_t version, uint32_t device_id) {
  return find(version != 0 ? name_of(ip_version(version)) : name_of_device(device_id));
}

Override variant_override() {
  const char* variable = std::getenv("XPU_FP4_SYCL_VARIANT");
  if (variable == nullptr || *variable == '\0') return {};
  const std::string value = variable;
  if (value == "portable") return {nullptr, Kernel::portable};
  const size_t colon = value.find(':');
  const std::string kernel = colon == std::string::npos ? "" : value.substr(colon + 1);
  const Architecture* architecture = find(value.substr(0, colon));
  if (architecture != nullptr && kernel.empty() && colon == std::string::npos) return {architecture, std::nullopt};
  if (architecture != nullptr && kernel == "small") return {architecture, Kernel::small};
  if (architecture != nullptr && kernel == "medium") return {architecture, Kernel::medium};
  if (architecture != nullptr && kernel == "large") return {architecture, Kernel::large};
  if (architecture != nullptr && kernel == "bdpas" && architecture->bdpas.row_units > 0) return {architecture, Kernel::bdpas};
  std::string names;
  for (const Architecture& known : architectures()) names += std::string(names.empty() ? "" : ", ") + known.name;
  throw std::runtime_error("xpu_fp4: XPU_FP4_SYCL_VARIANT is \"" + value +
                           "\", expected \"portable\", or NAME, NAME:small, NAME:medium or NAME:large with NAME one of " +
                           names + ", or cri:bdpas");
}

std::optional<WeightOperand> weight_operand_override() {
  const char* variable = std::getenv("XPU_FP4_WEIGHT_OPERAND");
  if (variable == nullptr || *variable == '\0') return std::nullopt;
  const std::string value = variable;
  if (value == "int4") return WeightOperand::int4;
  if (value == "int8") return WeightOperand::int8;
  throw std::runtime_error("xpu_fp4: XPU_FP4_WEIGHT_OPERAND is \"" + value + "\", expected \"int4\" or \"int8\"");
}

GemmPlan plan_gemm(const Architecture& architecture, int64_t compute_units, const ProductShape& shape,
                   std::optional<Kernel> forced) {
  const auto small = [&]() -> GemmPlan { return {Kernel::small, {}, 1, 1, small_rows(shape.m)}; };
  const auto large = [&](Tile tile) -> GemmPlan {
    // A work-group's tiles share their operands in the first cache: one work-group per core.
    const auto fit = [](int64_t wanted, int64_t available) {
      while (wanted / 2 >= available) wanted /= 2;
      return static_cast<int>(wanted);
    };
    return {Kernel::large, tile, fit(architecture.group_rows, ceil_div(shape.m, tile.rows())),
            fit(kGroupColumns, ceil_div(shape.n, tile.columns(architecture.sub_group))), 0};
  };
  if (forced) {
    switch (*forced) {
      case Kernel::portable: return {Kernel::portable, {}, 1, 1, 0};
      case Kernel::bdpas: return {Kernel::bdpas, architecture.bdpas, 1, 4, 0};
      case Kernel::small: return small();
      case Kernel::medium: return large(architecture.medium);
      case Kernel::large: return large(architecture.large);
    }
  }
  // Medium tiles load their operands more often, which is not in the model: rounding alone must not decide for them.
  const ModelledClocks clocks = {small_clocks(architecture, compute_units, shape),
                                 1.1 * large_clocks(architecture, compute_units, shape, architecture.medium),
                                 large_clocks(architecture, compute_units, shape, architecture.large)};
  GemmPlan plan = clocks.small <= std::min(clocks.large, clocks.medium)
                      ? small()
                      : large(clocks.large <= clocks.medium ? architecture.large : architecture.medium);
  plan.clocks = clocks;
  return plan;
}

int64_t ExpertsShape::rows() const { return ceil_div(slots, std::min(slots, experts)); }

GemmPlan plan_grouped_gemm(const Architecture& architecture, int64_t compute_units, const ExpertsShape& shape,
                           std::optional<Kernel> forced) {
  const ProductShape dense = {shape.rows(), shape.n * std::min(shape.slots, shape.experts), shape.k, false};
  if (forced == Kernel::bdpas) forced = std::nullopt;
  const bool fits = shape.experts * shape.n * shape.k <= kMostExpanded;
  GemmPlan plan = plan_gemm(architecture, compute_units, dense, forced || fits ? forced : Kernel::small);
  if (plan.kernel == Kernel::small && !shape.few()) plan.rows = small_rows(2 * shape.rows());  // routers are not even
  return plan;
}

GemmPlan plan_w4a16(const Architecture& architecture, int64_t m, std::optional<Kernel> forced) {
  const Kernel by_rows = m <= kSmallRows ? Kernel::small : Kernel::large;
  const bool of_both = forced == Kernel::small || forced == Kernel::medium || forced == Kernel::large;
  const Kernel kernel = of_both ? *forced : by_rows;
  if (kernel != Kernel::small) return {Kernel::large, architecture.w4a16, 1, 4, 0};
  const int row_units = m <= kRowUnit ? 1 : m <= 2 * kRowUnit ? 2 : 4;
  return {kernel, {row_units, 1}, 1, kSmallSplit, kRowUnit * row_units};
}

}  // namespace xpu_fp4::syclrt
