# SPDX-License-Identifier: Apache-2.0
"""`xpu-fp4 convert`: a GGUF file into an MXFP4 model directory."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal

from ..checkpoints.models import load_tokenizer, require_transformers
from ..checkpoints.untrusted import check_files
from ..gguf import convert_gguf
from ..gguf.file import GgufFile
from .common import DIRECTORY, FILE, errors_as_messages, plain, progress_bars, progress_task


@click.command("convert")
@click.argument("source", metavar="FILE.gguf", type=FILE)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tokenizer", type=DIRECTORY, help="A model directory whose tokenizer to take, instead of the one in FILE.gguf.")
@errors_as_messages
def command(source: Path, out: Path, tokenizer: Path | None) -> None:
    """Convert a GGUF file of llama.cpp, whose matrices are MXFP4, into the new model directory OUT.

    gpt-oss, llama and qwen3. Codes and scales are kept as they are, all else becomes bfloat16, one piece of a tensor at a
    time. Interrupted, run the same command again: finished files in OUT.partial are kept.
    """
    console = Console()
    found = _tokenizer(source) if tokenizer is None else _tokenizer_of(tokenizer)
    with progress_bars(console) as progress:
        convert_gguf(source, out, tokenizer=found, progress=progress_task(progress, "Writing MXFP4, bytes"))
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    console.print(plain(f"{out}: {decimal(size)}, from {decimal(source.stat().st_size)}"), soft_wrap=True)


def _tokenizer_of(folder: Path) -> Any:
    check_files(folder)
    return load_tokenizer(folder)


def _tokenizer(source: Path) -> Any:
    """The one in the file, as far as Transformers can read it."""
    with GgufFile(source) as file:  # its errors, and limits: Transformers reads the file without any
        metadata = file.metadata
    transformers = require_transformers()
    try:
        # AutoTokenizer would go by the model's configuration, which Transformers does not read of every file.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(source.parent, gguf_file=source.name)
        for kind in ("bos", "eos"):  # Transformers 5.8 mixes them up
            if (token := metadata.get(f"tokenizer.ggml.{kind}_token_id")) is not None:
                setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(token))
    except Exception as error:
        raise ValueError(
            f"{source}: transformers cannot read its tokenizer ({type(error).__name__}: {error}): give --tokenizer DIR, the "
            "model's directory with tokenizer.json"
        ) from error
    return tokenizer
