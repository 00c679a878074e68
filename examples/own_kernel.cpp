// SPDX-License-Identifier: Apache-2.0
// A kernel of your own in C++, without torch: the library quantizes and multiplies, and a loop over the headers of
// csrc/format gives the same bits. `make ctest` builds and runs it; by hand, in a checkout where that has run:
//
//   g++ -std=c++17 -ffp-contract=off -Icsrc examples/own_kernel.cpp build/cmake/libxpu_fp4_cpu.a -o build/own_kernel
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/backend.h"
#include "format/accumulate.h"

using namespace xpu_fp4;

constexpr int64_t kM = 3, kN = 40, kK = 384;

// Y = A x W^T: K in quads of 128, as every kernel of the library sums it.
float own_kernel(const int8_t* a, const uint8_t* a_scale, const uint8_t* w, const uint8_t* w_scale) {
  float sum = 0.0f;
  for (int64_t block = 0; block < kK / kBlock; block += kQuad) {
    float p[kQuad] = {};
    for (int64_t b = 0; b < kQuad; ++b) {
      const int dot = block_dot(a + (block + b) * kBlock, w + (block + b) * kBlockBytes);
      p[b] = block_product(dot, row_factor(Format::mxint8, a_scale[block + b]), weight_factor(w_scale[block + b]));
    }
    sum = add_quad(sum, p[0], p[1], p[2], p[3]);
  }
  return sum;
}

int main() {
  // Magnitudes differ from block to block, so that another order of additions would give other bits.
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::vector<float> x(kM * kK), weight(kN * kK), y(kM * kN);
  for (float& v : x) v = normal(random);
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = std::ldexp(normal(random), static_cast<int>(i / kBlock * 7 % 23));

  const auto cpu = cpu::make_backend(cpu::best_kernels(), [](int64_t n, int64_t, const auto& body) { body(0, n); });
  std::vector<int8_t> a(kM * kK);       // MXINT8
  std::vector<uint8_t> w(kN * kK / 2);  // MXFP4
  std::vector<uint8_t> a_scale(kM * kK / kBlock), w_scale(kN * kK / kBlock);
  auto* codes = reinterpret_cast<uint8_t*>(a.data());
  cpu->quantize({x.data(), DType::f32, Quantizer::mxint8(128), kM, kK, codes, a_scale.data()});
  cpu->quantize({weight.data(), DType::f32, Quantizer::mxfp4(ScaleMode::even), kN, kK, w.data(), w_scale.data()});

  const Weight stored{WeightForm::stored, kN, kK, w.data(), w_scale.data(), kK / kBlock, 1};
  cpu->multiply({Activations::codes(Format::mxint8, codes, a_scale.data(), kM, kK), stored, {y.data(), DType::f32, {}}});

  int different = 0;
  for (int64_t i = 0; i < kM * kN; ++i) {
    const int64_t row = i / kN, column = i % kN;
    const float own =
        own_kernel(&a[row * kK], &a_scale[row * kK / kBlock], &w[column * kK / 2], &w_scale[column * kK / kBlock]);
    different += std::memcmp(&own, &y[i], sizeof(own)) != 0;
  }
  std::printf("%s kernels, %zu outputs, %d with other bits\n", cpu::best_kernels().isa, y.size(), different);
  return different != 0;
}
