// SPDX-License-Identifier: Apache-2.0
#include "prepack.h"

#include <algorithm>
#include <cstring>

namespace xpu_fp4::cpu {

using strips::blocks_of;

namespace {

// Rows of a strip that exist.
int columns_of(const Weight& w, int64_t strip) {
  return static_cast<int>(std::min<int64_t>(strips::kColumns, w.n - strip * strips::kColumns));
}

}  // namespace

void prepack_record(const Weight& w, int64_t strip, int64_t quad, int blocks, uint8_t* record) {
  std::memset(record, 0, static_cast<size_t>(strips::code_bytes(blocks)));
  for (int c = 0; c < columns_of(w, strip); ++c) {
    const WeightRow row(w, strip * strips::kColumns + c, quad);
    for (int byte = 0; byte < blocks_of(w.k, quad) * kBlockBytes; ++byte)
      record[strips::code_offset(c, byte)] = row.packed(byte);
  }
  prepack_scales(w, strip, quad, blocks, record);
}

void prepack_scales(const Weight& w, int64_t strip, int64_t quad, int blocks, uint8_t* record) {
  std::memset(record + strips::code_bytes(blocks), e8m0::kBias, strips::kRecordBytes - strips::kCodeBytes);
  const int present = blocks_of(w.k, quad);
  for (int c = 0; c < columns_of(w, strip); ++c) {
    const WeightRow row(w, strip * strips::kColumns + c, quad);
    for (int b = 0; b < kQuad; ++b) record[strips::scale_offset(c, b, blocks)] = row.scale(std::min(b, present - 1));
  }
}

void complete_record(const uint8_t* record, int blocks, uint8_t* out) {
  const auto codes = static_cast<size_t>(strips::code_bytes(blocks));
  std::memcpy(out, record, codes);
  std::memset(out + codes, 0, strips::kCodeBytes - codes);
  std::memcpy(out + strips::kCodeBytes, record + codes, strips::kRecordBytes - strips::kCodeBytes);
}

void unpack_rows(const Weight& w, Range rows, uint8_t* codes, uint8_t* scale) {
  for (int64_t n = rows.begin; n < rows.end; ++n) {
    for (int64_t quad = 0; quad < strips::quads(w.k); ++quad) {
      const WeightRow row(w, n, quad);
      const int64_t block = n * (w.k / kBlock) + quad * kQuad;
      for (int byte = 0; byte < blocks_of(w.k, quad) * kBlockBytes; ++byte)
        codes[block * kBlockBytes + byte] = row.packed(byte);
      for (int b = 0; b < blocks_of(w.k, quad); ++b) scale[block + b] = row.scale(b);
    }
  }
}

}  // namespace xpu_fp4::cpu
