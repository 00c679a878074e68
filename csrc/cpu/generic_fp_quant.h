// SPDX-License-Identifier: Apache-2.0
// Quantize to MXFP4 by FP-Quant's rules (format/fp_quant.h), in plain C++ for every instruction set.
#pragma once
#include "../format/fp_quant.h"
#include "generic_group_quant.h"

namespace xpu_fp4::cpu {
namespace {

uint8_t quest_scale(const BlockInput& in) {
  return fp_quant::quest_scale(in.amax_bits, fp_quant::tree_sum<kBlock>(in.x),
                               fp_quant::tree_sum<kBlock, fp_quant::Square>(in.x));
}

[[gnu::noinline]] void quantize_fp_quant(const Quantize& args, Range blocks) {
  const ScaleMode mode = args.to.mode;
  with_dtype(args.dtype, [&](auto dtype) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const BlockInput in = load_block<dtype>(args.x, block);
      const uint8_t scale = mode == ScaleMode::abs_max ? fp_quant::abs_max_scale(in.amax_bits) : quest_scale(in);
      args.scale[block] = scale;
      store_codes(in, scale, args.codes + block * kBlockBytes, quantize_element, fp_quant::global_scale(mode));
    }
  });
}

}  // namespace
}  // namespace xpu_fp4::cpu
