# SPDX-License-Identifier: Apache-2.0
"""The short examples do what they say; own_kernel.cpp is a test of CMakeLists.txt."""

import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import cast

import click
import pytest
from checkpoint_files import save_llama, save_tokenizer
from click.testing import CliRunner, Result

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

# Answers as vLLM's server does, after a while, to what serve.py asks.
VLLM = f"""#!{sys.executable}
import json, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

assert sys.argv[1] == "serve", sys.argv
host, port = (sys.argv[sys.argv.index(option) + 1] for option in ("--host", "--port"))
if "broken" in sys.argv[2]:
    sys.exit("no such model")

class Handler(BaseHTTPRequestHandler):
    def reply(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_GET(self):
        assert self.path == "/health"
        self.reply({{}})

    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == sys.argv[2]
        self.reply({{"choices": [{{"message": {{"content": "You asked: " + asked["messages"][0]["content"]}}}}]}})

time.sleep(0.3)
HTTPServer((host, int(port)), Handler).serve_forever()
"""


def main_of(name: str) -> click.Command:
    return cast(click.Command, runpy.run_path(str(EXAMPLES / name))["main"])


def serve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    folder.mkdir()
    vllm = folder.parent / "vllm"
    vllm.write_text(VLLM)
    vllm.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder.parent), prepend=":")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return CliRunner().invoke(main_of("serve.py"), [str(folder), "Who is there?", "--port", str(port)])


def test_quantize_and_run_writes_a_model_and_continues_the_prompt(tmp_path: Path) -> None:
    save_llama(tmp_path / "llama")
    save_tokenizer(tmp_path / "llama")
    arguments = [str(tmp_path / "llama"), str(tmp_path / "w4a8"), "--prompt", "w1 w2 w3", "--tokens", "4"]
    result = CliRunner().invoke(main_of("quantize_and_run.py"), arguments)
    assert result.exit_code == 0, result.output
    assert "14 linear layers are MXFP4; kept: lm_head" in result.output
    words = result.stdout.splitlines()[1].split()
    assert words[:3] == ["w1", "w2", "w3"]
    assert len(words) > 3


def test_serve_prints_the_answer_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = serve(tmp_path / "model", monkeypatch)
    assert result.exit_code == 0, result.output
    assert "You asked: Who is there?" in result.output


def test_serve_says_that_the_server_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = serve(tmp_path / "broken", monkeypatch)
    assert result.exit_code == 1
    assert "vllm serve ended" in result.output


def test_calibrate_loses_less_than_rounding_to_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "calibrate.py"), run_name="__main__")
    assert "relative error of W4A8" in capsys.readouterr().out


def test_sharded_columns_have_the_bits_of_one_process() -> None:
    # Without buffers, a line written in two pieces is torn apart by the other rank's, in most runs.
    unbuffered = [sys.executable, "-u", str(EXAMPLES / "sharded.py")]
    run = subprocess.run(unbuffered, check=True, capture_output=True, text=True)
    assert sorted(line.split(";")[0] for line in run.stdout.splitlines()) == [
        "rank 0: columns have the same bits",
        "rank 1: columns have the same bits",
    ]
