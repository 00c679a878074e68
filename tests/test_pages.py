# SPDX-License-Identifier: Apache-2.0
"""The HTML pages of `xpu-fp4 eval --report` and `xpu-fp4 bench --report`, and what they do in a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.table import Table
from xpu_fp4.bench import cases, machine, runner
from xpu_fp4.bench.measure import Timing
from xpu_fp4.checkpoints.evaluation import LayerNoise
from xpu_fp4.checkpoints.questions import Question
from xpu_fp4.cli import main, page
from xpu_fp4.cli.evaluate import Evaluation, Report
from xpu_fp4.cli.report import write_report

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
HOSTILE = "<script>document.title = 'hostile'</script>"

# Opens each page in a frame, clicks on headings, and writes what is to be seen then.
HARNESS = """<!doctype html><meta charset="utf-8"><pre id="found"></pre>
%s
<script>
const frame = name => document.getElementById(name).contentDocument;
const column = (table, index) => [...table.tBodies[0].rows].map(row => row.cells[index].textContent);
const sorted = (table, index) => {
  const heading = table.tHead.rows[0].cells[index];
  heading.click();
  const up = column(table, index), state = heading.ariaSort;
  heading.click();
  return {up, down: column(table, index), states: [state, heading.ariaSort]};
};
addEventListener("load", () => {
  const found = {};
  for (const {id} of document.querySelectorAll("iframe")) {
    const tables = [...frame(id).querySelectorAll("table")];
    found[id] = {
      title: frame(id).title,
      before: tables.map(table => column(table, 0)),
      sorted: tables.map(table => [...table.tHead.rows[0].cells].map((_, index) => sorted(table, index))),
      pictures: [...frame(id).images].map(image => [image.alt, image.naturalWidth]),
    };
  }
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


def make_table() -> Table:
    table = Table("name", "number", title="Numbers")
    for name, number in (("a", "-"), ("w16", "10"), ("b", "no such thing"), ("w4", "≥ 9.5"), ("w8", "-1")):
        table.add_row(name, number)
    return table


def make_eval(path: Path) -> None:
    noise = [LayerNoise(f"layers.{i}", 20.0 + i, 30.0 - i) for i in range(12)]
    question = Question("What is <b>2</b>?", ["4"])
    evaluation = Evaluation("w4a8", {"perplexity": "12.5", HOSTILE: "1"}, noise, ["It is 4."])
    write_report(Report([evaluation, Evaluation("original", {"perplexity": "11"}, [], ["5"])], [question]), path)


def make_bench(path: Path) -> None:
    record = runner.Record(machine.describe(), {"command": "xpu-fp4 bench --seconds 1"}, {"w4a8-linear": "", "torch-bf16": ""})
    for m in (1, 16, 512):
        case = cases.Case("square", 4096, 4096, "gaussian", 1, m)
        for name, kind, time in (("w4a8-linear", "ours", 1e-3), ("torch-bf16", "peer", 3e-3), ("limit-read", "limit", 1e-3)):
            timing = Timing((m * time,) * 3, 1)
            ops = 0 if kind == "limit" else case.ops
            record.results.append(runner.Result(case, name, kind, timing, ops, 17 << 20))  # type: ignore[arg-type]
    path.with_suffix(".json").write_text(json.dumps(record.to_json()))
    result = CliRunner().invoke(main, ["bench", "show", str(path.with_suffix(".json")), "--report", str(path)])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    page.write(folder / "own.html", "own", [page.table(make_table()), HOSTILE])
    make_eval(folder / "eval.html")
    make_bench(folder / "bench.html")
    return folder


@pytest.fixture(scope="module")
def shown(pages: Path) -> dict[str, Any]:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser, none of {', '.join(BROWSERS)}: apt-get install chromium-headless-shell")
    frames = "".join(f'<iframe id="{path.stem}" src="{path.name}"></iframe>' for path in sorted(pages.glob("*.html")))
    harness = pages / "harness.htm"
    harness.write_text(HARNESS % frames, encoding="utf-8")
    # The frames' documents are the harness' to read; the pages themselves are as they were written.
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        f"--user-data-dir={pages / 'user'}",
    )
    run = subprocess.run(
        [browser, *flags, "--dump-dom", harness.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', run.stdout, re.DOTALL)
    assert found is not None
    assert found[1], run.stderr
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    result: dict[str, Any] = json.loads(text)
    return result


# ---- without a browser ----


def test_a_page_needs_nothing_but_itself(pages: Path) -> None:
    for path in pages.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r'(?:src|href)="(?!data:)|url\(|@import', text)
        assert "default-src 'none'" in text


def test_names_are_text(pages: Path) -> None:
    text = (pages / "eval.html").read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert "What is &lt;b&gt;2&lt;/b&gt;?" in text


def test_wrong_answers_are_marked(pages: Path) -> None:
    text = (pages / "eval.html").read_text(encoding="utf-8")
    assert '<td>It is 4.</td><td class="red">5</td>' in text


def test_a_benchmarks_page_says_what_was_run_where(pages: Path) -> None:
    text = (pages / "bench.html").read_text(encoding="utf-8")
    assert "<h1>xpu-fp4 bench --seconds 1, executed</h1>" in text
    assert str(machine.describe()["processor"]).split(" ")[0] in text
    assert text.count("<details>") == 1
    assert text.count("<h3>") == 1 + 3  # the suite, and each of its cases


def test_a_report_that_cannot_be_written_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr(runner, "run", refuse)
    result = CliRunner().invoke(main, ["bench", "--report", "page.pdf"])
    assert result.exit_code == 2
    assert "expected a name that ends in .html" in " ".join(result.output.split())


# ---- in a browser ----


def test_a_click_sorts_by_value_and_another_turns_the_order(shown: dict[str, Any]) -> None:
    names, numbers = shown["own"]["sorted"][0]
    assert shown["own"]["before"] == [["a", "w16", "b", "w4", "w8"]]
    assert numbers["up"][:3] == ["-1", "≥ 9.5", "10"]
    assert numbers["down"][:3] == ["10", "≥ 9.5", "-1"]
    assert {*numbers["up"][3:]} == {*numbers["down"][3:]} == {"-", "no such thing"}
    assert names["up"] == ["a", "b", "w16", "w4", "w8"]
    assert names["down"] == names["up"][::-1]
    assert names["states"] == ["ascending", "descending"]


def test_every_table_keeps_its_rows(shown: dict[str, Any]) -> None:
    assert len(shown["eval"]["sorted"]) == 3
    assert len(shown["bench"]["sorted"]) == 4
    for name in ("eval", "bench"):
        for before, columns in zip(shown[name]["before"], shown[name]["sorted"], strict=True):
            assert sorted(columns[0]["up"]) == sorted(columns[0]["down"]) == sorted(before)


def test_pictures_are_shown(shown: dict[str, Any]) -> None:
    assert [alternative for alternative, _ in shown["eval"]["pictures"]] == ["signal-to-noise ratio by layer"]
    assert [alternative for alternative, _ in shown["bench"]["pictures"]] == ["plot: roofline", "plot: time"]
    assert all(width > 500 for name in ("eval", "bench") for _, width in shown[name]["pictures"])


def test_no_other_script_runs(shown: dict[str, Any]) -> None:
    assert {name: page["title"] for name, page in shown.items()} == {
        "own": "own",
        "eval": "w4a8, original",
        "bench": "xpu-fp4 bench --seconds 1, executed",
    }
