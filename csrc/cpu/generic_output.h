// SPDX-License-Identifier: Apache-2.0
// The end of a row of output, one element at a time: factor (1 changes no bit), bias, one rounding to the output dtype.
#pragma once
#include "with_dtype.h"

namespace xpu_fp4::cpu {
namespace {

template <DType T>
void finish_scalars(const Output& out, int64_t n, int64_t row, Range columns, const float* acc) {
  const Bias& bias = out.bias;
  for (int64_t column = columns.begin; column < columns.end; ++column) {
    float value = acc[column - columns.begin] * out.factor;
    if (bias.data != nullptr) value += bias.data[row * bias.row_stride + column * bias.column_stride];
    store<T>(out.y, row * n + column, value);
  }
}

void finish_row_scalars(const Product& product, int64_t row, int64_t column, int columns, const float* acc) {
  with_dtype(product.output.dtype, [&](auto dtype) {
    finish_scalars<dtype>(product.output, product.weight.n, row, {column, column + columns}, acc);
  });
}

}  // namespace
}  // namespace xpu_fp4::cpu
