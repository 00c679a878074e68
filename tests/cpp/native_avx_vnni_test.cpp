// SPDX-License-Identifier: Apache-2.0
// AVX-VNNI's kernels with vpdpbusd emulated in AVX2: the products' tests run them on processors that lack the instruction.
#include "native.h"

#if defined(__x86_64__)
#include <array>
#include <fstream>
#include <string>

#include "cpu/simd_includes.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define XPU_FP4_FLOAT_LANES 8
#include "cpu/avx2_gemm.h"

namespace xpu_fp4 {
namespace {

// Bytes are widened to int16, of which vpmaddwd adds pairs of products to int32: nothing saturates.
struct Emulation {
  static __m256i vpdpbusd(__m256i sum, __m256i w, __m256i a) {
    const __m256i even =
        _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(a, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
  }
};

int32_t emulated(int32_t sum, const std::array<uint8_t, 32>& w, const std::array<int8_t, 32>& a, int lane) {
  __m256i vectors[2];
  std::memcpy(vectors, w.data(), sizeof(w));
  std::memcpy(vectors + 1, a.data(), sizeof(a));
  std::array<int32_t, 8> sums;
  const __m256i result = Emulation::vpdpbusd(_mm256_set1_epi32(sum), vectors[0], vectors[1]);
  std::memcpy(sums.data(), &result, sizeof(sums));
  return sums[static_cast<size_t>(lane)];
}

const cpu::ProductKernels& emulated_product(const Activations& a) {
  if (a.to.format == Format::none) return cpu::kAvx2.product(a);
  return cpu::product_kernels<cpu::Avx2<cpu::Int32Sums<Emulation>>, cpu::finish_row_scalars>;
}

}  // namespace
}  // namespace xpu_fp4
#pragma GCC pop_options

namespace xpu_fp4 {

const cpu::KernelTable kEmulatedAvxVnni =
    cpu::table_above<cpu::kAvx2>("avx_vnni_emulated", [] { return cpu::kAvx2.supported(); }, emulated_product);

namespace {

TEST(AvxVnni, TheEmulationAddsFourProductsWithoutSaturation) {
  if (!cpu::kAvx2.supported()) GTEST_SKIP() << "this processor has no avx2";
  constexpr uint8_t kW[] = {0, 1, 24, 127, 128, 255};
  constexpr int8_t kA[] = {0, 1, -1, 127, -127, -128};
  std::mt19937 random(3);
  for (int i = 0; i < 10000; ++i) {
    std::array<uint8_t, 32> w;
    std::array<int8_t, 32> a;
    // All alike: the sum of four products is then the largest, or the least.
    for (size_t j = 0; j < w.size(); ++j) {
      const bool alike = i % 2 == 0 && j != 0;
      w[j] = alike ? w[0] : kW[random() % std::size(kW)];
      a[j] = alike ? a[0] : kA[random() % std::size(kA)];
    }
    const auto sum = static_cast<int32_t>(random() % 2000001) - 1000000;
    const int lane = i % 8;
    int32_t expected = sum;
    for (size_t j = 0; j < 4; ++j) expected += w[static_cast<size_t>(4 * lane) + j] * a[static_cast<size_t>(4 * lane) + j];
    ASSERT_EQ(emulated(sum, w, a, lane), expected) << i;
  }
}

// Linux lists the flag under this name from 5.12 on.
TEST(AvxVnni, IsFoundWhereLinuxListsIt) {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line) && line.rfind("flags", 0) != 0) {
  }
  if (line.rfind("flags", 0) != 0) GTEST_SKIP() << "/proc/cpuinfo lists no flags";
  EXPECT_EQ(cpu::kAvxVnni.supported(), (line + " ").find(" avx_vnni ") != std::string::npos);
}

}  // namespace
}  // namespace xpu_fp4
#endif
