# SPDX-License-Identifier: Apache-2.0
"""Quantizes a Transformers model directory to MXFP4 and lets the result answer.

make models && .venv/bin/python examples/quantize_and_run.py build/models/smollm2 build/smollm2-w4a8
"""

from pathlib import Path

import click
import torch
import transformers
import xpu_fp4
from xpu_fp4.checkpoints import plan_quantization, quantize_checkpoint


@click.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--prompt", default="The capital of France is", show_default=True)
@click.option("--tokens", default=16, show_default=True)
@torch.inference_mode()
def main(source: Path, out: Path, prompt: str, tokens: int) -> None:
    """Write the model in SOURCE as MXFP4 into the new directory OUT, and continue a prompt with it in W4A8."""
    plan = plan_quantization(source)
    quantize_checkpoint(plan, out, mode="w4a8")
    print(f"{len(plan.quantized)} linear layers are MXFP4; kept: {', '.join(plan.kept) or 'none'}")

    model = xpu_fp4.load_model(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    print(tokenizer.decode(answer[0]))


if __name__ == "__main__":
    main()
