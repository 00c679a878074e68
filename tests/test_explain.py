# SPDX-License-Identifier: Apache-2.0
"""What `xpu-fp4 explain` says of shapes and of model directories."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
import xpu_fp4
from checkpoint_files import HIDDEN, INTERMEDIATE, LAYERS, save_gpt_oss, save_llama
from click.testing import CliRunner
from helpers import random_codes, random_scales, seeded
from xpu_fp4 import Mode, explanation
from xpu_fp4._library import ops
from xpu_fp4.checkpoints.description import Checkpoint, Scheme
from xpu_fp4.checkpoints.tensor_files import TensorFiles
from xpu_fp4.cli import main
from xpu_fp4.explanation import Experts, Linear, explain

BUDGETS = Path(__file__).parent.parent / "tools/isa_budgets.toml"
GPUS = ("dg2", "pvc", "lnl-m", "bmg", "ptl", "cri")
LARGE = 4096


def linear(mode: Mode = "w4a4", n: int = LARGE, k: int = LARGE) -> Linear:
    return Linear(n, k, Scheme(mode))


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["explain", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def fail(message: str, *arguments: object) -> None:
    result = CliRunner().invoke(main, ["explain", *map(str, arguments)])
    assert result.exit_code != 0
    assert message in " ".join(result.output.split()), result.output
    assert isinstance(result.exception, SystemExit), "a traceback"


def read(*arguments: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run(*arguments, "--json"))["layers"]
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_llama(folder)
    result = CliRunner().invoke(main, ["quantize", str(folder), str(folder.with_name("w4a8")), "--scheme", "w4a8"])
    assert result.exit_code == 0, result.output
    return folder.with_name("w4a8")


# ---- the native kernels ----


@pytest.mark.parametrize("isa", ["amx", "avx512_vbmi", "avx512_vnni", "avx_vnni", "avx2"])
@pytest.mark.parametrize("mode", ["w4a4", "w4a8", "w4a16"])
def test_few_rows_decode_a_weight_in_registers_and_many_unpack_it(isa: str, mode: Mode) -> None:
    if isa not in ops._native_isas():
        pytest.skip(f"this build has no {isa} kernels")
    assert "decoded in registers" in explain(linear(mode), 1, isa).variant
    assert "unpacked to panels" in explain(linear(mode), 512, isa).variant


def test_amx_hands_on_what_it_has_no_kernel_for() -> None:
    if "amx" not in ops._native_isas():
        pytest.skip("this build has no AMX kernels")
    few, many = (explain(linear(), rows, "amx") for rows in (1, 512))
    assert (few.kernel, many.kernel) == ("avx512_gemm.h", "amx_gemm.h")
    assert "avx512_vbmi" in few.variant
    assert few.passed_over.startswith("amx:")


def test_avx_vnni_hands_unquantized_activations_to_avx2() -> None:
    if "avx_vnni" not in ops._native_isas():
        pytest.skip("this build has no AVX-VNNI kernels")
    assert explain(linear(), 512, "avx_vnni").variant.startswith("avx_vnni,")
    assert explain(linear("w4a16"), 512, "avx_vnni").variant.startswith("avx2,")


def test_cpu_is_the_instruction_set_in_use() -> None:
    here, named = explain(linear(), 16, "cpu"), explain(linear(), 16, ops._native_isa())
    assert here == named
    better = ops._native_isas()[: ops._native_isas().index(ops._native_isa())]
    assert all(f"{isa}:" in here.passed_over for isa in better)


@pytest.mark.parametrize("k", [96, 416, 1024])
def test_weights_take_the_memory_that_prepack_gives_them(k: int) -> None:
    generator = seeded(k)
    prepacked = xpu_fp4.prepack(random_codes(21, k, generator), random_scales(21, k, generator))
    assert explain(linear(n=21, k=k), 1, "cpu").weight_bytes == prepacked.nbytes


# ---- GPUs ----


@pytest.mark.usefixtures("requires_sycl")
@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_the_kernel_is_that_of_the_fewest_modelled_clocks(device: str, rows: int) -> None:
    plan = explain(linear(), rows, device)
    clocks = [int(number) for number in re.findall(r"\d+(?= for| with large)", plan.passed_over)]
    assert len(clocks) == 3
    assert plan.kernel == ("gemm_small" if clocks[0] == min(clocks) else "gemm_large")
    assert plan.device is not None
    assert plan.modelled_seconds == pytest.approx(min(clocks) / (plan.device.ghz * 1e9), rel=1e-3)
    assert plan.launches[-1].kernel == plan.kernel


@pytest.mark.usefixtures("requires_sycl")
@pytest.mark.parametrize("device", GPUS)
def test_modelled_times_are_of_the_devices_that_kernels_are_budgeted_for(device: str) -> None:
    budgeted = tomllib.loads(BUDGETS.read_text())["device"][device]
    found = explain(linear(), 1, device).device
    assert found is not None
    assert (found.engines, found.ghz, found.matrix_clocks) == tuple(
        budgeted[key] for key in ("engines", "ghz", "matrix_clocks")
    )
    assert found.bandwidth == pytest.approx(budgeted["bandwidth"] * 1e9, rel=0.02)


@pytest.mark.usefixtures("requires_sycl")
def test_an_expanded_weight_is_not_expanded_in_the_call() -> None:
    stored, expanded = (explain(linear(), 1024, "bmg", expanded=expanded) for expanded in (False, True))
    assert "W" in [launch.variant for launch in stored.launches]
    assert "W" not in [launch.variant for launch in expanded.launches]
    elements = LARGE * LARGE
    assert expanded.weight_bytes - stored.weight_bytes == pytest.approx(1.03 * elements, rel=0.01)
    assert stored.scratch_bytes is not None
    assert expanded.scratch_bytes is not None
    assert stored.scratch_bytes - expanded.scratch_bytes == expanded.weight_bytes - stored.weight_bytes


@pytest.mark.usefixtures("requires_sycl")
def test_more_engines_make_a_large_product_faster() -> None:
    few, many = (explain(linear(), 4096, "bmg", engines=engines).modelled_seconds for engines in (80, 160))
    assert few is not None
    assert many is not None
    assert few == pytest.approx(2 * many, rel=0.1)


@pytest.mark.usefixtures("requires_sycl")
def test_what_was_asked_for_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", "bmg:large")
    plan = explain(linear(), 1, "bmg")
    assert plan.kernel == "gemm_large"
    assert "XPU_FP4_SYCL_VARIANT" in plan.passed_over


@pytest.mark.usefixtures("requires_sycl")
def test_experts_name_each_of_their_kernels() -> None:
    plan = explain(Experts(32, 4, 2880, 2880, Scheme("w4a8")), 64, "bmg")
    launched = [launch.kernel for launch in plan.launches]
    assert [step.split(" (")[0] for step in re.split(r", (?=[a-z]+_)", plan.variant)] == launched
    assert plan.weight_bytes == 32 * 3 * 2880 * 2880 * 17 // 32


@pytest.mark.usefixtures("requires_sycl")
def test_experts_with_an_offset_transform_their_inputs() -> None:
    plain, offset = (
        explain(Experts(32, 4, 2880, 2880, Scheme("w4a8", input_offset=offset)), 64, "bmg") for offset in (False, True)
    )
    assert "transform" not in plain.variant
    assert offset.variant.count("transform_quantize_expand") == 2


# ---- model directories ----


def test_layers_alike_are_one_line(llama: Path) -> None:
    rows = read(llama, "--m", "1,8")
    assert sum(len(row["layers"]) for row in rows) == 2 * 7 * LAYERS
    assert [(row["n"], row["k"]) for row in rows[::2]] == list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    (gate_up,) = [row for row in rows if (row["n"], row["rows"]) == (INTERMEDIATE, 1)]
    assert sorted(explanation.patterns(gate_up["layers"]).items()) == [
        ("model.layers.*.mlp.gate_proj", LAYERS),
        ("model.layers.*.mlp.up_proj", LAYERS),
    ]
    assert gate_up["scheme"]["mode"] == "w4a8"
    assert run(llama).count(f"{HIDDEN}x{INTERMEDIATE}") == 1


def test_nothing_but_headers_is_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(TensorFiles, "tensor", refuse)
    monkeypatch.setattr(Checkpoint, "weight", refuse)
    assert read(llama)


def test_scheme_is_that_of_the_directory_or_the_one_asked_for(llama: Path) -> None:
    assert {row["scheme"]["mode"] for row in read(llama)} == {"w4a8"}
    assert {row["scheme"]["mode"] for row in read(llama, "--scheme", "w4a16")} == {"w4a16"}


def test_experts_have_the_rows_that_a_router_gives_them(tmp_path: Path) -> None:
    save_gpt_oss(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    experts, top_k = config["num_local_experts"], config["num_experts_per_tok"]
    (row,) = read(tmp_path, "--m", "64")
    assert (row["experts"], row["top_k"], row["hidden"]) == (experts, top_k, HIDDEN)
    assert f"{64 * top_k // experts} rows an expert" in row["variant"]
    (row,) = read(tmp_path, "--m", "64", "--top-k", experts)
    assert "64 rows an expert" in row["variant"]
    del config["num_experts_per_tok"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    fail("does not say how many experts a token chooses", tmp_path)


def test_a_measured_time_is_of_a_call() -> None:
    (row,) = read("--shape", "4x64x96", "--scheme", "w4a8", "--measure")
    assert 0 < row["measured_seconds"] < 1
    assert row["modelled_seconds"] is None
    assert "measured" in run("--shape", "4x64x96", "--scheme", "w4a8", "--measure")


# ---- bad input ----


def test_bad_input_is_named(llama: Path) -> None:
    fail("expected either DIR or --shape")
    fail("expected either DIR or --shape", llama, "--shape", "1x32x32")
    fail("'1x2', expected MxNxK", "--shape", "1x2")
    fail("K is 33, expected a multiple of 32", "--shape", "1x32x33")
    fail("M is 0, expected more than 0", "--shape", "0x32x32")
    fail("--engines is for a GPU's architecture", "--shape", "1x32x32", "--engines", 8)
    fail("cannot be expanded", "--shape", "1x32x32", "--expanded", "--scheme", "w4a4")
    fail("--measure runs the kernels of this CPU", "--shape", "1x32x32", "--measure", "--device", "portable")


@pytest.mark.usefixtures("requires_sycl")
def test_an_unknown_device_is_named() -> None:
    fail(
        'no GPU architecture is named "battle", expected one of dg2, pvc, lnl-m, bmg, ptl, cri',
        "--shape",
        "1x32x32",
        "--device",
        "battle",
    )


def test_the_dtype_of_a_directory_is_its_own(llama: Path) -> None:
    assert explanation.dtype_of(llama) == torch.bfloat16
