// SPDX-License-Identifier: Apache-2.0
// The names that vLLM calls (table.h), beside a library of the same names.
// Two C++ definitions of one op abort the process, and which library loads first is not ours to say. Hence:
//   - define_compat_ops() defines those that nobody has defined yet. The Python package calls it at import, unless the package
//     vllm_xpu_kernels is installed, since that one would define them later.
//   - override_compat_ops() puts our implementation in place of an existing one, which the dispatcher allows in either order.
#pragma once
#include <c10/core/DispatchKey.h>

#include <string>
#include <vector>

#include "table.h"

namespace xpu_fp4 {

/// A device's implementations of those that it has.
struct CompatBinding {
  c10::DispatchKey key;
  std::vector<CompatRow> (*rows)();
};

/// Adds a device; to be called before the functions below, from a static initialiser.
void add_compat_binding(const CompatBinding& binding);

/// Defines and implements each op that the dispatcher does not know. Returns the names that it defined.
std::vector<std::string> define_compat_ops();

/// Implements each op that the dispatcher knows and whose implementation is not ours already, and defines the others. Returns
/// the names whose implementation it replaced; torch warns once for each.
std::vector<std::string> override_compat_ops();

}  // namespace xpu_fp4
