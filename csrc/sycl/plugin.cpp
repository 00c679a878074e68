// SPDX-License-Identifier: Apache-2.0
#include "plugin.h"

#include <cstdio>
#include <string>
#include <utility>

#include "backend.h"
#include "kernels/alignment.hpp"
#include "spirv.h"

#define XPU_FP4_EXPORT extern "C" __attribute__((visibility("default")))

namespace xpu_fp4::syclrt {
namespace {

class SyclPlugin final : public Plugin {
 public:
  std::vector<DeviceInfo> devices() const override { return sycl_devices(); }

  int64_t embedded_programs() const override { return static_cast<int64_t>(embedded_count()); }

  const Backend& cpu() const override {
    // It is never destroyed: at exit the SYCL runtime may be gone before a static of ours.
    static const Backend& backend = *make_backend(cpu_queue()).release();
    return backend;
  }

  std::unique_ptr<Backend> on_queue(void* queue, Allocate allocate) const override {
    return make_backend(queue_of(queue, std::move(allocate)));
  }

  PlannedDevice planned_device(const std::string& architecture, int64_t engines) const override {
    return syclrt::planned_device(architecture, engines);
  }

  Explanation explain(const PlannedDevice& device, const std::function<void(const Backend&)>& call) const override {
    return syclrt::explain(device, call);
  }
};

}  // namespace

XPU_FP4_EXPORT const Plugin* xpu_fp4_sycl_plugin() {
  static const SyclPlugin plugin;
  return &plugin;
}

// tools/level_mix.py asks which levels each of so many quads, of four scale bytes and no block of zeros, rules out.
XPU_FP4_EXPORT void xpu_fp4_sycl_levels(const uint8_t* scales, int64_t quads, int arrangement, int format, uint32_t* levels) {
  const AlignmentRule rule = alignment_rule(static_cast<Arrangement>(arrangement), static_cast<Format>(format));
  for (int64_t quad = 0; quad < quads; ++quad) {
    uint32_t scale[kQuad];
    for (int b = 0; b < kQuad; ++b) scale[b] = scales[quad * kQuad + b];
    levels[quad] = align(rule, scale, {}).levels;
  }
}

// `make isa` asks for this list (tools/gpu_programs.py).
XPU_FP4_EXPORT const char* xpu_fp4_sycl_variants() {
  static const std::string json = variants_json();
  return json.c_str();
}

// For csrc/sycl/spirv.py: the keys of the programs to compile ahead of time, a hexadecimal number each and a space after it.
XPU_FP4_EXPORT const char* xpu_fp4_sycl_keys(const char* whom) {
  thread_local std::string keys;
  keys.clear();
  for (const Variant& variant : programs_to_embed(whom)) {
    char key[32];
    std::snprintf(key, sizeof key, "%016llx ", static_cast<unsigned long long>(program_key(variant)));
    keys += key;
  }
  return keys.c_str();
}

// Compiles the one with that index (compile_to_spirv). Null, or why it cannot be compiled.
XPU_FP4_EXPORT const char* xpu_fp4_sycl_compile(const char* whom, int index) {
  thread_local std::string failure;
  try {
    compile_to_spirv(programs_to_embed(whom).at(static_cast<size_t>(index)));
    return nullptr;
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
}

}  // namespace xpu_fp4::syclrt
