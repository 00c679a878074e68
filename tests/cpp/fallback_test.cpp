// SPDX-License-Identifier: Apache-2.0
// What the SYCL backend does where a device's compiler does not take a kernel: it launches the next one. On a queue that
// launches nothing and is told what it cannot build. And that an explanation of a call names the kernels that the call
// launches.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <set>
#include <string>
#include <vector>

#include "sycl/backend.h"
#include "sycl/explain.h"
#include "sycl/queue.h"

using namespace xpu_fp4;
using namespace xpu_fp4::syclrt;

namespace {

class FakeQueue final : public Queue {
 public:
  FakeQueue(std::set<std::string> refused, std::vector<std::string>& launched, std::vector<Variant>* variants = nullptr,
            const Architecture* architecture = architecture_of(uint64_t{20} << 30, 0))
      : refused_(std::move(refused)), launched_(launched), variants_(variants), architecture_(architecture) {}

  std::string device_name() const override { return "a GPU"; }
  bool is_gpu() const override { return true; }
  int64_t compute_units() const override { return 160; }
  const Architecture* architecture() const override { return architecture_; }
  Target target() const override { return {architecture_->sub_group, true}; }
  std::shared_ptr<void> allocate(int64_t bytes) const override {
    return {std::aligned_alloc(64, static_cast<size_t>(bytes + 63) / 64 * 64), std::free};
  }

 private:
  void submit(const Variant& variant, const char* kernel, const Range&, const std::vector<Argument>&) const override {
    for (const auto& [name, value] : variant.macros) {
      if (name == "MATRIX_UNIT" && value == 1 && refused_.count("matrix unit") != 0) throw CannotBuild("no matrix unit");
      if (name == "WEIGHT_OPERAND" && refused_.count(value == 0 ? "int4" : "int8") != 0) {
        throw CannotBuild("the compiler's log of " + variant.label);
      }
    }
    if (refused_.count(kernel) != 0) throw CannotBuild(std::string("no ") + kernel);
    launched_.emplace_back(kernel);
    if (variants_ != nullptr) variants_->push_back(variant);
  }

  std::set<std::string> refused_;
  std::vector<std::string>& launched_;
  std::vector<Variant>* variants_;
  const Architecture* architecture_;
};

// The last kernel that was launched: the product.
std::string kernel_of(const std::set<std::string>& refused, int64_t m, Format to) {
  std::vector<std::string> launched;
  const auto backend = make_backend(std::make_unique<FakeQueue>(refused, launched));
  constexpr int64_t k = 4096, n = 4096;
  static std::vector<uint8_t> memory(static_cast<size_t>(k * n));
  backend->multiply({Activations::floats(memory.data(), DType::bf16, {to}, m, k),
                     {WeightForm::stored, n, k, memory.data(), memory.data(), k / kBlock, 1},
                     {memory.data(), DType::bf16, {nullptr, 0, 0}}});
  return launched.empty() ? "none" : launched.back();
}

TEST(Fallback, TheFirstChoiceRunsWhereItBuilds) {
  EXPECT_EQ(kernel_of({}, 1024, Format::mxfp4), "gemm_large");
  EXPECT_EQ(kernel_of({}, 1, Format::mxfp4), "gemm_small");
}

TEST(Fallback, ManyRowsTakeTheKernelForFewWhereTheirOwnDoesNotBuild) {
  for (const Format to : {Format::mxfp4, Format::mxint8}) EXPECT_EQ(kernel_of({"gemm_large"}, 1024, to), "gemm_small");
}

// A linear of five rows: what was launched for it, by the labels of the variants, and what was said of it.
struct Launched {
  std::vector<std::string> kernels, labels;
  std::string said;
};
Launched five_rows(const std::set<std::string>& refused, Format to, bool expect_error = false) {
  Launched found;
  std::vector<Variant> variants;
  const auto backend = make_backend(std::make_unique<FakeQueue>(refused, found.kernels, &variants));
  static std::vector<uint8_t> memory(1 << 20);
  testing::internal::CaptureStderr();
  const auto multiply = [&] {
    backend->multiply({Activations::floats(memory.data(), DType::bf16, {to}, 5, 512),
                       {WeightForm::stored, 512, 512, memory.data(), memory.data(), 16, 1},
                       {memory.data(), DType::bf16, {nullptr, 0, 0}}});
  };
  if (expect_error) {
    EXPECT_THROW(multiply(), CannotBuild);
  } else {
    multiply();
  }
  found.said = testing::internal::GetCapturedStderr();
  for (const Variant& variant : variants) found.labels.push_back(variant.label);
  return found;
}

TEST(Fallback, FewRowsTakeWeightsAsInt8WhereTheInt4FormDoesNotBuild) {
  const Launched first = five_rows({"int4"}, Format::mxfp4);
  EXPECT_EQ(first.kernels, (std::vector<std::string>{"quantize_expand", "gemm_small"}));  // activations once
  EXPECT_EQ(first.labels.back(), "8 rows, W as int8");
  EXPECT_NE(first.said.find("the compiler's log of 8 rows\n"), std::string::npos) << first.said;
  EXPECT_NE(first.said.find("weights as int8 instead"), std::string::npos) << first.said;
  EXPECT_EQ(five_rows({"int4"}, Format::mxfp4).said, "");  // once
  EXPECT_EQ(five_rows({"int4"}, Format::mxint8).labels.back(), "8 rows, W4A8, W as int8");
}

TEST(Fallback, WhereNeitherFormOfFewRowsBuildsTheWarningHasBothLogs) {
  const Launched found = five_rows({"int4", "int8"}, Format::mxfp4);
  EXPECT_EQ(found.kernels.back(), "gemm");
  EXPECT_NE(found.said.find("log of 8 rows\nthe compiler's log of 8 rows, W as int8\n"), std::string::npos) << found.said;
  EXPECT_EQ(found.said.find("as int8 instead"), std::string::npos) << found.said;
}

TEST(Fallback, AnOperandThatWasAskedForIsNotReplacedByTheOther) {
  setenv("XPU_FP4_WEIGHT_OPERAND", "int4", 1);
  EXPECT_EQ(five_rows({"int4"}, Format::mxfp4).kernels.back(), "gemm");
  unsetenv("XPU_FP4_WEIGHT_OPERAND");
  setenv("XPU_FP4_SYCL_VARIANT", "bmg:small", 1);
  (void)five_rows({"int4"}, Format::mxfp4, true);
  unsetenv("XPU_FP4_SYCL_VARIANT");
}

TEST(Explanation, NamesWhatTheBackendLaunches) {
  constexpr int64_t n = 4096, k = 4096;
  for (const Format to : {Format::mxfp4, Format::mxint8, Format::none}) {
    for (const int64_t m : {1, 33, 1024}) {
      std::vector<std::string> launched, explained;
      const auto call = [&](const Backend& backend) {
        uint8_t* at = nullptr;
        backend.multiply({Activations::floats(at, DType::bf16, {to}, m, k),
                          {WeightForm::stored, n, k, at, at, k / kBlock, 1},
                          {at, DType::bf16, {nullptr, 0, 0}}});
      };
      call(*make_backend(std::make_unique<FakeQueue>(std::set<std::string>{}, launched)));
      const Explanation found = explain(planned_device("bmg", 160), call);
      for (const ExplainedLaunch& launch : found.launches) explained.push_back(launch.kernel);
      EXPECT_EQ(explained, launched);
      EXPECT_EQ(found.kernel, launched.back());
    }
  }
}

TEST(Explanation, SaysWhatFewRowsDecodeWeightsTo) {
  const auto variant = [](int64_t m) {
    return explain(planned_device("bmg", 0), [m](const Backend& backend) {
      uint8_t* at = nullptr;
      backend.multiply({Activations::floats(at, DType::bf16, {Format::mxfp4}, m, 4096),
                        {WeightForm::stored, 4096, 4096, at, at, 128, 1},
                        {at, DType::bf16, {nullptr, 0, 0}}});
    }).variant;
  };
  EXPECT_EQ(variant(1), "bmg 1 rows");
  setenv("XPU_FP4_WEIGHT_OPERAND", "int8", 1);
  EXPECT_EQ(variant(1), "bmg 1 rows, W as int8");
  EXPECT_EQ(variant(1024).find("int8"), std::string::npos);
  setenv("XPU_FP4_WEIGHT_OPERAND", "int4", 1);
  EXPECT_EQ(variant(1), "bmg 1 rows");
  unsetenv("XPU_FP4_WEIGHT_OPERAND");
}

TEST(Explanation, CountsTheMemoryThatIsHeldAtATime) {
  const Explanation found = explain(planned_device("bmg", 0), [](const Backend& backend) {
    uint8_t* at = nullptr;
    backend.multiply({Activations::floats(at, DType::bf16, {Format::mxfp4}, 1024, 4096),
                      {WeightForm::stored, 4096, 4096, at, at, 128, 1},
                      {at, DType::bf16, {nullptr, 0, 0}}});
  });
  // Expanded, an element takes a byte and an exponent for each block, 1/32; both operands are held, rows in tiles of 48.
  constexpr int64_t rows = 22 * 48;
  EXPECT_EQ(found.kernel, "gemm_large");
  EXPECT_NEAR(static_cast<double>(found.scratch_bytes), (rows + 4096) * 4096 * 33.0 / 32, 1e5);
}

TEST(Fallback, TheLastKernelIsThePortableOne) {
  for (const Format to : {Format::mxfp4, Format::mxint8}) {
    EXPECT_EQ(kernel_of({"gemm_large", "gemm_small"}, 1024, to), "gemm");
    EXPECT_EQ(kernel_of({"gemm_small"}, 1, to), "gemm");
  }
  EXPECT_EQ(kernel_of({"gemm_w4a16_matrix"}, 1024, Format::none), "gemm_w4a16");
}

TEST(Fallback, ThePortableProductNeedsNoMatrixUnit) {
  std::vector<std::string> launched;
  const auto backend = make_backend(std::make_unique<FakeQueue>(std::set<std::string>{"matrix unit"}, launched));
  static std::vector<uint8_t> memory(1 << 16);
  backend->multiply({Activations::codes(Format::mxfp4, memory.data(), memory.data(), 4, 256),
                     {WeightForm::stored, 64, 256, memory.data(), memory.data(), 8, 1},
                     {memory.data(), DType::bf16, {nullptr, 0, 0}}});
  EXPECT_EQ(launched, std::vector<std::string>{"gemm"});
}

void expect_ahead_of_time(const Architecture& architecture, const std::vector<Variant>& needed) {
  static const std::vector<Variant> ahead = ahead_of_time("gpus");
  for (const Variant& variant : needed) {
    const auto same = [&](const Variant& other) { return other.file == variant.file && other.macros == variant.macros; };
    EXPECT_TRUE(std::any_of(ahead.begin(), ahead.end(), same))
        << architecture.name << " " << variant.file << " " << variant.label;
  }
}

constexpr int64_t kMost = 4096;

/// A linear on memory that holds anything, in launches of a GPU of the architecture.
std::vector<Variant> programs_of(const Architecture& architecture, const Quantizer& to, DType of, ProductShape shape) {
  static const std::shared_ptr<uint8_t> memory(static_cast<uint8_t*>(std::aligned_alloc(64, kMost * kMost)), std::free);
  std::vector<std::string> launched;
  std::vector<Variant> needed;
  const auto backend = make_backend(std::make_unique<FakeQueue>(std::set<std::string>{}, launched, &needed, &architecture));
  backend->multiply({Activations::floats(memory.get(), of, to, shape.m, shape.k),
                     {shape.expanded ? WeightForm::expanded : WeightForm::stored, shape.n, shape.k, memory.get(), memory.get(),
                      shape.k / kBlock, 1, memory.get()},
                     {memory.get(), of, {nullptr, 0, 0}}});
  return needed;
}

// What a GPU runs without compiling: any dense linear of 16-bit floats whose K is in whole quads.
TEST(Fallback, ProgramsOfLinearsAreCompiledAheadOfTime) {
  for (const Architecture& architecture : architectures()) {
    for (const Format to : {Format::mxfp4, Format::mxint8, Format::none}) {
      for (const DType of : {DType::bf16, DType::f16}) {
        for (const int64_t m : {1, 2, 8, 16, 32, 100, 256, 1024}) {
          for (const int64_t n : {int64_t{1024}, kMost}) {  // few columns: medium tiles
            expect_ahead_of_time(architecture, programs_of(architecture, {to}, of, {m, n, kMost, false}));
          }
        }
      }
    }
  }
  EXPECT_THROW(ahead_of_time("everybody"), std::runtime_error);
}

// The shapes of python/xpu_fp4/cli/bring_up.py, and doctor's own in float32.
TEST(Fallback, ProgramsOfDoctorAreCompiledAheadOfTime) {
  for (const Architecture& architecture : architectures()) {
    for (const Format to : {Format::mxfp4, Format::mxint8}) {
      expect_ahead_of_time(architecture, programs_of(architecture, {to}, DType::f32, {37, 21, 384, false}));
    }
    for (const auto& [kernel, m] : {std::pair{"small", 5}, {"medium", 200}, {"large", 200}, {"portable", 37}}) {
      const bool portable = kernel == std::string("portable");
      setenv("XPU_FP4_SYCL_VARIANT", (portable ? kernel : std::string(architecture.name) + ":" + kernel).c_str(), 1);
      for (const Format to : {Format::mxfp4, Format::mxint8}) {
        Quantizer transformed = {to};
        transformed.transform.hadamard = 32;
        for (const Quantizer& quantizer : {Quantizer{to}, transformed}) {
          expect_ahead_of_time(architecture, programs_of(architecture, quantizer, DType::bf16, {m, 96, 416, false}));
        }
        if (!portable) expect_ahead_of_time(architecture, programs_of(architecture, {to}, DType::bf16, {m, 96, 416, true}));
        setenv("XPU_FP4_WEIGHT_OPERAND", "int8", 1);
        expect_ahead_of_time(architecture, programs_of(architecture, {to}, DType::bf16, {m, 96, 416, false}));
        unsetenv("XPU_FP4_WEIGHT_OPERAND");
      }
      for (const DType of : {DType::bf16, DType::f16}) {
        expect_ahead_of_time(architecture, programs_of(architecture, {Format::none}, of, {m, 96, 416, false}));
      }
      unsetenv("XPU_FP4_SYCL_VARIANT");
    }
  }
}

TEST(Fallback, ExpertsFallBackToInt8WeightsAndToThePortableKernels) {
  static std::vector<uint8_t> memory(1 << 20);
  const std::vector<int32_t> ids(8, 0);
  const std::vector<float> weights(8, 1.0f);
  for (const std::set<std::string>& refused : {std::set<std::string>{}, {"int4"}, {"gemm_small", "gemm_large"}}) {
    std::vector<std::string> launched;
    std::vector<Variant> variants;
    const auto backend = make_backend(std::make_unique<FakeQueue>(refused, launched, &variants));
    const auto weight = [](int64_t n, int64_t k) -> Weight {
      return {WeightForm::stored, n, k, memory.data(), memory.data(), k / kBlock, 1};
    };
    backend->experts({memory.data(),
                      DType::bf16,
                      8,
                      Quantizer::mxint8(128),
                      ids.data(),
                      weights.data(),
                      1,
                      nullptr,
                      0,
                      2,
                      weight(256, 128),
                      weight(128, 128),
                      nullptr,
                      nullptr,
                      {GateKind::silu_mul},
                      false,
                      nullptr,
                      nullptr,
                      memory.data()});
    EXPECT_EQ(std::count(launched.begin(), launched.end(), "gemm"), refused.count("gemm_small") != 0 ? 2 : 0);
    const auto as_int8 = [](const Variant& of) { return of.label.find("W as int8") != std::string::npos; };
    EXPECT_EQ(std::count_if(variants.begin(), variants.end(), as_int8), refused.count("int4") != 0 ? 2 : 0);
  }
}

TEST(Fallback, WhereNothingBuildsTheErrorIsTheCompilers) {
  EXPECT_THROW(kernel_of({"gemm_large", "gemm_small", "gemm"}, 1024, Format::mxfp4), CannotBuild);
}

TEST(Fallback, AVariantThatWasAskedForIsNotReplaced) {
  setenv("XPU_FP4_SYCL_VARIANT", "bmg:large", 1);
  EXPECT_THROW(kernel_of({"gemm_large"}, 1024, Format::mxfp4), CannotBuild);
  unsetenv("XPU_FP4_SYCL_VARIANT");
}

TEST(Fallback, DevicesAreKnownByTheirNumbers) {
  const auto name = [](uint64_t major, uint64_t minor, uint32_t id) {
    const Architecture* found = architecture_of(major << 30 | minor << 22, id);
    return std::string(found == nullptr ? "" : found->name);
  };
  EXPECT_EQ(name(12, 55, 0), "dg2");
  EXPECT_EQ(name(12, 60, 0), "pvc");
  EXPECT_EQ(name(12, 61, 0), "");
  EXPECT_EQ(name(12, 70, 0), "");
  EXPECT_EQ(name(20, 1, 0), "bmg");
  EXPECT_EQ(name(20, 2, 0xE223), "bmg");
  EXPECT_EQ(name(20, 4, 0), "lnl-m");
  EXPECT_EQ(name(30, 0, 0), "ptl");
  EXPECT_EQ(name(35, 11, 0), "cri");
  for (const uint32_t id : {0xE220u, 0xE221u, 0xE222u, 0xE223u}) EXPECT_EQ(name(0, 0, id), "bmg");
  EXPECT_EQ(name(0, 0, 0xFD80), "ptl");
  EXPECT_EQ(name(0, 0, 0xE224), "");
  EXPECT_EQ(name(0, 0, 0), "");
}

}  // namespace
