// SPDX-License-Identifier: Apache-2.0
#include "architectures.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

namespace xpu_fp4::syclrt {
namespace {

namespace syclexp = sycl::ext::oneapi::experimental;

// Rows beyond which expanding the weights, 1.5 bytes of traffic for each, costs less than decoding them for every 32 rows.
constexpr int kSmallRows = 32;
// Rows for which gemm_small.cpp is compiled.
constexpr int kSmallTiles[] = {1, 4, 8, 16, kSmallRows};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
IpVersion ip_version(syclexp::architecture architecture) {
  const auto bits = static_cast<uint64_t>(architecture);
  return {bits >> 30, (bits >> 22) & 0xFF};
}

const char* name_of(IpVersion ip) {
  switch (ip.major) {
    case 12: return ip.minor >= 60 && ip.minor <= 61 ? "pvc" : ip.minor >= 55 && ip.minor <= 59 ? "dg2" : "";
    case 20: return ip.minor >= 4 ? "lnl-m" : "bmg";
    case 30: return "ptl";
    case 35: return "cri";
    default: return "";
  }
}

}  // namespace

const std::vector<Architecture>& architectures() {
  static const std::vector<Architecture> table = {
      {"dg2", 8, false, {2, 4}, {2, 2}, {8, 1}, {}},      // Alchemist
      {"pvc", 16, true, {8, 2}, {4, 2}, {16, 1}, {}},     // Ponte Vecchio
      {"lnl-m", 16, true, {8, 2}, {4, 2}, {8, 2}, {}},    // Xe2: Lunar Lake
      {"bmg", 16, true, {8, 2}, {4, 2}, {8, 2}, {}},      // Xe2: Battlemage
      {"ptl", 16, true, {6, 2}, {4, 2}, {8, 2}, {}},      // Xe3: Panther Lake
      {"cri", 16, true, {6, 2}, {4, 2}, {8, 2}, {4, 4}},  // Xe3P: Crescent Island
  };
  return table;
}

const Architecture* architecture_of(const sycl::device& device) {
  if (!device.is_gpu() || !device.has(sycl::aspect::ext_intel_matrix)) return nullptr;
  return find(name_of(ip_version(device.get_info<syclexp::info::device::architecture>())));
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
  if (architecture != nullptr && kernel == "large") return {architecture, Kernel::large};
  if (architecture != nullptr && kernel == "native" && architecture->native.row_units > 0)
    return {architecture, Kernel::native};
  std::string names;
  for (const Architecture& known : architectures()) names += std::string(names.empty() ? "" : ", ") + known.name;
  throw std::runtime_error("xpu_fp4: XPU_FP4_SYCL_VARIANT is \"" + value +
                           "\", expected \"portable\", or NAME, NAME:small or NAME:large with NAME one of " + names +
                           ", or cri:native");
}

GemmPlan plan_gemm(const Architecture& architecture, int64_t compute_units, int64_t m, int64_t n,
                   std::optional<Kernel> forced) {
  const Kernel kernel = forced ? *forced : m <= kSmallRows ? Kernel::small : Kernel::large;
  if (kernel == Kernel::portable) return {kernel, {}, 1, 1, 0};
  if (kernel == Kernel::native) return {kernel, architecture.native, 1, 4, 0};
  if (kernel == Kernel::small) {
    const auto fits = std::find_if(std::begin(kSmallTiles), std::end(kSmallTiles), [&](int rows) { return rows >= m; });
    return {kernel, {}, 1, 1, fits != std::end(kSmallTiles) ? *fits : kSmallRows};
  }
  const auto tiles = [&](Tile tile) {
    return ceil_div(m, 8 * tile.row_units) * ceil_div(n, architecture.sub_group * tile.column_units);
  };
  // A vector engine runs four threads of 256 registers, and wants two to hide one's latency behind the other's work.
  const Tile tile = tiles(architecture.large) >= 2 * compute_units ? architecture.large : architecture.medium;
  // A work-group of 4 x 8 tiles shares its operands in the first cache: 256 x 256 outputs, one work-group per core.
  const auto fit = [](int64_t wanted, int64_t available) {
    while (wanted / 2 >= available) wanted /= 2;
    return static_cast<int>(wanted);
  };
  return {kernel, tile, fit(4, ceil_div(m, 8 * tile.row_units)),
          fit(8, ceil_div(n, architecture.sub_group * tile.column_units)), 0};
}

GemmPlan plan_w4a16(const Architecture& architecture, int64_t m, std::optional<Kernel> forced) {
  const Kernel by_rows = m <= kSmallRows ? Kernel::small : Kernel::large;
  const Kernel kernel = forced == Kernel::small || forced == Kernel::large ? *forced : by_rows;
  if (kernel == Kernel::large) return {kernel, architecture.w4a16, 1, 4, 0};
  const int row_units = m <= 8 ? 1 : m <= 16 ? 2 : 4;
  return {kernel, {row_units, 1}, 1, 8, 8 * row_units};
}

}  // namespace xpu_fp4::syclrt
