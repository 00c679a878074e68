# SPDX-License-Identifier: Apache-2.0
"""Random calls of the ops, valid and malformed, and random damage to checkpoints: `python tests/fuzz.py --help`.

A case is drawn from a number, so that it can be had again. A valid call must give the reference's bits (W4A16: an error within
its bound), a malformed one an error that names the op; a damaged checkpoint must load or end in an error for users. Cases run
in a process of their own, since they may crash or hang it; one that fails is made smaller, field by field, and reported.
"""

import atexit
import dataclasses
import json
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import torch
import xpu_fp4
from helpers import from_bits, normal, random_codes, random_int8, random_scales, seeded
from torch import Tensor
from xpu_fp4 import ScaleMode, reference

SECONDS = 60
"""What a case may take before it counts as hanging."""
ops = torch.ops.xpu_fp4

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
VALUES = ("normal", "zero", "wide", "bits", "tiny")
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")
OPS = (
    *("mxfp4_quantize", "mxint8_quantize", "mxfp4_dequantize", "mxint8_dequantize", "mxfp4_gemm", "mxint8_gemm"),
    *(f"mxfp4_linear{mode}{form}" for mode in ("", "_w4a8", "_w4a16") for form in ("", "_prepacked")),
)
WRONG = {"scale_mode": "up", "group": 64, "hadamard": 48, "out_features": -1, "weight_global_scale": -1.0}
WRONG |= {"out_dtype": torch.int32, "dtype": torch.int32}
"""An option's value that is not allowed."""
FAULTS = ("dtype", "shape", "odd k", "scalar", "none", "sparse", "freed", "meta", "option", "number")


@dataclass(frozen=True)
class Call:
    """A call of an op. The first value of each field is its simplest, which a failing call is reduced to."""

    seed: int
    op: str
    rows: int = 1
    columns: int = 1
    blocks: int = 1
    dtype: str = "f32"
    values: str = "normal"
    layout: str = "contiguous"
    bias: bool = False
    hadamard: int = 0
    offset: bool = False
    group: int = 128
    scale_mode: str = "even"
    fault: str | None = None
    global_scale: float = 1.0

    @classmethod
    def draw(cls, seed: int) -> "Call":
        pick = random.Random(seed)
        blocks = pick.choice([1, 2, 3, 4, 5, 7, 8, 12, 33])
        return cls(
            seed,
            pick.choice(OPS),
            pick.choice([0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 70]),
            pick.choice([0, 1, 2, 15, 16, 17, 31, 33, 48, 100]),
            blocks,
            pick.choice(list(DTYPES)),
            pick.choice(VALUES),
            pick.choice(LAYOUTS),
            pick.random() < 0.5,
            pick.choice([0, 0, *(size for size in (32, 64, 128) if blocks * 32 % size == 0)]),
            pick.random() < 0.3,
            pick.choice([32, 128]),
            pick.choice(get_args(ScaleMode)),
            pick.choice(FAULTS) if pick.random() < 0.4 else None,
            pick.choice([1.0, 1.0, 3.0, 0.7]),
        )

    def simpler(self) -> Iterator["Call"]:
        """Gives the same call with one field at its simplest, for each field."""
        for field in dataclasses.fields(self)[2:]:
            if getattr(self, field.name) == field.default:
                continue
            simpler = dataclasses.replace(self, **{field.name: field.default})  # type: ignore[arg-type]  # its own default
            if simpler.k % (simpler.hadamard or 32) == 0:
                yield simpler

    @property
    def k(self) -> int:
        return 32 * self.blocks


# ---- operands ----


def elements(call: Call) -> Tensor:
    dtype, shape, generator = DTYPES[call.dtype], (call.rows, call.k), seeded(call.seed)
    if call.values == "bits":
        size = 32 if dtype == torch.float32 else 16
        pattern = torch.randint(-(1 << (size - 1)), 1 << (size - 1), shape, generator=generator)
        if size == 16:
            return from_bits(pattern.to(torch.int16), dtype)
        return pattern.to(torch.int32).view(torch.float32)
    x = normal(*shape, seed=call.seed)
    if call.values == "wide":
        exponents = torch.randint(-40, 40, (call.rows, call.blocks), generator=generator)
        x = x * torch.exp2(exponents.repeat_interleave(32, 1).float())
    factor = {"zero": 0.0, "tiny": 1e-39}.get(call.values, 1.0)
    return (x * factor).to(dtype)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Puts the same elements into memory of another shape."""
    if tensor.dim() != 2:
        return tensor
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "strided":
        wide = tensor.new_zeros(2 * tensor.shape[0], tensor.shape[1] + 3)
        wide[::2, : tensor.shape[1]] = tensor
        return wide[::2, : tensor.shape[1]]
    if layout == "offset":
        flat = tensor.new_zeros(tensor.numel() + 7)
        flat[7:] = tensor.flatten()
        return flat[7:].view(tensor.shape)
    if layout == "expanded":
        return tensor[:1].expand_as(tensor) if len(tensor) else tensor
    return tensor


def arguments_of(call: Call) -> dict[str, Any]:
    generator = seeded(call.seed + 1)
    n, k = call.columns, call.k
    x = laid_out(elements(call), call.layout)
    transform: dict[str, Any] = {
        "hadamard": call.hadamard,
        "input_offset": normal(k, seed=call.seed + 2) if call.offset else None,
    }
    low, high = (0, 255) if call.values == "bits" else (117, 137)
    scales = random_scales(call.rows, k, generator, low, high)
    if call.op.endswith("_quantize"):
        option = {"scale_mode": call.scale_mode} if call.op.startswith("mxfp4") else {"group": call.group}
        return {"x": x, **option, **transform}
    codes = random_codes(call.rows, k, generator) if call.op.startswith("mxfp4") else random_int8(call.rows, k, generator)
    if call.op.endswith("_dequantize"):
        return {"q": laid_out(codes, call.layout), "scale": laid_out(scales, call.layout), "dtype": DTYPES[call.dtype]}
    w, w_scale = random_codes(n, k, generator), random_scales(n, k, generator, low, high)
    bias = normal(n, seed=call.seed + 3) if call.bias else None
    if call.op.endswith("_gemm"):
        a, a_scale = laid_out(codes, call.layout), laid_out(scales, call.layout)
        scale_of_b = w_scale.t().contiguous()
        return {"a": a, "b": w.t(), "a_scale": a_scale, "b_scale": scale_of_b, "out_dtype": DTYPES[call.dtype], "bias": bias}
    option = {} if "w4a16" in call.op else {"group": call.group} if "w4a8" in call.op else {"scale_mode": call.scale_mode}
    transform["weight_global_scale"] = call.global_scale
    if call.op.endswith("_prepacked"):
        return {"x": x, "weight": xpu_fp4.prepack(w, w_scale), "out_features": n, "bias": bias, **option, **transform}
    return {"x": x, "weight": w, "weight_scale": w_scale, "bias": bias, **option, **transform}


def spoil(call: Call, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments with one fault, or None where the call has no such argument."""
    pick = random.Random(call.seed)
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    name = pick.choice(tensors)
    tensor = arguments[name]
    if call.fault in ("option", "number"):
        options = [option for option in WRONG if option in arguments]
        if not options:
            return None
        option = pick.choice(options)
        return {**arguments, option: WRONG[option] if call.fault == "option" else object()}
    if tensor.numel() == 0 and call.fault in ("freed", "sparse"):
        return None
    faults: dict[str, Callable[[], object]] = {
        "dtype": lambda: tensor.to(torch.float64 if tensor.is_floating_point() else torch.int32),
        "shape": lambda: tensor.new_zeros([*tensor.shape[:-1], tensor.shape[-1] + 32 * 4]),
        "odd k": lambda: tensor.new_zeros([*tensor.shape[:-1], tensor.shape[-1] + 1]),
        "scalar": lambda: tensor.new_zeros([]),
        "none": lambda: None,
        "sparse": lambda: tensor.to(torch.float32).to_sparse(),
        "freed": lambda: freed(tensor),
        "meta": lambda: tensor.to("meta"),
    }
    if call.fault == "none" and name in ("bias", "input_offset"):
        return None
    if call.fault in ("dtype", "sparse") and tensor.dtype in (torch.float4_e2m1fn_x2, torch.float8_e8m0fnu):
        return None
    if call.fault == "shape" and name in ("x", "a", "q"):
        return None  # a longer row may be right by itself
    if call.fault == "meta" and len(tensors) == 1:
        return None
    if call.op.endswith("_gemm") and name == "bias" and call.fault in ("scalar", "shape", "odd k"):
        return None  # it may have any shape that broadcasts
    assert call.fault is not None
    return {**arguments, name: faults[call.fault]()}


def freed(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


# ---- the oracle ----


def check_call(call: Call) -> None:
    """Raises AssertionError where a call does something else than it should."""
    name = call.op.replace("mxint8_gemm", "mxfp4_gemm")
    arguments = arguments_of(call)
    if call.fault is not None:
        spoiled = spoil(call, arguments)
        if spoiled is not None:
            check_refusal(name, spoiled)
        return
    got = getattr(ops, name)(**arguments)
    got = got if isinstance(got, tuple) else (got,)
    if "w4a16" in name:
        check_w4a16(call, arguments, got[0])
        return
    for actual, expected in zip(got, expected_of(call, arguments), strict=True):
        size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
        assert actual.shape == expected.shape, f"{actual.shape}, expected {expected.shape}"
        different = int((actual.contiguous().view(size) != expected.contiguous().view(size)).sum())
        assert different == 0, f"{different} of {actual.numel()} entries are other bits"


def check_refusal(name: str, arguments: dict[str, Any]) -> None:
    try:
        getattr(ops, name)(**arguments)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        message = str(error)
        assert name in message or any(argument in message for argument in arguments), f"the error names nothing: {message}"
        return
    raise AssertionError("malformed arguments were taken")


def transformed(call: Call, arguments: dict[str, Any]) -> Tensor:
    return reference.transform(arguments["x"], call.hadamard, arguments["input_offset"])  # type: ignore[arg-type]


def expected_of(call: Call, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    dtype = DTYPES[call.dtype]
    if call.op == "mxfp4_quantize":
        return reference.quantize(transformed(call, arguments), call.scale_mode)  # type: ignore[arg-type]
    if call.op == "mxint8_quantize":
        return reference.mxint8_quantize(transformed(call, arguments), call.group)  # type: ignore[arg-type]
    if call.op.endswith("_dequantize"):
        values = reference.values(arguments["q"].contiguous(), arguments["scale"].contiguous())
        return (reference.canonical_nan(values.float().to(dtype)),)
    w, w_scale = weight_of(call, arguments)
    global_scale = np.float32(arguments.get("weight_global_scale", 1.0))
    if call.op.endswith("_gemm"):
        a, a_scale = arguments["a"].contiguous(), arguments["a_scale"].contiguous()
    elif "w4a8" in call.op:
        a, a_scale = reference.mxint8_quantize(transformed(call, arguments), call.group)  # type: ignore[arg-type]
    else:
        a, a_scale = reference.quantize(transformed(call, arguments), call.scale_mode)  # type: ignore[arg-type]
        global_scale *= np.float32(3 if call.scale_mode == "abs_max" else 1)
    return (reference.gemm(a, a_scale, w, w_scale, dtype, arguments["bias"], float(global_scale)),)


def weight_of(call: Call, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if call.op.endswith("_gemm"):
        return arguments["b"].t().contiguous(), arguments["b_scale"].t().contiguous()
    if call.op.endswith("_prepacked"):
        return xpu_fp4.unprepack(arguments["weight"], call.columns, call.k)
    return arguments["weight"], arguments["weight_scale"]


def check_w4a16(call: Call, arguments: dict[str, Any], y: Tensor) -> None:
    """Within the bound of NUMERICS 4, where float64 stays finite and so far from float32's ends that nothing overflows."""
    x = transformed(call, arguments).to(DTYPES[call.dtype]).double()
    w = reference.values(*weight_of(call, arguments)) / call.global_scale
    exact, size = x @ w.t(), x.abs() @ w.abs().t()
    if arguments["bias"] is not None:
        exact = exact + arguments["bias"].double()
    assert y.shape == exact.shape
    info = torch.finfo(y.dtype)
    sane = exact.isfinite() & (size < min(1e37, info.max / 2)) & (exact.abs() < info.max / 2)
    sane &= ((12 * call.k * x.abs()).amax(-1, keepdim=True) < 3e38) if call.k else True
    bound = 2.0**-22 * call.k**0.5 * size + call.k * 2.0**-126 * 2.0**20 + info.eps * exact.abs() + info.tiny
    wrong = sane & ~((y.double() - exact).abs() <= bound)
    assert not wrong.any(), f"{int(wrong.sum())} of {y.numel()} outputs are beyond the bound"


# ---- damaged checkpoints ----


@dataclass(frozen=True)
class Damage:
    """What is done to a copy of a checkpoint: so many changes."""

    seed: int
    changes: int = 1

    @classmethod
    def draw(cls, seed: int) -> "Damage":
        return cls(seed, random.Random(seed).choice([1, 1, 2, 5]))

    def simpler(self) -> Iterator["Damage"]:
        if self.changes > 1:
            yield Damage(self.seed, self.changes - 1)


JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 1e308, 2**70),
    *("", "mxfp4-pack-quantized", "re:(", "re:.*", "\x1b[31m", "../x"),
    *([], {}, [None]),
)


def damaged(folder: Path, damage: Damage) -> None:
    pick = random.Random(damage.seed)
    for _ in range(damage.changes):
        file = pick.choice(sorted(folder.iterdir()))
        content = bytearray(file.read_bytes())
        if file.suffix == ".json" and pick.random() < 0.8 and (document := as_json(content)) is not None:
            change(document, pick)
            content = bytearray(json.dumps(document).encode())
        else:
            spoil_bytes(content, pick)
        file.write_bytes(content)


def as_json(content: bytearray) -> Any:  # noqa: ANN401
    """The document, or None where an earlier change has left none."""
    try:
        return json.loads(content)
    except ValueError:
        return None


def change(content: Any, pick: random.Random) -> None:  # noqa: ANN401
    """Replaces, removes or doubles one entry somewhere in the document."""
    while isinstance(content, (dict, list)) and content:
        key: Any = pick.choice(list(content)) if isinstance(content, dict) else pick.randrange(len(content))
        if not isinstance(content[key], (dict, list)) or not content[key] or pick.random() < 0.3:
            if pick.random() < 0.3:
                del content[key]
            else:
                content[key] = pick.choice(JUNK)
            return
        content = content[key]


def spoil_bytes(content: bytearray, pick: random.Random) -> None:
    if not content or pick.random() < 0.2:
        content.extend(pick.randbytes(pick.choice([1, 7, 4096])))
    elif pick.random() < 0.4:
        del content[pick.randrange(len(content)) :]
    else:
        limit = min(len(content), 2000) if pick.random() < 0.7 else len(content)  # the header, mostly
        for _ in range(pick.choice([1, 3, 20])):
            content[pick.randrange(limit)] = pick.randrange(256)


@cache
def intact_checkpoint() -> Path:
    """A small model directory that is quantized, in two shards; it goes with the process."""
    from checkpoint_files import save_llama
    from xpu_fp4.checkpoints import plan_quantization, quantize_checkpoint

    folder = Path(tempfile.mkdtemp(prefix="xpu_fp4_fuzz"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return quantize_checkpoint(plan_quantization(save_llama(folder / "llama")), folder / "quantized", mode="w4a8")


def check_damage(damage: Damage) -> None:
    from xpu_fp4.checkpoints.reader import read_checkpoint

    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(temporary) / "model"
        shutil.copytree(intact_checkpoint(), folder)
        damaged(folder, damage)
        for load in (read_checkpoint, xpu_fp4.load_model):
            try:
                load(folder)
            except (ValueError, OSError, NotImplementedError) as error:
                text = str(error)
                assert text, "an error without words"
                assert all(c.isprintable() or c == "\n" for c in text), f"a message with control characters: {text!r}"
            except Exception as error:
                raise AssertionError(f"{load.__name__} raised {type(error).__name__}: {error}") from error


# ---- processes ----

KINDS: dict[str, tuple[Any, Callable[[Any], None]]] = {"ops": (Call, check_call), "checkpoints": (Damage, check_damage)}


def serve(kind: str) -> None:
    """Reads a case a line, and answers each with a line: empty where it is right."""
    cls, check = KINDS[kind]
    torch.set_num_threads(2)
    for line in sys.stdin:
        try:
            check(cls(**json.loads(line)))
            answer = ""
        except AssertionError as error:
            answer = str(error).splitlines()[0] if str(error) else "AssertionError"
        except Exception as error:  # every other one is a failure too
            answer = f"{type(error).__name__}: {error}".splitlines()[0]
        print(json.dumps(answer), flush=True)


def start(*command: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


class Worker:
    """A process that runs cases; it is started anew after one that killed it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.process: subprocess.Popen[str] | None = None

    def run(self, case: Any) -> str:  # noqa: ANN401
        """Returns what is wrong with a case, empty where nothing is."""
        if self.process is None:
            self.process = start(sys.executable, __file__, "--serve", self.kind)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(dataclasses.asdict(case)) + "\n")
        self.process.stdin.flush()
        line = read_line(self.process)
        if line:
            answer: str = json.loads(line)
            return answer
        self.process.kill()
        code = self.process.wait()
        self.process = None
        return f"hung for {SECONDS} s" if line is None else f"the process ended with {code}"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def read_line(process: "subprocess.Popen[str]") -> str | None:
    """The next line, empty at the end, None where none comes in time."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], SECONDS)
    return process.stdout.readline() if ready else None


def smallest(worker: Worker, case: Any, wrong: str) -> tuple[Any, str]:  # noqa: ANN401
    """A case that fails and has no simpler one that does."""
    for simpler in case.simpler():
        if still := worker.run(simpler):
            return smallest(worker, simpler, still)
    return case, wrong


def fuzz(kind: str, seeds: Iterator[int]) -> tuple[int, list[str]]:
    """The number of cases that ran, and of each that failed its smallest form and what is wrong with it."""
    worker, failures, count = Worker(kind), [], 0
    try:
        for seed in seeds:
            count += 1
            case = KINDS[kind][0].draw(seed)
            if wrong := worker.run(case):
                case, wrong = smallest(worker, case, wrong)
                failures.append(f"{case}: {wrong}")
    finally:
        worker.close()
    return count, failures


def until(minutes: float, first: int) -> Iterator[int]:
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        yield first
        first += 1


@click.command()
@click.option("--kind", type=click.Choice(list(KINDS)), default="ops", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the first case.")
@click.option("--cases", default=2000, show_default=True)
@click.option("--minutes", type=float, help="How long, instead of how many cases.")
@click.option("--serve", "served", type=click.Choice(list(KINDS)), hidden=True)
def main(kind: str, seed: int, cases: int, minutes: float | None, served: str | None) -> None:
    """Run random cases, and print those that fail in their smallest form."""
    if served is not None:
        serve(served)
        return
    seeds = iter(range(seed, seed + cases)) if minutes is None else until(minutes, seed)
    count, failures = fuzz(kind, seeds)
    print(f"{kind}: {count} cases from {seed} on, {len(failures)} failed", *failures, sep="\n")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
