// SPDX-License-Identifier: Apache-2.0
#include "explain.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "backend.h"

namespace xpu_fp4::syclrt {
namespace {

// What modelled times are of: a product of an architecture, its vector engines and highest clock, as tools/isa_budgets.toml has
// them (tests/test_explain.py compares the two). Nothing is published of cri.
struct Card {
  const char *architecture, *name;
  int engines;
  double ghz;
};
constexpr Card kCards[] = {{"dg2", "Arc A770", 512, 2.1},   {"pvc", "Max 1550, one stack", 512, 1.6},
                           {"lnl-m", "Arc 140V", 64, 2.05}, {"bmg", "Arc B580", 160, 2.67},
                           {"ptl", "Arc B390", 96, 2.5},    {"cri", "Crescent Island", 256, 2.3}};

const Card& card_of(const Architecture& architecture) {
  for (const Card& card : kCards) {
    if (std::string(architecture.name) == card.architecture) return card;
  }
  throw std::logic_error("xpu_fp4: no card of " + std::string(architecture.name) + " is known");
}

const Architecture& architecture_named(const std::string& name) {
  std::string names;
  for (const Architecture& architecture : architectures()) {
    if (name == architecture.name) return architecture;
    names += std::string(names.empty() ? "" : ", ") + architecture.name;
  }
  throw std::runtime_error("xpu_fp4: no GPU architecture is named \"" + name + "\", expected one of " + names);
}

// Memory that nobody has: launches look at an address for its alignment, and hand it on.
constexpr uintptr_t kAddress = uintptr_t{1} << 20;

class PlanningQueue final : public Queue {
 public:
  PlanningQueue(const PlannedDevice& device, Explanation& out)
      : device_(device), architecture_(architecture_named(device.architecture)), out_(out) {}

  std::string device_name() const override { return device_.card; }
  bool is_gpu() const override { return true; }
  int64_t compute_units() const override { return device_.engines; }
  const Architecture* architecture() const override { return &architecture_; }
  Target target() const override { return {architecture_.sub_group, true}; }

  std::shared_ptr<void> allocate(int64_t bytes) const override {
    live_ += bytes;
    out_.scratch_bytes = std::max(out_.scratch_bytes, live_);
    return {reinterpret_cast<void*>(kAddress), [this, bytes](void*) { live_ -= bytes; }};
  }

 private:
  void submit(const Variant& variant, const char* kernel, const Range& range, const std::vector<Argument>&) const override {
    const auto [rows, lanes] = range.group;
    const int64_t groups = range.global[0] / rows * (range.global[1] / lanes);
    if (groups > 0) out_.launches.push_back({kernel, variant.label, groups, rows * lanes});
  }

  PlannedDevice device_;
  const Architecture& architecture_;
  Explanation& out_;
  mutable int64_t live_ = 0;
};

}  // namespace

PlannedDevice planned_device(const std::string& architecture, int64_t engines) {
  const Architecture& found = architecture_named(architecture);
  const Card& card = card_of(found);
  const int64_t used = engines != 0 ? engines : card.engines;
  // As the choice of a kernel weighs it: each engine brings its part of the bandwidth.
  const double bandwidth = found.costs.bytes * static_cast<double>(used) * card.ghz * 1e9;
  return {found.name, card.name, used, found.sub_group, card.ghz, bandwidth, found.costs.matrix};
}

Explanation explain(const PlannedDevice& device, const std::function<void(const Backend&)>& call) {
  Explanation out;
  call(*make_backend(std::make_unique<PlanningQueue>(device, out), &out));
  return out;
}

}  // namespace xpu_fp4::syclrt
