// SPDX-License-Identifier: Apache-2.0
// What the tests of the native kernels share: they run once for each instruction set that this processor has.
#pragma once
#include <gtest/gtest.h>

#include <thread>

#include "cpu/backend.h"
#include "layer.h"

namespace xpu_fp4 {

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

/// The kernels of an instruction set.
class NativeKernels : public testing::TestWithParam<const cpu::KernelTable*> {
 protected:
  void SetUp() override {
    if (!GetParam()->supported()) GTEST_SKIP() << "this processor has no " << GetParam()->isa;
  }
  std::unique_ptr<Backend> backend() const { return cpu::make_backend(*GetParam(), serial_for); }
};

inline std::string name_of(const testing::TestParamInfo<const cpu::KernelTable*>& info) { return info.param->isa; }

#if defined(__x86_64__)
/// AVX-VNNI's kernels, its instruction emulated: native_avx_vnni_test.cpp.
extern const cpu::KernelTable kEmulatedAvxVnni;
#endif

/// The kernels that have products of their own in this build, and the emulated ones.
inline std::vector<const cpu::KernelTable*> kernels_of_products() {
  std::vector<const cpu::KernelTable*> tables = cpu::all_kernels();
#if defined(__x86_64__)
  tables.push_back(&kEmulatedAvxVnni);
#endif
  return tables;
}

/// Element i of x, whose elements are of a dtype.
inline void store(DType dtype, std::vector<uint8_t>& x, size_t i, double value) {
  store(dtype, x.data(), static_cast<int64_t>(i), static_cast<float>(value));
}
inline double load(DType dtype, const std::vector<uint8_t>& x, size_t i) {
  const auto at = static_cast<int64_t>(i);
  return dtype == DType::f32   ? load<DType::f32>(x.data(), at)
         : dtype == DType::f16 ? load<DType::f16>(x.data(), at)
                               : load<DType::bf16>(x.data(), at);
}

inline std::vector<uint8_t> prepacked(const Operands& in) {
  const auto backend = cpu::make_backend(cpu::kPortable, serial_for);
  const PreparedShape shape = backend->prepared_shape(WeightForm::strips, in.n, in.k);
  std::vector<uint8_t> out(static_cast<size_t>(shape.rows * shape.row_bytes));
  backend->prepare(in.weight(), WeightForm::strips, out.data());
  return out;
}

inline Weight as_strips(const Operands& in, const std::vector<uint8_t>& strips) {
  return {WeightForm::strips, in.n, in.k, nullptr, nullptr, 0, 0, strips.data()};
}

// Each index on a thread of its own, the last first.
inline void in_reverse_on_threads(int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  std::vector<std::thread> threads;
  for (int64_t i = n; i-- > 0;) threads.emplace_back([&body, i] { body(i, i + 1); });
  for (std::thread& thread : threads) thread.join();
}

// Rows of a dtype, and what a transform makes of them.
struct Transformed {
  std::vector<uint8_t> x;
  std::vector<float> floats;

  Transformed(DType dtype, int64_t rows, int64_t k, const Transform& transform) : floats(random_floats(rows * k, 31, 12.0f)) {
    x.resize(floats.size() * static_cast<size_t>(size_of(dtype)));
    for (size_t i = 0; i < floats.size(); ++i) {
      const auto index = static_cast<int64_t>(i);
      store(dtype, x.data(), index, floats[i]);
      floats[i] = dtype == DType::f32   ? load<DType::f32>(x.data(), index)
                  : dtype == DType::f16 ? load<DType::f16>(x.data(), index)
                                        : load<DType::bf16>(x.data(), index);
    }
    for (int64_t row = 0; row < rows; ++row) {
      definition::transform(floats.data() + row * k, k, transform.hadamard, transform.offset);
    }
  }
};

// Calls function(dtype, K, transform) for each size, with an offset and without, in rows of whole and broken quads.
template <class Function>
void for_transforms(const Function& function) {
  const std::vector<float> offset = random_floats(2176, 32, 2.0f);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const auto& [size, k] : {std::pair<int, int64_t>{0, 96}, {32, 160}, {64, 192}, {128, 384}, {128, 2176}, {32, 1056}}) {
      function(dtype, k, Transform{size, offset.data()});
      if (size != 0) function(dtype, k, Transform{size});
    }
  }
}

}  // namespace xpu_fp4
