// SPDX-License-Identifier: Apache-2.0
// The prepacked layout of a weight, in which the native kernels read memory once and in order. A strip is sixteen rows of W;
// of a strip, each quad (K = 128) is a record of 1088 bytes:
//   codes   [16][16][4]   dword d of column c: bytes 4d .. 4d+3 of the 64 packed bytes that row c has in this quad
//   scales  [16][4]       of column c: the scale bytes of the quad's four blocks
// If K ends within a quad, its record has only the dwords of the blocks that exist, four each. Rows beyond N have codes 0 and
// scale 1; blocks beyond K have the scale of the row's last block, so that they never keep a quad from being aligned.
#pragma once
#include <cstdint>

#include "accumulate.h"

namespace xpu_fp4 {

namespace strips {

constexpr int kColumns = 16;
constexpr int kCodeBytes = kColumns * kQuadBytes;
constexpr int kRecordBytes = kCodeBytes + kColumns * kQuad;

constexpr int64_t count(int64_t n) { return (n + kColumns - 1) / kColumns; }
constexpr int64_t quads(int64_t k) { return (k + kQuadElements - 1) / kQuadElements; }

/// Blocks of a quad that exist.
constexpr int blocks_of(int64_t k, int64_t quad) {
  const int64_t left = k / kBlock - quad * kQuad;
  return static_cast<int>(left < kQuad ? left : kQuad);
}

/// Bytes of codes in a record of so many blocks.
constexpr int code_bytes(int blocks) { return kColumns * kBlockBytes * blocks; }

/// Bytes of a strip; the data is [strips][strip_bytes].
constexpr int64_t strip_bytes(int64_t k) {
  const int64_t whole = k / kQuadElements;
  const int rest = blocks_of(k, whole);
  return whole * kRecordBytes + (rest > 0 ? code_bytes(rest) + kRecordBytes - kCodeBytes : 0);
}

/// The record of a strip's quad.
constexpr int64_t record_offset(int64_t strip, int64_t quad, int64_t k) { return strip * strip_bytes(k) + quad * kRecordBytes; }

/// Inside a record: a byte of the 64 of one column, and the scale of one of its blocks; `blocks` have codes.
constexpr int code_offset(int column, int byte) { return (byte / 4 * kColumns + column) * 4 + byte % 4; }
constexpr int scale_offset(int column, int block, int blocks = kQuad) { return code_bytes(blocks) + column * kQuad + block; }

}  // namespace strips
}  // namespace xpu_fp4
