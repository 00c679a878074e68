// SPDX-License-Identifier: Apache-2.0
// Device code: codes of MXFP4 to the integers of the expanded form.
#pragma once
#include <cstdint>

namespace xpu_fp4 {

/// Four codes, one in each byte, to four int8: twice the value, shifted left.
inline uint32_t twice4(uint32_t codes, uint32_t shift = 0) {
  const uint32_t high = (codes >> 2) & 0x01010101u;  // 4 and above: the low bits count twice
  const uint32_t twice = codes & (high | high << 1);
  const uint32_t seven = twice & twice >> 1 & 0x01010101u;                             // 12 = 7 + 3 + 2
  const uint32_t magnitude = ((codes & 0x07070707u) + twice + (seven << 1)) << shift;  // at most 96: no carry leaves a byte
  const uint32_t negative = (codes >> 3) & 0x01010101u, low_bits = (negative << 7) - negative;
  return ((magnitude ^ low_bits) + negative) ^ negative << 7;
}

/// Two bytes of packed codes, in K order, to a code in each of four bytes.
inline uint32_t spread4(uint32_t packed) {
  const uint32_t bytes = packed & 0xFFFFu, spread = (bytes | bytes << 8) & 0x00FF00FFu;
  return (spread | spread << 4) & 0x0F0F0F0Fu;
}

}  // namespace xpu_fp4
