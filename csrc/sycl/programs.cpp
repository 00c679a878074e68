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
#include <optional>
#include <stdexcept>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "device_sources.h"
#include "spirv.h"

#ifdef XPU_FP4_SYCL_HEADERS
static_assert(__SYCL_COMPILER_VERSION == XPU_FP4_SYCL_HEADERS, "these are not the headers of the SYCL that setup.py found");
#endif

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
            std::fprintf(stderr, "xpu_fp4: compiling %s\n", what.c_str());
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

using Bundle = sycl::kernel_bundle<sycl::bundle_state::ext_oneapi_source>;

Bundle source_bundle(const sycl::context& context, const std::string& text) {
  syclexp::include_files includes;
  for (const DeviceSource& source : kDeviceSources) includes.add(source.name, source.text);
  return syclexp::create_kernel_bundle_from_source(context, syclexp::source_language::sycl, text,
                                                   syclexp::properties{includes});
}

/// What a program is made of.
enum class Origin { source, spirv };

const char* name_of(Origin origin) { return origin == Origin::source ? "source" : "spirv"; }

// SPIR-V keeps the name that the compiler gives to a kernel.
std::string exported_name(Origin origin, const std::string& kernel) {
  return origin == Origin::source ? kernel : "__sycl_kernel_" + kernel;
}

// The first to be tried first. Read at each launch, so that tests can change it.
const std::vector<Origin>& origins(const sycl::device& device) {
  static const auto& spirv = *new std::vector{Origin::spirv};
  static const auto& source = *new std::vector{Origin::source};
  static const auto& both = *new std::vector{Origin::spirv, Origin::source};
  const char* variable = std::getenv("XPU_FP4_KERNELS");
  if (variable == nullptr || *variable == '\0') return device.is_gpu() ? both : source;
  const std::string value = variable;
  if (value == "spirv") return spirv;
  if (value == "source") return source;
  if (value == "spirv,source") return both;
  throw std::runtime_error("xpu_fp4: XPU_FP4_KERNELS is \"" + value + "\", expected \"spirv\", \"source\" or \"spirv,source\"");
}

Program build_from_source(const sycl::context& context, const sycl::device& device, const Variant& variant, std::string& log) {
  Bundle bundle = source_bundle(context, source_text(variant.file));
  return syclexp::build(bundle, {device},
                        syclexp::properties{syclexp::build_options{build_options(variant)}, syclexp::save_log{&log}});
}

Program build_from_spirv(const sycl::context& context, const sycl::device& device, Spirv spirv, std::string& log) {
  const std::vector<std::byte> bytes(spirv.data, spirv.data + spirv.size);
  Bundle bundle = syclexp::create_kernel_bundle_from_source(context, syclexp::source_language::spirv, bytes);
  return syclexp::build(bundle, {device}, syclexp::properties{syclexp::save_log{&log}});
}

// In the order of Variant::kernels.
using Kernels = std::vector<sycl::kernel>;

Kernels build(const sycl::context& context, const sycl::device& device, const Variant& variant, Origin origin) {
  const std::string program = variant.file + " for " + device.get_info<sycl::info::device::name>();
  const std::string failure = "xpu_fp4: SYCL cannot build " + program + " from " + name_of(origin) + ": ";
  std::string log;
  try {
    const std::optional<Spirv> spirv = origin == Origin::spirv ? embedded_spirv(program_key(variant)) : std::nullopt;
    if (origin == Origin::spirv && !spirv) {
      throw CannotBuild(failure + "its variant " + variant.label + " is not one of the " + std::to_string(embedded_count()) +
                        " that were compiled when the library was built");
    }
    const SlowBuildNotice notice(program + (spirv ? "" : "; this is kept on disk for the next time"));
    Program built = spirv ? build_from_spirv(context, device, *spirv, log) : build_from_source(context, device, variant, log);
    Kernels kernels;
    for (const std::string& name : variant.kernels) {
      kernels.push_back(built.ext_oneapi_get_kernel(exported_name(origin, name)));
      check_sub_group(kernels.back(), device, variant, name);
    }
    return kernels;
  } catch (const sycl::exception& error) {
    if (const auto why = out_of_memory(error, device)) throw std::runtime_error(failure + *why);
    throw CannotBuild(failure + error.what() + "\n" + log);
  } catch (const CannotBuild&) {
    throw;
  } catch (const std::exception& error) {
    // In a damaged cache SYCL takes any number for a length, and memory runs out over it.
    const char* cache = std::getenv("SYCL_CACHE_DIR");
    throw std::runtime_error(failure + error.what() +
                             ". Delete its kernel cache, whose files may be damaged: " + (cache == nullptr ? "none" : cache));
  }
}

// From the first origin that gives it. Throws what the last one does.
Kernels build(const sycl::context& context, const sycl::device& device, const Variant& variant,
              const std::vector<Origin>& origins) {
  for (const Origin origin : origins) {
    if (origin == Origin::spirv && origins.size() > 1 && !embedded_spirv(program_key(variant))) continue;
    try {
      return build(context, device, variant, origin);
    } catch (const CannotBuild& error) {
      if (origin == origins.back()) throw;
      std::fprintf(stderr, "%s\nxpu_fp4: it is compiled from source instead\n", error.what());
    }
  }
  throw std::logic_error("xpu_fp4: a program has an origin");
}

// XPU_FP4_SYCL_SUB_GROUP=8 runs the stand-in with Alchemist's width, so that its layout is tested where no such GPU is.
int stand_in_sub_group() {
  static const char* variable = std::getenv("XPU_FP4_SYCL_SUB_GROUP");
  return variable != nullptr && std::string(variable) == "8" ? 8 : 16;
}

// A future per program: whoever asks first builds, the others wait for that one only.
class ProgramCache {
 public:
  // Valid for the life of the process: what was built is not forgotten.
  const Kernels& get(const sycl::queue& queue, const Variant& variant) {
    const Place place = {queue.get_context(), queue.get_device()};
    const KeyView key = {variant.file, variant.macros, origins(place.second)};
    std::promise<Kernels> promise;
    std::shared_future<Kernels> future;
    bool mine = false;
    {
      const std::lock_guard lock(mutex_);
      Programs& programs = per_device_[place];
      const auto found = programs.find(key);
      mine = found == programs.end();
      future = mine ? promise.get_future().share() : found->second;
      if (mine) programs.emplace(Key(key), future);
    }
    if (mine) {
      try {
        promise.set_value(build(place.first, place.second, variant, std::get<2>(key)));
      } catch (const CannotBuild&) {
        promise.set_exception(std::current_exception());
        // It stays on a GPU, where other kernels take over: each call would compile for seconds to learn the same.
        if (!place.second.is_gpu()) forget(place, key);
      } catch (...) {
        promise.set_exception(std::current_exception());
        // Those who wait get the error; the next call tries again, since a full disk or memory may pass.
        forget(place, key);
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
  using Key = std::tuple<std::string, Macros, std::vector<Origin>>;
  using KeyView = std::tuple<const std::string&, const Macros&, const std::vector<Origin>&>;  // a launch copies none of them
  using Programs = std::map<Key, std::shared_future<Kernels>, std::less<>>;

  void forget(const Place& place, const KeyView& key) {
    const std::lock_guard lock(mutex_);
    Programs& programs = per_device_[place];
    programs.erase(programs.find(key));
  }

  std::mutex mutex_;
  std::unordered_map<Place, Programs, Hash> per_device_;
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

#if __LIBSYCL_MAJOR_VERSION < 9
// 2025.3 drops the kernels' property grf_size (XPU_FP4_GRF); an option asks for it, which 2026.1 makes of the property.
bool needs_register_option(const Variant& variant) {
  const auto has = [&](const char* name, int value) {
    return std::count(variant.macros.begin(), variant.macros.end(), Macros::value_type(name, value)) != 0;
  };
  return has("MATRIX_UNIT", 1) && has("REGISTERS", 256);
}
#endif

}  // namespace

std::vector<std::string> build_options(const Variant& variant) {
  std::vector<std::string> options = {
      "-ffp-contract=off",  // the numerics count every rounding
      "-fno-sycl-id-queries-fit-in-int",
#if __LIBSYCL_MAJOR_VERSION < 9
      "-fno-sycl-device-lib=all",  // 2025.3's pip package lacks the device library; 2026.1 does not know the option
#endif
  };
  for (const auto& [name, value] : variant.macros)
    options.push_back("-DXPU_FP4_" + std::string(name) + "=" + std::to_string(value));
#if __LIBSYCL_MAJOR_VERSION < 9
  if (needs_register_option(variant)) options.insert(options.end(), {"-Xs", "-ze-opt-large-register-file"});
#endif
  return options;
}

std::vector<Variant> programs_to_embed(const std::string& whom) {
  std::vector<Variant> all = ahead_of_time(whom);
#if __LIBSYCL_MAJOR_VERSION < 9
  // No option goes with SPIR-V.
  all.erase(std::remove_if(all.begin(), all.end(), needs_register_option), all.end());
#endif
  return all;
}

const Architecture* architecture_of(const sycl::device& device) {
  static std::mutex& mutex = *new std::mutex;
  // Every launch asks, and the answer takes driver calls.
  static auto& known = *new std::unordered_map<sycl::device, const Architecture*>;
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known.emplace(device, query_architecture(device)).first->second;
}

std::optional<std::string> out_of_memory(const sycl::exception& error, const sycl::device& device) {
  const std::string text = error.what();
  // Kernels that the runtime submits have its adapters' codes, in words alone.
  const bool is_it = error.code() == sycl::errc::memory_allocation || text.find("OUT_OF_DEVICE_MEMORY") != std::string::npos ||
                     text.find("OUT_OF_HOST_MEMORY") != std::string::npos ||
                     text.find("MEM_OBJECT_ALLOCATION_FAILURE") != std::string::npos;
  if (!is_it) return std::nullopt;
  const uint64_t mebibytes = device.get_info<sycl::info::device::global_mem_size>() >> 20;
  return "memory ran out on " + device.get_info<sycl::info::device::name>() + ", which has " + std::to_string(mebibytes) +
         " MiB: free tensors (torch.xpu.empty_cache() gives back what torch keeps), take fewer rows at a time, or do not "
         "expand weights. SYCL says: " +
         text;
}

Target target_of(const sycl::device& device) {
  const Architecture* architecture = architecture_of(device);
  return architecture == nullptr ? Target{stand_in_sub_group(), false} : Target{architecture->sub_group, true};
}

sycl::kernel get_kernel(const sycl::queue& queue, const Variant& variant, const std::string& name) {
  // It is never destroyed: at exit the SYCL runtime may be gone before a static of ours.
  static ProgramCache& cache = *new ProgramCache;
  const Kernels& kernels = cache.get(queue, variant);
  const auto found = std::find(variant.kernels.begin(), variant.kernels.end(), name);
  if (found == variant.kernels.end()) throw std::logic_error("xpu_fp4: " + variant.file + " lists no kernel " + name);
  return kernels[static_cast<size_t>(found - variant.kernels.begin())];
}

void compile_to_spirv(const Variant& variant) {
  // SYCL's headers alone come before the macros, so that the process parses them once for all of its programs.
  std::string text = "#include <sycl/sycl.hpp>\n#include <sycl/ext/oneapi/work_group_static.hpp>\nstruct EndOfHeaders;\n";
  for (const auto& [name, value] : variant.macros)
    text += "#define XPU_FP4_" + std::string(name) + " " + std::to_string(value) + "\n";
  text += "#include \"" + variant.file + "\"\n";
  std::vector<std::string> options = build_options({variant.file, {}});
#if __LIBSYCL_MAJOR_VERSION >= 9
  options.emplace_back("--auto-pch");
#endif
  std::string log;
  try {
    const sycl::queue queue;
    Bundle bundle = source_bundle(queue.get_context(), text);
    (void)syclexp::compile(bundle, syclexp::properties{syclexp::build_options{options}, syclexp::save_log{&log}});
  } catch (const sycl::exception& error) {
    throw CannotBuild("xpu_fp4: SYCL cannot compile " + variant.file + " " + variant.label + ": " + error.what() + "\n" + log);
  }
}

}  // namespace xpu_fp4::syclrt
