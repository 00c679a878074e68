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

TIMEOUT = 600  # seconds; a hang must become a failure, a busy machine must not


@dataclass
class Run:
    """What an engine answered: its tokens and, if it ran in one process, how often ops ran; and all that its process logged."""

    log: str
    tokens: list[list[int]]
    ops: dict[str, int]


class EngineFailed(Exception):
    """The engine's process failed; the message is its log."""


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Makes the variables of a vLLM process: offline, in one process, its caches and settings in folder.

    The cache spares a second engine the process in which vLLM inspects the model's class.
    """
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


class Engines:
    """Engines that ran one after the other in one process; one that failed does not keep the others from running."""

    def __init__(self, folder: Path, engines: dict[str, dict[str, Any]], *, env: dict[str, str] | None = None) -> None:
        """Each decodes PROMPTS greedily, in float32 and without torch.compile unless its settings say otherwise."""
        defaults = {"dtype": "float32", "enforce_eager": True, "prompts": PROMPTS, "new_tokens": NEW_TOKENS, "prepare": None}
        argument = json.dumps({name: defaults | settings for name, settings in engines.items()})
        self.log = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("generate.py")), argument],
            env=environment(folder, **env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
            check=False,
        ).stdout
        lines = [line.split(" ", 2) for line in self.log.splitlines() if line.startswith("RESULT ")]
        self._results = {name: json.loads(result) for _, name, result in lines}

    def __getitem__(self, name: str) -> Run:
        if name not in self._results:
            raise EngineFailed(self.log)
        return Run(self.log, **self._results[name])


def generate(checkpoint: Path, folder: Path, *, env: dict[str, str] | None = None, **settings: Any) -> Run:
    """Runs one engine in a process of its own."""
    return Engines(folder, {"engine": {"model": str(checkpoint)} | settings}, env=env)["engine"]
