// SPDX-License-Identifier: Apache-2.0
// The SYCL backend is a library of its own (`_sycl_backend_N`, for libsycl.so.N), loaded at first use: so `_xpu_C` loads where
// no SYCL runtime is installed. This is all that the two know of each other. Torch-free.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "explain.h"

namespace xpu_fp4::syclrt {

/// A device as SYCL reports it, and how our kernels are compiled for it.
struct DeviceInfo {
  std::string name;
  std::string driver;        // "opencl 2026.21.7"
  std::string architecture;  // whose kernels it runs; empty: the portable ones
  int sub_group;             // lanes
};

/// Gives device memory for the time of a kernel: at least that many bytes, aligned to 64, which may be let go once the kernels
/// that use it have been submitted to the queue.
using Allocate = std::function<std::shared_ptr<void>(int64_t bytes)>;

class Plugin {
 public:
  virtual ~Plugin() = default;
  /// CPU and GPU devices that SYCL sees. Throws std::runtime_error if SYCL cannot tell.
  virtual std::vector<DeviceInfo> devices() const = 0;
  /// How many programs were compiled when the library was built.
  virtual int64_t embedded_programs() const = 0;
  /// The kernels on Intel's OpenCL CPU device; calls return when the result is there. Throws if there is no such device.
  virtual const Backend& cpu() const = 0;
  /// The kernels on an in-order `sycl::queue*`; calls return at once, the queue orders them, and the caller keeps their
  /// operands until then. Throws if the queue is out-of-order.
  virtual std::unique_ptr<Backend> on_queue(void* queue, Allocate allocate) const = 0;
  /// Those of explain.h, which need no device.
  virtual PlannedDevice planned_device(const std::string& architecture, int64_t engines) const = 0;
  virtual Explanation explain(const PlannedDevice& device, const std::function<void(const Backend&)>& call) const = 0;
};

/// The one symbol that the library exports: `const Plugin* xpu_fp4_sycl_plugin()`.
constexpr char kPluginSymbol[] = "xpu_fp4_sycl_plugin";
using PluginFunction = const Plugin* (*)();

}  // namespace xpu_fp4::syclrt
