"""What a table's methods should reach, and whether they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.rows import Row, below_input, mean_interval

Paper = Mapping[tuple[str, str], Mapping[str, float]]


@dataclass(frozen=True)
class Goal:
    """One goal, judged for each condition.

    Attributes
    ----------
    words
        For the page.
    column
        The score that counts.
    limit
        It must not be below this (`floor`), or not above.
    floor
        Which of both.
    above
        A trial whose score under the same condition is added to `limit`.
    paper
        A trial whose score in the paper, under the same condition, is added to `limit`.
    conditions
        The only ones it is for; empty for all.
    """

    words: str
    column: str
    limit: float = 0.0
    floor: bool = True
    above: str | None = None
    paper: str | None = None
    conditions: tuple[str, ...] = ()


def render_goals(
    goals: Sequence[Goal],
    methods: Sequence[str],
    rows: Sequence[Row],
    paper: Paper,
    judge: tuple[str, str],
) -> str:
    """Markdown: by goal and method, ``met`` or where it was missed; and scans below their input.

    Parameters
    ----------
    methods
        Whose rows are judged.
    rows
        Of the conditions that count.
    paper
        The paper's figures.
    judge
        Column, and what is better, by which a scan is below its own input.
    """
    present = [m for m in methods if any(r.method == m for r in rows)]
    conditions = list(dict.fromkeys(r.condition for r in rows))

    def score(method: str, condition: str, column: str) -> float | None:
        chosen = [r for r in rows if (r.method, r.condition) == (method, condition)]
        mean = mean_interval(chosen, column)
        return None if mean is None else mean.value

    lines = [f"| goal | {' | '.join(present)} |", f"|---|{'---|' * len(present)}"]
    for goal in goals:
        its = [c for c in conditions if not goal.conditions or c in goal.conditions]
        gaps = [{c: _gap(goal, method, c, score, paper) for c in its} for method in present]
        lines.append(f"| {goal.words} | {' | '.join(_verdict(found) for found in gaps)} |")
    worse = [row.method for row, _ in below_input(rows, *judge)]
    cells = []
    for method in present:
        few, many = worse.count(method), sum(r.method == method for r in rows)
        cells.append(f"missed: {few} of {many} scans" if few else "met")
    lines.append(f"| no scan is made worse | {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(gaps: Mapping[str, float | None]) -> str:
    known = {condition: gap for condition, gap in gaps.items() if gap is not None}
    missed = [f"{condition} ({gap:+.2g})" for condition, gap in known.items() if gap < 0]
    if missed:
        return f"missed: {', '.join(missed)}"
    return "met" if known else ""


def _gap(
    goal: Goal,
    method: str,
    condition: str,
    score: Callable[[str, str, str], float | None],
    paper: Paper,
) -> float | None:
    """By how much a goal is exceeded (negative: missed); None where nothing can be said."""
    mine = score(method, condition, goal.column)
    base: float | None = 0.0
    if goal.above == method:
        return None
    if goal.above is not None:
        base = score(goal.above, condition, goal.column)
    elif goal.paper is not None:
        base = paper.get((goal.paper, condition), {}).get(goal.column)
    if mine is None or base is None:
        return None
    gap = mine - (base + goal.limit)
    return gap if goal.floor else -gap
