# SPDX-License-Identifier: Apache-2.0
"""What several test files need: comparing bits, random operands, the ops with their weight as checkpoints store it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CDLL
from typing import Literal, get_args

import ml_dtypes
import numpy as np
import torch
import xpu_fp4
from torch import Tensor
from xpu_fp4 import Group, ScaleMode, reference

FP_QUANT_MODES: tuple[ScaleMode, ...] = ("abs_max", "quest")
MODES: tuple[ScaleMode, ...] = tuple(mode for mode in get_args(ScaleMode) if mode not in FP_QUANT_MODES)
GROUPS: tuple[Group, ...] = get_args(Group)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF_DTYPES = (torch.float16, torch.bfloat16)
NAN_BITS = {torch.float32: 0x7FC00000, torch.float16: 0x7E00, torch.bfloat16: 0x7FC0}
ALL_PATTERNS = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)  # wraps: every 16-bit pattern once
_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """Views the same memory as integers."""
    return tensor.view(_INT_OF_SIZE[tensor.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Fails with the first differing indices, their values and bits. Codes and scales compare equal to their bytes."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.element_size() == expected.element_size(), f"dtype {actual.dtype}, expected {expected.dtype}"
    if actual.is_floating_point() and expected.is_floating_point():
        assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    actual_bits, expected_bits = bits(actual), bits(expected)
    if torch.equal(actual_bits, expected_bits):
        return
    where = (actual_bits != expected_bits).nonzero()
    mask = (1 << 8 * actual.element_size()) - 1
    lines = [f"{len(where)} of {actual.numel()} values differ"]
    for index in map(tuple, where[:5].tolist()):
        got, want = int(actual_bits[index]) & mask, int(expected_bits[index]) & mask
        values = ""
        if actual.dtype in NAN_BITS:
            values = f" ({actual[index].item()!r}, expected {expected[index].item()!r})"
        lines.append(f"  at {list(index)}: {got:#x}, expected {want:#x}{values}")
    raise AssertionError("\n".join(lines))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_codes(rows: int, k: int, generator: torch.Generator) -> Tensor:
    """Packed codes uint8 [rows, k/2], every code equally likely."""
    return torch.randint(0, 256, (rows, k // 2), generator=generator, dtype=torch.uint8)


def random_int8(rows: int, k: int, generator: torch.Generator) -> Tensor:
    """MXINT8 codes int8 [rows, k], -128 among them."""
    return torch.randint(-128, 128, (rows, k), generator=generator, dtype=torch.int8)


def random_scales(rows: int, k: int, generator: torch.Generator, low: int = 107, high: int = 147) -> Tensor:
    """Scale bytes uint8 [rows, k/32] in [low, high]."""
    return torch.randint(low, high + 1, (rows, k // 32), generator=generator, dtype=torch.uint8)


def from_bits(pattern: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers, of any integer dtype, as the floats with these bits."""
    return pattern.to(_INT_OF_SIZE[dtype.itemsize]).view(dtype)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 60) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed)).to(dtype)


def off_by(tensor: Tensor, entries: int = 1) -> Tensor:
    """A contiguous copy whose storage starts that many entries off an aligned address."""
    view = torch.cat([tensor.new_zeros(entries), tensor.flatten()])[entries:].view(tensor.shape)
    assert view.is_contiguous()
    assert view.data_ptr() % 16 != 0
    return view


LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "1-D": lambda dtype: normal(96, dtype=dtype),
    "3-D": lambda dtype: normal(2, 3, 64, dtype=dtype),
    "4-D": lambda dtype: normal(2, 1, 3, 32, dtype=dtype),
    "transposed": lambda dtype: normal(64, 5, dtype=dtype).t(),
    "permuted": lambda dtype: normal(3, 64, 5, dtype=dtype).permute(2, 0, 1),
    "row slice": lambda dtype: normal(9, 96, dtype=dtype)[1::2],
    "column slice": lambda dtype: normal(5, 200, dtype=dtype)[:, 3:131],
    "every other element": lambda dtype: normal(5, 128, dtype=dtype)[:, ::2],
    "expanded": lambda dtype: normal(1, 64, dtype=dtype).expand(4, 64),
    "expanded element": lambda dtype: normal(4, 1, dtype=dtype).expand(4, 64),
    "off by 1": lambda dtype: off_by(normal(7, 96, dtype=dtype)),
    "off by 3": lambda dtype: off_by(normal(7, 96, dtype=dtype), 3),
}


def spread_scales(kind: str, rows: int, blocks: int, centre: int, seed: int) -> Tensor:
    """Scale bytes whose neighbours are close together or far apart: the cases that a kernel may treat apart."""
    generator = seeded(seed)
    padded = -(-blocks // 4) * 4
    near = torch.randint(0, 4, (rows, padded), generator=generator)  # exact in int32 after a shift of up to 3
    far = torch.randint(8, 21, (rows, padded), generator=generator)  # the order of adds shows at 8 to 20 bits
    up = torch.randint(0, 2, (rows, padded), generator=generator)
    per_pair = (far * up)[:, ::2].repeat_interleave(2, 1)
    per_quad = (far * up)[:, ::4].repeat_interleave(4, 1)
    kinds = {
        "equal": torch.zeros(rows, padded, dtype=torch.int64),
        "quad-aligned": near + per_quad,
        "pair-aligned": near + per_pair,
        "unaligned": far * up,
        "just unaligned": torch.randint(0, 6, (rows, padded), generator=generator),
    }
    if kind == "mixed":
        choice = torch.randint(0, 5, (rows, padded // 4), generator=generator).repeat_interleave(4, 1)
        offset = torch.stack(list(kinds.values())).gather(0, choice[None])[0]
    else:
        offset = kinds[kind]
    return (centre + offset[:, :blocks]).clamp(0, 254).to(torch.uint8)


SPREADS = ("equal", "quad-aligned", "pair-aligned", "unaligned", "just unaligned", "mixed")

BIASES: dict[str, Callable[[int, int], Tensor]] = {
    "0-d": lambda m, n: torch.randn((), generator=seeded(40)),
    "[1]": lambda m, n: torch.randn(1, generator=seeded(40)),
    "[N]": lambda m, n: torch.randn(n, generator=seeded(40)),
    "[1, N]": lambda m, n: torch.randn(1, n, generator=seeded(40)),
    "[M, 1]": lambda m, n: torch.randn(m, 1, generator=seeded(40)),
    "[M, N]": lambda m, n: torch.randn(m, n, generator=seeded(40)),
    "[1, 1]": lambda m, n: torch.randn(1, 1, generator=seeded(40)),
    "[N, M] transposed": lambda m, n: torch.randn(n, m, generator=seeded(40)).t(),
    "[N] strided": lambda m, n: torch.randn(2 * n, generator=seeded(40))[::2],
    "[M, 1] expanded": lambda m, n: torch.randn(m, 1, generator=seeded(40)).expand(m, n),
}


def as_numpy(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    """float64 values rounded once to dtype by numpy or ml_dtypes, NaN as the ops write it."""
    target = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}[dtype]
    with np.errstate(all="ignore"):
        rounded = values.astype(target)
    integer = rounded.view(np.int32 if dtype == torch.float32 else np.int16)
    return from_bits(torch.from_numpy(np.where(np.isnan(values), NAN_BITS[dtype], integer)), dtype)


def gemm(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype | None = torch.float32,
    bias: Tensor | None = None,
) -> Tensor:
    """The op, its weight given as a checkpoint stores it: codes [N, K/2] and scales [N, K/32]."""
    y: Tensor = torch.ops.xpu_fp4.mxfp4_gemm(a, w.t(), a_scale, w_scale.t().contiguous(), dtype, bias)
    return y


def expected_gemm(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype = torch.float32,
    bias: Tensor | None = None,
) -> Tensor:
    return reference.gemm(a, a_scale, w, w_scale, dtype, bias)


def linear_w4a16(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.xpu_fp4.mxfp4_linear_w4a16(x, w, w_scale, bias)
    return y


def linear_w4a4(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None = None, scale_mode: ScaleMode = "even") -> Tensor:
    y: Tensor = torch.ops.xpu_fp4.mxfp4_linear(x, w, w_scale, bias, scale_mode)
    return y


def linear_w4a8(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None = None, group: Group = 128) -> Tensor:
    y: Tensor = torch.ops.xpu_fp4.mxfp4_linear_w4a8(x, w, w_scale, bias, group)
    return y


def assert_quantizes(x: Tensor, mode: ScaleMode, expected: tuple[Tensor, Tensor] | None = None) -> None:
    """The op gives the expected codes and scales, those of the reference unless given."""
    want_q, want_scale = expected if expected is not None else reference.quantize(x, mode)
    q, scale = xpu_fp4.quantize(x, mode)
    assert q.dtype == torch.float4_e2m1fn_x2
    assert scale.dtype == torch.float8_e8m0fnu
    assert_same_bits(scale, want_scale)
    assert_same_bits(q, want_q)


def at_once(*works: Callable[[], object], calls: int = 4) -> None:
    """Runs each in a thread, all from one barrier, calls times; raises what the first to fail raised."""
    start = threading.Barrier(len(works))
    failed: list[Exception] = []

    def run(work: Callable[[], object]) -> None:
        start.wait()
        try:
            for _ in range(calls):
                work()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


Environment = Literal["flush", "upward", "toward_zero"]
ENVIRONMENTS: tuple[Environment, ...] = get_args(Environment)
_LIBM = CDLL("libm.so.6")
_ROUNDING = {"upward": 0x800, "toward_zero": 0xC00}  # x86's FE_UPWARD and FE_TOWARDZERO


def environment_is(name: Environment | None) -> bool:
    """Whether this thread's float arithmetic is now of that kind (None: the default), told by what it does."""
    # torch computes single elements in this thread.
    flushed = (torch.tensor([2.0**-100]) * 2.0**-40).item() == 0
    up = (torch.tensor([1.0]) + 2.0**-30).item() > 1
    down = (torch.tensor([1.0]) + (2.0**-23 - 2.0**-30)).item() == 1
    return (flushed, up, down) == (name == "flush", name == "upward", name == "toward_zero")


@contextmanager
def float_environment(name: Environment) -> Iterator[None]:
    """The float environment that another library may have left in this thread."""
    assert environment_is(None)
    try:
        if name == "flush":
            assert torch.set_flush_denormal(True)
        else:
            assert _LIBM.fesetround(_ROUNDING[name]) == 0
        assert environment_is(name), "the environment does not change plain arithmetic, so the test would prove nothing"
        yield
    finally:
        torch.set_flush_denormal(False)
        _LIBM.fesetround(0)
    assert environment_is(None)
