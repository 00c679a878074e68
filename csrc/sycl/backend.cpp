// SPDX-License-Identifier: Apache-2.0
// Which kernels compute a product, and why.
#include "backend.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "../verbose.h"
#include "launch/launch.h"

namespace xpu_fp4::syclrt {
namespace {

std::string name_of(Format activations) {
  return activations == Format::none ? "w4a16" : activations == Format::mxfp4 ? "w4a4" : "w4a8";
}

// A kernel to run, and why not another one.
struct Choice {
  const Architecture* architecture;  // null for the portable kernels
  GemmPlan plan;
  std::string passed_over;  // only where it will be printed
};

const launch::ExpertsPlan kPortableExperts = {std::nullopt, {Kernel::portable, {}, 1, 1, 0}};

std::string rounded(double clocks) { return std::to_string(std::llround(clocks)); }

std::string reason_of(const GemmPlan& plan) {
  if (!plan.clocks) return "others: XPU_FP4_SYCL_VARIANT asks for this one";
  const auto& [small, medium, large] = *plan.clocks;
  return "others: modelled clocks are " + rounded(small) + " for gemm_small, " + rounded(medium) +
         " for gemm_large with medium tiles, " + rounded(large) + " with large ones";
}

// Those of the kernel that was chosen.
std::optional<double> clocks_of(const GemmPlan& plan) {
  if (!plan.clocks) return std::nullopt;
  return plan.kernel == Kernel::small ? plan.clocks->small : std::min(plan.clocks->medium, plan.clocks->large);
}

std::string reason_of(const launch::ExpertsPlan& plan, const Experts& args) {
  if (!plan.gpu) return "kernels for a matrix unit: none for this device and these types";
  return args.to.format == Format::none ? "others: by the number of rows" : reason_of(plan.product);
}

class SyclBackend final : public Backend {
 public:
  SyclBackend(std::unique_ptr<Queue> queue, Explanation* explained) : queue_(std::move(queue)), explained_(explained) {}

  void quantize(const Quantize& args) const override { launch::quantize(*queue_, args); }
  void group_quantize(const GroupQuantize& args) const override { launch::group_quantize(*queue_, args); }
  void dequantize(const Dequantize& args) const override { launch::dequantize(*queue_, args); }

  std::optional<std::string> refusal(const Product& product) const override {
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
    if (product.activations.rows != nullptr) throw std::logic_error("xpu_fp4: only the kernels of experts gather rows here");
    if (product.activations.to.format == Format::none && !product.activations.to.transform.is_none()) {
      return multiply_transformed(product);
    }
    Choice choice = product.activations.to.format == Format::none ? choose_w4a16(product) : choose(product);
    while (!multiply_with(choice, product)) continue;
  }

  void experts(const Experts& args) const override {
    const launch::ExpertsPlan plan = plan_experts(args);
    const std::string steps = run_experts(plan, args);
    if (explained_ != nullptr) {
      explained_->kernel = "experts";
      explained_->variant = steps;
      explained_->passed_over = reason_of(plan, args);
    }
    if (!verbose()) return;
    print_verbose("sycl " + name_of(args.to.format) + " experts, " + std::to_string(args.tokens) + " tokens of " +
                  std::to_string(args.top_k) + " of " + std::to_string(args.experts) + ", " + std::to_string(args.w13.k) + "x" +
                  std::to_string(args.w2.k) + " on " + queue_->device_name() + ": " + steps);
  }

  PreparedShape prepared_shape(WeightForm, int64_t n, int64_t k) const override {
    // Group-major arrays: the size of a group tells its lanes, so that no device takes another's form.
    const ExpandedLayout layout = launch::weight_layout(*matrix_architecture(variant_override()), n, k);
    const int64_t groups = layout.groups();
    return {groups, groups == 0 ? 0 : launch::Expanded::bytes(layout) / groups};
  }

  void prepare(const Weight& weight, WeightForm, uint8_t* out) const override {
    const Architecture& architecture = *matrix_architecture(variant_override());
    launch::expand_weight(*queue_, gpu(architecture), weight, {launch::weight_layout(architecture, weight.n, weight.k), out});
  }

  void restore(const Weight&, uint8_t*, uint8_t*) const override { throw std::logic_error("xpu_fp4: strips were refused"); }

 private:
  // False where the device's compiler does not take the kernel; then choice is the next one. At last the error is thrown.
  bool multiply_with(Choice& choice, const Product& product) const {
    try {
      const Kernel kernel = choice.plan.kernel;
      const bool reads_codes = kernel == Kernel::portable || kernel == Kernel::bdpas;
      const bool has_floats = !product.activations.are_codes && product.activations.to.format != Format::none;
      if (reads_codes && has_floats) {
        multiply_quantized(product);
        return true;
      }
      const auto [name, label] = run(choice, product);
      tell(choice, product, name, label);
      return true;
    } catch (const CannotBuild& error) {
      if (choice.architecture == nullptr || variant_override().architecture != nullptr) throw;
      say_of_fallback(error);
      choice = choice.plan.kernel == Kernel::small ? portable("others: the device's compiler takes none of them")
                                                   : small(*choice.architecture, product);
      return false;
    }
  }

  // The kernels that ran: where the device's compiler does not take those of its architecture, the portable ones.
  std::string run_experts(const launch::ExpertsPlan& plan, const Experts& args) const {
    try {
      return launch::experts(*queue_, plan, args);
    } catch (const CannotBuild& error) {
      if (!plan.gpu || variant_override().architecture != nullptr) throw;
      say_of_fallback(error);
    }
    return launch::experts(*queue_, kPortableExperts, args);
  }

  static void say_of_fallback(const CannotBuild& error) {
    launch::warn(std::string(error.what()) + "\nxpu_fp4: other kernels, which are slower, compute what this one would");
  }

  static Choice small(const Architecture& architecture, const Product& product) {
    const auto& [a, w, out] = product;
    const bool floats = a.to.format == Format::none;
    return {&architecture,
            floats ? plan_w4a16(architecture, a.m, Kernel::small)
                   : plan_gemm(architecture, 1, {a.m, w.n, w.k, false}, Kernel::small),
            "gemm_large: the device's compiler does not take it"};
  }

  Gpu gpu(const Architecture& architecture) const { return {&architecture, queue_->is_gpu()}; }

  launch::ExpertsPlan plan_experts(const Experts& args) const {
    const Override forced = variant_override();
    const Architecture* architecture = matrix_architecture(forced);
    const bool floats = args.to.format == Format::none;
    const int64_t slots = args.tokens * args.top_k;
    if (architecture == nullptr || slots == 0 || args.experts == 0 || args.w13.n == 0 || (floats && args.dtype == DType::f32)) {
      return kPortableExperts;
    }
    const ExpertsShape shape = {slots, args.tokens, args.experts, args.w13.n, args.w13.k};
    if (floats) return {gpu(*architecture), plan_w4a16(*architecture, shape.rows(), forced.kernel)};
    const GemmPlan plan = plan_grouped_gemm(*architecture, queue_->compute_units(), shape, forced.kernel);
    return {gpu(*architecture), plan, plan.kernel != Kernel::small || !shape.few() || args.turns()};
  }

  // Null where the portable kernels run.
  const Architecture* matrix_architecture(const Override& forced) const {
    if (forced.kernel == Kernel::portable) return nullptr;
    return forced.architecture != nullptr ? forced.architecture : queue_->architecture();
  }

  static Choice portable(const char* why_no_other) { return {nullptr, {Kernel::portable, {}, 1, 1, 0}, why_no_other}; }

  // Chooses the portable kernels where none with a matrix unit computes this.
  std::optional<Choice> without_matrix_unit(const Override& forced, const Product& product) const {
    if (forced.kernel == Kernel::portable) return portable("others: XPU_FP4_SYCL_VARIANT asks for portable");
    if (matrix_architecture(forced) == nullptr) return portable("kernels for a matrix unit: the device has none that is known");
    if (product.activations.m == 0 || product.weight.n == 0 || product.weight.k == 0)
      return portable("others: an empty product");
    return std::nullopt;
  }

  // The exact kernels compute MXINT8, and what the block-scaled instruction cannot load.
  static const char* bdpas_refusal(const Product& product) {
    const Activations& a = product.activations;
    if (a.to.format != Format::mxfp4) return "gemm_bdpas: multiplies MXFP4 activations alone";
    if (a.k < kQuadElements) return "gemm_bdpas: K is below 128";
    if (a.are_codes && !launch::starts_cache_line(a.data)) return "gemm_bdpas: A does not begin on a cache line";
    if (!launch::starts_cache_line(product.weight.codes)) return "gemm_bdpas: W does not begin on a cache line";
    return nullptr;
  }

  Choice choose(const Product& product) const {
    Override forced = variant_override();
    if (auto choice = without_matrix_unit(forced, product)) return *choice;
    const char* no_bdpas = forced.kernel == Kernel::bdpas ? bdpas_refusal(product) : nullptr;
    if (no_bdpas != nullptr) forced.kernel = std::nullopt;
    const Architecture& architecture = *matrix_architecture(forced);
    const ProductShape shape = {product.activations.m, product.weight.n, product.weight.k,
                                product.weight.expanded() != nullptr};
    Choice choice = {&architecture, plan_gemm(architecture, queue_->compute_units(), shape, forced.kernel), {}};
    if (is_told()) choice.passed_over = (no_bdpas != nullptr ? std::string(no_bdpas) + "; " : "") + reason_of(choice.plan);
    return choice;
  }

  Choice choose_w4a16(const Product& product) const {
    const Override forced = variant_override();
    if (auto choice = without_matrix_unit(forced, product)) return *choice;
    if (product.activations.dtype == DType::f32) return portable("kernels for a matrix unit: it has no float32");
    const Architecture& architecture = *matrix_architecture(forced);
    return {&architecture, plan_w4a16(architecture, product.activations.m, forced.kernel), "others: by the number of rows"};
  }

  // The name of the kernel that ran and the label of its variant.
  std::pair<const char*, std::string> run(const Choice& choice, const Product& product) const {
    const bool floats = product.activations.to.format == Format::none;
    if (choice.architecture == nullptr) {
      if (floats) return {"gemm_w4a16", launch::gemm_w4a16(*queue_, product)};
      return {"gemm", launch::gemm(*queue_, product)};
    }
    const Gpu on = gpu(*choice.architecture);
    if (floats) return {"gemm_w4a16_matrix", launch::gemm_w4a16_matrix(*queue_, on, choice.plan, product)};
    switch (choice.plan.kernel) {
      case Kernel::small: return {"gemm_small", launch::gemm_small(*queue_, on, choice.plan, product)};
      case Kernel::bdpas: return {"gemm_bdpas", launch::gemm_bdpas(*queue_, on, choice.plan, product)};
      default: return {"gemm_large", launch::gemm_large(*queue_, on, choice.plan, product)};
    }
  }

  // Quantizes to memory first, for kernels that read codes.
  void multiply_quantized(const Product& product) const {
    const Activations& a = product.activations;
    const std::shared_ptr<void> codes = queue_->allocate(a.m * code_bytes(a.to.format, a.k));
    const std::shared_ptr<void> scale = queue_->allocate(a.m * a.k / kBlock);
    auto *codes_at = static_cast<uint8_t*>(codes.get()), *scale_at = static_cast<uint8_t*>(scale.get());
    quantize({a.data, a.dtype, a.to, a.m, a.k, codes_at, scale_at});
    multiply({Activations::codes(a.to.format, codes_at, scale_at, a.m, a.k), product.weight, product.output});
  }

  // Transforms to memory first, for W4A16, whose kernels read floats as they are.
  void multiply_transformed(const Product& product) const {
    const Activations& a = product.activations;
    const std::shared_ptr<void> floats = queue_->allocate(a.m * a.k * size_of(a.dtype));
    launch::transform(*queue_, {a.data, a.dtype, a.to, a.m, a.k, static_cast<uint8_t*>(floats.get()), nullptr});
    multiply({Activations::floats(floats.get(), a.dtype, {Format::none}, a.m, a.k), product.weight, product.output});
  }

  bool is_told() const { return explained_ != nullptr || verbose(); }

  void tell(const Choice& choice, const Product& product, const char* kernel, const std::string& label) const {
    const auto& [a, w, out] = product;
    const std::string variant = choice.architecture != nullptr ? std::string(choice.architecture->name) + " " : "";
    if (explained_ != nullptr) {
      explained_->kernel = kernel;
      explained_->variant = variant + label;
      explained_->passed_over = choice.passed_over;
      explained_->clocks = clocks_of(choice.plan);
    }
    if (!verbose()) return;
    print_verbose("sycl " + name_of(a.to.format) + " " + std::to_string(a.m) + "x" + std::to_string(w.n) + "x" +
                  std::to_string(w.k) + (w.expanded() != nullptr ? " expanded" : "") + " on " + queue_->device_name() + ": " +
                  kernel + " (" + variant + label + "); passed over " + choice.passed_over);
  }

  std::unique_ptr<Queue> queue_;
  Explanation* explained_;
};

}  // namespace

std::unique_ptr<Backend> make_backend(std::unique_ptr<Queue> queue, Explanation* explained) {
  return std::make_unique<SyclBackend>(std::move(queue), explained);
}

}  // namespace xpu_fp4::syclrt
