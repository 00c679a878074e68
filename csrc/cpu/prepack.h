// SPDX-License-Identifier: Apache-2.0
// Reading W in either layout, and turning one into the other (format/strips.h). Bytes are only moved.
#pragma once
#include <cstdint>

#include "../backend.h"
#include "../format/strips.h"
#include "kernels.h"

namespace xpu_fp4::cpu {

/// A quad of one row of W in either layout.
class WeightRow {
 public:
  WeightRow(const Weight& w, int64_t row, int64_t quad) {
    if (w.strips() != nullptr) {
      codes_ = w.strips() + strips::record_offset(row / strips::kColumns, quad, w.k);
      column_ = static_cast<int>(row % strips::kColumns);
      scales_ = codes_ + strips::scale_offset(column_, 0, strips::blocks_of(w.k, quad));
    } else {
      codes_ = w.codes + row * (w.k / 2) + quad * kQuadBytes;
      scales_ = w.scale + row * w.scale_row_stride + quad * kQuad * w.scale_block_stride;
      scale_stride_ = w.scale_block_stride;
    }
  }
  uint8_t packed(int byte) const { return column_ < 0 ? codes_[byte] : codes_[strips::code_offset(column_, byte)]; }
  uint8_t scale(int b) const { return scales_[b * scale_stride_]; }

 private:
  const uint8_t *codes_, *scales_;
  int column_ = -1;  // within its strip; -1: W is not in strips
  int64_t scale_stride_ = 1;
};

/// Lays out the quad of a strip of W, not in strips, as a record with the codes of so many blocks: those that exist, or
/// kQuad.
void prepack_record(const Weight& w, int64_t strip, int64_t quad, int blocks, uint8_t* record);

/// The scales of that record alone.
void prepack_scales(const Weight& w, int64_t strip, int64_t quad, int blocks, uint8_t* record);

/// A whole record from one of fewer blocks; the other codes are zero.
void complete_record(const uint8_t* record, int blocks, uint8_t* out);

/// Rows [begin, end) of W [n, k], in strips, as codes [n, k/2] and scale bytes [n, k/32].
void unpack_rows(const Weight& w, Range rows, uint8_t* codes, uint8_t* scale);

}  // namespace xpu_fp4::cpu
