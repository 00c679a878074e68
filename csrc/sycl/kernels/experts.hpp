// SPDX-License-Identifier: Apache-2.0
// Device code: which expert a slot goes to, and what a layer of experts reads as elements of its products' inputs.
#pragma once
#include "format/gate.h"
#include "quantizer.hpp"

namespace xpu_fp4 {

struct Routing : RoutingArguments {
  /// Returns a slot's expert among those here, or -1.
  inline int32_t expert_of(int64_t slot) const {
    int32_t id = ids[slot];
    if (map != nullptr) id = id >= 0 && id < map_size ? map[id] : -1;
    return id >= 0 && id < experts ? id : -1;
  }
};

/// x [tokens, k]; with weights, times the slot's and rounded.
struct Tokens : TokensArguments {
  template <DType T>
  inline float element(int64_t slot, int64_t i, int64_t k) const {
    const float value = load_converted<T>(x, slot / top_k * k + i);
    return weights == nullptr ? value : rounded<T>(weights[slot] * value);
  }

  /// Returns `count` neighbouring elements of a row of k, from `first` on.
  template <DType T, int count>
  inline Values<count> elements(int64_t slot, int64_t first, int64_t k) const {
    const Values<count> in(static_cast<const uint8_t*>(x) + (slot / top_k * k + first) * size_of(T));
    if (weights == nullptr) return in;
    const float weight = weights[slot];
    float scaled[count];
#pragma unroll(kUnroll)
    for (int i = 0; i < count; ++i) scaled[i] = rounded<T>(weight * in.x[i]);
    return Values<count>(scaled);
  }
};

/// `count` elements of h, from `first` on, of u [rows, 2 k]: where gate and up alternate, twice as many neighbours of u, else
/// as many of each half.
template <DType T, int count>
inline Values<count> gated(const Gate& gate, const void* u, int64_t row, int64_t first, int64_t k) {
  const auto elements_of_u = [&](int64_t from) {
    return Values<count>(static_cast<const uint8_t*>(u) + (row * 2 * k + from) * size_of(T));
  };
  const Values<count> one = elements_of_u(gate.interleaved ? 2 * first : first);
  const Values<count> other = elements_of_u(gate.interleaved ? 2 * first + count : k + first);
  float h[count];
#pragma unroll(kUnroll)
  for (int i = 0; i < count; ++i) {
    const float* pair = i < count / 2 ? one.x + 2 * i : other.x + 2 * i - count;  // of those that alternate
    h[i] = rounded<T>(gate::apply(gate, gate.interleaved ? pair[0] : one.x[i], gate.interleaved ? pair[1] : other.x[i]));
  }
  return Values<count>(h);
}

}  // namespace xpu_fp4
