// SPDX-License-Identifier: Apache-2.0
// Gates, rows that are gathered, and layers of experts, of every instruction set that this processor runs.
#include "native.h"

#include "cpu/experts.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

using namespace xpu_fp4;

namespace {

class NativeExperts : public NativeKernels {};

constexpr Gate kGates[] = {{GateKind::silu_mul, false},
                           {GateKind::silu_mul, true},
                           {GateKind::swiglu_oai, false, 1.702f, 7.0f},
                           {GateKind::swiglu_oai, true, 1.702f, 7.0f}};

// Gates and ups about every edge: zeros, limits, where the exponential ends, subnormals, and all sizes.
std::vector<float> gate_operands(int64_t count, unsigned seed) {
  std::vector<float> x = random_floats(count, seed, 8.0f);
  const float edges[] = {0.0f,  -0.0f,  7.0f,   -7.0f,   7.0001f, -7.0001f, 86.9f, -86.9f, 86.90001f, -86.90001f,
                         51.0f, -51.1f, 1e-40f, -1e-40f, 1e30f,   -1e30f,   1.0f,  -1.0f,  0x1p-126f, -0x1p-149f};
  std::mt19937 random(seed);
  for (float& value : x) {
    if (random() % 4 == 0) value = edges[random() % std::size(edges)];
  }
  return x;
}

// W of ones on the diagonal: a product in floats gives its activations.
Operands identity(int64_t k) {
  Operands in(1, k, k, 127, 127, 1);
  std::fill(in.w.begin(), in.w.end(), uint8_t{0});
  for (int64_t i = 0; i < k; ++i) in.w[static_cast<size_t>((i * k + i) / 2)] = i % 2 == 0 ? 0x02 : 0x20;
  return in;
}

// What a product in floats has for activations [rows, k].
std::vector<float> activations_of(const Backend& backend, const Activations& a) {
  const Operands in = identity(a.k);
  std::vector<float> y(static_cast<size_t>(a.m * a.k));
  backend.multiply({a, in.weight(), {y.data(), DType::f32, {nullptr, 0, 0}}});
  return y;
}

bool same_numbers(float a, float b) { return a == b || (a != a && b != b); }  // zeros of either sign are added to one

TEST_P(NativeExperts, GatesHaveTheBitsOfTheirDefinition) {
  const auto own = backend();
  for (const Gate& gate : kGates) {
    for (const DType dtype : kDTypes) {
      for (const int64_t k : {32, 96, 128, 160}) {
        constexpr int64_t kRows = 41;
        const std::vector<uint8_t> x = elements_of(dtype, gate_operands(kRows * 2 * k, 17));
        Quantizer to = {Format::none};
        to.transform.gate = gate;
        const std::vector<float> y = activations_of(*own, Activations::floats(x.data(), dtype, to, kRows, k));
        for (int64_t row = 0; row < kRows; ++row) {
          const std::vector<float> expected = gated(gate, dtype, x.data() + row * 2 * k * size_of(dtype), k);
          if (!std::all_of(expected.begin(), expected.end(), [](float value) { return std::fabs(value) < 1e37f; })) continue;
          for (int64_t i = 0; i < k; ++i) {
            ASSERT_EQ(y[static_cast<size_t>(row * k + i)], expected[static_cast<size_t>(i)]) << row << " " << i;
          }
        }
      }
    }
  }
}

// A special value in each place of the gate's half and of the up's, with any value beside it.
TEST_P(NativeExperts, GatesKeepSpecialValuesInTheirPlace) {
  const auto own = backend();
  const float specials[] = {INFINITY, -INFINITY, NAN, -NAN};
  constexpr int64_t kK = 64;
  for (const Gate& gate : kGates) {
    for (const DType dtype : kDTypes) {
      std::vector<float> floats = random_floats(2 * kK * 2 * kK, 19, 3.0f);
      for (size_t row = 0; row < 2 * kK; ++row) floats[row * 2 * kK + row] = specials[row % 4];
      const std::vector<uint8_t> x = elements_of(dtype, floats);
      Quantizer to = {Format::none};
      to.transform.gate = gate;
      const std::vector<float> y = activations_of(*own, Activations::floats(x.data(), dtype, to, 2 * kK, kK));
      for (int64_t row = 0; row < 2 * kK; ++row) {
        const int64_t i = gate.interleaved ? row / 2 : row % kK;
        const float expected = gated(gate, dtype, x.data() + row * 2 * kK * size_of(dtype), kK)[static_cast<size_t>(i)];
        ASSERT_TRUE(same_numbers(y[static_cast<size_t>(row * kK + i)], expected)) << row;
      }
    }
  }
}

// Codes keep the sign of a zero, and a block what is not finite.
TEST_P(NativeExperts, QuantizeGatesFirst) {
  const auto own = backend();
  const std::vector<float> offset = random_floats(2176, 32, 2.0f);
  for (const Quantizer& plain : {Quantizer::mxfp4(ScaleMode::even), Quantizer::mxint8(128)}) {
    for (const Gate& gate : kGates) {
      for (const auto& [hadamard, k] : {std::pair<int, int64_t>{0, 96}, {0, 2176}, {32, 160}, {128, 384}}) {
        constexpr int64_t kRows = 5;
        const DType dtype = kDTypes[k / 32 % 3];
        const std::vector<uint8_t> x = elements_of(dtype, gate_operands(kRows * 2 * k, 23));
        std::vector<float> h;
        for (int64_t row = 0; row < kRows; ++row) {
          const std::vector<float> of_row = gated(gate, dtype, x.data() + row * 2 * k * size_of(dtype), k);
          h.insert(h.end(), of_row.begin(), of_row.end());
        }
        std::vector<uint8_t> q[2], scale[2];
        for (int i = 0; i < 2; ++i) {
          Quantizer to = plain;
          to.transform = {hadamard, hadamard == 0 ? nullptr : offset.data(), i == 0 ? Gate{} : gate};
          q[i].resize(static_cast<size_t>(kRows * code_bytes(to.format, k)));
          scale[i].resize(static_cast<size_t>(kRows * k / 32));
          own->quantize({i == 0 ? static_cast<const void*>(h.data()) : x.data(), i == 0 ? DType::f32 : dtype, to, kRows, k,
                         q[i].data(), scale[i].data()});
        }
        ASSERT_EQ(q[0], q[1]) << k;
        ASSERT_EQ(scale[0], scale[1]) << k;
      }
    }
  }
}

TEST_P(NativeExperts, RowsAreGatheredAndScaled) {
  const auto own = backend();
  std::mt19937 random(29);
  for (const Quantizer& plain : {Quantizer::mxfp4(ScaleMode::even), Quantizer::mxint8(128), Quantizer{Format::none}}) {
    for (const DType dtype : kDTypes) {
      for (const int hadamard : {0, 32}) {
        constexpr int64_t kRows = 7, kM = 19, kK = 288;
        const Operands in(kM, 33, kK, 118, 126, 31);
        const std::vector<uint8_t> x = elements_of(dtype, random_floats(kRows * kK, 37, 6.0f));
        const std::vector<float> factors = random_floats(kM, 41, 2.0f);
        std::vector<int32_t> rows(kM);
        std::vector<float> taken, scaled;
        for (int64_t i = 0; i < kM; ++i) {
          rows[static_cast<size_t>(i)] = static_cast<int32_t>(random() % kRows);
          for (int64_t j = 0; j < kK; ++j) {
            taken.push_back(element_at(dtype, x.data(), rows[static_cast<size_t>(i)] * kK + j));
            scaled.push_back(factors[static_cast<size_t>(i)] * taken.back());
          }
        }
        Quantizer to = plain;
        to.transform.hadamard = hadamard;
        for (const bool with_factors : {false, true}) {
          const std::vector<uint8_t> dense = elements_of(dtype, with_factors ? scaled : taken);
          Activations gathered = Activations::floats(x.data(), dtype, to, kM, kK);
          gathered.rows = rows.data();
          gathered.factors = with_factors ? factors.data() : nullptr;
          std::vector<float> y(static_cast<size_t>(kM * in.n)), expected = y;
          own->multiply({gathered, in.weight(), {y.data(), DType::f32, {nullptr, 0, 0}}});
          own->multiply({Activations::floats(dense.data(), dtype, to, kM, kK),
                         in.weight(),
                         {expected.data(), DType::f32, {nullptr, 0, 0}}});
          ASSERT_TRUE(same_bits(y, expected)) << hadamard << with_factors;
        }
      }
    }
  }
}

const Quantizer kModes[] = {Quantizer::mxfp4(ScaleMode::even), Quantizer::mxint8(128), {Format::none}};

TEST_P(NativeExperts, ALayerOfExpertsIsItsSingleProducts) {
  const auto own = backend();
  const auto threads = cpu::make_backend(*GetParam(), in_reverse_on_threads);
  struct Shape {
    int64_t experts, tokens, top_k, hidden, inner;
  };
  unsigned seed = 43;
  for (const Shape& s : {Shape{1, 1, 1, 32, 32}, {5, 1, 4, 288, 96}, {6, 67, 3, 160, 96}, {3, 9, 2, 128, 416}}) {
    for (const Quantizer& to : kModes) {
      for (const bool router_on_input : {false, true}) {
        const Gate& gate = kGates[++seed % 4];
        const LayerOperands in(s.experts, s.tokens, s.top_k, s.hidden, s.inner, kDTypes[seed % 3], seed);
        const std::vector<uint8_t> expected = compose(*own, in, to, gate, router_on_input);
        for (const Backend* of : {own.get(), threads.get()}) {
          std::vector<uint8_t> y(in.y_bytes());
          of->experts(in.arguments(to, gate, router_on_input, y.data()));
          ASSERT_EQ(y, expected) << s.tokens << " x " << s.hidden << " x " << s.inner << " seed " << seed;
        }
      }
    }
  }
}

// More slots than are held at a time, so that a layer is several chunks of whole tokens.
TEST_P(NativeExperts, ChunksOfALayerDoNotShow) {
  const auto own = backend();
  const LayerOperands in(3, 5, cpu::kMostSlots / 2 - 1, 32, 32, DType::f16, 47);
  const LayerOperands one_token(3, 1, cpu::kMostSlots + 1, 32, 32, DType::f32, 48);
  for (const LayerOperands* of : {&in, &one_token}) {
    std::vector<uint8_t> y(of->y_bytes());
    own->experts(of->arguments(kModes[1], kGates[1], false, y.data()));
    EXPECT_EQ(y, compose(*own, *of, kModes[1], kGates[1], false));
  }
}

TEST_P(NativeExperts, ManyThreadsMayCallALayerAtOnce) {
  const auto own = backend();
  constexpr size_t kThreads = 8;
  std::vector<LayerOperands> in;
  for (unsigned i = 0; i < kThreads; ++i) in.emplace_back(4, 5 + i, 2, 160, 96, kDTypes[i % 3], 53 + i);
  std::vector<std::vector<uint8_t>> y(kThreads);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kThreads; ++i) {
    y[i].resize(in[i].y_bytes());
    threads.emplace_back([&, i] { own->experts(in[i].arguments(kModes[i % 3], kGates[i % 4], false, y[i].data())); });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < kThreads; ++i) ASSERT_EQ(y[i], compose(*own, in[i], kModes[i % 3], kGates[i % 4], false)) << i;
}

#if defined(__x86_64__)
TEST_P(NativeExperts, ALayerIgnoresTheCallersFloatEnvironment) {
  const auto own = backend();
  const LayerOperands in(3, 7, 2, 96, 64, DType::bf16, 59);
  const std::vector<uint8_t> expected = compose(*own, in, kModes[2], kGates[0], true);
  std::vector<uint8_t> y(in.y_bytes());
  const unsigned saved = _mm_getcsr();
  _mm_setcsr(saved | 0x8040u | 0x4000u);  // flush to zero, denormals are zero, round up
  own->experts(in.arguments(kModes[2], kGates[0], true, y.data()));
  _mm_setcsr(saved);
  EXPECT_EQ(y, expected);
}
#endif

INSTANTIATE_TEST_SUITE_P(, NativeExperts, testing::ValuesIn(cpu::all_kernels()), name_of);

}  // namespace
