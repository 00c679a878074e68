// SPDX-License-Identifier: Apache-2.0
// What the ops of products share, whatever the form of the weight.
#pragma once
#include <optional>

#include "operands.h"

namespace xpu_fp4::ops {

constexpr Quantizer kAsTheyAre = {Format::none};

/// How an op of codes calls its arguments, for the messages.
struct GemmNames {
  const char *op, *a, *b, *a_scale, *b_scale, *bias;
};

/// Checks what ops of codes check first of a, and returns its K.
int64_t k_of_codes(const Argument& arg);

/// Checks the rest, and multiplies. K is that of the weight.
Tensor multiply_codes(const Backend& backend, const GemmNames& names, const Tensor& a, const Tensor& a_scale,
                      const HeldWeight& weight, std::optional<at::ScalarType> out_dtype, const std::optional<Tensor>& bias);

/// The arguments of ops that say what comes before the quantizer.
struct TransformArguments {
  int64_t hadamard;
  const std::optional<Tensor>& input_offset;
};

/// Checks what linear ops check first of x, and returns its K.
int64_t k_of_floats(const char* op, const Tensor& x);

/// Checks the rest, and multiplies.
Tensor linear(const Backend& backend, const char* op, const Tensor& x, Quantizer to, const TransformArguments& before,
              const HeldWeight& weight, const std::optional<Tensor>& bias, double weight_global_scale);

}  // namespace xpu_fp4::ops
