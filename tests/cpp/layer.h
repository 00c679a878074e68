// SPDX-License-Identifier: Apache-2.0
// A layer of experts: random operands, and its definition in terms of a backend's single products.
#pragma once
#include "definition.h"
#include "format/strips.h"

inline float element_at(xpu_fp4::DType dtype, const void* data, int64_t i) {
  using xpu_fp4::DType;
  return dtype == DType::f32   ? xpu_fp4::load<DType::f32>(data, i)
         : dtype == DType::f16 ? xpu_fp4::load<DType::f16>(data, i)
                               : xpu_fp4::load<DType::bf16>(data, i);
}

/// Elements of a dtype from floats, rounded.
inline std::vector<uint8_t> elements_of(xpu_fp4::DType dtype, const std::vector<float>& floats) {
  std::vector<uint8_t> out(floats.size() * static_cast<size_t>(size_of(dtype)));
  for (size_t i = 0; i < floats.size(); ++i) store(dtype, out.data(), static_cast<int64_t>(i), floats[i]);
  return out;
}

/// What the gate makes of a row of 2k elements, by its definition.
inline std::vector<float> gated(const xpu_fp4::Gate& gate, xpu_fp4::DType dtype, const void* row, int64_t k) {
  std::vector<float> out(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i) {
    const float value =
        xpu_fp4::gate::apply(gate, element_at(dtype, row, gate.gate_at(i)), element_at(dtype, row, gate.up_at(i, k)));
    uint8_t rounded[4] = {};
    store(dtype, rounded, 0, value);
    out[static_cast<size_t>(i)] = element_at(dtype, rounded, 0);
  }
  return out;
}

/// The operands of a layer. Few experts have most slots; some slots have none.
struct LayerOperands {
  int64_t experts, tokens, top_k, hidden, inner;
  xpu_fp4::DType dtype;
  Operands w13, w2;  // the experts' rows one after the other
  std::vector<uint8_t> x;
  std::vector<int32_t> ids;
  std::vector<float> weights, w13_bias, w2_bias;

  LayerOperands(int64_t of_experts, int64_t of_tokens, int64_t slots, int64_t h, int64_t i, xpu_fp4::DType of_x, unsigned seed)
      : experts(of_experts),
        tokens(of_tokens),
        top_k(slots),
        hidden(h),
        inner(i),
        dtype(of_x),
        w13(1, experts * 2 * inner, hidden, 118, 126, seed),
        w2(1, experts * hidden, inner, 118, 126, seed + 1),
        x(elements_of(dtype, random_floats(tokens * hidden, seed + 2, 2.0f))),
        weights(random_floats(tokens * top_k, seed + 3, 1.0f)),
        w13_bias(random_floats(experts * 2 * inner, seed + 4, 1.0f)),
        w2_bias(random_floats(experts * hidden, seed + 5, 1.0f)) {
    std::mt19937 random(seed + 6);
    for (int64_t slot = 0; slot < tokens * top_k; ++slot) {
      const auto any = static_cast<int32_t>(random() % static_cast<unsigned>(experts + 2)) - 1;  // one on either side, too
      ids.push_back(random() % 2 == 0 ? 0 : any);
    }
  }

  xpu_fp4::Experts arguments(const xpu_fp4::Quantizer& to, const xpu_fp4::Gate& gate, bool router_on_input, void* y) const {
    using xpu_fp4::WeightForm;
    return {x.data(),
            dtype,
            tokens,
            to,
            ids.data(),
            weights.data(),
            top_k,
            nullptr,
            0,
            experts,
            {WeightForm::stored, 2 * inner, hidden, w13.w.data(), w13.w_scale.data(), hidden / 32, 1},
            {WeightForm::stored, hidden, inner, w2.w.data(), w2.w_scale.data(), inner / 32, 1},
            w13_bias.data(),
            w2_bias.data(),
            gate,
            router_on_input,
            nullptr,
            nullptr,
            y};
  }

  size_t y_bytes() const { return x.size(); }
};

/// A layer slot by slot, each a product of one row; the weights are stored.
inline std::vector<uint8_t> compose(const xpu_fp4::Backend& backend, const LayerOperands& in, const xpu_fp4::Quantizer& to,
                                    const xpu_fp4::Gate& gate, bool router_on_input) {
  using namespace xpu_fp4;
  const int64_t size = size_of(in.dtype), inner = in.inner, hidden = in.hidden;
  const Experts args = in.arguments(to, gate, router_on_input, nullptr);
  const auto of_expert = [](Weight w, int64_t e) {
    w.codes += e * w.n * w.k / 2;
    w.scale += e * w.n * w.k / 32;
    return w;
  };
  std::vector<uint8_t> y(in.y_bytes());
  for (int64_t token = 0; token < in.tokens; ++token) {
    std::vector<float> acc(static_cast<size_t>(hidden));
    for (int64_t slot = token * in.top_k; slot < (token + 1) * in.top_k; ++slot) {
      const int64_t e = in.ids[static_cast<size_t>(slot)];
      if (e < 0 || e >= in.experts) continue;
      const float weight = in.weights[static_cast<size_t>(slot)];
      std::vector<float> x(static_cast<size_t>(hidden));
      for (int64_t i = 0; i < hidden; ++i) {
        const float value = element_at(in.dtype, in.x.data(), token * hidden + i);
        x[static_cast<size_t>(i)] = router_on_input ? weight * value : value;
      }
      const std::vector<uint8_t> row = elements_of(in.dtype, x);
      std::vector<uint8_t> u(static_cast<size_t>(2 * inner * size));
      backend.multiply({Activations::floats(row.data(), in.dtype, to, 1, hidden),
                        of_expert(args.w13, e),
                        {u.data(), in.dtype, {in.w13_bias.data() + e * 2 * inner, 0, 1}}});
      const std::vector<uint8_t> h = elements_of(in.dtype, gated(gate, in.dtype, u.data(), inner));
      std::vector<float> v(static_cast<size_t>(hidden));
      backend.multiply({Activations::floats(h.data(), in.dtype, to, 1, inner),
                        of_expert(args.w2, e),
                        {v.data(), DType::f32, {in.w2_bias.data() + e * hidden, 0, 1}}});
      for (size_t i = 0; i < acc.size(); ++i) acc[i] = std::fma(router_on_input ? 1.0f : weight, v[i], acc[i]);
    }
    for (int64_t i = 0; i < hidden; ++i) store(in.dtype, y.data(), token * hidden + i, acc[static_cast<size_t>(i)]);
  }
  return y;
}
