// SPDX-License-Identifier: Apache-2.0
// The native kernels, one table of them per instruction set; the best table that the processor can run is chosen at run time.
// A kernel computes a part of its output, serially; cpu/backend.cpp spreads the parts over threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../backend.h"
#include "../format/block.h"

namespace xpu_fp4::cpu {

/// A half-open range of rows, columns or blocks.
struct Range {
  int64_t begin, end;
};

/// Neighbouring blocks of a row that are quantized together, so that they share a scale; the last of a row may be fewer.
constexpr int group_blocks(const Quantizer& to) { return to.format == Format::mxint8 ? to.group / kBlock : 1; }

class Rectangles;
class Scratch;

/// A product in two steps: groups of rows of A are expanded, then multiplied with panels of columns.
struct ProductKernels {
  const char* source;  // the file in csrc/cpu that has the arithmetic
  int group_rows;
  /// This many rows, at most, share a pass over W.
  int block_rows;
  /// Up to so many rows W is decoded in registers, not to memory first.
  int direct_rows;
  int panel_columns;
  /// Bytes of one group's quad (K = 128).
  size_t group_quad_bytes;
  /// Rows [first_row, first_row + rows) of A, rows <= group_rows, to out: the group's quads one after the other.
  void (*expand)(const Activations&, int64_t first_row, int rows, void* out);
  /// Computes one rectangle of Y after the other, until none is left. Their rows count from the first expanded row: first_row
  /// of A and Y.
  void (*multiply)(const Product&, const void* activations, int64_t first_row, Rectangles&, Scratch&);
};

/// The end of a layer of experts: y_t = the sum of weights[t, j] * v[rows[t, j]], an fma each, by ascending j from +0, rounded
/// once to dtype. Slots whose row is -1 add nothing.
struct Combine {
  const float* v;        // [rows, n], n % 32 == 0
  const int32_t* rows;   // [tokens, top_k]
  const float* weights;  // [tokens, top_k], null: all are 1
  int64_t top_k, n;
  void* y;  // [tokens, n] of dtype
  DType dtype;
};

struct KernelTable {
  const char* isa;
  bool (*supported)();
  /// Blocks [begin, end) of the rows * k / 32 blocks of the input; quantize: whole groups of them.
  void (*quantize)(const Quantize&, Range blocks);
  void (*group_quantize)(const GroupQuantize&, Range blocks);
  void (*dequantize)(const Dequantize&, Range blocks);
  void (*combine)(const Combine&, Range tokens);
  /// The kernels for such an A.
  const ProductKernels& (*product)(const Activations&);
};

/// Any processor.
extern const KernelTable kPortable;
#if defined(__x86_64__)
extern const KernelTable kAvx2, kAvxVnni, kAvx512Vnni, kAvx512Vbmi, kAmx;
#endif

/// A table with products of its own. All other entries are those of the table below it: compiled a second time they would be
/// the same code.
template <const KernelTable& below>
constexpr KernelTable table_above(const char* isa, bool (*supported)(), const ProductKernels& (*product)(const Activations&)) {
  KernelTable table{isa, supported, nullptr, nullptr, nullptr, nullptr, product};
  table.quantize = [](const Quantize& args, Range blocks) { below.quantize(args, blocks); };
  table.group_quantize = [](const GroupQuantize& args, Range blocks) { below.group_quantize(args, blocks); };
  table.dequantize = [](const Dequantize& args, Range blocks) { below.dequantize(args, blocks); };
  table.combine = [](const Combine& args, Range tokens) { below.combine(args, tokens); };
  return table;
}

/// Every table of this build, best first; the last runs anywhere.
const std::vector<const KernelTable*>& all_kernels();

/// The best table that this processor supports, or the one that the environment variable XPU_FP4_CPU_ISA names. Throws
/// std::runtime_error if that one does not exist or cannot run here.
const KernelTable& best_kernels();

}  // namespace xpu_fp4::cpu
