# SPDX-License-Identifier: Apache-2.0
"""A real model over HTTP: the README's example as it stands."""

import json
import re
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from . import checkpoints
from .engine import TIMEOUT, environment

README = Path(__file__).resolve().parents[2] / "README.md"
ORIGINAL = "SmolLM2-135M-Instruct"
NAME = f"{ORIGINAL}-MXFP4"


@pytest.fixture(scope="module")
def folder(vllm_folder: Path) -> Path:
    """Has the model that the README's example starts from."""
    checkpoints.save_smollm2(vllm_folder / ORIGINAL)
    return vllm_folder


def readme_commands() -> list[str]:
    (block,) = re.findall(r"## Serve with vLLM\n.*?```bash\n(.*?)```", README.read_text(), re.DOTALL)
    return block.splitlines()


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@contextmanager
def serving(command: list[str], url: str, folder: Path, env: dict[str, str]) -> Iterator[Path]:
    """The log of a server that answers; it is gone afterwards."""
    log = folder / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not answers(f"{url}/health"):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(1)
        yield log
    finally:
        server.terminate()
        server.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def ask(url: str, question: str) -> str:
    """The greedy answer to one chat message."""
    body = {"model": NAME, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 16}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
        answer: str = json.load(reply)["choices"][0]["message"]["content"]
    return answer


def test_readme_example_serves_chat_requests(folder: Path) -> None:
    port = free_port()
    quantize, serve, chat = (shlex.split(line.replace("8000", port), comments=True) for line in readme_commands())
    env = environment(folder, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    url = f"http://127.0.0.1:{port}"
    subprocess.run(quantize, cwd=folder, env=env, check=True, timeout=TIMEOUT)
    with serving(serve, url, folder, env) as log:
        reply = subprocess.run(chat, env=env, capture_output=True, text=True, check=True, timeout=TIMEOUT).stdout
        answer = ask(url, "What is the capital of France?")
        assert "Using XpuFp4LinearKernel" in log.read_text()
    assert NAME in reply
    assert "Paris" in answer
