// SPDX-License-Identifier: Apache-2.0
// What computes: a set of kernels on one kind of device. Arguments are trusted here, but for what refusal() says; the torch
// binding has checked them.
#pragma once
#include <optional>
#include <stdexcept>
#include <string>

#include "product.h"

namespace xpu_fp4 {

/// The end of a sentence that begins with a weight.
constexpr char kNoExpandedForm[] =
    "cannot be expanded: only the SYCL kernels for GPUs with a matrix unit have an expanded form; this device's kernels read a "
    "weight as it is stored";

/// A weight's form other than the stored one, as bytes [rows, row_bytes] of the backend's own.
struct PreparedShape {
  int64_t rows, row_bytes;
};

/// Calls are thread-safe; they throw std::runtime_error when the device fails.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual void quantize(const Quantize& args) const = 0;
  virtual void dequantize(const Dequantize& args) const = 0;
  virtual void group_quantize(const GroupQuantize& args) const = 0;

  /// Why this backend cannot compute a product, as the end of a sentence that begins with its weight; none where it can. Looks
  /// at no data, only at forms, formats and sizes: of a product that is yet to come, what is known.
  virtual std::optional<std::string> refusal(const Product& product) const = 0;
  /// A product that is not refused. Floats that are to be quantized are so on the way.
  virtual void multiply(const Product& product) const = 0;

  /// A layer of experts, whose products would not be refused, by each of them alone.
  virtual void experts(const Experts& args) const = 0;

  /// The size of a weight [n, k] in a form that is not refused.
  virtual PreparedShape prepared_shape(WeightForm form, int64_t n, int64_t k) const = 0;
  /// Writes a stored weight in that form, from a multiple of 64 on.
  virtual void prepare(const Weight& weight, WeightForm form, uint8_t* out) const = 0;
  /// The way back, where strips are not refused: packed codes [n, k/2] and scale bytes [n, k/32].
  virtual void restore(const Weight& weight, uint8_t* codes, uint8_t* scale) const = 0;
};

}  // namespace xpu_fp4
