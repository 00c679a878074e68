// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "definition.h"
#include "format/accumulate.h"
#include "format/block.h"
#include "format/mxint8.h"

using namespace xpu_fp4;

// The format is usable in constant expressions.
static_assert(e2m1::twice(0xF) == -12 && e2m1::value(0x9) == -0.5f);
static_assert(e2m1::encode_magnitude(2.5f) == 4 && e2m1::encode_magnitude<e2m1::Ties::toward_zero>(0.75f) == 1);
static_assert(e8m0::from_amax(bits_of(1.75f), ScaleMode::even) == 126 && e8m0::value(127) == 1.0f);
static_assert(block_product(4608.0f, row_factor(Format::mxfp4, 127), weight_factor(127)) == 1152.0f);
static_assert(block_product(-49152.0f, row_factor(Format::mxint8, 127), weight_factor(127)) == -384.0f);

TEST(FloatBits, EveryFloat16ConvertsExactlyAndBack) {
  for (unsigned h = 0; h < 0x10000; ++h) {
    const auto bits = static_cast<uint16_t>(h);
    const auto expected = static_cast<float>(__builtin_bit_cast(_Float16, bits));
    const float got = float_from_f16(bits);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(got)) << h;
      EXPECT_EQ(f16_from_float(got), 0x7E00) << h;
    } else {
      EXPECT_EQ(bits_of(got), bits_of(expected)) << h;
      EXPECT_EQ(f16_from_float(got), bits) << h;
    }
  }
}

TEST(FloatBits, NarrowingRoundsToNearestEvenAtEveryBoundary) {
  for (unsigned h = 0; h < 0x7C00; ++h) {  // halfway between neighbours, and one ulp around it
    const double low = float_from_f16(static_cast<uint16_t>(h));
    const double high = h == 0x7BFF ? 65536.0 : float_from_f16(static_cast<uint16_t>(h + 1));
    const auto middle = static_cast<float>((low + high) / 2);
    for (const float x : {std::nextafter(middle, 0.0f), middle, std::nextafter(middle, 1e9f)}) {
      for (const float signed_x : {x, -x}) {
        EXPECT_EQ(f16_from_float(signed_x), __builtin_bit_cast(uint16_t, static_cast<_Float16>(signed_x))) << signed_x;
      }
    }
  }
  for (unsigned b = 0; b < 0x7F80; ++b) {
    const uint32_t middle = b << 16 | 0x8000u;
    EXPECT_EQ(bf16_from_float(float_of(middle - 1)), b);
    EXPECT_EQ(bf16_from_float(float_of(middle)), b + (b & 1u));
    EXPECT_EQ(bf16_from_float(float_of(middle + 1)), b + 1);
  }
  EXPECT_EQ(bf16_from_float(std::numeric_limits<float>::quiet_NaN()), 0x7FC0);
}

TEST(FloatBits, PowersOfTwoIncludeSubnormals) {
  for (int e = -149; e <= 127; ++e) EXPECT_EQ(bits_of(pow2(e)), bits_of(std::ldexp(1.0f, e))) << e;
}

TEST(E2m1, CodesStandForTheirValues) {
  for (unsigned code = 0; code < 16; ++code) {
    EXPECT_EQ(e2m1::twice(code), 2 * definition::value(code));
    EXPECT_EQ(bits_of(e2m1::value(code)), bits_of(static_cast<float>(definition::value(code)) + (code == 8 ? -0.0f : 0.0f)));
  }
}

TEST(E2m1, EncodingPicksTheNearestValueAroundEveryBoundary) {
  for (int step = 0; step <= 8 * 64; ++step) {  // a grid that contains every value and every tie
    const float y = static_cast<float>(step) / 64;
    for (const float near : {std::nextafter(y, 0.0f), y, std::nextafter(y, 100.0f)}) {
      EXPECT_EQ(e2m1::encode_magnitude(near), definition::encode(near, true)) << near;
      EXPECT_EQ(e2m1::encode_magnitude<e2m1::Ties::toward_zero>(near), definition::encode(near, false)) << near;
    }
  }
  EXPECT_EQ(e2m1::encode_magnitude(std::numeric_limits<float>::max()), 7u);
  EXPECT_EQ(e2m1::encode_magnitude(std::numeric_limits<float>::denorm_min()), 0u);
}

TEST(E8m0, ScaleRulesHoldAroundEveryThreshold) {
  for (int exponent = -149; exponent <= 127; ++exponent) {
    for (const double f : {1.0, 1.25, 1.5, 1.75}) {
      const auto middle = static_cast<float>(std::ldexp(f, exponent));
      for (const float amax :
           {std::nextafter(middle, 0.0f), middle, std::nextafter(middle, std::numeric_limits<float>::infinity())}) {
        if (amax == 0.0f || std::isinf(amax)) continue;
        int half_exponent = 0;
        const double fraction = 2 * std::frexp(static_cast<double>(amax), &half_exponent);
        const std::array<bool, 4> doubled = {false, fraction > 1, fraction >= 1.75, fraction > 1.5};
        for (int mode = 0; mode < 4; ++mode) {
          const int e = half_exponent - 1 - 2 + doubled[static_cast<size_t>(mode)];
          EXPECT_EQ(e8m0::from_amax(magnitude_bits(amax), static_cast<ScaleMode>(mode)), std::max(e, -127) + 127)
              << amax << " mode " << mode;
        }
      }
    }
  }
  EXPECT_EQ(e8m0::from_amax(0, ScaleMode::ceil), 0);
  EXPECT_EQ(e8m0::from_amax(kInfBits, ScaleMode::floor), e8m0::kNan);
}

TEST(Mxint8, ScaleIsDoubledFrom255Over128OnAtEveryExponent) {
  for (int exponent = -149; exponent <= 127; ++exponent) {
    for (const double f : {1.0, 1.5, 254.0 / 128, 255.0 / 128}) {
      const auto middle = static_cast<float>(std::ldexp(f, exponent));
      for (const float amax :
           {std::nextafter(middle, 0.0f), middle, std::nextafter(middle, std::numeric_limits<float>::infinity())}) {
        const double x = amax;
        int8_t code = 0;
        EXPECT_EQ(mxint8::scale_byte(magnitude_bits(amax)), definition::quantize_int8(&x, 1, &code)) << amax;
      }
    }
  }
  EXPECT_EQ(mxint8::scale_byte(magnitude_bits(std::numeric_limits<float>::max())), 254);
  EXPECT_EQ(mxint8::scale_byte(magnitude_bits(std::numeric_limits<float>::quiet_NaN())), e8m0::kNan);
}

TEST(Mxint8, ElementsRoundToTheNearestCodeAroundEveryTieUnderEveryScale) {
  for (int byte = 0; byte < 255; ++byte) {
    const mxint8::Reciprocal reciprocal = mxint8::reciprocal(static_cast<uint8_t>(byte));
    for (int halves = -258; halves <= 258; ++halves) {
      const auto tie = static_cast<float>(std::ldexp(halves, byte - 127 - 7));
      for (const float x : {std::nextafter(tie, -INFINITY), tie, std::nextafter(tie, INFINITY)}) {
        if (std::isinf(x)) continue;
        const double expected = std::clamp(std::nearbyint(std::ldexp(static_cast<double>(x), 6 - (byte - 127))), -127.0, 127.0);
        ASSERT_EQ(mxint8::quantize_element(x, reciprocal), expected) << x << " " << byte;
      }
    }
  }
}

TEST(GroupQuant, EpsBoundsTheScaleFromBelow) {
  EXPECT_EQ(group_quant::floor_from_eps(1e-10), 127 - 33);
  EXPECT_EQ(group_quant::floor_from_eps(0.25), 125);
  EXPECT_EQ(group_quant::floor_from_eps(std::nextafter(0.25, 1.0)), 126);
  EXPECT_EQ(group_quant::floor_from_eps(std::numeric_limits<double>::denorm_min()), 0);
  EXPECT_EQ(group_quant::floor_from_eps(std::ldexp(1.1, -127)), 1);
  EXPECT_EQ(group_quant::floor_from_eps(1e300), 254);
  EXPECT_EQ(group_quant::floor_from_eps(std::ldexp(1.0, -126)), 1);
  EXPECT_EQ(group_quant::scale_byte(kInfBits, 3), e8m0::kNan);
}

void expect_products_of_all_scales_to_round_once(Format format, int d, int integer_exponent) {
  for (int a = 0; a < 255; ++a) {
    for (int w = 0; w < 255; ++w) {
      // Exact in double, then one conversion.
      const auto expected = static_cast<float>(std::ldexp(static_cast<double>(d), a + w - 254 + integer_exponent));
      const float got = block_product(static_cast<float>(d), row_factor(format, static_cast<uint8_t>(a)),
                                      weight_factor(static_cast<uint8_t>(w)));
      ASSERT_EQ(bits_of(got), bits_of(expected)) << d << " " << a << " " << w;
    }
  }
  EXPECT_TRUE(std::isnan(block_product(0.0f, row_factor(format, 255), weight_factor(127))));
  EXPECT_TRUE(std::isnan(block_product(0.0f, row_factor(format, 127), weight_factor(255))));
}

TEST(Accumulate, ProductOfEveryPairOfScalesRoundsOnce) {
  for (const int d : {0, 1, -1, 3, 5, 97, -1025, 3071, 4095, 4607, 4608, -4608}) {
    expect_products_of_all_scales_to_round_once(Format::mxfp4, d, -2);
  }
  for (const int d : {0, 1, -1, 3, 5, 97, -1025, 32767, 32769, 49151, 49152, -49152}) {
    expect_products_of_all_scales_to_round_once(Format::mxint8, d, -7);
  }
}
