// SPDX-License-Identifier: Apache-2.0
// Quantizers and their way back, of every instruction set that this processor runs.
#include "native.h"

using namespace xpu_fp4;

namespace {

class NativeQuantizer : public NativeKernels {};

TEST_P(NativeQuantizer, QuantizeTransformsFirst) {
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

TEST_P(NativeQuantizer, QuantizeGivesThePortableBits) {
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

TEST_P(NativeQuantizer, QuantizeGivesThePortableBitsForEveryPattern) {
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

TEST_P(NativeQuantizer, QuantizeToInt8GivesThePortableBitsForEveryPattern) {
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

TEST_P(NativeQuantizer, QuantizeToInt8FollowsTheDefinitionInGroupsOfARow) {
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

TEST_P(NativeQuantizer, DequantizeOfInt8RoundsOnceForEveryScaleAndCode) {
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

TEST_P(NativeQuantizer, DequantizeGivesThePortableBitsForEveryScaleAndCode) {
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

INSTANTIATE_TEST_SUITE_P(, NativeQuantizer, testing::ValuesIn(cpu::all_kernels()), name_of);

}  // namespace
