// SPDX-License-Identifier: Apache-2.0
// What `xpu-fp4 explain` asks: which kernels compute a product or a layer of experts on a device that need not be here. Names
// with an underscore: not an interface.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <functional>
#include <sstream>

#include "../cpu/backend.h"
#include "../format/fp_quant.h"
#include "../sycl/loader.h"
#include "checks.h"
#include "cpu_backends.h"
#include "multiply.h"

namespace xpu_fp4 {
namespace {

constexpr const char* kOp = "explain";

// On a cache line, like every operand of torch's allocators. Nobody follows it.
constexpr uintptr_t kAddress = uintptr_t{1} << 20;
template <class T>
T* somewhere() {
  return reinterpret_cast<T*>(kAddress);
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out + '"';
}

std::string json(const syclrt::PlannedDevice* device) {
  if (device == nullptr) return "null";
  std::ostringstream out;
  out << "{\"architecture\": " << quoted(device->architecture) << ", \"card\": " << quoted(device->card)
      << ", \"engines\": " << device->engines << ", \"lanes\": " << device->lanes << ", \"ghz\": " << device->ghz
      << ", \"bandwidth\": " << device->bandwidth << ", \"matrix_clocks\": " << device->matrix_clocks << "}";
  return out.str();
}

std::string json(const Explanation& explained, const syclrt::PlannedDevice* device = nullptr) {
  std::ostringstream out;
  out.precision(9);
  out << "{\"kernel\": " << quoted(explained.kernel) << ", \"variant\": " << quoted(explained.variant)
      << ", \"passed_over\": " << quoted(explained.passed_over) << ", \"weight_bytes\": " << explained.weight_bytes
      << ", \"scratch_bytes\": " << explained.scratch_bytes << ", \"clocks\": ";
  if (explained.clocks)
    out << *explained.clocks;
  else
    out << "null";
  out << ", \"device\": " << json(device) << ", \"launches\": [";
  const char* before = "";
  for (const ExplainedLaunch& launch : explained.launches) {
    out << before << "{\"kernel\": " << quoted(launch.kernel) << ", \"variant\": " << quoted(launch.variant)
        << ", \"work_groups\": " << launch.work_groups << ", \"group_lanes\": " << launch.group_lanes << "}";
    before = ", ";
  }
  out << "]}";
  return out.str();
}

// The native kernels of that name, those of this processor for "cpu"; null for the name of a GPU's architecture.
const cpu::KernelTable* native(std::string_view device) {
  if (device == "cpu") return &cpu::best_kernels();
  for (const cpu::KernelTable* table : cpu::all_kernels()) {
    if (device == table->isa) return table;
  }
  return nullptr;
}

Quantizer quantizer(std::string_view mode, std::string_view scale_mode, int64_t group, int64_t hadamard, bool input_offset) {
  TORCH_CHECK(mode == "w4a4" || mode == "w4a8" || mode == "w4a16", kOp, ": mode is \"", std::string(mode),
              "\", expected \"w4a4\", \"w4a8\" or \"w4a16\"");
  Quantizer to = mode == "w4a16"  ? ops::kAsTheyAre
                 : mode == "w4a8" ? Quantizer::mxint8(ops::check_group(kOp, group))
                                  : Quantizer::mxfp4(ops::check_scale_mode(kOp, scale_mode));
  to.transform = {static_cast<int>(hadamard), input_offset ? somewhere<float>() : nullptr};
  return to;
}

Weight weight_of(int64_t n, int64_t k, WeightForm form) {
  TORCH_CHECK(n > 0, kOp, ": N is ", n, ", expected more than 0");
  TORCH_CHECK(k > 0 && k % kBlock == 0, kOp, ": K is ", k, ", expected a multiple of ", kBlock);
  return {form, n, k, somewhere<uint8_t>(), somewhere<uint8_t>(), k / kBlock, 1, somewhere<uint8_t>()};
}

int64_t stored_bytes(const Weight& w) { return w.n * (w.k / 2 + w.k / kBlock); }

std::string on_gpu(std::string_view name, int64_t engines, const std::function<void(const Backend&)>& call,
                   const std::function<int64_t(const Backend&)>& weight_bytes) {
  const syclrt::Plugin& plugin = syclrt::load_plugin();
  const syclrt::PlannedDevice device = plugin.planned_device(std::string(name), engines);
  int64_t bytes = 0;
  Explanation explained = plugin.explain(device, [&](const Backend& backend) {
    bytes = weight_bytes(backend);
    call(backend);
  });
  explained.weight_bytes = bytes;
  return json(explained, &device);
}

std::string explain_linear(std::string_view device, int64_t m, int64_t n, int64_t k, at::ScalarType dtype,
                           std::string_view mode, std::string_view scale_mode, int64_t group, int64_t hadamard,
                           bool input_offset, double weight_global_scale, bool expanded, int64_t engines) {
  const DType of = ops::check_out_dtype(kOp, "dtype", dtype);
  const Quantizer to = quantizer(mode, scale_mode, group, hadamard, input_offset);
  const cpu::KernelTable* table = native(device);
  const WeightForm form = expanded ? WeightForm::expanded : table != nullptr ? WeightForm::strips : WeightForm::stored;
  TORCH_CHECK(m > 0, kOp, ": M is ", m, ", expected more than 0");
  const float factor = 1.0f / (ops::check_global_scale(kOp, weight_global_scale) * fp_quant::global_scale(to.mode));
  const Product product = {Activations::floats(somewhere<void>(), of, to, m, k),
                           weight_of(n, k, form),
                           {somewhere<void>(), of, {nullptr, 0, 0}, factor}};
  const auto check = [&](const Backend& backend) {
    const auto reason = backend.refusal(product);
    TORCH_CHECK(!reason, kOp, ": the weight ", *reason);
  };
  if (table != nullptr) {
    check(*cpu::make_backend(*table, {}));
    return json(cpu::explain(*table, product));
  }
  return on_gpu(device, engines, [&](const Backend& backend) { backend.multiply(product); }, [&](const Backend& backend) {
    check(backend);
    if (!expanded) return stored_bytes(product.weight);
    const PreparedShape shape = backend.prepared_shape(form, n, k);
    return stored_bytes(product.weight) + shape.rows * shape.row_bytes;
  });
}

std::string explain_experts(std::string_view device, int64_t tokens, int64_t top_k, int64_t experts, int64_t hidden,
                            int64_t intermediate, at::ScalarType dtype, std::string_view mode, std::string_view scale_mode,
                            int64_t group, int64_t hadamard, bool input_offset, int64_t engines) {
  const DType of = ops::check_out_dtype(kOp, "dtype", dtype);
  const Quantizer to = quantizer(mode, scale_mode, group, hadamard, false);  // offsets are the products' own
  const float* offset = input_offset ? somewhere<float>() : nullptr;
  TORCH_CHECK(tokens > 0 && experts > 0 && top_k > 0 && top_k <= experts, kOp, ": ", tokens, " tokens of ", top_k, " of ",
              experts, " experts, expected more than 0, and no more of them than there are");
  const Weight w13 = weight_of(2 * intermediate, hidden, WeightForm::stored),
               w2 = weight_of(hidden, intermediate, WeightForm::stored);
  TORCH_CHECK(native(device) == nullptr, kOp, ": ", std::string(device), " multiplies each expert by itself: ask for that");
  const Experts layer = {somewhere<void>(),
                         of,
                         tokens,
                         to,
                         somewhere<int32_t>(),
                         somewhere<float>(),
                         top_k,
                         nullptr,
                         0,
                         experts,
                         w13,
                         w2,
                         nullptr,
                         nullptr,
                         {GateKind::silu_mul},
                         false,
                         offset,
                         offset,
                         somewhere<void>()};
  return on_gpu(device, engines, [&](const Backend& backend) { backend.experts(layer); },
                [&](const Backend&) { return experts * (stored_bytes(w13) + stored_bytes(w2)); });
}

// The native kernels that this build has, best first.
std::vector<std::string> native_isas() {
  std::vector<std::string> names;
  for (const cpu::KernelTable* table : cpu::all_kernels()) names.emplace_back(table->isa);
  return names;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(xpu_fp4, library) {
  library.def("_native_isas() -> str[]", native_isas);
  library.def(
      "_explain_linear(str device, int m, int n, int k, ScalarType dtype, str mode, str scale_mode=\"even\", int group=128, "
      "int hadamard=0, bool input_offset=False, float weight_global_scale=1.0, bool expanded=False, int engines=0) -> str",
      explain_linear);
  library.def(
      "_explain_experts(str device, int tokens, int top_k, int experts, int hidden, int intermediate, ScalarType dtype, str "
      "mode, str scale_mode=\"even\", int group=128, int hadamard=0, bool input_offset=False, int engines=0) -> str",
      explain_experts);
}

}  // namespace xpu_fp4
