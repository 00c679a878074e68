// SPDX-License-Identifier: Apache-2.0
#include "programs.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <map>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "device_sources.h"

namespace syclexp = sycl::ext::oneapi::experimental;

namespace xpu_fp4::syclrt {
namespace {

using Program = sycl::kernel_bundle<sycl::bundle_state::executable>;

const std::string& source_text(const std::string& name) {
  const auto found = std::find_if(kDeviceSources.begin(), kDeviceSources.end(), [&](const auto& s) { return s.name == name; });
  return found->text;
}

// Says what is being built if it takes more than a second: the caller may be waiting for a while.
class SlowBuildNotice {
 public:
  explicit SlowBuildNotice(std::string what)
      : waiter_([this, what = std::move(what)] {
          std::unique_lock lock(mutex_);
          if (!done_changed_.wait_for(lock, std::chrono::seconds(1), [this] { return done_; })) {
            std::fprintf(stderr, "xpu_fp4: compiling %s; this is kept on disk for the next time\n", what.c_str());
          }
        }) {}
  SlowBuildNotice(const SlowBuildNotice&) = delete;
  ~SlowBuildNotice() {
    {
      const std::lock_guard lock(mutex_);
      done_ = true;
    }
    done_changed_.notify_one();
    waiter_.join();
  }

 private:
  std::mutex mutex_;
  std::condition_variable done_changed_;
  bool done_ = false;
  std::thread waiter_;  // last: it uses the others
};

// Kernels exchange between lanes: with another number of them they would give wrong numbers, and a compiler that drops the
// request does not say so. Some drivers do not say how many there are: 0.
void check_sub_group(const sycl::kernel& kernel, const sycl::device& device, const Variant& variant, const std::string& name) {
  const auto asked =
      std::find_if(variant.macros.begin(), variant.macros.end(), [](const auto& macro) { return macro.first == "SUB_GROUP"; });
  const size_t got = kernel.get_info<sycl::info::kernel_device_specific::compile_sub_group_size>(device);
  if (asked == variant.macros.end() || got == static_cast<size_t>(asked->second)) return;
  if (got == 0) {
    static std::once_flag said;
    std::call_once(said, [] {
      std::fprintf(stderr,
                   "xpu_fp4: this driver does not say how wide it compiled sub-groups; `xpu-fp4 doctor` tells whether "
                   "results are right\n");
    });
    return;
  }
  throw CannotBuild("xpu_fp4: SYCL compiled " + name + " for sub-groups of " + std::to_string(got) + " lanes on " +
                    device.get_info<sycl::info::device::name>() + ", asked for " + std::to_string(asked->second));
}

Program build(const sycl::context& context, const sycl::device& device, const Variant& variant) {
  syclexp::include_files includes;
  for (const DeviceSource& source : kDeviceSources) includes.add(source.name, source.text);
  std::string log;
  const SlowBuildNotice notice(variant.file + " for " + device.get_info<sycl::info::device::name>());
  try {
    auto bundle = syclexp::create_kernel_bundle_from_source(context, syclexp::source_language::sycl, source_text(variant.file),
                                                            syclexp::properties{includes});
    Program program = syclexp::build(
        bundle, {device}, syclexp::properties{syclexp::build_options{build_options(variant)}, syclexp::save_log{&log}});
    for (const std::string& name : variant.kernels) {
      check_sub_group(program.ext_oneapi_get_kernel(name), device, variant, name);
    }
    return program;
  } catch (const sycl::exception& error) {
    throw CannotBuild("xpu_fp4: SYCL cannot build " + variant.file + " for " + device.get_info<sycl::info::device::name>() +
                      ": " + error.what() + "\n" + log);
  } catch (const CannotBuild&) {
    throw;
  } catch (const std::exception& error) {
    // In a damaged cache SYCL takes any number for a length, and memory runs out over it.
    const char* cache = std::getenv("SYCL_CACHE_DIR");
    throw std::runtime_error("xpu_fp4: SYCL cannot build " + variant.file + ": " + error.what() +
                             ". Delete its kernel cache, whose files may be damaged: " + (cache == nullptr ? "none" : cache));
  }
}

// XPU_FP4_SYCL_SUB_GROUP=8 runs the stand-in with Alchemist's width, so that its layout is tested where no such GPU is.
int stand_in_sub_group() {
  static const char* variable = std::getenv("XPU_FP4_SYCL_SUB_GROUP");
  return variable != nullptr && std::string(variable) == "8" ? 8 : 16;
}

// A future per program: whoever asks first builds, the others wait for that one only.
class ProgramCache {
 public:
  Program get(const sycl::queue& queue, const Variant& variant) {
    const Key key = {variant.file, variant.macros};
    std::promise<Program> promise;
    std::shared_future<Program> future;
    bool mine = false;
    {
      const std::lock_guard lock(mutex_);
      auto& programs = per_device_[{queue.get_context(), queue.get_device()}];
      const auto found = programs.find(key);
      mine = found == programs.end();
      future = mine ? promise.get_future().share() : found->second;
      if (mine) programs.emplace(key, future);
    }
    if (mine) {
      try {
        promise.set_value(build(queue.get_context(), queue.get_device(), variant));
      } catch (const CannotBuild&) {
        promise.set_exception(std::current_exception());
        // It stays on a GPU, where other kernels take over: each call would compile for seconds to learn the same.
        if (!queue.get_device().is_gpu()) forget(queue, key);
      } catch (...) {
        promise.set_exception(std::current_exception());
        // Those who wait get the error; the next call tries again, since a full disk or memory may pass.
        forget(queue, key);
      }
    }
    return future.get();
  }

 private:
  using Place = std::pair<sycl::context, sycl::device>;
  struct Hash {
    size_t operator()(const Place& place) const {
      return std::hash<sycl::context>{}(place.first) * 31 + std::hash<sycl::device>{}(place.second);
    }
  };
  using Key = std::pair<std::string, Macros>;

  void forget(const sycl::queue& queue, const Key& key) {
    const std::lock_guard lock(mutex_);
    per_device_[{queue.get_context(), queue.get_device()}].erase(key);
  }

  std::mutex mutex_;
  std::unordered_map<Place, std::map<Key, std::shared_future<Program>>, Hash> per_device_;
};

// A device is known by the numbers that it bears, not by what its runtime says of a matrix unit: runtimes have tables, which
// lack devices that are newer than they are.
const Architecture* query_architecture(const sycl::device& device) {
  if (!device.is_gpu()) return nullptr;
  const auto version = static_cast<uint64_t>(device.get_info<syclexp::info::device::architecture>());
  const bool has_id = device.has(sycl::aspect::ext_intel_device_id);
  const uint32_t id = has_id ? device.get_info<sycl::ext::intel::info::device::device_id>() : 0;
  const Architecture* known = architecture_of(version, id);
  if (known == nullptr) {
    std::fprintf(stderr,
                 "xpu_fp4: no kernels for the matrix unit of %s are known (architecture %#llx, PCI device %#x); portable "
                 "kernels serve it, which are slower\n",
                 device.get_info<sycl::info::device::name>().c_str(), static_cast<unsigned long long>(version), id);
  }
  return known;
}

}  // namespace

std::vector<std::string> build_options(const Variant& variant) {
  std::vector<std::string> options = {
      "-ffp-contract=off",  // the numerics count every rounding
      "-fno-sycl-id-queries-fit-in-int",
#if __LIBSYCL_MAJOR_VERSION < 9
      "-fno-sycl-device-lib=all",  // 2025.3's pip package lacks the device library; 2026.1 does not know the option
#endif
  };
  for (const auto& [name, value] : variant.macros) options.push_back("-DXPU_FP4_" + name + "=" + std::to_string(value));
#if __LIBSYCL_MAJOR_VERSION < 9
  // 2025.3 drops the kernels' property grf_size (XPU_FP4_GRF); this is the option that 2026.1 makes of it.
  const auto has = [&](const char* name, int value) {
    return std::count(variant.macros.begin(), variant.macros.end(), Macros::value_type(name, value)) != 0;
  };
  if (has("MATRIX_UNIT", 1) && has("REGISTERS", 256)) options.insert(options.end(), {"-Xs", "-ze-opt-large-register-file"});
#endif
  return options;
}

const Architecture* architecture_of(const sycl::device& device) {
  static std::mutex& mutex = *new std::mutex;
  // Every launch asks, and the answer takes driver calls.
  static auto& known = *new std::unordered_map<sycl::device, const Architecture*>;
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known.emplace(device, query_architecture(device)).first->second;
}

Target target_of(const sycl::device& device) {
  const Architecture* architecture = architecture_of(device);
  return architecture == nullptr ? Target{stand_in_sub_group(), false} : Target{architecture->sub_group, true};
}

sycl::kernel get_kernel(const sycl::queue& queue, const Variant& variant, const std::string& name) {
  // It is never destroyed: at exit the SYCL runtime may be gone before a static of ours.
  static ProgramCache& cache = *new ProgramCache;
  return cache.get(queue, variant).ext_oneapi_get_kernel(name);
}

}  // namespace xpu_fp4::syclrt
