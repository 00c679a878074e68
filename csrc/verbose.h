// SPDX-License-Identifier: Apache-2.0
// XPU_FP4_VERBOSE=1 prints a line on stderr for each call: which kernel it took, and why others were passed over.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <string>

namespace xpu_fp4 {

/// Whether the environment asks for these lines. Read at each call.
inline bool verbose() {
  const char* variable = std::getenv("XPU_FP4_VERBOSE");
  return variable != nullptr && *variable != '\0' && std::string(variable) != "0";
}

inline void print_verbose(const std::string& line) { std::fprintf(stderr, "xpu_fp4: %s\n", line.c_str()); }

}  // namespace xpu_fp4
