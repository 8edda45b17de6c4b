"""A benchmark table as Markdown: means with intervals, the paper's figures beside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.goals import render_goals
from benchmarks.harness import AIMS, Column, Table
from benchmarks.rows import TIMES, Mean, Row, below_input, facts, mean_interval
from bids_harmony.bids.write import atomic_write_text


def write_page(table: Table, rows: Sequence[Row], text: str, command: str, folder: Path) -> Path:
    """Write ``<table>.md`` and, with one line per scan, ``<table>.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{table.name}.md"
    atomic_write_text(path, render(table, rows, command))
    atomic_write_text(folder / f"{table.name}.csv", text)
    return path


def write_plain_page(
    path: Path, title: str, about: str, command: str, body: Sequence[str]
) -> None:
    """Write a page of other figures than those of a table, with what it was made with."""
    made = [f"- command: `{command}`", *(f"- {k}: {v}" for k, v in facts(0, "cpu").items())]
    text = "\n".join([f"# {title}", "", about, "", *made, "", *body]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)
    print(text)


def render(table: Table, rows: Sequence[Row], command: str) -> str:
    """The page's Markdown."""
    done = [r for r in rows if r.status == "ok"]
    parts = [
        f"# {table.title}",
        table.about,
        _made(done, command),
        _legend(done),
    ]
    conditions = list(dict.fromkeys(r.condition for r in done))
    for condition in conditions:
        parts.append(f"## {condition}")
        parts.append(_grid(table, [r for r in done if r.condition == condition], condition))
    averaged = [r for r in done if r.condition not in table.controls]
    if len(conditions) > 1 and averaged:
        words = f" (without {', '.join(table.controls)})" if table.controls else ""
        parts += [f"## Mean over conditions{words}", _grid(table, averaged, "mean")]
    if table.goals and averaged:
        better = next(c.better for c in table.columns if c.name == table.judge)
        words = "By how much a mean misses the goal stands behind the condition."
        parts += ["## Goals", words, render_goals(
            table.goals, [k for k in table.trials if k != "none"], averaged, table.paper,
            (table.judge, better),
        )]  # fmt: skip
    parts += _others(table, conditions)
    parts += _worse(table, done)
    parts += ["## Time", _times(done)]
    failed = [r for r in rows if r.status != "ok"]
    if failed:
        lines = [f"- {r.method}, {r.condition}, {r.scan}: {r.status}" for r in failed]
        parts += ["## Without a result", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _made(rows: Sequence[Row], command: str) -> str:
    """Command and what the figures depend on."""
    lines = [f"- command: `{command}`"]
    for key in ("hardware", "versions", "seed", "date"):
        values = sorted({str(r.facts[key]) for r in rows})
        lines.append(f"- {key}: {'; '.join(values)}")
    return "\n".join(lines)


def _legend(rows: Sequence[Row]) -> str:
    people = len({r.person for r in rows})
    scale = (
        "Mean"
        if people == 1
        else (f"Mean [95 % interval, percentile bootstrap over {people} people]")
    )
    return f"{scale}; the best value of a column is bold. `none` is the preprocessed input."


def _grid(table: Table, rows: Sequence[Row], condition: str) -> str:
    shown = [c for c in table.columns if c.shown]
    theirs = [
        c for c in shown
        if any(k[1] == condition and c.name in v for k, v in table.paper.items())
        and any((r.method, condition) in table.paper for r in rows)
    ]  # fmt: skip
    heads = ["method", *(_heading(c) for c in shown), *(f"paper: {_heading(c)}" for c in theirs)]
    methods = list(dict.fromkeys(r.method for r in rows))
    means = {
        (m, c.name): mean_interval([r for r in rows if r.method == m], c.name)
        for m in methods for c in shown
    }  # fmt: skip
    lines = [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
    for method in methods:
        cells = [_cell(means[method, c.name], c, _best(means, methods, c)) for c in shown]
        paper = table.paper.get((method, condition), {})
        cells += [f"{paper[c.name]:.{c.digits}f}" if c.name in paper else "" for c in theirs]
        lines.append(_line([method, *cells]))
    return "\n".join(lines)


def _heading(column: Column) -> str:
    aim = AIMS.get(column.better)
    arrow = f"→ {aim:g}" if aim else {"higher": "↑", "lower": "↓"}[column.better]
    unit = f" ({column.unit})" if column.unit else ""
    return f"{column.heading}{unit} {arrow}"


def _best(
    means: dict[tuple[str, str], Mean | None], methods: Sequence[str], column: Column
) -> float:
    values = [m.value for k in methods if (m := means[k, column.name]) and math.isfinite(m.value)]
    if not values:
        return math.nan
    if aim := AIMS.get(column.better):
        return min(values, key=lambda v: abs(v - aim))
    return max(values) if column.better == "higher" else min(values)


def _cell(mean: Mean | None, column: Column, best: float) -> str:
    if mean is None:
        return ""
    text = f"{mean.value:.{column.digits}f}"
    if text == f"{best:.{column.digits}f}":
        text = f"**{text}**"
    if math.isnan(mean.low):
        return text
    return f"{text} [{mean.low:.{column.digits}f}, {mean.high:.{column.digits}f}]"


def _others(table: Table, conditions: Sequence[str]) -> list[str]:
    """The paper's figures of methods or conditions that have no row here."""
    known = {*conditions, "mean"}
    lines = []
    for (method, condition), values in table.paper.items():
        if method in table.trials and condition in known:
            continue
        words = ", ".join(f"{name} {value:g}" for name, value in values.items())
        lines.append(f"- {method}, {condition}: {words}")
    return ["## Other figures of the paper", "\n".join(lines)] if lines else []


def _worse(table: Table, rows: Sequence[Row]) -> list[str]:
    if not table.judge:
        return []
    column = next(c for c in table.columns if c.name == table.judge)
    worse = below_input(rows, column.name, column.better)
    title = f"## Below their own input ({column.heading})"
    plain = [r for r in rows if math.isfinite(r.scores.get(column.name, math.nan))]
    known = {(r.condition, r.scan) for r in plain if r.method == "none"}
    tried = [r for r in rows if r.method != "none" and (r.condition, r.scan) in known]
    if not worse:
        return [title, f"None of {len(tried)} scans."]
    lines = [
        f"- {r.method}, {r.condition}, {r.scan}: {gain:+.{column.digits}f} {column.unit}"
        for r, gain in worse
    ]
    return [title, f"{len(worse)} of {len(tried)} scans:", "\n".join(lines)]


def _times(rows: Sequence[Row]) -> str:
    """Seconds of the command line per scan, and of training."""
    heads = ["s per scan", "CPU s per scan", "s training", "CPU s training"]
    lines = [
        "Whole pipeline; training with the preprocessing of its scans. `none`: brain mask, bias "
        "field and registration, whose masks and transforms the others reuse.\n",
        _line(["method", *heads]),
        _line(["---", *["---:"] * len(heads)]),
    ]
    for method in dict.fromkeys(r.method for r in rows):
        facts = next(r.facts for r in rows if r.method == method)
        lines.append(_line([method, *(str(facts[k]) for k in TIMES)]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
