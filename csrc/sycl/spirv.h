// SPDX-License-Identifier: Apache-2.0
// Programs that were compiled when the library was built. csrc/sycl/spirv.py has the library compile them, through the
// functions that it exports for that, and puts what comes out into it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "variants.h"

namespace xpu_fp4::syclrt {

/// A hash of all that decides on a program: the files that its source includes, and its options. So SPIR-V of other sources
/// than the library's is never found.
uint64_t program_key(const Variant& variant);

/// SPIR-V in the library's own memory.
struct Spirv {
  const std::byte* data;
  size_t size;
};
std::optional<Spirv> embedded_spirv(uint64_t key);

/// How many programs were embedded.
size_t embedded_count();

/// Those of ahead_of_time whose SPIR-V is all that a driver needs to know.
std::vector<Variant> programs_to_embed(const std::string& whom);

/// Compiles a variant as the runtime does, but no further than to SPIR-V, which SYCL writes to a file where SYCL_DUMP_IMAGES=1.
/// Throws CannotBuild with the compiler's log.
void compile_to_spirv(const Variant& variant);

}  // namespace xpu_fp4::syclrt
