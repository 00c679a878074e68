// SPDX-License-Identifier: Apache-2.0
// The native kernels of every instruction set that this processor runs.
#include <gtest/gtest.h>

#include <thread>

#include "cpu/backend.h"
#include "definition.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

using namespace xpu_fp4;

namespace {

class Native : public testing::TestWithParam<const cpu::KernelTable*> {
 protected:
  void SetUp() override {
    if (!GetParam()->supported()) GTEST_SKIP() << "this processor has no " << GetParam()->isa;
  }
  std::unique_ptr<Backend> backend() const { return cpu::make_backend(*GetParam(), serial_for); }
};

// The definition, one output at a time.
float output(const Operands& in, int64_t row, int64_t column) {
  volatile float acc = 0.0f;  // volatile: no rounding is left out
  for (int64_t quad = 0; quad < in.k / 32; quad += 4) {
    volatile float p[4] = {};
    for (int64_t b = 0; b < 4 && quad + b < in.k / 32; ++b) {
      double d = 0;
      for (int64_t i = (quad + b) * 32; i < (quad + b + 1) * 32; ++i) {
        d += 4 * definition::value(definition::code_at(in.a, row * in.k + i)) *
             definition::value(definition::code_at(in.w, column * in.k + i));
      }
      const int a = in.a_scale[static_cast<size_t>(row * in.k / 32 + quad + b)];
      const int w = in.w_scale[static_cast<size_t>(column * in.k / 32 + quad + b)];
      p[b] = static_cast<float>(std::ldexp(d, a + w - 256));
    }
    volatile float left = p[0] + p[1], right = p[2] + p[3];
    volatile float sum = left + right;
    acc = acc + sum;
  }
  return acc;
}

TEST_P(Native, GemmFollowsTheDefinition) {
  for (const int64_t k : {32, 96, 128, 160, 416}) {
    const Operands in(5, 37, k, 100, 140, static_cast<unsigned>(k));
    const std::vector<float> y = in.gemm(*backend());
    for (int64_t row = 0; row < in.m; ++row) {
      for (int64_t column = 0; column < in.n; ++column) {
        ASSERT_EQ(bits_of(y[static_cast<size_t>(row * in.n + column)]), bits_of(output(in, row, column))) << k;
      }
    }
  }
}

TEST_P(Native, EveryInstructionSetGivesThePortableBits) {
  const auto portable = cpu::make_backend(cpu::kPortable, serial_for);
  const Operands in(67, 101, 736, 0, 255, 7);
  EXPECT_TRUE(same_bits(in.gemm(*backend()), in.gemm(*portable)));

  const std::vector<float> x = random_floats(67 * 736, 8, 60.0f);
  std::vector<float> y[2];
  std::vector<uint8_t> q[2], scale[2];
  const Backend* backends[] = {portable.get(), nullptr};
  const auto own = backend();
  backends[1] = own.get();
  for (int i = 0; i < 2; ++i) {
    y[i].resize(67 * 101);
    q[i].resize(67 * 736 / 2);
    scale[i].resize(67 * 736 / 32);
    backends[i]->gemm_w4a16({x.data(), DType::f32, in.weight(), {nullptr, 0, 0}, y[i].data(), in.m, in.n, in.k});
    backends[i]->quantize({x.data(), DType::f32, 67, 736, ScaleMode::even, q[i].data(), scale[i].data()});
  }
  EXPECT_TRUE(same_bits(y[0], y[1]));
  EXPECT_EQ(q[0], q[1]);
  EXPECT_EQ(scale[0], scale[1]);
}

TEST_P(Native, ThreadsDoNotChangeABit) {
  const auto in_reverse_on_threads = [](int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
    std::vector<std::thread> threads;
    for (int64_t i = n; i-- > 0;) threads.emplace_back([&body, i] { body(i, i + 1); });
    for (std::thread& thread : threads) thread.join();
  };
  const Operands in(130, 70, 288, 90, 150, 3);
  EXPECT_TRUE(same_bits(in.gemm(*cpu::make_backend(*GetParam(), in_reverse_on_threads)), in.gemm(*backend())));
}

#if defined(__x86_64__)
TEST_P(Native, TheCallersFloatEnvironmentNeitherMattersNorChanges) {
  const Operands in(9, 33, 256, 40, 80, 5);  // products around 2^-134: subnormal
  const std::vector<float> expected = in.gemm(*backend());
  const unsigned saved = _mm_getcsr();
  const unsigned hostile = saved | 0x8040u | 0x4000u;  // flush to zero, denormals are zero, round up
  _mm_setcsr(hostile);
  const std::vector<float> got = in.gemm(*backend());
  const unsigned after = _mm_getcsr();
  _mm_setcsr(saved);
  EXPECT_TRUE(same_bits(got, expected));
  EXPECT_EQ(after & 0xFFC0u, hostile & 0xFFC0u);
}
#endif

std::string name_of(const testing::TestParamInfo<const cpu::KernelTable*>& info) { return info.param->isa; }
INSTANTIATE_TEST_SUITE_P(, Native, testing::ValuesIn(cpu::all_kernels()), name_of);

TEST(KernelChoice, NamesAnInstructionSetThatDoesNotExist) {
  setenv("XPU_FP4_CPU_ISA", "mmx", 1);
  try {
    cpu::best_kernels();
    ADD_FAILURE() << "no error";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("XPU_FP4_CPU_ISA is \"mmx\""), std::string::npos) << error.what();
  }
  unsetenv("XPU_FP4_CPU_ISA");
}

}  // namespace
