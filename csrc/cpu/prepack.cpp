// SPDX-License-Identifier: Apache-2.0
#include "prepack.h"

#include <algorithm>
#include <cstring>

namespace xpu_fp4::cpu {
namespace {

int blocks_of(int64_t k, int64_t quad) { return static_cast<int>(std::min<int64_t>(kQuad, k / kBlock - quad * kQuad)); }

}  // namespace

void prepack_record(const Weight& w, int64_t n, int64_t k, int64_t strip, int64_t quad, uint8_t* record) {
  std::memset(record, 0, strips::kCodeBytes);
  std::memset(record + strips::kCodeBytes, e8m0::kBias, strips::kRecordBytes - strips::kCodeBytes);
  const int columns = static_cast<int>(std::min<int64_t>(strips::kColumns, n - strip * strips::kColumns));
  const int blocks = blocks_of(k, quad);
  for (int c = 0; c < columns; ++c) {
    const WeightRow row(w, k, strip * strips::kColumns + c, quad);
    for (int byte = 0; byte < blocks * kBlockBytes; ++byte) record[strips::code_offset(c, byte)] = row.packed(byte);
    for (int b = 0; b < kQuad; ++b) record[strips::scale_offset(c, b)] = row.scale(std::min(b, blocks - 1));
  }
}

void unpack_rows(const Weight& w, int64_t k, Range rows, uint8_t* codes, uint8_t* scale) {
  for (int64_t n = rows.begin; n < rows.end; ++n) {
    for (int64_t quad = 0; quad < strips::quads(k); ++quad) {
      const WeightRow row(w, k, n, quad);
      const int64_t block = n * (k / kBlock) + quad * kQuad;
      for (int byte = 0; byte < blocks_of(k, quad) * kBlockBytes; ++byte) codes[block * kBlockBytes + byte] = row.packed(byte);
      for (int b = 0; b < blocks_of(k, quad); ++b) scale[block + b] = row.scale(b);
    }
  }
}

}  // namespace xpu_fp4::cpu
