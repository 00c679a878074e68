// SPDX-License-Identifier: Apache-2.0
// The native kernels of every instruction set touch their operands and nothing beside them: each lies against a page that may
// be neither read nor written, once at its end and once at its beginning. A kernel that strays ends the program.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <memory>

#include "layer.h"

using namespace xpu_fp4;

namespace {

enum class Against { end, beginning };

// Memory between two pages that trap.
class Guarded {
 public:
  Guarded(size_t bytes, Against against) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    const size_t inner = (bytes + page_ - 1) / page_ * page_;
    mapped_ = inner + 2 * page_;
    base_ = static_cast<uint8_t*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(base_, page_, PROT_NONE);
    mprotect(base_ + page_ + inner, page_, PROT_NONE);
    data_ = base_ + page_ + (against == Against::end ? inner - bytes : 0);
  }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  template <class T = uint8_t>
  T* data() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  size_t page_, mapped_;
  uint8_t *base_, *data_;
};

// Gives out guarded memory, and keeps it.
class Memory {
 public:
  explicit Memory(Against against) : against_(against) {}

  template <class T>
  T* fresh(size_t count) {
    held_.push_back(std::make_unique<Guarded>(count * sizeof(T), against_));
    return held_.back()->data<T>();
  }
  template <class T>
  T* copy(const std::vector<T>& values) {
    T* const data = fresh<T>(values.size());
    std::copy(values.begin(), values.end(), data);
    return data;
  }

 private:
  Against against_;
  std::vector<std::unique_ptr<Guarded>> held_;
};

class Guards : public testing::TestWithParam<std::tuple<const cpu::KernelTable*, Against>> {
 protected:
  void SetUp() override {
    if (!kernels().supported()) GTEST_SKIP() << "this processor has no " << kernels().isa;
  }
  const cpu::KernelTable& kernels() const { return *std::get<0>(GetParam()); }
  std::unique_ptr<Backend> backend() const { return cpu::make_backend(kernels(), serial_for); }
  Memory memory() const { return Memory(std::get<1>(GetParam())); }
};

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};
// Sizes on both sides of the vectors, tiles, strips and quads.
constexpr int64_t kDepths[] = {32, 64, 96, 128, 160, 288, 416};
constexpr int64_t kRows[] = {1, 2, 5, 17};
constexpr int64_t kColumns[] = {1, 15, 16, 33};

std::vector<uint8_t> elements(DType dtype, int64_t count, unsigned seed) {
  return elements_of(dtype, random_floats(count, seed, 4.0f));
}

std::vector<Transform> transforms(int64_t k, const float* offset) {
  std::vector<Transform> out = {{}, {0, offset}};
  for (const int size : {32, 64, 128}) {
    if (k % size == 0) out.push_back({size, offset});
  }
  return out;
}

std::vector<Quantizer> quantizers() {
  return {Quantizer::mxfp4(ScaleMode::even), Quantizer::mxint8(32), Quantizer::mxint8(128)};
}

TEST_P(Guards, QuantizersStayInside) {
  for (const DType dtype : kDTypes) {
    for (const int64_t k : kDepths) {
      Memory memory = this->memory();
      const uint8_t* x = memory.copy(elements(dtype, 3 * k, 1));
      const float* offset = memory.copy(random_floats(k, 2, 1.0f));
      for (Quantizer to : quantizers()) {
        for (const Transform& transform : transforms(k, offset)) {
          to.transform = transform;
          auto* q = memory.fresh<uint8_t>(static_cast<size_t>(3 * code_bytes(to.format, k)));
          auto* scale = memory.fresh<uint8_t>(static_cast<size_t>(3 * k / 32));
          backend()->quantize({x, dtype, to, 3, k, q, scale});
        }
      }
      auto* codes = memory.fresh<uint8_t>(static_cast<size_t>(3 * k / 2));
      auto* scales = memory.fresh<float>(static_cast<size_t>(3 * k / 32));
      backend()->group_quantize({x, dtype, 3, k, 100, codes, scales, k / 32, 1});
    }
  }
}

TEST_P(Guards, DequantizersStayInside) {
  for (const DType dtype : kDTypes) {
    for (const int64_t k : kDepths) {
      for (const Format format : {Format::mxfp4, Format::mxint8}) {
        Memory memory = this->memory();
        const Operands in(3, 1, k, 0, 255, 3, format);
        auto* out = memory.fresh<uint8_t>(static_cast<size_t>(3 * k * size_of(dtype)));
        backend()->dequantize({format, memory.copy(in.a), memory.copy(in.a_scale), 3, k, out, dtype});
      }
    }
  }
}

// Each product, with the weight as it is stored and as strips, gives the bits that it gives in ordinary memory.
void multiply_inside(const Backend& backend, Memory& memory, const Operands& in, const Activations& a, DType dtype) {
  const PreparedShape shape = backend.prepared_shape(WeightForm::strips, in.n, in.k);
  auto* strips = memory.fresh<uint8_t>(static_cast<size_t>(shape.rows * shape.row_bytes));
  const Weight stored = {WeightForm::stored, in.n, in.k, memory.copy(in.w), memory.copy(in.w_scale), in.k / 32, 1};
  backend.prepare(stored, WeightForm::strips, strips);
  const Weight prepared = {WeightForm::strips, in.n, in.k, nullptr, nullptr, 0, 0, strips};
  backend.restore(prepared, memory.fresh<uint8_t>(in.w.size()), memory.fresh<uint8_t>(in.w_scale.size()));
  const Bias bias = {memory.copy(random_floats(in.n, 5, 1.0f)), 0, 1};
  const auto bytes = static_cast<size_t>(in.m * in.n * size_of(dtype));
  std::vector<uint8_t> expected(bytes);
  backend.multiply({a, in.weight(), {expected.data(), dtype, bias}});
  for (const Weight& weight : {stored, prepared}) {
    auto* y = memory.fresh<uint8_t>(bytes);
    backend.multiply({a, weight, {y, dtype, bias}});
    ASSERT_EQ(std::memcmp(y, expected.data(), bytes), 0) << in.m << " x " << in.n << " x " << in.k;
  }
}

TEST_P(Guards, ProductsOfCodesStayInside) {
  for (const Format format : {Format::mxfp4, Format::mxint8}) {
    for (const int64_t k : kDepths) {
      for (const int64_t m : kRows) {
        for (const int64_t n : kColumns) {
          Memory memory = this->memory();
          const Operands in(m, n, k, 100, 140, 4, format);
          const Activations a = Activations::codes(format, memory.copy(in.a), memory.copy(in.a_scale), m, k);
          multiply_inside(*backend(), memory, in, a, kDTypes[(m + n) % 3]);
        }
      }
    }
  }
}

TEST_P(Guards, ProductsOfFloatsStayInside) {
  std::vector<Quantizer> all = quantizers();
  all.push_back({Format::none});
  for (const int64_t k : kDepths) {
    const std::vector<float> offset = random_floats(k, 7, 1.0f);
    for (const int64_t m : kRows) {
      for (size_t i = 0; i < all.size(); ++i) {
        Memory memory = this->memory();
        const DType dtype = kDTypes[(static_cast<size_t>(m) + i) % 3];
        const uint8_t* x = memory.copy(elements(dtype, m * k, 6));
        const Operands in(m, 33, k, 100, 140, 4);
        for (const Transform& transform : transforms(k, memory.copy(offset))) {
          all[i].transform = transform;
          multiply_inside(*backend(), memory, in, Activations::floats(x, dtype, all[i], m, k), dtype);
        }
      }
    }
  }
}

TEST_P(Guards, LayersOfExpertsStayInside) {
  const Gate gates[] = {{GateKind::silu_mul, false}, {GateKind::swiglu_oai, true, 1.702f, 7.0f}};
  unsigned seed = 60;
  for (const auto& [tokens, hidden, inner] : {std::array<int64_t, 3>{1, 288, 96}, {17, 160, 32}, {5, 32, 416}}) {
    for (const Quantizer& to : {Quantizer::mxfp4(ScaleMode::even), Quantizer::mxint8(128), Quantizer{Format::none}}) {
      for (const Gate& gate : gates) {
        Memory memory = this->memory();
        const bool router_on_input = ++seed % 2 == 0;
        const LayerOperands in(4, tokens, 3, hidden, inner, kDTypes[seed % 3], seed);
        Experts args = in.arguments(to, gate, router_on_input, memory.fresh<uint8_t>(in.y_bytes()));
        args.x = memory.copy(in.x);
        args.ids = memory.copy(in.ids);
        args.weights = memory.copy(in.weights);
        args.w13_bias = memory.copy(in.w13_bias);
        args.w2_bias = memory.copy(in.w2_bias);
        args.w13.codes = memory.copy(in.w13.w);
        args.w13.scale = memory.copy(in.w13.w_scale);
        args.w2.codes = memory.copy(in.w2.w);
        args.w2.scale = memory.copy(in.w2.w_scale);
        backend()->experts(args);
        const std::vector<uint8_t> expected = compose(*backend(), in, to, gate, router_on_input);
        ASSERT_EQ(std::memcmp(args.y, expected.data(), expected.size()), 0) << seed;

        for (Weight* weight : {&args.w13, &args.w2}) {
          const PreparedShape shape = backend()->prepared_shape(WeightForm::strips, weight->n, weight->k);
          const int64_t bytes = shape.rows * shape.row_bytes;
          auto* strips = memory.fresh<uint8_t>(static_cast<size_t>(in.experts * bytes));
          for (int64_t e = 0; e < in.experts; ++e) {
            Weight stored = *weight;
            stored.codes += e * stored.n * stored.k / 2;
            stored.scale += e * stored.n * stored.k / 32;
            backend()->prepare(stored, WeightForm::strips, strips + e * bytes);
          }
          *weight = {WeightForm::strips, weight->n, weight->k, nullptr, nullptr, 0, 0, strips};
        }
        args.y = memory.fresh<uint8_t>(in.y_bytes());
        backend()->experts(args);
        ASSERT_EQ(std::memcmp(args.y, expected.data(), expected.size()), 0) << "strips, seed " << seed;
      }
    }
  }
}

TEST_P(Guards, GatedQuantizersStayInside) {
  for (const DType dtype : kDTypes) {
    for (const int64_t k : kDepths) {
      for (const bool interleaved : {false, true}) {
        Memory memory = this->memory();
        const uint8_t* x = memory.copy(elements(dtype, 3 * 2 * k, 1));
        for (Quantizer to : quantizers()) {
          to.transform.gate = {GateKind::silu_mul, interleaved};
          auto* q = memory.fresh<uint8_t>(static_cast<size_t>(3 * code_bytes(to.format, k)));
          backend()->quantize({x, dtype, to, 3, k, q, memory.fresh<uint8_t>(static_cast<size_t>(3 * k / 32))});
        }
      }
    }
  }
}

std::string name_of(const testing::TestParamInfo<Guards::ParamType>& info) {
  return std::string(std::get<0>(info.param)->isa) + (std::get<1>(info.param) == Against::end ? "_end" : "_beginning");
}

INSTANTIATE_TEST_SUITE_P(, Guards,
                         testing::Combine(testing::ValuesIn(cpu::all_kernels()),
                                          testing::Values(Against::end, Against::beginning)),
                         name_of);

}  // namespace
