// SPDX-License-Identifier: Apache-2.0
// The native kernels of every instruction set that this processor runs.
#include <gtest/gtest.h>

#include <thread>

#include "cpu/backend.h"
#include "cpu/panels.h"
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

std::vector<uint8_t> prepacked(const Operands& in) {
  const auto backend = cpu::make_backend(cpu::kPortable, serial_for);
  const PreparedShape shape = backend->prepared_shape(WeightForm::strips, in.n, in.k);
  std::vector<uint8_t> out(static_cast<size_t>(shape.rows * shape.row_bytes));
  backend->prepare(in.weight(), WeightForm::strips, out.data());
  return out;
}

Weight as_strips(const Operands& in, const std::vector<uint8_t>& strips) {
  return {WeightForm::strips, in.n, in.k, nullptr, nullptr, 0, 0, strips.data()};
}

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
  std::vector<uint8_t> q[2], scale[2];
  const Backend* backends[] = {portable.get(), nullptr};
  const auto own = backend();
  backends[1] = own.get();
  for (int i = 0; i < 2; ++i) {
    q[i].resize(67 * 736 / 2);
    scale[i].resize(67 * 736 / 32);
    backends[i]->quantize({x.data(), DType::f32, Quantizer::mxfp4(ScaleMode::even), 67, 736, q[i].data(), scale[i].data()});
  }
  EXPECT_EQ(q[0], q[1]);
  EXPECT_EQ(scale[0], scale[1]);
}

// Blocks whose first element is `largest` and whose others run through every sixteen bits. float32 goes on with `rest`.
std::vector<uint8_t> every_pattern(DType dtype, uint32_t largest, uint32_t rest) {
  constexpr uint32_t kBlocks = 0x10000 / 31 + 1;
  const auto size = static_cast<size_t>(size_of(dtype));
  std::vector<uint8_t> x(kBlocks * 32 * size);
  for (uint32_t i = 0; i < kBlocks * 32; ++i) {
    const uint32_t front = i % 32 == 0 ? largest : (i / 32 * 31 + i % 32 - 1) & 0xFFFFu;
    const uint32_t bits = dtype == DType::f32 ? front << 16 | rest : front;
    std::memcpy(x.data() + i * size, &bits, size);
  }
  return x;
}

TEST_P(Native, QuantizeGivesThePortableBitsForEveryPattern) {
  const auto portable = cpu::make_backend(cpu::kPortable, serial_for);
  const auto own = backend();
  std::mt19937 random(13);
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    // Each of the least exponents and one in eight of the others, with a mantissa about each threshold.
    for (uint32_t exponent = 0; exponent < 0x7F80; exponent += exponent < 0x300 ? 0x80 : 0x400) {
      for (const uint32_t mantissa : {0x00, 0x01, 0x3F, 0x41, 0x5F, 0x60}) {
        const std::vector<uint8_t> x = every_pattern(dtype, exponent + mantissa, std::array{0u, 1u, 0x8000u}[random() % 3]);
        // Kernels that take several blocks at a time have some left.
        const int64_t k = static_cast<int64_t>(x.size()) / size_of(dtype) - 32 * static_cast<int64_t>(random() % 4);
        const auto mode = static_cast<ScaleMode>(random() % 4);
        std::vector<uint8_t> q[2], scale[2];
        for (int i = 0; i < 2; ++i) {
          q[i].assign(static_cast<size_t>(k / 2 + 64), 0xA5);  // and what lies behind must stay
          scale[i].assign(static_cast<size_t>(k / 32 + 64), 0xA5);
          (i == 0 ? portable : own)->quantize({x.data(), dtype, Quantizer::mxfp4(mode), 1, k, q[i].data(), scale[i].data()});
        }
        ASSERT_EQ(scale[0], scale[1]) << static_cast<int>(dtype) << " " << exponent + mantissa << " " << static_cast<int>(mode);
        ASSERT_EQ(q[0], q[1]) << static_cast<int>(dtype) << " " << exponent + mantissa << " " << static_cast<int>(mode);
      }
    }
  }
}

TEST_P(Native, DequantizeGivesThePortableBitsForEveryScaleAndCode) {
  const auto portable = cpu::make_backend(cpu::kPortable, serial_for);
  const auto own = backend();
  constexpr int64_t kBlocks = 256 * 16;  // each scale with each packed byte
  std::vector<uint8_t> q(kBlocks * 16), scale(kBlocks);
  for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<uint8_t>(i);
  for (size_t i = 0; i < scale.size(); ++i) scale[i] = static_cast<uint8_t>(i / 16);
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    std::vector<uint8_t> out[2];
    for (int i = 0; i < 2; ++i) {
      out[i].resize(static_cast<size_t>(kBlocks * 32 * size_of(dtype)));
      (i == 0 ? portable : own)->dequantize({Format::mxfp4, q.data(), scale.data(), 1, kBlocks * 32, out[i].data(), dtype});
    }
    ASSERT_EQ(out[0], out[1]) << static_cast<int>(dtype);
  }
}

// Scale bytes for each level of panels.h: shared by a quad, by pairs, by nothing, and outside the safe window.
struct Scales {
  const char* name;
  std::array<int, 4> offset;
  int jitter, low, high;
};
constexpr Scales kScales[] = {{"quads", {0, 1, 2, 3}, 0, 110, 140},     {"pairs", {0, 2, 9, 7}, 1, 110, 140},
                              {"blocks", {0, 13, 4, 21}, 2, 100, 150},  {"subnormal", {0, 3, 1, 2}, 3, 40, 75},
                              {"overflow", {0, 20, 3, 1}, 9, 170, 225}, {"anything", {0, 0, 0, 0}, 255, 0, 0}};

void set_scales(std::vector<uint8_t>& scale, int64_t blocks, const Scales& kind, std::mt19937& random) {
  for (size_t i = 0; i < scale.size(); ++i) {
    const size_t block = i % static_cast<size_t>(blocks);
    if (block % 4 == 0 || i == 0) {
      const int base = kind.low + static_cast<int>(random() % static_cast<unsigned>(kind.high - kind.low + 1));
      for (size_t b = 0; b < 4 && block + b < static_cast<size_t>(blocks); ++b) {
        scale[i + b] =
            static_cast<uint8_t>(base + kind.offset[b] + static_cast<int>(random() % static_cast<unsigned>(kind.jitter + 1)));
      }
    }
  }
}

TEST_P(Native, TilesHoldAtTheirEdgesInEveryLevelAndLayout) {
  const auto portable = cpu::make_backend(cpu::kPortable, serial_for);
  const auto own = backend();
  std::mt19937 random(11);
  for (const Scales& kind : kScales) {
    for (const int64_t m : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65}) {
      for (const int64_t n : {1, 15, 16, 17, 31, 33, 47, 48, 49, 97}) {
        const int64_t blocks = std::array{1, 3, 4, 5, 8, 16, 17, 20, 33}[random() % 9];
        Operands in(m, n, blocks * 32, 127, 127, random());
        set_scales(in.a_scale, blocks, kind, random);
        set_scales(in.w_scale, blocks, random() % 2 == 0 ? kind : kScales[0], random);
        const std::vector<float> expected = in.gemm(*portable);
        ASSERT_TRUE(same_bits(in.gemm(*own), expected)) << kind.name << " " << m << "x" << n << "x" << in.k;

        const std::vector<uint8_t> strips = prepacked(in);
        ASSERT_TRUE(same_bits(in.gemm(*own, as_strips(in, strips)), expected))
            << kind.name << " strips " << m << "x" << n << "x" << in.k;
      }
    }
  }
}

TEST_P(Native, ZeroBlocksFitAnyScale) {
  const auto portable = cpu::make_backend(cpu::kPortable, serial_for);
  Operands in(9, 50, 288, 120, 130, 5);
  for (size_t block = 0; block < in.a_scale.size(); block += 3) {
    std::fill_n(in.a.begin() + static_cast<int64_t>(block) * 16, 16, block % 2 == 0 ? uint8_t{0} : uint8_t{0x88});
    in.a_scale[block] = block % 2 == 0 ? 0 : 254;
  }
  for (size_t block = 0; block < in.w_scale.size(); block += 5) {
    std::fill_n(in.w.begin() + static_cast<int64_t>(block) * 16, 16, uint8_t{0x80});
    in.w_scale[block] = block % 2 == 0 ? 0 : 254;
  }
  EXPECT_TRUE(same_bits(in.gemm(*backend()), in.gemm(*portable)));
}

TEST_P(Native, W4A16IsWithinItsBoundAtTileEdges) {
  const auto own = backend();
  for (const int64_t m : {1, 3, 4, 5, 8, 9}) {
    for (const int64_t n : {1, 16, 17, 49}) {
      const Operands in(m, n, 416, 110, 140, static_cast<unsigned>(m * n));
      const std::vector<float> x = random_floats(m * in.k, 3, 6.0f);
      std::vector<float> y(static_cast<size_t>(m * n)), from_strips = y;
      const Activations floats = Activations::floats(x.data(), DType::f32, {Format::none}, m, in.k);
      own->multiply({floats, in.weight(), {y.data(), DType::f32, {nullptr, 0, 0}}});
      const std::vector<uint8_t> strips = prepacked(in);
      own->multiply({floats, as_strips(in, strips), {from_strips.data(), DType::f32, {nullptr, 0, 0}}});
      EXPECT_TRUE(same_bits(from_strips, y));
      for (int64_t row = 0; row < m; ++row) {
        for (int64_t column = 0; column < n; ++column) {
          double sum = 0, magnitude = 0;
          for (int64_t i = 0; i < in.k; ++i) {
            const double scale = std::ldexp(1.0, in.w_scale[static_cast<size_t>((column * in.k + i) / 32)] - 127);
            const double term = x[static_cast<size_t>(row * in.k + i)] *
                                definition::value(definition::code_at(in.w, column * in.k + i)) * scale;
            sum += term;
            magnitude += std::fabs(term);
          }
          const double error = std::fabs(y[static_cast<size_t>(row * n + column)] - sum);
          ASSERT_LE(error, std::ldexp(std::sqrt(static_cast<double>(in.k)), -22) * magnitude) << m << "x" << n;
        }
      }
    }
  }
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

// The meaning of align(), checked by what it promises.
TEST(Alignment, KeepsEveryBlocksValueAndShiftsNoFurtherThanAllowed) {
  std::mt19937 random(3);
  for (int i = 0; i < 200000; ++i) {
    uint8_t scale[4];
    const int low = static_cast<int>(random() % 250), width = 1 + static_cast<int>(random() % 12);
    for (uint8_t& byte : scale)
      byte = static_cast<uint8_t>(std::min(255, low + static_cast<int>(random() % static_cast<unsigned>(width))));
    const unsigned zero = random() % 4 == 0 ? random() % 16 : 0;
    const cpu::Alignment got = cpu::align(scale, zero, cpu::kMaxShift);
    const bool nan = std::find(scale, scale + 4, 255) != scale + 4;
    for (int b = 0; b < 4; ++b) {
      if (nan) {
        ASSERT_EQ(got.base[b], 255);
        continue;
      }
      ASSERT_LE(got.shift[b], 3);
      if ((zero >> b & 1u) == 0) {
        ASSERT_EQ(got.base[b] + got.shift[b], scale[b]);
      }
      const int shared_with = got.level == cpu::Level::quad ? 0 : got.level == cpu::Level::pair ? b & 2 : b;
      ASSERT_EQ(got.base[b], got.base[shared_with]);
      if (got.level != cpu::Level::general) {
        ASSERT_GE(got.base[b], cpu::kLeastSafeByte);
        ASSERT_LE(got.base[b] + got.shift[b], cpu::kLargestSafeByte);
      }
    }
  }
}

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
