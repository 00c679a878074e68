// SPDX-License-Identifier: Apache-2.0
// The definition in double precision, independent of csrc/format's bit arithmetic, and random operands.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/backend.h"

namespace definition {

inline double magnitude(unsigned code) { return std::array{0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0}[code & 7u]; }
inline double value(unsigned code) { return (code & 8u) != 0 ? -magnitude(code) : magnitude(code); }

/// Nearest of the eight magnitudes by distance; a tie goes to the even code, or down.
inline unsigned encode(double y, bool ties_to_even) {
  y = std::fmin(std::fabs(y), 6.0);
  unsigned best = 0;
  for (unsigned code = 1; code < 8; ++code) {
    const double closer = std::fabs(y - magnitude(best)) - std::fabs(y - magnitude(code));
    if (closer > 0 || (closer == 0 && ties_to_even && code % 2 == 0)) best = code;
  }
  return best;
}

inline unsigned code_at(const std::vector<uint8_t>& packed, int64_t element) {
  return packed[static_cast<size_t>(element / 2)] >> (element % 2 * 4) & 15u;
}

/// Value of an element under the scale 1.
inline double element(xpu_fp4::Format format, const std::vector<uint8_t>& codes, int64_t i) {
  if (format == xpu_fp4::Format::mxfp4) return value(code_at(codes, i));
  return static_cast<int8_t>(codes[static_cast<size_t>(i)]) / 64.0;
}

/// The transform of a row of k elements, in place: an offset or null, and Hadamard matrices of a size, or 0.
inline void transform(float* x, int64_t k, int hadamard, const float* offset) {
  for (int64_t i = 0; i < k && offset != nullptr; ++i) x[i] -= offset[i];
  for (int64_t distance = 1; distance < hadamard; distance *= 2) {
    for (int64_t i = 0; i < k; ++i) {
      if (i / distance % 2 != 0) continue;
      const float u = x[i], v = x[i + distance];
      x[i] = u + v;
      x[i + distance] = u - v;
    }
  }
  for (int64_t i = 0; i < k && hadamard != 0; ++i) x[i] *= static_cast<float>(1 / std::sqrt(static_cast<double>(hadamard)));
}

/// A group of MXINT8: the scale byte and a code for each element.
inline uint8_t quantize_int8(const double* x, int64_t count, int8_t* codes) {
  std::fill_n(codes, count, int8_t{0});
  double amax = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(x[i])) return 255;
    amax = std::fmax(amax, std::fabs(x[i]));
  }
  if (amax == 0) return 0;
  int exponent = 0;
  const double fraction = 2 * std::frexp(amax, &exponent);
  const int e = std::clamp(exponent - 1 + (fraction >= 255.0 / 128.0 ? 1 : 0), -127, 127);
  for (int64_t i = 0; i < count; ++i) {
    codes[i] = static_cast<int8_t>(std::clamp(std::nearbyint(std::ldexp(x[i], 6 - e)), -127.0, 127.0));
  }
  return static_cast<uint8_t>(e + 127);
}

}  // namespace definition

/// Operands of a GEMM, and the output's size. `format` is A's.
struct Operands {
  xpu_fp4::Format format;
  int64_t m, n, k;
  std::vector<uint8_t> a, a_scale, w, w_scale;

  /// Codes are uniform, int8's -128 included; scale bytes are uniform in [low, high].
  Operands(int64_t rows, int64_t columns, int64_t depth, int low, int high, unsigned seed,
           xpu_fp4::Format of_a = xpu_fp4::Format::mxfp4)
      : format(of_a), m(rows), n(columns), k(depth) {
    std::mt19937 random(seed);
    const auto fill = [&](std::vector<uint8_t>& bytes, int64_t size, int from, int to) {
      std::uniform_int_distribution<int> pick(from, to);
      bytes.resize(static_cast<size_t>(size));
      for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(pick(random));
    };
    fill(a, xpu_fp4::code_bytes(format, m * k), 0, 255);
    fill(w, n * k / 2, 0, 255);
    fill(a_scale, m * k / 32, low, high);
    fill(w_scale, n * k / 32, low, high);
  }

  xpu_fp4::Weight weight() const { return {xpu_fp4::WeightForm::stored, n, k, w.data(), w_scale.data(), k / 32, 1}; }

  /// Y in float32 with any form of the weight.
  std::vector<float> gemm(const xpu_fp4::Backend& backend, const xpu_fp4::Weight& of) const {
    std::vector<float> y(static_cast<size_t>(m * n), -1.0f);
    backend.multiply({xpu_fp4::Activations::codes(format, a.data(), a_scale.data(), m, k),
                      of,
                      {y.data(), xpu_fp4::DType::f32, {nullptr, 0, 0}}});
    return y;
  }

  std::vector<float> gemm(const xpu_fp4::Backend& backend) const { return gemm(backend, weight()); }
};

inline void serial_for(int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) { body(0, n); }

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

inline std::vector<float> random_floats(int64_t size, unsigned seed, float spread) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> exponent(-spread, spread);
  std::vector<float> x(static_cast<size_t>(size));
  for (float& value : x) value = normal(random) * std::exp2(exponent(random));
  return x;
}
