// SPDX-License-Identifier: Apache-2.0
// Compile-time unrolling: the index is a constant in each step.
#pragma once
#include "avx512_operands.h"

namespace xpu_fp4::cpu {
namespace {

// Calls function(0), function(1) ... with compile-time constants: an array that is only indexed so lives in registers.
template <class Function, int... kIndex>
[[gnu::always_inline]] inline void unroll(const Function& function, std::integer_sequence<int, kIndex...>) {
  (function(std::integral_constant<int, kIndex>{}), ...);
}
template <int kCount, class Function>
[[gnu::always_inline]] inline void unroll(const Function& function) {
  unroll(function, std::make_integer_sequence<int, kCount>());
}
template <int R, int C, class Function>
[[gnu::always_inline]] inline void for_tile(const Function& function) {
  unroll<R * C>([&](auto i) __attribute__((always_inline)) { function(i / C, i % C); });
}

}  // namespace
}  // namespace xpu_fp4::cpu
