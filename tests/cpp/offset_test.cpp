// SPDX-License-Identifier: Apache-2.0
// Offsets beyond 2^31 elements: the last tiles of products that are far too large to compute, over memory of which only the
// touched pages exist. Kernels are launched with a global offset, as their index arithmetic sees it in the whole product.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>

#include "definition.h"
#include "format/block.h"
#include "sycl/kernels/layout.hpp"
#include "sycl/programs.h"

using namespace xpu_fp4;

namespace {

constexpr int64_t kBeyond = int64_t{1} << 31;
constexpr int kLanes = 16, kTileRows = 64, kTileColumns = 32;  // of bmg's large tile
constexpr uint32_t kMagicBits = 0x4B200000;                    // of 1.25 * 2^23

/// Zeros that take no memory until they are written.
class Sparse {
 public:
  explicit Sparse(int64_t bytes)
      : bytes_(static_cast<size_t>(bytes)),
        memory_(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  Sparse(const Sparse&) = delete;
  ~Sparse() {
    if (valid()) munmap(memory_, bytes_);
  }
  bool valid() const { return memory_ != MAP_FAILED; }
  template <class T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  size_t bytes_;
  void* memory_;
};

/// An operand of many rows, of which the last ones are those of a small one.
struct Tall {
  int64_t rows, k;
  Sparse codes, scale;

  Tall(int64_t all, int64_t depth, const std::vector<uint8_t>& last_codes, const std::vector<uint8_t>& last_scale)
      : rows(all), k(depth), codes(all * depth / 2), scale(all * depth / 32) {
    if (!valid()) return;
    std::copy(last_codes.rbegin(), last_codes.rend(), std::make_reverse_iterator(codes.as<uint8_t>() + all * depth / 2));
    std::copy(last_scale.rbegin(), last_scale.rend(), std::make_reverse_iterator(scale.as<uint8_t>() + all * depth / 32));
  }
  bool valid() const { return codes.valid() && scale.valid(); }
};

class Offsets : public testing::Test {
 protected:
  sycl::queue queue{sycl::cpu_selector_v, sycl::property::queue::in_order{}};

  template <class... Args>
  void launch(const char* file, syclrt::Macros macros, const char* kernel, sycl::nd_range<2> range, Args... args) {
    macros.insert(macros.end(), {{"SUB_GROUP", kLanes}, {"MATRIX_UNIT", 0}, {"BLOCK_2D", 1}});
    const sycl::kernel compiled = syclrt::get_kernel(queue, {file, macros}, kernel);
    queue.submit([&](sycl::handler& handler) {
      handler.set_args(args...);
      handler.parallel_for(range, compiled);
    });
    queue.wait_and_throw();
  }

  /// Work from `first` on, of a product that begins at 0.
  static sycl::nd_range<2> range(std::array<int64_t, 2> count, std::array<int64_t, 2> group, std::array<int64_t, 2> first) {
    const auto id = [](std::array<int64_t, 2> x) { return sycl::id<2>(static_cast<size_t>(x[0]), static_cast<size_t>(x[1])); };
    const auto size = [](std::array<int64_t, 2> x) {
      return sycl::range<2>(static_cast<size_t>(x[0]), static_cast<size_t>(x[1]));
    };
    return {size(count), size(group), id(first)};
  }

  struct Expanded {
    ExpandedLayout layout;
    Sparse codes, exponents, levels;
    Expanded(int64_t rows, int64_t tile_rows, int64_t k)
        : layout{rows, (rows + tile_rows - 1) / tile_rows * tile_rows, (k + kQuadElements - 1) / kQuadElements, kLanes},
          codes(layout.codes_bytes()),
          exponents(layout.exponents_bytes()),
          levels(layout.levels_bytes()) {}
    bool valid() const { return codes.valid() && exponents.valid() && levels.valid(); }
  };

  /// Expands the rows from `first` on.
  void expand(const Tall& in, Arrangement arrangement, int64_t first, const Expanded& out) {
    const int64_t blocks = in.k / kBlock;
    launch("expand.cpp", {{"ARRANGEMENT", static_cast<int>(arrangement)}, {"ALIGNMENT", 16}}, "expand",
           range({out.layout.quads, out.layout.padded_rows - first}, {1, kLanes}, {0, first}), in.codes.as<uint8_t>(),
           in.scale.as<uint8_t>(), blocks, int64_t{1}, out.codes.as<uint8_t>(), out.exponents.as<uint32_t>(),
           out.levels.as<uint32_t>(), out.layout.rows, out.layout.padded_rows, in.k);
  }

  /// The last `in.m` rows and `in.n` columns of y [m, n].
  static std::vector<float> corner(const Sparse& y, const Operands& in, int64_t m, int64_t n) {
    std::vector<float> values;
    for (int64_t row = m - in.m; row < m; ++row) {
      const float* last = y.as<float>() + row * n + n;
      values.insert(values.end(), last - in.n, last);
    }
    return values;
  }

  static std::vector<float> native(const Operands& in) { return in.gemm(*cpu::make_backend(cpu::kPortable, serial_for)); }

  void check_large(int64_t m, int64_t n) {
    const int64_t k = 160, first_row = (m - 1) / kTileRows * kTileRows, first_column = (n - 1) / kTileColumns * kTileColumns;
    const Operands in(m - first_row, n - first_column, k, 100, 140, 5);
    const Tall a(m, k, in.a, in.a_scale), w(n, k, in.w, in.w_scale);
    const Expanded left(m, kTileRows, k), right(n, kTileColumns, k);
    const Sparse y(m * n * 4);
    if (!a.valid() || !w.valid() || !left.valid() || !right.valid() || !y.valid()) GTEST_SKIP() << "no such address space";
    ASSERT_GT(m * n, kBeyond);
    expand(a, Arrangement::rows, first_row, left);
    expand(w, Arrangement::column_fragments, first_column, right);
    launch("gemm_large.cpp", {{"ALIGNMENT", 16}, {"DTYPE", 0}, {"ROW_UNITS", 8}, {"COLUMN_UNITS", 2}, {"REGISTERS", 256}},
           "gemm_large", range({1, kLanes}, {1, kLanes}, {first_row / kTileRows, first_column / kTileColumns * kLanes}),
           left.codes.as<uint8_t>(), left.exponents.as<uint32_t>(), left.levels.as<uint32_t>(), right.codes.as<uint8_t>(),
           right.exponents.as<uint32_t>(), right.levels.as<uint32_t>(), static_cast<float*>(nullptr), int64_t{0}, int64_t{0},
           y.as<float>(), m, n, static_cast<uint32_t>(left.layout.quads), kMagicBits);
    EXPECT_TRUE(same_bits(corner(y, in, m, n), native(in)));
  }
};

TEST_F(Offsets, ManyRowsOfALargeProduct) { check_large((int64_t{1} << 25) + 37, 90); }

TEST_F(Offsets, ManyColumnsOfALargeProduct) { check_large(73, (int64_t{1} << 25) + 21); }

TEST_F(Offsets, ManyColumnsOfASmallProduct) {
  const int64_t m = 8, n = (int64_t{1} << 28) + 5, k = 160, split = 8, first_column = (n - 1) / kLanes * kLanes;
  const Operands in(m, n - first_column, k, 100, 140, 6);
  const Tall a(m, k, in.a, in.a_scale), w(n, k, in.w, in.w_scale);
  const Expanded left(m, kLanes, k);
  const Sparse y(m * n * 4);
  if (!a.valid() || !w.valid() || !left.valid() || !y.valid()) GTEST_SKIP() << "no such address space";
  ASSERT_GT(m * n, kBeyond);
  expand(a, Arrangement::rows, 0, left);
  launch("gemm_small.cpp", {{"ALIGNMENT", 16}, {"DTYPE", 0}, {"ROWS", 8}}, "gemm_small",
         range({1, kLanes * split}, {1, kLanes * split}, {0, first_column * split}), left.codes.as<uint8_t>(),
         left.exponents.as<uint32_t>(), left.levels.as<uint32_t>(), w.codes.as<uint8_t>(), w.scale.as<uint8_t>(), k / kBlock,
         int64_t{1}, static_cast<float*>(nullptr), int64_t{0}, int64_t{0}, y.as<float>(), m, n, k, kMagicBits);
  EXPECT_TRUE(same_bits(corner(y, in, m, n), native(in)));
}

}  // namespace
