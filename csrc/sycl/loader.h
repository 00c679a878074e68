// SPDX-License-Identifier: Apache-2.0
// Finds the SYCL runtime at first use and loads the SYCL backend on top of it. Links to neither, so that a process without SYCL
// can load this.
#pragma once
#include <string>

#include "plugin.h"

namespace xpu_fp4::syclrt {

/// The loaded backend; loads it on the first call. Thread-safe; a failed attempt is made anew on the next call.
/// There is one, beside this library, for each major version of libsycl.so that it was built for. That of the runtime which the
/// process has loaded already is taken, torch's for instance. Else the runtime is looked for in XPU_FP4_SYCL_LIB_DIR (nowhere
/// else, if that is set), $CMPLR_ROOT/lib, $ONEAPI_ROOT/compiler/latest/lib, the lib folder of our environment and of torch's
/// (pip), torch's own folder, the folder that this was built with, and the system's library path; in each the newest first.
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

/// The file of the loaded backend; empty before that.
std::string backend_path();

/// Loads a library that lies beside this one, and gives a symbol of it. Throws std::runtime_error that says what is missing.
void* load_beside(const std::string& file, const char* symbol);

}  // namespace xpu_fp4::syclrt
