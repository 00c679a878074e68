// SPDX-License-Identifier: Apache-2.0
// Finds the SYCL runtime at first use and loads the SYCL backend on top of it. Links to neither, so that a process without SYCL
// can load this.
#pragma once
#include <string>

#include "plugin.h"

namespace xpu_fp4::syclrt {

/// The loaded backend; loads it on the first call. Thread-safe; a failed attempt is made anew on the next call.
/// The runtime is looked for, in this order: where the process has it loaded already; in XPU_FP4_SYCL_LIB_DIR (nowhere else, if
/// that is set); $CMPLR_ROOT/lib; $ONEAPI_ROOT/compiler/latest/lib; the environment's lib folder (pip); where it was found
/// when this library was built; the system's library path.
/// Throws std::runtime_error that says what is missing and what was tried.
const Plugin& load_plugin();

/// Compiled kernels are kept there: $XPU_FP4_CACHE_DIR, else xpu_fp4 in the user's cache directory. A SYCL_CACHE_DIR of the
/// user's own has precedence. Empty, so no cache, where none of these is known.
std::string cache_dir();

/// Turns SYCL's on-disk cache on in cache_dir(), unless the user has settings of their own. Must run before SYCL's first use,
/// and holds for the whole process: it sets SYCL's environment variables. The folder is made for this user alone; throws
/// std::runtime_error where others own it or can write to it.
void configure_cache();

/// The file from which the SYCL runtime was loaded; empty before that.
std::string runtime_path();

}  // namespace xpu_fp4::syclrt
