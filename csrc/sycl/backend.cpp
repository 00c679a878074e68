// SPDX-License-Identifier: Apache-2.0
// Launches the kernels: which variant, over which range.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "../cpu/float_environment.h"
#include "../format/block.h"
#include "architectures.h"
#include "kernels/layout.hpp"
#include "plugin.h"
#include "programs.h"

namespace xpu_fp4::syclrt {
namespace {

// Lanes of a work-group: enough to fill a core, few enough that small outputs spread over all of them.
constexpr int64_t kGroupLanes = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The alignment variant that these addresses allow.
int alignment_of(std::initializer_list<const void*> addresses) {
  uintptr_t bits = 0;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return bits % 16 == 0 ? 16 : 1;
}

Weights weights_of(const Weight& w) {
  if (w.k % kQuadElements != 0) return Weights::any;
  const bool dwords = reinterpret_cast<uintptr_t>(w.scale) % 4 == 0 && w.scale_row_stride % 4 == 0 && w.scale_block_stride == 1;
  return dwords ? Weights::scales_together : Weights::whole_quads;
}

bool starts_cache_line(const void* address) { return reinterpret_cast<uintptr_t>(address) % 64 == 0; }

sycl::nd_range<1> linear_range(int64_t lanes) {
  return {static_cast<size_t>(round_up(lanes, kGroupLanes)), static_cast<size_t>(kGroupLanes)};
}

sycl::nd_range<2> grid(int64_t rows, int64_t lanes) {
  return {{static_cast<size_t>(rows), static_cast<size_t>(round_up(lanes, kGroupLanes))},
          {1, static_cast<size_t>(kGroupLanes)}};
}

// An operand in the expanded form of kernels/layout.hpp. Each array starts on a cache line, as block loads want it.
struct Expanded {
  ExpandedLayout layout;
  uint8_t* codes;
  uint32_t* exponents;
  uint32_t* levels;
  std::shared_ptr<void> memory;  // null where it is the caller's

  Expanded(const ExpandedLayout& of, uint8_t* at, std::shared_ptr<void> owned = nullptr)
      : layout(of),
        codes(at),
        exponents(reinterpret_cast<uint32_t*>(codes + round_up(layout.codes_bytes(), 64))),
        levels(exponents + round_up(layout.exponents_bytes(), 64) / 4),
        memory(std::move(owned)) {}
  static int64_t bytes(const ExpandedLayout& layout) {
    return round_up(layout.codes_bytes(), 64) + round_up(layout.exponents_bytes(), 64) + layout.levels_bytes();
  }
};

ExpandedLayout weight_layout(const Architecture& architecture, int64_t n, int64_t k) {
  return {n, round_up(n, kColumnPadding), ceil_div(k, kQuadElements), architecture.sub_group};
}

class SyclBackend final : public Backend {
 public:
  SyclBackend(sycl::queue queue, Allocate allocate, bool wait)
      : queue_(std::move(queue)), allocate_(std::move(allocate)), wait_(wait) {}

  void quantize(const Quantize& args) const override {
    const int64_t vectors = args.rows * args.k * size_of(args.dtype) / 16;
    launch(portable("quantize.cpp", args.dtype, {args.x}), "quantize", linear_range(vectors), args.x, args.codes, args.scale,
           vectors, static_cast<int>(args.to.mode));
  }

  void group_quantize(const GroupQuantize& args) const override {
    const int64_t vectors = args.rows * args.k * size_of(args.dtype) / 16;
    launch(portable("quantize.cpp", args.dtype, {args.x}), "group_quantize", linear_range(vectors), args.x, args.codes,
           args.scale, vectors, args.k / kBlock, args.scale_row_stride, args.scale_block_stride, args.scale_floor);
  }

  void dequantize(const Dequantize& args) const override {
    const int64_t lanes = args.rows * args.k / 8;
    launch(portable("dequantize.cpp", args.dtype, {}), "dequantize", linear_range(lanes), args.codes, args.scale, args.out,
           lanes);
  }

  std::optional<std::string> refusal(const Product& product) const override {
    if (product.activations.to.format == Format::mxint8) return "cannot be multiplied with MXINT8 activations yet";
    switch (product.weight.form) {
      case WeightForm::stored: return std::nullopt;
      case WeightForm::strips: return "is prepacked for the native kernels, which this backend's are not";
      case WeightForm::expanded:
        if (matrix_architecture(variant_override()) == nullptr) return kNoExpandedForm;
        return std::nullopt;
    }
    return std::nullopt;
  }

  void multiply(const Product& product) const override {
    const Activations& a = product.activations;
    if (a.to.format == Format::none) return multiply_floats(product);
    // What the native kernel cannot load, the exact ones compute.
    const bool native =
        !a.are_codes || (a.k >= kQuadElements && starts_cache_line(a.data) && starts_cache_line(product.weight.codes));
    const Choice choice = choose({a.m, product.weight.n, a.k, product.weight.expanded() != nullptr}, native);
    const bool reads_codes = choice.plan.kernel == Kernel::portable || choice.plan.kernel == Kernel::native;
    if (reads_codes && !a.are_codes) return multiply_quantized(product);
    if (choice.plan.kernel == Kernel::portable) return gemm_portable(product);
    if (choice.plan.kernel == Kernel::native) return gemm_native(choice, product);
    const Expanded expanded = expand_activations(choice, a);
    if (choice.plan.kernel == Kernel::small) return gemm_small(choice, expanded, product);
    gemm_large(choice, expanded, product);
  }

  PreparedShape prepared_shape(WeightForm, int64_t n, int64_t k) const override {
    // Group-major arrays: the size of a group tells its lanes, so that no device takes another's form.
    const ExpandedLayout layout = weight_layout(*matrix_architecture(variant_override()), n, k);
    const int64_t groups = layout.groups();
    return {groups, groups == 0 ? 0 : Expanded::bytes(layout) / groups};
  }

  void prepare(const Weight& weight, WeightForm, uint8_t* out) const override {
    const Architecture& architecture = *matrix_architecture(variant_override());
    expand_weight(architecture, weight, Expanded(weight_layout(architecture, weight.n, weight.k), out));
  }

  void restore(const Weight&, uint8_t*, uint8_t*) const override { throw std::logic_error("xpu_fp4: strips were refused"); }

 private:
  // A variant of a kernel that runs on every device.
  Variant portable(const char* file, std::optional<DType> dtype, std::initializer_list<const void*> addresses) const {
    const Target target = target_of(queue_.get_device());
    Macros macros = {
        {"SUB_GROUP", target.sub_group}, {"MATRIX_UNIT", target.matrix_unit}, {"ALIGNMENT", alignment_of(addresses)}};
    if (dtype) macros.emplace_back("DTYPE", static_cast<int>(*dtype));
    return {file, std::move(macros)};
  }

  struct Choice {
    const Architecture* architecture;  // null for the portable kernels
    std::optional<Kernel> forced;
    GemmPlan plan;  // of W4A4
  };

  Choice choose(const ProductShape& shape, bool native = true) const {
    const Choice portable = {nullptr, std::nullopt, {Kernel::portable, {}, 1, 1, 0}};
    Override forced = variant_override();
    if (forced.kernel == Kernel::native && !native) forced.kernel = std::nullopt;
    const Architecture* architecture = matrix_architecture(forced);
    if (architecture == nullptr || shape.m == 0 || shape.n == 0 || shape.k == 0) return portable;
    const auto units = static_cast<int64_t>(queue_.get_device().get_info<sycl::info::device::max_compute_units>());
    return {architecture, forced.kernel, plan_gemm(*architecture, units, shape, forced.kernel)};
  }

  // Null where the portable kernels run.
  const Architecture* matrix_architecture(const Override& forced) const {
    if (forced.kernel == Kernel::portable) return nullptr;
    return forced.architecture != nullptr ? forced.architecture : architecture_of(queue_.get_device());
  }

  Macros macros_of(const Architecture& architecture) const {
    return {{"SUB_GROUP", architecture.sub_group},
            {"MATRIX_UNIT", queue_.get_device().is_gpu()},
            {"BLOCK_2D", architecture.block_2d}};
  }

  // For kernels that read codes: quantizes to memory first.
  void multiply_quantized(const Product& product) const {
    const Activations& a = product.activations;
    const std::shared_ptr<void> codes = allocate_(a.m * code_bytes(a.to.format, a.k)), scale = allocate_(a.m * a.k / kBlock);
    auto *codes_at = static_cast<uint8_t*>(codes.get()), *scale_at = static_cast<uint8_t*>(scale.get());
    quantize({a.data, a.dtype, a.to, a.m, a.k, codes_at, scale_at});
    multiply({Activations::codes(a.to.format, codes_at, scale_at, a.m, a.k), product.weight, product.output});
  }

  void gemm_portable(const Product& product) const {
    const auto& [a, w, out] = product;
    const int64_t sub_group = target_of(queue_.get_device()).sub_group;
    launch(portable("gemm.cpp", std::nullopt, {w.codes}), "gemm", grid(ceil_div(a.m, sub_group), w.n), a.data, a.scale, w.codes,
           w.scale, w.scale_row_stride, w.scale_block_stride, out.bias.data, out.bias.row_stride, out.bias.column_stride, out.y,
           static_cast<int>(out.dtype), a.m, w.n, w.k);
  }

  void multiply_floats(const Product& product) const {
    const Activations& a = product.activations;
    const Choice choice = choose({a.m, product.weight.n, a.k, false});
    // The matrix unit has no float32.
    if (choice.architecture == nullptr || a.dtype == DType::f32) return gemm_w4a16_portable(product);
    gemm_w4a16_matrix(*choice.architecture, plan_w4a16(*choice.architecture, a.m, choice.forced), product);
  }

  void gemm_w4a16_portable(const Product& product) const {
    const auto& [a, w, out] = product;
    launch(portable("gemm_w4a16.cpp", a.dtype, {w.codes}), "gemm_w4a16", grid(a.m, w.n), a.data, w.codes, w.scale,
           w.scale_row_stride, w.scale_block_stride, out.bias.data, out.bias.row_stride, out.bias.column_stride, out.y, a.m,
           w.n, w.k);
  }

  void gemm_w4a16_matrix(const Architecture& architecture, const GemmPlan& plan, const Product& product) const {
    const auto& [a, w, out] = product;
    const bool split = plan.kernel == Kernel::small;
    const int64_t lanes = architecture.sub_group;
    Macros macros = macros_of(architecture);
    macros.insert(macros.end(), {{"ALIGNMENT", alignment_of({w.codes})},
                                 {"ALIGNED_ROWS", starts_cache_line(a.data)},
                                 {"DTYPE", static_cast<int>(a.dtype)},
                                 {"ROW_UNITS", plan.tile.row_units},
                                 {"COLUMN_UNITS", plan.tile.column_units},
                                 {"SPLIT", split ? plan.group_columns : 1},
                                 {"REGISTERS", split ? 128 : 256}});
    // A work-group's sub-groups share one tile's K, or have a tile each.
    const int64_t tile_columns = ceil_div(w.n, lanes * plan.tile.column_units);
    const int64_t sub_groups = split ? tile_columns * plan.group_columns : round_up(tile_columns, plan.group_columns);
    const sycl::nd_range<2> range = {
        {static_cast<size_t>(ceil_div(a.m, 8 * plan.tile.row_units)), static_cast<size_t>(sub_groups * lanes)},
        {1, static_cast<size_t>(plan.group_columns * lanes)}};
    launch({"gemm_w4a16_matrix.cpp", macros}, "gemm_w4a16_matrix", range, a.data, w.codes, w.scale, w.scale_row_stride,
           w.scale_block_stride, out.bias.data, out.bias.row_stride, out.bias.column_stride, out.y, a.m, w.n, w.k);
  }

  void gemm_native(const Choice& choice, const Product& product) const {
    const auto& [a, w, out] = product;
    const auto& [row_units, column_units] = choice.plan.tile;
    const int64_t lanes = choice.architecture->sub_group;
    Macros macros = macros_of(*choice.architecture);
    macros.insert(macros.end(), {{"ALIGNMENT", 16},
                                 {"DTYPE", static_cast<int>(out.dtype)},
                                 {"ROW_UNITS", row_units},
                                 {"COLUMN_UNITS", column_units},
                                 {"REGISTERS", 256}});
    const int64_t columns = round_up(ceil_div(w.n, lanes * column_units), choice.plan.group_columns);
    const sycl::nd_range<2> range = {{static_cast<size_t>(ceil_div(a.m, 8 * row_units)), static_cast<size_t>(columns * lanes)},
                                     {1, static_cast<size_t>(choice.plan.group_columns * lanes)}};
    launch({"gemm_native.cpp", macros}, "gemm_native", range, a.data, a.scale, w.codes, w.scale, w.scale_row_stride,
           w.scale_block_stride, out.bias.data, out.bias.row_stride, out.bias.column_stride, out.y, a.m, w.n, w.k);
  }

  Expanded allocate_expanded(const ExpandedLayout& layout) const {
    const std::shared_ptr<void> memory = allocate_(Expanded::bytes(layout));
    return {layout, static_cast<uint8_t*>(memory.get()), memory};
  }

  static sycl::nd_range<2> expand_range(const Expanded& out) { return grid(out.layout.quads, out.layout.padded_rows); }

  static int64_t rows_of_tile(const Choice& choice) {
    return choice.plan.kernel == Kernel::large ? 8 * choice.plan.tile.row_units
                                               : round_up(choice.plan.rows, choice.architecture->sub_group);
  }

  Expanded expand_activations(const Choice& choice, const Activations& a) const {
    const Architecture& architecture = *choice.architecture;
    const Expanded out =
        allocate_expanded({a.m, round_up(a.m, rows_of_tile(choice)), ceil_div(a.k, kQuadElements), architecture.sub_group});
    Macros macros = macros_of(architecture);
    const Arrangement arrangement = architecture.block_2d ? Arrangement::rows : Arrangement::row_fragments;
    const ElementOrder order = choice.plan.kernel == Kernel::small ? ElementOrder::packed : ElementOrder::apart;
    macros.insert(macros.end(), {{"ARRANGEMENT", static_cast<int>(arrangement)},
                                 {"ORDER", static_cast<int>(order)},
                                 {"ALIGNMENT", alignment_of({a.data})}});
    if (a.are_codes) {
      launch({"expand.cpp", macros}, "expand", expand_range(out), a.data, a.scale, a.k / kBlock, int64_t{1}, out.codes,
             out.exponents, out.levels, out.layout.rows, out.layout.padded_rows, a.k);
    } else {
      macros.emplace_back("DTYPE", static_cast<int>(a.dtype));
      launch({"expand.cpp", macros}, "quantize_expand", expand_range(out), a.data, static_cast<int>(a.to.mode), out.codes,
             out.exponents, out.levels, out.layout.rows, out.layout.padded_rows, a.k);
    }
    return out;
  }

  void gemm_small(const Choice& choice, const Expanded& a, const Product& product) const {
    const Weight& w = product.weight;
    const Output& out = product.output;
    const int64_t lanes = choice.architecture->sub_group, m = a.layout.rows;
    Macros macros = macros_of(*choice.architecture);
    macros.insert(macros.end(), {{"ALIGNMENT", alignment_of({w.codes})},
                                 {"DTYPE", static_cast<int>(out.dtype)},
                                 {"ROWS", choice.plan.rows},
                                 {"WEIGHTS", static_cast<int>(weights_of(w))}});
    const sycl::nd_range<2> range = {
        {static_cast<size_t>(ceil_div(m, choice.plan.rows)), static_cast<size_t>(ceil_div(w.n, lanes) * lanes * kSmallSplit)},
        {1, static_cast<size_t>(lanes * kSmallSplit)}};
    launch({"gemm_small.cpp", macros}, "gemm_small", range, a.codes, a.exponents, w.codes, w.scale, w.scale_row_stride,
           w.scale_block_stride, out.bias.data, out.bias.row_stride, out.bias.column_stride, out.y, m, w.n, w.k, kMagicBits);
  }

  void gemm_large(const Choice& choice, const Expanded& a, const Product& product) const {
    const Weight& w = product.weight;
    const Output& out = product.output;
    const auto& [kernel, tile, group_rows, group_columns, rows] = choice.plan;
    const Architecture& architecture = *choice.architecture;
    const int64_t lanes = architecture.sub_group, m = a.layout.rows;
    const Expanded b = expanded_weight(architecture, w);
    Macros macros = macros_of(architecture);
    macros.insert(macros.end(), {{"ALIGNMENT", 16},
                                 {"DTYPE", static_cast<int>(out.dtype)},
                                 {"ROW_UNITS", tile.row_units},
                                 {"COLUMN_UNITS", tile.column_units},
                                 {"REGISTERS", 256}});
    const auto tile_rows = static_cast<size_t>(round_up(ceil_div(m, 8 * tile.row_units), group_rows));
    const auto tile_columns = static_cast<size_t>(round_up(ceil_div(w.n, lanes * tile.column_units), group_columns));
    const sycl::nd_range<2> range = {{tile_rows, tile_columns * lanes},
                                     {static_cast<size_t>(group_rows), static_cast<size_t>(group_columns * lanes)}};
    launch({"gemm_large.cpp", macros}, "gemm_large", range, a.codes, a.exponents, a.levels, b.codes, b.exponents, b.levels,
           out.bias.data, out.bias.row_stride, out.bias.column_stride, out.y, m, w.n, static_cast<uint32_t>(a.layout.quads),
           kMagicBits);
  }

  Expanded expanded_weight(const Architecture& architecture, const Weight& w) const {
    const ExpandedLayout layout = weight_layout(architecture, w.n, w.k);
    if (w.expanded() != nullptr) return {layout, const_cast<uint8_t*>(w.expanded())};  // products only read it
    const Expanded b = allocate_expanded(layout);
    expand_weight(architecture, w, b);
    return b;
  }

  void expand_weight(const Architecture& architecture, const Weight& w, const Expanded& b) const {
    Macros macros = macros_of(architecture);
    macros.insert(macros.end(), {{"ARRANGEMENT", static_cast<int>(Arrangement::column_fragments)},
                                 {"ORDER", static_cast<int>(ElementOrder::apart)},
                                 {"ALIGNMENT", alignment_of({w.codes})}});
    launch({"expand.cpp", macros}, "expand", expand_range(b), w.codes, w.scale, w.scale_row_stride, w.scale_block_stride,
           b.codes, b.exponents, b.levels, b.layout.rows, b.layout.padded_rows, w.k);
  }

  template <int dimensions, class... Args>
  void launch(const Variant& variant, const char* kernel, sycl::nd_range<dimensions> range, Args... args) const {
    if (range.get_global_range().size() == 0) return;
    // The CPU device's worker threads take over the float environment of the thread that submits.
    const DefaultFloatEnvironment environment;
    try {
      const sycl::kernel compiled = get_kernel(queue_, variant, kernel);
      const sycl::event event = sycl::queue(queue_).submit([&](sycl::handler& handler) {
        handler.set_args(args...);
        handler.parallel_for(range, compiled);
      });
      if (wait_) sycl::event(event).wait_and_throw();
    } catch (const sycl::exception& error) {
      throw std::runtime_error("xpu_fp4: the SYCL kernel " + std::string(kernel) + " failed on " +
                               queue_.get_device().get_info<sycl::info::device::name>() + ": " + error.what());
    }
  }

  sycl::queue queue_;
  Allocate allocate_;
  bool wait_;  // tensors on the CPU: the caller may read them at once
};

std::shared_ptr<void> allocate_on_host(int64_t bytes) {
  void* memory = std::aligned_alloc(64, static_cast<size_t>(round_up(std::max<int64_t>(bytes, 1), 64)));
  if (memory == nullptr) throw std::bad_alloc();
  return {memory, std::free};
}

DeviceInfo describe(const sycl::device& device) {
  const Target target = target_of(device);
  const auto platform = device.get_platform().get_info<sycl::info::platform::name>();
  return {device.get_info<sycl::info::device::name>(), platform + " " + device.get_info<sycl::info::device::driver_version>(),
          target.sub_group, target.matrix_unit};
}

sycl::queue cpu_queue() {
  try {
    // The default handler of asynchronous errors ends the process; this one lets wait_and_throw raise them.
    const auto rethrow = [](const sycl::exception_list& errors) {
      for (const std::exception_ptr& error : errors) std::rethrow_exception(error);
    };
    return sycl::queue(sycl::cpu_selector_v, rethrow, sycl::property::queue::in_order{});
  } catch (const sycl::exception& error) {
    throw std::runtime_error(
        std::string("xpu_fp4: SYCL has no CPU device: ") + error.what() +
        ". It needs Intel's OpenCL CPU runtime (pip package intel-opencl-rt), OCL_ICD_FILENAMES naming its "
        "libintelocl.so, and an ONEAPI_DEVICE_SELECTOR, if set, that admits opencl:cpu");
  }
}

class SyclPlugin final : public Plugin {
 public:
  std::vector<DeviceInfo> devices() const override {
    try {
      std::vector<DeviceInfo> result;
      for (const sycl::device& device : sycl::device::get_devices()) {
        if (device.is_cpu() || device.is_gpu()) result.push_back(describe(device));
      }
      return result;
    } catch (const sycl::exception& error) {
      throw std::runtime_error(std::string("xpu_fp4: SYCL cannot list its devices: ") + error.what());
    }
  }

  const Backend& cpu() const override {
    const DefaultFloatEnvironment environment;  // the runtime starts its threads now
    // Not destroyed: at exit the SYCL runtime may be gone before a static of ours.
    static const SyclBackend& backend = *new SyclBackend(cpu_queue(), allocate_on_host, true);
    return backend;
  }

  std::unique_ptr<Backend> on_queue(void* queue, Allocate allocate) const override {
    const auto& stream = *static_cast<sycl::queue*>(queue);
    if (!stream.is_in_order()) throw std::runtime_error("xpu_fp4: the queue must be in-order: an op's kernels rely on it");
    return std::make_unique<SyclBackend>(stream, std::move(allocate), false);
  }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const Plugin* xpu_fp4_sycl_plugin() {
  static const SyclPlugin plugin;
  return &plugin;
}

}  // namespace xpu_fp4::syclrt
