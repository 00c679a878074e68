// SPDX-License-Identifier: Apache-2.0
// The definition in double precision, independent of csrc/format's bit arithmetic, and random operands.
#pragma once
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

}  // namespace definition

/// Operands of a GEMM, and the output's size.
struct Operands {
  int64_t m, n, k;
  std::vector<uint8_t> a, a_scale, w, w_scale;

  /// Codes are uniform; scale bytes are uniform in [low, high].
  Operands(int64_t rows, int64_t columns, int64_t depth, int low, int high, unsigned seed) : m(rows), n(columns), k(depth) {
    std::mt19937 random(seed);
    const auto fill = [&](std::vector<uint8_t>& bytes, int64_t size, int from, int to) {
      std::uniform_int_distribution<int> pick(from, to);
      bytes.resize(static_cast<size_t>(size));
      for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(pick(random));
    };
    fill(a, m * k / 2, 0, 255);
    fill(w, n * k / 2, 0, 255);
    fill(a_scale, m * k / 32, low, high);
    fill(w_scale, n * k / 32, low, high);
  }

  xpu_fp4::Weight weight() const { return {xpu_fp4::WeightForm::stored, n, k, w.data(), w_scale.data(), k / 32, 1}; }

  /// Y in float32 with any form of the weight.
  std::vector<float> gemm(const xpu_fp4::Backend& backend, const xpu_fp4::Weight& of) const {
    std::vector<float> y(static_cast<size_t>(m * n), -1.0f);
    backend.multiply({xpu_fp4::Activations::codes(xpu_fp4::Format::mxfp4, a.data(), a_scale.data(), m, k),
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
