// SPDX-License-Identifier: Apache-2.0
// What a backend computes, without torch: raw pointers and sizes in, results out. Arguments are trusted here; the torch
// binding has checked them. All matrices are row-major and dense unless strides (in elements) say otherwise.
#pragma once
#include <cstdint>
#include <optional>
#include <stdexcept>

#include "format/e8m0.h"
#include "format/float_bits.h"

namespace xpu_fp4 {

/// x [rows, k] -> packed codes q [rows, k/2] and scale bytes [rows, k/32]. k % 32 == 0.
struct QuantizeArgs {
  const void* x;
  DType x_dtype;
  int64_t rows, k;
  ScaleMode mode;
  uint8_t* q;
  uint8_t* scale;
};

/// The numbers of vllm-xpu-kernels (format/block.h, group_quant): scales are float32 and may be column-major.
struct GroupQuantArgs {
  const void* x;
  DType x_dtype;
  int64_t rows, k;
  uint8_t scale_floor;  // the least scale byte
  uint8_t* q;
  float* scale;
  int64_t scale_row_stride, scale_block_stride;
};

/// Packed codes q [rows, k/2] and scale bytes [rows, k/32] -> out [rows, k].
struct DequantizeArgs {
  const uint8_t* q;
  const uint8_t* scale;
  int64_t rows, k;
  void* out;
  DType out_dtype;
};

/// A weight W [n, k]: packed codes [n, k/2], and scale bytes with a stride per row of W and one per block of 32. Beside that,
/// where expanded is not null, what Backend::expand made of it. Or, where strips is not null, only that: W as prepack lays it
/// out (format/strips.h), for backends that say they take it.
struct Weight {
  const uint8_t* codes;
  const uint8_t* scale;
  int64_t scale_row_stride, scale_block_stride;
  const uint8_t* strips = nullptr;
  const uint8_t* expanded = nullptr;
};

/// The size of an expanded weight; its bytes are a backend's own.
struct ExpandedShape {
  int64_t groups, group_bytes;
};

/// A float32 bias over the output [m, n]; data is null where there is none.
struct Bias {
  const float* data;
  int64_t row_stride, column_stride;
};

/// Y [m, n] = A [m, k] x W [n, k]^T + bias; A as packed codes [m, k/2] and scale bytes [m, k/32].
struct GemmArgs {
  const uint8_t* a;
  const uint8_t* a_scale;
  Weight w;
  Bias bias;
  void* y;
  DType y_dtype;
  int64_t m, n, k;
};

/// Y [m, n] = quantize(X) [m, k] x W [n, k]^T + bias; Y has X's dtype.
struct LinearArgs {
  const void* x;
  DType dtype;
  ScaleMode mode;
  Weight w;
  Bias bias;
  void* y;
  int64_t m, n, k;
};

/// Y [m, n] = X [m, k] x W [n, k]^T + bias; Y has X's dtype.
struct GemmW4A16Args {
  const void* x;
  DType dtype;
  Weight w;
  Bias bias;
  void* y;
  int64_t m, n, k;
};

/// A set of kernels on one kind of device. Calls are thread-safe; they throw std::runtime_error when the device fails.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual void quantize(const QuantizeArgs& args) const = 0;
  virtual void group_quant(const GroupQuantArgs& args) const = 0;
  virtual void dequantize(const DequantizeArgs& args) const = 0;
  virtual void gemm(const GemmArgs& args) const = 0;
  virtual void gemm_w4a16(const GemmW4A16Args& args) const = 0;

  /// Whether weights may come as strips.
  virtual bool takes_strips() const { return false; }
  /// The form into which linear turns a weight [n, k] of its own accord in each call, for those who keep it; none where the
  /// kernels read a weight as it is stored.
  virtual std::optional<ExpandedShape> expanded_shape([[maybe_unused]] int64_t n, [[maybe_unused]] int64_t k) const {
    return std::nullopt;
  }
  /// Writes that form: as many bytes, from a multiple of 64 on.
  virtual void expand([[maybe_unused]] const Weight& w, [[maybe_unused]] int64_t n, [[maybe_unused]] int64_t k,
                      [[maybe_unused]] uint8_t* out) const {
    throw std::logic_error("xpu_fp4: this backend has no expanded weights");
  }
  /// Quantizes and multiplies in one go, without codes in memory; false where there is no such kernel: nothing was done then.
  virtual bool linear([[maybe_unused]] const LinearArgs& args) const { return false; }
};

}  // namespace xpu_fp4
