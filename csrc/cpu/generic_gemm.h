// SPDX-License-Identifier: Apache-2.0
// W4A4 and W4A8 in plain C++: operands and tile. No shifts, blocks scaled one by one. The sum of half a block fits int16, which
// every vector instruction set multiplies and adds well: of W4A8 it is at most 16 * 128 * 12 = 24576.
#pragma once
#include "generic_output.h"
#include "generic_quantize.h"
#include "loop_nest.h"
#include "operand_source.h"

namespace xpu_fp4::cpu {
namespace {

// Position of element i of a quad in the order of panels.h.
constexpr int position(int i) { return i / 8 * 8 + i % 2 * 4 + i % 8 / 2; }

constexpr unsigned code_at(const uint8_t* packed, int i) {
  return i % 2 == 0 ? e2m1::low(packed[i / 2]) : e2m1::high(packed[i / 2]);
}

// Element i of a quad as an integer: an int8 code, or twice what an MXFP4 code stands for.
constexpr int integer_at(Format format, const uint8_t* codes, int i) {
  return format == Format::mxint8 ? static_cast<int8_t>(codes[i]) : e2m1::twice(code_at(codes, i));
}

struct Portable {
  static constexpr char kSource[] = "generic_gemm.h";
  static constexpr int kGroupRows = 4, kPanelStrips = 2, kPanelQuads = 2, kDirectRows = 0, kBlockRows = 512;
  using GroupQuad = ActivationQuad<kGroupRows>;
  struct Session {};

  // codes[k][column], K in the order of panels.h.
  struct StripQuad {
    int16_t codes[kQuadElements][strips::kColumns];
    float factor[kQuad][strips::kColumns];
  };

  static void expand(const Activations& source, int64_t block, int blocks, GroupQuad& out, int row) {
    with_codes<quantize_scalars>(source, block, blocks, [&](const uint8_t* codes, const uint8_t* scale) {
      const Format format = source.to.format;
      unsigned zero_blocks = (1u << kQuad) - 1u;
      for (int i = 0; i < kQuadElements; ++i) {
        const int integer = integer_at(format, codes, i);
        *out.at(row, position(i)) = static_cast<int8_t>(integer);
        if (integer != 0) zero_blocks &= ~(1u << (i / kBlock));
      }
      const Alignment alignment = align(scale, zero_blocks, 0);
      const IntegerForm form = integer_form(format, 0, 0);
      for (int b = 0; b < kQuad; ++b) out.block[row][b] = block_factor(alignment.base[b], 0, form);
      out.set_level(row, alignment.level);
    });
  }
  static void pad(GroupQuad&, int) {}

  static Level fill(const Weight& w, int64_t strip, int64_t quad, StripQuad& out) {
    alignas(64) uint8_t buffer[strips::kRecordBytes];
    const uint8_t* record = record_of(w, strip, quad, buffer);
    for (int c = 0; c < strips::kColumns; ++c) {
      for (int i = 0; i < kQuadElements; ++i) {
        const uint8_t packed = record[strips::code_offset(c, i / 2)];
        out.codes[position(i)][c] = static_cast<int16_t>(e2m1::twice(i % 2 == 0 ? e2m1::low(packed) : e2m1::high(packed)));
      }
      for (int b = 0; b < kQuad; ++b) out.factor[b][c] = e8m0::value(record[strips::scale_offset(c, b)]);
    }
    return Level::general;
  }

  static void add_quads(const GroupQuad* a, int64_t, int rows, const StripQuad* w, int panel_strips, const Level*, int depth,
                        float* acc) {
    for (int q = 0; q < depth; ++q) {
      for (int row = 0; row < rows; ++row) {
        for (int s = 0; s < panel_strips; ++s) {
          add_row_quad(a[q].at(row, 0), a[q].block[row], w[q * panel_strips + s],
                       acc + (row * kPanelStrips + s) * strips::kColumns);
        }
      }
    }
  }

 private:
  static void add_row_quad(const int8_t* a, const BlockFactor* f, const StripQuad& w, float* acc) {
    float p[kQuad][strips::kColumns];
    for (int b = 0; b < kQuad; ++b) dot_block(a + b * kBlock, w.codes + b * kBlock, f[b], w.factor[b], p[b]);
    for (int c = 0; c < strips::kColumns; ++c) acc[c] = add_quad(acc[c], p[0][c], p[1][c], p[2][c], p[3][c]);
  }

  static void dot_block(const int8_t* a, const int16_t (*w)[strips::kColumns], const BlockFactor& f, const float* factor,
                        float* p) {
    int32_t sum[strips::kColumns] = {};
    for (int half = 0; half < kBlock; half += kBlock / 2) {
      int16_t part[strips::kColumns] = {};
      for (int k = half; k < half + kBlock / 2; ++k) {
        for (int c = 0; c < strips::kColumns; ++c) part[c] = static_cast<int16_t>(part[c] + a[k] * w[k][c]);
      }
      for (int c = 0; c < strips::kColumns; ++c) sum[c] += part[c];
    }
    for (int c = 0; c < strips::kColumns; ++c)
      p[c] = static_cast<float>(sum[c]) * (f.scale * f.before()) * factor[c] * f.after();
  }
};

}  // namespace
}  // namespace xpu_fp4::cpu
