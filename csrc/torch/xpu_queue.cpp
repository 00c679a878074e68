// SPDX-License-Identifier: Apache-2.0
// All that the XPU binding takes from torch's XPU library, in a library of its own (`_xpu_queue`), which xpu.cpp loads at the
// first op on an XPU tensor: so `_xpu_C` is the same with every torch. It is linked to an empty libc10_xpu.so that setup.py
// makes, so it is built under a torch without XPU too, and its two symbols are found where torch has the library.
#include <c10/xpu/XPUStream.h>

/// The queue of the current stream of the current device.
extern "C" __attribute__((visibility("default"))) void* xpu_fp4_current_queue() {
  return &c10::xpu::getCurrentXPUStream().queue();
}
