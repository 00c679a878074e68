// SPDX-License-Identifier: Apache-2.0
// The end of a layer of experts: each token's weighted sum over its slots.
#pragma once
#include "lanes.h"

namespace xpu_fp4::cpu {
namespace {

// Elements [i, i + 32) of a token.
template <DType T>
[[gnu::always_inline]] inline void combine_block(const Combine& args, int64_t token, int64_t i) {
  constexpr int kVectors = kBlock / kFloatLanes;
  Lanes acc[kVectors] = {};
  for (int64_t slot = token * args.top_k; slot < (token + 1) * args.top_k; ++slot) {
    const int64_t row = args.rows[slot];
    if (row < 0) continue;
    const Lanes weight = all_lanes(args.weights == nullptr ? 1.0f : args.weights[slot]);
#pragma GCC unroll 8
    for (int part = 0; part < kVectors; ++part) {
      acc[part] = fma(weight, load_lanes<DType::f32>(args.v, row * args.n + i + part * kFloatLanes), acc[part]);
    }
  }
#pragma GCC unroll 8
  for (int part = 0; part < kVectors; ++part) store_lanes<T>(args.y, token * args.n + i + part * kFloatLanes, acc[part]);
}

void combine(const Combine& given, Range tokens) {
  const Combine args = given;  // a copy: what is stored cannot change it
  with_dtype(args.dtype, [&](auto dtype) {
    for (int64_t token = tokens.begin; token < tokens.end; ++token) {
      for (int64_t i = 0; i < args.n; i += kBlock) combine_block<dtype>(args, token, i);
    }
  });
}

}  // namespace
}  // namespace xpu_fp4::cpu
