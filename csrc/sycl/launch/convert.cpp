// SPDX-License-Identifier: Apache-2.0
// Codes, scales and the expanded form.
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <utility>

#include "../../format/fp_quant.h"
#include "../../format/integer.h"
#include "launch.h"

namespace xpu_fp4::syclrt::launch {
namespace {

constexpr int64_t kGroupLanes = 64;

Range line(int64_t lanes) { return {1, {round_up(lanes, kGroupLanes)}, {kGroupLanes}}; }

}  // namespace

int alignment_of(std::initializer_list<const void*> addresses) {
  uintptr_t bits = 0;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return bits % 16 == 0 ? 16 : 1;
}

bool starts_cache_line(const void* address) { return reinterpret_cast<uintptr_t>(address) % 64 == 0; }

Range grid(int64_t rows, int64_t lanes) { return {2, {rows, round_up(lanes, kGroupLanes)}, {1, kGroupLanes}}; }

// expand.cpp: a lane has a row of a quad; expand_row.cpp: a sub-group.
Range expand_range(ElementOrder order, int lanes, int64_t rows, int64_t quads) {
  return order == ElementOrder::apart ? grid(quads, rows) : grid(rows, quads * lanes);
}

Variant for_rule(Variant variant, const Quantizer& to) {
  const bool own = to.format == Format::mxfp4 && fp_quant::is_rule(to.mode);
  return own ? with_scale_mode(std::move(variant), to.mode) : variant;
}

void transform(const Queue& queue, const Quantize& args) {
  const auto& [hadamard, offset, gate] = args.to.transform;
  if (!gate.is_none()) throw std::logic_error("xpu_fp4: only the kernels of experts gate rows here");
  const Format to = args.to.format;
  const char* kernel = to == Format::none    ? "transform"
                       : to == Format::mxfp4 ? "transform_quantize"
                                             : "transform_quantize_mxint8";
  queue.launch(for_rule(transform_variant(queue.target(), args.dtype, alignment_of({args.x, offset})), args.to), kernel,
               grid(args.rows, args.k / kBlock),
               TransformQuantizeArguments{
                   args.x, args.codes, args.scale, args.k, static_cast<int>(args.to.mode), args.to.group, {offset, hadamard}});
}

void quantize(const Queue& queue, const Quantize& args) {
  if (!args.to.transform.is_none()) return transform(queue, args);
  const Variant variant = for_rule(quantize_variant(queue.target(), args.dtype, alignment_of({args.x})), args.to);
  if (args.to.format == Format::mxint8) {
    const int64_t lanes = ceil_div(args.k, kQuadElements) * queue.target().sub_group;  // of a row
    return queue.launch(variant, "quantize_mxint8", grid(args.rows, lanes),
                        QuantizeMxint8Arguments{args.x, args.codes, args.scale, args.k, args.to.group});
  }
  const int64_t vectors = args.rows * args.k * size_of(args.dtype) / 16;
  queue.launch(variant, "quantize", line(vectors),
               QuantizeArguments{args.x, args.codes, args.scale, vectors, static_cast<int>(args.to.mode)});
}

void group_quantize(const Queue& queue, const GroupQuantize& args) {
  const int64_t vectors = args.rows * args.k * size_of(args.dtype) / 16;
  queue.launch(quantize_variant(queue.target(), args.dtype, alignment_of({args.x})), "group_quantize", line(vectors),
               GroupQuantizeArguments{args.x, args.codes, args.scale, vectors, args.k / kBlock, args.scale_row_stride,
                                      args.scale_block_stride, args.scale_floor});
}

void dequantize(const Queue& queue, const Dequantize& args) {
  const int64_t lanes = args.rows * args.k / 8;
  const char* kernel = args.format == Format::mxint8 ? "dequantize_mxint8" : "dequantize";
  queue.launch(dequantize_variant(queue.target(), args.dtype), kernel, line(lanes),
               DequantizeArguments{args.codes, args.scale, args.out, lanes});
}

Expanded::Expanded(const ExpandedLayout& of, void* at, std::shared_ptr<void> owned) : layout(of), memory(std::move(owned)) {
  auto* codes = static_cast<uint8_t*>(at);
  auto* exponents = reinterpret_cast<uint32_t*>(codes + round_up(layout.codes_bytes(), 64));
  arrays = {codes, exponents, exponents + round_up(layout.exponents_bytes(), 64) / 4};
}

int64_t Expanded::bytes(const ExpandedLayout& layout) {
  return round_up(layout.codes_bytes(), 64) + round_up(layout.exponents_bytes(), 64) + layout.levels_bytes();
}

ExpandedLayout weight_layout(const Architecture& architecture, int64_t n, int64_t k) {
  return {n, round_up(n, kColumnPadding), ceil_div(k, kQuadElements), architecture.sub_group};
}

void expand_weight(const Queue& queue, Gpu gpu, const Weight& w, const Expanded& out) {
  const ExpandedLayout& layout = out.layout;
  queue.launch(
      expand_weight_variant(gpu, alignment_of({w.codes})), "expand", grid(layout.quads, layout.padded_rows),
      ExpandArguments{
          {w.codes, w.scale, w.scale_row_stride, w.scale_block_stride}, out.arrays, layout.rows, layout.padded_rows, w.k});
}

}  // namespace xpu_fp4::syclrt::launch
