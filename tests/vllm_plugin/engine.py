# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM in processes of their own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .reference import NEW_TOKENS, PROMPTS

TIMEOUT = 300  # seconds; a hang must become a failure


@dataclass
class Run:
    """What an engine printed: everything it logged, its tokens and, if it ran in one process, how often ops ran."""

    log: str
    tokens: list[list[int]]
    ops: dict[str, int]


class EngineFailed(Exception):
    """The engine's process failed; the message is its log."""


def environment(folder: Path, **more: str) -> dict[str, str]:
    """For a vLLM process: offline, in one process, its caches and settings in folder."""
    return os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_CONFIG_ROOT": str(folder / "config"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # tiny layers: handing them out costs more
        **more,
    }


def generate(
    checkpoint: Path, folder: Path, *, prepare: tuple[str, ...] = (), env: dict[str, str] | None = None, **settings: Any
) -> Run:
    """Decodes PROMPTS greedily, in float32 and without torch.compile unless the settings of vLLM's LLM say otherwise."""
    defaults = {"dtype": "float32", "enforce_eager": True, "prompts": PROMPTS, "new_tokens": NEW_TOKENS, "prepare": prepare}
    argument = json.dumps({"model": str(checkpoint)} | defaults | settings)
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("generate.py")), argument],
        env=environment(folder, **env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    result = next((line[7:] for line in process.stdout.splitlines() if line.startswith("RESULT ")), None)
    if process.returncode != 0 or result is None:
        raise EngineFailed(process.stdout)
    return Run(process.stdout, **json.loads(result))
