// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "simd_includes.h"

namespace xpu_fp4::cpu {
namespace {

// Calls function with the DType as a compile-time constant.
template <class Function>
void with_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::f32: return function(std::integral_constant<DType, DType::f32>{});
    case DType::f16: return function(std::integral_constant<DType, DType::f16>{});
    case DType::bf16: return function(std::integral_constant<DType, DType::bf16>{});
  }
}

}  // namespace
}  // namespace xpu_fp4::cpu
