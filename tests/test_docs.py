# SPDX-License-Identifier: Apache-2.0
"""What the pages show is true: snippets run, commands exist, figures are those of the data. `make docs` checks the links."""

import json
import re
import shlex
from html import unescape
from pathlib import Path

import click
import demo_page
import pytest
from xpu_fp4 import backends
from xpu_fp4.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
README = ROOT / "README.md"
RUNNABLE = (README, *(ROOT / "docs" / name for name in ("GETTING_STARTED.md", "MODES.md", "OPS.md")))
"""The pages whose Python needs no files."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the page's shell blocks, without variables that are set for it."""
    found: list[list[str]] = []
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        words.whitespace_split = True
        found.append([])
        for word in words:
            if set(word) <= set("|&;"):
                found.append([])
            elif not re.match(r"[A-Z0-9_]+=", word):
                found[-1].append(word)
    return [command for command in found if command]


@pytest.mark.parametrize(
    "code", [code for page in RUNNABLE for code in blocks(page, "python")], ids=lambda code: code.splitlines()[-1]
)
def test_snippet_runs(code: str) -> None:
    if '"sycl"' in code and not backends()["sycl"].available:
        pytest.skip(backends()["sycl"].detail)
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


def test_snippets_on_a_model_directory_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from checkpoint_files import save_llama  # it takes Transformers, and so seconds
    from xpu_fp4.checkpoints import plan_quantization, quantize_checkpoint

    folder = "build/models/nearest"
    (tmp_path / folder).parent.mkdir(parents=True)
    quantize_checkpoint(plan_quantization(save_llama(tmp_path / "llama")), tmp_path / folder, mode="w4a8")
    monkeypatch.chdir(tmp_path)
    found = [code for code in blocks(ROOT / "docs/CHECKPOINTS.md", "python") if f'"{folder}"' in code]
    assert len(found) == 2
    for code in found:
        exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


def test_every_runnable_page_has_a_snippet() -> None:
    assert [len(blocks(page, "python")) for page in RUNNABLE] == [2, 1, 1, 1]


def test_readme_shows_cpp_that_ctest_runs() -> None:
    (code,) = blocks(README, "cpp")
    assert code in (ROOT / "examples/own_kernel.cpp").read_text(encoding="utf-8")


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = {word for page in PAGES for words in commands(page) if words[0] == "make" for word in words[1:] if word[0] != "-"}
    assert used
    assert used <= targets


def test_commands_and_options_of_ours_exist() -> None:
    seen = 0
    for page in PAGES:
        for words in commands(page):
            if "xpu-fp4" not in words[:1]:
                continue
            command: click.Command = main
            for word in words[1:]:
                if isinstance(command, click.Group) and word in command.commands:
                    command = command.commands[word]
            assert command is not main, words
            options = {opt for parameter in command.params for opt in (*parameter.opts, *parameter.secondary_opts)}
            wrong = [word for word in words if word.startswith("--") and word.partition("=")[0] not in options]
            assert not wrong, f"{page.name}: {' '.join(words)}"
            seen += 1
    assert seen > 30


def test_scripts_in_commands_exist() -> None:
    names = {
        word
        for page in PAGES
        for words in commands(page)
        for word in words
        if re.fullmatch(r"(examples|tests|tools)/\S+", word)
    }
    assert names
    assert [name for name in names if not any(ROOT.glob(name))] == []


def test_files_that_contributing_lists_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`([\w./*-]+\.(?:cpp|hpp|h|py|toml|md|rst|txt|json))`", page))
    names = {name for name in names if "NAME" not in name}
    assert len(names) > 50
    folders = ("", *(f"{top}/**/" for top in ("csrc", "python", "tests", "tools", "docs")))
    assert [name for name in sorted(names) if not any(next(ROOT.glob(folder + name), None) for folder in folders)] == []


def test_readme_shows_the_figures_of_the_demo() -> None:
    record = json.loads(demo_page.DATA.read_text(encoding="utf-8"))
    page = README.read_text(encoding="utf-8")
    assert page == demo_page.page_with(page, record), "run `make demo-page`"
    assert demo_page.fingerprint(record) in unescape(demo_page.PICTURE.read_text(encoding="utf-8")), "run `make demo-page`"


def test_picture_holds_its_figures(tmp_path: Path) -> None:
    record = json.loads(demo_page.DATA.read_text(encoding="utf-8"))
    record["recipes"][0]["decode"] = 12.5
    demo_page.draw(record, tmp_path / "demo.svg")
    assert demo_page.fingerprint(record) in unescape((tmp_path / "demo.svg").read_text(encoding="utf-8"))
