# SPDX-License-Identifier: Apache-2.0
"""Runs a loop's own instructions through a model of one vector engine, by the scoreboard that the compiler wrote. Modelled.

In-order threads share an engine: a thread issues one instruction in a clock, each pipe takes one at a time. An instruction
waits for what its annotation names (tokens of loads and matrix instructions, distances within the ALU pipes), for its
accumulators and for its pipe. Latencies are assumptions (tools/gpu_model.toml), as several sets from short to long. Left out:
conflicts of register banks, instruction fetch, misses of the first cache, barriers.
"""

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import tomllib
from machine_code import Instruction

ASSUMED = tomllib.loads(Path(__file__).with_name("gpu_model.toml").read_text())
PASSES = 6  # through the loop, of each thread
STAGGER = 7  # clocks between the threads' beginnings


@dataclass(frozen=True)
class Latencies:
    """Clocks from the issue of an instruction until another may use its result."""

    alu: int
    accumulator: int  # of an ALU result in one of the accumulators
    matrix: int  # beyond the clocks in which a matrix instruction keeps its pipe
    load: int  # from the first cache
    sources: int  # until the registers that a load's address or a store's data was in may be written


LATENCIES = [Latencies(**row) for row in ASSUMED["latencies"]]  # from short to long


@dataclass(frozen=True)
class Engine:
    """A device's vector engine."""

    matrix_clocks: int
    lanes: int  # of an ALU instruction that takes one clock
    threads: int = ASSUMED["threads"]
    message_clocks: int = ASSUMED["message_clocks"]  # that a load or a store keeps its pipe at least
    register_clocks: int = ASSUMED["register_clocks"]  # and for each register that it loads


@dataclass(frozen=True)
class Step:
    """What an instruction needs and does."""

    pipe: str | None
    clocks: int  # that it keeps its pipe
    written: tuple[int, ...]  # tokens whose results it awaits
    read: tuple[int, ...]  # tokens whose sources must have been read
    distances: tuple[tuple[str, int], ...]  # pipe, and the how many-th last instruction of it
    accumulators: tuple[str, ...]  # that it reads
    accumulator: str | None  # that it writes
    token: int | None  # that it sets


PIPES = {"F": ("float",), "I": ("int",), "M": ("math",), "L": ("long",), "A": ("int", "float"), "": ("int", "float")}


def step_of(instruction: Instruction, engine: Engine) -> Step:
    text, kind = instruction.text, instruction.kind
    annotation = re.search(r"\{([^{}]*)\}\s*$", text)
    marks = [mark.strip() for mark in annotation.group(1).split(",")] if annotation else []
    marks += [f"{mark}.dst" for mark in re.findall(r"\$\d+", text.split("(", 1)[1])] if "sync.allwr" in text else []
    written, read, distances, token = [], [], [], None
    for mark in marks:
        if found := re.fullmatch(r"\$(\d+)(\.dst|\.src)?", mark):
            number = int(found.group(1))
            if found.group(2) == ".dst":
                written.append(number)
            elif found.group(2) == ".src":
                read.append(number)
            else:
                token = number
        elif found := re.fullmatch(r"([A-Z]?)@(\d+)", mark):
            distances += [(pipe, int(found.group(2))) for pipe in PIPES[found.group(1)]]
    operands = re.findall(r"\b(acc\d+|null|r\d+)(?=[.:<\s])", re.sub(r"^\([^)]*\)\s*", "", text))
    sync = instruction.opcode.startswith("sync")
    pipe = kind if kind in ("matrix", "send", "float", "math", "long", "int") else None if sync or kind == "flow" else "int"
    clocks = 1
    if pipe == "matrix":
        clocks = engine.matrix_clocks
    elif pipe == "send":
        loaded = re.search(r"\br\d+:(\d+)", text) if instruction.opcode.startswith("load") else None
        clocks = max(engine.message_clocks, engine.register_clocks * int(loaded.group(1)) if loaded else 0)
    elif pipe:
        clocks = instruction.clocks(engine.lanes)
    return Step(
        pipe,
        clocks,
        tuple(written),
        tuple(read),
        tuple(distances),
        tuple(name for name in operands[1:] if name.startswith("acc")),
        operands[0] if operands and operands[0].startswith("acc") else None,
        token,
    )


@dataclass
class Thread:
    at: int = 0  # step
    passes: int = 0
    written: dict[int, int] = field(default_factory=dict)  # token -> when its results are there
    read: dict[int, int] = field(default_factory=dict)
    done: dict[str, list[int]] = field(default_factory=dict)  # pipe -> when its last instructions' results are there
    accumulators: dict[str, int] = field(default_factory=dict)

    def ready(self, step: Step) -> int:
        times = [self.written.get(token, 0) for token in step.written] + [self.read.get(token, 0) for token in step.read]
        times += [self.accumulators.get(name, 0) for name in step.accumulators]
        for pipe, distance in step.distances:
            history = self.done.get(pipe, [])
            if len(history) >= distance:
                times.append(history[-distance])
        return max(times, default=0)

    def issue(self, step: Step, now: int, latencies: Latencies) -> None:
        if step.pipe == "matrix":
            if step.token is not None:
                self.written[step.token] = now + step.clocks + latencies.matrix
                self.read[step.token] = now + step.clocks
        elif step.pipe == "send":
            if step.token is not None:
                self.written[step.token] = now + step.clocks + latencies.load
                self.read[step.token] = now + latencies.sources
        elif step.pipe:
            # An instruction of several clocks has its last lanes' results that much later.
            history = self.done.setdefault(step.pipe, [])
            history.append(now + step.clocks - 1 + latencies.alu)
            del history[:-8]
            if step.accumulator:
                self.accumulators[step.accumulator] = now + step.clocks - 1 + latencies.accumulator


def turn(thread: int, now: int, threads: int) -> int:
    """Threads take turns at being asked first, clock by clock."""
    return (thread - now) % threads


@cache
def matrix_busy(instructions: Sequence[Instruction], engine: Engine, latencies: Latencies) -> float:
    """The share of the time in which the matrix unit is busy while the engine's threads run this straight loop."""
    threads = engine.threads
    steps = [step_of(instruction, engine) for instruction in instructions]
    running = [Thread() for _ in range(threads)]
    free = dict.fromkeys(("matrix", "send", "float", "math", "long", "int"), 0)
    queue = [(STAGGER * i, turn(i, STAGGER * i, threads), i) for i in range(threads)]
    busy = end = 0
    while queue:
        now, _, i = heapq.heappop(queue)
        thread = running[i]
        step = steps[thread.at]
        earliest = max(now, thread.ready(step), free[step.pipe] if step.pipe else 0)
        if earliest > now:
            heapq.heappush(queue, (earliest, turn(i, earliest, threads), i))
            continue
        if step.pipe:
            free[step.pipe] = now + step.clocks
        busy += step.clocks if step.pipe == "matrix" else 0
        thread.issue(step, now, latencies)
        end = max(end, now + step.clocks)
        thread.at = (thread.at + 1) % len(steps)
        thread.passes += thread.at == 0
        if thread.passes < PASSES:
            heapq.heappush(queue, (now + 1, turn(i, now + 1, threads), i))
    return busy / end
