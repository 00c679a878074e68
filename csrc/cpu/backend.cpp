// SPDX-License-Identifier: Apache-2.0
// Cuts each operation into parts, and runs the parts under a float environment of our own. How it is cut decides who computes
// an element, never in which order its sum is taken.
#include "backend.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "../format/block.h"
#include "float_environment.h"

namespace xpu_fp4::cpu {
namespace {

// Blocks per task: 64 KiB of float32 input, so that starting a task costs little beside it.
constexpr int64_t kBlocksPerTask = 512;
// Output rectangle of a task: the columns' weights are unpacked once for all its rows.
constexpr int64_t kTaskRows = 128, kTaskColumns = 32;

class NativeBackend final : public Backend {
 public:
  NativeBackend(const KernelTable& kernels, ParallelFor parallel_for)
      : kernels_(kernels), parallel_for_(std::move(parallel_for)) {}

  void quantize(const QuantizeArgs& args) const override { over_blocks(args, kernels_.quantize); }
  void group_quant(const GroupQuantArgs& args) const override { over_blocks(args, kernels_.group_quant); }
  void dequantize(const DequantizeArgs& args) const override { over_blocks(args, kernels_.dequantize); }
  void gemm(const GemmArgs& args) const override { over_tiles(args, kernels_.gemm); }
  void gemm_w4a16(const GemmW4A16Args& args) const override { over_tiles(args, kernels_.gemm_w4a16); }

 private:
  template <class Args>
  void over_blocks(const Args& args, void (*kernel)(const Args&, Range)) const {
    parallel_for_(args.rows * (args.k / kBlock), kBlocksPerTask, [&](int64_t begin, int64_t end) {
      const DefaultFloatEnvironment environment;
      kernel(args, {begin, end});
    });
  }

  template <class Args>
  void over_tiles(const Args& args, void (*kernel)(const Args&, Range, Range)) const {
    const int64_t row_tiles = (args.m + kTaskRows - 1) / kTaskRows;
    const int64_t column_tiles = (args.n + kTaskColumns - 1) / kTaskColumns;
    parallel_for_(row_tiles * column_tiles, 1, [&](int64_t begin, int64_t end) {
      const DefaultFloatEnvironment environment;
      for (int64_t tile = begin; tile < end; ++tile) {
        // Neighbouring tasks share columns, so a column tile's weights stay in one core's cache.
        const int64_t row = tile % row_tiles * kTaskRows, column = tile / row_tiles * kTaskColumns;
        kernel(args, {row, std::min(row + kTaskRows, args.m)}, {column, std::min(column + kTaskColumns, args.n)});
      }
    });
  }

  const KernelTable& kernels_;
  ParallelFor parallel_for_;
};

}  // namespace

const std::vector<const KernelTable*>& all_kernels() {
#if defined(__x86_64__)
  static const std::vector<const KernelTable*> tables = {&kAvx512, &kPortable};
#else
  static const std::vector<const KernelTable*> tables = {&kPortable};
#endif
  return tables;
}

const KernelTable& best_kernels() {
  const char* wanted = std::getenv("XPU_FP4_CPU_ISA");
  if (wanted != nullptr && *wanted == '\0') wanted = nullptr;
  for (const KernelTable* table : all_kernels()) {
    if (table->supported() && (wanted == nullptr || std::strcmp(wanted, table->isa) == 0)) return *table;
  }
  std::string message = "xpu_fp4: XPU_FP4_CPU_ISA is \"" + std::string(wanted) + "\"; this processor and build have";
  for (const KernelTable* table : all_kernels()) {
    if (table->supported()) message += std::string(" ") + table->isa;
  }
  throw std::runtime_error(message);
}

std::unique_ptr<Backend> make_backend(const KernelTable& kernels, ParallelFor parallel_for) {
  return std::make_unique<NativeBackend>(kernels, std::move(parallel_for));
}

}  // namespace xpu_fp4::cpu
