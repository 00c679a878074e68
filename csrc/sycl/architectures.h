// SPDX-License-Identifier: Apache-2.0
// What we know about GPU architectures, and which kernel, tile and work-group suits a product: the one table of it.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/layout.hpp"

namespace xpu_fp4::syclrt {

/// Tile of a sub-group: row units of a matrix instruction, and as many columns as it has lanes for each column unit.
struct Tile {
  int row_units, column_units;

  constexpr int rows() const { return kRowUnit * row_units; }
  constexpr int columns(int lanes) const { return lanes * column_units; }
};

/// Rows for which gemm_small.cpp is compiled.
constexpr int kSmallTiles[] = {1, 4, 8, 16, 32};

/// Rows of work-groups of gemm_large that are walked together. Those of a row share rows of A, those of a column share W's: a
/// few rows together find both in the last cache (tools/cache_model.py).
constexpr int kPanelRows = 4;

/// Columns of sub-groups in such a work-group.
constexpr int kGroupColumns = 8;

/// What the choice of a kernel weighs: clocks of a vector engine, from data sheets and from counted machine code
/// (tools/isa_budgets.toml and `make isa`, which hold these against each other; docs/GPU.md).
struct Costs {
  double matrix;            // of an int8 matrix instruction
  double bytes;             // that memory brings to an engine in a clock
  double small, small_row;  // of gemm_small for 256 bytes of packed weights, and more for each row
};

struct Architecture {
  const char* name;  // of its offline compiler target
  int sub_group;     // lanes: the width of the matrix unit
  bool block_2d;     // has 2D block loads
  Tile large;        // of gemm_large: the largest that does not spill with 256 registers (make isa)
  Tile medium;       // where large ones are too few to fill the device
  int group_rows;    // sub-groups of a work-group of gemm_large, as many as a core runs with 256 registers: so many rows
  Tile w4a16;        // of gemm_w4a16_matrix: the more rows, the fewer times a weight is decoded
  Tile bdpas;        // of gemm_bdpas, where the device has the instruction; else of no rows
  Costs costs;
  WeightOperand weight_operand = WeightOperand::int4;  // of gemm_small, until an owner has reported otherwise
};

/// Every architecture with a matrix unit that we compile for.
const std::vector<Architecture>& architectures();

/// The architecture of a GPU by its IP version, as SYCL numbers them, or by its PCI device id where the version is 0: that is
/// what a runtime says which is older than the device. Null where we know neither.
const Architecture* architecture_of(uint64_t ip_version, uint32_t device_id);

/// The kernels of a product.
enum class Kernel {
  portable,  // any device, no pre-pass
  small,     // few rows: packed weights, decoded in registers
  medium,    // can be asked for; the plan then says large, with the medium tile
  large,     // many rows: expanded operands
  bdpas,     // Xe3P's block-scaled FP4 instruction: not the definition's bits, so only where it is asked for
};

/// Clocks that a product is modelled to take with each kernel.
struct ModelledClocks {
  double small, medium, large;
};

struct GemmPlan {
  Kernel kernel;
  Tile tile;                               // of a sub-group
  int group_rows, group_columns;           // large: sub-groups of a work-group
  int rows;                                // small: of a work-group
  std::optional<ModelledClocks> clocks{};  // what decided; none where the kernel was asked for
};

/// A product y [m, n] = a [m, k] x w [n, k]^T.
struct ProductShape {
  int64_t m, n, k;
  bool expanded;  // the weight is at hand in the expanded form
};

/// What XPU_FP4_SYCL_VARIANT asks for: `portable`, an architecture's name, or that and a kernel, as in
/// `bmg:large`. Read at each call.
struct Override {
  const Architecture* architecture = nullptr;
  std::optional<Kernel> kernel;
};
/// Throws std::runtime_error naming the variable, its value and what is expected.
Override variant_override();

/// What XPU_FP4_WEIGHT_OPERAND asks gemm_small to decode weights to, `int4` or `int8`; without it, the table decides. Read at
/// each call. Throws as variant_override() does.
std::optional<WeightOperand> weight_operand_override();

/// The kernel that is modelled to take the fewest clocks on `compute_units` vector engines. Only `forced` gives Kernel::bdpas.
GemmPlan plan_gemm(const Architecture& architecture, int64_t compute_units, const ProductShape& shape,
                   std::optional<Kernel> forced);

/// The first product of a layer of experts, u [slots, n] = x [slots, k] x each one's w [n, k]^T.
struct ExpertsShape {
  int64_t slots, tokens, experts, n, k;

  /// Of an expert, where they are spread evenly.
  int64_t rows() const;
  /// So few slots that hardly two have the same expert: sorting them would save fewer bytes of weights than its launches cost.
  bool few() const { return rows() == 1 && (tokens == 1 || 2 * slots <= experts); }
};

/// The kernel for both products of a layer: it is chosen as for a dense product of an expert's rows by the columns of all
/// experts that can have some, which has the same arithmetic and reads the same bytes. Never Kernel::bdpas.
GemmPlan plan_grouped_gemm(const Architecture& architecture, int64_t compute_units, const ExpertsShape& shape,
                           std::optional<Kernel> forced);

/// For W4A16: `tile` also where K is split, then for the rows of a work-group.
GemmPlan plan_w4a16(const Architecture& architecture, int64_t m, std::optional<Kernel> forced);

}  // namespace xpu_fp4::syclrt
