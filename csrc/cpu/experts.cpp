// SPDX-License-Identifier: Apache-2.0
// Slots are sorted by expert, so that each expert multiplies all its rows at once; then each token gathers its slots again.
#include "experts.h"

#include <algorithm>
#include <vector>

#include "../format/integer.h"
#include "../format/strips.h"
#include "float_environment.h"
#include "grouped.h"
#include "scratch.h"

namespace xpu_fp4::cpu {
namespace {

// Multiplications of the last sum that are worth a thread.
constexpr int64_t kCombineWork = int64_t{1} << 18;

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

// The slots of some tokens, the first of which is token 0 of args.
class Chunk {
 public:
  Chunk(const KernelTable& kernels, const Experts& args)
      : kernels_(kernels), args_(args), first_(static_cast<size_t>(args.experts) + 1), row_of_slot_(to_size(slots()), -1) {
    sort();
  }

  void run(const ParallelFor& parallel_for) const {
    const int64_t rows = first_.back(), u_bytes = args_.w13.n * size_of(args_.dtype),
                  v_bytes = args_.w2.n * size_of(DType::f32);
    // v may lie where u does: it is written when all of u has been expanded.
    std::byte* results = scratch_of_thread(ScratchFor::results).take(to_size(rows * std::max(u_bytes, v_bytes)));
    Grouped up, down;
    for (int64_t expert = 0; expert < args_.experts; ++expert) {
      add(up, expert, args_.w13, args_.w13_bias, x_of(expert), {results, args_.dtype, {}});
      add(down, expert, args_.w2, args_.w2_bias, u_of(expert, results), {results, DType::f32, {}});
    }
    std::byte* expanded = scratch_of_thread(ScratchFor::activations).take(std::max(up.bytes(), down.bytes()));
    up.run(expanded, parallel_for);
    down.run(expanded, parallel_for);
    combine(results, parallel_for);
  }

 private:
  static size_t to_size(int64_t count) { return static_cast<size_t>(count); }
  int64_t slots() const { return args_.tokens * args_.top_k; }
  int64_t first_row(int64_t expert) const { return first_[to_size(expert)]; }
  int64_t rows(int64_t expert) const { return first_row(expert + 1) - first_row(expert); }

  // A counting sort: each slot's row, and the token and factor of each row. An expert's rows are in the order of their slots.
  void sort() {
    std::vector<int64_t> next(first_.size());
    for (int64_t slot = 0; slot < slots(); ++slot) ++next[to_size(expert_of(args_, slot) + 1)];
    next[0] = 0;  // slots of no expert
    for (size_t e = 1; e < next.size(); ++e) first_[e] = next[e] += next[e - 1];
    token_of_row_.resize(to_size(first_.back()));
    if (args_.router_on_input) factors_.resize(token_of_row_.size());
    next = first_;
    for (int64_t slot = 0; slot < slots(); ++slot) {
      const int64_t expert = expert_of(args_, slot);
      if (expert < 0) continue;
      const size_t row = to_size(next[to_size(expert)]++);
      row_of_slot_[to_size(slot)] = static_cast<int32_t>(row);
      token_of_row_[row] = static_cast<int32_t>(slot / args_.top_k);
      if (args_.router_on_input) factors_[row] = args_.weights[slot];
    }
  }

  Activations x_of(int64_t expert) const {
    Activations x = Activations::floats(args_.x, args_.dtype, args_.quantizer_of_x(), rows(expert), args_.w13.k);
    x.rows = token_of_row_.data() + first_row(expert);
    if (args_.router_on_input) x.factors = factors_.data() + first_row(expert);
    return x;
  }

  Activations u_of(int64_t expert, const std::byte* u) const {
    Quantizer to = args_.quantizer_of_h();
    to.transform.gate = args_.gate;
    const std::byte* data = u + first_row(expert) * args_.w13.n * size_of(args_.dtype);
    return Activations::floats(data, args_.dtype, to, rows(expert), args_.w2.k);
  }

  // An expert's rows of a product; y and bias are of the first expert.
  void add(Grouped& grouped, int64_t expert, const Weight& w, const float* bias, const Activations& a, Output out) const {
    if (a.m == 0 || w.n == 0) return;
    out.y = static_cast<std::byte*>(out.y) + first_row(expert) * w.n * size_of(out.dtype);
    if (bias != nullptr) out.bias = {bias + expert * w.n, 0, 1};
    grouped.add(kernels_.product(a), {a, of_expert(w, expert), out}, 0, a.m);
  }

  void combine(const std::byte* v, const ParallelFor& parallel_for) const {
    const Combine args = {reinterpret_cast<const float*>(v),
                          row_of_slot_.data(),
                          args_.router_on_input ? nullptr : args_.weights,
                          args_.top_k,
                          args_.w2.n,
                          args_.y,
                          args_.dtype};
    parallel_for(args_.tokens, ceil_div(kCombineWork, args.top_k * args.n + 1), [&](int64_t begin, int64_t end) {
      const DefaultFloatEnvironment environment;
      kernels_.combine(args, {begin, end});
    });
  }

  const KernelTable& kernels_;
  const Experts& args_;
  std::vector<int64_t> first_;        // row of each expert, and their number
  std::vector<int32_t> row_of_slot_;  // or -1
  std::vector<int32_t> token_of_row_;
  std::vector<float> factors_;  // of rows, where the router is on the input
};

Experts tokens_from(Experts args, int64_t first, int64_t count) {
  const int64_t size = size_of(args.dtype);
  args.x = static_cast<const std::byte*>(args.x) + first * args.w13.k * size;
  args.y = static_cast<std::byte*>(args.y) + first * args.w2.n * size;
  args.ids += first * args.top_k;
  args.weights += first * args.top_k;
  args.tokens = count;
  return args;
}

}  // namespace

void run_experts(const KernelTable& kernels, const ParallelFor& parallel_for, const Experts& args) {
  const int64_t most = std::max<int64_t>(kMostSlots / std::max<int64_t>(args.top_k, 1), 1);
  for (int64_t first = 0; first < args.tokens; first += most) {
    const Experts chunk = tokens_from(args, first, std::min(most, args.tokens - first));
    Chunk(kernels, chunk).run(parallel_for);
  }
}

}  // namespace xpu_fp4::cpu
