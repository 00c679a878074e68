# SPDX-License-Identifier: Apache-2.0
"""A fixed stretch of the fuzzer's cases, and the fuzzer itself. `make fuzz` goes on from there."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import fuzz
import pytest

CASES = {"ops": 2000, "checkpoints": 120}


@pytest.mark.parametrize("kind", list(CASES))
def test_random_cases_are_right(kind: str) -> None:
    count, failures = fuzz.fuzz(kind, iter(range(CASES[kind])))
    assert count == CASES[kind]
    assert not failures, "\n".join(failures)


class Scripted:
    """A worker that finds something wrong where a function says so."""

    def __init__(self, wrong: Callable[[Any], str]) -> None:
        self.run = wrong


def test_a_failing_call_is_made_as_small_as_it_can_be() -> None:
    call = next(call for call in map(fuzz.Call.draw, range(1000)) if call.rows > 3 and call.hadamard == 64 and call.bias)
    worker = Scripted(lambda call: "wrong" if call.rows > 1 and call.hadamard == 64 else "")
    smallest, wrong = fuzz.smallest(worker, call, "wrong")  # type: ignore[arg-type]
    expected = fuzz.Call(call.seed, call.op, rows=call.rows, blocks=call.blocks, hadamard=64)
    assert (smallest, wrong) == (expected, "wrong")


def test_a_case_can_be_had_again() -> None:
    assert [fuzz.Call.draw(seed) for seed in range(50)] == [fuzz.Call.draw(seed) for seed in range(50)]
    assert len({dataclasses.astuple(fuzz.Call.draw(seed)) for seed in range(50)}) == 50


@pytest.mark.parametrize(("code", "does"), [(0, "pass"), (3, "exit(3)"), (-11, "import os; os.kill(os.getpid(), 11)")])
def test_a_process_that_ends_is_reported_and_the_next_case_runs(code: int, does: str) -> None:
    worker = fuzz.Worker("ops")
    worker.process = fuzz.start(sys.executable, "-c", f"input(); {does}")
    assert worker.run(fuzz.Call(0, "mxfp4_quantize")) == f"the process ended with {code}"
    assert worker.run(fuzz.Call(0, "mxfp4_quantize")) == ""
    worker.close()


def test_a_case_that_hangs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    worker = fuzz.Worker("ops")
    worker.process = fuzz.start(sys.executable, "-c", "import time; time.sleep(60)")
    assert worker.run(fuzz.Call(0, "mxfp4_quantize")) == "hung for 0.5 s"
    worker.close()
