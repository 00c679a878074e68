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

  /// Returns one block of a row of so many blocks.
  template <DType T>
  inline Values<kBlock> block(int64_t slot, int64_t block, int64_t blocks) const {
    const Values<kBlock> in(static_cast<const uint8_t*>(x) + (slot / top_k * blocks + block) * kBlock * size_of(T));
    if (weights == nullptr) return in;
    const float weight = weights[slot];
    float scaled[kBlock];
#pragma unroll(kUnroll)
    for (int i = 0; i < kBlock; ++i) scaled[i] = rounded<T>(weight * in.x[i]);
    return Values<kBlock>(scaled);
  }
};

/// Block `block` of h from u [rows, 2 * blocks]: where gate and up alternate, two neighbouring blocks of u, else one of each
/// half.
template <DType T>
inline Values<kBlock> gated_block(const Gate& gate, const void* u, int64_t row, int64_t block, int64_t blocks) {
  const auto block_of_u = [&](int64_t b) {
    return Values<kBlock>(static_cast<const uint8_t*>(u) + (row * 2 * blocks + b) * kBlock * size_of(T));
  };
  const Values<kBlock> first = block_of_u(gate.interleaved ? 2 * block : block);
  const Values<kBlock> second = block_of_u(gate.interleaved ? 2 * block + 1 : blocks + block);
  float h[kBlock];
#pragma unroll(kUnroll)
  for (int i = 0; i < kBlock; ++i) {
    const float* pair = i < kBlock / 2 ? first.x + 2 * i : second.x + 2 * i - kBlock;  // of those that alternate
    h[i] = rounded<T>(gate::apply(gate, gate.interleaved ? pair[0] : first.x[i], gate.interleaved ? pair[1] : second.x[i]));
  }
  return Values<kBlock>(h);
}

}  // namespace xpu_fp4
