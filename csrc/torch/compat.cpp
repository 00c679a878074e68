// SPDX-License-Identifier: Apache-2.0
#include "compat.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/jit/frontend/function_schema_parser.h>

#include <algorithm>
#include <memory>
#include <mutex>

namespace xpu_fp4 {
namespace {

std::vector<CompatBinding>& bindings() {
  static std::vector<CompatBinding> list;
  return list;
}

struct CompatOp {
  const char *library_namespace, *schema;
  std::string plain_name;
  bool writes;  // to an argument
  bool ours;    // defined or overridden by us

  std::string name() const { return std::string(library_namespace) + "::" + plain_name; }
};

// Lists the compatibility ops of all devices.
std::vector<CompatOp>& compat_ops() {
  static std::vector<CompatOp> ops = [] {
    std::vector<CompatOp> all;
    for (const CompatBinding& binding : bindings()) {
      for (const CompatRow& row : binding.rows()) {
        const auto is_row = [&](const CompatOp& op) { return op.name() == row.name(); };
        if (std::any_of(all.begin(), all.end(), is_row)) continue;
        all.push_back({row.library_namespace, row.row.schema, row.row.name(), row.writes, false});
      }
    }
    return all;
  }();
  return ops;
}

std::mutex mutex;

// A Library takes its registrations back when it is destroyed, and ours are for good.
torch::Library& new_library(torch::Library::Kind kind, const char* library_namespace, std::optional<c10::DispatchKey> key) {
  return *new torch::Library(kind, library_namespace, key, __FILE__, __LINE__);
}

void implement(CompatOp& op) {
  for (const CompatBinding& binding : bindings()) {
    for (CompatRow& row : binding.rows()) {
      if (row.name() != op.name()) continue;
      new_library(torch::Library::IMPL, op.library_namespace, binding.key)
          .impl(op.plain_name.c_str(), std::move(row.row.function));
    }
  }
  op.ours = true;
}

bool is_defined(const CompatOp& op) { return c10::Dispatcher::singleton().findSchema({op.name(), ""}).has_value(); }

void define(CompatOp& op) {
  const auto in = [&](c10::DispatchKey key) -> torch::Library& {
    return new_library(torch::Library::IMPL, op.library_namespace, key);
  };
  const std::string& name = op.plain_name;
  const std::vector<at::Tag> tags = {stride_tag()};
  new_library(torch::Library::FRAGMENT, op.library_namespace, std::nullopt).def(op.schema, tags);
  // There is no derivative: backward raises instead of giving no gradient.
  in(c10::DispatchKey::Autograd).impl(name.c_str(), torch::autograd::autogradNotImplementedFallback());
  in(c10::DispatchKey::ADInplaceOrView).impl(name.c_str(), torch::autograd::autogradNotImplementedInplaceOrViewFallback());
  // torch's own handling of lazily negated tensors aborts on an op that writes to an argument and returns nothing, or has it
  // write to a copy; ours refuses such arguments.
  if (op.writes) in(c10::DispatchKey::Negative).impl(name.c_str(), torch::CppFunction::makeFallthrough());
  implement(op);
}

void check_schema(const CompatOp& op) {
  const auto existing = c10::Dispatcher::singleton().findSchema({op.name(), ""});
  const auto difference = c10::findSchemaDifferences(existing->schema(), torch::jit::parseSchema(op.schema));
  TORCH_CHECK(!difference, "xpu_fp4: ", op.name(), " exists with the schema ", existing->schema(), ", expected ", op.schema,
              ": ", *difference);
}

}  // namespace

void add_compat_binding(const CompatBinding& binding) { bindings().push_back(binding); }

std::vector<std::string> define_compat_ops() {
  const std::lock_guard lock(mutex);
  std::vector<std::string> defined;
  for (CompatOp& op : compat_ops()) {
    if (is_defined(op)) continue;
    define(op);
    defined.push_back(op.name());
  }
  return defined;
}

std::vector<std::string> override_compat_ops() {
  const std::lock_guard lock(mutex);
  std::vector<std::string> replaced;
  for (CompatOp& op : compat_ops()) {
    if (op.ours) continue;
    if (!is_defined(op)) {
      define(op);
      continue;
    }
    check_schema(op);
    implement(op);
    replaced.push_back(op.name());
  }
  return replaced;
}

}  // namespace xpu_fp4
