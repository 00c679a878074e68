// SPDX-License-Identifier: Apache-2.0
// Kernels compiled at first use, one program per variant and device, kept for the life of the process. SYCL keeps them on disk
// too (sycl/loader.cpp says where).
#pragma once
#include <optional>
#include <string>
#include <sycl/sycl.hpp>

#include "../format/float_bits.h"

namespace xpu_fp4::syclrt {

/// How a device wants the kernels built.
struct Target {
  int sub_group;  // 16, or 8 where the matrix unit is 8 lanes wide
  bool matrix_unit;
};
Target target_of(const sycl::device& device);

/// What a program is compiled for besides its device: the macros of kernels/common.hpp.
struct Variant {
  std::string file;  // "gemm.cpp"
  std::optional<DType> dtype;
  int alignment;
};

/// The kernel of that name, compiled if need be. Thread-safe: several threads may build different variants at once, and one
/// variant is built once. Throws std::runtime_error with the compiler's log.
sycl::kernel get_kernel(const sycl::queue& queue, const Variant& variant, const std::string& name);

}  // namespace xpu_fp4::syclrt
