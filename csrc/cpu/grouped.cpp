// SPDX-License-Identifier: Apache-2.0
#include "grouped.h"

#include <algorithm>

#include "../format/integer.h"
#include "float_environment.h"
#include "scratch.h"

namespace xpu_fp4::cpu {
namespace {

// Multiplications that are worth a thread, and blocks of A; a gate costs as much as several blocks' quantizing.
constexpr int64_t kTaskWork = int64_t{1} << 18, kExpandBlocks = 2048, kGatedBlocks = 512;

// Blocks of memory from here on come fresh from the system, whatever was freed before: glibc's largest threshold.
constexpr int64_t kFreshBytes = int64_t{32} << 20, kPageBytes = 4096;

// Has the system map the pages of some rows of a large output, on one thread. Products write tall parts of Y, so many threads
// would ask for each page at once, which takes longer than to multiply. The rows are written as a whole later.
void map_pages(const Product& product, int64_t first_row, int64_t rows) {
  const int64_t row_bytes = product.weight.n * size_of(product.output.dtype);
  if (product.activations.m * row_bytes < kFreshBytes) return;
  auto* y = static_cast<volatile std::byte*>(product.output.y) + first_row * row_bytes;
  for (int64_t i = 0; i < rows * row_bytes; i += kPageBytes) y[i] = std::byte{0};
}

size_t group_bytes(const ProductKernels& kernels, int64_t k) {
  return static_cast<size_t>(strips::quads(k)) * kernels.group_quad_bytes;
}

}  // namespace

void Grouped::add(const ProductKernels& kernels, const Product& product, int64_t first_row, int64_t rows) {
  const int64_t groups = ceil_div(rows, kernels.group_rows);
  parts_.push_back({&kernels, product, first_row, rows, groups_, bytes_,
                    Rectangles(rows, ceil_div(product.weight.n, kernels.panel_columns), kernels)});
  groups_ += groups;
  blocks_ += rows * (product.activations.k / kBlock);
  bytes_ += static_cast<size_t>(groups) * group_bytes(kernels, product.activations.k);
}

void Grouped::run(std::byte* expanded, const ParallelFor& parallel_for) {
  if (parts_.empty()) return;
  expand(expanded, parallel_for);
  multiply(expanded, parallel_for);
}

void Grouped::expand_group(int64_t group, std::byte* expanded) const {
  const auto next = std::upper_bound(parts_.begin(), parts_.end(), group,
                                     [](int64_t sought, const Part& part) { return sought < part.first_group; });
  const Part& part = *(next - 1);
  const ProductKernels& kernels = *part.kernels;
  const Activations& a = part.product.activations;
  const int64_t of_part = group - part.first_group, row = of_part * kernels.group_rows;
  const int64_t rows = std::min<int64_t>(kernels.group_rows, part.rows - row);
  map_pages(part.product, part.first_row + row, rows);
  kernels.expand(a, part.first_row + row, static_cast<int>(rows),
                 expanded + part.offset + static_cast<size_t>(of_part) * group_bytes(kernels, a.k));
}

void Grouped::expand(std::byte* expanded, const ParallelFor& parallel_for) const {
  const bool gated = !parts_.front().product.activations.to.transform.gate.is_none();
  const int64_t grain = ceil_div((gated ? kGatedBlocks : kExpandBlocks) * groups_, blocks_ + 1);
  parallel_for(groups_, grain, [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    for (int64_t group = begin; group < end; ++group) expand_group(group, expanded);
  });
}

void Grouped::multiply(const std::byte* expanded, const ParallelFor& parallel_for) {
  int64_t count = 0, work = 0;
  for (auto part = parts_.rbegin(); part != parts_.rend(); ++part) {
    part->rectangles.precede(count);
    count += part->rectangles.count();
    work += part->rows * part->product.weight.n * (part->product.weight.k + 1);
  }
  parallel_for(count, ceil_div(kTaskWork * count, work), [&](int64_t, int64_t) {
    const DefaultFloatEnvironment environment;
    Scratch& scratch = scratch_of_thread(ScratchFor::panel);
    for (Part& part : parts_) {
      part.kernels->multiply(part.product, expanded + part.offset, part.first_row, part.rectangles, scratch);
    }
  });
}

}  // namespace xpu_fp4::cpu
