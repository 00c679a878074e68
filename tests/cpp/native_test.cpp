// SPDX-License-Identifier: Apache-2.0
// Products of every instruction set that this processor runs.
#include <tuple>

#include "cpu/panels.h"
#include "native.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

using namespace xpu_fp4;

namespace {

class Native : public NativeKernels {};

// The kernels of an instruction set, and the format of A.
class NativeProduct : public testing::TestWithParam<std::tuple<const cpu::KernelTable*, Format>> {
 protected:
  void SetUp() override {
    if (!kernels().supported()) GTEST_SKIP() << "this processor has no " << kernels().isa;
  }
  const cpu::KernelTable& kernels() const { return *std::get<0>(GetParam()); }
  Format format() const { return std::get<1>(GetParam()); }
  std::unique_ptr<Backend> backend() const { return cpu::make_backend(kernels(), serial_for); }
};

// The definition, one output at a time.
float output(const Operands& in, int64_t row, int64_t column) {
  volatile float acc = 0.0f;  // volatile: no rounding is left out
  for (int64_t quad = 0; quad < in.k / 32; quad += 4) {
    volatile float p[4] = {};
    for (int64_t b = 0; b < 4 && quad + b < in.k / 32; ++b) {
      double d = 0;
      for (int64_t i = (quad + b) * 32; i < (quad + b + 1) * 32; ++i) {
        d += definition::element(in.format, in.a, row * in.k + i) *
             definition::value(definition::code_at(in.w, column * in.k + i));
      }
      const int a = in.a_scale[static_cast<size_t>(row * in.k / 32 + quad + b)];
      const int w = in.w_scale[static_cast<size_t>(column * in.k / 32 + quad + b)];
      p[b] = static_cast<float>(std::ldexp(d, a + w - 254));
    }
    volatile float left = p[0] + p[1], right = p[2] + p[3];
    volatile float sum = left + right;
    acc = acc + sum;
  }
  return acc;
}

std::vector<float> outputs(const Operands& in) {
  std::vector<float> y;
  for (int64_t i = 0; i < in.m * in.n; ++i) y.push_back(output(in, i / in.n, i % in.n));
  return y;
}

TEST_P(NativeProduct, FollowsTheDefinition) {
  for (const int64_t k : {32, 96, 128, 160, 416}) {
    const Operands in(5, 37, k, 100, 140, static_cast<unsigned>(k), format());
    ASSERT_TRUE(same_bits(in.gemm(*backend()), outputs(in))) << k;
  }
}

TEST_P(NativeProduct, GivesThePortableBits) {
  const auto portable = cpu::make_backend(cpu::kPortable, serial_for);
  const Operands in(67, 101, 736, 0, 255, 7, format());
  EXPECT_TRUE(same_bits(in.gemm(*backend()), in.gemm(*portable)));
}

TEST_P(NativeProduct, QuantizesOnTheWay) {
  for (const int group : {32, 128}) {
    for (const int64_t k : {96, 128, 416}) {
      const Quantizer to = format() == Format::mxfp4 ? Quantizer::mxfp4(ScaleMode::even) : Quantizer::mxint8(group);
      Operands in(35, 33, k, 110, 140, 21, format());
      const std::vector<float> x = random_floats(in.m * k, 22, 12.0f);
      backend()->quantize({x.data(), DType::f32, to, in.m, k, in.a.data(), in.a_scale.data()});
      std::vector<float> y(static_cast<size_t>(in.m * in.n));
      backend()->multiply(
          {Activations::floats(x.data(), DType::f32, to, in.m, k), in.weight(), {y.data(), DType::f32, {nullptr, 0, 0}}});
      ASSERT_TRUE(same_bits(y, in.gemm(*backend()))) << k << " group " << group;
    }
  }
}

TEST_P(NativeProduct, TransformsOnTheWay) {
  const Quantizer plain = format() == Format::mxfp4 ? Quantizer::mxfp4(ScaleMode::even) : Quantizer::mxint8(128);
  for_transforms([&](DType dtype, int64_t k, const Transform& transform) {
    for (const int64_t m : {1, 35}) {
      const Operands in(m, 33, k, 110, 140, 21, format());
      const Transformed a(dtype, m, k, transform);
      Quantizer to = plain;
      to.transform = transform;
      std::vector<float> y[2];
      for (std::vector<float>& values : y) values.resize(static_cast<size_t>(m * in.n));
      backend()->multiply({Activations::floats(a.floats.data(), DType::f32, plain, m, k),
                           in.weight(),
                           {y[0].data(), DType::f32, {nullptr, 0, 0}}});
      backend()->multiply(
          {Activations::floats(a.x.data(), dtype, to, m, k), in.weight(), {y[1].data(), DType::f32, {nullptr, 0, 0}}});
      ASSERT_TRUE(same_bits(y[1], y[0])) << m << " x " << k << " size " << transform.hadamard;
    }
  });
}

TEST_P(Native, W4A16TransformsAndRoundsToTheDtype) {
  for_transforms([&](DType dtype, int64_t k, const Transform& transform) {
    for (const int64_t m : {1, 9}) {
      const Operands in(m, 33, k, 110, 140, 21);
      const Transformed a(dtype, m, k, transform);
      std::vector<uint8_t> rounded(a.x.size());
      for (int64_t i = 0; i < m * k; ++i) store(dtype, rounded.data(), i, a.floats[static_cast<size_t>(i)]);
      std::vector<float> y[2];
      for (int i = 0; i < 2; ++i) {
        Quantizer to = {Format::none};
        if (i == 1) to.transform = transform;
        y[i].resize(static_cast<size_t>(m * in.n));
        backend()->multiply({Activations::floats(i == 0 ? rounded.data() : a.x.data(), dtype, to, m, k),
                             in.weight(),
                             {y[i].data(), DType::f32, {nullptr, 0, 0}}});
      }
      ASSERT_TRUE(same_bits(y[1], y[0])) << m << " x " << k << " size " << transform.hadamard;
    }
  });
}

// Scale bytes for each level of panels.h: shared by a quad, by pairs, by nothing, and outside the safe window.
struct Scales {
  const char* name;
  std::array<int, 4> offset;
  int jitter, low, high;
};
constexpr Scales kShared = {"shared", {0, 0, 0, 0}, 0, 110, 140};  // as MXINT8 with groups of 128
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

TEST_P(NativeProduct, TilesHoldAtTheirEdgesInEveryLevelAndLayout) {
  const auto portable = cpu::make_backend(cpu::kPortable, serial_for);
  const auto own = backend();
  std::mt19937 random(11);
  for (const Scales& kind : kScales) {
    for (const int64_t m : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65}) {
      for (const int64_t n : {1, 15, 16, 17, 31, 33, 47, 48, 49, 97}) {
        const int64_t blocks = std::array{1, 3, 4, 5, 8, 16, 17, 20, 33}[random() % 9];
        Operands in(m, n, blocks * 32, 127, 127, random(), format());
        set_scales(in.a_scale, blocks, random() % 4 == 0 ? kShared : kind, random);
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

// Nearly all quads are aligned, and a few of some rows and columns are not, so that each level comes after each other one.
TEST_P(NativeProduct, AQuadMayBeUnlikeItsNeighbours) {
  const auto portable = cpu::make_backend(cpu::kPortable, serial_for);
  const auto own = backend();
  std::mt19937 random(17);
  for (const int exceptions : {1, 3, 12}) {
    for (const int64_t k : {384, 1184, 2720}) {
      for (const int64_t m : {20, 70, 150}) {
        Operands in(m, 35, k, 127, 127, random(), format());
        set_scales(in.a_scale, k / 32, kShared, random);
        set_scales(in.w_scale, k / 32, kScales[0], random);
        for (std::vector<uint8_t>* scale : {&in.a_scale, &in.w_scale}) {
          for (int i = 0; i < exceptions; ++i) {
            (*scale)[random() % scale->size()] = std::array<uint8_t, 6>{90, 115, 125, 135, 230, 255}[random() % 6];
          }
        }
        const std::vector<uint8_t> strips = prepacked(in);
        ASSERT_TRUE(same_bits(in.gemm(*own, as_strips(in, strips)), in.gemm(*portable))) << exceptions << " " << m << "x" << k;
      }
    }
  }
}

// All integers are the largest, so all sums are, and the scales are about the edges of the safe window, on either side of A and
// W, and at the ends of all scales.
TEST_P(NativeProduct, WindowsHoldTheLargestSums) {
  const uint8_t six = format() == Format::mxfp4 ? 0xFF : 0x80;  // -6, or -128
  constexpr std::array<int, 4> kOffsets[] = {{0, 0, 0, 0}, {3, 3, 3, 0}, {0, 3, 9, 6}, {7, 0, 14, 4}};
  for (const uint8_t w_code : {0x77, 0xFF}) {
    Operands in(9, 33, 160, 127, 127, 1, format());
    std::fill(in.a.begin(), in.a.end(), six);
    std::fill(in.w.begin(), in.w.end(), w_code);
    const auto set = [](std::vector<uint8_t>& scale, int base, const std::array<int, 4>& offset) {
      for (size_t i = 0; i < scale.size(); ++i) {
        const int of_block = offset[i % 5 % 4];
        scale[i] = static_cast<uint8_t>(base < 127 ? base + of_block : base - of_block);
      }
    };
    const std::array bases = {0,   1,   cpu::kLeastSafeByte - 1,   cpu::kLeastSafeByte + 0,
                              127, 253, cpu::kLargestSafeByte + 1, cpu::kLargestSafeByte + 0};
    for (const int a : bases) {
      for (const int w : bases) {
        for (const auto& of_a : kOffsets) {
          for (const auto& of_w : kOffsets) {
            if (of_a != kOffsets[0] && of_w != kOffsets[0] && of_a != of_w) continue;
            set(in.a_scale, a, of_a);
            set(in.w_scale, w, of_w);
            // All rows and columns are alike.
            const std::vector<float> expected(static_cast<size_t>(in.m * in.n), output(in, 0, 0));
            Operands few = in;
            few.m = 1;
            ASSERT_TRUE(same_bits(in.gemm(*backend()), expected)) << a << " " << w;
            ASSERT_TRUE(same_bits(few.gemm(*backend()), {expected.begin(), expected.begin() + in.n})) << a << " " << w;
          }
        }
      }
    }
  }
}

TEST_P(NativeProduct, ZeroBlocksFitAnyScale) {
  const auto portable = cpu::make_backend(cpu::kPortable, serial_for);
  Operands in(9, 50, 288, 120, 130, 5, format());
  const int64_t bytes = code_bytes(format(), 32);
  for (size_t block = 0; block < in.a_scale.size(); block += 3) {
    const bool negative = format() == Format::mxfp4 && block % 2 != 0;
    std::fill_n(in.a.begin() + static_cast<int64_t>(block) * bytes, bytes, negative ? uint8_t{0x88} : uint8_t{0});
    in.a_scale[block] = block % 2 == 0 ? 0 : 254;
  }
  for (size_t block = 0; block < in.w_scale.size(); block += 5) {
    std::fill_n(in.w.begin() + static_cast<int64_t>(block) * 16, 16, uint8_t{0x80});
    in.w_scale[block] = block % 2 == 0 ? 0 : 254;
  }
  EXPECT_TRUE(same_bits(in.gemm(*backend()), in.gemm(*portable)));
}

// W4A16: x as its dtype holds it, times the W of some operands.
struct Unquantized {
  Operands w;
  DType dtype;
  std::vector<uint8_t> x;

  Unquantized(const Operands& of_w, DType of_x, const std::vector<float>& values)
      : w(of_w), dtype(of_x), x(values.size() * static_cast<size_t>(size_of(of_x))) {
    for (size_t i = 0; i < values.size(); ++i) store(dtype, x, i, values[i]);
  }

  // Some of the rows, `count` from `first` on.
  std::vector<float> multiply(const Backend& backend, const Weight& weight, int64_t first, int64_t count) const {
    std::vector<float> y(static_cast<size_t>(count * w.n));
    backend.multiply({Activations::floats(x.data() + first * w.k * size_of(dtype), dtype, {Format::none}, count, w.k),
                      weight,
                      {y.data(), DType::f32, {nullptr, 0, 0}}});
    return y;
  }
  std::vector<float> multiply(const Backend& backend) const { return multiply(backend, w.weight(), 0, w.m); }

  // The largest error over its bound.
  double error(const std::vector<float>& y) const {
    double worst = 0;
    for (int64_t row = 0; row < w.m; ++row) {
      for (int64_t column = 0; column < w.n; ++column) {
        double sum = 0, magnitude = 0, largest_scale = 1;
        for (int64_t i = 0; i < w.k; ++i) {
          const int64_t element = column * w.k + i;
          const double scale = std::ldexp(1.0, w.w_scale[static_cast<size_t>(element / 32)] - 127);
          const double term =
              load(dtype, x, static_cast<size_t>(row * w.k + i)) * definition::value(definition::code_at(w.w, element)) * scale;
          sum += term;
          magnitude += std::fabs(term);
          largest_scale = std::max(largest_scale, scale);
        }
        const auto k = static_cast<double>(w.k);
        const double bound = std::ldexp(std::sqrt(k), -22) * magnitude + std::ldexp(k, -126) * largest_scale;
        const double of_bound = std::fabs(y[static_cast<size_t>(row * w.n + column)] - sum) / bound;
        worst = of_bound <= worst ? worst : of_bound;  // NaN stays
      }
    }
    return worst;
  }
};

TEST_P(Native, W4A16IsWithinItsBoundAtTileEdges) {
  const auto own = backend();
  for (const DType dtype : kDTypes) {
    for (const int64_t m : {1, 3, 4, 5, 8, 9, 16, 17, 33, 65}) {
      for (const int64_t n : {1, 16, 17, 49}) {
        const int64_t k = std::array{32, 96, 416, 544, 1056}[(m + n) % 5];
        const Unquantized in(Operands(m, n, k, 110, 140, static_cast<unsigned>(m * n)), dtype, random_floats(m * k, 3, 6.0f));
        const std::vector<float> y = in.multiply(*own);
        const std::vector<uint8_t> strips = prepacked(in.w);
        EXPECT_TRUE(same_bits(in.multiply(*own, as_strips(in.w, strips), 0, m), y));
        ASSERT_LE(in.error(y), 1) << m << "x" << n << "x" << k << " " << static_cast<int>(dtype);
      }
    }
  }
}

TEST_P(Native, W4A16IsWithinItsBoundForEveryScale) {
  const std::vector<float> floats = random_floats(5 * 288, 9, 4.0f);
  for (const DType dtype : kDTypes) {
    for (int byte = 0; byte < 255; ++byte) {
      // Inputs are scaled so that the least scales are more than underflow, and the largest do not overflow.
      std::vector<float> x = floats;
      for (float& value : x) value = std::ldexp(value, byte < 127 ? 8 : -10);
      // Shared by a weight, and among the usual ones.
      for (const size_t step : {1, 7}) {
        Unquantized in(Operands(5, 17, 288, 120, 130, static_cast<unsigned>(byte)), dtype, x);
        for (size_t i = 0; i < in.w.w_scale.size(); i += step) in.w.w_scale[i] = static_cast<uint8_t>(byte);
        ASSERT_LE(in.error(in.multiply(*backend())), 1) << byte << " " << step << " " << static_cast<int>(dtype);
      }
    }
  }
}

// 2^24 and then numbers that each lose 2^-7 where they are added one by one to a sum so large.
TEST_P(Native, W4A16HasNoLongChains) {
  for (const DType dtype : kDTypes) {
    for (const int64_t k : {32, 64, 96, 128, 512, 1024, 4096, 16384}) {
      for (const int64_t large : {1, 2, 32}) {
        std::vector<float> x(static_cast<size_t>(3 * k), 1.0078125f);
        for (int64_t i = 0; i < 3; ++i) std::fill_n(x.begin() + i * k, large, 16777216.0f);
        if (dtype == DType::f16) {
          for (float& value : x) value = std::ldexp(value, -14);
        }
        Unquantized in(Operands(3, 17, k, 127, 127, 1), dtype, x);
        std::fill(in.w.w.begin(), in.w.w.end(), uint8_t{0x22});  // ones
        ASSERT_LE(in.error(in.multiply(*backend())), 1) << k << " " << large << " " << static_cast<int>(dtype);
      }
    }
  }
}

// Large scales bring elements near the end of the exponents back, so none of them may count as zero.
TEST_P(Native, W4A16HasNoZeroesForTinyElements) {
  for (const DType dtype : kDTypes) {
    for (const int exponent : {-133, -127, -126, -110, -101, -100, -99}) {
      for (const int byte : {100, 127, 147, 182, 240, 252, 254}) {
        for (const size_t step : {1, 200}) {  // every element, or few beside larger ones
          std::vector<float> x = random_floats(9 * 256, 4, 2.0f);
          for (float& value : x) value = std::ldexp(value, -90);
          for (size_t i = 0; i < x.size(); i += step) x[i] = std::ldexp(1.984375f, exponent);
          Unquantized in(Operands(9, 18, 256, byte, byte, 5), dtype, x);
          std::fill(in.w.w.begin(), in.w.w.end(), uint8_t{0x77});  // the largest, so that together they exceed the bound
          ASSERT_LE(in.error(in.multiply(*backend())), 1) << exponent << " " << byte << " " << static_cast<int>(dtype);
        }
      }
    }
  }
}

// Rows of all kinds and strips of all scales, about each end of what tiles take: what is left to another way of computing must
// not depend on who is beside it.
TEST_P(Native, W4A16RowsDoNotDependOnTheirNeighbours) {
  constexpr int64_t kRows = 69, kDepth = 1184;
  for (const DType dtype : kDTypes) {
    std::vector<float> x = random_floats(kRows * kDepth, 41, 6.0f);
    std::mt19937 random(42);
    for (const float special : {0x1p-130f, 0x1p-101f, 0x1.fep-61f, 0x1p-60f, 0x1.fep59f, 0x1p60f, INFINITY, NAN}) {
      for (int i = 0; i < 9; ++i) x[random() % x.size()] = special;
    }
    Unquantized in(Operands(kRows, 55, kDepth, 115, 135, 43), dtype, x);
    for (const int byte : {0, 68, 69, 182, 183, 253, 255}) {
      for (int i = 0; i < 3; ++i) in.w.w_scale[random() % in.w.w_scale.size()] = static_cast<uint8_t>(byte);
    }
    for (size_t block = 5; block < in.w.w_scale.size(); block += 97) {
      std::fill_n(in.w.w.begin() + static_cast<int64_t>(block) * 16, 16, uint8_t{0x08});
      in.w.w_scale[block] = block % 2 == 0 ? 0 : 254;
    }
    const std::vector<float> y = in.multiply(*backend());
    const auto part = [&](int64_t first, int64_t count) {
      return std::vector<float>(y.begin() + first * in.w.n, y.begin() + (first + count) * in.w.n);
    };
    for (int64_t row = 0; row < kRows; ++row) {
      ASSERT_TRUE(same_bits(in.multiply(*backend(), in.w.weight(), row, 1), part(row, 1))) << row;
    }
    for (const int64_t rows : {2, 4, 5, 8, 16, 17, 31, 33}) {
      const int64_t first = kRows - rows - 1;
      ASSERT_TRUE(same_bits(in.multiply(*backend(), in.w.weight(), first, rows), part(first, rows))) << rows;
    }
    ASSERT_TRUE(same_bits(in.multiply(*cpu::make_backend(*GetParam(), in_reverse_on_threads)), y));
  }
}

// All-zero blocks have the least scale.
TEST_P(Native, W4A16ZeroBlocksFitAnyScale) {
  for (const int64_t m : {2, 20}) {
    Unquantized in(Operands(m, 50, 288, 120, 130, 5), DType::bf16, random_floats(m * 288, 6, 4.0f));
    std::vector<float> expected;
    for (const bool extreme : {false, true}) {
      for (size_t block = 0; block < in.w.w_scale.size(); block += 5) {
        std::fill_n(in.w.w.begin() + static_cast<int64_t>(block) * 16, 16, uint8_t{0x80});
        in.w.w_scale[block] = !extreme ? 125 : block % 2 == 0 ? 0 : 254;
      }
      std::vector<float> y = in.multiply(*backend());
      if (extreme) {
        EXPECT_TRUE(same_bits(y, expected)) << m;
      }
      expected = std::move(y);
    }
  }
}

// What the bound of short K rests on: a tile product is two chains of sixteen fma, as Intel's manual says.
TEST_P(Native, W4A16FollowsTheOrderOfATile) {
  if (GetParam()->isa != std::string("amx")) GTEST_SKIP() << "no tiles";
  constexpr int64_t kDepth = 256;
  for (const int64_t m : {3, 16}) {
    std::vector<float> x = random_floats(m * kDepth, 51, 6.0f);
    for (float& value : x) value = std::ldexp(value, -30);
    const Operands w(m, 32, kDepth, 70, 80, 52);  // and products are near the least that floats hold
    const Unquantized in(w, DType::bf16, x);
    std::vector<float> expected;
    for (int64_t i = 0; i < m * w.n; ++i) {
      float acc = 0.0f;
      for (int64_t block = 0; block < kDepth; block += 32) {
        float chain[2] = {};
        for (int64_t k = block; k < block + 32; ++k) {
          const int64_t element = i % w.n * kDepth + k;
          const double value = definition::value(definition::code_at(w.w, element));
          const auto scaled = static_cast<float>(std::ldexp(value, w.w_scale[static_cast<size_t>(element / 32)] - 127));
          const auto of_x = static_cast<float>(load(DType::bf16, in.x, static_cast<size_t>(i / w.n * kDepth + k)));
          chain[k % 2] = std::fmaf(of_x, scaled, chain[k % 2]);
        }
        acc = acc + (chain[0] + chain[1]);
      }
      expected.push_back(acc);
    }
    EXPECT_TRUE(same_bits(in.multiply(*backend()), expected)) << m;
  }
}

TEST_P(NativeProduct, ThreadsDoNotChangeABit) {
  const Operands in(130, 70, 288, 90, 150, 3, format());
  EXPECT_TRUE(same_bits(in.gemm(*cpu::make_backend(kernels(), in_reverse_on_threads)), in.gemm(*backend())));
}

#if defined(__x86_64__)
TEST_P(NativeProduct, TheCallersFloatEnvironmentNeitherMattersNorChanges) {
  const Operands in(9, 33, 256, 40, 80, 5, format());  // products around 2^-134: subnormal
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
    const int most = i % 2 == 0 ? cpu::kMaxShift : 0;
    const cpu::Alignment got = cpu::align(scale, zero, most);
    const bool nan = std::find(scale, scale + 4, 255) != scale + 4;
    for (int b = 0; b < 4; ++b) {
      if (nan) {
        ASSERT_EQ(got.base[b], 255);
        continue;
      }
      ASSERT_LE(got.shift[b], most);
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

INSTANTIATE_TEST_SUITE_P(, Native, testing::ValuesIn(cpu::all_kernels()), name_of);

std::string name_of_product(const testing::TestParamInfo<std::tuple<const cpu::KernelTable*, Format>>& info) {
  const auto& [kernels, format] = info.param;
  return std::string(kernels->isa) + (format == Format::mxfp4 ? "_w4a4" : "_w4a8");
}
INSTANTIATE_TEST_SUITE_P(, NativeProduct,
                         testing::Combine(testing::ValuesIn(kernels_of_products()),
                                          testing::Values(Format::mxfp4, Format::mxint8)),
                         name_of_product);

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
