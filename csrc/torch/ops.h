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
/// x -> MXINT8; each group of 32 or 128 elements of a row (the last may be shorter) has one scale, repeated per block.
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
/// mxfp4_gemm with a prepacked weight of out_features rows; a's K tells its columns.
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
/// slot whose id has none adds nothing. router_on_input: the weights multiply x, not the sum. w13_offset [H] and w2_offset [I],
/// float32, are subtracted from the products' inputs before the Hadamard, for all experts the same.
Tensor mxfp4_experts(const Backend& backend, const Tensor& x, const Tensor& topk_ids, const Tensor& topk_weights,
                     const Tensor& w13, const Tensor& w13_scale, const Tensor& w2, const Tensor& w2_scale,
                     const std::optional<Tensor>& w13_bias, const std::optional<Tensor>& w2_bias, std::string_view activation,
                     bool interleaved, double alpha, double limit, std::string_view mode, std::string_view scale_mode,
                     int64_t group, int64_t hadamard, const std::optional<Tensor>& expert_map, bool router_on_input,
                     const std::optional<Tensor>& w13_offset, const std::optional<Tensor>& w2_offset);
/// mxfp4_experts with what mxfp4_prepack makes of each expert's weights, stacked: w13 [E, ceil(2I/16), bytes] and w2
/// [E, ceil(H/16), bytes], where I is intermediate_size.
Tensor mxfp4_experts_prepacked(const Backend& backend, const Tensor& x, const Tensor& topk_ids, const Tensor& topk_weights,
                               const Tensor& w13, const Tensor& w2, int64_t intermediate_size,
                               const std::optional<Tensor>& w13_bias, const std::optional<Tensor>& w2_bias,
                               std::string_view activation, bool interleaved, double alpha, double limit, std::string_view mode,
                               std::string_view scale_mode, int64_t group, int64_t hadamard,
                               const std::optional<Tensor>& expert_map, bool router_on_input,
                               const std::optional<Tensor>& w13_offset, const std::optional<Tensor>& w2_offset);

// ---- what vllm-xpu-kernels' class for experts calls, with its schemas: ops_vllm_experts.cpp ----

/// Rows of hidden_states [T, H], and of hidden_states_scales [T, S], one for each of topk_ids, int32 or int64 [T, top_k],
/// sorted by expert, those of one expert in the order of topk_ids. expert_map, int32 [total_experts_num], gives an id its
/// expert here or -1. Writes remapped_* [T * top_k, ...], of which the rows that no id needs stay as they are, int32
/// rows_per_expert [local_experts_num], and for each of topk_ids its row or, where the id has no expert here, -1.
void remap_hidden_states(const Backend& backend, const Tensor& hidden_states, const std::optional<Tensor>& hidden_states_scales,
                         const Tensor& remapped_hidden_states, const std::optional<Tensor>& remapped_hidden_states_scales,
                         const std::optional<Tensor>& expert_map, const Tensor& rows_per_expert,
                         const Tensor& unpermuted_row_to_permuted_row, const Tensor& topk_ids, int64_t total_experts_num,
                         int64_t local_experts_num);
/// Writes int32 expert_map [num_experts * ep_size]: rank ep_rank has num_experts of them in a row, the others are -1.
void init_expert_map(const Backend& backend, const Tensor& expert_map, int64_t num_experts, int64_t ep_rank, int64_t ep_size);
/// Multiplies each expert's rows_per_expert (int32, on the CPU) next rows of a by its weight, b [num_experts, N, K/2] with
/// b_scale [num_experts, N, K/32], plus its bias [num_experts, N], into d [rows, N]: W4A16 where a [rows, K] are floats, W4A4
/// or W4A8 where they are codes with a_scale [rows, K/32]. Rows that are no expert's stay as they are. Returns d.
Tensor cutlass_grouped_gemm_interface(const Backend& backend, const Tensor& a, const std::optional<Tensor>& a_scale,
                                      const Tensor& b, const std::optional<Tensor>& b_scale, const std::optional<Tensor>& bias,
                                      const Tensor& d, const Tensor& rows_per_expert, int64_t n, int64_t k,
                                      int64_t num_experts);
/// The gate of gpt-oss (format/gate.h) over alternating gate and up: input [..., 2 d] -> out [..., d].
void swigluoai_and_mul(const Backend& backend, const Tensor& out, const Tensor& input, double alpha, double limit);
/// output [T, H]: the sum over a token's slots of topk_weights [T, top_k], float32, times its row of moe_output [rows, H], an
/// fma each, by ascending slot from +0, rounded once. The row is unpermuted_row_to_permuted_row's, int32; -1 adds nothing.
void moe_gather(const Backend& backend, const Tensor& output, const Tensor& moe_output, const Tensor& topk_weights,
                const Tensor& unpermuted_row_to_permuted_row, int64_t num_experts);

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
