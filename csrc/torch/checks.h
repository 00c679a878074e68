// SPDX-License-Identifier: Apache-2.0
// Checks of an op's arguments. Each raises c10::Error (RuntimeError in Python) that names the op and the argument, and says
// what was given and what is expected.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string_view>

#include "../format/block.h"
#include "../product.h"

namespace xpu_fp4::ops {

using at::Tensor;

/// An argument with its place, for the messages: "mxfp4_gemm: b_scale".
struct Argument {
  const char *op, *name;
  const Tensor& tensor;
};

#define XPU_FP4_CHECK(argument, condition, ...) TORCH_CHECK(condition, (argument).op, ": ", (argument).name, " ", __VA_ARGS__)

/// Whether there is memory behind the tensor: it is strided, and its elements lie inside a storage that is allocated. Every
/// tensor that any op is given passes through here first (table.h), so all else may take data pointers.
void check_memory(const Argument& arg);
void check_device(const Argument& arg, const at::Device& device);
void check_contiguous(const Argument& arg);
void check_shape(const Argument& arg, at::IntArrayRef expected, const char* meaning);
void check_bytes(const Argument& arg);
void check_scales(const Argument& arg);
/// float32, float16 or bfloat16.
DType check_float(const Argument& arg);
DType check_out_dtype(const char* op, const char* name, at::ScalarType type);
/// MXFP4 codes: float4_e2m1fn_x2 or uint8.
void check_weight_codes(const Argument& arg);
/// Takes those, or int8, which are MXINT8's.
Format check_codes(const Argument& arg);
/// K, a multiple of 32, of a tensor in whose last dimension an entry holds so many elements.
int64_t check_k(const Argument& arg, int64_t elements_per_entry);
ScaleMode check_scale_mode(const char* op, std::string_view mode);
/// Returns it as float32; it must be from 2^-64 to 2^64.
float check_global_scale(const char* op, double scale);
/// 32 or 128.
int check_group(const char* op, int64_t group);

/// Of an input offset float32 [k] on x's device: dense, and its data, null where there is none. `meaning` says what k is.
Tensor hold_offset(const Argument& offset, const Tensor& x, int64_t k, const char* meaning);
const float* offset_data(const Tensor& offset);

/// A transform, and whose memory its offset is.
struct HeldTransform {
  Transform view;
  Tensor offset;
};
/// hadamard is 0, 32, 64 or 128, and divides x's K. input_offset [K] is float32.
HeldTransform check_transform(const Argument& x, int64_t hadamard, const std::optional<Tensor>& input_offset);
void check_no_overlap(const Argument& written, const Argument& other);

// ---- shapes and data of checked tensors ----

DType dtype_of(at::ScalarType type);
/// The elements of an entry of codes.
constexpr int64_t elements_of_entry(Format format) { return format == Format::mxfp4 ? 2 : 1; }
std::vector<int64_t> with_last(const Tensor& tensor, int64_t last);
/// Rows of a matrix whose leading dimensions count as one.
int64_t rows_of(const Tensor& tensor);
const uint8_t* bytes(const Tensor& tensor);

}  // namespace xpu_fp4::ops
