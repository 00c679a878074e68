// SPDX-License-Identifier: Apache-2.0
#include "queue.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <sycl/sycl.hpp>
#include <utility>

#include "../cpu/float_environment.h"
#include "../format/integer.h"
#include "programs.h"

namespace xpu_fp4::syclrt {
namespace {

namespace syclexp = sycl::ext::oneapi::experimental;

void set_argument(sycl::handler& handler, int index, const Argument& argument) {
  if (argument.is_pointer) {
    handler.set_arg(index, *static_cast<void* const*>(argument.value));
  } else {
    handler.set_arg(index, syclexp::raw_kernel_arg(argument.value, argument.size));
  }
}

template <size_t... i>
sycl::nd_range<sizeof...(i)> nd_range_of(const Range& range, std::index_sequence<i...>) {
  return {{static_cast<size_t>(range.global[i])...}, {static_cast<size_t>(range.group[i])...}};
}

class SyclQueue final : public Queue {
 public:
  SyclQueue(sycl::queue queue, Allocate allocate, bool wait)
      : queue_(std::move(queue)), device_(queue_.get_device()), allocate_(std::move(allocate)), wait_(wait) {}

  std::string device_name() const override { return device_.get_info<sycl::info::device::name>(); }
  bool is_gpu() const override { return device_.is_gpu(); }
  int64_t compute_units() const override {
    return static_cast<int64_t>(device_.get_info<sycl::info::device::max_compute_units>());
  }
  const Architecture* architecture() const override { return architecture_of(device_); }
  Target target() const override { return target_of(device_); }
  std::shared_ptr<void> allocate(int64_t bytes) const override { return allocate_(bytes); }

 private:
  void submit(const Variant& variant, const char* kernel, const Range& range,
              const std::vector<Argument>& arguments) const override {
    const auto end = range.global.begin() + range.dimensions;
    if (std::find(range.global.begin(), end, 0) != end) return;
    // The CPU device's worker threads take over the float environment of the thread that submits.
    const DefaultFloatEnvironment environment;
    try {
      const sycl::kernel compiled = get_kernel(queue_, variant, kernel);
      const sycl::event event = sycl::queue(queue_).submit([&](sycl::handler& handler) {
        for (size_t i = 0; i < arguments.size(); ++i) set_argument(handler, static_cast<int>(i), arguments[i]);
        switch (range.dimensions) {
          case 1: return handler.parallel_for(nd_range_of(range, std::make_index_sequence<1>()), compiled);
          case 2: return handler.parallel_for(nd_range_of(range, std::make_index_sequence<2>()), compiled);
          default: return handler.parallel_for(nd_range_of(range, std::make_index_sequence<3>()), compiled);
        }
      });
      if (wait_) sycl::event(event).wait_and_throw();
    } catch (const sycl::exception& error) {
      const auto memory = out_of_memory(error, device_);
      throw std::runtime_error("xpu_fp4: the SYCL kernel " + std::string(kernel) + " failed on " + device_name() + ": " +
                               (memory ? *memory : error.what()));
    }
  }

  sycl::queue queue_;
  sycl::device device_;
  Allocate allocate_;
  bool wait_;  // tensors on the CPU: the caller may read them at once
};

std::shared_ptr<void> allocate_on_host(int64_t bytes) {
  void* memory = std::aligned_alloc(64, static_cast<size_t>(round_up(std::max<int64_t>(bytes, 1), 64)));
  if (memory == nullptr) {
    throw std::runtime_error("xpu_fp4: memory ran out: a kernel needs " + std::to_string(bytes) + " bytes beside its operands");
  }
  return {memory, std::free};
}

DeviceInfo describe(const sycl::device& device) {
  const Architecture* architecture = architecture_of(device);
  const auto platform = device.get_platform().get_info<sycl::info::platform::name>();
  return {device.get_info<sycl::info::device::name>(), platform + " " + device.get_info<sycl::info::device::driver_version>(),
          architecture == nullptr ? "" : architecture->name, target_of(device).sub_group};
}

}  // namespace

std::unique_ptr<Queue> cpu_queue() {
  try {
    const DefaultFloatEnvironment environment;  // the runtime starts its threads now
    // The default handler of asynchronous errors ends the process; this one lets wait_and_throw raise them.
    const auto rethrow = [](const sycl::exception_list& errors) {
      for (const std::exception_ptr& error : errors) std::rethrow_exception(error);
    };
    return std::make_unique<SyclQueue>(sycl::queue(sycl::cpu_selector_v, rethrow, sycl::property::queue::in_order{}),
                                       allocate_on_host, true);
  } catch (const sycl::exception& error) {
    throw std::runtime_error(
        std::string("xpu_fp4: SYCL has no CPU device: ") + error.what() +
        ". It needs Intel's OpenCL CPU runtime (pip package intel-opencl-rt), OCL_ICD_FILENAMES naming its "
        "libintelocl.so, and an ONEAPI_DEVICE_SELECTOR, if set, that admits opencl:cpu");
  }
}

std::unique_ptr<Queue> queue_of(void* queue, Allocate allocate) {
  const auto& stream = *static_cast<sycl::queue*>(queue);
  if (!stream.is_in_order()) throw std::runtime_error("xpu_fp4: the queue must be in-order: an op's kernels rely on it");
  return std::make_unique<SyclQueue>(stream, std::move(allocate), false);
}

std::vector<DeviceInfo> sycl_devices() {
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

}  // namespace xpu_fp4::syclrt
