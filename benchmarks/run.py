"""Compute a benchmark table and write its page below docs/benchmarks.

    python -m benchmarks.run TABLE [--methods ...] [--work DIR] [--data DIR] [--minutes N]

from the root of the repository. What is in the work folder is not computed again: a killed run
goes on, and a method that comes later adds its rows. ``--redo METHOD`` makes some anew.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from benchmarks.harness import Settings, forget, run_table
from benchmarks.page import write_page
from benchmarks.rows import Rows
from benchmarks.tables import TABLES, TRIALS
from benchmarks.trials import Trial
from bids_harmony.errors import HarmonyError
from bids_harmony.methods.registry import available

ROOT = Path(__file__).parent.parent


def main(argv: list[str] | None = None) -> int:
    """Run one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--methods", nargs="+", choices=sorted(TRIALS))
    parser.add_argument("--redo", nargs="+", choices=sorted(TRIALS), default=[])
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "benchmarks")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "openmulti")
    parser.add_argument("--minutes", type=int, help="limit of a neural method's training")
    parser.add_argument("--nprocs", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where neural methods run")
    parser.add_argument("--random-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args(argv)
    table = TABLES[options.table]
    settings = Settings(
        options.work.absolute(), options.random_seed, options.nprocs, options.device,
        options.minutes,
    )  # fmt: skip
    try:
        if options.redo:
            forget(table, options.redo, settings.work)
        rows = run_table(table, _trials(table.trials, options.methods), options.data, settings)
        path = write_page(table, rows.rows, rows.text(), _command(options, rows), options.out)
    except HarmonyError as error:
        print(error, file=sys.stderr)
        return 1
    print(path)
    return 0


def _trials(default: tuple[str, ...], wanted: list[str] | None) -> list[Trial]:
    """Trials that were asked for, or the table's whose method is installed; `none` is first."""
    trials = [TRIALS[k] for k in wanted or default]
    for trial in trials if wanted is None else []:
        if trial.method is not None and trial.method not in available():
            print(f"left out: {trial.label} is not installed", file=sys.stderr)
    kept = [t for t in trials if wanted or t.method is None or t.method in available()]
    return [TRIALS["none"], *(t for t in kept if t.label != "none")]


def _command(options: argparse.Namespace, rows: Rows) -> str:
    """What to type for the same figures; folders are the user's own affair."""
    words = ["python", "-m", "benchmarks.run", options.table]
    made = {row.method for row in rows.rows}
    trials = TABLES[options.table].trials
    if not made.issuperset(trials):
        words += ["--methods", *(label for label in trials if label in made)]
    for name in ("minutes", "device", "random_seed"):
        value = getattr(options, name)
        if value not in (None, "cpu", 0):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
