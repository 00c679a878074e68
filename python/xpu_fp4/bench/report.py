# SPDX-License-Identifier: Apache-2.0
"""Tables of a record: for the terminal, and as Markdown for the documentation."""

import re
import statistics
from collections.abc import Iterable, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from .cases import EXPERTS, OUR_EXPERTS, Case
from .measure import speedup
from .runner import Record, Result
from .targets import Verdict, threads_of, verdicts

OURS_IN_SHORT = ("w4a4-gemm", "w4a4-linear", "w4a8-linear", "w4a16-linear", *OUR_EXPERTS)
Rows = list[list[str]]

STEADY = 0.1
"""The spread of a limit on a quiet machine, at most."""


def rate_limits(record: Record, threads: int | None = None) -> dict[str, float]:
    """Each limit's median over the cases with that many threads (None: the commonest number), operations or bytes a second."""
    found = [r for r in record.results if r.kind == "limit"]
    if threads is None and found:
        threads = statistics.mode(r.case.threads for r in found)
    rates: dict[str, list[float]] = {}
    for result in found:
        if result.case.threads == threads:
            rates.setdefault(result.contender, []).append((result.ops or result.bytes) / result.seconds)
    return {name: statistics.median(values) for name, values in rates.items()}


def _figures(value: float) -> str:
    """Three significant digits, more of large numbers, and no powers of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-4 else f"{value:.6f}"


def _milliseconds(result: Result | None) -> str:
    return _figures(result.seconds * 1e3) if result else "-"


def _share(result: Result, limit: Result | None) -> str:
    """The rate of a result as a share of a limit's in the same case."""
    if limit is None:
        return "-"
    work, most = (result.ops, limit.ops) if limit.ops else (result.bytes, limit.bytes)
    return f"{100 * speedup(result.timing, limit.timing) * work / most:.0f}%" if work else "-"


def _best_forms(results: dict[str, Result]) -> dict[str, Result]:
    """Our products in short, with the weight in the kernels' own form where that was measured."""
    best: dict[str, Result] = {}
    for name in OURS_IN_SHORT:
        forms = (results.get(name + form) for form in ("-prepacked", "-expanded", ""))
        if (result := next(filter(None, forms), None)) is not None:
            best[name] = result
    return best


def case_table(record: Record, case: Case) -> Table:
    """Everybody in one case. The last columns say how many times as fast as this one ours are."""
    results = record.of(case)
    is_product = any(result.ops for result in results.values() if result.kind == "ours")
    instructions = [name for name, r in results.items() if r.kind == "limit" and r.ops]  # the fastest first
    bounds = [name for name in (*instructions[:1], "limit-read") if is_product and name in results]
    ours = _best_forms(results) if is_product else {}
    table = Table(title=f"{case.suite}: {case}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("who", no_wrap=True)
    headings = ["ms", "±", "GOPS", "GB/s", *(f"of {name.removeprefix('limit-')}" for name in bounds)]
    if not is_product:
        headings.append("of a copy")
    for heading in headings + [f"{name} is x times as fast" for name in ours]:
        table.add_column(heading, justify="right", max_width=13)
    for result in results.values():
        shown = result.kind != "limit"
        of = bounds if is_product else [f"limit-copy-{result.contender}"]
        shares = [_share(result, results.get(limit)) if shown else "" for limit in of]
        ratios = [f"{speedup(mine.timing, result.timing):.2f}" if shown else "" for mine in ours.values()]
        rates = [_figures(amount / result.seconds / 1e9) if amount else "-" for amount in (result.ops, result.bytes)]
        spread = f"{100 * result.timing.spread:.0f}%" if len(result.timing.samples) > 1 else "-"
        cells = [result.contender, _milliseconds(result), spread, *rates, *shares, *ratios]
        table.add_row(*cells, style={"ours": "bold", "limit": "dim"}.get(result.kind))
    return table


def _verdict_row(verdict: Verdict) -> list[str]:
    bound = f"{'≤' if verdict.at_most else '≥'} {verdict.target:g}"
    measured = verdict.note if verdict.measured is None else f"{verdict.measured:.2f}"
    if verdict.disturbed:
        measured, answer = f"{measured}, more than {verdict.possible:g}", "disturbed"
    else:
        answer = {True: "yes", False: "**no**", None: "not measured"}[verdict.reached]
    return [verdict.work, verdict.measure, bound, measured, answer]


TARGET_HEADINGS = ("work", "figure", "target", "measured", "reached")


def has_targets(record: Record) -> bool:
    """Whether the record has a suite that speeds are held to."""
    return any(case.suite in ("targets", *EXPERTS) for case in record.cases)


def _targets_title(record: Record) -> str:
    return f"Targets, with {threads_of(record)} threads (those without another number are for 2)"


def targets_table(record: Record) -> Table:
    table = Table(*TARGET_HEADINGS, title=_targets_title(record), title_justify="left", box=box.SIMPLE_HEAD)
    for row in map(_verdict_row, verdicts(record)):
        style = {"yes": "green", "**no**": "red"}.get(row[-1], "dim")
        table.add_row(*(escape(cell.strip("*")) for cell in row), style=style)
    return table


def disturbance(record: Record) -> str | None:
    """A warning if the processor's own limits varied: other programs ran, and no figure can be trusted."""
    worst = max((r.timing.spread for r in record.results if r.kind == "limit" and r.ops), default=0.0)
    if worst <= STEADY:
        return None
    return f"The machine was busy: an instruction's own speed varied by {100 * worst:.0f}% within a case. Measure again."


def _absent(record: Record) -> dict[str, str]:
    """The contenders that share a reason, by the reason."""
    names: dict[str, list[str]] = {}
    for name, reason in record.absent.items():
        names.setdefault(reason, []).append(name)
    return {reason: ", ".join(together) for reason, together in names.items()}


def absent_table(record: Record) -> Table:
    table = Table("did not take part", "why", box=box.SIMPLE_HEAD)
    for reason, names in _absent(record).items():
        table.add_row(names, escape(reason))
    return table


# ---- Markdown ----


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [list(headings), ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def machine_lines(record: Record) -> list[str]:
    """What ran where: paragraphs, in Markdown."""
    machine = record.machine
    cache = ", ".join(f"{name} {size // 2**10} KiB" for name, size in machine["cache bytes"].items())
    threads = sorted({case.threads for case in record.cases})
    lines = [
        f"{machine['processor']}, {machine['cores']} cores{' of a virtual machine' * machine['virtual']}; {cache}; "
        f"{machine['memory bytes'] / 2**30:.0f} GiB of memory; threads: {', '.join(map(str, threads))}.",
        f"torch {machine['torch']}, xpu_fp4 {machine['xpu_fp4']} at {machine['revision'] or 'no commit'}, "
        f"{machine['native kernels']} kernels, backend {machine['backend for CPU tensors']}.",
        "Peers: " + "; ".join(f"{name}: {text}" for name, text in machine["peers"].items()) + ".",
        "Limits measured: " + "; ".join(_limit(name, rate) for name, rate in rate_limits(record).items()) + ".",
    ]
    warning = disturbance(record)
    if warning:
        lines.append(f"**{warning}**")
    if record.absent:
        lines.append("Did not take part: " + "; ".join(f"{names}: {why}" for why, names in _absent(record).items()) + ".")
    return lines


def _limit(name: str, rate: float) -> str:
    unit = "GB/s" if name.startswith(("limit-read", "limit-copy")) else "GOPS"
    return f"{name.removeprefix('limit-')} {rate / 1e9:.4g} {unit}"


def _suite_rows(record: Record, suite: str) -> tuple[list[str], Rows]:
    """A row per case: milliseconds of everybody but the limits."""
    cases = [case for case in record.cases if case.suite == suite]
    took_part = {r.contender for r in record.results if r.case.suite == suite and r.kind != "limit"}
    names = [name for name in record.contenders if name in took_part]
    rows = [[str(case), *(_milliseconds(record.of(case).get(name)) for name in names)] for case in cases]
    return ["work" if suite in EXPERTS else "M x N x K", *names], rows


def suite_table(record: Record, suite: str) -> Table:
    """The times of a suite's cases, beside each other."""
    headings, rows = _suite_rows(record, suite)
    table = Table(title=f"Suite {suite}, milliseconds", title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(headings):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(record: Record, pictures: Sequence[str] = ()) -> str:
    """The machine, the targets, pictures by their addresses, and one table of times per suite."""
    parts = [f"Executed with `{record.settings['command']}`.", *machine_lines(record)]
    suites = list(dict.fromkeys(case.suite for case in record.cases))
    if has_targets(record):
        parts += [f"### {_targets_title(record)}", _markdown(TARGET_HEADINGS, map(_verdict_row, verdicts(record)))]
    parts += [f"![{re.sub('[-_]', ' ', address.rpartition('/')[2].removesuffix('.png'))}]({address})" for address in pictures]
    for suite in suites:
        parts += [f"### Suite `{suite}`, milliseconds", _markdown(*_suite_rows(record, suite))]
    return "\n\n".join(parts)


def insert(page: str, name: str, text: str) -> str:
    """The page with the text between its markers `<!-- bench NAME -->` and `<!-- end bench NAME -->`.

    Raises ValueError if the page has no such markers.
    """
    begin, end = f"<!-- bench {name} -->", f"<!-- end bench {name} -->"
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"no {begin} followed by {end}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"
