# SPDX-License-Identifier: Apache-2.0
"""The benchmark measures what it says. No test here depends on how fast anything is."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import xpu_fp4
from bench_cases import CASE, CPU, LAYER
from click.testing import CliRunner, Result
from torch import Tensor
from xpu_fp4 import reference
from xpu_fp4.bench import cases, ggml, measure, report, runner
from xpu_fp4.bench.cases import Case
from xpu_fp4.bench.contenders import OURS, TORCH, Contender, Emulation, Unavailable
from xpu_fp4.bench.limits import limits
from xpu_fp4.bench.measure import Job, Stopwatch, Timing, speedup
from xpu_fp4.bench.operands import Problem, Weights
from xpu_fp4.cli import main

ops = torch.ops.xpu_fp4


class FakeMachine:
    """A clock that jobs move forward, and a log of who ran."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, ""

    def job(self, name: str, seconds: float) -> Job:
        def run() -> None:
            self.now += seconds
            self.log += name

        return Job(run, rest=lambda: None)

    @property
    def watch(self) -> Stopwatch:
        return Stopwatch(clock=lambda: self.now)


# ---- measuring ----


def test_jobs_take_turns_and_the_order_moves_on() -> None:
    machine = FakeMachine()
    timings = measure.measure({name: machine.job(name, 1.0) for name in "abc"}, 6, machine.watch)
    assert machine.log == "aaaabbbbcccc" + "abc" + "bca" + "cab"  # four calls each to find out how long one takes
    assert [timing.samples for timing in timings.values()] == [(1.0, 1.0, 1.0)] * 3


def test_a_short_job_is_called_many_times_and_warmed_up() -> None:
    machine = FakeMachine()
    timing = measure.measure({"a": machine.job("a", 1e-3)}, 2e-3, machine.watch)["a"]
    assert timing.calls * 1e-3 >= measure.MIN_SAMPLE
    assert timing.median == pytest.approx(1e-3)
    assert len(machine.log) == 4 + measure.MIN_SAMPLES * (1 + timing.calls)


def test_time_is_shared_so_that_fast_jobs_get_more_samples() -> None:
    machine = FakeMachine()
    times = {"a": 0.01, "b": 0.4, "c": 10.0}
    timings = measure.measure({name: machine.job(name, time) for name, time in times.items()}, 3, machine.watch)
    assert [len(timing.samples) for timing in timings.values()] == [measure.MAX_SAMPLES, measure.MIN_SAMPLES, 1]


def test_a_job_rests_after_each_sample_and_the_device_is_waited_for() -> None:
    machine, rests, waits = FakeMachine(), [], []
    watch = Stopwatch(clock=lambda: machine.now, synchronize=lambda: waits.append(1))
    job = replace(machine.job("a", 1.0), rest=lambda: rests.append(machine.log))
    measure.measure({"a": job}, 0, watch)
    assert rests == ["a", "aa"]
    assert len(waits) >= 2 * 2  # before and after every timed call


def test_median_and_spread() -> None:
    timing = Timing((1.0, 2.0, 3.0, 4.0, 100.0), 1)
    assert timing.median == 3.0
    assert timing.spread == pytest.approx((4 - 2) / 2 / 3)
    assert Timing((1.0,), 1).spread == 0


def test_speedup_compares_rounds_with_each_other() -> None:
    # It is twice as fast in every round, though the machine became ten times as slow.
    assert speedup(Timing((1.0, 10.0), 1), Timing((2.0, 20.0, 7.0), 1)) == 2


# ---- limits ----


def test_compute_limits_count_their_operations() -> None:
    instructions = ops._limit_instructions()
    threads = torch.get_num_threads()
    for name in instructions:
        assert ops._limit_compute(name, 2000) == 2 * ops._limit_compute(name, 1000) > 0
    try:
        torch.set_num_threads(1)
        one = [ops._limit_compute(name, 1000) for name in instructions]
        torch.set_num_threads(2)
        assert [ops._limit_compute(name, 1000) for name in instructions] == [2 * n for n in one]
    finally:
        torch.set_num_threads(threads)


def test_compute_limits_follow_the_processor() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("AVX2", "AVX512"):
        assert "vpmaddubsw" in ops._limit_instructions()
    with pytest.raises(RuntimeError, match='instruction is "no such", expected one of'):
        ops._limit_compute("no such", 1)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 1000, 256 * 1024 + 1, 2**20 + 77])
def test_read_limit_reads_every_byte(n: int) -> None:
    x = torch.randint(0, 256, (n,), dtype=torch.uint8)
    before = ops._limit_read(x)
    for i in {0, n // 3, n // 2, n - 1} - {-1} if n else ():
        x[i] ^= 0x5A
        assert ops._limit_read(x) != before
        x[i] ^= 0x5A
    assert ops._limit_read(x) == before


def test_copy_limit_reads_and_writes_every_byte() -> None:
    x = torch.randint(0, 256, (2**20 + 77,), dtype=torch.uint8)
    same = torch.empty_like(x)
    ops._limit_copy(x, same)
    assert torch.equal(same, x)
    for written in (1, 1000, 300_000, 2**22 + 5):
        out = torch.full((written + 1,), 7, dtype=torch.uint8)
        ops._limit_copy(torch.zeros_like(x), out[:-1])
        assert out[:-1].count_nonzero() == 0, "all of it is written"
        assert out[-1] == 7, "and nothing behind it"


def test_limits_refuse_other_tensors() -> None:
    with pytest.raises(RuntimeError, match=r"x is .*expected contiguous bytes"):
        ops._limit_read(torch.zeros(4))
    with pytest.raises(RuntimeError, match=r"out is .*expected contiguous bytes"):
        ops._limit_copy(torch.zeros(4, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)[::2])


# ---- contenders ----


def problem(case: Case = CASE, working_set: int = 1) -> Problem:
    return Problem(case, Weights(case.n, case.k, case.data, CPU, working_set))


def run_once(contender: Contender, operands: Problem) -> Tensor:
    made = contender.setup(operands)
    y = (made.run if isinstance(made, Job) else made)()
    assert isinstance(y, Tensor)
    return y


OWN_FORMS = ("-prepacked", "-expanded")
PRODUCTS = [c for c in (*OURS, *TORCH) if c.name not in (*cases.CONVERSIONS, "torch-int8") and not c.name.endswith(OWN_FORMS)]


@pytest.mark.parametrize("contender", PRODUCTS, ids=lambda c: c.name)
def test_every_contender_multiplies_the_same_matrices(contender: Contender) -> None:
    operands = problem()
    w = reference.values(operands.weights.codes, operands.weights.scale)
    x = operands.x
    if "w4a4" in contender.name or contender.name == "emulation":
        x = reference.values(*reference.quantize(x))
    expected = x.double() @ w.t()
    y = run_once(contender, operands).double()
    assert y.shape == expected.shape
    assert (y - expected).norm() < 0.01 * expected.norm()


def test_every_contender_on_a_gpu_runs_on_the_sycl_kernels(requires_sycl: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ops are there, the expanded weight among them, and give the bits of the checkpoint's."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", "bmg:large")
    taking_part = {c.name: c for c in runner.contenders("xpu") if c.takes_part(CASE, "xpu")}
    assert not any(name.endswith("-prepacked") for name in taking_part)
    with xpu_fp4.cpu_backend("sycl"):
        results = {name: run_once(contender, problem()) for name, contender in taking_part.items()}
    for mode in ("w4a4", "w4a8"):
        assert torch.equal(results[f"{mode}-linear-expanded"], results[f"{mode}-linear"])


def test_an_expanded_weight_is_absent_where_the_kernels_have_no_such_form() -> None:
    by_name = {c.name: c for c in OURS}
    with pytest.raises(Unavailable, match="only the SYCL kernels for GPUs"):
        by_name["w4a4-linear-expanded"].setup(problem())


def test_copies_of_a_weight_fill_the_gpus_cache_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(last_level_cache_size=18 << 20, total_memory=12 << 30)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda: properties)
    assert runner.working_set("xpu") == 36 << 20


def test_prepacked_contenders_compute_the_same_bits_or_say_why_not() -> None:
    operands = problem()
    by_name = {c.name: c for c in OURS}
    record = run_record([CASE], [c for c in OURS if c.name not in cases.CONVERSIONS])
    for name in ("w4a4-linear", "w4a4-gemm", "w4a8-linear", "w4a8-gemm", "w4a16-linear"):
        if hasattr(ops, "mxfp4_prepack"):
            assert torch.equal(run_once(by_name[f"{name}-prepacked"], operands), run_once(by_name[name], operands))
        else:
            assert "this build has no mxfp4_" in record.absent[f"{name}-prepacked"]


def test_contenders_with_a_hadamard_transform_x_first() -> None:
    operands = problem()
    by_name = {c.name: c for c in OURS}
    turned = reference.transform(operands.x, 32)
    y = run_once(by_name["w4a8-linear-hadamard-prepacked"], operands)
    weights = operands.weights
    assert torch.equal(y, xpu_fp4.linear(turned, weights.codes, weights.scale, mode="w4a8").to(y.dtype))
    for name, quantize in (("quantize", xpu_fp4.quantize), ("quantize-mxint8", xpu_fp4.mxint8_quantize)):
        made = by_name[f"{name}-hadamard"].setup(operands)
        assert not isinstance(made, Job)
        actual, expected = made(), quantize(turned)
        assert isinstance(actual, tuple)
        assert all(torch.equal(a.view(torch.uint8), e.view(torch.uint8)) for a, e in zip(actual, expected, strict=True))


def test_calls_take_copies_in_turn_that_fill_the_working_set() -> None:
    weights = problem(working_set=100_000).weights
    take = weights.tensors_in_turn("checkpoint", weights.codes, weights.scale)
    first = take()[0].data_ptr()
    pointers = {first}
    while (pointer := take()[0].data_ptr()) != first:
        pointers.add(pointer)
    assert 100_000 <= len(pointers) * weights.packed_bytes < 100_000 + weights.packed_bytes


def test_fp4_gemm_layout_survives_copying() -> None:
    weights = problem().weights
    (codes,) = weights.tensors_in_turn("t", weights.codes.t())()
    assert codes.stride() == (1, weights.k // 2)


@pytest.mark.parametrize(("data", "low", "high"), [("random-scales", 0, 254), ("random-scales-20", 107, 147)])
def test_random_scales_have_all_finite_bytes_of_their_window(data: cases.Data, low: int, high: int) -> None:
    scale = Weights(256, 1024, data, CPU, 1).scale
    assert scale.unique().tolist() == list(range(low, high + 1))
    x = problem(replace(CASE, data=data)).x
    assert x.isfinite().all()


def test_emulation_knows_every_byte_and_rounds_like_the_reference() -> None:
    emulation = Emulation(CPU)
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scale = torch.arange(120, 136, dtype=torch.uint8).view(16, 1)
    assert torch.equal(emulation.dequantize(codes, scale).double(), reference.values(codes, scale))
    x = torch.randn(8, 256).bfloat16()  # has ties
    assert torch.equal(emulation.round_trip(x).double(), reference.values(*reference.quantize(x)))


def test_peers_and_conversions_take_part_where_they_belong() -> None:
    by_name = {c.name: c for c in (*OURS, *TORCH, *limits())}
    unaligned = replace(CASE, data="random-scales")
    assert by_name["torch-bf16"].takes_part(CASE, "cpu")
    assert not by_name["torch-bf16"].takes_part(unaligned, "cpu")
    assert by_name["w4a4-gemm"].takes_part(unaligned, "xpu")
    assert not by_name["torch-int8"].takes_part(CASE, "xpu")
    assert not by_name["quantize"].takes_part(CASE, "cpu")
    assert by_name["quantize"].takes_part(replace(CASE, only=cases.CONVERSIONS), "cpu")


# ---- ggml ----


def test_ggml_blocks_hold_the_scale_and_elements_sixteen_apart() -> None:
    codes, scale = xpu_fp4.quantize(torch.randn(5, 96))
    blocks = ggml.to_blocks(codes.view(torch.uint8), scale.view(torch.uint8))
    assert blocks.shape == (5, 3, 17)
    elements = reference.unpack(codes).view(5, 3, 32)
    for j in range(16):
        assert torch.equal(blocks[..., 1 + j], elements[..., j] + 16 * elements[..., j + 16])
    assert torch.equal(blocks[..., 0], scale.view(torch.uint8))


@pytest.mark.parametrize("repacked", [False, True])
def test_ggml_multiplies_our_weights(repacked: bool) -> None:
    try:
        library = ggml.instance()
    except ImportError as error:
        pytest.skip(str(error))
    x, weights = torch.randn(3, 128), [Weights(96, 128, "gaussian", CPU, 1) for _ in range(2)]
    layouts = library.repacking if repacked else [library.plain]
    made = [ggml.Weight(library, ggml.to_blocks(w.codes, w.scale), layouts) for w in weights]
    library.use_threads(1)
    products = ggml.Products(library, x, made, 96)
    for i, w in enumerate(weights):
        products.run(i)
        expected = x.double() @ reference.values(w.codes, w.scale).t()
        assert (products.result(i).double() - expected).norm() < 0.02 * expected.norm()
    library.rest()


# ---- records ----


def run_record(planned: list[Case], who: list[Contender]) -> runner.Record:
    """Runs on a clock that moves by a second at each look."""
    watch = Stopwatch(clock=itertools.count().__next__)
    return runner.run(planned, who, seconds=0, copies_bytes=1, watch=watch)


def test_record_survives_json_and_names_the_machine() -> None:
    record = run_record([CASE, replace(CASE, only=cases.CONVERSIONS), LAYER], list(runner.contenders("cpu")))
    text = json.dumps(record.to_json())
    again = runner.Record.from_json(json.loads(text))
    assert again.to_json() == record.to_json()
    names = {result.contender for result in again.results}
    assert {"w4a4-gemm", "w4a4-linear", "w4a16-linear", "torch-bf16", "torch-f32", "torch-int8", "emulation"} <= names
    assert {"quantize", "dequantize", "limit-read", "limit-copy-quantize"} <= names
    assert names | set(record.absent) == set(record.contenders)
    keys = {"processor", "instruction sets", "cores", "cache bytes", "memory bytes", "torch", "native kernels", "revision"}
    assert keys <= record.machine.keys()
    row = json.loads(text)["results"][0]
    assert {"suite", "m", "n", "k", "data", "threads", "contender", "kind", "seconds", "spread", "samples"} <= row.keys()


def test_a_run_uses_the_threads_of_its_cases_and_gives_them_back() -> None:
    threads, seen = torch.get_num_threads(), []
    asker = replace(TORCH[0], setup=lambda problem: lambda: seen.append(torch.get_num_threads()))
    try:
        torch.set_num_threads(2)
        run_record([CASE, replace(CASE, threads=3)], [asker])
        assert torch.get_num_threads() == 2
        assert list(dict.fromkeys(seen)) == [1, 3]
    finally:
        torch.set_num_threads(threads)


def test_other_json_is_refused() -> None:
    with pytest.raises(ValueError, match="format is None, expected 1"):
        runner.Record.from_json({"results": []})


def test_missing_peers_are_reported_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(ggml.DIR_VARIABLE, str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchao.prototype.mx_formats.config", None)
    ggml.instance.cache_clear()
    record = run_record([CASE], [c for c in runner.contenders("cpu") if c.name in ("torchao-mx", "ggml-mxfp4", "torch-bf16")])
    ggml.instance.cache_clear()
    assert "torchao cannot be imported" in record.absent["torchao-mx"]
    assert f"{ggml.DIR_VARIABLE} is {str(tmp_path)!r}" in record.absent["ggml-mxfp4"]
    assert [result.contender for result in record.results] == ["torch-bf16"]
    assert "ggml-mxfp4: XPU_FP4_BENCH_GGML_DIR is" in report.markdown(replace(record, settings={"command": "-"}))


# ---- the command ----


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.LAYERS, "smollm2", ((64, 96), (32, 64)))
    monkeypatch.setattr(runner, "working_set", lambda device: 1)
    monkeypatch.setattr(measure, "MIN_SAMPLE", 0.0)


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments])


@pytest.mark.usefixtures("tiny")
def test_command_measures_shows_and_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, page = tmp_path / "run.json", tmp_path / "page.md"
    options = ["--suite", "smollm2", "--m", "1,5", "--seconds", "0", "--threads", "1"]
    who = [option for name in ("w4a4", "bf16", "limit-") for option in ("--only", name)]
    done = bench(*options, *who, "--json", str(path))
    assert done.exit_code == 0, done.output
    assert "smollm2: 5 x 64 x 96, gaussian, 1 thread" in done.output
    assert "w4a4-linear" in done.output
    assert bench("show", str(path)).output.count("torch-bf16") == 4
    command = json.loads(path.read_text())["settings"]["command"]
    assert command == "xpu-fp4 bench --suite smollm2 --m 1,5 --threads 1 --seconds 0.0 --only w4a4 --only bf16 --only limit-"

    page.write_text("# Title\n<!-- bench run -->\nold\n<!-- end bench run -->\ntail\n")
    for _ in range(2):  # a second time changes nothing
        done = bench("plot", str(path), "--page", str(page))
        assert done.exit_code == 0, done.output
        text = page.read_text()
        assert text.startswith("# Title\n<!-- bench run -->\n\nExecuted with `xpu-fp4 bench ")
        assert text.endswith("<!-- end bench run -->\ntail\n")
        assert "old" not in text
        assert "](run-roofline.png)" in text
        assert text.count("### Suite `smollm2`") == 1
    for name in ("roofline", "time"):
        assert (tmp_path / f"run-{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("tiny")
def test_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    assert "expected numbers above 0" in bench("--m", "1,x").output
    assert "expected numbers above 0" in bench("--m", "0").output
    assert "targets chooses M and data itself" in bench("--m", "1").output
    assert "--clock cpu needs --threads 1" in bench("--clock", "cpu", "--threads", "2").output
    assert "no contender has one of nobody in its name" in bench("--only", "nobody").output
    if not torch.xpu.is_available():
        assert "torch sees no XPU device" in bench("--device", "xpu").output
    path, page = tmp_path / "a.json", tmp_path / "page.md"
    path.write_text("{}")
    assert f"{path}: format is None, expected 1" in bench("plot", str(path)).output.replace("\n", "")
    assert bench("plot", str(path)).exit_code == 1
    page.write_text("no markers")
    path.write_text(json.dumps(run_record([CASE], [TORCH[0]]).to_json()))
    done = bench("plot", str(path), "--page", str(page))
    assert done.exit_code != 0
    assert page.read_text() == "no markers"
