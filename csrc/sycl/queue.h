// SPDX-License-Identifier: Apache-2.0
// The queue of a device, as launches see it: nothing but queue.cpp and programs.cpp needs SYCL's headers.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "plugin.h"
#include "variants.h"

namespace xpu_fp4::syclrt {

/// One argument of a kernel, passed by value.
struct Argument {
  const void* value;
  size_t size;
  bool is_pointer;  // to device memory
};

/// Work-items of a kernel, and of a work-group, in up to three dimensions; lanes are in the last, whose work-groups follow one
/// another.
struct Range {
  int dimensions;
  std::array<int64_t, 3> global, group;
};

/// A device's compiler does not take a variant, or makes something else of it.
struct CannotBuild : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Queue {
 public:
  virtual ~Queue() = default;
  virtual std::string device_name() const = 0;
  virtual bool is_gpu() const = 0;
  /// Vector engines.
  virtual int64_t compute_units() const = 0;
  /// The device's architecture; null where it has no int8 matrix unit, or one that we do not know: then the portable kernels
  /// run.
  virtual const Architecture* architecture() const = 0;
  virtual Target target() const = 0;
  virtual std::shared_ptr<void> allocate(int64_t bytes) const = 0;

  /// Submits a kernel, compiled if need be; nothing if the range is empty. `arguments`: its struct of kernels/arguments.hpp.
  /// Throws CannotBuild if the compiler does not take it, std::runtime_error if it does not run.
  template <class Arguments>
  void launch(const Variant& variant, const char* kernel, const Range& range, const Arguments& arguments) const {
    std::vector<Argument> list;
    list.reserve(16);
    arguments.each([&](const auto& value) {
      list.push_back({&value, sizeof value, std::is_pointer_v<std::remove_reference_t<decltype(value)>>});
    });
    submit(variant, kernel, range, list);
  }

 private:
  virtual void submit(const Variant& variant, const char* kernel, const Range& range,
                      const std::vector<Argument>& arguments) const = 0;
};

/// Of Intel's OpenCL CPU device; launches return when the kernel has run. Throws if there is no such device.
std::unique_ptr<Queue> cpu_queue();

/// Around a `sycl::queue*` that is in-order, else throws.
std::unique_ptr<Queue> queue_of(void* queue, Allocate allocate);

/// See Plugin::devices.
std::vector<DeviceInfo> sycl_devices();

}  // namespace xpu_fp4::syclrt
