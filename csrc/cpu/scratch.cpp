// SPDX-License-Identifier: Apache-2.0
#include "scratch.h"

#include <utility>

namespace xpu_fp4::cpu {

std::byte* Scratch::take(size_t bytes) {
  if (bytes > size_) {
    ::operator delete(std::exchange(data_, nullptr), kAlignment);
    size_ = 0;
    data_ = static_cast<std::byte*>(::operator new(bytes, kAlignment));
    size_ = bytes;
  }
  return data_;
}

Scratch& scratch_of_thread(ScratchFor use) {
  static thread_local Scratch memory[3];
  return memory[static_cast<size_t>(use)];
}

}  // namespace xpu_fp4::cpu
