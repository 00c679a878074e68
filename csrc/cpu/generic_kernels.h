// SPDX-License-Identifier: Apache-2.0
// Native kernels in plain C++: loops over fixed sizes that the compiler vectorises for the instruction set that it may use.
// Each isa_*.cpp includes this file after a target pragma; all of it has internal linkage, so no two instruction sets mix. What
// it includes comes first, in isa_*.cpp, because inline functions of headers must be compiled for any processor.
//
// GEMM: a task owns rows x columns of the output. Columns are taken kLanes at a time; one quad (K = 128) of their weights is
// unpacked to a panel [128][kLanes], so that a vector holds one k of all lanes and every row reuses the panel from the
// first-level cache. Cost per output and block: 32 multiplications and additions in float32 (exact for W4A4, where they are
// integers below 2^13), and one scaling.
#include "generic_includes.h"

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
  with_dtype(args.x_dtype, [&](auto dtype) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const BlockInput in = load_block<dtype>(args.x, block);
      const uint8_t scale = group_quant::scale_byte(in.amax_bits, args.scale_floor);
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

// A packed byte's two elements, each twice its value.
struct Pair {
  float even, odd;
};
constexpr std::array<Pair, 256> kUnpacked = [] {
  std::array<Pair, 256> table{};
  for (unsigned byte = 0; byte < 256; ++byte) {
    table[byte] = {static_cast<float>(e2m1::twice(byte & 15u)), static_cast<float>(e2m1::twice(byte >> 4))};
  }
  return table;
}();

// The first `blocks` blocks of a row's quad; whoever fills it, every value but of unused blocks is set.
struct RowQuad {
  float x[kQuadElements];
  RowFactor factor[kQuad];
};

// kLanes rows of W over one quad: codes[k][lane] is twice the value, factor[block][lane] what a block's sum is multiplied by.
// Lanes beyond the last column repeat it; blocks beyond the last are not filled.
struct WeightPanel {
  alignas(64) float codes[kQuadElements][kLanes];
  float factor[kQuad][kLanes];

  void fill(const Weight& w, int64_t k, Range columns, int64_t quad, int blocks) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t column = std::min(columns.begin + lane, columns.end - 1);
      const uint8_t* packed = w.codes + column * (k / 2) + quad * (kQuadElements / 2);
      for (int i = 0; i < blocks * kBlockBytes; ++i) {
        codes[2 * i][lane] = kUnpacked[packed[i]].even;
        codes[2 * i + 1][lane] = kUnpacked[packed[i]].odd;
      }
      const uint8_t* scale = w.scale + column * w.scale_row_stride + quad * kQuad * w.scale_block_stride;
      for (int b = 0; b < blocks; ++b) factor[b][lane] = weight_factor(scale[b * w.scale_block_stride]);
    }
  }
};

// sum[lane] = x . w over one block, in the order of format/accumulate.h. For W4A4 every partial sum is an integer below 2^13,
// so any order gives the same bits and the two products can share this loop.
void dot_block(const float* x, const float (*w)[kLanes], float* sum) {
  float run[kBlock / kRun][kLanes];
  for (int r = 0; r < kBlock / kRun; ++r) {
    float partial[kLanes] = {};
    for (int i = r * kRun; i < (r + 1) * kRun; ++i) {
      for (int lane = 0; lane < kLanes; ++lane) partial[lane] += x[i] * w[i][lane];
    }
    std::copy(partial, partial + kLanes, run[r]);
  }
  for (int lane = 0; lane < kLanes; ++lane) sum[lane] = add_runs(run[0][lane], run[1][lane], run[2][lane], run[3][lane]);
}

// acc[lane] += the quad's share of one row's outputs; share(sum, row factor, weight factor) scales a block's sum.
template <class Share>
void add_row_quad(const RowQuad& row, const WeightPanel& panel, int blocks, float* acc, const Share& share) {
  float p[kQuad][kLanes] = {};  // a missing block counts as +0
  for (int b = 0; b < blocks; ++b) {
    dot_block(row.x + b * kBlock, panel.codes + b * kBlock, p[b]);
    for (int lane = 0; lane < kLanes; ++lane) p[b][lane] = share(p[b][lane], row.factor[b], panel.factor[b][lane]);
  }
  for (int lane = 0; lane < kLanes; ++lane) acc[lane] = add_quad(acc[lane], p[0][lane], p[1][lane], p[2][lane], p[3][lane]);
}

template <DType T>
void add_bias_and_store(const Bias& bias, void* y, int64_t n, int64_t row, Range columns, const float* acc) {
  for (int64_t column = columns.begin; column < columns.end; ++column) {
    float value = acc[column - columns.begin];
    if (bias.data != nullptr) value += bias.data[row * bias.row_stride + column * bias.column_stride];
    store<T>(y, row * n + column, value);
  }
}

// The loop nest of both products. load_row(row, quad, blocks) gives the activations of a quad.
template <DType T, class Args, class LoadRow, class Share>
void multiply(const Args& args, Range rows, Range columns, const LoadRow& load_row, const Share& share) {
  WeightPanel panel;
  const int64_t row_blocks = args.k / kBlock, quads = (row_blocks + kQuad - 1) / kQuad;
  std::vector<std::array<float, kLanes>> acc(static_cast<size_t>(rows.end - rows.begin));
  for (int64_t first = columns.begin; first < columns.end; first += kLanes) {
    const Range lanes = {first, std::min<int64_t>(first + kLanes, columns.end)};
    std::fill(acc.begin(), acc.end(), std::array<float, kLanes>{});
    for (int64_t quad = 0; quad < quads; ++quad) {
      const int blocks = static_cast<int>(std::min<int64_t>(kQuad, row_blocks - quad * kQuad));
      panel.fill(args.w, args.k, lanes, quad, blocks);
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const RowQuad activations = load_row(row, quad, blocks);
        add_row_quad(activations, panel, blocks, acc[static_cast<size_t>(row - rows.begin)].data(), share);
      }
    }
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      add_bias_and_store<T>(args.bias, args.y, args.n, row, lanes, acc[static_cast<size_t>(row - rows.begin)].data());
    }
  }
}

void gemm(const GemmArgs& args, Range rows, Range columns) {
  const auto load_row = [&](int64_t row, int64_t quad, int blocks) {
    const uint8_t* packed = args.a + row * (args.k / 2) + quad * (kQuadElements / 2);
    const uint8_t* scale = args.a_scale + row * (args.k / kBlock) + quad * kQuad;
    RowQuad out;
    for (int i = 0; i < blocks * kBlockBytes; ++i) {
      out.x[2 * i] = kUnpacked[packed[i]].even;
      out.x[2 * i + 1] = kUnpacked[packed[i]].odd;
    }
    for (int b = 0; b < blocks; ++b) out.factor[b] = row_factor(scale[b]);
    return out;
  };
  with_dtype(args.y_dtype, [&](auto dtype) { multiply<dtype>(args, rows, columns, load_row, block_product); });
}

void gemm_w4a16(const GemmW4A16Args& args, Range rows, Range columns) {
  with_dtype(args.dtype, [&](auto dtype) {
    const auto load_row = [&](int64_t row, int64_t quad, int blocks) {
      RowQuad out;
      for (int i = 0; i < blocks * kBlock; ++i) out.x[i] = load<dtype>(args.x, row * args.k + quad * kQuadElements + i);
      return out;
    };
    const auto share = [](float sum, const RowFactor&, float factor) { return block_share(sum, factor); };
    multiply<dtype>(args, rows, columns, load_row, share);
  });
}

}  // namespace

}  // namespace xpu_fp4::cpu
