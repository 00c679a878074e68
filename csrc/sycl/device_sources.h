// SPDX-License-Identifier: Apache-2.0
// The kernels' source text, embedded in the library by embed.py.
#pragma once
#include <string>
#include <vector>

namespace xpu_fp4::syclrt {

struct DeviceSource {
  std::string name;  // as the kernels include it
  std::string text;
};

extern const std::vector<DeviceSource> kDeviceSources;

}  // namespace xpu_fp4::syclrt
