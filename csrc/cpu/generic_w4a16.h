// SPDX-License-Identifier: Apache-2.0
// W4A16 in plain C++. A task owns rows x columns of the output. Columns are taken kFloatLanes at a time; one quad (K = 128) of
// their weights is unpacked to a panel [128][kFloatLanes], so that a vector holds one k of all lanes and every row reuses the
// panel from the first-level cache.
#pragma once
#include "with_dtype.h"
#include "generic_output.h"

namespace xpu_fp4::cpu {
namespace {

constexpr int kFloatLanes = 32;

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

// kFloatLanes rows of W over one quad: codes[k][lane] is twice the value, factor[block][lane] what a block's sum is multiplied by.
// Lanes beyond the last column repeat it; blocks beyond the last are not filled.
struct FloatPanel {
  alignas(64) float codes[kQuadElements][kFloatLanes];
  float factor[kQuad][kFloatLanes];

  void fill(const Weight& w, int64_t k, Range columns, int64_t quad, int blocks) {
    for (int lane = 0; lane < kFloatLanes; ++lane) {
      const WeightRow row(w, k, std::min(columns.begin + lane, columns.end - 1), quad);
      for (int i = 0; i < blocks * kBlockBytes; ++i) {
        codes[2 * i][lane] = kUnpacked[row.packed(i)].even;
        codes[2 * i + 1][lane] = kUnpacked[row.packed(i)].odd;
      }
      for (int b = 0; b < blocks; ++b) factor[b][lane] = weight_factor(row.scale(b));
    }
  }
};

// sum[lane] = x . w over one block, in the order of format/accumulate.h.
void dot_block(const float* x, const float (*w)[kFloatLanes], float* sum) {
  float run[kBlock / kRun][kFloatLanes];
  for (int r = 0; r < kBlock / kRun; ++r) {
    float partial[kFloatLanes] = {};
    for (int i = r * kRun; i < (r + 1) * kRun; ++i) {
      for (int lane = 0; lane < kFloatLanes; ++lane) partial[lane] += x[i] * w[i][lane];
    }
    std::copy(partial, partial + kFloatLanes, run[r]);
  }
  for (int lane = 0; lane < kFloatLanes; ++lane) sum[lane] = add_runs(run[0][lane], run[1][lane], run[2][lane], run[3][lane]);
}

// acc[lane] += the quad's share of one row's outputs.
void add_row_quad(const float* x, const FloatPanel& panel, int blocks, float* acc) {
  float p[kQuad][kFloatLanes] = {};  // a missing block counts as +0
  for (int b = 0; b < blocks; ++b) {
    dot_block(x + b * kBlock, panel.codes + b * kBlock, p[b]);
    for (int lane = 0; lane < kFloatLanes; ++lane) p[b][lane] = block_share(p[b][lane], panel.factor[b][lane]);
  }
  for (int lane = 0; lane < kFloatLanes; ++lane) acc[lane] = add_quad(acc[lane], p[0][lane], p[1][lane], p[2][lane], p[3][lane]);
}

template <DType T>
void multiply_floats(const GemmW4A16Args& args, Range rows, Range columns) {
  FloatPanel panel;
  std::vector<std::array<float, kFloatLanes>> acc(static_cast<size_t>(rows.end - rows.begin));
  for (int64_t first = columns.begin; first < columns.end; first += kFloatLanes) {
    const Range lanes = {first, std::min<int64_t>(first + kFloatLanes, columns.end)};
    std::fill(acc.begin(), acc.end(), std::array<float, kFloatLanes>{});
    for (int64_t quad = 0; quad < strips::quads(args.k); ++quad) {
      const int blocks = static_cast<int>(std::min<int64_t>(kQuad, args.k / kBlock - quad * kQuad));
      panel.fill(args.w, args.k, lanes, quad, blocks);
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        float x[kQuadElements];
        for (int i = 0; i < blocks * kBlock; ++i) x[i] = load<T>(args.x, row * args.k + quad * kQuadElements + i);
        add_row_quad(x, panel, blocks, acc[static_cast<size_t>(row - rows.begin)].data());
      }
    }
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const auto& of_row = acc[static_cast<size_t>(row - rows.begin)];
      finish_scalars<T>(args.bias, args.y, args.n, row, lanes, of_row.data());
    }
  }
}

void gemm_w4a16(const GemmW4A16Args& args, Range rows, Range columns) {
  with_dtype(args.dtype, [&](auto dtype) { multiply_floats<dtype>(args, rows, columns); });
}

}  // namespace
}  // namespace xpu_fp4::cpu
