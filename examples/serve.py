# SPDX-License-Identifier: Apache-2.0
"""Serves an MXFP4 model directory with vLLM, asks it one question over HTTP, and stops it.

python examples/serve.py build/smollm2-w4a8 "What is the capital of France?"   # where vLLM and xpu_fp4 are installed
"""

import json
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import click


def wait_until_ready(url: str, server: subprocess.Popen[bytes], seconds: float) -> None:
    """Returns once the server answers; raises if it ends or takes too long."""
    deadline = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise click.ClickException("vllm serve ended or does not answer; it says why above")


def ask(url: str, model: str, question: str) -> str:
    """The greedy answer to one chat message."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 32}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        answer: str = json.load(reply)["choices"][0]["message"]["content"]
    return answer


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("question")
@click.option("--port", default=8000, show_default=True)
@click.option("--seconds", default=300.0, show_default=True, help="To wait for the server.")
def main(folder: Path, question: str, port: int, seconds: float) -> None:
    """Serve the model directory FOLDER on this machine alone, and print its answer to QUESTION."""
    command = ["vllm", "serve", str(folder), "--dtype", "bfloat16", "--max-model-len", "2048"]
    server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)])
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, server, seconds)
        print(ask(url, str(folder), question))
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
