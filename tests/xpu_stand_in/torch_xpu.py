# SPDX-License-Identifier: Apache-2.0
"""Makes an XPU torch of a process: loads stand_in.cpp, as a library that LD_LIBRARY_PATH finds, before xpu_fp4 is imported.

`python -m pytest -p xpu_stand_in.torch_xpu` does so before it reads any test.
"""

import ctypes

import torch  # noqa: F401, its libraries come first

ctypes.CDLL("libc10_xpu.so")
