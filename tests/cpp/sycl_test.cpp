// SPDX-License-Identifier: Apache-2.0
// The SYCL kernels on Intel's CPU device against the native ones, through the loader, without torch.
#include <gtest/gtest.h>

#include <limits>
#include <thread>

#include "definition.h"
#include "sycl/loader.h"

using namespace xpu_fp4;

namespace {

#ifdef XPU_FP4_TEST_SYCL

class Sycl : public testing::Test {
 protected:
  std::unique_ptr<Backend> native = cpu::make_backend(cpu::kPortable, serial_for);
  const Backend& sycl = syclrt::load_plugin().cpu();
};

TEST_F(Sycl, ReportsTheCpuDevice) {
  const auto devices = syclrt::load_plugin().devices();
  ASSERT_FALSE(devices.empty());
  const char* variable = std::getenv("XPU_FP4_SYCL_SUB_GROUP");
  EXPECT_EQ(devices[0].sub_group, variable != nullptr ? std::atoi(variable) : 16);
}

TEST_F(Sycl, GemmGivesTheNativeBits) {
  unsigned seed = 0;
  for (const int64_t m : {1, 7, 16, 33}) {
    for (const int64_t n : {1, 31, 32, 65}) {
      for (const int64_t k : {32, 96, 128, 160, 544}) {
        for (const auto& [low, high] : {std::pair{100, 140}, std::pair{0, 255}, std::pair{40, 80}}) {
          const Operands in(m, n, k, low, high, ++seed);
          ASSERT_TRUE(same_bits(in.gemm(sycl), in.gemm(*native))) << m << " " << n << " " << k << " " << low;
        }
      }
    }
  }
}

TEST_F(Sycl, QuantizeAndDequantizeGiveTheNativeBits) {
  for (const int64_t rows : {1, 3, 50}) {
    const int64_t k = 96;
    const std::vector<float> x = random_floats(rows * k, static_cast<unsigned>(rows), 130.0f);
    for (int mode = 0; mode < 4; ++mode) {
      std::vector<uint8_t> q[2], scale[2];
      std::vector<float> back[2];
      const Backend* backends[] = {native.get(), &sycl};
      for (int i = 0; i < 2; ++i) {
        q[i].resize(static_cast<size_t>(rows * k / 2));
        scale[i].resize(static_cast<size_t>(rows * k / 32));
        back[i].resize(static_cast<size_t>(rows * k));
        backends[i]->quantize(
            {x.data(), DType::f32, Quantizer::mxfp4(static_cast<ScaleMode>(mode)), rows, k, q[i].data(), scale[i].data()});
        backends[i]->dequantize({Format::mxfp4, q[i].data(), scale[i].data(), rows, k, back[i].data(), DType::f32});
      }
      ASSERT_EQ(q[0], q[1]) << mode;
      ASSERT_EQ(scale[0], scale[1]) << mode;
      ASSERT_TRUE(same_bits(back[0], back[1])) << mode;
    }
  }
}

// Bytes are MXINT8's codes, -128 among them.
TEST_F(Sycl, GemmOfMxint8GivesTheNativeBits) {
  unsigned seed = 100;
  for (const int64_t m : {1, 16, 33}) {
    for (const int64_t k : {32, 160, 544}) {
      for (const auto& [low, high] : {std::pair{100, 140}, std::pair{0, 255}, std::pair{40, 80}}) {
        const int64_t n = 35;
        const Operands in(m, n, k, low, high, ++seed), bytes(m, 1, 2 * k, 0, 0, seed);
        std::vector<float> y[2] = {std::vector<float>(static_cast<size_t>(m * n)),
                                   std::vector<float>(static_cast<size_t>(m * n))};
        const Backend* backends[] = {native.get(), &sycl};
        for (int i = 0; i < 2; ++i) {
          backends[i]->multiply({Activations::codes(Format::mxint8, bytes.a.data(), in.a_scale.data(), m, k),
                                 in.weight(),
                                 {y[i].data(), DType::f32, {nullptr, 0, 0}}});
        }
        ASSERT_TRUE(same_bits(y[0], y[1])) << m << " " << k << " " << low;
      }
    }
  }
}

TEST_F(Sycl, Mxint8GivesTheNativeBits) {
  for (const int64_t k : {32, 96, 128, 416}) {
    const int64_t rows = 5;
    std::vector<float> x = random_floats(rows * k, static_cast<unsigned>(k), 130.0f);
    x[3] = std::numeric_limits<float>::quiet_NaN();
    for (const int group : {32, 128}) {
      std::vector<uint8_t> q[2], scale[2];
      std::vector<float> back[2];
      const Backend* backends[] = {native.get(), &sycl};
      for (int i = 0; i < 2; ++i) {
        q[i].resize(static_cast<size_t>(rows * k));
        scale[i].resize(static_cast<size_t>(rows * k / 32));
        back[i].resize(static_cast<size_t>(rows * k));
        backends[i]->quantize({x.data(), DType::f32, Quantizer::mxint8(group), rows, k, q[i].data(), scale[i].data()});
        backends[i]->dequantize({Format::mxint8, q[i].data(), scale[i].data(), rows, k, back[i].data(), DType::f32});
      }
      ASSERT_EQ(q[0], q[1]) << k << " " << group;
      ASSERT_EQ(scale[0], scale[1]) << k << " " << group;
      ASSERT_TRUE(same_bits(back[0], back[1])) << k << " " << group;
    }
  }
}

TEST_F(Sycl, UnalignedWeightsGiveTheSameBits) {
  Operands in(17, 40, 160, 100, 140, 11);
  const std::vector<float> expected = in.gemm(*native);
  std::vector<uint8_t> shifted(in.w.size() + 1);
  std::copy(in.w.begin(), in.w.end(), shifted.begin() + 1);
  Weight weight = in.weight();
  weight.codes = shifted.data() + 1;
  EXPECT_TRUE(same_bits(in.gemm(sycl, weight), expected));
}

TEST_F(Sycl, ManyThreadsMayComputeAtOnce) {
  const Operands in(33, 65, 224, 100, 140, 12);
  const std::vector<float> expected = in.gemm(*native);
  std::vector<std::vector<float>> results(4);
  std::vector<std::thread> threads;
  for (auto& result : results) threads.emplace_back([&] { result = in.gemm(sycl); });
  for (std::thread& thread : threads) thread.join();
  for (const auto& result : results) EXPECT_TRUE(same_bits(result, expected));
}

#else

TEST(Sycl, SaysThatItWasBuiltWithout) {
  try {
    syclrt::load_plugin();
    ADD_FAILURE() << "no error";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("built without SYCL"), std::string::npos) << error.what();
  }
}

#endif

}  // namespace
