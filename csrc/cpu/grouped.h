// SPDX-License-Identifier: Apache-2.0
// Products whose rectangles are one queue, so that threads stay busy when one has 300 rows and another 3: the experts of a
// layer, or a single product.
#pragma once
#include <cstddef>
#include <vector>

#include "backend.h"
#include "panels.h"

namespace xpu_fp4::cpu {

/// Products that are computed together: their activations are expanded in one parallel region and multiplied in another. A
/// region of little work runs on the calling thread.
class Grouped {
 public:
  /// Rows [first_row, first_row + rows) of a product of rows > 0 and columns > 0, by its kernels.
  void add(const ProductKernels& kernels, const Product& product, int64_t first_row, int64_t rows);
  /// Returns the size of the expanded activations.
  size_t bytes() const { return bytes_; }
  /// Computes all products, once. `expanded` has bytes().
  void run(std::byte* expanded, const ParallelFor& parallel_for);

 private:
  struct Part {
    const ProductKernels* kernels;
    Product product;
    int64_t first_row, rows;
    int64_t first_group;  // counted over all parts
    size_t offset;        // of the expanded activations
    Rectangles rectangles;
  };

  void expand_group(int64_t group, std::byte* expanded) const;
  void expand(std::byte* expanded, const ParallelFor& parallel_for) const;
  void multiply(const std::byte* expanded, const ParallelFor& parallel_for);

  std::vector<Part> parts_;
  int64_t groups_ = 0;
  int64_t blocks_ = 0;  // of A
  size_t bytes_ = 0;
};

}  // namespace xpu_fp4::cpu
