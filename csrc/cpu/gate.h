// SPDX-License-Identifier: Apache-2.0
// The gated activations of format/gate.h in vectors: the same operations on each lane, so the same bits.
#pragma once
#include "lanes.h"

namespace xpu_fp4::cpu {
namespace {

[[gnu::always_inline]] inline Lanes constant(uint32_t bits) { return all_lanes(float_of(bits)); }

// gate::exp_neg. Of a NaN the result is any: it becomes NaN in what follows.
[[gnu::always_inline]] inline Lanes exp_neg(Lanes a) {
  constexpr float kRound = 12582912.0f;
  const Lanes shifted = a * float_of(0x3FB8AA3Bu) + kRound, n = shifted - kRound;
  Lanes q = fma(n, constant(0x3F318000u), -a);
  q = fma(n, constant(0xB95E8083u), q);
  Lanes p = constant(0x3AB42996u);
  for (const uint32_t c : {0x3C091DE6u, 0x3D2AADCBu, 0x3E2AAA47u, 0x3EFFFFFCu}) p = fma(p, q, constant(c));
  // The integer n stands in the last bits of `shifted`.
  const Lanes power = (Lanes)((bits_of(kRound) + 127u - (BitLanes)shifted) << 23);
  return a > gate::kLargest ? Lanes{} : (fma(p, q * q, q) + 1.0f) * power;
}

[[gnu::always_inline]] inline Lanes sigmoid(Lanes z) {
  const Lanes t = exp_neg((Lanes)((BitLanes)z & ~kSignBit)), d = t + 1.0f;
  Lanes s = fma(d, constant(0xBEF0F0F1u), constant(0x3FB4B4B5u));
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) s = fma(s, fma(-d, s, all_lanes(1.0f)), s);
  const Lanes of_sign = ((BitLanes)z & kSignBit) == 0 ? s : t * s;
  return z == z ? of_sign : z;
}

template <GateKind kind>
[[gnu::always_inline]] inline Lanes apply(const Gate& gate, Lanes g, Lanes u) {
  if constexpr (kind == GateKind::silu_mul) return g * sigmoid(g) * u;
  const Lanes most = all_lanes(gate.limit), least = -most;
  g = g > most ? most : g;
  u = u > most ? most : u < least ? least : u;
  return g * sigmoid(g * gate.alpha) * (u + 1.0f);
}

// Every second lane of two vectors that lie side by side, from lane kFirst on.
template <int kFirst, int... lane>
[[gnu::always_inline]] inline Lanes every_second(Lanes a, Lanes b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, (2 * lane + kFirst)...);
}

template <DType T, GateKind kind>
void gate_elements_as(const Gate& given, const void* x, int64_t row, int64_t k, int64_t column, int count, float* out) {
  constexpr auto kLane = std::make_integer_sequence<int, kFloatLanes>();
  const Gate gate = given;  // a copy: the floats that are stored cannot change it
  for (int i = 0; i < count; i += kFloatLanes) {
    Lanes g, u;
    if (gate.interleaved) {
      const int64_t first = row * 2 * k + 2 * (column + i);
      const Lanes a = load_lanes<T>(x, first), b = load_lanes<T>(x, first + kFloatLanes);
      g = every_second<0>(a, b, kLane);
      u = every_second<1>(a, b, kLane);
    } else {
      g = load_lanes<T>(x, row * 2 * k + column + i);
      u = load_lanes<T>(x, row * 2 * k + k + column + i);
    }
    const Lanes gated = rounded<T>(apply<kind>(gate, g, u));
    std::memcpy(out + i, &gated, sizeof(gated));
  }
}

// Elements [column, column + count) of what the gate makes of a row of x [rows, 2k], rounded to x's dtype.
void gate_elements(const Gate& gate, const void* x, DType dtype, int64_t row, int64_t k, int64_t column, int count,
                   float* out) {
  with_dtype(dtype, [&](auto type) {
    gate.kind == GateKind::silu_mul ? gate_elements_as<type, GateKind::silu_mul>(gate, x, row, k, column, count, out)
                                    : gate_elements_as<type, GateKind::swiglu_oai>(gate, x, row, k, column, count, out);
  });
}

}  // namespace
}  // namespace xpu_fp4::cpu
