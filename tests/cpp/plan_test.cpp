// SPDX-License-Identifier: Apache-2.0
// Which kernel a product gets: by M, N, K and the number of vector engines, from the table of csrc/sycl/architectures.cpp.
#include <gtest/gtest.h>

#include <array>
#include <stdexcept>
#include <string>

#include "sycl/architectures.h"

using namespace xpu_fp4::syclrt;

namespace {

const Architecture& named(const std::string& name) {
  for (const Architecture& architecture : architectures()) {
    if (architecture.name == name) return architecture;
  }
  throw std::runtime_error(name);
}

GemmPlan plan(const Architecture& architecture, int64_t units, int64_t m, int64_t n, int64_t k, bool expanded = false) {
  return plan_gemm(architecture, units, {m, n, k, expanded}, std::nullopt);
}

/// The first number of rows, up to 512, that gets gemm_large.
int64_t first_large(const Architecture& architecture, int64_t units, int64_t n, int64_t k, bool expanded = false) {
  int64_t m = 1;
  while (m < 512 && plan(architecture, units, m, n, k, expanded).kernel != Kernel::large) ++m;
  return m;
}

bool same(Tile a, Tile b) { return a.row_units == b.row_units && a.column_units == b.column_units; }

TEST(Plan, FewRowsReadPackedWeightsAndManyExpandThem) {
  for (const Architecture& architecture : architectures()) {
    for (const int64_t units : {64, 160, 1024}) {
      EXPECT_EQ(plan(architecture, units, 1, 4096, 4096).kernel, Kernel::small) << architecture.name;
      EXPECT_EQ(plan(architecture, units, 8, 4096, 14336).kernel, Kernel::small) << architecture.name;
      const GemmPlan many = plan(architecture, units, 4096, 4096, 4096);
      EXPECT_EQ(many.kernel, Kernel::large) << architecture.name;
      EXPECT_TRUE(same(many.tile, architecture.large)) << architecture.name;
    }
  }
}

// The table of docs/GPU.md.
TEST(Plan, TheLargeKernelBeginsWhereTheDocumentationSays) {
  const auto begins = [](const char* name, int64_t units, std::array<int64_t, 4> rows) {
    const Architecture& architecture = named(name);
    EXPECT_EQ(first_large(architecture, units, 4096, 4096), rows[0]) << name;
    EXPECT_EQ(first_large(architecture, units, 4096, 4096, true), rows[1]) << name;
    EXPECT_EQ(first_large(architecture, units, 28672, 4096), rows[2]) << name;
    EXPECT_EQ(first_large(architecture, units, 28672, 4096, true), rows[3]) << name;
  };
  begins("dg2", 512, {129, 33, 129, 33});
  begins("pvc", 512, {129, 33, 97, 33});
  begins("lnl-m", 64, {129, 33, 129, 33});
  begins("bmg", 160, {129, 33, 129, 33});
  begins("ptl", 96, {129, 33, 129, 33});
  begins("cri", 256, {129, 33, 129, 33});
}

TEST(Plan, BeyondTheFirstLargeProductAllAreLarge) {
  for (const Architecture& architecture : architectures()) {
    for (const auto& [n, k] : {std::pair{4096, 4096}, std::pair{28672, 4096}, std::pair{4096, 14336}, std::pair{256, 128}}) {
      for (const bool expanded : {false, true}) {
        const int64_t first = first_large(architecture, 160, n, k, expanded);
        for (int64_t m = first + 1; m <= 512; ++m) {
          ASSERT_EQ(plan(architecture, 160, m, n, k, expanded).kernel, Kernel::large) << architecture.name << " " << m;
        }
      }
    }
  }
}

TEST(Plan, AnExpandedWeightMakesLargeProductsPaySooner) {
  for (const Architecture& architecture : architectures()) {
    const int64_t kept = first_large(architecture, 160, 4096, 4096, true);
    EXPECT_LT(kept, first_large(architecture, 160, 4096, 4096)) << architecture.name;
    EXPECT_GT(kept, 8) << architecture.name;
  }
}

TEST(Plan, AShortKLeavesSmallProductsSubGroupsIdle) {
  const Architecture& bmg = named("bmg");
  EXPECT_LT(first_large(bmg, 160, 4096, 128), first_large(bmg, 160, 4096, 1024));
}

TEST(Plan, FewLargeTilesGiveWayToMediumOnes) {
  const Architecture& bmg = named("bmg");
  EXPECT_TRUE(same(plan(bmg, 160, 256, 1024, 4096, true).tile, bmg.medium));
  EXPECT_TRUE(same(plan(bmg, 160, 2048, 4096, 4096, true).tile, bmg.large));
}

TEST(Plan, WorkGroupsAreNoLargerThanTheProduct) {
  const Architecture& bmg = named("bmg");
  const GemmPlan one = plan_gemm(bmg, 2, {8, 8, 128, false}, Kernel::large);
  EXPECT_EQ(one.group_rows * one.group_columns, 1);
  const GemmPlan many = plan_gemm(bmg, 2, {4096, 4096, 128, false}, Kernel::large);
  EXPECT_EQ(many.group_rows, 4);
  EXPECT_EQ(many.group_columns, 8);
  EXPECT_EQ(plan_gemm(named("dg2"), 512, {4096, 4096, 128, false}, Kernel::large).group_rows, 8);
}

TEST(Plan, WhatIsForcedIsTaken) {
  const Architecture& cri = named("cri");
  const ProductShape shape = {300, 300, 4096, false};
  EXPECT_EQ(plan_gemm(cri, 160, shape, Kernel::portable).kernel, Kernel::portable);
  EXPECT_EQ(plan_gemm(cri, 160, shape, Kernel::bdpas).kernel, Kernel::bdpas);
  EXPECT_EQ(plan_gemm(cri, 160, shape, Kernel::small).rows, 32);
  EXPECT_TRUE(same(plan_gemm(cri, 160, shape, Kernel::medium).tile, cri.medium));
  EXPECT_TRUE(same(plan_gemm(cri, 1, shape, Kernel::large).tile, cri.large));
}

GemmPlan plan_experts(int64_t tokens, int64_t top_k, int64_t experts, int64_t n, int64_t k,
                      std::optional<Kernel> forced = std::nullopt) {
  return plan_grouped_gemm(named("bmg"), 160, {tokens * top_k, tokens, experts, n, k}, forced);
}

TEST(Plan, ExpertsTakeTheKernelOfTheirShareOfTheRows) {
  EXPECT_EQ(plan_experts(1, 4, 32, 5760, 2880).rows, 1);
  EXPECT_EQ(plan_experts(8, 4, 32, 5760, 2880).rows, 4) << "an expert that two tokens share is read once";
  EXPECT_EQ(plan_experts(64, 4, 32, 5760, 2880).rows, 16);
  EXPECT_EQ(plan_experts(1024, 4, 32, 5760, 2880).kernel, Kernel::small);
  EXPECT_EQ(plan_experts(2048, 4, 32, 5760, 2880).kernel, Kernel::large);
  EXPECT_EQ(plan_experts(8192, 4, 128, 5760, 2880).kernel, Kernel::small) << "2 GiB of expanded experts";
  EXPECT_EQ(plan_experts(8192, 4, 128, 5760, 2880, Kernel::large).kernel, Kernel::large);
  EXPECT_EQ(plan_experts(1, 4, 32, 5760, 2880, Kernel::bdpas).kernel, Kernel::small);
}

TEST(Plan, FewSlotsHardlyShareAnExpert) {
  const auto few = [](int64_t tokens, int64_t top_k, int64_t experts) {
    return ExpertsShape{tokens * top_k, tokens, experts, 64, 64}.few();
  };
  EXPECT_TRUE(few(1, 8, 8));
  EXPECT_TRUE(few(4, 4, 32));
  EXPECT_FALSE(few(5, 4, 32));
  EXPECT_FALSE(few(1, 9, 8)) << "more slots than experts";
}

}  // namespace
