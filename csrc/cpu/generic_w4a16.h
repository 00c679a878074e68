// SPDX-License-Identifier: Apache-2.0
// W4A16 in plain C++: weights are unpacked to [128][16] floats, so that a vector holds one k of all columns. The order of an
// output's sum is that of format/accumulate.h.
#pragma once
#include "loop_nest.h"

namespace xpu_fp4::cpu {
namespace {

/// A quad of up to kRows rows of X.
template <int kRows>
struct alignas(64) FloatQuad {
  float x[kRows][kQuadElements];
  static constexpr Level level = Level::quad;
};

// A row's blocks [0, blocks) of a quad, zero beyond.
template <int kRows>
void expand_floats(const Activations& source, int64_t block, int blocks, FloatQuad<kRows>& out, int row) {
  with_dtype(source.dtype, [&](auto dtype) {
    for (int i = 0; i < blocks * kBlock; ++i) out.x[row][i] = load<dtype>(source.data, block * kBlock + i);
  });
  std::fill(out.x[row] + blocks * kBlock, out.x[row] + kQuadElements, 0.0f);
}

struct PortableFloat {
  static constexpr char kSource[] = "generic_w4a16.h";
  static constexpr int kGroupRows = 4, kPanelStrips = 2, kPanelQuads = 1, kDirectRows = 0, kBlockRows = 512;
  using GroupQuad = FloatQuad<kGroupRows>;
  struct Session {};

  // codes[k][column] is twice the value; factor is 2^(ew - 2).
  struct StripQuad {
    float codes[kQuadElements][strips::kColumns];
    float factor[kQuad][strips::kColumns];
  };

  static void expand(const Activations& source, int64_t block, int blocks, GroupQuad& out, int row) {
    expand_floats(source, block, blocks, out, row);
  }
  static void pad(GroupQuad&, int) {}

  static Level fill(const Weight& w, int64_t strip, int64_t quad, StripQuad& out) {
    alignas(64) uint8_t buffer[strips::kRecordBytes];
    const uint8_t* record = record_of(w, strip, quad, buffer);
    for (int c = 0; c < strips::kColumns; ++c) {
      for (int i = 0; i < kQuadElements; ++i) {
        const uint8_t packed = record[strips::code_offset(c, i / 2)];
        out.codes[i][c] = static_cast<float>(e2m1::twice(i % 2 == 0 ? e2m1::low(packed) : e2m1::high(packed)));
      }
      for (int b = 0; b < kQuad; ++b) out.factor[b][c] = weight_factor(record[strips::scale_offset(c, b)]);
    }
    return Level::quad;
  }

  static void add_quads(const GroupQuad* a, int64_t, int rows, const StripQuad* w, int panel_strips, const Level*, int depth,
                        float* acc) {
    for (int q = 0; q < depth; ++q) {
      for (int row = 0; row < rows; ++row) {
        for (int s = 0; s < panel_strips; ++s) {
          add_row_quad(a[q].x[row], w[q * panel_strips + s], acc + (row * kPanelStrips + s) * strips::kColumns);
        }
      }
    }
  }

 private:
  static void add_row_quad(const float* x, const StripQuad& w, float* acc) {
    float p[kQuad][strips::kColumns];
    for (int b = 0; b < kQuad; ++b) {
      dot_block(x + b * kBlock, w.codes + b * kBlock, p[b]);
      for (int c = 0; c < strips::kColumns; ++c) p[b][c] = block_share(p[b][c], w.factor[b][c]);
    }
    for (int c = 0; c < strips::kColumns; ++c) acc[c] = add_quad(acc[c], p[0][c], p[1][c], p[2][c], p[3][c]);
  }

  static void dot_block(const float* x, const float (*w)[strips::kColumns], float* sum) {
    float run[kBlock / kRun][strips::kColumns] = {};
    for (int r = 0; r < kBlock / kRun; ++r) {
      for (int i = r * kRun; i < (r + 1) * kRun; ++i) {
        for (int c = 0; c < strips::kColumns; ++c) run[r][c] += x[i] * w[i][c];
      }
    }
    for (int c = 0; c < strips::kColumns; ++c) sum[c] = add_runs(run[0][c], run[1][c], run[2][c], run[3][c]);
  }
};

}  // namespace
}  // namespace xpu_fp4::cpu
