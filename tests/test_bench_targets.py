# SPDX-License-Identifier: Apache-2.0
"""Suites have the shapes that models run, and targets compare what they say. No time is measured."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from xpu_fp4.bench import cases, report, runner, targets
from xpu_fp4.bench.cases import Case
from xpu_fp4.bench.contenders import Kind
from xpu_fp4.bench.measure import Timing


def test_suites_have_the_shapes_that_models_run() -> None:
    square = cases.suite("square", 2)
    assert [case.m for case in square] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert {(case.n, case.k) for case in square} == {(4096, 4096)}
    assert [case.m for case in cases.suite("square", 2, ms=(7,))] == [7]
    assert {case.k for case in cases.suite("smollm2", 1)} == {576, 1536}
    assert all(case.k % 32 == 0 and case.threads == 3 for name in cases.LAYERS for case in cases.suite(name, 3))
    assert {case.data for case in cases.suite("llama-8b", 1, "random-scales")} == {"random-scales"}
    assert {1, 2, 6} <= {case.threads for case in cases.suite("threads", 6)}
    with pytest.raises(ValueError, match="targets chooses M and data itself"):
        cases.suite("targets", 1, ms=(1,))
    with pytest.raises(ValueError, match="suite is 'cube', expected one of targets"):
        cases.suite("cube", 1)


Seconds = Callable[[str, Case], float | None]


def synthetic(seconds: Seconds, threads: int = 2) -> runner.Record:
    """A record of the suite `targets` with the given times."""
    record = runner.Record({}, {}, {})
    ops_of = {"limit-vpdpbusd": 10**9, "limit-tdpbusd": 10**10}
    for case in cases.suite("targets", threads):
        names = case.only or (*cases.QUANTIZED, "w4a16-linear", "torch-bf16", "torch-int8", "ggml-mxfp4", *cases.LIMITS)
        for name in names:
            time = seconds(name, case)
            if time is not None:
                kind: Kind = "limit" if name.startswith("limit") else "ours"
                size = 10**7 if name == "limit-read" else case.n * case.k * 17 // 32
                timing, done = Timing((time,) * 3, 1), ops_of.get(name, case.ops)
                record.results.append(runner.Result(replace(case, only=()), name, kind, timing, done, size))
    return record


def verdict(record: runner.Record, work: str, figure: str) -> targets.Verdict:
    (found,) = (line for line in targets.verdicts(record) if line.work == work and line.measure == figure)
    return found


def test_targets_compare_rates_with_the_limit_and_times_with_peers() -> None:
    def seconds(name: str, case: Case) -> float:
        if name == "limit-vpdpbusd":
            return 1e-3  # 1 TOPS
        if name == "torch-bf16":
            return case.ops / 0.4e12
        return case.ops / 0.8e12

    record = synthetic(seconds)
    work = "w4a4-gemm-prepacked 1024x4096x4096"
    of_limit, over_bf16 = verdict(record, work, "of vpdpbusd"), verdict(record, work, "times torch bf16")
    assert of_limit.measured == pytest.approx(0.8)
    assert of_limit.reached is False
    assert over_bf16.measured == pytest.approx(2.0)
    assert over_bf16.reached is True
    assert verdict(record, f"{work}, all scale bytes", "of vpdpbusd").reached is True
    raw = verdict(record, "w4a4-gemm 1024x4096x4096", "time over that of repacked weights")
    assert raw.measured == pytest.approx(1.0)
    assert raw.reached is True


def test_small_products_are_held_to_read_bandwidth() -> None:
    # 10 MB in 1 ms, and the 8.9 MB of a weight in as much: 89% of the bandwidth.
    record = synthetic(lambda name, case: 1e-3)
    line = verdict(record, "w4a4-linear-prepacked 1x4096x4096", "of read bandwidth")
    assert line.measured == pytest.approx(4096 * 4096 * 17 / 32 / 1e7)
    assert line.reached is True


@pytest.mark.parametrize(("slow", "worst"), [(None, 63 / 64), (17, 2.0)])
def test_a_cliff_is_a_number_of_rows_slower_than_a_larger_one(slow: int | None, worst: float) -> None:
    record = synthetic(lambda name, case: 48.0 if case.m == slow else case.m)  # the next is 24
    line = verdict(record, "w4a4-gemm-prepacked M = 2..64, 4096x4096", "time over that of a larger M, worst")
    assert line.measured == pytest.approx(worst)
    assert line.reached is (slow is None)


def test_targets_that_cannot_be_measured_say_why() -> None:
    record = synthetic(lambda name, case: None if name in ("limit-tdpbusd", "ggml-mxfp4") or "prepacked" in name else 1.0)
    record.absent["ggml-mxfp4"] = "it is not here"
    line = verdict(record, "w4a4-gemm 512x4096x14336", "times ggml-mxfp4")
    assert (line.measured, line.reached, line.note) == (None, None, "it is not here")
    amx = verdict(record, "AMX, 16 threads: w4a4-gemm 1024x4096x4096", "of tdpbusd")
    assert amx.note == "is for 16 threads, not 2"
    quick = synthetic(lambda name, case: 0.12 if name == "limit-tdpbusd" else 1.0, 16)
    assert verdict(quick, amx.work.replace("gemm", "gemm-prepacked"), amx.measure).reached is True


def test_what_no_machine_can_do_counts_as_disturbed() -> None:
    """A share above the limit and more than twice the speed on two threads are noise, not reached targets."""

    def seconds(name: str, case: Case) -> float | None:
        return None if name == "limit-tdpbusd" else (1.0 if case.threads == 1 else 0.3) / case.m

    record = synthetic(seconds)
    for figure, possible in (("2 threads over 1", 2), ("of vpdpbusd", 1)):
        line = verdict(record, "w4a4-gemm-prepacked 1024x4096x4096", figure)
        assert line.measured is not None
        assert line.measured > possible
        assert (line.possible, line.disturbed, line.reached) == (possible, True, None)
    assert "disturbed" in list(report.targets_table(record).columns[-1].cells)


def test_w4a8_is_held_to_w4a4() -> None:
    record = synthetic(lambda name, case: 1.0 if name.startswith("w4a8") else 0.92)
    work, measure = "w4a8-linear-prepacked 16x4096x14336", "times w4a4-linear-prepacked"
    assert verdict(record, work, measure).reached is False
    record.results = [result for result in record.results if result.contender != "limit-vpdpbusd"]
    assert verdict(record, work, measure).target == 0.9  # AVX2 widens a block twice
    assert verdict(record, work, measure).reached is True


def test_a_busy_machine_is_reported() -> None:
    record = synthetic(lambda name, case: 1.0)
    assert report.disturbance(record) is None
    limit = next(result for result in record.results if result.contender == "limit-vpdpbusd")
    record.results.append(replace(limit, timing=Timing((1.0, 2.0, 3.0), 1)))
    assert "varied by 25%" in (report.disturbance(record) or "")


def test_two_threads_are_compared_with_one() -> None:
    record = synthetic(lambda name, case: 1.0 / case.threads)
    assert verdict(record, "w4a4-gemm-prepacked 1024x4096x4096", "2 threads over 1").measured == pytest.approx(2)


def test_the_hadamards_cost_is_a_ratio_of_times() -> None:
    record = synthetic(lambda name, case: 2.0 if name == "quantize-hadamard" else 1.0)
    line = verdict(record, "quantize-hadamard bf16 1024x4096", "time over that of quantize")
    assert (line.measured, line.reached) == (2.0, True)
    record = synthetic(lambda name, case: 2.5 if name == "quantize-hadamard" else 1.0)
    assert verdict(record, line.work, line.measure).reached is False
