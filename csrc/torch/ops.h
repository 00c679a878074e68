// SPDX-License-Identifier: Apache-2.0
// The ops over tensors, for any backend: check every argument, allocate, call. An argument that does not fit raises c10::Error
// (RuntimeError in Python), which names the op and the argument, and says what was given and what is expected, before any
// memory is touched. A function bears its op's name; table.h gives each its schema.
//
// x [..., K]: float32, float16 or bfloat16, any strides, K % 32 == 0. MXFP4 codes [..., K/2] are float4_e2m1fn_x2 and MXINT8
// codes [..., K] int8; scales [..., K/32] are float8_e8m0fnu. As arguments MXFP4 codes and scales may be viewed as uint8, as
// checkpoints store them. A weight is [N, K/2] with weight_scale [N, K/32], contiguous, and bias [N]. Before x is quantized,
// input_offset, float32 [K], is subtracted from its rows, and they are multiplied by block Hadamard matrices of size hadamard
// (format/hadamard.h): 32, 64, 128, or 0 for none. A weight's codes and scales stand for it times weight_global_scale; results
// are of the weight itself, and so of x where scale_mode has codes stand for 3 x (format/fp_quant.h).
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "../backend.h"

namespace xpu_fp4::ops {

using at::Tensor;

// ---- convert ----

/// x -> codes and scales. A block with a NaN or Inf gets a NaN scale and codes 0.
std::tuple<Tensor, Tensor> mxfp4_quantize(const Backend& backend, const Tensor& x, std::string_view scale_mode,
                                          int64_t hadamard, const std::optional<Tensor>& input_offset);
/// The same in MXINT8; each group of 32 or 128 elements of a row (the last may be shorter) has one scale, repeated per block.
std::tuple<Tensor, Tensor> mxint8_quantize(const Backend& backend, const Tensor& x, int64_t group, int64_t hadamard,
                                           const std::optional<Tensor>& input_offset);

/// Codes and scales -> values [..., K] of dtype, each rounded once.
Tensor mxfp4_dequantize(const Backend& backend, const Tensor& q, const Tensor& scale, at::ScalarType dtype);
Tensor mxint8_dequantize(const Backend& backend, const Tensor& q, const Tensor& scale, at::ScalarType dtype);

/// vllm-xpu-kernels' quantizer: input [..., K] contiguous -> output_q uint8 [..., K/2] contiguous and output_s float32
/// [..., K/32], contiguous or, with two dimensions, row-major or column-major with any stride between. group_size must be 32,
/// eps positive and finite. The outputs must not share memory with each other or the input.
void per_token_group_quant_mxfp4(const Backend& backend, const Tensor& input, const Tensor& output_q, const Tensor& output_s,
                                 int64_t group_size, double eps);

// ---- products of codes: a is MXFP4 (W4A4) or MXINT8 (W4A8) ----

/// Y [..., N] = a x b + bias. b: codes [K/2, N], the .t() view of a contiguous [N, K/2], with scales [K/32, N], contiguous;
/// bias: broadcastable to [M, N], the last two dimensions of Y, float32, float16 or bfloat16. out_dtype: float32, float16 (the
/// default) or bfloat16.
Tensor mxfp4_gemm(const Backend& backend, const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                  std::optional<at::ScalarType> out_dtype, const std::optional<Tensor>& bias);
/// vLLM's name of it.
Tensor fp4_gemm(const Backend& backend, const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                std::optional<at::ScalarType> out_dtype, const std::optional<Tensor>& bias);
/// With a prepacked weight of out_features rows; a's K tells its columns.
Tensor mxfp4_gemm_prepacked(const Backend& backend, const Tensor& a, const Tensor& a_scale, const Tensor& b,
                            int64_t out_features, std::optional<at::ScalarType> out_dtype, const std::optional<Tensor>& bias);

// ---- linear: Y [..., N] = x W^T + bias, of x's dtype, for three kinds of activations and three forms of a weight ----

/// W4A4: x is quantized to MXFP4 on the way.
Tensor mxfp4_linear(const Backend& backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                    const std::optional<Tensor>& bias, std::string_view scale_mode, int64_t hadamard,
                    const std::optional<Tensor>& input_offset, double weight_global_scale);
Tensor mxfp4_linear_prepacked(const Backend& backend, const Tensor& x, const Tensor& weight, int64_t out_features,
                              const std::optional<Tensor>& bias, std::string_view scale_mode, int64_t hadamard,
                              const std::optional<Tensor>& input_offset, double weight_global_scale);
Tensor mxfp4_linear_expanded(const Backend& backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                             const Tensor& expanded, const std::optional<Tensor>& bias, std::string_view scale_mode,
                             int64_t hadamard, const std::optional<Tensor>& input_offset, double weight_global_scale);

/// W4A8: x is quantized to MXINT8 on the way, in groups of 32 or 128.
Tensor mxfp4_linear_w4a8(const Backend& backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                         const std::optional<Tensor>& bias, int64_t group, int64_t hadamard,
                         const std::optional<Tensor>& input_offset, double weight_global_scale);
Tensor mxfp4_linear_w4a8_prepacked(const Backend& backend, const Tensor& x, const Tensor& weight, int64_t out_features,
                                   const std::optional<Tensor>& bias, int64_t group, int64_t hadamard,
                                   const std::optional<Tensor>& input_offset, double weight_global_scale);
Tensor mxfp4_linear_w4a8_expanded(const Backend& backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                                  const Tensor& expanded, const std::optional<Tensor>& bias, int64_t group, int64_t hadamard,
                                  const std::optional<Tensor>& input_offset, double weight_global_scale);

/// W4A16: x as it is or, transformed, rounded to its dtype.
Tensor mxfp4_linear_w4a16(const Backend& backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                          const std::optional<Tensor>& bias, int64_t hadamard, const std::optional<Tensor>& input_offset,
                          double weight_global_scale);
Tensor mxfp4_linear_w4a16_prepacked(const Backend& backend, const Tensor& x, const Tensor& weight, int64_t out_features,
                                    const std::optional<Tensor>& bias, int64_t hadamard,
                                    const std::optional<Tensor>& input_offset, double weight_global_scale);

// ---- experts: a whole layer of them, bit-defined in w4a4 and w4a8 ----

/// x [T, H], topk_ids int32 or int64 [T, top_k], topk_weights [T, top_k] -> [T, H]: the sum over a token's experts of
/// topk_weights * W2 act(W13 x) (product.h). w13 [E, 2I, H/2] with w13_scale [E, 2I, H/32] and w13_bias [E, 2I], w2 [E, H, I/2]
/// with w2_scale [E, H, I/32] and w2_bias [E, H], all contiguous. Rows of w13 are gate's, then up's or, interleaved, alternate.
/// activation is "silu_mul" or "swiglu_oai", which takes alpha and limit; mode is "w4a16", "w4a8" (with group) or "w4a4" (with
/// scale_mode), for both products, whose inputs hadamard transforms. expert_map, int32, gives each id its expert here, or -1; a
/// slot whose id has none adds nothing. router_on_input: the weights multiply x, not the sum.
Tensor mxfp4_experts(const Backend& backend, const Tensor& x, const Tensor& topk_ids, const Tensor& topk_weights,
                     const Tensor& w13, const Tensor& w13_scale, const Tensor& w2, const Tensor& w2_scale,
                     const std::optional<Tensor>& w13_bias, const std::optional<Tensor>& w2_bias, std::string_view activation,
                     bool interleaved, double alpha, double limit, std::string_view mode, std::string_view scale_mode,
                     int64_t group, int64_t hadamard, const std::optional<Tensor>& expert_map, bool router_on_input);
/// The same with what mxfp4_prepack makes of each expert's weights, stacked: w13 [E, ceil(2I/16), bytes] and w2
/// [E, ceil(H/16), bytes], where I is intermediate_size.
Tensor mxfp4_experts_prepacked(const Backend& backend, const Tensor& x, const Tensor& topk_ids, const Tensor& topk_weights,
                               const Tensor& w13, const Tensor& w2, int64_t intermediate_size,
                               const std::optional<Tensor>& w13_bias, const std::optional<Tensor>& w2_bias,
                               std::string_view activation, bool interleaved, double alpha, double limit, std::string_view mode,
                               std::string_view scale_mode, int64_t group, int64_t hadamard,
                               const std::optional<Tensor>& expert_map, bool router_on_input);

// ---- forms of a weight: opaque, uint8 ----

/// -> the layout of the native kernels (format/strips.h), [ceil(N/16), bytes], on the CPU.
Tensor mxfp4_prepack(const Backend& native, const Tensor& weight, const Tensor& weight_scale);
/// The way back: codes [N, K/2] and scales [N, K/32], both uint8.
std::tuple<Tensor, Tensor> mxfp4_unprepack(const Backend& native, const Tensor& prepacked, int64_t out_features,
                                           int64_t in_features);
/// -> the form in which the SYCL products of many rows read it, which they otherwise make anew in each call: about one byte an
/// element. Raises where the device's kernels have none.
Tensor mxfp4_expand(const Backend& backend, const Tensor& weight, const Tensor& weight_scale);

}  // namespace xpu_fp4::ops
