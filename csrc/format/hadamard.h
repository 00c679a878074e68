// SPDX-License-Identifier: Apache-2.0
// The block Hadamard transform of a row: x -> x H, where H is a block diagonal of orthonormal Sylvester matrices of one size.
// In float32: for the distances 1, 2, 4 ... size / 2 in turn, every pair (u, v) of elements so far apart becomes (u + v, u -
// v), each rounded once; then every element is multiplied by 1 / sqrt(size). H is its own inverse. Host and device.
#pragma once
#include "float_bits.h"

namespace xpu_fp4::hadamard {

constexpr int kLeastSize = 32, kLargestSize = 128;

constexpr bool is_size(int64_t size) { return size == 32 || size == 64 || size == 128; }

/// The float32 nearest to 1 / sqrt(size).
constexpr float factor(int size) { return size == 64 ? 0.125f : float_of(size == 32 ? 0x3E3504F3u : 0x3DB504F3u); }

}  // namespace xpu_fp4::hadamard
