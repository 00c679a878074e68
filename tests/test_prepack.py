# SPDX-License-Identifier: Apache-2.0
"""The native kernels' own weight layout: a permutation of bytes that changes no result and that no checkpoint shows."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import cast, get_args

import pytest
import torch
import xpu_fp4
from helpers import DTYPES, assert_same_bits, gemm, linear_w4a4, linear_w4a8, linear_w4a16, random_codes, random_scales, seeded
from torch import Tensor
from xpu_fp4 import Group, Mode, MXFP4Linear

STRIP, QUAD = 16, 128
SHAPES = [(1, 32), (16, 128), (17, 160), (48, 416), (50, 4096)]


def weight(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    return random_codes(n, k, generator), random_scales(n, k, generator)


def activations(m: int, k: int) -> Tensor:
    return torch.randn(m, k, generator=seeded(1))


def laid_out(codes: Tensor, scale: Tensor) -> Tensor:
    """The layout by torch's own reshapes: csrc/format/strips.h in other words."""
    n, k = codes.shape[0], codes.shape[1] * 2
    strips, quads = -(-n // STRIP), -(-k // QUAD)
    full = torch.zeros(strips * STRIP, quads * QUAD // 2, dtype=torch.uint8)
    full[:n, : k // 2] = codes
    dwords = full.view(strips, STRIP, quads, 16, 4).permute(0, 2, 3, 1, 4).reshape(strips, quads, 1024)
    scales = torch.full((strips * STRIP, quads * 4), 127, dtype=torch.uint8)
    scales[:n] = scale[:, torch.arange(quads * 4).clamp(max=k // 32 - 1)]
    lines = scales.view(strips, STRIP, quads, 4).transpose(1, 2).reshape(strips, quads, 64)
    code_bytes = [min(1024, k // 2 * STRIP - 1024 * quad) for quad in range(quads)]
    return torch.cat([torch.cat([dwords[:, q, :size], lines[:, q]], dim=1) for q, size in enumerate(code_bytes)], dim=1)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_layout_is_the_documented_one(n: int, k: int) -> None:
    codes, scale = weight(n, k)
    assert_same_bits(xpu_fp4.prepack(codes, scale), laid_out(codes, scale))


@pytest.mark.parametrize(("n", "k"), [*SHAPES, (0, 64), (5, 0)])
def test_unprepack_gives_the_weight_back(n: int, k: int) -> None:
    codes, scale = weight(n, k)
    again = xpu_fp4.unprepack(xpu_fp4.prepack(codes, scale), n, k)
    assert_same_bits(again[0], codes)
    assert_same_bits(again[1], scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 5, 40])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_prepacked_weights_give_the_same_bits(backend: str, n: int, k: int, m: int, dtype: torch.dtype) -> None:
    codes, scale = weight(n, k)
    packed = xpu_fp4.prepack(codes, scale)
    x, bias = activations(m, k).to(dtype), torch.randn(n, generator=seeded(2)).to(dtype)
    assert_same_bits(xpu_fp4.linear_prepacked(x, packed, n, bias), linear_w4a4(x, codes, scale, bias))
    assert_same_bits(xpu_fp4.linear_prepacked(x, packed, n, bias, mode="w4a8"), linear_w4a8(x, codes, scale, bias))
    assert_same_bits(xpu_fp4.linear_prepacked(x, packed, n, bias, mode="w4a16"), linear_w4a16(x, codes, scale, bias))
    q, q_scale = xpu_fp4.quantize(x)
    got = torch.ops.xpu_fp4.mxfp4_gemm_prepacked(q, q_scale, packed, n, dtype, bias)
    assert_same_bits(got, gemm(q.view(torch.uint8), q_scale.view(torch.uint8), codes, scale, dtype, bias))


def test_the_other_scale_layout_gives_the_same_record() -> None:
    """The strips of fp4_gemm's weights, whose scales are transposed, are decoded as those of a checkpoint."""
    codes, scale = weight(33, 416)
    a, a_scale = weight(9, 416, seed=3)
    want = torch.ops.xpu_fp4.mxfp4_gemm_prepacked(a, a_scale, xpu_fp4.prepack(codes, scale), 33, torch.float32)
    assert_same_bits(gemm(a, a_scale, codes, scale), want)


BAD = {
    "weight": (lambda c, s, p, x: xpu_fp4.prepack(c.float(), s), "mxfp4_prepack: weight must be float4_e2m1fn_x2 or uint8"),
    "scale": (lambda c, s, p, x: xpu_fp4.prepack(c, s[:, 1:]), "mxfp4_prepack: weight_scale has shape"),
    "out_features": (lambda c, s, p, x: xpu_fp4.linear_prepacked(x, p, 40), "mxfp4_linear_prepacked: weight has shape"),
    "negative": (lambda c, s, p, x: xpu_fp4.linear_prepacked(x, p, -1), "out_features is -1"),
    "k": (lambda c, s, p, x: xpu_fp4.linear_prepacked(x[:, :96], p, 20), "mxfp4_linear_prepacked: weight has shape"),
    "dtype": (lambda c, s, p, x: xpu_fp4.linear_prepacked(x, p.to(torch.int8), 20), "weight must be uint8"),
    "group": (
        lambda c, s, p, x: xpu_fp4.linear_prepacked(x, p, 20, mode="w4a8", group=cast(Group, 64)),
        "mxfp4_linear_w4a8_prepacked: group is 64, expected 32 or 128",
    ),
    "strides": (
        lambda c, s, p, x: xpu_fp4.linear_prepacked(x, p.t().contiguous().t(), 20, mode="w4a16"),
        "mxfp4_linear_w4a16_prepacked: weight must be contiguous",
    ),
    "unprepack": (lambda c, s, p, x: xpu_fp4.unprepack(p, 20, 100), "in_features is 100, expected a multiple of 32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    call, message = BAD[name]
    codes, scale = weight(20, 256)
    with pytest.raises(RuntimeError, match=message):
        call(codes, scale, xpu_fp4.prepack(codes, scale), activations(2, 256))


def test_the_ops_pass_opcheck() -> None:
    codes, scale = weight(20, 160)
    packed, x = xpu_fp4.prepack(codes, scale), activations(3, 160)
    q, q_scale = (t.view(torch.uint8) for t in xpu_fp4.quantize(x))
    int8, int8_scale = xpu_fp4.mxint8_quantize(x)[0], q_scale
    ops = torch.ops.xpu_fp4
    for op, args in (
        (ops.mxfp4_prepack, (codes, scale)),
        (ops.mxfp4_unprepack, (packed, 20, 160)),
        (ops.mxfp4_gemm_prepacked, (q, q_scale, packed, 20, torch.float32)),
        (ops.mxfp4_linear_prepacked, (x, packed, 20)),
        (ops.mxfp4_gemm_prepacked, (int8, int8_scale, packed, 20)),
        (ops.mxfp4_linear_w4a8_prepacked, (x, packed, 20)),
        (ops.mxfp4_linear_w4a16_prepacked, (x, packed, 20)),
    ):
        torch.library.opcheck(op.default, args)


# ---- the module ----


def module(mode: Mode = "w4a4", n: int = 48, k: int = 256) -> MXFP4Linear:
    torch.manual_seed(0)
    return MXFP4Linear.from_linear(torch.nn.Linear(k, n), mode=mode)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_the_first_forward_prepacks_and_changes_no_bit(mode: Mode) -> None:
    layer, x = module(mode), activations(5, 256)
    want = xpu_fp4.linear(x, layer.weight_packed, layer.weight_scale, layer.bias, mode=mode)
    assert not layer.is_prepacked
    assert_same_bits(layer(x), want)
    assert layer.is_prepacked
    assert_same_bits(layer(x), want)


def test_a_prepacked_module_shows_its_checkpoint_format() -> None:
    layer = module()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(activations(1, 256))
    after = layer.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert_same_bits(after[name], tensor)
    assert_same_bits(layer.weight_packed, before["weight_packed"])
    assert_same_bits(layer.weight_scale, before["weight_scale"])
    assert_same_bits(layer.dequantized_weight(), module().dequantized_weight())


def test_a_prepacked_module_loads_another_weight() -> None:
    layer, other, x = module(), MXFP4Linear(256, 48), activations(4, 256)
    other(x)
    assert other.is_prepacked
    other.load_state_dict(layer.state_dict())
    assert_same_bits(other(x), layer(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"])
def test_copies_of_a_prepacked_module_compute_the_same(copied: object) -> None:
    layer, x = module(), activations(4, 256)
    want = layer(x)
    assert callable(copied)
    assert_same_bits(copied(layer)(x), want)


def test_moving_a_prepacked_module_makes_its_parameters_again() -> None:
    layer = module()
    layer(activations(1, 256))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    layer.to(torch.bfloat16)
    assert {name for name, _ in layer.named_parameters()} == {"weight_packed", "weight_scale", "bias"}
    assert layer.weight_packed.dtype == torch.uint8


@pytest.mark.parametrize("k", [96, 576, 1536])
def test_prepacking_costs_no_memory_to_speak_of(k: int) -> None:
    layer = module(n=576, k=k)
    stored = layer.weight_packed.nbytes + layer.weight_scale.nbytes
    layer.prepack_()
    held = sum(t.nbytes for t in [*layer.parameters(), *layer.buffers()] if t is not layer.bias)
    assert held <= 1.05 * stored


def test_a_traced_first_forward_leaves_the_module_alone() -> None:
    layer, x = module(), activations(3, 256)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert not layer.is_prepacked
    assert_same_bits(compiled, layer(x))


def test_the_sycl_backend_leaves_the_module_alone(backend: str) -> None:
    layer = module()
    layer(activations(2, 256))
    assert layer.is_prepacked == (backend == "native")


def test_a_missing_attribute_is_still_an_error() -> None:
    layer = module()
    layer(activations(1, 256))
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing


# ---- instruction sets ----

SELF_TEST = """
import xpu_fp4
from xpu_fp4.cli.doctor import self_test
print(self_test("native"), end="")
"""


@pytest.mark.parametrize("isa", ["amx", "avx512_vbmi", "avx512_vnni", "avx_vnni", "avx2", "portable"])
def test_every_instruction_set_of_this_machine_computes_the_reference(isa: str, tmp_path: Path) -> None:
    env = {**os.environ, "XPU_FP4_CPU_ISA": isa, "XPU_FP4_CPU_BACKEND": "native"}
    done = subprocess.run([sys.executable, "-c", SELF_TEST], env=env, cwd=tmp_path, capture_output=True, text=True)
    if f'XPU_FP4_CPU_ISA is "{isa}"' in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert (done.returncode, done.stdout) == (0, "None"), done.stderr


# ---- memory ----

PEAK = """
import re, sys
from pathlib import Path
import torch, xpu_fp4

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

mode = sys.argv[1]
x = torch.ones(8192, 4096, dtype=torch.bfloat16)
packed = xpu_fp4.prepack(torch.full((48, 2048), 34, dtype=torch.uint8), torch.full((48, 128), 127, dtype=torch.uint8))
xpu_fp4.linear_prepacked(x[:8], packed, 48, mode=mode)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = kilobytes("VmRSS")
y = xpu_fp4.linear_prepacked(x, packed, 48, mode=mode)
print(kilobytes("VmHWM") - before - y.nbytes // 1024, torch.get_num_threads())
"""


@pytest.mark.parametrize(("mode", "bytes_an_element"), [("w4a4", 1.63), ("w4a8", 1.63), ("w4a16", 4)])
def test_a_call_holds_the_activations_of_a_thousand_rows_at_most(mode: Mode, bytes_an_element: float) -> None:
    """The bound that docs/ARCHITECTURE.md states; all 8192 rows would take eight times as much."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    env = {**os.environ, "XPU_FP4_CPU_BACKEND": "native"}
    done = subprocess.run([sys.executable, "-c", PEAK, mode], env=env, capture_output=True, text=True, check=True)
    kilobytes, threads = (int(word) for word in done.stdout.split())
    assert kilobytes * 1024 <= 1024 * 4096 * bytes_an_element + (threads * 0.5 + 2) * 2**20
