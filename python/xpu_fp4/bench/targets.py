# SPDX-License-Identifier: Apache-2.0
"""The speeds that the CPU kernels are held to, as ratios within one run, and whether a record reaches them."""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from .cases import EXPERTS, HALF_M, SMALL_M, Case, Data, Router
from .measure import speedup
from .runner import Record, Result

NOISE = 0.05
"""Two times that differ by no more are taken as equal."""


class NotMeasured(Exception):
    """The record has not what a target is about; the message says what is missing."""


@dataclass(frozen=True)
class Verdict:
    """One line of the table."""

    work: str
    measure: str
    target: float
    measured: float | None
    """A ratio; None if it was not measured."""
    note: str = ""
    at_most: bool = False
    possible: float = math.inf
    """No machine can do more: what is measured above it, beyond noise, was disturbed."""

    @property
    def disturbed(self) -> bool:
        return self.measured is not None and self.measured > self.possible * (1 + NOISE)

    @property
    def reached(self) -> bool | None:
        if self.measured is None or self.disturbed:
            return None
        return self.measured <= self.target if self.at_most else self.measured >= self.target


def threads_of(record: Record) -> int:
    """Returns what all suites with targets ran on, but for the comparison of thread counts."""
    return statistics.mode(case.threads for case in record.cases if case.suite in ("targets", *EXPERTS))


class _Results:
    """Looks results up in a record."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.threads = threads_of(record)
        self._by_key = {self._key(r.case, r.contender): r for r in record.results if r.case.suite == "targets"}

    @staticmethod
    def _key(case: Case, contender: str) -> tuple[object, ...]:
        return case.m, case.n, case.k, case.data, case.threads, contender

    def get(self, contender: str, m: int, k: int = 4096, *, data: Data = "gaussian", threads: int | None = None) -> Result:
        """Finds the result of a product with n = 4096."""
        found = self._by_key.get((m, 4096, k, data, threads or self.threads, contender))
        if found is None:
            reason = self.record.absent.get(contender, f"no {contender} at {m} x 4096 x {k}")
            raise NotMeasured(reason)
        return found

    def has(self, contender: str) -> bool:
        return any(result.contender == contender for result in self.record.results)

    def best_form(self, name: str) -> str:
        """The repacked form of an op if there is one."""
        prepacked = f"{name}-prepacked"
        return prepacked if self.has(prepacked) else name


def rate_share(result: Result, limit: Result, figure: Callable[[Result], int]) -> float:
    """figure per second of a result as a share of the limit's, round by round."""
    return speedup(result.timing, limit.timing) * figure(result) / figure(limit)


def _ops(result: Result) -> int:
    return result.ops


def _bytes(result: Result) -> int:
    return result.bytes


Rule = Callable[[], float]


def _verdict(work: str, measure: str, target: float, rule: Rule, at_most: bool = False, possible: float = math.inf) -> Verdict:
    try:
        return Verdict(work, measure, target, rule(), at_most=at_most, possible=possible)
    except NotMeasured as reason:
        return Verdict(work, measure, target, None, str(reason), at_most)


def _cliff(results: _Results, form: str) -> float:
    """The most by which some number of rows is slower than a larger one."""
    times = [results.get(form, m).seconds for m in (*SMALL_M, 128)]
    return max(time / min(times[i + 1 :]) for i, time in enumerate(times[:-1]))


def _w4a4(results: _Results, form: str) -> Iterator[Verdict]:
    name = results.best_form(form)

    def over(peer: str, m: int, k: int = 4096) -> float:
        return speedup(results.get(name, m, k).timing, results.get(peer, m, k).timing)

    def of(limit: str, m: int, k: int = 4096, data: Data = "gaussian") -> float:
        figure = _bytes if limit == "limit-read" else _ops
        return rate_share(results.get(name, m, k, data=data), results.get(limit, m, k, data=data), figure)

    # This instruction is no limit where the processor has a faster one.
    fastest = math.inf if results.has("limit-tdpbusd") else 1
    big = f"{name} 1024x4096x4096"
    yield _verdict(big, "of vpdpbusd", 0.85, partial(of, "limit-vpdpbusd", 1024), possible=fastest)
    yield _verdict(big, "times torch bf16", 1.9, partial(over, "torch-bf16", 1024))
    yield _verdict(big, "times torch._int_mm", 0.95, partial(over, "torch-int8", 1024))
    yield _verdict(f"{big}, all scale bytes", "of vpdpbusd", 0.55, partial(of, "limit-vpdpbusd", 1024, data="random-scales"))
    yield _verdict(
        f"{big}, scale bytes 107 to 147", "of vpdpbusd", 0.55, partial(of, "limit-vpdpbusd", 1024, data="random-scales-20")
    )
    yield _verdict(f"{name} 128x4096x4096", "times torch bf16", 1.7, partial(over, "torch-bf16", 128))
    for peer in ("ggml-mxfp4", "ggml-mxfp4-repacked"):
        yield _verdict(f"{name} 512x4096x14336", f"times {peer}", 15, partial(over, peer, 512, 14336))
    for k in (4096, 14336):
        yield _verdict(f"{name} 1x4096x{k}", "of read bandwidth", 0.80, partial(of, "limit-read", 1, k), possible=1)
        yield _verdict(f"{name} 1x4096x{k}", "times torch bf16", 5, partial(over, "torch-bf16", 1, k))
    small = f"{name} M = 2..64, 4096x4096"
    yield _verdict(small, "time over that of a larger M, worst", 1 + NOISE, lambda: _cliff(results, name), at_most=True)
    yield _verdict(small, "times torch bf16, worst", 1.3, lambda: min(over("torch-bf16", m) for m in SMALL_M))
    yield _verdict(
        big,
        "2 threads over 1",
        1.9,
        lambda: results.get(name, 1024, threads=1).seconds / results.get(name, 1024, threads=2).seconds,
        possible=2,
    )


def _w4a8(results: _Results) -> Iterator[Verdict]:
    name = results.best_form("w4a8-linear")

    def over(peer: str, m: int, k: int = 4096, data: Data = "gaussian") -> float:
        return speedup(results.get(name, m, k, data=data).timing, results.get(peer, m, k, data=data).timing)

    w4a4 = results.best_form("w4a4-linear")
    # AVX2's instruction adds to 16 bits, which a block of MXINT8 exceeds: it is widened twice.
    share = 0.95 if results.has("limit-vpdpbusd") else 0.9
    for k in (4096, 14336):
        for m in (1, 16, 128, 1024):
            yield _verdict(f"{name} {m}x4096x{k}", f"times {w4a4}", share, partial(over, w4a4, m, k))
    rule = partial(over, w4a4, 1024, data="random-scales-20")
    yield _verdict(f"{name} 1024x4096x4096, scale bytes 107 to 147", f"times {w4a4}", 0.9, rule)
    yield _verdict(f"{name} 1024x4096x4096", "times torch bf16", 1.7, partial(over, "torch-bf16", 1024))
    yield _verdict(f"{name} 1024x4096x4096", "times torch._int_mm", 0.9, partial(over, "torch-int8", 1024))
    yield _verdict(f"{name} 512x4096x14336", "times ggml-mxfp4", 15, partial(over, "ggml-mxfp4", 512, 14336))
    rule = partial(over, "ggml-mxfp4-repacked", 512, 14336)
    yield _verdict(f"{name} 512x4096x14336", "times ggml-mxfp4-repacked", 6, rule)


def _w4a8_on_amx(results: _Results) -> Iterator[Verdict]:
    name, w4a16 = results.best_form("w4a8-linear"), results.best_form("w4a16-linear")

    def over(peer: str, m: int) -> float:
        results.get("limit-tdpbusd", 1024)  # or it is another machine's target
        return speedup(results.get(name, m).timing, results.get(peer, m).timing)

    big = f"AMX: {name} 1024x4096x4096"
    yield _verdict(big, "times torch bf16", 2.2, partial(over, "torch-bf16", 1024))
    yield _verdict(big, f"times {w4a16}", 1.5, partial(over, w4a16, 1024))  # of twice the rate
    yield _verdict(f"AMX: {name} 1x4096x4096", "times torch bf16", 4.5, partial(over, "torch-bf16", 1))


def _amx(results: _Results, form: str) -> Iterator[Verdict]:
    name = results.best_form(form)

    def tiles() -> Result:
        if results.threads != 16:
            raise NotMeasured(f"is for 16 threads, not {results.threads}")
        return results.get("limit-tdpbusd", 1024)

    def over(peer: str, m: int) -> float:
        tiles()  # or it is another machine's target
        return speedup(results.get(name, m).timing, results.get(peer, m).timing)

    big = f"AMX, 16 threads: {name} 1024x4096x4096"
    yield _verdict(big, "times torch bf16", 2.0, partial(over, "torch-bf16", 1024))
    yield _verdict(big, "times torch._int_mm", 1.5, partial(over, "torch-int8", 1024))
    yield _verdict(big, "of tdpbusd", 0.40, lambda: rate_share(results.get(name, 1024), tiles(), _ops), possible=1)
    yield _verdict(f"AMX, 16 threads: {name} 1x4096x4096", "times torch bf16", 2.5, partial(over, "torch-bf16", 1))


def _others(results: _Results) -> Iterator[Verdict]:
    w4a16 = results.best_form("w4a16-linear")

    def of_read() -> float:
        return rate_share(results.get(w4a16, 1), results.get("limit-read", 1), _bytes)

    def over_bf16() -> float:
        return speedup(results.get(w4a16, 1024).timing, results.get("torch-bf16", 1024).timing)

    def of_copy(name: str) -> float:
        return speedup(results.get(name, 1024).timing, results.get(f"limit-copy-{name}", 1024).timing)

    def raw(m: int) -> float:
        prepacked, checkpoint = results.get("w4a4-gemm-prepacked", m), results.get("w4a4-gemm", m)
        return speedup(prepacked.timing, checkpoint.timing)

    yield _verdict(f"{w4a16} 1x4096x4096", "of read bandwidth", 0.80, of_read)
    yield _verdict(f"{w4a16} 1024x4096x4096", "times torch bf16", 0.9, over_bf16)
    yield _verdict("quantize bf16 1024x4096", "of a copy's speed", 0.70, partial(of_copy, "quantize"))
    yield _verdict("quantize-mxint8 bf16 1024x4096", "of a copy's speed", 0.80, partial(of_copy, "quantize-mxint8"))

    def time_over(name: str, other: str) -> float:
        return speedup(results.get(other, 1024).timing, results.get(name, 1024).timing)

    for name in ("quantize", "quantize-mxint8"):
        rule = partial(time_over, f"{name}-hadamard", name)
        yield _verdict(f"{name}-hadamard bf16 1024x4096", f"time over that of {name}", 2.2, rule, at_most=True)
    rule = partial(time_over, "w4a8-linear-hadamard-prepacked", "w4a8-linear-prepacked")
    yield _verdict(
        "w4a8-linear-hadamard-prepacked 1024x4096x4096", "time over that of w4a8-linear-prepacked", 1.05, rule, at_most=True
    )
    for m, most in ((1, 1.25), (256, 1.10), (512, 1.10), (1024, 1.10)):
        work = f"w4a4-gemm {m}x4096x4096"
        yield _verdict(work, "time over that of repacked weights", most, partial(raw, m), at_most=True)


def _experts(record: Record, suite: str) -> Iterator[Verdict]:
    """Gives the verdicts on a layer of experts."""
    threads = threads_of(record)
    by_key = {
        (r.case.m, r.case.experts.router, r.contender): r
        for r in record.results
        if r.case.suite == suite and r.case.threads == threads and r.case.experts is not None
    }

    def get(contender: str, m: int, router: Router = "even") -> Result:
        found = by_key.get((m, router, contender))
        if found is None:
            raise NotMeasured(record.absent.get(contender, f"no {contender} with {m} tokens"))
        return found

    def over(name: str, peer: str, m: int) -> float:
        return speedup(get(name, m).timing, get(peer, m).timing)

    def of_read(name: str) -> float:
        return rate_share(get(name, 1), get("limit-read", 1), _bytes)

    def on_amx(name: str, peer: str, m: int) -> float:
        get("limit-tdpbusd", m)  # or it is another machine's target
        return over(name, peer, m)

    def half() -> float:
        # Both cases have as many rows in all; being two, they have no rounds in common to compare.
        return get("w4a8-experts", HALF_M, "half").seconds / get("w4a8-experts", HALF_M).seconds

    if suite == "gpt-oss-20b":
        for name, share, times in (("w4a8-experts", 0.75, 4.5), ("w4a16-experts", 0.65, 4.0)):
            work = f"{suite}: {name}, 1 token"
            yield _verdict(work, "of read bandwidth", share, partial(of_read, name), possible=1)
            loop = name.replace("experts", "loop")
            yield _verdict(work, f"times {loop}", 1.5, partial(over, name, loop, 1))
            yield _verdict(work, "times torch-bf16-loop", times, partial(over, name, "torch-bf16-loop", 1))
    big, name = f"{suite}: w4a8-experts, {HALF_M} tokens", "w4a8-experts"
    dense = 0.8 if suite == "gpt-oss-20b" else 0.65
    yield _verdict(big, "times w4a8-dense", dense, partial(over, name, "w4a8-dense", HALF_M))
    yield _verdict(f"AMX: {big}", "times torch-bf16-loop", 2, partial(on_amx, name, "torch-bf16-loop", HALF_M))
    yield _verdict(big, "times ggml-mxfp4-id", 12, partial(over, name, "ggml-mxfp4-id", HALF_M))
    yield _verdict(big, "times ggml-mxfp4-id-repacked", 5, partial(over, name, "ggml-mxfp4-id-repacked", HALF_M))
    yield _verdict(f"{big}, half of the rows one expert's", "time over the even case", 1.15, half, at_most=True)


def verdicts(record: Record) -> list[Verdict]:
    """Every target of the suites in the record."""
    suites = {case.suite for case in record.cases}
    lines = [line for suite in EXPERTS if suite in suites for line in _experts(record, suite)]
    return [*(_products(record) if "targets" in suites else ()), *lines]


def _products(record: Record) -> list[Verdict]:
    """mxfp4_gemm leaves quantizing x out of its time and mxfp4_linear has it inside, so both stand there."""
    results = _Results(record)
    forms = ("w4a4-gemm", "w4a4-linear")
    lines = [line for form in forms for line in _w4a4(results, form)]
    lines += [*_w4a8(results), *_others(results)]
    return lines + [line for form in forms for line in _amx(results, form)] + [*_w4a8_on_amx(results)]
