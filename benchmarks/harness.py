"""Method x cohort x condition -> rows; the part that all benchmark tables share.

A table (`Table`) makes a BIDS data set, names its cases and scores an image. The harness runs the
command line (``train``, then ``participant``) for every trial in one output folder, so that brain
masks and transforms are made once, and keeps one row per trial, condition and scan in a CSV in
the work folder. A row that is there for the same model is not computed again.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import nibabel as nb
import numpy as np
from numpy.typing import NDArray

from benchmarks.goals import Goal
from benchmarks.rows import TIMES, Row, Rows, facts
from benchmarks.trials import (
    DIGITS,
    MODALITY,
    Trial,
    forget_models,
    harmonized,
    letters,
    model_for,
    note,
    only_these,
    scans_of,
    timings,
    training_scans,
)
from benchmarks.view import View
from bids_harmony.bids.names import derivative_path
from bids_harmony.bids.scan import Scan
from bids_harmony.bids.write import write_json
from bids_harmony.errors import ExitCode, HarmonyError, MissingInputError, UsageError
from bids_harmony.imaging.conform import conform
from bids_harmony.imaging.scale import fit_scale
from bids_harmony.interfaces.ants_functions import divide_by_bias
from bids_harmony.methods.bundle import is_bundle, load_bundle
from bids_harmony.methods.registry import available

FloatArray = NDArray[np.float32]


#: Scores that shall be neither high nor low.
AIMS = {"one": 1.0, "hundred": 100.0}


@dataclass(frozen=True)
class Column:
    """One score: heading, unit, digits, and its aim: ``higher``, ``lower`` or one of `AIMS`."""

    name: str
    heading: str
    unit: str = ""
    digits: int = 2
    better: str = "higher"
    shown: bool = True


@dataclass(frozen=True)
class Case:
    """What gives one row: the scans to harmonize, and what they are compared with.

    `to` is the site whose appearance they get; empty for the cohort's reference.
    """

    condition: str
    name: str
    person: str
    scans: tuple[Scan, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    to: str = ""


@dataclass(frozen=True)
class Cohort:
    """A BIDS data set, the reference domain in it, who is trained on, and the cases.

    Each of `training` was scanned at one site, each of `travellers` at several.
    """

    bids_dir: Path
    reference: str
    training: tuple[str, ...]
    cases: tuple[Case, ...]
    travellers: tuple[str, ...] = ()


class Table(ABC):
    """One benchmark table."""

    name: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]
    trials: ClassVar[tuple[str, ...]]
    #: Score by which a scan is below its own input; empty, and no goals, where there is none.
    judge: ClassVar[str] = "psnr"
    #: The paper's figures: (trial, condition) -> column -> value.
    paper: ClassVar[Mapping[tuple[str, str], Mapping[str, float]]] = {}
    #: Conditions that are shown, but are not part of the mean over conditions.
    controls: ClassVar[tuple[str, ...]] = ()
    #: Options of both levels.
    options: ClassVar[tuple[str, ...]] = ()
    #: What methods should reach.
    goals: ClassVar[tuple[Goal, ...]] = ()
    #: Table whose models are tried; None trains its own.
    models_of: ClassVar[str | None] = None

    def arguments(self, cohort: Cohort) -> tuple[str, ...]:
        """Options of both levels for a cohort."""
        return self.options

    @abstractmethod
    def prepare(self, data: Path, folder: Path) -> Cohort:
        """Make the data set below `folder` unless it is there, and name the cases."""

    @abstractmethod
    def score(self, case: Case, result: View, prep: Prepared) -> dict[str, float]:
        """Scores of a case; `result` gives the harmonized (or untouched) scans."""


@dataclass(frozen=True)
class Settings:
    """What the user chose."""

    work: Path
    seed: int = 0
    nprocs: int = 1
    device: str = "cpu"
    minutes: int | None = None


class Prepared:
    """The preprocessed scans of a cohort, as every method is given them."""

    def __init__(
        self, cohort: Cohort, folder: Path, settings: Settings, trained: Path | None = None
    ) -> None:
        self.cohort, self.folder, self.settings = cohort, folder, settings
        self.out_dir, self._trained = folder / "out", trained or folder
        self.labels = folder / "labels"  # of `scoring.segmented`

    def model(self, label: str) -> Path:
        """Folder of a trial's bundle.

        Raises
        ------
        MissingInputError
            If another table should have made it.
        """
        folder = self._trained / "out" / "models" / label
        if self._trained != self.folder and not is_bundle(folder):
            raise MissingInputError(f"{folder} does not exist; run {self._trained.name} first")
        return folder

    def mask(self, scan: Scan) -> NDArray[np.bool_]:
        """Brain mask that the pipeline used."""
        path = derivative_path(self.out_dir, scan, desc="brain", suffix="mask")
        return np.asarray(read(path)[0] > 0)

    def corrected(self, scan: Scan) -> tuple[FloatArray, NDArray[Any]]:
        """Scan divided by the bias field that the pipeline found, and its affine."""
        raw = conform(scan.path)
        path = derivative_path(self.out_dir, scan, desc="n4", suffix="biasfield")
        return divide_by_bias(raw.data, raw.affine, read(path)[0]), raw.affine

    def scaled(self, scan: Scan) -> FloatArray:
        """What a method on the native grid is given: corrected, on the scan's own robust scale."""
        data, _ = self.corrected(scan)
        return fit_scale(data, self.mask(scan), "robust", name=scan.stem).apply(data)

    def read(self, path: Path) -> FloatArray:
        """Voxels of an image."""
        return read(path)[0]

    def run(self, level: str, *arguments: str) -> tuple[float, float]:
        """Run the command line; wall seconds, and processor seconds of it and its children.

        Raises
        ------
        HarmonyError
            If it could not run as a whole; its log is named. Single scans may fail.
        """
        log = self.folder / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}_{level}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "bids_harmony", str(self.cohort.bids_dir), str(self.out_dir),
            level, "--skip-bids-validation", "--modality", MODALITY, *arguments,
            "--nprocs", str(self.settings.nprocs), "--random-seed", str(self.settings.seed),
            "--work-dir", str(self.folder / "nipype"),
        ]  # fmt: skip
        start, used = time.perf_counter(), _processor_seconds()
        with log.open("w") as stream:
            stream.write(f"{' '.join(command[1:])}\n")
            stream.flush()
            done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False)
        if done.returncode not in (ExitCode.OK, ExitCode.DATA):  # a refused scan is a result
            last = log.read_text().strip().splitlines()[-1]
            raise HarmonyError(f"{level} left with {done.returncode}: {last} (log: {log})")
        return time.perf_counter() - start, _processor_seconds() - used


def _processor_seconds() -> float:
    """Of all child processes that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def read(path: Path) -> tuple[FloatArray, NDArray[Any]]:
    """Image as float32, and its affine."""
    image = nb.load(path)
    return np.asarray(image.dataobj, dtype=np.float32), image.affine  # type: ignore[attr-defined]


def run_table(table: Table, trials: Sequence[Trial], data: Path, settings: Settings) -> Rows:
    """Compute the rows of these trials that are missing; return all rows of the work folder.

    Raises
    ------
    UsageError
        If a method is not installed, or the work folder was made with another seed, device or
        time limit.
    """
    folder = settings.work / table.name
    folder.mkdir(parents=True, exist_ok=True)
    for trial in trials:
        if trial.method is not None and trial.method not in available():
            raise UsageError(f"method {trial.method} is not installed")
    _same_settings(folder / "settings.json", settings)
    cohort = table.prepare(data, folder)
    trained = settings.work / table.models_of if table.models_of else None
    prep = Prepared(cohort, folder, settings, trained)
    rows = Rows(folder / "rows.csv", [c.name for c in table.columns])
    _preprocess(table, trials, prep)
    for trial in trials:
        _run_trial(table, trial, prep, rows)
    rows.order(table.trials)
    return rows


def _same_settings(path: Path, settings: Settings) -> None:
    """What decides the figures must be that of what is in the work folder already.

    Raises
    ------
    UsageError
        If it is not.
    """
    mine = {"seed": settings.seed, "device": settings.device, "minutes": settings.minutes}
    if not path.is_file():
        write_json(path, mine)
        return
    theirs = json.loads(path.read_text())
    if theirs != mine:
        raise UsageError(f"{path.parent} was made with {theirs}, not {mine}; take another --work")


def forget(table: Table, labels: Sequence[str], work: Path) -> None:
    """Remove rows, models, adaptations and outputs of trials, so that they are made again."""
    folder = work / table.name
    forget_models(folder / "out" / "models", labels)
    for label in labels:
        desc = letters(label) + "?" * DIGITS
        for path in [
            *folder.glob(f"out/logs/desc-{desc}*"),
            *folder.glob(f"out/**/*_desc-{desc}_*"),
        ]:
            path.unlink()
    rows = Rows(folder / "rows.csv", [c.name for c in table.columns])
    rows.drop(set(labels))


def _preprocess(table: Table, trials: Sequence[Trial], prep: Prepared) -> None:
    """Masks, bias fields and transforms of the scans; the wall time is kept for `none`."""
    cohort = prep.cohort
    tested = sorted({s.subject for case in cohort.cases for s in case.scans})
    groups = [scans_of(cohort.bids_dir, sorted({*tested, *cohort.training}))]
    groups += [training_scans(trial, cohort) for trial in trials if trial.travellers]
    for scans in groups:
        masks = [derivative_path(prep.out_dir, s, desc="brain", suffix="mask") for s in scans]
        done = [mask.is_file() for mask in masks]
        if all(done):
            continue
        wall, cpu = prep.run(
            "participant", "--level", "minimal", *only_these(scans), *table.arguments(cohort)
        )
        count = done.count(False)
        if scans is groups[0]:  # travellers are no part of what the others are compared with
            note(prep.folder, "none", seconds=wall / count, cpu_seconds=cpu / count)


def _run_trial(table: Table, trial: Trial, prep: Prepared, rows: Rows) -> None:
    """By reference: make the model, harmonize, score."""
    by_reference: dict[str, list[Case]] = {}
    for case in trial.cases(prep.cohort):
        by_reference.setdefault(case.to or prep.cohort.reference, []).append(case)
    for to, cases in by_reference.items():
        digest, result = "", View(prep.scaled)
        if trial.method is not None:
            bundle = model_for(table, trial, to, prep)
            digest = load_bundle(bundle).hash
            if all(rows.has(trial.label, case, digest) for case in cases):
                continue
            result = harmonized(table, trial, bundle, cases, prep)
        for case in cases:
            if not rows.has(trial.label, case, digest):
                _add_row(table, trial, case, digest, result, prep, rows)


def _add_row(
    table: Table,
    trial: Trial,
    case: Case,
    digest: str,
    result: View,
    prep: Prepared,
    rows: Rows,
) -> None:
    print(f"{table.name}: {trial.label}, {case.condition}, {case.name}", flush=True)
    timing = timings(prep.folder).get(trial.label, {})
    scores, status = _score(table, case, result, prep)
    known = {
        **facts(prep.settings.seed, prep.settings.device),
        "model": digest[:12],
        **{k: timing.get(k, "") for k in TIMES},
    }
    rows.add(Row(trial.label, case.condition, case.name, case.person, status, scores, known))


def _score(table: Table, case: Case, result: View, prep: Prepared) -> tuple[dict[str, float], str]:
    try:
        return table.score(case, result, prep), "ok"
    except FileNotFoundError as error:
        return {}, f"no output ({Path(str(error.filename or error)).name})"
