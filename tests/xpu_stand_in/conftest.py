# SPDX-License-Identifier: Apache-2.0
"""The tests with XPU tensors, for a process whose xpu_fp4 is what build.py built; others collect none of them.

`make test` runs them so.
"""

from typing import Any

import pytest
import torch
import xpu_fp4

if not hasattr(torch.ops.xpu_stand_in, "to_device"):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> Any:  # noqa: ANN401, torch's namespace of ops
    """The ops of stand_in.cpp."""
    sycl = xpu_fp4.backends()["sycl"]
    assert sycl.available, sycl.detail
    return torch.ops.xpu_stand_in
