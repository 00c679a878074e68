// SPDX-License-Identifier: Apache-2.0
// Every op once: its schema and its function (ops.h), bound to a device. GetBackend is a stateless function object:
// GetBackend{}() gives something that points to the Backend for the current device and thread.
#pragma once
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/jit/frontend/function_schema_parser.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "checks.h"
#include "ops.h"

namespace xpu_fp4 {

struct OpRow {
  const char* schema;
  torch::CppFunction function;

  std::string name() const { return std::string(schema).substr(0, std::string_view(schema).find('(')); }
};

/// A function of ops.h as the dispatcher calls it: without the backend, on the device of its first argument, a tensor. All
/// tensors have memory when it is called.
template <class GetBackend, auto function>
struct Bound;
template <class GetBackend, class R, class... Args, R (*function)(const Backend&, const at::Tensor&, Args...)>
struct Bound<GetBackend, function> {
  c10::FunctionSchema schema;

  R operator()(const at::Tensor& first, Args... rest) const {
    size_t index = 0;
    check(index++, first);
    (check(index++, rest), ...);
    const c10::DeviceGuard guard(first.device());
    return function(*GetBackend{}(), first, rest...);
  }

 private:
  template <class T>
  void check(size_t index, const T& value) const {
    if constexpr (std::is_same_v<T, at::Tensor>) {
      ops::check_memory(
          {schema.name().c_str() + schema.name().rfind(':') + 1, schema.arguments()[index].name().c_str(), value});
    } else if constexpr (std::is_same_v<T, std::optional<at::Tensor>>) {
      if (value) check(index, *value);
    }
  }
};

template <class GetBackend, auto function>
OpRow op(const char* schema) {
  return {schema, torch::CppFunction(Bound<GetBackend, function>{torch::jit::parseSchema(schema)})};
}

/// Our own ops on any device, namespace xpu_fp4. `scale_mode` is "floor", "ceil", "even", "rceil" (format/e8m0.h), "abs_max" or
/// "quest" (format/fp_quant.h).
template <class GetBackend>
std::vector<OpRow> op_table() {
  using G = GetBackend;
  std::vector<OpRow> rows;
  rows.push_back(
      op<G, ops::mxfp4_quantize>("mxfp4_quantize(Tensor x, str scale_mode=\"even\", int hadamard=0, Tensor? input_offset=None) "
                                 "-> (Tensor q, Tensor scale)"));
  rows.push_back(op<G, ops::mxfp4_dequantize>("mxfp4_dequantize(Tensor q, Tensor scale, ScalarType dtype) -> Tensor"));
  rows.push_back(op<G, ops::mxint8_quantize>(
      "mxint8_quantize(Tensor x, int group=128, int hadamard=0, Tensor? input_offset=None) -> (Tensor q, Tensor scale)"));
  rows.push_back(op<G, ops::mxint8_dequantize>("mxint8_dequantize(Tensor q, Tensor scale, ScalarType dtype) -> Tensor"));
  rows.push_back(op<G, ops::mxfp4_gemm>(
      "mxfp4_gemm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, ScalarType? out_dtype=None, Tensor? bias=None) -> "
      "Tensor"));
  rows.push_back(op<G, ops::mxfp4_linear>(
      "mxfp4_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, str "
      "scale_mode=\"even\", int hadamard=0, Tensor? input_offset=None, float weight_global_scale=1.0) -> "
      "Tensor"));
  rows.push_back(op<G, ops::mxfp4_linear_w4a8>(
      "mxfp4_linear_w4a8(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, int group=128, "
      "int hadamard=0, Tensor? input_offset=None, float weight_global_scale=1.0) -> Tensor"));
  rows.push_back(op<G, ops::mxfp4_linear_w4a16>(
      "mxfp4_linear_w4a16(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, int hadamard=0, "
      "Tensor? input_offset=None, float weight_global_scale=1.0) -> Tensor"));
  rows.push_back(op<G, ops::mxfp4_expand>("mxfp4_expand(Tensor weight, Tensor weight_scale) -> Tensor"));
  rows.push_back(op<G, ops::mxfp4_linear_expanded>(
      "mxfp4_linear_expanded(Tensor x, Tensor weight, Tensor weight_scale, Tensor expanded, Tensor? "
      "bias=None, str scale_mode=\"even\", int hadamard=0, Tensor? input_offset=None, float "
      "weight_global_scale=1.0) -> Tensor"));
  rows.push_back(op<G, ops::mxfp4_linear_w4a8_expanded>(
      "mxfp4_linear_w4a8_expanded(Tensor x, Tensor weight, Tensor weight_scale, Tensor expanded, Tensor? "
      "bias=None, int group=128, int hadamard=0, Tensor? input_offset=None, float weight_global_scale=1.0) "
      "-> Tensor"));
  rows.push_back(op<G, ops::mxfp4_experts>(
      "mxfp4_experts(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor w13, Tensor w13_scale, Tensor w2, Tensor "
      "w2_scale, Tensor? w13_bias=None, Tensor? "
      "w2_bias=None, str activation=\"silu_mul\", bool interleaved=False, float alpha=1.702, float limit=7.0, str "
      "mode=\"w4a16\", str scale_mode=\"even\", int group=128, int hadamard=0, Tensor? expert_map=None, bool "
      "router_on_input=False, Tensor? w13_offset=None, Tensor? w2_offset=None) -> Tensor"));
  return rows;
}

/// Lists the ops of prepacked weights, whose layout is the native kernels': for CPU tensors. GetNative gives that backend.
template <class GetBackend, class GetNative>
std::vector<OpRow> prepacked_op_table() {
  using G = GetBackend;
  std::vector<OpRow> rows;
  rows.push_back(op<GetNative, ops::mxfp4_prepack>("mxfp4_prepack(Tensor weight, Tensor weight_scale) -> Tensor"));
  rows.push_back(op<GetNative, ops::mxfp4_unprepack>(
      "mxfp4_unprepack(Tensor prepacked, int out_features, int in_features) -> (Tensor weight, Tensor scale)"));
  rows.push_back(op<G, ops::mxfp4_gemm_prepacked>(
      "mxfp4_gemm_prepacked(Tensor a, Tensor a_scale, Tensor b, int out_features, ScalarType? out_dtype=None, "
      "Tensor? bias=None) -> Tensor"));
  rows.push_back(op<G, ops::mxfp4_linear_prepacked>(
      "mxfp4_linear_prepacked(Tensor x, Tensor weight, int out_features, Tensor? bias=None, str "
      "scale_mode=\"even\", int hadamard=0, Tensor? input_offset=None, float weight_global_scale=1.0) -> "
      "Tensor"));
  rows.push_back(op<G, ops::mxfp4_linear_w4a8_prepacked>(
      "mxfp4_linear_w4a8_prepacked(Tensor x, Tensor weight, int out_features, Tensor? bias=None, int "
      "group=128, int hadamard=0, Tensor? input_offset=None, float weight_global_scale=1.0) -> Tensor"));
  rows.push_back(op<G, ops::mxfp4_linear_w4a16_prepacked>(
      "mxfp4_linear_w4a16_prepacked(Tensor x, Tensor weight, int out_features, Tensor? bias=None, int "
      "hadamard=0, Tensor? input_offset=None, float weight_global_scale=1.0) -> Tensor"));
  rows.push_back(op<G, ops::mxfp4_experts_prepacked>(
      "mxfp4_experts_prepacked(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor w13, Tensor w2, int "
      "intermediate_size, Tensor? w13_bias=None, Tensor? "
      "w2_bias=None, str activation=\"silu_mul\", bool interleaved=False, float alpha=1.702, float limit=7.0, str "
      "mode=\"w4a16\", str scale_mode=\"even\", int group=128, int hadamard=0, Tensor? expert_map=None, bool "
      "router_on_input=False, Tensor? w13_offset=None, Tensor? w2_offset=None) -> Tensor"));
  return rows;
}

/// A row of one of the namespaces that vLLM's own ops live in.
struct CompatRow {
  const char* library_namespace;
  OpRow row;
  bool writes;  // to an argument, whether the schema says so or not

  std::string name() const { return std::string(library_namespace) + "::" + row.name(); }
};

/// The names that vLLM calls. compat.h says when they are defined.
template <class GetBackend>
std::vector<CompatRow> compat_table() {
  using G = GetBackend;
  std::vector<CompatRow> rows;
  rows.push_back({"_xpu_C",
                  op<G, ops::fp4_gemm>("fp4_gemm(Tensor A, Tensor B, Tensor A_scale, Tensor B_scale, ScalarType? out_dtype, "
                                       "Tensor? bias_) -> Tensor"),
                  false});
  rows.push_back({"_C",
                  op<G, ops::per_token_group_quant_mxfp4>("per_token_group_quant_mxfp4(Tensor input, Tensor! output_q, "
                                                          "Tensor! output_s, int group_size, float eps) -> ()"),
                  true});
  return rows;
}

/// Lists the ops of vllm-xpu-kernels' class for experts, which look at indices on the host: for CPU tensors.
template <class GetBackend>
std::vector<CompatRow> compat_experts_table() {
  using G = GetBackend;
  std::vector<CompatRow> rows;
  rows.push_back({"_xpu_C",
                  op<G, ops::cutlass_grouped_gemm_interface>(
                      "cutlass_grouped_gemm_interface(Tensor ptr_A, Tensor? ptr_A_scale, Tensor ptr_B, Tensor? ptr_B_scale, "
                      "Tensor? ptr_bias, Tensor ptr_D, Tensor rows_per_expert, int N, int K, int num_experts) -> Tensor"),
                  true});
  rows.push_back({"_moe_C",
                  op<G, ops::remap_hidden_states>(
                      "remap_hidden_states(Tensor hidden_states, Tensor? hidden_states_scales, Tensor remapped_hidden_states, "
                      "Tensor? remapped_hidden_states_scales, Tensor? expert_map, Tensor rows_per_expert, "
                      "Tensor unpermuted_row_to_permuted_row, Tensor topk_ids, int total_experts_num, int local_experts_num) "
                      "-> ()"),
                  true});
  rows.push_back({"_moe_C",
                  op<G, ops::moe_gather>("moe_gather(Tensor! output, Tensor moe_output, Tensor topk_weights, "
                                         "Tensor unpermuted_row_to_permuted_row, int num_experts) -> ()"),
                  true});
  rows.push_back(
      {"_moe_C",
       op<G, ops::init_expert_map>("init_expert_map(Tensor expert_map, int num_experts, int ep_rank, int ep_size) -> ()"),
       true});
  rows.push_back(
      {"_C",
       op<G, ops::swigluoai_and_mul>("swigluoai_and_mul(Tensor! out, Tensor input, float alpha=1.702, float limit=7.0) -> ()"),
       true});
  return rows;
}

/// Says that operands must have the strides that the caller gave them: ops read memory by them and refuse others. torch 2.8
/// knows the tag, but its Inductor does not always keep to it: in a graph with dynamic shapes a copy of [K/32, N] scales came
/// in another order, which mxfp4_gemm refuses (executed).
template <class Tag = at::Tag>
constexpr Tag stride_tag() {
  if constexpr (requires { Tag::needs_exact_strides; }) {
    return Tag::needs_exact_strides;
  } else {
    return Tag::needs_fixed_stride_order;
  }
}

/// Implements rows for a dispatch key.
inline void implement(torch::Library& library, std::vector<OpRow> rows) {
  for (OpRow& row : rows) library.impl(row.name().c_str(), std::move(row.function));
}

}  // namespace xpu_fp4
