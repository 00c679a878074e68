// SPDX-License-Identifier: Apache-2.0
// Arithmetic of sizes. Host and device.
#pragma once

namespace xpu_fp4 {

/// a / b, rounded up, of a >= 0 and b > 0.
template <class A, class B>
constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

/// The least multiple of b that is not below a.
template <class A, class B>
constexpr auto round_up(A a, B b) {
  return ceil_div(a, b) * b;
}

}  // namespace xpu_fp4
