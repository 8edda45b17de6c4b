"""Scans that go to the template with another of their session, their anchor: that one is first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby

from nipype.pipeline.engine import Workflow

from bids_harmony.bids.derivatives import Precomputed
from bids_harmony.bids.names import derivative_path
from bids_harmony.bids.scan import Scan
from bids_harmony.config import PROGRESS
from bids_harmony.errors import ExitCode
from bids_harmony.workflows.cohort import (
    BATCH,
    NOT_RUN,
    Outcome,
    batched,
    gigabytes,
    run_scans,
    short_label,
)
from bids_harmony.workflows.lock import one_at_a_time
from bids_harmony.workflows.reuse import find_given, is_preprocessed
from bids_harmony.workflows.scan import init_scan_wf
from bids_harmony.workflows.settings import Anchor, Job

LOG = logging.getLogger("bids_harmony")


def anchors_first(
    todo: Sequence[Scan],
    given: Mapping[str, Precomputed],
    job: Job,
    build: Callable[[Scan, Anchor | None], Workflow],
    run: Callable[[Sequence[Scan], Callable[[Scan], Workflow]], list[Outcome]],
    on_outcome: Callable[[Outcome], None],
) -> list[Outcome]:
    """Run scans in an order in which the anchor of each is preprocessed before it.

    An anchor that is not among the scans, and that no earlier run has left, is preprocessed too.
    Participants stay together: a run that is killed leaves most of them whole or untouched.

    Parameters
    ----------
    given
        What was found for each scan, by stem.
    build
        Makes the sub-workflow of a scan, from its anchor if it is registered to it.
    run
        `run_scans` with all but its first two arguments.
    on_outcome
        Is told of scans whose anchor cannot be used.

    Returns
    -------
    What became of the scans.
    """
    anchors: dict[str, Anchor] = {}

    def built(scan: Scan) -> Workflow:
        return build(scan, anchors.get(scan.stem))

    if not any(_waits(scan, given) for scan in todo):
        return run(todo, built)
    outcomes: list[Outcome] = []
    for group in _groups(todo):
        first = [scan for scan in group if not _waits(scan, given)]
        waiting = [scan for scan in group if _waits(scan, given)]
        done = run(first, built) if first else []
        ready, lost = _anchors_of(waiting, done, job)
        for outcome in lost:
            on_outcome(outcome)
        anchors |= ready
        rest = [scan for scan in waiting if scan.stem in ready]
        done = [*done, *lost, *(run(rest, built) if rest else [])]
        outcomes += done
        if _stops(done, job):
            break
    return outcomes


def _anchors_of(
    waiting: Sequence[Scan], done: Sequence[Outcome], job: Job
) -> tuple[dict[str, Anchor], list[Outcome]]:
    """Anchors of scans by stem, now preprocessed; what became of scans that have none."""
    needed = {s.anchor.stem: s.anchor for s in waiting if s.anchor}
    why = {outcome.stem: outcome for outcome in done}
    new = [a for stem, a in needed.items() if stem not in why and _resolved(a, job) is None]
    more = [] if _stops(done, job) else _preprocess(new, job)
    stop = _stops([*done, *more], job)
    why |= {outcome.stem: outcome for outcome in more}
    anchors = {} if stop else {stem: _resolved(a, job) for stem, a in needed.items()}
    ready: dict[str, Anchor] = {}
    lost = []
    for scan in waiting:
        assert scan.anchor is not None  # it would not wait
        anchor = anchors.get(scan.anchor.stem)
        if anchor is not None:
            ready[scan.stem] = anchor
        else:
            lost.append(_lost(scan, scan.anchor, why.get(scan.anchor.stem), stop))
    return ready, lost


def _stops(outcomes: Iterable[Outcome], job: Job) -> bool:
    return job.engine.stop_on_first_crash and any(o.status == "failed" for o in outcomes)


def _waits(scan: Scan, given: Mapping[str, Precomputed]) -> bool:
    """Whether it is to be registered to its anchor; no earlier run has done so."""
    found = given[scan.stem]
    return bool(scan.anchor and found.registered_to) and found.to_template is None


def _groups(scans: Sequence[Scan]) -> Iterator[list[Scan]]:
    """Whole participants, at least `BATCH` scans at once."""
    group: list[Scan] = []
    for _, mine in groupby(scans, key=lambda scan: scan.subject):
        group += mine
        if len(group) >= BATCH:
            yield group
            group = []
    if group:
        yield group


def _resolved(scan: Scan, job: Job) -> Anchor | None:
    """A scan as others are registered to it; None if it is not preprocessed."""
    found = find_given(scan, job)
    if not is_preprocessed(scan, job, found) or found.to_template is None:
        return None
    return Anchor(
        name=scan.stem,
        path=scan.path,
        mask=derivative_path(job.place.out_dir, scan, desc="brain", suffix="mask"),
        to_template=found.to_template,
        gigabytes=gigabytes(scan.path),
        bias_field=found.bias_field,
    )


def tell_for_session(outcome: Outcome) -> None:
    """Log that a scan was preprocessed which was not asked for itself."""
    if outcome.status == "preprocessed":
        LOG.log(PROGRESS, "%s: preprocessed, for its session", outcome.stem)


def _preprocess(scans: Sequence[Scan], job: Job) -> list[Outcome]:
    """Brain mask, bias field and registration of anchors that nothing else is done to."""

    def build(scan: Scan) -> Workflow:
        return init_scan_wf(
            scan=scan,
            prep=job.prep,
            target=None,
            place=job.place,
            given=find_given(scan, job),
            gigabytes=gigabytes(scan.path),
        )

    words = [job.prep.fingerprint, str(job.place.out_dir)]
    label = short_label(words)
    outcomes = []
    for some in batched(sorted(scans, key=lambda scan: scan.stem)):
        with ExitStack() as locks:
            for scan in some:  # in this order in every job, else two could wait for each other
                locks.enter_context(one_at_a_time(job.place.work_dir / "anchors", scan.stem))
            outcomes += run_scans(
                [scan for scan in some if _resolved(scan, job) is None],
                build,
                job.engine,
                status="preprocessed",
                last_nodes=frozenset({"write_preprocessed"}),
                clean=job.clean,
                on_outcome=tell_for_session,
                label=f"anchors_{label}",
            )
    return outcomes


def _lost(scan: Scan, anchor: Scan, cause: Outcome | None, stop: bool) -> Outcome:
    """Outcome of a scan that has nothing to be registered to."""
    failed = Outcome(scan.stem, scan.subject, "failed", exit_code=ExitCode.FAILURE)
    if cause is None or cause.exit_code == ExitCode.OK:
        gone = f"{scan.path}: what was preprocessed of {anchor.stem} was changed; run again"
        return replace(failed, message=NOT_RUN if stop else gone)
    cure = "; mend it, or leave it out with --bids-filter-file" * (cause.status == "refused")
    message = f"{scan.path}: registered with {anchor.stem}, of which: {cause.message}{cure}"
    return replace(cause, stem=scan.stem, subject=scan.subject, message=message, seconds=None)
