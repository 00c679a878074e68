// SPDX-License-Identifier: Apache-2.0
// Offsets beyond 2^31 elements: the last tiles of products that are far too large to compute, over memory of which only the
// touched pages exist. Kernels are launched with a global offset, as their index arithmetic sees it in the whole product.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <random>
#include <stdexcept>

#include "definition.h"
#include "format/integer.h"
#include "sycl/kernels/arguments.hpp"
#include "sycl/programs.h"

using namespace xpu_fp4;
using syclrt::Gpu;
using syclrt::Tile;
using syclrt::Variant;

namespace {

constexpr int64_t kBeyond = int64_t{1} << 31;

/// An architecture's kernels, with the stand-in of its matrix unit.
Gpu stand_in(const std::string& name) {
  for (const syclrt::Architecture& architecture : syclrt::architectures()) {
    if (architecture.name == name) return {&architecture, false};
  }
  throw std::runtime_error(name);
}
const Gpu kBmg = stand_in("bmg"), kDg2 = stand_in("dg2"), kCri = stand_in("cri");

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

  Tall(int64_t all, int64_t depth, const std::vector<uint8_t>& last_codes, const std::vector<uint8_t>& last_scale,
       Format format = Format::mxfp4)
      : rows(all), k(depth), codes(all * code_bytes(format, depth)), scale(all * depth / kBlock) {
    if (!valid()) return;
    std::copy(last_codes.rbegin(), last_codes.rend(),
              std::make_reverse_iterator(codes.as<uint8_t>() + all * code_bytes(format, depth)));
    std::copy(last_scale.rbegin(), last_scale.rend(), std::make_reverse_iterator(scale.as<uint8_t>() + all * depth / kBlock));
  }
  bool valid() const { return codes.valid() && scale.valid(); }
  StoredOperand stored() const { return {codes.as<uint8_t>(), scale.as<uint8_t>(), k / kBlock, 1}; }
};

class Offsets : public testing::Test {
 protected:
  sycl::queue queue{sycl::cpu_selector_v, sycl::property::queue::in_order{}};

  template <int dimensions, class Arguments>
  void launch(const Variant& variant, const char* kernel, sycl::nd_range<dimensions> range, const Arguments& arguments) {
    const sycl::kernel compiled = syclrt::get_kernel(queue, variant, kernel);
    queue.submit([&](sycl::handler& handler) {
      int index = 0;
      arguments.each([&](const auto& value) { handler.set_arg(index++, value); });
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

  /// Says where the last of `size` places lies, in steps of `tile`.
  static int64_t last_of(int64_t size, int64_t tile) { return (size - 1) / tile; }

  /// The one tile that holds the last rows and columns of y [m, n], with `split` sub-groups to a tile.
  static sycl::nd_range<2> last_tile(Tile tile, int64_t lanes, int64_t m, int64_t n, int64_t split = 1) {
    const int64_t columns = tile.columns(static_cast<int>(lanes)), group = lanes * split;
    return range({1, group}, {1, group}, {last_of(m, tile.rows()), last_of(n, columns) * group});
  }

  /// The same as gemm_large counts tiles: each is a work-group, a panel has one row of them.
  static sycl::nd_range<3> last_panel(Tile tile, int lanes, int64_t m, int64_t n) {
    const sycl::range<3> work_group(1, 1, static_cast<size_t>(lanes));
    return {work_group, work_group,
            sycl::id<3>(static_cast<size_t>(last_of(m, tile.rows())), static_cast<size_t>(last_of(n, tile.columns(lanes))), 0)};
  }

  struct Expanded {
    ExpandedLayout layout;
    Sparse codes, exponents, levels;
    Expanded(int64_t rows, int64_t tile_rows, int64_t k, int lanes)
        : layout{rows, round_up(rows, tile_rows), ceil_div(k, kQuadElements), lanes},
          codes(layout.codes_bytes()),
          exponents(layout.exponents_bytes()),
          levels(layout.levels_bytes()) {}
    bool valid() const { return codes.valid() && exponents.valid() && levels.valid(); }
    ExpandedOperand arrays() const { return {codes.as<uint8_t>(), exponents.as<uint32_t>(), levels.as<uint32_t>()}; }
  };

  /// Expands the rows from `first` on, for many rows.
  void expand(const Variant& variant, const Tall& in, int64_t first, const Expanded& out) {
    const ExpandedLayout& layout = out.layout;
    launch(variant, "expand", range({layout.quads, layout.padded_rows - first}, {1, layout.lanes}, {0, first}),
           ExpandArguments{in.stored(), out.arrays(), layout.rows, layout.padded_rows, in.k});
  }

  static OutputArguments output(const Sparse& y, int64_t m, int64_t n) { return {nullptr, 0, 0, y.as<void>(), m, n}; }

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

  /// y [m, n] of which only the last tile is computed.
  void run_large(Gpu gpu, Format format, const Tall& a, const Tall& w, const Sparse& y) {
    const Tile tile = gpu.architecture->large;
    const int lanes = gpu.architecture->sub_group;
    const Expanded left(a.rows, tile.rows(), a.k, lanes), right(w.rows, kColumnPadding, w.k, lanes);
    if (!left.valid() || !right.valid()) GTEST_SKIP() << "no such address space";
    expand(syclrt::expand_activations_variant(gpu, format, std::nullopt, ElementOrder::apart, 16), a,
           last_of(a.rows, tile.rows()) * tile.rows(), left);
    expand(syclrt::expand_weight_variant(gpu, 16), w, last_of(w.rows, tile.columns(lanes)) * tile.columns(lanes), right);
    launch(syclrt::gemm_large_variant(gpu, format, tile, DType::f32), "gemm_large", last_panel(tile, lanes, a.rows, w.rows),
           GemmLargeArguments{left.arrays(), right.arrays(), output(y, a.rows, w.rows),
                              static_cast<uint32_t>(left.layout.quads), kStartBits});
  }

  void check_large(Gpu gpu, int64_t m, int64_t n) {
    const int64_t k = 160, rows = gpu.architecture->large.rows(),
                  columns = gpu.architecture->large.columns(gpu.architecture->sub_group);
    const Operands in(m - last_of(m, rows) * rows, n - last_of(n, columns) * columns, k, 100, 140, 5);
    const Tall a(m, k, in.a, in.a_scale), w(n, k, in.w, in.w_scale);
    const Sparse y(m * n * 4);
    if (!a.valid() || !w.valid() || !y.valid()) GTEST_SKIP() << "no such address space";
    ASSERT_GT(m * n, kBeyond);
    run_large(gpu, Format::mxfp4, a, w, y);
    if (IsSkipped()) return;
    EXPECT_TRUE(same_bits(corner<float>(y, m, n, in.m, in.n), native(in)));
  }

  void check_small(Gpu gpu, int64_t n, int64_t k, Weights weights) {
    constexpr int64_t m = 8;
    const Tile tile = {1, 1};
    const int lanes = gpu.architecture->sub_group;
    const int64_t first_column = last_of(n, lanes) * lanes;
    const Operands in(m, n - first_column, k, 100, 140, 6);
    const Tall a(m, k, in.a, in.a_scale), w(n, k, in.w, in.w_scale);
    const Expanded left(m, lanes, k, lanes);
    const Sparse y(m * n * 4), columns_of_scales(n * k / kBlock);
    if (!a.valid() || !w.valid() || !left.valid() || !y.valid() || !columns_of_scales.valid())
      GTEST_SKIP() << "no such address space";
    ASSERT_GT(m * n, kBeyond);
    // [K/32, N], as fp4_gemm passes them, except where a row's are to lie together.
    for (int64_t column = 0; column < in.n; ++column) {
      for (int64_t block = 0; block < k / kBlock; ++block) {
        const auto from = static_cast<size_t>(column * (k / kBlock) + block);
        columns_of_scales.as<uint8_t>()[block * n + first_column + column] = in.w_scale[from];
      }
    }
    StoredOperand stored = w.stored();
    if (weights != Weights::scales_together) stored = {stored.codes, columns_of_scales.as<uint8_t>(), 1, n};
    launch(syclrt::expand_activations_variant(gpu, Format::mxfp4, std::nullopt, ElementOrder::packed, 16), "expand",
           range({m, left.layout.quads * lanes}, {1, lanes}, {0, 0}),
           ExpandArguments{a.stored(), left.arrays(), m, left.layout.padded_rows, k});
    EXPECT_EQ(left.exponents.as<uint32_t>()[lanes - 1], lanes == m ? left.exponents.as<uint32_t>()[m - 1] : 0x7F7F7F7F)
        << "a row of the padding has exponents for which the cheap sum applies";
    launch(syclrt::gemm_small_variant(gpu, Format::mxfp4, m, weights, DType::f32, 16), "gemm_small",
           last_tile(tile, lanes, m, n, small_split(static_cast<int>(m))),
           GemmSmallArguments{left.arrays(), stored, output(y, m, n), k, kStartBits});
    EXPECT_TRUE(same_bits(corner<float>(y, m, n, in.m, in.n), native(in)));
  }

  /// The last tile of a product against the bits that the same kernel gives for that tile alone, where no other has them.
  /// `multiply` gets A, W, as many elements of A in bfloat16, and y of Y's type T.
  template <class T, class Multiply>
  void check_own_bits(Tile tile, int lanes, int64_t m, int64_t n, int64_t k, Format format, const Multiply& multiply) {
    const int64_t rows_of_tile = m - last_of(m, tile.rows()) * tile.rows(),
                  columns_of_tile = n - last_of(n, tile.columns(lanes)) * tile.columns(lanes);
    Operands in(rows_of_tile, columns_of_tile, k, 100, 140, 7);
    std::mt19937 random(8);
    in.a.resize(static_cast<size_t>(in.m * code_bytes(format, k)));
    for (uint8_t& byte : in.a) byte = static_cast<uint8_t>(random());
    // The exponents that give Inf and NaN are left out.
    std::vector<uint16_t> x(static_cast<size_t>(in.m * k));
    for (uint16_t& bits : x) bits = static_cast<uint16_t>(random() % 2 << 15 | (120 + random() % 8) << 7 | random() % 128);
    const auto run = [&](int64_t rows, int64_t columns, std::vector<T>& result) {
      const Tall a(rows, k, in.a, in.a_scale, format), w(columns, k, in.w, in.w_scale);
      const Sparse half(rows * k * 2), y(rows * columns * static_cast<int64_t>(sizeof(T)));
      if (!a.valid() || !w.valid() || !half.valid() || !y.valid()) GTEST_SKIP() << "no such address space";
      std::copy(x.begin(), x.end(), half.as<uint16_t>() + (rows - in.m) * k);
      multiply(a, w, half.as<uint16_t>(), y);
      result = corner<T>(y, rows, columns, in.m, in.n);
    };
    ASSERT_GT(m * n, kBeyond);
    std::vector<T> far, near;
    run(m, n, far);
    if (IsSkipped()) return;
    run(in.m, in.n, near);
    EXPECT_EQ(std::memcmp(far.data(), near.data(), far.size() * sizeof(T)), 0);
    EXPECT_GT(std::count_if(near.begin(), near.end(), [](T value) { return value != T{}; }), in.m * in.n / 2);
  }

  /// The native backend's bits for W4A8 are compared elsewhere (tests/test_sycl_variants.py).
  void check_large_w4a8(Gpu gpu, int64_t m, int64_t n) {
    check_own_bits<float>(
        gpu.architecture->large, gpu.architecture->sub_group, m, n, 160, Format::mxint8,
        [&](const Tall& a, const Tall& w, const uint16_t*, const Sparse& y) { run_large(gpu, Format::mxint8, a, w, y); });
  }

  void check_half(Gpu gpu, Tile tile, int64_t m, int64_t n, int split) {
    constexpr int64_t k = 160;
    const int lanes = gpu.architecture->sub_group;
    check_own_bits<uint16_t>(tile, lanes, m, n, k, Format::mxfp4,
                             [&](const Tall& a, const Tall& w, const uint16_t* x, const Sparse& y) {
      const int64_t rows = a.rows;
      launch(syclrt::gemm_w4a16_matrix_variant(gpu, tile, split, DType::bf16, DType::bf16, true, 16), "gemm_w4a16_matrix",
             last_tile(tile, lanes, rows, w.rows, split), GemmW4a16Arguments{x, w.stored(), output(y, rows, w.rows), k});
    });
  }

  void check_bdpas(int64_t m, int64_t n) {
    constexpr int64_t k = 160;
    const Tile tile = kCri.architecture->bdpas;
    const int lanes = kCri.architecture->sub_group;
    check_own_bits<uint16_t>(tile, lanes, m, n, k, Format::mxfp4,
                             [&](const Tall& a, const Tall& w, const uint16_t*, const Sparse& y) {
      launch(syclrt::gemm_bdpas_variant(kCri, tile, DType::bf16), "gemm_bdpas", last_tile(tile, lanes, a.rows, w.rows),
             GemmArguments{a.stored(), w.stored(), output(y, a.rows, w.rows), k, 0});
    });
  }

  /// gemm_w4a16.cpp, in which a sub-group computes one row.
  void check_portable_half(int lanes, int64_t m, int64_t n) {
    constexpr int64_t k = 160;
    check_own_bits<uint16_t>({1, 1}, lanes, m, n, k, Format::mxfp4,
                             [&](const Tall& a, const Tall& w, const uint16_t* x, const Sparse& y) {
      const int64_t rows = a.rows, first_row = last_of(rows, kRowUnit) * kRowUnit,
                    first_column = last_of(w.rows, lanes) * lanes;
      launch(syclrt::gemm_w4a16_variant({lanes, false}, DType::bf16, DType::bf16, 16), "gemm_w4a16",
             range({rows - first_row, lanes}, {1, lanes}, {first_row, first_column}),
             GemmW4a16Arguments{x, w.stored(), output(y, rows, w.rows), k});
    });
  }

  /// gemm.cpp, in which a sub-group computes as many rows as it has lanes.
  void check_portable(int lanes, int64_t m, int64_t n) {
    constexpr int64_t k = 160;
    const Tile tile = {lanes / kRowUnit, 1};
    const Operands in(m - last_of(m, lanes) * lanes, n - last_of(n, lanes) * lanes, k, 100, 140, 9);
    const Tall a(m, k, in.a, in.a_scale), w(n, k, in.w, in.w_scale);
    const Sparse y(m * n * 4);
    if (!a.valid() || !w.valid() || !y.valid()) GTEST_SKIP() << "no such address space";
    ASSERT_GT(m * n, kBeyond);
    launch(syclrt::gemm_variant({lanes, false}, Format::mxfp4, 16), "gemm", last_tile(tile, lanes, m, n),
           GemmArguments{a.stored(), w.stored(), output(y, m, n), k, 0});
    EXPECT_TRUE(same_bits(corner<float>(y, m, n, in.m, in.n), native(in)));
  }
};

constexpr int64_t kMany = int64_t{1} << 25;

TEST_F(Offsets, ManyRowsOfALargeProduct) { check_large(kBmg, kMany + 37, 90); }
TEST_F(Offsets, ManyColumnsOfALargeProduct) { check_large(kBmg, 73, kMany + 21); }
TEST_F(Offsets, ManyRowsOfALargeProductOnAlchemist) { check_large(kDg2, kMany + 13, 90); }
TEST_F(Offsets, ManyColumnsOfALargeProductOnAlchemist) { check_large(kDg2, 73, kMany + 21); }
TEST_F(Offsets, ManyRowsOfALargeProductWithMxint8) { check_large_w4a8(kBmg, kMany + 37, 90); }

TEST_F(Offsets, ManyColumnsOfASmallProduct) {
  check_small(kBmg, 8 * kMany + 5, 160, Weights::any);
  check_small(kBmg, 8 * kMany + 5, 128, Weights::whole_quads);
  check_small(kBmg, 8 * kMany + 5, 128, Weights::scales_together);
}
TEST_F(Offsets, ManyColumnsOfASmallProductOnAlchemist) {
  check_small(kDg2, 8 * kMany + 5, 160, Weights::any);
  check_small(kDg2, 8 * kMany + 5, 128, Weights::scales_together);
}

TEST_F(Offsets, ManyRowsInSixteenBits) { check_half(kBmg, kBmg.architecture->w4a16, kMany + 37, 90, 1); }
TEST_F(Offsets, ManyColumnsInSixteenBits) { check_half(kBmg, kBmg.architecture->w4a16, 73, kMany + 21, 1); }
TEST_F(Offsets, ManyRowsInSixteenBitsOnAlchemist) { check_half(kDg2, kDg2.architecture->w4a16, kMany + 37, 90, 1); }
TEST_F(Offsets, ManyColumnsInSixteenBitsOnAlchemist) { check_half(kDg2, kDg2.architecture->w4a16, 73, kMany + 3, 1); }
TEST_F(Offsets, ManyColumnsInSixteenBitsWithKSplit) { check_half(kBmg, {1, 1}, 8, 8 * kMany + 5, kSmallSplit); }
TEST_F(Offsets, ManyColumnsInSixteenBitsWithKSplitOnAlchemist) { check_half(kDg2, {1, 1}, 8, 8 * kMany + 5, kSmallSplit); }

TEST_F(Offsets, ManyRowsOfTheBlockScaledInstruction) { check_bdpas(kMany + 19, 90); }
TEST_F(Offsets, ManyColumnsOfTheBlockScaledInstruction) { check_bdpas(73, kMany + 21); }

TEST_F(Offsets, ManyRowsWithoutAMatrixUnit) { check_portable(16, kMany + 5, 90); }
TEST_F(Offsets, ManyColumnsWithoutAMatrixUnit) { check_portable(8, 73, kMany + 5); }
TEST_F(Offsets, ManyRowsInSixteenBitsWithoutAMatrixUnit) { check_portable_half(16, kMany + 5, 90); }
TEST_F(Offsets, ManyColumnsInSixteenBitsWithoutAMatrixUnit) { check_portable_half(8, 73, kMany + 5); }

// Beside the offsets because this, too, is of SYCL's own types.
TEST(Memory, RunningOutOfItIsSaidInWords) {
  const sycl::device device{sycl::cpu_selector_v};
  const auto said = [&](sycl::errc code, const char* text) {
    return syclrt::out_of_memory(sycl::exception(sycl::make_error_code(code), text), device).value_or("");
  };
  for (const std::string& text : {said(sycl::errc::memory_allocation, "no"),
                                  said(sycl::errc::runtime, "failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
                                  said(sycl::errc::runtime, "failed with error: 38 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)")}) {
    EXPECT_EQ(text.rfind("memory ran out on ", 0), 0u) << text;
    EXPECT_NE(text.find(" MiB: free tensors"), std::string::npos) << text;
  }
  EXPECT_EQ(said(sycl::errc::runtime, "failed with error: 4 (UR_RESULT_ERROR_INVALID_VALUE)"), "");
}

}  // namespace
