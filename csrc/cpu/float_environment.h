// SPDX-License-Identifier: Apache-2.0
// The results are bit-defined, so a caller's rounding mode or flush-to-zero must not reach the kernels.
#pragma once
#include <cfenv>

namespace xpu_fp4 {

/// Round to nearest even with subnormals, for the current thread, until the end of the scope.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

}  // namespace xpu_fp4
