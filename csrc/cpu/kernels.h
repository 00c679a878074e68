// SPDX-License-Identifier: Apache-2.0
// The native kernels, one table of them per instruction set; the best table that the processor can run is chosen at run time.
// A kernel computes a part of its output, serially; cpu/backend.cpp spreads the parts over threads.
#pragma once
#include <cstdint>
#include <vector>

#include "../backend.h"

namespace xpu_fp4::cpu {

/// A half-open range of rows, columns or blocks.
struct Range {
  int64_t begin, end;
};

struct KernelTable {
  const char* isa;
  bool (*supported)();
  /// Blocks [begin, end) of the rows * k / 32 blocks of the input.
  void (*quantize)(const QuantizeArgs&, Range blocks);
  void (*group_quant)(const GroupQuantArgs&, Range blocks);
  void (*dequantize)(const DequantizeArgs&, Range blocks);
  /// A rectangle of the output.
  void (*gemm)(const GemmArgs&, Range rows, Range columns);
  void (*gemm_w4a16)(const GemmW4A16Args&, Range rows, Range columns);
};

/// Any processor.
extern const KernelTable kPortable;
#if defined(__x86_64__)
extern const KernelTable kAvx512;
#endif

/// Every table of this build, best first; the last runs anywhere.
const std::vector<const KernelTable*>& all_kernels();

/// The best table that this processor supports, or the one that the environment variable XPU_FP4_CPU_ISA names. Throws
/// std::runtime_error if that one does not exist or cannot run here.
const KernelTable& best_kernels();

}  // namespace xpu_fp4::cpu
