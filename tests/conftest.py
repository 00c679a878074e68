# SPDX-License-Identifier: Apache-2.0
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from zlib import crc32

import pytest
import torch
import xpu_fp4


@lru_cache(maxsize=1)
def _sycl() -> xpu_fp4.Backend:
    return xpu_fp4.backends()["sycl"]


@pytest.fixture
def requires_sycl() -> None:
    """Skips without the SYCL backend; XPU_FP4_REQUIRE_SYCL=1 turns the skip into a failure."""
    if not _sycl().available:
        reason = f"the sycl backend cannot run: {_sycl().detail}"
        if os.environ.get("XPU_FP4_REQUIRE_SYCL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(params=["native", "sycl"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """CPU tensors are served by this backend."""
    name = str(request.param)
    if name == "sycl":
        request.getfixturevalue("requires_sycl")
    with xpu_fp4.cpu_backend(name):
        yield name


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Seeded by the test's name and parameters, so that a failure comes back alone."""
    return torch.Generator().manual_seed(crc32(request.node.name.encode()))
