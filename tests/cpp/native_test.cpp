// SPDX-License-Identifier: Apache-2.0
// The native kernels of every instruction set that this processor runs.
#include <gtest/gtest.h>

#include <thread>
#include <tuple>

#include "cpu/backend.h"
#include "cpu/experts.h"
#include "cpu/panels.h"
#include "layer.h"
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

// Each index on a thread of its own, the last first.
void in_reverse_on_threads(int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  std::vector<std::thread> threads;
  for (int64_t i = n; i-- > 0;) threads.emplace_back([&body, i] { body(i, i + 1); });
  for (std::thread& thread : threads) thread.join();
}

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

// Rows of a dtype, and what a transform makes of them.
struct Transformed {
  std::vector<uint8_t> x;
  std::vector<float> floats;

  Transformed(DType dtype, int64_t rows, int64_t k, const Transform& transform) : floats(random_floats(rows * k, 31, 12.0f)) {
    x.resize(floats.size() * static_cast<size_t>(size_of(dtype)));
    for (size_t i = 0; i < floats.size(); ++i) {
      const auto index = static_cast<int64_t>(i);
      store(dtype, x.data(), index, floats[i]);
      floats[i] = dtype == DType::f32   ? load<DType::f32>(x.data(), index)
                  : dtype == DType::f16 ? load<DType::f16>(x.data(), index)
                                        : load<DType::bf16>(x.data(), index);
    }
    for (int64_t row = 0; row < rows; ++row) {
      definition::transform(floats.data() + row * k, k, transform.hadamard, transform.offset);
    }
  }
};

// Calls function(dtype, K, transform) for each size, with an offset and without, in rows of whole and broken quads.
template <class Function>
void for_transforms(const Function& function) {
  const std::vector<float> offset = random_floats(2176, 32, 2.0f);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const auto& [size, k] : {std::pair<int, int64_t>{0, 96}, {32, 160}, {64, 192}, {128, 384}, {128, 2176}, {32, 1056}}) {
      function(dtype, k, Transform{size, offset.data()});
      if (size != 0) function(dtype, k, Transform{size});
    }
  }
}

TEST_P(Native, QuantizeTransformsFirst) {
  const auto portable = cpu::make_backend(cpu::kPortable, serial_for);
  const auto own = backend();
  for (const Quantizer& plain : {Quantizer::mxfp4(ScaleMode::even), Quantizer::mxint8(32), Quantizer::mxint8(128)}) {
    for_transforms([&](DType dtype, int64_t k, const Transform& transform) {
      const Transformed in(dtype, 7, k, transform);
      Quantizer to = plain;
      to.transform = transform;
      std::vector<uint8_t> q[2], scale[2];
      for (int i = 0; i < 2; ++i) {
        q[i].resize(static_cast<size_t>(7 * code_bytes(to.format, k)));
        scale[i].resize(static_cast<size_t>(7 * k / 32));
      }
      portable->quantize({in.floats.data(), DType::f32, plain, 7, k, q[0].data(), scale[0].data()});
      own->quantize({in.x.data(), dtype, to, 7, k, q[1].data(), scale[1].data()});
      ASSERT_EQ(q[0], q[1]) << k << " size " << transform.hadamard;
      ASSERT_EQ(scale[0], scale[1]) << k << " size " << transform.hadamard;
    });
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

TEST_P(Native, QuantizeGivesThePortableBits) {
  const auto portable = cpu::make_backend(cpu::kPortable, serial_for);
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

TEST_P(Native, QuantizeToInt8GivesThePortableBitsForEveryPattern) {
  const auto portable = cpu::make_backend(cpu::kPortable, serial_for);
  const auto own = backend();
  std::mt19937 random(14);
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    for (uint32_t exponent = 0; exponent < 0x7F80; exponent += exponent < 0x300 || exponent >= 0x7E80 ? 0x80 : 0x400) {
      for (const uint32_t mantissa : {0x00, 0x01, 0x3F, 0x7E, 0x7F}) {
        const std::vector<uint8_t> x =
            every_pattern(dtype, exponent + mantissa, std::array{0u, 1u, 0x8000u, 0xFFFFu}[random() % 4]);
        const int group = random() % 2 == 0 ? 32 : 128;
        const int64_t k = static_cast<int64_t>(x.size()) / size_of(dtype) - 32 * static_cast<int64_t>(random() % 4);
        std::vector<uint8_t> q[2], scale[2];
        for (int i = 0; i < 2; ++i) {
          q[i].assign(static_cast<size_t>(k + 64), 0xA5);  // and what lies behind must stay
          scale[i].assign(static_cast<size_t>(k / 32 + 64), 0xA5);
          (i == 0 ? portable : own)->quantize({x.data(), dtype, Quantizer::mxint8(group), 1, k, q[i].data(), scale[i].data()});
        }
        ASSERT_EQ(scale[0], scale[1]) << static_cast<int>(dtype) << " " << exponent + mantissa << " group " << group;
        ASSERT_EQ(q[0], q[1]) << static_cast<int>(dtype) << " " << exponent + mantissa << " group " << group;
      }
    }
  }
}

void store(DType dtype, std::vector<uint8_t>& x, size_t i, double value) {
  xpu_fp4::store(dtype, x.data(), static_cast<int64_t>(i), static_cast<float>(value));
}
double load(DType dtype, const std::vector<uint8_t>& x, size_t i) {
  const auto at = static_cast<int64_t>(i);
  return dtype == DType::f32   ? xpu_fp4::load<DType::f32>(x.data(), at)
         : dtype == DType::f16 ? xpu_fp4::load<DType::f16>(x.data(), at)
                               : xpu_fp4::load<DType::bf16>(x.data(), at);
}

// Rows of blocks of all kinds: their largest magnitudes lie about the threshold, at both ends of the exponents and between;
// elements are halfway between codes, or anything. Some blocks are zero, some not finite.
std::vector<uint8_t> blocks_of_all_kinds(DType dtype, int64_t blocks, std::mt19937& random) {
  std::vector<uint8_t> x(static_cast<size_t>(blocks * 32 * size_of(dtype)));
  const int least = dtype == DType::f16 ? -26 : -150, most = dtype == DType::f16 ? 16 : 128;
  const double largest[] = {1.0, 1.5, 254.0 / 128, 254.9375 / 128, 255.0 / 128, 255.5 / 128, 2.0};
  int exponent = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    // Neighbours have much the same size, so that a group's scale matters to all of its blocks.
    if (block % 4 == 0) exponent = least + static_cast<int>(random() % static_cast<unsigned>(most - least));
    const double amax = std::ldexp(largest[random() % 7], exponent - static_cast<int>(random() % 3));
    const bool zero = random() % 16 == 0;
    for (size_t i = 0; i < 32; ++i) {
      const int step = static_cast<int>(random() % 511) - 255;  // of half a code
      const double value = zero ? (i % 2 == 0 ? 0.0 : -0.0) : i == 7 ? amax : std::ldexp(step / 128.0, std::ilogb(amax));
      store(dtype, x, static_cast<size_t>(block) * 32 + i, random() % 2 == 0 ? value : -value);
    }
    if (random() % 32 == 0)
      store(dtype, x, static_cast<size_t>(block) * 32 + random() % 32, random() % 2 == 0 ? INFINITY : NAN);
  }
  return x;
}

TEST_P(Native, QuantizeToInt8FollowsTheDefinitionInGroupsOfARow) {
  std::mt19937 random(15);
  const auto threads = cpu::make_backend(*GetParam(), in_reverse_on_threads);
  const auto serial = backend();
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    for (const int group : {32, 128}) {
      for (const int64_t k : {32, 64, 96, 128, 160, 224, 416, 8192}) {
        const int64_t rows = 1 + static_cast<int64_t>(random() % 5);
        const std::vector<uint8_t> x = blocks_of_all_kinds(dtype, rows * k / 32, random);
        const auto elements = static_cast<size_t>(rows * k);
        std::vector<uint8_t> q(elements), scale(elements / 32), expected_scale = scale;
        std::vector<int8_t> expected(elements);
        std::vector<double> values(elements);
        for (size_t i = 0; i < elements; ++i) values[i] = load(dtype, x, i);
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t first = 0; first < k; first += group) {
            const int64_t count = std::min<int64_t>(group, k - first), at = row * k + first;
            const uint8_t byte = definition::quantize_int8(values.data() + at, count, expected.data() + at);
            std::fill_n(expected_scale.begin() + at / 32, count / 32, byte);
          }
        }
        // A task of all groups, and tasks of one.
        for (const Backend* of : {serial.get(), threads.get()}) {
          if (of == threads.get() && k == 8192) continue;
          of->quantize({x.data(), dtype, Quantizer::mxint8(group), rows, k, q.data(), scale.data()});
          ASSERT_EQ(scale, expected_scale) << static_cast<int>(dtype) << " group " << group << " k " << k;
          ASSERT_EQ(std::memcmp(q.data(), expected.data(), elements), 0)
              << static_cast<int>(dtype) << " group " << group << " k " << k;
        }
      }
    }
  }
}

TEST_P(Native, DequantizeOfInt8RoundsOnceForEveryScaleAndCode) {
  constexpr size_t kSize = 256 * 256;
  std::vector<uint8_t> q(kSize), scale(kSize / 32);
  for (size_t i = 0; i < kSize; ++i) q[i] = static_cast<uint8_t>(i);
  for (size_t i = 0; i < scale.size(); ++i) scale[i] = static_cast<uint8_t>(i / 8);
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    std::vector<uint8_t> out(kSize * static_cast<size_t>(size_of(dtype))), expected = out;
    backend()->dequantize({Format::mxint8, q.data(), scale.data(), 1, kSize, out.data(), dtype});
    for (size_t i = 0; i < kSize; ++i) {
      const int byte = scale[i / 32];
      const double value = std::ldexp(static_cast<int8_t>(q[i]), byte - 127 - 6);
      store(dtype, expected, i, byte == 255 ? NAN : value);
    }
    ASSERT_EQ(out, expected) << static_cast<int>(dtype);
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

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

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

// ---- gates, rows, factors, and layers of experts, which have all of them ----

constexpr Gate kGates[] = {{GateKind::silu_mul, false},
                           {GateKind::silu_mul, true},
                           {GateKind::swiglu_oai, false, 1.702f, 7.0f},
                           {GateKind::swiglu_oai, true, 1.702f, 7.0f}};

// Gates and ups about every edge: zeros, limits, where the exponential ends, subnormals, and all sizes.
std::vector<float> gate_operands(int64_t count, unsigned seed) {
  std::vector<float> x = random_floats(count, seed, 8.0f);
  const float edges[] = {0.0f,  -0.0f,  7.0f,   -7.0f,   7.0001f, -7.0001f, 86.9f, -86.9f, 86.90001f, -86.90001f,
                         51.0f, -51.1f, 1e-40f, -1e-40f, 1e30f,   -1e30f,   1.0f,  -1.0f,  0x1p-126f, -0x1p-149f};
  std::mt19937 random(seed);
  for (float& value : x) {
    if (random() % 4 == 0) value = edges[random() % std::size(edges)];
  }
  return x;
}

// W of ones on the diagonal: a product in floats gives its activations.
Operands identity(int64_t k) {
  Operands in(1, k, k, 127, 127, 1);
  std::fill(in.w.begin(), in.w.end(), uint8_t{0});
  for (int64_t i = 0; i < k; ++i) in.w[static_cast<size_t>((i * k + i) / 2)] = i % 2 == 0 ? 0x02 : 0x20;
  return in;
}

// What a product in floats has for activations [rows, k].
std::vector<float> activations_of(const Backend& backend, const Activations& a) {
  const Operands in = identity(a.k);
  std::vector<float> y(static_cast<size_t>(a.m * a.k));
  backend.multiply({a, in.weight(), {y.data(), DType::f32, {nullptr, 0, 0}}});
  return y;
}

bool same_numbers(float a, float b) { return a == b || (a != a && b != b); }  // zeros of either sign are added to one

TEST_P(Native, GatesHaveTheBitsOfTheirDefinition) {
  const auto own = backend();
  for (const Gate& gate : kGates) {
    for (const DType dtype : kDTypes) {
      for (const int64_t k : {32, 96, 128, 160}) {
        constexpr int64_t kRows = 41;
        const std::vector<uint8_t> x = elements_of(dtype, gate_operands(kRows * 2 * k, 17));
        Quantizer to = {Format::none};
        to.transform.gate = gate;
        const std::vector<float> y = activations_of(*own, Activations::floats(x.data(), dtype, to, kRows, k));
        for (int64_t row = 0; row < kRows; ++row) {
          const std::vector<float> expected = gated(gate, dtype, x.data() + row * 2 * k * size_of(dtype), k);
          if (!std::all_of(expected.begin(), expected.end(), [](float value) { return std::fabs(value) < 1e37f; })) continue;
          for (int64_t i = 0; i < k; ++i) {
            ASSERT_EQ(y[static_cast<size_t>(row * k + i)], expected[static_cast<size_t>(i)]) << row << " " << i;
          }
        }
      }
    }
  }
}

// A special value in each place of the gate's half and of the up's, with any value beside it.
TEST_P(Native, GatesKeepSpecialValuesInTheirPlace) {
  const auto own = backend();
  const float specials[] = {INFINITY, -INFINITY, NAN, -NAN};
  constexpr int64_t kK = 64;
  for (const Gate& gate : kGates) {
    for (const DType dtype : kDTypes) {
      std::vector<float> floats = random_floats(2 * kK * 2 * kK, 19, 3.0f);
      for (size_t row = 0; row < 2 * kK; ++row) floats[row * 2 * kK + row] = specials[row % 4];
      const std::vector<uint8_t> x = elements_of(dtype, floats);
      Quantizer to = {Format::none};
      to.transform.gate = gate;
      const std::vector<float> y = activations_of(*own, Activations::floats(x.data(), dtype, to, 2 * kK, kK));
      for (int64_t row = 0; row < 2 * kK; ++row) {
        const int64_t i = gate.interleaved ? row / 2 : row % kK;
        const float expected = gated(gate, dtype, x.data() + row * 2 * kK * size_of(dtype), kK)[static_cast<size_t>(i)];
        ASSERT_TRUE(same_numbers(y[static_cast<size_t>(row * kK + i)], expected)) << row;
      }
    }
  }
}

// Codes keep the sign of a zero, and a block what is not finite.
TEST_P(Native, QuantizeGatesFirst) {
  const auto own = backend();
  const std::vector<float> offset = random_floats(2176, 32, 2.0f);
  for (const Quantizer& plain : {Quantizer::mxfp4(ScaleMode::even), Quantizer::mxint8(128)}) {
    for (const Gate& gate : kGates) {
      for (const auto& [hadamard, k] : {std::pair<int, int64_t>{0, 96}, {0, 2176}, {32, 160}, {128, 384}}) {
        constexpr int64_t kRows = 5;
        const DType dtype = kDTypes[k / 32 % 3];
        const std::vector<uint8_t> x = elements_of(dtype, gate_operands(kRows * 2 * k, 23));
        std::vector<float> h;
        for (int64_t row = 0; row < kRows; ++row) {
          const std::vector<float> of_row = gated(gate, dtype, x.data() + row * 2 * k * size_of(dtype), k);
          h.insert(h.end(), of_row.begin(), of_row.end());
        }
        std::vector<uint8_t> q[2], scale[2];
        for (int i = 0; i < 2; ++i) {
          Quantizer to = plain;
          to.transform = {hadamard, hadamard == 0 ? nullptr : offset.data(), i == 0 ? Gate{} : gate};
          q[i].resize(static_cast<size_t>(kRows * code_bytes(to.format, k)));
          scale[i].resize(static_cast<size_t>(kRows * k / 32));
          own->quantize({i == 0 ? static_cast<const void*>(h.data()) : x.data(), i == 0 ? DType::f32 : dtype, to, kRows, k,
                         q[i].data(), scale[i].data()});
        }
        ASSERT_EQ(q[0], q[1]) << k;
        ASSERT_EQ(scale[0], scale[1]) << k;
      }
    }
  }
}

TEST_P(Native, RowsAreGatheredAndScaled) {
  const auto own = backend();
  std::mt19937 random(29);
  for (const Quantizer& plain : {Quantizer::mxfp4(ScaleMode::even), Quantizer::mxint8(128), Quantizer{Format::none}}) {
    for (const DType dtype : kDTypes) {
      for (const int hadamard : {0, 32}) {
        constexpr int64_t kRows = 7, kM = 19, kK = 288;
        const Operands in(kM, 33, kK, 118, 126, 31);
        const std::vector<uint8_t> x = elements_of(dtype, random_floats(kRows * kK, 37, 6.0f));
        const std::vector<float> factors = random_floats(kM, 41, 2.0f);
        std::vector<int32_t> rows(kM);
        std::vector<float> taken, scaled;
        for (int64_t i = 0; i < kM; ++i) {
          rows[static_cast<size_t>(i)] = static_cast<int32_t>(random() % kRows);
          for (int64_t j = 0; j < kK; ++j) {
            taken.push_back(element_at(dtype, x.data(), rows[static_cast<size_t>(i)] * kK + j));
            scaled.push_back(factors[static_cast<size_t>(i)] * taken.back());
          }
        }
        Quantizer to = plain;
        to.transform.hadamard = hadamard;
        for (const bool with_factors : {false, true}) {
          const std::vector<uint8_t> dense = elements_of(dtype, with_factors ? scaled : taken);
          Activations gathered = Activations::floats(x.data(), dtype, to, kM, kK);
          gathered.rows = rows.data();
          gathered.factors = with_factors ? factors.data() : nullptr;
          std::vector<float> y(static_cast<size_t>(kM * in.n)), expected = y;
          own->multiply({gathered, in.weight(), {y.data(), DType::f32, {nullptr, 0, 0}}});
          own->multiply({Activations::floats(dense.data(), dtype, to, kM, kK),
                         in.weight(),
                         {expected.data(), DType::f32, {nullptr, 0, 0}}});
          ASSERT_TRUE(same_bits(y, expected)) << hadamard << with_factors;
        }
      }
    }
  }
}

const Quantizer kModes[] = {Quantizer::mxfp4(ScaleMode::even), Quantizer::mxint8(128), {Format::none}};

TEST_P(Native, ALayerOfExpertsIsItsSingleProducts) {
  const auto own = backend();
  const auto threads = cpu::make_backend(*GetParam(), in_reverse_on_threads);
  struct Shape {
    int64_t experts, tokens, top_k, hidden, inner;
  };
  unsigned seed = 43;
  for (const Shape& s : {Shape{1, 1, 1, 32, 32}, {5, 1, 4, 288, 96}, {6, 67, 3, 160, 96}, {3, 9, 2, 128, 416}}) {
    for (const Quantizer& to : kModes) {
      for (const bool router_on_input : {false, true}) {
        const Gate& gate = kGates[++seed % 4];
        const LayerOperands in(s.experts, s.tokens, s.top_k, s.hidden, s.inner, kDTypes[seed % 3], seed);
        const std::vector<uint8_t> expected = compose(*own, in, to, gate, router_on_input);
        for (const Backend* of : {own.get(), threads.get()}) {
          std::vector<uint8_t> y(in.y_bytes());
          of->experts(in.arguments(to, gate, router_on_input, y.data()));
          ASSERT_EQ(y, expected) << s.tokens << " x " << s.hidden << " x " << s.inner << " seed " << seed;
        }
      }
    }
  }
}

// More slots than are held at a time, so that a layer is several chunks of whole tokens.
TEST_P(Native, ChunksOfALayerDoNotShow) {
  const auto own = backend();
  const LayerOperands in(3, 5, cpu::kMostSlots / 2 - 1, 32, 32, DType::f16, 47);
  const LayerOperands one_token(3, 1, cpu::kMostSlots + 1, 32, 32, DType::f32, 48);
  for (const LayerOperands* of : {&in, &one_token}) {
    std::vector<uint8_t> y(of->y_bytes());
    own->experts(of->arguments(kModes[1], kGates[1], false, y.data()));
    EXPECT_EQ(y, compose(*own, *of, kModes[1], kGates[1], false));
  }
}

TEST_P(Native, ManyThreadsMayCallALayerAtOnce) {
  const auto own = backend();
  constexpr size_t kThreads = 8;
  std::vector<LayerOperands> in;
  for (unsigned i = 0; i < kThreads; ++i) in.emplace_back(4, 5 + i, 2, 160, 96, kDTypes[i % 3], 53 + i);
  std::vector<std::vector<uint8_t>> y(kThreads);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kThreads; ++i) {
    y[i].resize(in[i].y_bytes());
    threads.emplace_back([&, i] { own->experts(in[i].arguments(kModes[i % 3], kGates[i % 4], false, y[i].data())); });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < kThreads; ++i) ASSERT_EQ(y[i], compose(*own, in[i], kModes[i % 3], kGates[i % 4], false)) << i;
}

#if defined(__x86_64__)
TEST_P(Native, ALayerIgnoresTheCallersFloatEnvironment) {
  const auto own = backend();
  const LayerOperands in(3, 7, 2, 96, 64, DType::bf16, 59);
  const std::vector<uint8_t> expected = compose(*own, in, kModes[2], kGates[0], true);
  std::vector<uint8_t> y(in.y_bytes());
  const unsigned saved = _mm_getcsr();
  _mm_setcsr(saved | 0x8040u | 0x4000u);  // flush to zero, denormals are zero, round up
  own->experts(in.arguments(kModes[2], kGates[0], true, y.data()));
  _mm_setcsr(saved);
  EXPECT_EQ(y, expected);
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

std::string name_of(const testing::TestParamInfo<const cpu::KernelTable*>& info) { return info.param->isa; }
INSTANTIATE_TEST_SUITE_P(, Native, testing::ValuesIn(cpu::all_kernels()), name_of);

std::string name_of_product(const testing::TestParamInfo<std::tuple<const cpu::KernelTable*, Format>>& info) {
  const auto& [kernels, format] = info.param;
  return std::string(kernels->isa) + (format == Format::mxfp4 ? "_w4a4" : "_w4a8");
}
INSTANTIATE_TEST_SUITE_P(, NativeProduct,
                         testing::Combine(testing::ValuesIn(cpu::all_kernels()),
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
