"""One line per scan, one for the run; a progress bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from time import monotonic
from typing import TextIO

from bids_harmony.workflows.cohort import Outcome

_ORDER = ("harmonized", "preprocessed", "skipped", "planned", "refused", "failed")


class Progress:
    """Prints outcomes as they come."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._total, self._count, self._start = total, 0, monotonic()
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="scan", file=self._stream, leave=False)

    def __call__(self, outcome: Outcome) -> None:
        self._count += 1
        line = outcome_line(outcome, self._count, self._total)
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        else:
            self._bar.write(line, file=self._stream)
            self._bar.update()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        """Since the first scan."""
        return monotonic() - self._start


def outcome_line(outcome: Outcome, count: int, total: int) -> str:
    """``[3/35] sub-01_T1w: harmonized in 21 s``."""
    took = f" in {outcome.seconds:.0f} s" if outcome.seconds is not None else ""
    why = f": {outcome.message}" if outcome.message else ""
    return f"[{count}/{total}] {outcome.stem}: {outcome.status}{took}{why}"


def run_line(outcomes: Sequence[Outcome], seconds: float) -> str:
    """``35 scans in 612 s: 34 harmonized, 1 refused``."""
    counts: Counter[str] = Counter(o.status for o in outcomes)
    parts = ", ".join(f"{counts[s]} {s}" for s in _ORDER if counts[s])
    plural = "" if len(outcomes) == 1 else "s"
    return f"{len(outcomes)} scan{plural} in {seconds:.0f} s: {parts or 'nothing to do'}"
