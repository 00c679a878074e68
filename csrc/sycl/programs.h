// SPDX-License-Identifier: Apache-2.0
// Kernels made at first use, one program per variant and device, kept for the life of the process: from the SPIR-V that the
// library carries, or compiled from source, which SYCL keeps on disk too (sycl/loader.cpp says where).
#pragma once
#include <optional>
#include <string>
#include <sycl/sycl.hpp>
#include <vector>

#include "queue.h"
#include "variants.h"

namespace xpu_fp4::syclrt {

/// Null for a GPU that we do not know, which is said once on stderr, and for other devices.
const Architecture* architecture_of(const sycl::device& device);

Target target_of(const sycl::device& device);

/// What to say where the error is that memory ran out; else none.
std::optional<std::string> out_of_memory(const sycl::exception& error, const sycl::device& device);

/// The compiler's options for a variant.
std::vector<std::string> build_options(const Variant& variant);

/// The kernel of that name, built if need be: on a GPU from SPIR-V, else from source; on other devices from source, of which
/// SYCL keeps machine code on disk, as a GPU's driver does of both. XPU_FP4_KERNELS=spirv or source allows one of them alone.
/// Thread-safe: several threads may build different variants at once, and one variant is built once. Throws CannotBuild with
/// the compiler's log, or if the kernel has another sub-group size than the variant's SUB_GROUP; on a GPU the next call throws
/// the same, and does not build again. Throws std::runtime_error where memory runs out, or for another value of the variable.
sycl::kernel get_kernel(const sycl::queue& queue, const Variant& variant, const std::string& name);

}  // namespace xpu_fp4::syclrt
