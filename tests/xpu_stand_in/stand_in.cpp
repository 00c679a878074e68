// SPDX-License-Identifier: Apache-2.0
// PyTorch's XPU device as far as csrc/torch/xpu.cpp and xpu_queue.cpp use it, over Intel's CPU device: two devices with two
// streams each, an allocator, and the functions of libc10_xpu that the CPU build of torch only declares. So that the binding
// itself is executed: which queue, which device, whose memory, who waits. Compiled, it is the libc10_xpu.so of a process.
#include <ATen/EmptyTensor.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/xpu/XPUStream.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

namespace {

namespace graphs = sycl::ext::oneapi::experimental;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

constexpr int kDevices = 2, kStreams = 2;

sycl::queue& queue_of(int device, int stream) {
  static auto& queues = *new std::array<std::array<std::optional<sycl::queue>, kStreams>, kDevices>;
  auto& queue = queues.at(static_cast<size_t>(device)).at(static_cast<size_t>(stream));
  if (!queue) queue.emplace(sycl::cpu_selector_v, sycl::property::queue::in_order{});
  return *queue;
}

thread_local DeviceIndex device_now = 0;
thread_local std::array<int, kDevices> streams_now = {};

Stream stream_of(DeviceIndex device) {
  return Stream(Stream::UNSAFE, Device(DeviceType::XPU, device), streams_now.at(static_cast<size_t>(device)));
}

// ---- memory: what is let go is given out again to the same stream at once, as torch's caching allocator does ----

struct Place {
  DeviceIndex device;
  int stream;
  size_t bytes;
  bool operator<(const Place& other) const {
    return std::tie(device, stream, bytes) < std::tie(other.device, other.stream, other.bytes);
  }
};
std::mutex mutex;
std::multimap<Place, void*> free_blocks;
std::map<void*, Place> blocks;
int64_t allocations, fresh_allocations;  // the latter of memory that was never given out before

void let_go(void* data) {
  const std::lock_guard lock(mutex);
  free_blocks.emplace(blocks.at(data), data);
}

class StandInAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const Device device(DeviceType::XPU, device_now);
    if (bytes == 0) return {nullptr, device};
    const std::lock_guard lock(mutex);
    const Place place = {device_now, streams_now.at(static_cast<size_t>(device_now)), (bytes + 63) / 64 * 64};
    ++allocations;
    void* data = nullptr;
    if (const auto found = free_blocks.find(place); found != free_blocks.end()) {
      data = found->second;
      free_blocks.erase(found);
    } else {
      ++fresh_allocations;
      data = std::aligned_alloc(64, place.bytes);
      std::memset(data, 0xA5, place.bytes);
      blocks.emplace(data, place);
    }
    return {data, data, let_go, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return let_go; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
StandInAllocator allocator;
REGISTER_ALLOCATOR(DeviceType::XPU, &allocator)

struct StandInGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::XPU;
  StandInGuard() = default;
  explicit StandInGuard(DeviceType /*type*/) {}
  DeviceType type() const override { return DeviceType::XPU; }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return {DeviceType::XPU, device_now}; }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override { device_now = device.index(); }
  Stream getStream(Device device) const override { return stream_of(device.index()); }
  Stream exchangeStream(Stream stream) const override {
    const Stream before = stream_of(stream.device_index());
    streams_now.at(static_cast<size_t>(stream.device_index())) = static_cast<int>(stream.id());
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
};
C10_REGISTER_GUARD_IMPL(XPU, StandInGuard)

// ---- torch's own ops, for the few of them that the binding's ops need ----

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> /*layout*/,
             std::optional<Device> device, std::optional<bool> /*pin_memory*/, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::XPU), dtype.value_or(at::kFloat),
                                   format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout> /*layout*/, std::optional<Device> device, std::optional<bool> /*pin_memory*/) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::XPU),
                                           dtype.value_or(at::kFloat));
}

sycl::queue& current_queue(DeviceIndex device) { return queue_of(device, streams_now.at(static_cast<size_t>(device))); }

// Shows the same memory as a CPU tensor.
Tensor on_cpu(const Tensor& tensor) {
  const auto options = tensor.options().device(at::kCPU);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
}

Tensor& copy_(Tensor& self, const Tensor& from, bool /*non_blocking*/) {
  for (const Tensor& tensor : {self, from}) {
    if (tensor.device().is_xpu()) current_queue(tensor.device().index()).wait_and_throw();
  }
  const auto plain = [](const Tensor& tensor) { return tensor.device().is_xpu() ? on_cpu(tensor) : tensor; };
  plain(self).copy_(plain(from));
  return self;
}

Tensor& zero_(Tensor& self) {
  current_queue(self.device().index()).memset(self.data_ptr(), 0, self.nbytes());
  return self;
}

TORCH_LIBRARY_IMPL(aten, XPU, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("copy_", copy_);
  library.impl("zero_", zero_);
}

// ---- what the tests do with it ----

Tensor to_device(const Tensor& tensor, int64_t index) {
  const Tensor moved = at::empty_strided(tensor.sizes(), tensor.strides(),
                                         tensor.options().device(Device(DeviceType::XPU, static_cast<DeviceIndex>(index))));
  std::memcpy(moved.data_ptr(), tensor.data_ptr(), tensor.nbytes());
  return moved;
}

// Waits for nothing: the caller has synchronized.
Tensor to_host(const Tensor& tensor) {
  Tensor copy = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
  std::memcpy(copy.data_ptr(), tensor.data_ptr(), tensor.nbytes());
  return copy;
}

void set_current(int64_t device, int64_t stream) {
  device_now = static_cast<DeviceIndex>(device);
  streams_now.at(static_cast<size_t>(device)) = static_cast<int>(stream);
}

std::atomic<bool> gate_is_open;

// What is submitted to the queue from now on waits until the gate opens, or, lest a caller that waits hang, for half a minute.
void close_gate(int64_t device, int64_t stream) {
  gate_is_open = false;
  queue_of(static_cast<int>(device), static_cast<int>(stream)).submit([](sycl::handler& handler) {
    handler.host_task([] {
      const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
      while (!gate_is_open && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    });
  });
}

bool is_idle(int64_t device, int64_t stream) {
  return queue_of(static_cast<int>(device), static_cast<int>(stream)).ext_oneapi_empty();
}

void synchronize(int64_t device, int64_t stream) {
  queue_of(static_cast<int>(device), static_cast<int>(stream)).wait_and_throw();
}

using Modifiable = graphs::command_graph<graphs::graph_state::modifiable>;
using Executable = graphs::command_graph<graphs::graph_state::executable>;
std::optional<Modifiable> recording;
std::optional<Executable> recorded;

void begin_recording(int64_t device, int64_t stream) {
  sycl::queue& queue = queue_of(static_cast<int>(device), static_cast<int>(stream));
  recording.emplace(queue.get_context(), queue.get_device());
  recording->begin_recording(queue);
}

void end_recording() {
  recording->end_recording();
  recorded.emplace(recording->finalize());
}

void replay(int64_t device, int64_t stream) {
  queue_of(static_cast<int>(device), static_cast<int>(stream)).ext_oneapi_graph(*recorded).wait_and_throw();
}

TORCH_LIBRARY(xpu_stand_in, library) {
  library.def("to_device(Tensor tensor, int device) -> Tensor", to_device);
  library.def("to_host(Tensor tensor) -> Tensor", to_host);
  library.def("set_current(int device, int stream) -> ()", set_current);
  library.def("current_device() -> int", [] { return int64_t{device_now}; });
  library.def("allocations() -> int[]", [] { return std::vector<int64_t>{allocations, fresh_allocations}; });
  library.def("close_gate(int device, int stream) -> ()", close_gate);
  library.def("open_gate() -> ()", [] { gate_is_open = true; });
  library.def("is_idle(int device, int stream) -> bool", is_idle);
  library.def("synchronize(int device, int stream) -> ()", synchronize);
  library.def("begin_recording(int device, int stream) -> ()", begin_recording);
  library.def("end_recording() -> ()", end_recording);
  library.def("replay(int device, int stream) -> ()", replay);
}

}  // namespace

namespace c10::xpu {

XPUStream getCurrentXPUStream(DeviceIndex device) { return XPUStream(stream_of(device == -1 ? device_now : device)); }

sycl::queue& XPUStream::queue() const { return queue_of(device_index(), static_cast<int>(id())); }

}  // namespace c10::xpu
