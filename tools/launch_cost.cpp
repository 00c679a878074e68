// SPDX-License-Identifier: Apache-2.0
// What a launch costs the host, but for SYCL's own submission: nanoseconds of the thread's CPU time, the least of five
// averages. After `make build`, with SYCL's prefix in P:
//   g++ -std=c++17 -O2 -w -Icsrc -isystem $P/include -isystem $P/include/sycl tools/launch_cost.cpp \
//     csrc/sycl/{programs,spirv,variants,architectures,backend}.cpp csrc/sycl/launch/*.cpp build/device_sources.cpp
//     build/spirv.cpp \ -o build/launch_cost -L$P/lib -lsycl -Wl,-rpath,$P/lib && OCL_ICD_FILENAMES=$P/lib/libintelocl.so
//     build/launch_cost
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>

#include "sycl/backend.h"
#include "sycl/programs.h"
#include "sycl/queue.h"

using namespace xpu_fp4;
using namespace xpu_fp4::syclrt;

namespace {

double thread_nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) * 1e9 + static_cast<double>(now.tv_nsec);
}

template <class Run>
void report(const char* what, const Run& run) {
  constexpr int repeats = 40000;
  run();
  double least = 1e18;
  for (int round = 0; round < 5; ++round) {
    const double start = thread_nanoseconds();
    for (int i = 0; i < repeats; ++i) run();
    least = std::min(least, (thread_nanoseconds() - start) / repeats);
  }
  std::printf("%-60s %5.0f ns\n", what, least);
}

std::shared_ptr<uint8_t> memory_of(size_t bytes) { return {static_cast<uint8_t*>(std::aligned_alloc(64, bytes)), std::free}; }

/// A bmg that launches nothing.
class IdleQueue final : public Queue {
 public:
  std::string device_name() const override { return "idle"; }
  bool is_gpu() const override { return true; }
  int64_t compute_units() const override { return 160; }
  const Architecture* architecture() const override { return architecture_of(uint64_t{20} << 30, 0); }
  Target target() const override { return {16, true}; }
  std::shared_ptr<void> allocate(int64_t) const override { return memory_; }

 private:
  void submit(const Variant&, const char*, const Range&, const std::vector<Argument>&) const override {}

  std::shared_ptr<void> memory_ = memory_of(1 << 20);
};

}  // namespace

int main() {
  sycl::queue queue{sycl::cpu_selector_v, sycl::property::queue::in_order{}};
  const Variant variant = dequantize_variant({16, false}, DType::f32);
  report("a kernel that is there already", [&] { (void)get_kernel(queue, variant, "dequantize"); });
  const auto backend = make_backend(std::make_unique<IdleQueue>());
  constexpr int64_t n = 4096;
  const auto memory = memory_of(n * n);
  report("W4A4 linear of one row, without the kernels of its 2 launches", [&] {
    backend->multiply({Activations::floats(memory.get(), DType::bf16, {Format::mxfp4}, 1, n),
                       {WeightForm::stored, n, n, memory.get(), memory.get(), n / kBlock, 1},
                       {memory.get(), DType::bf16, {nullptr, 0, 0}}});
  });
}
