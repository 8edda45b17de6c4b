"""Run the same path for many scans: batches, live outcomes, work folders removed on the way."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import nibabel as nb
import numpy as np
from nipype.pipeline.engine import Workflow

from bids_harmony.bids.scan import Scan
from bids_harmony.errors import ExitCode
from bids_harmony.workflows.engine import Engine, run_graph
from bids_harmony.workflows.plugins import NodeFailure

Status = Literal["harmonized", "preprocessed", "skipped", "refused", "failed", "planned"]
BATCH = 64
NOT_RUN = "not run, because the run stopped at an earlier failure"
_BYTES_PER_VOXEL = 24
_UNKNOWN_GB = 1.0


@dataclass(frozen=True)
class Outcome:
    """What became of one scan.

    Attributes
    ----------
    stem, subject
        Of the scan.
    status
        ``refused``: the scan cannot be used; ``failed``: the software or machine gave up.
    message
        Why, in one line; empty when all went well.
    exit_code
        For the run, should this be its worst outcome.
    seconds
        From its first node's end to its last.
    traceback
        Of a failure.
    """

    stem: str
    subject: str
    status: Status
    message: str = ""
    exit_code: ExitCode = ExitCode.OK
    seconds: float | None = None
    traceback: str = ""


def gigabytes(path: Path) -> float:
    """Memory that one step on this scan needs, in GB, from its header alone."""
    try:
        shape = nb.loadsave.load(path).shape  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001  the conform node says what is wrong with the file
        return _UNKNOWN_GB
    return 0.3 + float(np.prod(shape)) * _BYTES_PER_VOXEL / 2**30


class _Watch:
    """Follows the nodes of one batch and tells when a scan is through."""

    def __init__(
        self,
        scans: dict[str, Scan],
        last_nodes: frozenset[str],
        status: Status,
        clean: Path | None,
        on_outcome: Callable[[Outcome], None],
    ) -> None:
        self._scans, self._last, self._status = scans, last_nodes, status
        self._clean, self._on_outcome = clean, on_outcome
        self._waiting = {name: set(last_nodes) for name in scans}
        self._since: dict[str, float] = {}
        self.done: list[Outcome] = []
        self._start = monotonic()

    def __call__(self, fullname: str, status: str) -> None:
        parts = fullname.split(".")
        name, node = parts[1], parts[-1]
        self._since.setdefault(name, monotonic())
        if status != "end" or node not in self._waiting[name]:
            return
        self._waiting[name].discard(node)
        if self._waiting[name]:
            return
        scan = self._scans[name]
        seconds = monotonic() - self._since[name]
        outcome = Outcome(scan.stem, scan.subject, self._status, seconds=seconds)
        self.done.append(outcome)
        if self._clean is not None:
            shutil.rmtree(self._clean / name, ignore_errors=True)
        self._on_outcome(outcome)


def run_scans(
    scans: Sequence[Scan],
    build: Callable[[Scan], Workflow],
    engine: Engine,
    *,
    status: Status,
    last_nodes: frozenset[str],
    clean: bool,
    on_outcome: Callable[[Outcome], None],
    label: str,
) -> list[Outcome]:
    """Run one sub-workflow per scan.

    Parameters
    ----------
    build
        Makes a scan's workflow, named as its work folder.
    status
        Of the scans that come through.
    last_nodes
        Names of the nodes after which a scan is through.
    clean
        Remove a scan's work folder once it is through.
    on_outcome
        Called as soon as a scan is through or, after its batch, has failed.
    label
        Part of the work folder's name: runs that differ never share one.
    """
    outcomes: list[Outcome] = []
    for batch in batched(scans):
        graph = Workflow(name=f"bids_harmony_{label}_wf")
        by_name = {}
        for scan in batch:
            part = build(scan)
            by_name[part.name] = scan
            graph.add_nodes([part])
        folder = engine.work_dir / graph.name
        watch = _Watch(by_name, last_nodes, status, folder if clean else None, on_outcome)
        failures = run_graph(graph, engine, n_scans=len(batch), on_node=watch)
        failed = [
            _failed(scan, failures, name)
            for name, scan in by_name.items()
            if scan.stem not in {o.stem for o in watch.done}
        ]
        for outcome in failed:
            on_outcome(outcome)
        outcomes += [*watch.done, *failed]
        if engine.stop_on_first_crash and failed:
            break
    return outcomes


def short_label(parts: Any) -> str:
    """Ten digits that tell the work files of one run from another's, from all that differs."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def batched(scans: Sequence[Scan]) -> Iterator[Sequence[Scan]]:
    """The scans, at most `BATCH` at once."""
    for start in range(0, len(scans), BATCH):
        yield scans[start : start + BATCH]


def _failed(scan: Scan, failures: Sequence[NodeFailure], name: str) -> Outcome:
    """Outcome of a scan that did not come through; its first failure tells why."""
    mine = [f for f in failures if f.node.split(".")[1:2] == [name]] or [
        f for f in failures if "." not in f.node
    ]
    if not mine:
        return Outcome(scan.stem, scan.subject, "failed", NOT_RUN, ExitCode.FAILURE)
    first = mine[0]
    refused = first.exit_code == ExitCode.DATA
    step = first.node.split(".")[-1]
    message = first.message if refused else f"{first.message} (step {step})"
    return Outcome(
        scan.stem,
        scan.subject,
        "refused" if refused else "failed",
        message,
        first.exit_code,
        traceback=first.traceback,
    )
