// SPDX-License-Identifier: Apache-2.0
// Tensors that have been checked, as the backends take them, kept alive beside.
#pragma once
#include <optional>
#include <utility>

#include "../backend.h"
#include "checks.h"

namespace xpu_fp4::ops {

/// A weight, and whose memory it is.
struct HeldWeight {
  Weight view;
  std::array<Tensor, 3> tensors;
};

/// Checked codes [n, k/2] and scales [n, k/32].
HeldWeight held_stored(const Tensor& codes, const Tensor& scale, int64_t n, int64_t k);

/// weight [N, K/2] with weight_scale [N, K/32], contiguous, as checkpoints store them.
HeldWeight hold_stored(const char* op, const Tensor& weight, const Tensor& weight_scale, int64_t k, const at::Device& device);

/// Holds a stored weight where nothing but the weight tells its K.
HeldWeight hold_alone(const char* op, const Tensor& weight, const Tensor& weight_scale);

/// A stored weight with what mxfp4_expand returned for it.
HeldWeight hold_expanded(const Backend& backend, const char* op, const Tensor& weight, const Tensor& weight_scale,
                         const Tensor& expanded, int64_t k, const at::Device& device);

/// Why the backend takes no weight [n, k] in that form; none where it does.
std::optional<std::string> refusal(const Backend& backend, WeightForm form, int64_t n, int64_t k);

/// A stored weight in another form, uint8; raises where the backend refuses it.
Tensor prepare(const Backend& backend, const char* op, const HeldWeight& weight, WeightForm form);

/// A float32 bias, kept alive, and its strides over the output's rows and columns.
struct HeldBias {
  Tensor tensor;
  Bias view{nullptr, 0, 0};
};

/// Broadcastable to the last two dimensions of y.
HeldBias hold_bias(const Argument& arg, at::IntArrayRef y_shape);

/// [N], of a linear op on x.
HeldBias hold_linear_bias(const char* op, const Tensor& x, const std::optional<Tensor>& bias, int64_t n);

}  // namespace xpu_fp4::ops
