// SPDX-License-Identifier: Apache-2.0
// Slots are sorted by expert, so that each expert multiplies all its rows at once; then each token gathers its slots again.
#include "experts.h"

#include <cstring>
#include <vector>

#include "../format/strips.h"
#include "float_environment.h"

namespace xpu_fp4::cpu {
namespace {

float load(DType type, const void* data, int64_t i) {
  if (type == DType::f32) return xpu_fp4::load<DType::f32>(data, i);
  return type == DType::f16 ? xpu_fp4::load<DType::f16>(data, i) : xpu_fp4::load<DType::bf16>(data, i);
}

// The expert here that a slot asks for, or -1.
int64_t expert_of(const Experts& args, int64_t slot) {
  int64_t id = args.ids[slot];
  if (args.map != nullptr) id = id >= 0 && id < args.map_size ? args.map[id] : -1;
  return id >= 0 && id < args.experts ? id : -1;
}

Weight of_expert(Weight w, int64_t expert) {
  if (w.form == WeightForm::strips) {
    w.prepared += expert * strips::count(w.n) * strips::strip_bytes(w.k);
  } else {
    w.codes += expert * w.n * w.k / 2;
    w.scale += expert * w.n * w.k / kBlock;
  }
  return w;
}

Output output_of(void* y, DType dtype, const float* bias, const Weight& w, int64_t expert) {
  return {y, dtype, bias == nullptr ? Bias{nullptr, 0, 0} : Bias{bias + expert * w.n, 0, 1}};
}

struct Slot {
  int64_t row;  // of the sorted rows, or -1
  float weight;
};

class Layer {
 public:
  Layer(const Backend& backend, const Experts& args) : backend_(backend), args_(args), slots_(args.tokens * args.top_k) {
    std::vector<int64_t> next(static_cast<size_t>(args.experts) + 1, 0);
    for (int64_t slot = 0; slot < slots(); ++slot) {
      const int64_t expert = expert_of(args, slot);
      if (expert >= 0) ++next[static_cast<size_t>(expert) + 1];
    }
    for (size_t e = 1; e < next.size(); ++e) next[e] += next[e - 1];
    first_ = next;
    tokens_.resize(static_cast<size_t>(first_.back()));
    for (int64_t slot = 0; slot < slots(); ++slot) {
      const int64_t expert = expert_of(args, slot);
      slots_[static_cast<size_t>(slot)] = {-1, args.weights[slot]};
      if (expert < 0) continue;
      const int64_t row = next[static_cast<size_t>(expert)]++;
      slots_[static_cast<size_t>(slot)].row = row;
      tokens_[static_cast<size_t>(row)] = {slot / args.top_k, args.weights[slot]};
    }
  }

  void run() {
    const int64_t rows = first_.back(), hidden = args_.w13.k, inner = args_.w2.k, size = size_of(args_.dtype);
    std::vector<uint8_t> x(static_cast<size_t>(rows * hidden * size)), u(static_cast<size_t>(rows * 2 * inner * size));
    std::vector<uint8_t> h(static_cast<size_t>(rows * inner * size));
    std::vector<float> v(static_cast<size_t>(rows * args_.w2.n));
    gather(x.data());
    multiply(args_.w13, args_.w13_bias, x.data(), u.data(), args_.dtype);
    {
      const DefaultFloatEnvironment environment;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < inner; ++i) {
          const float g = load(args_.dtype, u.data(), row * 2 * inner + args_.gate.gate_at(i));
          const float up = load(args_.dtype, u.data(), row * 2 * inner + args_.gate.up_at(i, inner));
          store(args_.dtype, h.data(), row * inner + i, gate::apply(args_.gate, g, up));
        }
      }
    }
    multiply(args_.w2, args_.w2_bias, h.data(), v.data(), DType::f32);
    combine(v.data());
  }

 private:
  int64_t slots() const { return args_.tokens * args_.top_k; }

  void gather(uint8_t* x) const {
    const DefaultFloatEnvironment environment;
    const int64_t k = args_.w13.k, row_bytes = k * size_of(args_.dtype);
    for (size_t row = 0; row < tokens_.size(); ++row, x += row_bytes) {
      const auto [token, weight] = tokens_[row];
      if (!args_.router_on_input) {
        std::memcpy(x, static_cast<const uint8_t*>(args_.x) + token * row_bytes, static_cast<size_t>(row_bytes));
        continue;
      }
      for (int64_t i = 0; i < k; ++i) store(args_.dtype, x, i, weight * load(args_.dtype, args_.x, token * k + i));
    }
  }

  void multiply(const Weight& w, const float* bias, const uint8_t* a, void* y, DType dtype) const {
    for (int64_t expert = 0; expert < args_.experts; ++expert) {
      const int64_t first = first_[static_cast<size_t>(expert)], rows = first_[static_cast<size_t>(expert) + 1] - first;
      if (rows == 0 || w.n == 0) continue;
      void* out = static_cast<uint8_t*>(y) + first * w.n * size_of(dtype);
      backend_.multiply({Activations::floats(a + first * w.k * size_of(args_.dtype), args_.dtype, args_.to, rows, w.k),
                         of_expert(w, expert), output_of(out, dtype, bias, w, expert)});
    }
  }

  void combine(const float* v) const {
    const DefaultFloatEnvironment environment;
    const int64_t n = args_.w2.n;
    for (int64_t token = 0; token < args_.tokens; ++token) {
      for (int64_t i = 0; i < n; ++i) {
        float acc = 0.0f;
        for (int64_t j = 0; j < args_.top_k; ++j) {
          const Slot& slot = slots_[static_cast<size_t>(token * args_.top_k + j)];
          if (slot.row >= 0) acc = __builtin_fmaf(args_.router_on_input ? 1.0f : slot.weight, v[slot.row * n + i], acc);
        }
        store(args_.dtype, args_.y, token * n + i, acc);
      }
    }
  }

  struct Source {
    int64_t token;
    float weight;
  };

  const Backend& backend_;
  const Experts& args_;
  std::vector<Slot> slots_;
  std::vector<int64_t> first_;  // sorted row of each expert, and their number
  std::vector<Source> tokens_;  // of each sorted row
};

}  // namespace

void run_experts(const Backend& backend, const Experts& args) { Layer(backend, args).run(); }

}  // namespace xpu_fp4::cpu
