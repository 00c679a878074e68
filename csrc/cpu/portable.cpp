// SPDX-License-Identifier: Apache-2.0
// Native kernels in plain C++: loops over fixed sizes that a compiler vectorises for whatever it is told to target.
//
// GEMM: a task owns rows x columns of the output. Columns are taken kLanes at a time; one quad (K = 128) of their weights is
// unpacked to a panel [128][kLanes], so that a vector holds one k of all lanes and every row reuses the panel from the
// first-level cache. Cost per output and block: 32 multiply-adds, in int16 for W4A4 (the sum of a block is at most 4608) and
// in float32 for W4A16, and one scaling.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../format/accumulate.h"
#include "../format/block.h"
#include "kernels.h"

namespace xpu_fp4::cpu {
namespace {

constexpr int kLanes = 32;
constexpr int kQuadElements = kQuad * kBlock;

// Calls function with the DType as a compile-time constant.
template <class Function>
void with_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::f32: return function(std::integral_constant<DType, DType::f32>{});
    case DType::f16: return function(std::integral_constant<DType, DType::f16>{});
    case DType::bf16: return function(std::integral_constant<DType, DType::bf16>{});
  }
}

struct BlockInput {
  float x[kBlock];
  uint32_t amax_bits;
};

template <DType T>
BlockInput load_block(const void* data, int64_t block) {
  BlockInput in;
  in.amax_bits = 0;
  for (int i = 0; i < kBlock; ++i) in.x[i] = load<T>(data, block * kBlock + i);
  for (int i = 0; i < kBlock; ++i) in.amax_bits = std::max(in.amax_bits, magnitude_bits(in.x[i]));
  return in;
}

// Encodes and packs a block with encode(x, 1 / scale) -> code; a NaN scale has all codes 0.
template <class Encode>
void store_codes(const BlockInput& in, uint8_t scale, uint8_t* q, const Encode& encode) {
  if (scale == e8m0::kNan) {
    std::memset(q, 0, kBlockBytes);
    return;
  }
  const float reciprocal = e8m0::reciprocal(scale);
  uint8_t codes[kBlock];
  for (int i = 0; i < kBlock; ++i) codes[i] = static_cast<uint8_t>(encode(in.x[i], reciprocal));
  for (int i = 0; i < kBlockBytes; ++i) q[i] = e2m1::pack(codes[2 * i], codes[2 * i + 1]);
}

void quantize(const QuantizeArgs& args, Range blocks) {
  with_dtype(args.x_dtype, [&](auto dtype) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const BlockInput in = load_block<dtype>(args.x, block);
      args.scale[block] = e8m0::from_amax(in.amax_bits, args.mode);
      store_codes(in, args.scale[block], args.q + block * kBlockBytes, quantize_element);
    }
  });
}

void group_quant(const GroupQuantArgs& args, Range blocks) {
  const int64_t row_blocks = args.k / kBlock;
  const uint8_t floor_byte = group_quant::floor_from_eps(args.eps);
  with_dtype(args.x_dtype, [&](auto dtype) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const BlockInput in = load_block<dtype>(args.x, block);
      const uint8_t scale = group_quant::scale_byte(in.amax_bits, floor_byte);
      const int64_t row = block / row_blocks, column = block % row_blocks;
      args.scale[row * args.scale_row_stride + column * args.scale_block_stride] = e8m0::value(scale);
      store_codes(in, scale, args.q + block * kBlockBytes, group_quant::quantize_element);
    }
  });
}

void dequantize(const DequantizeArgs& args, Range blocks) {
  with_dtype(args.out_dtype, [&](auto dtype) {
    for (int64_t byte = blocks.begin * kBlockBytes; byte < blocks.end * kBlockBytes; ++byte) {
      const uint8_t packed = args.q[byte], scale = args.scale[byte / kBlockBytes];
      store<dtype>(args.out, 2 * byte, dequantize_element(e2m1::low(packed), scale));
      store<dtype>(args.out, 2 * byte + 1, dequantize_element(e2m1::high(packed), scale));
    }
  });
}

// kLanes rows of W over one quad, unpacked to twice their value: codes[k][lane], scale[block][lane]. Lanes beyond the last
// column repeat it; blocks beyond the last are not filled.
template <class Element>
struct WeightPanel {
  alignas(64) Element codes[kQuadElements][kLanes];
  uint8_t scale[kQuad][kLanes];

  void fill(const Weight& w, int64_t k, int64_t first_column, int64_t columns, int64_t quad, int blocks) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t column = first_column + std::min<int64_t>(lane, columns - 1);
      const uint8_t* packed = w.codes + column * (k / 2) + quad * (kQuadElements / 2);
      for (int i = 0; i < blocks * kBlockBytes; ++i) {
        codes[2 * i][lane] = static_cast<Element>(e2m1::twice(e2m1::low(packed[i])));
        codes[2 * i + 1][lane] = static_cast<Element>(e2m1::twice(e2m1::high(packed[i])));
      }
      for (int b = 0; b < blocks; ++b) {
        scale[b][lane] = w.scale[column * w.scale_row_stride + (quad * kQuad + b) * w.scale_block_stride];
      }
    }
  }
};

// acc += the four shares of a quad, lane by lane.
void add_quad_lanes(float* acc, const float (&share)[kQuad][kLanes]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    acc[lane] = add_quad(acc[lane], share[0][lane], share[1][lane], share[2][lane], share[3][lane]);
  }
}

void add_bias_and_store(const Bias& bias, void* y, DType dtype, int64_t n, int64_t row, Range columns, const float* acc) {
  with_dtype(dtype, [&](auto type) {
    for (int64_t column = columns.begin; column < columns.end; ++column) {
      float value = acc[column - columns.begin];
      if (bias.data != nullptr) value += bias.data[row * bias.row_stride + column * bias.column_stride];
      store<type>(y, row * n + column, value);
    }
  });
}

// The loop nest that both products share. shares(row, quad, panel, blocks, share) writes what the first `blocks` blocks of a
// quad contribute to one row; share of the missing ones stays +0.
template <class Element, class Args, class Shares>
void for_each_quad(const Args& args, DType y_dtype, Range rows, Range columns, const Shares& shares) {
  static thread_local WeightPanel<Element> panel;
  const int64_t row_blocks = args.k / kBlock, quads = (row_blocks + kQuad - 1) / kQuad;
  std::vector<float> acc(static_cast<size_t>((rows.end - rows.begin) * kLanes));
  for (int64_t first = columns.begin; first < columns.end; first += kLanes) {
    const int64_t last = std::min<int64_t>(first + kLanes, columns.end);
    std::fill(acc.begin(), acc.end(), 0.0f);
    for (int64_t quad = 0; quad < quads; ++quad) {
      const int blocks = static_cast<int>(std::min<int64_t>(kQuad, row_blocks - quad * kQuad));
      panel.fill(args.w, args.k, first, last - first, quad, blocks);
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        float share[kQuad][kLanes] = {};
        shares(row, quad, panel, blocks, share);
        add_quad_lanes(&acc[static_cast<size_t>((row - rows.begin) * kLanes)], share);
      }
    }
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const float* row_acc = &acc[static_cast<size_t>((row - rows.begin) * kLanes)];
      add_bias_and_store(args.bias, args.y, y_dtype, args.n, row, {first, last}, row_acc);
    }
  }
}

void gemm(const GemmArgs& args, Range rows, Range columns) {
  for_each_quad<int16_t>(args, args.y_dtype, rows, columns,
                         [&](int64_t row, int64_t quad, const WeightPanel<int16_t>& panel, int blocks, auto& share) {
    const uint8_t* packed = args.a + row * (args.k / 2) + quad * (kQuadElements / 2);
    const uint8_t* scale = args.a_scale + row * (args.k / kBlock) + quad * kQuad;
    for (int b = 0; b < blocks; ++b) {
      int16_t dot[kLanes] = {};
      for (int i = 0; i < kBlockBytes; ++i) {
        const uint8_t byte = packed[b * kBlockBytes + i];
        const int16_t a0 = static_cast<int16_t>(e2m1::twice(e2m1::low(byte)));
        const int16_t a1 = static_cast<int16_t>(e2m1::twice(e2m1::high(byte)));
        const int16_t* w0 = panel.codes[b * kBlock + 2 * i];
        const int16_t* w1 = panel.codes[b * kBlock + 2 * i + 1];
        for (int lane = 0; lane < kLanes; ++lane) {
          dot[lane] = static_cast<int16_t>(dot[lane] + a0 * w0[lane] + a1 * w1[lane]);
        }
      }
      for (int lane = 0; lane < kLanes; ++lane) share[b][lane] = block_product(dot[lane], scale[b], panel.scale[b][lane]);
    }
  });
}

template <DType T>
void gemm_w4a16_as(const GemmW4A16Args& args, Range rows, Range columns) {
  for_each_quad<float>(args, T, rows, columns,
                       [&](int64_t row, int64_t quad, const WeightPanel<float>& panel, int blocks, auto& share) {
    for (int b = 0; b < blocks; ++b) {
      float run[kBlock / kRun][kLanes] = {};
      for (int i = 0; i < kBlock; ++i) {
        const float x = load<T>(args.x, row * args.k + quad * kQuadElements + b * kBlock + i);
        const float* w = panel.codes[b * kBlock + i];
        float* sum = run[i / kRun];
        for (int lane = 0; lane < kLanes; ++lane) sum[lane] += x * w[lane];
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        share[b][lane] = block_share(add_runs(run[0][lane], run[1][lane], run[2][lane], run[3][lane]), panel.scale[b][lane]);
      }
    }
  });
}

void gemm_w4a16(const GemmW4A16Args& args, Range rows, Range columns) {
  with_dtype(args.dtype, [&](auto dtype) { gemm_w4a16_as<dtype>(args, rows, columns); });
}

}  // namespace

const KernelTable kPortable = {"portable", [] { return true; }, quantize, group_quant, dequantize, gemm, gemm_w4a16};

}  // namespace xpu_fp4::cpu
