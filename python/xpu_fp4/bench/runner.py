# SPDX-License-Identifier: Apache-2.0
"""Runs cases and collects the record: the JSON that tables, targets and plots are made from."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from . import machine
from .cases import Case, Experts
from .contenders import OURS, TORCH, Contender, Kind, Unavailable
from .experts import EXPERTS, Layer, LayerWeights
from .limits import limits
from .measure import Job, Stopwatch, Timing, measure
from .operands import Problem, Weights
from .peers import PEERS

FORMAT = 1
GIB = 1 << 30


@dataclass(frozen=True)
class Result:
    """One contender in one case."""

    case: Case
    contender: str
    kind: Kind
    timing: Timing
    ops: int
    bytes: int

    @property
    def seconds(self) -> float:
        return self.timing.median


@dataclass
class Record:
    """One run."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    contenders: dict[str, str]
    """What each name means."""
    results: list[Result] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    """Contenders that could not take part, and why."""

    def of(self, case: Case) -> dict[str, Result]:
        return {result.contender: result for result in self.results if result.case == case}

    @property
    def cases(self) -> list[Case]:
        return list(dict.fromkeys(result.case for result in self.results))

    def to_json(self) -> dict[str, Any]:
        """Plain data. Times are in seconds, rounded to a nanosecond."""
        results = []
        for result in self.results:
            case = {key: value for key, value in asdict(result.case).items() if key != "only"}
            samples = [round(sample, 9) for sample in result.timing.samples]
            results.append(
                {
                    **case,
                    "contender": result.contender,
                    "kind": result.kind,
                    "seconds": round(result.seconds, 9),
                    "spread": round(result.timing.spread, 4),
                    "samples": samples,
                    "calls": result.timing.calls,
                    "ops": result.ops,
                    "bytes": result.bytes,
                }
            )
        return {
            "format": FORMAT,
            "machine": self.machine,
            "settings": self.settings,
            "contenders": self.contenders,
            "absent": self.absent,
            "results": results,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Record":
        """The reverse. Raises ValueError if it is no record of this format."""
        if data.get("format") != FORMAT:
            raise ValueError(f"format is {data.get('format')!r}, expected {FORMAT}, as `xpu-fp4 bench --json` writes it")
        record = cls(data["machine"], data["settings"], data["contenders"], absent=data["absent"])
        for row in data["results"]:
            case = Case(*(row[key] for key in ("suite", "n", "k", "data", "threads", "m")))
            if row.get("experts"):  # records of products do without
                case = replace(case, experts=Experts(**row["experts"]))
            timing = Timing(tuple(row["samples"]), row["calls"])
            record.results.append(Result(case, row["contender"], row["kind"], timing, row["ops"], row["bytes"]))
        return record


def contenders(device: str) -> tuple[Contender, ...]:
    """Who can be timed on the device."""
    everybody = (*OURS, *TORCH, *PEERS, *EXPERTS, *(limits() if device == "cpu" else ()))
    return tuple(contender for contender in everybody if contender.device in ("any", device))


def working_set(device: str) -> int:
    """Bytes of all copies of a weight: twice the device's last-level cache, at most 1 GiB and a sixteenth of its memory."""
    if device == "xpu":
        properties = torch.xpu.get_device_properties()
        last_level, memory = properties.last_level_cache_size, properties.total_memory
    else:
        last_level, memory = max(machine.caches().values(), default=64 << 20), machine.memory()
    return min(2 * last_level, GIB, memory // 16)


def run(
    cases: Sequence[Case],
    who: Sequence[Contender],
    *,
    seconds: float,
    device: str = "cpu",
    copies_bytes: int | None = None,
    watch: Stopwatch | None = None,
    progress: Callable[[Case], object] = lambda case: None,
) -> Record:
    """Times `who` in every case, `seconds` each. Leaves torch's thread count as it was."""
    copies_bytes = working_set(device) if copies_bytes is None else copies_bytes
    settings = {"seconds per case": seconds, "device": device, "bytes of weight copies": copies_bytes}
    record = Record(machine.describe(device), settings, {contender.name: contender.about for contender in who})
    watch = watch or Stopwatch(synchronize=torch.xpu.synchronize if device == "xpu" else lambda: None)
    weights: Weights | None = None
    threads = torch.get_num_threads()
    try:
        for case in cases:
            progress(case)
            torch.set_num_threads(case.threads)
            if weights is None or not weights.fits(case):
                weights = None  # before the next take their memory
                weights = _weights(case, torch.device(device), copies_bytes)
            problem = Layer(case, weights) if isinstance(weights, LayerWeights) else Problem(case, weights)
            _run_case(case, problem, who, seconds, watch, record)
    finally:
        torch.set_num_threads(threads)
    return record


def _weights(case: Case, device: torch.device, copies_bytes: int) -> Weights:
    if case.experts is None:
        return Weights(case.n, case.k, case.data, device, copies_bytes)
    return LayerWeights(case, device, copies_bytes)


def _run_case(case: Case, problem: Problem, who: Sequence[Contender], seconds: float, watch: Stopwatch, record: Record) -> None:
    asked_for = replace(case, only=())
    jobs, taking_part = {}, [c for c in who if c.takes_part(case, problem.weights.device.type)]
    for contender in taking_part:
        try:
            made = contender.setup(problem)
        except Unavailable as reason:
            record.absent[contender.name] = str(reason)
            continue
        jobs[contender.name] = made if isinstance(made, Job) else Job(made)
        if problem.weights.device.type == "xpu":
            jobs[contender.name].run()  # kernels are compiled at first use, which must not decide how often one is called
    timings = measure(jobs, seconds, watch)
    for contender in taking_part:
        if contender.name in timings:
            timing = timings[contender.name]
            figures = contender.ops(problem), contender.bytes(problem)
            record.results.append(Result(asked_for, contender.name, contender.kind, timing, *figures))
