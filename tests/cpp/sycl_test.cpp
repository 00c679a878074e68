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

// Sizes of H and K: blocks of H that end between those of 128, several of them in a row, more blocks than a sub-group has
// lanes.
constexpr std::pair<int, int64_t> kTransforms[] = {{0, 96},    {32, 96},   {64, 192},  {128, 256},
                                                   {32, 1152}, {64, 1216}, {128, 1152}};

// Rows with NaN, Inf and sums that overflow, each in a block of its own; and subnormal ones.
std::vector<float> difficult_rows(int64_t rows, int64_t k) {
  std::vector<float> x = random_floats(rows * k, static_cast<unsigned>(k), 60.0f);
  const auto at = [&](int64_t row, int64_t column) -> float& { return x[static_cast<size_t>(row * k + column)]; };
  at(1, 5) = std::numeric_limits<float>::quiet_NaN();
  at(2, k - 1) = std::numeric_limits<float>::infinity();
  at(3, 0) = at(3, 1) = std::numeric_limits<float>::max();
  for (int64_t i = 0; i < k; ++i) at(4, i) *= 0x1p-110f;
  return x;
}

std::vector<float> transformed_rows(std::vector<float> x, int64_t k, int size, const float* offset) {
  for (size_t row = 0; row < x.size(); row += static_cast<size_t>(k)) definition::transform(x.data() + row, k, size, offset);
  return x;
}

TEST_F(Sycl, TransformedFloatsAreQuantizedAsTheDefinitionSays) {
  const int64_t rows = 5;
  for (const auto& [size, k] : kTransforms) {
    const std::vector<float> x = difficult_rows(rows, k), offset = random_floats(k, 7, 40.0f);
    for (const float* subtracted : {static_cast<const float*>(nullptr), offset.data()}) {
      const std::vector<float> transformed = transformed_rows(x, k, size, subtracted);
      for (Quantizer to : {Quantizer::mxfp4(ScaleMode::even), Quantizer::mxfp4(ScaleMode::ceil), Quantizer::mxint8(32),
                           Quantizer::mxint8(128)}) {
        std::vector<uint8_t> q[2], scale[2];
        const Backend* backends[] = {native.get(), &sycl};
        for (int i = 0; i < 2; ++i) {
          q[i].resize(static_cast<size_t>(rows * code_bytes(to.format, k)));
          scale[i].resize(static_cast<size_t>(rows * k / 32));
          if (i == 1) to.transform = {size, subtracted};
          backends[i]->quantize(
              {i == 0 ? transformed.data() : x.data(), DType::f32, to, rows, k, q[i].data(), scale[i].data()});
        }
        ASSERT_EQ(q[0], q[1]) << size << " " << k;
        ASSERT_EQ(scale[0], scale[1]) << size << " " << k;
      }
    }
  }
}

TEST_F(Sycl, ProductsTransformTheirActivations) {
  const int64_t rows = 5, n = 20;
  for (const auto& [size, k] : kTransforms) {
    const Operands in(rows, n, k, 120, 130, static_cast<unsigned>(size));
    const std::vector<float> x = difficult_rows(rows, k), offset = random_floats(k, 8, 40.0f);
    const std::vector<float> transformed = transformed_rows(x, k, size, offset.data());
    for (Quantizer to : {Quantizer{Format::none}, Quantizer::mxfp4(ScaleMode::even), Quantizer::mxint8(128)}) {
      std::vector<float> y[2];
      for (int i = 0; i < 2; ++i) {
        y[i].resize(static_cast<size_t>(rows * n));
        if (i == 1) to.transform = {size, offset.data()};
        sycl.multiply({Activations::floats(i == 0 ? transformed.data() : x.data(), DType::f32, to, rows, k),
                       in.weight(),
                       {y[i].data(), DType::f32, {nullptr, 0, 0}}});
      }
      ASSERT_TRUE(same_bits(y[0], y[1])) << size << " " << k << " " << static_cast<int>(to.format);
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
