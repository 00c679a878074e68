# SPDX-License-Identifier: Apache-2.0
"""These tests need llm-compressor: `make test-llmcompressor` sets it up and runs them. Elsewhere none of them is collected."""

import importlib.util

if importlib.util.find_spec("llmcompressor") is None:
    collect_ignore_glob = ["test_*.py"]
