# SPDX-License-Identifier: Apache-2.0
"""These tests need vLLM: `make test-vllm` sets it up and runs them. Where it is not installed, none of them is collected."""

import importlib.util

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from .fixtures import *  # noqa: F403
