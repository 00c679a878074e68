// SPDX-License-Identifier: Apache-2.0
// Every op's schema, once.
#pragma once

namespace xpu_fp4::schema {

/// Our own ops, namespace xpu_fp4. `scale_mode` is "floor", "ceil", "even" or "rceil" (format/e8m0.h). Codes are
/// float4_e2m1fn_x2 and scales float8_e8m0fnu; as arguments both may be viewed as uint8, as checkpoints store them.
constexpr char kQuantize[] = "mxfp4_quantize(Tensor x, str scale_mode=\"even\") -> (Tensor q, Tensor scale)";
constexpr char kDequantize[] = "mxfp4_dequantize(Tensor q, Tensor scale, ScalarType dtype) -> Tensor";
constexpr char kGemm[] =
    "mxfp4_gemm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, ScalarType? out_dtype=None, Tensor? bias=None) -> Tensor";
constexpr char kLinear[] =
    "mxfp4_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, str scale_mode=\"even\") -> Tensor";
constexpr char kLinearW4A16[] = "mxfp4_linear_w4a16(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None) -> Tensor";

/// A weight in the SYCL kernels' own form (sycl/kernels/layout.hpp), beside the stored one: uint8 [groups, bytes], from expand.
constexpr char kExpand[] = "mxfp4_expand(Tensor weight, Tensor weight_scale) -> Tensor";
constexpr char kLinearExpanded[] =
    "mxfp4_linear_expanded(Tensor x, Tensor weight, Tensor weight_scale, Tensor expanded, Tensor? bias=None, "
    "str scale_mode=\"even\") -> Tensor";

/// A weight in the native kernels' own layout (format/strips.h): uint8 [strips, bytes], from prepack.
constexpr char kPrepack[] = "mxfp4_prepack(Tensor weight, Tensor weight_scale) -> Tensor";
constexpr char kUnprepack[] =
    "mxfp4_unprepack(Tensor prepacked, int out_features, int in_features) -> (Tensor weight, Tensor scale)";
constexpr char kGemmPrepacked[] =
    "mxfp4_gemm_prepacked(Tensor a, Tensor a_scale, Tensor b, int out_features, ScalarType? out_dtype=None, "
    "Tensor? bias=None) -> Tensor";
constexpr char kLinearPrepacked[] =
    "mxfp4_linear_prepacked(Tensor x, Tensor weight, int out_features, Tensor? bias=None, str scale_mode=\"even\") -> Tensor";
constexpr char kLinearW4A16Prepacked[] =
    "mxfp4_linear_w4a16_prepacked(Tensor x, Tensor weight, int out_features, Tensor? bias=None) -> Tensor";

/// The names that vLLM calls. compat.h says when they are defined.
constexpr char kFp4GemmNamespace[] = "_xpu_C";
constexpr char kFp4Gemm[] =
    "fp4_gemm(Tensor A, Tensor B, Tensor A_scale, Tensor B_scale, ScalarType? out_dtype, Tensor? bias_) -> Tensor";
constexpr char kGroupQuantNamespace[] = "_C";
constexpr char kGroupQuant[] =
    "per_token_group_quant_mxfp4(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps) -> ()";

}  // namespace xpu_fp4::schema
