# SPDX-License-Identifier: Apache-2.0
"""Reads the assembly listings that Intel's GPU compiler writes, and counts their instructions."""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from math import inf
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    text: str
    pipe: str | None  # as the compiler notes it

    @cached_property
    def opcode(self) -> str:
        return re.sub(r"^\([^)]*\)\s*", "", self.text).split()[0].split("(")[0]

    @cached_property
    def kind(self) -> str:
        if self.opcode.startswith(("dpas", "bdpas")):
            return "matrix"
        if self.opcode.startswith(("load", "store", "send", "prefetch", "atomic")):
            return "send"
        if self.opcode.startswith(("jmpi", "goto", "join", "if", "else", "endif", "while", "br", "call", "ret")):
            return "flow"
        return self.pipe or "other"

    def clocks(self, native: int) -> int:
        """Issue clocks of an ALU instruction; 16-bit ones at the rate of 32 bits."""
        lanes = re.search(r"\((\d+)\|M", self.text)
        size = {"q": 8, "uq": 8, "df": 8}
        widest = max([size.get(name, 4) for name in re.findall(r">?:([a-z]+)", self.text)] or [4])
        per_clock = native * 4 // widest
        return max(1, -(-int(lanes.group(1) if lanes else 1) // per_clock))


@dataclass
class Segment:
    """Counts over a run of instructions."""

    native: int
    instructions: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    clocks: Counter[str] = field(default_factory=Counter)

    def add(self, instruction: Instruction) -> None:
        self.instructions += 1
        self.counts[instruction.kind] += 1
        if instruction.kind in ("int", "float", "math", "long"):
            self.clocks[instruction.kind] += instruction.clocks(self.native)

    @property
    def matrix(self) -> int:
        return self.counts["matrix"]

    def per_matrix(self, kind: str) -> float:
        return self.clocks[kind] / max(self.matrix, 1)


@dataclass
class Listing:
    """One kernel's assembly."""

    text: str
    native: int  # lanes of an instruction that issues in one clock
    unresolved: tuple[str, ...] = ()  # built-ins that the compiler left as calls
    file: Path | None = None

    def header(self, key: str) -> str:
        found = re.search(rf"^//\.{key}\s+(\S+)", self.text, re.MULTILINE)
        return found.group(1) if found else "0"

    @property
    def kernel(self) -> str:
        return self.header("kernel").removeprefix("__sycl_kernel_")

    @property
    def registers(self) -> int:
        found = re.search(r"numGRF=(\d+)", self.text)
        return int(found.group(1)) if found else 0

    @property
    def size(self) -> int:
        """Instructions, as the compiler counts them."""
        return int(self.header("instCount"))

    @property
    def spilled(self) -> int:
        """Bytes per thread."""
        return int(self.header("spill size"))

    @property
    def invalid(self) -> bool:
        """Opcodes that the device does not have, which the compiler writes down nevertheless."""
        return re.search(r"\bINVALID\b|\billegal\b", self.text) is not None

    @cached_property
    def code(self) -> tuple[list[Instruction], dict[str, int]]:
        """Instructions, and label -> index of the one that follows."""
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in self.text.splitlines():
            if label := re.match(r"^([A-Za-z_][\w.]*):\s*$", line):
                labels[label.group(1)] = len(instructions)
            elif (stripped := line.strip()) and not stripped.startswith(("//", ".")):
                body, _, comment = stripped.partition("//")
                pipe = re.search(r"ALU pipe: (\w+)", comment)
                instructions.append(Instruction(body.strip(), pipe.group(1) if pipe else None))
        return instructions, labels

    def segment(self, first: int = 0, last: int | None = None) -> Segment:
        result = Segment(self.native)
        for instruction in self.code[0][first:last]:
            result.add(instruction)
        return result

    @cached_property
    def whole(self) -> Segment:
        return self.segment()

    @cached_property
    def loop(self) -> tuple[int, int] | None:
        """The innermost loop with the most matrix instructions, as a range of instructions."""
        instructions, labels = self.code
        loops = []
        for end, instruction in enumerate(instructions):
            if instruction.opcode.startswith(("jmpi", "goto", "while")):
                targets = [labels[name] for name in re.findall(r"\b_\w+", instruction.text) if name in labels]
                loops += [(target, end + 1) for target in targets if target <= end]
        holding = [loop for loop in loops if self.segment(*loop).matrix]
        innermost = [a for a in holding if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in holding)]
        return max(innermost, key=lambda loop: self.segment(*loop).matrix, default=None)

    def runs(self, least: int) -> list[tuple[int, int]]:
        """Straight runs of the loop with at least so many matrix instructions, by their float work; of those with as much the
        ones with more loads come later."""
        if self.loop is None:
            return []
        first, last = self.loop
        cuts = sorted({first, last, *(at for at in self.code[1].values() if first < at < last)})
        found = [run for run in pairwise(cuts) if self.segment(*run).matrix >= least]

        def cost(run: tuple[int, int]) -> tuple[int, int, float]:
            segment = self.segment(*run)
            return round(segment.per_matrix("float")), segment.counts["send"], segment.per_matrix("float")

        return sorted(found, key=cost)

    def paths(self, least: int) -> list[Segment]:
        """The same, counted."""
        return [self.segment(*run) for run in self.runs(least)]

    def blocks(self) -> dict[int, tuple[int, list[int]]]:
        """The loop's basic blocks: beginning -> end, and where it may go on."""
        first, last = self.loop or (0, 0)
        instructions, labels = self.code
        jumps = [at for at in range(first, last) if instructions[at].opcode.startswith(("jmpi", "goto", "while"))]
        inside = {at for at in labels.values() if first <= at < last} | {at + 1 for at in jumps}
        found = {}
        for begin, end in pairwise(sorted({first, last} | inside)):
            jump = instructions[end - 1]
            # A goto leads to its second label where no lanes part.
            targets = (
                [labels[name] for name in re.findall(r"\b_\w+", jump.text) if name in labels][-1:] if end - 1 in jumps else []
            )
            falls_through = end - 1 not in jumps or re.match(r"\([^)]*f\d", jump.text) is not None
            found[begin] = (end, targets + ([end] if falls_through else []))
        return found

    def longest_pass(self, through: tuple[int, int]) -> int:
        """The most instructions of any way through the loop, from its beginning to its beginning, that takes this run."""
        first, last = self.loop or (0, 0)
        blocks = self.blocks()

        @cache
        def longest(begin: int, taken: bool) -> float:
            end, targets = blocks[begin]
            taken = taken or through[0] <= begin < through[1]
            ahead = [longest(target, taken) for target in targets if begin < target < last]
            back = [0.0 if taken else -inf for target in targets if target == first]
            return end - begin + max(ahead + back, default=-inf)

        most = longest(first, False)
        return int(most) if most > 0 else 0
