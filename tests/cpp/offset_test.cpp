// SPDX-License-Identifier: Apache-2.0
// Offsets beyond 2^31 elements: the last tiles of products that are far too large to compute, over memory of which only the
// touched pages exist. Kernels are launched with a global offset, as their index arithmetic sees it in the whole product.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <random>

#include "definition.h"
#include "format/block.h"
#include "sycl/kernels/layout.hpp"
#include "sycl/programs.h"

using namespace xpu_fp4;

namespace {

constexpr int64_t kBeyond = int64_t{1} << 31;
const float* const kNoBias = nullptr;

/// A tile of gemm_large or gemm_w4a16_matrix: units of 8 rows and of `lanes` columns.
struct Tiling {
  int lanes;
  bool block_2d;
  int row_units, column_units;
  int rows() const { return 8 * row_units; }
  int columns() const { return lanes * column_units; }
};
constexpr Tiling kBmg = {16, true, 8, 2}, kDg2 = {8, false, 2, 4};
constexpr Tiling kBmgHalf = {16, true, 8, 2}, kDg2Half = {8, false, 8, 1}, kNative = {16, true, 4, 4};

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
  void launch(const char* file, const Tiling& tiling, syclrt::Macros macros, const char* kernel, sycl::nd_range<2> range,
              Args... args) {
    macros.insert(macros.end(), {{"SUB_GROUP", tiling.lanes},
                                 {"MATRIX_UNIT", 0},
                                 {"BLOCK_2D", tiling.block_2d},
                                 {"ALIGNMENT", 16},
                                 {"ROW_UNITS", tiling.row_units},
                                 {"COLUMN_UNITS", tiling.column_units},
                                 {"REGISTERS", 256}});
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

  /// The one tile of `tiling` that holds the last rows and columns of y [m, n], with `split` sub-groups to a tile.
  static sycl::nd_range<2> last_tile(const Tiling& tiling, int64_t m, int64_t n, int64_t split = 1) {
    const int64_t lanes = tiling.lanes * split;
    return range({1, lanes}, {1, lanes}, {(m - 1) / tiling.rows(), (n - 1) / tiling.columns() * lanes});
  }

  struct Expanded {
    ExpandedLayout layout;
    Sparse codes, exponents, levels;
    Expanded(int64_t rows, int64_t tile_rows, int64_t k, int lanes)
        : layout{rows, (rows + tile_rows - 1) / tile_rows * tile_rows, (k + kQuadElements - 1) / kQuadElements, lanes},
          codes(layout.codes_bytes()),
          exponents(layout.exponents_bytes()),
          levels(layout.levels_bytes()) {}
    bool valid() const { return codes.valid() && exponents.valid() && levels.valid(); }
  };

  /// Expands the rows from `first` on.
  void expand(const Tall& in, const Tiling& tiling, Arrangement arrangement, int64_t first, const Expanded& out,
              ElementOrder order = ElementOrder::apart) {
    const int64_t blocks = in.k / kBlock;
    launch("expand.cpp", tiling, {{"ARRANGEMENT", static_cast<int>(arrangement)}, {"ORDER", static_cast<int>(order)}}, "expand",
           range({out.layout.quads, out.layout.padded_rows - first}, {1, tiling.lanes}, {0, first}), in.codes.as<uint8_t>(),
           in.scale.as<uint8_t>(), blocks, int64_t{1}, out.codes.as<uint8_t>(), out.exponents.as<uint32_t>(),
           out.levels.as<uint32_t>(), out.layout.rows, out.layout.padded_rows, in.k);
  }

  static Arrangement rows_of(const Tiling& tiling) { return tiling.block_2d ? Arrangement::rows : Arrangement::row_fragments; }

  /// The last `rows` rows and `columns` columns of y [m, n].
  template <class T>
  static std::vector<T> corner(const Sparse& y, int64_t m, int64_t n, int64_t rows, int64_t columns) {
    std::vector<T> values;
    for (int64_t row = m - rows; row < m; ++row) {
      const T* last = y.as<T>() + row * n + n;
      values.insert(values.end(), last - columns, last);
    }
    return values;
  }

  static std::vector<float> native(const Operands& in) { return in.gemm(*cpu::make_backend(cpu::kPortable, serial_for)); }

  void check_large(const Tiling& tiling, int64_t m, int64_t n) {
    const int64_t k = 160;
    const int64_t first_row = (m - 1) / tiling.rows() * tiling.rows(),
                  first_column = (n - 1) / tiling.columns() * tiling.columns();
    const Operands in(m - first_row, n - first_column, k, 100, 140, 5);
    const Tall a(m, k, in.a, in.a_scale), w(n, k, in.w, in.w_scale);
    const Expanded left(m, tiling.rows(), k, tiling.lanes), right(n, kColumnPadding, k, tiling.lanes);
    const Sparse y(m * n * 4);
    if (!a.valid() || !w.valid() || !left.valid() || !right.valid() || !y.valid()) GTEST_SKIP() << "no such address space";
    ASSERT_GT(m * n, kBeyond);
    expand(a, tiling, rows_of(tiling), first_row, left);
    expand(w, tiling, Arrangement::column_fragments, first_column, right);
    launch("gemm_large.cpp", tiling, {{"DTYPE", 0}}, "gemm_large", last_tile(tiling, m, n), left.codes.as<uint8_t>(),
           left.exponents.as<uint32_t>(), left.levels.as<uint32_t>(), right.codes.as<uint8_t>(), right.exponents.as<uint32_t>(),
           right.levels.as<uint32_t>(), kNoBias, int64_t{0}, int64_t{0}, y.as<float>(), m, n,
           static_cast<uint32_t>(left.layout.quads), kMagicBits);
    EXPECT_TRUE(same_bits(corner<float>(y, m, n, in.m, in.n), native(in)));
  }

  void check_small(int lanes, bool block_2d, int64_t n, int64_t k, Weights weights) {
    constexpr int64_t m = 8, split = 8;
    const Tiling tiling = {lanes, block_2d, 1, 1};
    const int64_t first_column = (n - 1) / lanes * lanes;
    const Operands in(m, n - first_column, k, 100, 140, 6);
    const Tall a(m, k, in.a, in.a_scale), w(n, k, in.w, in.w_scale);
    const Expanded left(m, lanes, k, lanes);
    const Sparse y(m * n * 4), columns_of_scales(n * k / kBlock);
    if (!a.valid() || !w.valid() || !left.valid() || !y.valid() || !columns_of_scales.valid())
      GTEST_SKIP() << "no such address space";
    ASSERT_GT(m * n, kBeyond);
    // [K/32, N], as fp4_gemm passes them, except where a row's are to lie together.
    const bool together = weights == Weights::scales_together;
    for (int64_t column = 0; column < in.n; ++column) {
      for (int64_t block = 0; block < k / kBlock; ++block) {
        const auto from = static_cast<size_t>(column * (k / kBlock) + block);
        columns_of_scales.as<uint8_t>()[block * n + first_column + column] = in.w_scale[from];
      }
    }
    const uint8_t* scale = together ? w.scale.as<uint8_t>() : columns_of_scales.as<uint8_t>();
    const int64_t row_stride = together ? k / kBlock : 1, block_stride = together ? 1 : n;
    expand(a, tiling, rows_of(tiling), 0, left, ElementOrder::packed);
    launch("gemm_small.cpp", tiling, {{"DTYPE", 0}, {"ROWS", m}, {"WEIGHTS", static_cast<int>(weights)}}, "gemm_small",
           last_tile(tiling, m, n, split), left.codes.as<uint8_t>(), left.exponents.as<uint32_t>(), w.codes.as<uint8_t>(),
           scale, row_stride, block_stride, kNoBias, int64_t{0}, int64_t{0}, y.as<float>(), m, n, k, kMagicBits);
    EXPECT_TRUE(same_bits(corner<float>(y, m, n, in.m, in.n), native(in)));
  }

  /// The last tile of a product whose kernel has bits of its own, against those that it gives for that tile alone.
  template <class Launch>
  void check_own_bits(const Tiling& tiling, int64_t m, int64_t n, int64_t k, const Launch& multiply) {
    const int64_t first_row = (m - 1) / tiling.rows() * tiling.rows(),
                  first_column = (n - 1) / tiling.columns() * tiling.columns();
    const Operands in(m - first_row, n - first_column, k, 100, 140, 7);
    // X of bfloat16 has 16 bits an element: four times the codes, without the exponents that give Inf and NaN.
    std::mt19937 random(8);
    std::vector<uint16_t> x(static_cast<size_t>(in.m * k));
    for (uint16_t& bits : x) bits = static_cast<uint16_t>(random() % 2 << 15 | (120 + random() % 8) << 7 | random() % 128);
    const auto run = [&](int64_t rows, int64_t columns, std::vector<uint16_t>& result) {
      const Tall a(rows, k, in.a, in.a_scale), w(columns, k, in.w, in.w_scale);
      const Sparse half(rows * k * 2), y(rows * columns * 2);
      if (!a.valid() || !w.valid() || !half.valid() || !y.valid()) GTEST_SKIP() << "no such address space";
      std::copy(x.begin(), x.end(), half.as<uint16_t>() + (rows - in.m) * k);
      multiply(a, w, half.as<uint16_t>(), y.as<uint16_t>(), rows, columns);
      result = corner<uint16_t>(y, rows, columns, in.m, in.n);
    };
    ASSERT_GT(m * n, kBeyond);
    std::vector<uint16_t> far, near;
    run(m, n, far);
    if (IsSkipped()) return;
    run(in.m, in.n, near);
    EXPECT_EQ(far, near);
    EXPECT_GT(std::count_if(near.begin(), near.end(), [](uint16_t bits) { return (bits & 0x7FFF) != 0; }), in.m * in.n / 2);
  }

  void check_half(const Tiling& tiling, int64_t m, int64_t n, int split) {
    constexpr int64_t k = 160;
    check_own_bits(tiling, m, n, k,
                   [&](const Tall&, const Tall& w, const uint16_t* x, uint16_t* y, int64_t rows, int64_t columns) {
      launch("gemm_w4a16_matrix.cpp", tiling, {{"DTYPE", 2}, {"SPLIT", split}, {"ALIGNED_ROWS", 1}}, "gemm_w4a16_matrix",
             last_tile(tiling, rows, columns, split), x, w.codes.as<uint8_t>(), w.scale.as<uint8_t>(), k / kBlock, int64_t{1},
             kNoBias, int64_t{0}, int64_t{0}, y, rows, columns, k);
    });
  }

  void check_native(int64_t m, int64_t n) {
    constexpr int64_t k = 160;
    check_own_bits(kNative, m, n, k,
                   [&](const Tall& a, const Tall& w, const uint16_t*, uint16_t* y, int64_t rows, int64_t columns) {
      launch("gemm_native.cpp", kNative, {{"DTYPE", 2}}, "gemm_native", last_tile(kNative, rows, columns),
             a.codes.as<uint8_t>(), a.scale.as<uint8_t>(), w.codes.as<uint8_t>(), w.scale.as<uint8_t>(), k / kBlock, int64_t{1},
             kNoBias, int64_t{0}, int64_t{0}, y, rows, columns, k);
    });
  }

  /// gemm_w4a16.cpp, in which a sub-group computes one row.
  void check_portable_half(int lanes, int64_t m, int64_t n) {
    constexpr int64_t k = 160;
    const Tiling tiling = {lanes, false, 1, 1};
    check_own_bits(tiling, m, n, k,
                   [&](const Tall&, const Tall& w, const uint16_t* x, uint16_t* y, int64_t rows, int64_t columns) {
      const int64_t first_row = (rows - 1) / tiling.rows() * tiling.rows(), first_column = (columns - 1) / lanes * lanes;
      launch("gemm_w4a16.cpp", tiling, {{"DTYPE", 2}}, "gemm_w4a16",
             range({rows - first_row, lanes}, {1, lanes}, {first_row, first_column}), x, w.codes.as<uint8_t>(),
             w.scale.as<uint8_t>(), k / kBlock, int64_t{1}, kNoBias, int64_t{0}, int64_t{0}, y, rows, columns, k);
    });
  }

  /// gemm.cpp, in which a sub-group computes as many rows as it has lanes.
  void check_portable(int lanes, int64_t m, int64_t n) {
    constexpr int64_t k = 160;
    const int64_t first_row = (m - 1) / lanes * lanes, first_column = (n - 1) / lanes * lanes;
    const Operands in(m - first_row, n - first_column, k, 100, 140, 9);
    const Tall a(m, k, in.a, in.a_scale), w(n, k, in.w, in.w_scale);
    const Sparse y(m * n * 4);
    if (!a.valid() || !w.valid() || !y.valid()) GTEST_SKIP() << "no such address space";
    ASSERT_GT(m * n, kBeyond);
    launch("gemm.cpp", {lanes, false, lanes / 8, 1}, {}, "gemm", last_tile({lanes, false, lanes / 8, 1}, m, n),
           a.codes.as<uint8_t>(), a.scale.as<uint8_t>(), w.codes.as<uint8_t>(), w.scale.as<uint8_t>(), k / kBlock, int64_t{1},
           kNoBias, int64_t{0}, int64_t{0}, y.as<float>(), 0, m, n, k);
    EXPECT_TRUE(same_bits(corner<float>(y, m, n, in.m, in.n), native(in)));
  }
};

constexpr int64_t kMany = int64_t{1} << 25;

TEST_F(Offsets, ManyRowsOfALargeProduct) { check_large(kBmg, kMany + 37, 90); }
TEST_F(Offsets, ManyColumnsOfALargeProduct) { check_large(kBmg, 73, kMany + 21); }
TEST_F(Offsets, ManyRowsOfALargeProductOnAlchemist) { check_large(kDg2, kMany + 13, 90); }
TEST_F(Offsets, ManyColumnsOfALargeProductOnAlchemist) { check_large(kDg2, 73, kMany + 21); }

TEST_F(Offsets, ManyColumnsOfASmallProduct) {
  check_small(16, true, 8 * kMany + 5, 160, Weights::any);
  check_small(16, true, 8 * kMany + 5, 128, Weights::whole_quads);
  check_small(16, true, 8 * kMany + 5, 128, Weights::scales_together);
}
TEST_F(Offsets, ManyColumnsOfASmallProductOnAlchemist) {
  check_small(8, false, 8 * kMany + 5, 160, Weights::any);
  check_small(8, false, 8 * kMany + 5, 128, Weights::scales_together);
}

TEST_F(Offsets, ManyRowsInSixteenBits) { check_half(kBmgHalf, kMany + 37, 90, 1); }
TEST_F(Offsets, ManyColumnsInSixteenBits) { check_half(kBmgHalf, 73, kMany + 21, 1); }
TEST_F(Offsets, ManyRowsInSixteenBitsOnAlchemist) { check_half(kDg2Half, kMany + 37, 90, 1); }
TEST_F(Offsets, ManyColumnsInSixteenBitsOnAlchemist) { check_half(kDg2Half, 73, kMany + 3, 1); }
TEST_F(Offsets, ManyColumnsInSixteenBitsWithKSplit) { check_half({16, true, 1, 1}, 8, 8 * kMany + 5, 8); }

TEST_F(Offsets, ManyColumnsInSixteenBitsWithKSplitOnAlchemist) { check_half({8, false, 1, 1}, 8, 8 * kMany + 5, 8); }

TEST_F(Offsets, ManyRowsOfTheNativeInstruction) { check_native(kMany + 19, 90); }
TEST_F(Offsets, ManyColumnsOfTheNativeInstruction) { check_native(73, kMany + 21); }

TEST_F(Offsets, ManyRowsWithoutAMatrixUnit) { check_portable(16, kMany + 5, 90); }
TEST_F(Offsets, ManyColumnsWithoutAMatrixUnit) { check_portable(8, 73, kMany + 5); }
TEST_F(Offsets, ManyRowsInSixteenBitsWithoutAMatrixUnit) { check_portable_half(16, kMany + 5, 90); }
TEST_F(Offsets, ManyColumnsInSixteenBitsWithoutAMatrixUnit) { check_portable_half(8, 73, kMany + 5); }

}  // namespace
