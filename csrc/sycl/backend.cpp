// SPDX-License-Identifier: Apache-2.0
// Launches the kernels: which variant, over which range.
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "../cpu/float_environment.h"
#include "../format/block.h"
#include "plugin.h"
#include "programs.h"

namespace xpu_fp4::syclrt {
namespace {

// Sub-groups of a work-group: enough to fill a core, few enough that small outputs spread over all of them.
constexpr int64_t kGroupLanes = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The alignment variant that these addresses allow.
int alignment_of(std::initializer_list<const void*> addresses) {
  uintptr_t bits = 0;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return bits % 16 == 0 ? 16 : 1;
}

sycl::nd_range<1> linear_range(int64_t lanes) {
  return {static_cast<size_t>(ceil_div(lanes, kGroupLanes) * kGroupLanes), static_cast<size_t>(kGroupLanes)};
}

sycl::nd_range<2> grid(int64_t rows, int64_t lanes) {
  const auto width = static_cast<size_t>(ceil_div(lanes, kGroupLanes) * kGroupLanes);
  return {{static_cast<size_t>(rows), width}, {1, static_cast<size_t>(kGroupLanes)}};
}

class SyclBackend final : public Backend {
 public:
  SyclBackend(sycl::queue queue, bool wait) : queue_(std::move(queue)), wait_(wait) {}

  void quantize(const QuantizeArgs& args) const override {
    const int64_t vectors = args.rows * args.k * size_of(args.x_dtype) / 16;
    launch("quantize.cpp", "quantize", args.x_dtype, alignment_of({args.x}), linear_range(vectors), args.x, args.q, args.scale,
           vectors, static_cast<int>(args.mode));
  }

  void group_quant(const GroupQuantArgs& args) const override {
    const int64_t vectors = args.rows * args.k * size_of(args.x_dtype) / 16;
    launch("quantize.cpp", "group_quantize", args.x_dtype, alignment_of({args.x}), linear_range(vectors), args.x, args.q,
           args.scale, vectors, args.k / kBlock, args.scale_row_stride, args.scale_block_stride, args.scale_floor);
  }

  void dequantize(const DequantizeArgs& args) const override {
    const int64_t lanes = args.rows * args.k / 8;
    launch("dequantize.cpp", "dequantize", args.out_dtype, 16, linear_range(lanes), args.q, args.scale, args.out, lanes);
  }

  void gemm(const GemmArgs& args) const override {
    const int64_t sub_group = target_of(queue_.get_device()).sub_group;
    launch("gemm.cpp", "gemm", std::nullopt, alignment_of({args.w.codes}), grid(ceil_div(args.m, sub_group), args.n), args.a,
           args.a_scale, args.w.codes, args.w.scale, args.w.scale_row_stride, args.w.scale_block_stride, args.bias.data,
           args.bias.row_stride, args.bias.column_stride, args.y, static_cast<int>(args.y_dtype), args.m, args.n, args.k);
  }

  void gemm_w4a16(const GemmW4A16Args& args) const override {
    launch("gemm_w4a16.cpp", "gemm_w4a16", args.dtype, alignment_of({args.w.codes}), grid(args.m, args.n), args.x, args.w.codes,
           args.w.scale, args.w.scale_row_stride, args.w.scale_block_stride, args.bias.data, args.bias.row_stride,
           args.bias.column_stride, args.y, args.m, args.n, args.k);
  }

 private:
  template <int dimensions, class... Args>
  void launch(const char* file, const char* kernel, std::optional<DType> dtype, int alignment, sycl::nd_range<dimensions> range,
              Args... args) const {
    if (range.get_global_range().size() == 0) return;
    // The CPU device's worker threads take over the float environment of the thread that submits.
    const DefaultFloatEnvironment environment;
    try {
      const sycl::kernel compiled = get_kernel(queue_, {file, dtype, alignment}, kernel);
      const sycl::event event = sycl::queue(queue_).submit([&](sycl::handler& handler) {
        handler.set_args(args...);
        handler.parallel_for(range, compiled);
      });
      if (wait_) sycl::event(event).wait_and_throw();
    } catch (const sycl::exception& error) {
      throw std::runtime_error("xpu_fp4: the SYCL kernel " + std::string(kernel) + " failed on " +
                               queue_.get_device().get_info<sycl::info::device::name>() + ": " + error.what());
    }
  }

  sycl::queue queue_;
  bool wait_;  // tensors on the CPU: the caller may read them at once
};

DeviceInfo describe(const sycl::device& device) {
  const Target target = target_of(device);
  const auto platform = device.get_platform().get_info<sycl::info::platform::name>();
  return {device.get_info<sycl::info::device::name>(), platform + " " + device.get_info<sycl::info::device::driver_version>(),
          target.sub_group, target.matrix_unit};
}

sycl::queue cpu_queue() {
  try {
    // The default handler of asynchronous errors ends the process; this one lets wait_and_throw raise them.
    const auto rethrow = [](const sycl::exception_list& errors) {
      for (const std::exception_ptr& error : errors) std::rethrow_exception(error);
    };
    return sycl::queue(sycl::cpu_selector_v, rethrow, sycl::property::queue::in_order{});
  } catch (const sycl::exception& error) {
    throw std::runtime_error(
        std::string("xpu_fp4: SYCL has no CPU device: ") + error.what() +
        ". It needs Intel's OpenCL CPU runtime (pip package intel-opencl-rt), OCL_ICD_FILENAMES naming its "
        "libintelocl.so, and an ONEAPI_DEVICE_SELECTOR, if set, that admits opencl:cpu");
  }
}

class SyclPlugin final : public Plugin {
 public:
  std::vector<DeviceInfo> devices() const override {
    try {
      std::vector<DeviceInfo> result;
      for (const sycl::device& device : sycl::device::get_devices()) {
        if (device.is_cpu() || device.is_gpu()) result.push_back(describe(device));
      }
      return result;
    } catch (const sycl::exception& error) {
      throw std::runtime_error(std::string("xpu_fp4: SYCL cannot list its devices: ") + error.what());
    }
  }

  const Backend& cpu() const override {
    const DefaultFloatEnvironment environment;  // the runtime starts its threads now
    // Not destroyed: at exit the SYCL runtime may be gone before a static of ours.
    static const SyclBackend& backend = *new SyclBackend(cpu_queue(), true);
    return backend;
  }

  std::unique_ptr<Backend> on_queue(void* queue) const override {
    const auto& stream = *static_cast<sycl::queue*>(queue);
    if (!stream.is_in_order()) throw std::runtime_error("xpu_fp4: the queue must be in-order: an op's kernels rely on it");
    return std::make_unique<SyclBackend>(stream, false);
  }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const Plugin* xpu_fp4_sycl_plugin() {
  static const SyclPlugin plugin;
  return &plugin;
}

}  // namespace xpu_fp4::syclrt
