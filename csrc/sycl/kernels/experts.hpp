// SPDX-License-Identifier: Apache-2.0
// Device code: which expert a slot goes to, and what a layer of experts reads as elements of its products' inputs.
#pragma once
#include "convert.hpp"
#include "format/gate.h"

namespace xpu_fp4 {

struct Routing : RoutingArguments {
  /// Of the experts here, or -1.
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
};

}  // namespace xpu_fp4
