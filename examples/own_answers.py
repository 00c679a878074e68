# SPDX-License-Identifier: Apache-2.0
"""Has a chat model answer prompts, for `xpu-fp4 quantize --chat`: its own answers are what it is to stay true to.

PROMPTS has one in each line. OUT gets a conversation for each as a JSON object in a line.
"""

import json
import re
from pathlib import Path

import click
import torch
from xpu_fp4.checkpoints.models import load_original, load_tokenizer
from xpu_fp4.checkpoints.questions import answer_all

FILE = click.Path(dir_okay=False, path_type=Path)


def whole_sentences(answer: str) -> str:
    """Cuts an answer after its last whole sentence; one that has none is left as it is."""
    return re.sub(r"(.*[.!?])(?=\s|$).*", r"\1", answer.strip(), flags=re.DOTALL)


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("prompts", type=FILE)
@click.argument("out", type=FILE)
@click.option("--tokens", default=64, show_default=True, help="At most, of an answer.")
@torch.inference_mode()
def main(model: Path, prompts: Path, out: Path, tokens: int) -> None:
    """Write the answers of the model directory MODEL to PROMPTS, greedy, into OUT."""
    asked = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    answers = answer_all(load_original(model).eval().float(), load_tokenizer(model), asked, tokens)
    with out.open("w", encoding="utf-8") as file:
        for prompt, answer in zip(asked, answers, strict=True):
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": whole_sentences(answer)}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
