// SPDX-License-Identifier: Apache-2.0
#include "checks.h"

#include <utility>

#include "../format/hadamard.h"

namespace xpu_fp4::ops {
namespace {

using at::IntArrayRef;
using at::ScalarType;

bool is_float(ScalarType type) { return type == at::kFloat || type == at::kHalf || type == at::kBFloat16; }

// The bytes from the first to the last element of a tensor that has any.
int64_t extent(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  return (last + 1) * static_cast<int64_t>(tensor.element_size());
}

std::pair<const uint8_t*, const uint8_t*> byte_range(const Tensor& tensor) {
  const auto* first = static_cast<const uint8_t*>(tensor.const_data_ptr());
  return {first, first + extent(tensor)};
}

}  // namespace

void check_memory(const Argument& arg) {
  const Tensor& tensor = arg.tensor;
  XPU_FP4_CHECK(arg, tensor.defined(), "is None, expected a tensor");
  XPU_FP4_CHECK(arg, !tensor.is_nested(), "is a nested tensor, expected a strided one");
  XPU_FP4_CHECK(arg, tensor.layout() == at::kStrided && tensor.has_storage(), "has the layout ", tensor.layout(),
                " and no storage, expected a strided tensor");
  if (tensor.numel() == 0) return;
  // The usual way to ask for the pointer raises without a name where a tensor has no data (functional, fake, zero).
  c10::StorageImpl& storage = *tensor.storage().unsafeGetStorageImpl();
  const auto held = static_cast<int64_t>(storage.nbytes());
  const int64_t end = tensor.storage_offset() * static_cast<int64_t>(tensor.element_size()) + extent(tensor);
  XPU_FP4_CHECK(arg, end <= held, "has shape ", tensor.sizes(), ", whose elements end at byte ", end,
                " of a storage that holds ", held, ": its memory was freed or shrunk");
  XPU_FP4_CHECK(arg, storage._mutable_data_ptr_no_checks().get() != nullptr, "has shape ", tensor.sizes(),
                " and a storage without memory (a functional, fake or zero tensor), expected one with data");
}

void check_device(const Argument& arg, const at::Device& device) {
  XPU_FP4_CHECK(arg, arg.tensor.device() == device, "is on ", arg.tensor.device(), ", expected ", device,
                " like the first argument");
}

void check_contiguous(const Argument& arg) {
  XPU_FP4_CHECK(arg, arg.tensor.is_contiguous(), "must be contiguous, got shape ", arg.tensor.sizes(), " with strides ",
                arg.tensor.strides());
}

void check_shape(const Argument& arg, IntArrayRef expected, const char* meaning) {
  XPU_FP4_CHECK(arg, arg.tensor.sizes() == expected, "has shape ", arg.tensor.sizes(), ", expected ", expected, " (", meaning,
                ")");
}

void check_bytes(const Argument& arg) {
  XPU_FP4_CHECK(arg, arg.tensor.scalar_type() == at::kByte, "must be uint8, got ", arg.tensor.scalar_type());
}

void check_scales(const Argument& arg) {
  const ScalarType type = arg.tensor.scalar_type();
  XPU_FP4_CHECK(arg, type == at::kFloat8_e8m0fnu || type == at::kByte, "must be float8_e8m0fnu or uint8, got ", type);
}

DType check_float(const Argument& arg) {
  XPU_FP4_CHECK(arg, is_float(arg.tensor.scalar_type()), "must be float32, float16 or bfloat16, got ",
                arg.tensor.scalar_type());
  return dtype_of(arg.tensor.scalar_type());
}

DType check_out_dtype(const char* op, const char* name, ScalarType type) {
  TORCH_CHECK(is_float(type), op, ": ", name, " must be float32, float16 or bfloat16, got ", type);
  return dtype_of(type);
}

void check_weight_codes(const Argument& arg) {
  const ScalarType type = arg.tensor.scalar_type();
  XPU_FP4_CHECK(arg, type == at::kFloat4_e2m1fn_x2 || type == at::kByte, "must be float4_e2m1fn_x2 or uint8, got ", type);
}

Format check_codes(const Argument& arg) {
  const ScalarType type = arg.tensor.scalar_type();
  if (type == at::kChar) return Format::mxint8;
  XPU_FP4_CHECK(arg, type == at::kFloat4_e2m1fn_x2 || type == at::kByte,
                "must be float4_e2m1fn_x2 or uint8 (MXFP4) or int8 (MXINT8), got ", type);
  return Format::mxfp4;
}

int64_t check_k(const Argument& arg, int64_t elements_per_entry) {
  XPU_FP4_CHECK(arg, arg.tensor.dim() >= 1, "must have at least 1 dimension(s), got shape ", arg.tensor.sizes());
  const int64_t k = arg.tensor.size(-1) * elements_per_entry;
  XPU_FP4_CHECK(arg, k % kBlock == 0, "has ", k, " elements in its last dimension, expected a multiple of ", kBlock);
  return k;
}

ScaleMode check_scale_mode(const char* op, std::string_view mode) {
  if (mode == "floor") return ScaleMode::floor;
  if (mode == "ceil") return ScaleMode::ceil;
  if (mode == "even") return ScaleMode::even;
  if (mode == "rceil") return ScaleMode::rceil;
  if (mode == "abs_max") return ScaleMode::abs_max;
  if (mode == "quest") return ScaleMode::quest;
  TORCH_CHECK(false, op, ": scale_mode is \"", std::string(mode),
              "\", expected \"floor\", \"ceil\", \"even\", \"rceil\", \"abs_max\" or \"quest\"");
}

float check_global_scale(const char* op, double scale) {
  // This range keeps its reciprocal, times that of the activations, a normal number.
  TORCH_CHECK(scale >= 0x1p-64 && scale <= 0x1p64, op, ": weight_global_scale is ", scale,
              ", expected a positive number from 2^-64 to 2^64");
  return static_cast<float>(scale);
}

int check_group(const char* op, int64_t group) {
  TORCH_CHECK(group == kBlock || group == kDefaultGroup, op, ": group is ", group, ", expected ", kBlock, " or ",
              kDefaultGroup);
  return static_cast<int>(group);
}

Tensor hold_offset(const Argument& offset, const Tensor& x, int64_t k, const char* meaning) {
  check_device(offset, x.device());
  XPU_FP4_CHECK(offset, offset.tensor.scalar_type() == at::kFloat, "must be float32, got ", offset.tensor.scalar_type());
  check_shape(offset, {k}, meaning);
  return offset.tensor.contiguous();
}

const float* offset_data(const Tensor& offset) {
  // There is nothing to subtract where K is 0.
  return offset.defined() && offset.numel() != 0 ? offset.const_data_ptr<float>() : nullptr;
}

HeldTransform check_transform(const Argument& x, int64_t hadamard, const std::optional<Tensor>& input_offset) {
  HeldTransform held;
  const int64_t k = x.tensor.size(-1);
  if (hadamard != 0) {
    TORCH_CHECK(hadamard::is_size(hadamard), x.op, ": hadamard is ", hadamard, ", expected 0 (none), 32, 64 or 128");
    XPU_FP4_CHECK(x, k % hadamard == 0, "has ", k, " elements in its last dimension, expected a multiple of hadamard, ",
                  hadamard);
    held.view.hadamard = static_cast<int>(hadamard);
  }
  if (input_offset) {
    held.offset = hold_offset({x.op, "input_offset", *input_offset}, x.tensor, k, "[K], of the K in the last dimension of x");
    held.view.offset = offset_data(held.offset);
  }
  return held;
}

void check_no_overlap(const Argument& written, const Argument& other) {
  if (written.tensor.numel() == 0 || other.tensor.numel() == 0) return;
  const auto [first, last] = byte_range(written.tensor);
  const auto [other_first, other_last] = byte_range(other.tensor);
  XPU_FP4_CHECK(written, last <= other_first || other_last <= first, "shares memory with ", other.name);
}

DType dtype_of(ScalarType type) { return type == at::kFloat ? DType::f32 : type == at::kHalf ? DType::f16 : DType::bf16; }

std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> shape = tensor.sizes().vec();
  shape.back() = last;
  return shape;
}

// Rows of a matrix whose leading dimensions count as one.
int64_t rows_of(const Tensor& tensor) {
  const IntArrayRef sizes = tensor.sizes();
  return c10::multiply_integers(sizes.begin(), sizes.end() - 1);
}

const uint8_t* bytes(const Tensor& tensor) { return static_cast<const uint8_t*>(tensor.const_data_ptr()); }

}  // namespace xpu_fp4::ops
