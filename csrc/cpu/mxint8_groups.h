// SPDX-License-Identifier: Apache-2.0
// The groups of blocks that share a scale when MXINT8 is quantized.
#pragma once
#include "with_dtype.h"

namespace xpu_fp4::cpu {
namespace {

// Calls function(first block, number of blocks), the number as a compile-time constant, for each group of a range that cuts
// none.
template <class Function>
void for_groups(const Quantize& args, Range blocks, const Function& function) {
  const int64_t row_blocks = args.k / kBlock;
  const int most = group_blocks(args.to);
  for (int64_t block = blocks.begin; block < blocks.end;) {
    const int64_t row_end = std::min(block / row_blocks * row_blocks + row_blocks, blocks.end);
    for (; block < row_end; block += most) {
      switch (std::min<int64_t>(most, row_end - block)) {
        case 1: function(block, std::integral_constant<int, 1>{}); break;
        case 2: function(block, std::integral_constant<int, 2>{}); break;
        case 3: function(block, std::integral_constant<int, 3>{}); break;
        case 4: function(block, std::integral_constant<int, 4>{}); break;
      }
    }
    block = row_end;
  }
}

}  // namespace
}  // namespace xpu_fp4::cpu
