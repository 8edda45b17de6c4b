"""Rows of a benchmark table: kept in a CSV, and their means with confidence intervals."""

from __future__ import annotations

import csv
import io
import math
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bids_harmony._version import __version__
from bids_harmony.bids.write import atomic_write_text

if TYPE_CHECKING:
    from benchmarks.harness import Case

KEYS = ("method", "condition", "scan", "person", "status")
#: Per scan (whole pipeline) and of training: wall clock, and processor time of all processes.
TIMES = ("seconds", "cpu_seconds", "train_seconds", "train_cpu_seconds")
FACTS = ("model", *TIMES, "seed", "hardware", "versions", "date")
PACKAGES = ("numpy", "antspyx", "torch")
RESAMPLES = 10000


@dataclass(frozen=True)
class Row:
    """Scores of one method on one case; `status` is ``ok`` or says what is missing."""

    method: str
    condition: str
    scan: str
    person: str
    status: str
    scores: Mapping[str, float]
    facts: Mapping[str, Any]


class Rows:
    """Rows in a CSV file, which is replaced as a whole whenever a row is added."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, tuple(columns)
        self.rows: list[Row] = []
        if path.is_file():
            with path.open(newline="") as stream:
                self.rows = [self._parse(line) for line in csv.DictReader(stream)]

    def has(self, method: str, case: Case, model: str) -> bool:
        """Whether the case was scored with this model and every score is known."""
        return any(
            r.status == "ok"
            and (r.method, r.condition, r.scan) == (method, case.condition, case.name)
            and r.facts["model"] == model[:12]
            and set(self.columns) <= r.scores.keys()
            for r in self.rows
        )

    def add(self, row: Row) -> None:
        """Add a row in place of the same method's older one, and write the file."""
        key = (row.method, row.condition, row.scan)
        self.rows = [r for r in self.rows if (r.method, r.condition, r.scan) != key] + [row]
        self._write()

    def drop(self, methods: Collection[str]) -> None:
        """Remove the rows of methods from the file."""
        self.rows = [r for r in self.rows if r.method not in methods]
        self._write()

    def order(self, methods: Sequence[str]) -> None:
        """Bring the rows into the order of these methods, others last."""
        place = {method: number for number, method in enumerate(methods)}
        self.rows.sort(key=lambda r: place.get(r.method, len(place)))
        self._write()

    def text(self) -> str:
        """All rows as CSV."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*KEYS, *self.columns, *FACTS])
        for r in self.rows:
            scores = [_number(r.scores[c]) if c in r.scores else "" for c in self.columns]
            keys = [r.method, r.condition, r.scan, r.person, r.status]
            writer.writerow([*keys, *scores, *(r.facts.get(k, "") for k in FACTS)])
        return out.getvalue()

    def _write(self) -> None:
        atomic_write_text(self.path, self.text())

    def _parse(self, line: Mapping[str, str]) -> Row:
        scores = {c: float(line[c]) for c in self.columns if line.get(c)}
        method, condition, scan, person, status = (line[k] for k in KEYS)
        known = {k: line.get(k, "") for k in FACTS}
        return Row(method, condition, scan, person, status, scores, known)


def _number(value: float) -> str:
    return f"{value:.6g}"


def facts(seed: int, device: str) -> dict[str, Any]:
    """What a figure depends on besides data and code: seed, hardware, versions, date."""
    return {
        "seed": seed,
        "hardware": hardware(device),
        "versions": ", ".join(_versions()),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def hardware(device: str) -> str:
    """Name of the processor, and of the GPU when one is used."""
    names = [platform.machine()]
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        names = [lines[0].split(":", 1)[1].strip()] if lines else names
    words = f"{names[0]}, {os.cpu_count()} cores"
    if device.startswith("cuda"):
        import torch

        words += f", {torch.cuda.get_device_name(device)}"
    return words


def _versions() -> list[str]:
    found = [f"bids_harmony {__version__}", f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Mean:
    """Mean over scans with a 95 % interval over persons (NaN for one person)."""

    value: float
    low: float
    high: float
    count: int


def mean_interval(rows: Sequence[Row], column: str, *, seed: int = 0) -> Mean | None:
    """Mean of a score with its 95 % percentile bootstrap interval; persons are drawn.

    A person's scans are averaged first, so that a person with many scans has no more say. NaN
    scores are left out; None if no score is left.
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        value = row.scores.get(column, math.nan)
        if not math.isnan(value):
            found.setdefault(row.person, []).append(value)
    if not found:
        return None
    values = np.array([np.mean(v) for _, v in sorted(found.items())])
    middle = float(values.mean())
    if values.size == 1 or not np.isfinite(values).all():
        return Mean(middle, math.nan, math.nan, values.size)
    if np.ptp(values) == 0:
        return Mean(middle, middle, middle, values.size)
    drawn = np.random.default_rng(seed).choice(values, (RESAMPLES, values.size))
    low, high = np.percentile(drawn.mean(axis=1), (2.5, 97.5))
    return Mean(middle, float(low), float(high), values.size)


def below_input(rows: Sequence[Row], column: str, better: str) -> list[tuple[Row, float]]:
    """Rows that are worse than the untouched scan, with the difference (negative: worse)."""
    plain = {
        (r.condition, r.scan): r.scores[column]
        for r in rows
        if r.method == "none" and column in r.scores
    }
    sign = 1 if better == "higher" else -1
    worse = []
    for row in rows:
        before = plain.get((row.condition, row.scan))
        if row.method == "none" or before is None or column not in row.scores:
            continue
        if not math.isfinite(before):  # the truth itself
            continue
        gain = sign * (row.scores[column] - before)
        if gain < 0:
            worse.append((row, gain))
    return worse
