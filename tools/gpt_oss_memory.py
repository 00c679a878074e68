# SPDX-License-Identifier: Apache-2.0
"""Makes a random gpt-oss of a size, quantizes it, loads it and generates, and measures the memory that each step takes.

    python tools/gpt_oss_memory.py FOLDER --layers 5 --hidden 1440     # 2 GB of bfloat16, the default

Each step runs in a process of its own; its memory is the peak of its resident memory over that after its imports, mapped files
included. What it may take is stated in `bounds`; the command ends with 1 if a step takes more.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MB = 1 << 20
SLACK = 48 * MB
"""What allocators, the tokens' activations and modules that are imported late take, whatever the size."""


@dataclass(frozen=True)
class Size:
    """Gives the model's sizes; H = I, and attention is as wide as H."""

    layers: int
    hidden: int
    experts: int

    @property
    def experts_bytes(self) -> int:
        """Returns what a layer's experts take in bfloat16, nearly all of a shard."""
        return 2 * self.experts * 3 * self.hidden**2

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "dtype": "bfloat16",
            "vocab_size": 1024,
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 32,
            "num_key_value_heads": self.hidden // 32,
            "head_dim": 32,
            "num_local_experts": self.experts,
            "num_experts_per_tok": 4,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "eos_token_id": 1,
        }


def bounds(size: Size) -> dict[str, int]:
    """Bytes that each step may take.

    quantize: one shard of the source, mapped, and what it becomes, 17/64 of it, once more while it is written.
    generate: twice all that is loaded, 17/64 of the experts and the rest as it is, since Transformers maps every file until
    it has read the last; and twice a layer's experts, which the first forward moves into another layout, with N rounded up to
    16 and K to 128.
    """
    packed = size.experts_bytes * 17 // 64
    others = size.layers * 8 * size.hidden**2 + 4 * 1024 * size.hidden
    rounded_up = -(-size.hidden // 128) * 128 / size.hidden
    return {
        "quantize": size.experts_bytes + 8 * size.hidden**2 + 2 * packed + SLACK,
        "generate": int((2 * size.layers + 2) * packed * rounded_up) + 2 * others + SLACK,
    }


def write_random(folder: Path, size: Size) -> None:
    """An unquantized model directory with a shard for each layer, one layer in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, GptOssForCausalLM

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(size.config()))
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in GptOssForCausalLM(AutoConfig.from_pretrained(folder)).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    shards = {name: name.split(".")[2] if ".layers." in name else "rest" for name in shapes}
    weight_map = {name: f"model-{shard}.safetensors" for name, shard in shards.items()}
    for file in sorted(set(weight_map.values())):
        mine = [name for name in shapes if weight_map[name] == file]
        tensors = {name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.05, generator=generator) for name in mine}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def quantize(source: Path, out: Path) -> None:
    from xpu_fp4.checkpoints import plan_quantization, quantize_checkpoint

    quantize_checkpoint(plan_quantization(source), out, mode="w4a8")


def generate(source: Path, out: Path) -> None:
    """16 tokens after 32."""
    import torch
    import xpu_fp4

    model = xpu_fp4.load_model(out)
    tokens = model.generate(torch.arange(2, 34)[None], max_new_tokens=16, min_new_tokens=16, do_sample=False)
    assert tokens.shape == (1, 48)


STEPS = {"quantize": quantize, "generate": generate}


def measure(step: str, source: Path, out: Path) -> int:
    """Bytes that a step takes, in a process of its own."""
    command = [sys.executable, __file__, str(source), "--step", step, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{step} fails: {done.stderr}")
    return int(done.stdout.splitlines()[-1])


def _memory(kind: str) -> int:
    """Asks the kernel about this process: VmRSS, resident now, or VmHWM, the most that was. getrusage has the parent's, too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def _run_step(step: str, source: Path, out: Path) -> None:
    import torch
    import xpu_fp4
    from transformers import GptOssForCausalLM  # noqa: F401, so that its import counts for nothing

    xpu_fp4.quantize(torch.zeros(1, 32))
    xpu_fp4.checkpoints.open_checkpoint  # noqa: B018, imports it
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    STEPS[step](source, out)
    print(_memory("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model and its quantized form are written")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=1440)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        _run_step(arguments.step, arguments.folder, arguments.out)
        return
    size = Size(arguments.layers, arguments.hidden, arguments.experts)
    source, out = arguments.folder / "source", arguments.folder / "mxfp4"
    write_random(source, size)
    print(f"source: {sum(file.stat().st_size for file in source.iterdir()) / MB:,.0f} MiB, experts of a layer "
          f"{size.experts_bytes / MB:,.0f} MiB")  # fmt: skip
    is_within = True
    for step, bound in bounds(size).items():
        taken = measure(step, source, out)
        print(f"{step}: {taken / MB:,.0f} MiB, at most {bound / MB:,.0f}")
        is_within &= taken <= bound
    print(f"mxfp4: {sum(file.stat().st_size for file in out.iterdir()) / MB:,.0f} MiB")
    sys.exit(0 if is_within else 1)


if __name__ == "__main__":
    main()
