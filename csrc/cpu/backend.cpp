// SPDX-License-Identifier: Apache-2.0
// Cuts each operation into parts, and runs the parts under a float environment of our own. How it is cut decides who computes
// an element, never in which order its sum is taken.
#include "backend.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "../format/block.h"
#include "../format/integer.h"
#include "experts.h"
#include "float_environment.h"
#include "grouped.h"
#include "prepack.h"
#include "scratch.h"

namespace xpu_fp4::cpu {
namespace {

// Blocks per task: 64 KiB of float32 input, so that starting a task costs little beside it.
constexpr int64_t kBlocksPerTask = 512;
// Rows whose activations are expanded at a time, which bounds the memory of a call: for each 1024 of K, 1.7 KiB a row for W4A4
// and W4A8, up to 4 KiB for W4A16. The calling thread keeps it (scratch.h).
constexpr int64_t kChunkRows = 1024;
// Records and rows of a weight that are worth a thread where its form changes.
constexpr int64_t kRecordsPerTask = 16, kRowsPerTask = 64;

// The table whose own kernels these are: one may hand a product to a table below it.
const KernelTable& owner_of(const KernelTable& table, const Activations& a) {
  const KernelTable* owner = &table;
  for (const KernelTable* other : all_kernels()) {
    if (&other->product(a) == &table.product(a)) owner = other;  // the last one's: the others got them from it
  }
  return *owner;
}

// Why this table, of all that are better.
std::string reason_of(const KernelTable& chosen) {
  std::string reasons;
  for (const KernelTable* table : all_kernels()) {
    if (table == &chosen) break;
    reasons += std::string(reasons.empty() ? "" : "; ") + table->isa + ": " +
               (table->supported() ? "not what was asked for" : "this processor or system has no such instructions");
  }
  return reasons;
}

class NativeBackend final : public Backend {
 public:
  NativeBackend(const KernelTable& kernels, ParallelFor parallel_for)
      : kernels_(kernels), parallel_for_(std::move(parallel_for)) {}

  void quantize(const Quantize& args) const override { over_blocks(args, group_blocks(args.to), kernels_.quantize); }
  void dequantize(const Dequantize& args) const override { over_blocks(args, 1, kernels_.dequantize); }
  void group_quantize(const GroupQuantize& args) const override { over_blocks(args, 1, kernels_.group_quantize); }

  std::optional<std::string> refusal(const Product& product) const override {
    if (product.weight.form != WeightForm::expanded) return std::nullopt;
    return kNoExpandedForm;
  }

  void multiply(const Product& product) const override {
    const int64_t m = product.activations.m;
    if (m == 0 || product.weight.n == 0) return;
    const ProductKernels& kernels = kernels_.product(product.activations);
    Scratch& expanded = scratch_of_thread(ScratchFor::activations);
    for (int64_t first = 0; first < m; first += kChunkRows) {
      Grouped chunk;
      chunk.add(kernels, product, first, std::min(kChunkRows, m - first));
      chunk.run(expanded.take(chunk.bytes()), parallel_for_);
    }
  }

  void experts(const Experts& args) const override { run_experts(kernels_, parallel_for_, args); }

  PreparedShape prepared_shape(WeightForm, int64_t n, int64_t k) const override {
    return {strips::count(n), strips::strip_bytes(k)};
  }

  void prepare(const Weight& weight, WeightForm, uint8_t* out) const override {
    const int64_t quads = strips::quads(weight.k);
    parallel_for_(strips::count(weight.n) * quads, kRecordsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t strip = i / quads, quad = i % quads;
        prepack_record(weight, strip, quad, strips::blocks_of(weight.k, quad),
                       out + strips::record_offset(strip, quad, weight.k));
      }
    });
  }

  void restore(const Weight& weight, uint8_t* codes, uint8_t* scale) const override {
    parallel_for_(weight.n, kRowsPerTask, [&](int64_t begin, int64_t end) { unpack_rows(weight, {begin, end}, codes, scale); });
  }

 private:
  // All blocks; no group of neighbours in a row is cut.
  template <class Args>
  void over_blocks(const Args& args, int group, void (*kernel)(const Args&, Range)) const {
    const int64_t row_blocks = args.k / kBlock, row_groups = ceil_div(row_blocks, group);
    if (row_blocks == 0) return;
    const auto first_block = [&](int64_t i) { return i / row_groups * row_blocks + i % row_groups * group; };
    parallel_for_(args.rows * row_groups, ceil_div(kBlocksPerTask, group), [&](int64_t begin, int64_t end) {
      const DefaultFloatEnvironment environment;
      kernel(args, {first_block(begin), first_block(end)});
    });
  }

  const KernelTable& kernels_;
  ParallelFor parallel_for_;
};

}  // namespace

Explanation explain(const KernelTable& kernels, const Product& product) {
  const Activations& a = product.activations;
  const ProductKernels& chosen = kernels.product(a);
  const KernelTable& owner = owner_of(kernels, a);
  const int64_t rows = std::min(kChunkRows, a.m);
  Grouped chunk;
  chunk.add(chosen, product, 0, rows);
  const Rectangles rectangles(rows, ceil_div(product.weight.n, chosen.panel_columns), chosen);
  const bool directly = rectangles.rows_each() <= chosen.direct_rows;
  const std::string walk =
      directly ? "decoded in registers" : "unpacked to panels of " + std::to_string(chosen.panel_columns) + " columns";
  std::string passed_over = reason_of(kernels);
  if (&owner != &kernels) {
    passed_over += std::string(passed_over.empty() ? "" : "; ") + kernels.isa +
                   ": it has no kernel of its own for these rows " + "and types";
  }
  const auto weight = make_backend(kernels, {})->prepared_shape(WeightForm::strips, product.weight.n, product.weight.k);
  return {chosen.source,
          std::string(owner.isa) + ", W read once for " + std::to_string(rectangles.rows_each()) +
              (rectangles.rows_each() == 1 ? " row" : " rows") + ", " + walk,
          passed_over,
          {},
          weight.rows * weight.row_bytes,
          static_cast<int64_t>(chunk.bytes())};
}

const std::vector<const KernelTable*>& all_kernels() {
#if defined(XPU_FP4_WITHOUT_AVX512)
  static const std::vector<const KernelTable*> tables = {&kAvxVnni, &kAvx2, &kPortable};
#elif defined(__x86_64__)
  static const std::vector<const KernelTable*> tables = {&kAmx, &kAvx512Vbmi, &kAvx512Vnni, &kAvxVnni, &kAvx2, &kPortable};
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
