// SPDX-License-Identifier: Apache-2.0
// The gated activations between the two products of an expert or an MLP: act(gate, up) in float32, every operation rounded
// once, no fma but those written. The exponential is a polynomial, and the reciprocal three Newton steps, so that every device
// gives the same bits: exp_neg is within 1.0 ulp and sigmoid within 2.6 of the exact values. Host and device.
#pragma once
#include "float_bits.h"

namespace xpu_fp4 {

/// Joins a row [2 k] of gate and up: g * sigmoid(g) * u; or gpt-oss' way, which clamps both to a limit first, then
/// g * sigmoid(alpha g) * (u + 1).
enum class GateKind : int { none, silu_mul, swiglu_oai };

/// Elements of gate and up are the halves of the row or, interleaved, alternate. alpha and limit are swiglu_oai's.
struct Gate {
  GateKind kind = GateKind::none;
  bool interleaved = false;
  float alpha = 1.0f, limit = 0.0f;

  constexpr bool is_none() const { return kind == GateKind::none; }
  /// Says where in a row of 2 k the gate of element i stands, and its up.
  constexpr int64_t gate_at(int64_t i) const { return interleaved ? 2 * i : i; }
  constexpr int64_t up_at(int64_t i, int64_t k) const { return interleaved ? 2 * i + 1 : k + i; }
};

namespace gate {

/// Above it, e^-a is taken for +0, so that no result is subnormal: 86.9.
constexpr float kLargest = float_of(0x42ADCCCDu);

/// e^-a for a >= 0.
constexpr float exp_neg(float a) {
  if (a > kLargest) return 0.0f;
  constexpr float kRound = 12582912.0f;                           // 1.5 * 2^23: adding it rounds to an integer, ties to even
  const float n = (a * float_of(0x3FB8AA3Bu) + kRound) - kRound;  // a / ln 2
  float q = __builtin_fmaf(n, float_of(0x3F318000u), -a);         // ln 2 in two parts
  q = __builtin_fmaf(n, float_of(0xB95E8083u), q);
  float p = float_of(0x3AB42996u);
  p = __builtin_fmaf(p, q, float_of(0x3C091DE6u));
  p = __builtin_fmaf(p, q, float_of(0x3D2AADCBu));
  p = __builtin_fmaf(p, q, float_of(0x3E2AAA47u));
  p = __builtin_fmaf(p, q, float_of(0x3EFFFFFCu));
  return (__builtin_fmaf(p, q * q, q) + 1.0f) * pow2(-static_cast<int>(n));
}

/// 1 / (1 + e^-z).
constexpr float sigmoid(float z) {
  if (is_nan(z)) return float_of(kNanBits);
  const float t = exp_neg(float_of(magnitude_bits(z))), d = 1.0f + t;
  float s = __builtin_fmaf(d, float_of(0xBEF0F0F1u), float_of(0x3FB4B4B5u));  // -8/17 and 24/17
  for (int i = 0; i < 3; ++i) s = __builtin_fmaf(s, __builtin_fmaf(-d, s, 1.0f), s);
  return (bits_of(z) & kSignBit) == 0 ? s : t * s;
}

/// NaN stays NaN.
constexpr float apply(const Gate& gate, float g, float u) {
  if (gate.kind == GateKind::silu_mul) return g * sigmoid(g) * u;
  g = g > gate.limit ? gate.limit : g;
  u = u > gate.limit ? gate.limit : u < -gate.limit ? -gate.limit : u;
  return g * sigmoid(gate.alpha * g) * (u + 1.0f);
}

}  // namespace gate
}  // namespace xpu_fp4
