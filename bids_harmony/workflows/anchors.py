"""Scans that go to the template with another of their session, their anchor: that one is first."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from nipype.pipeline.engine import Workflow

from bids_harmony.bids.derivatives import Precomputed
from bids_harmony.bids.names import derivative_path
from bids_harmony.bids.scan import Scan
from bids_harmony.config import PROGRESS
from bids_harmony.errors import ExitCode
from bids_harmony.workflows.cohort import NOT_RUN, Outcome, gigabytes, run_scans
from bids_harmony.workflows.preprocess import init_preprocess_wf
from bids_harmony.workflows.reuse import find_given, is_preprocessed
from bids_harmony.workflows.scan import workflow_name
from bids_harmony.workflows.settings import Anchor, Job

LOG = logging.getLogger("bids_harmony")


def anchors_first(
    todo: Sequence[Scan],
    given: Mapping[str, Precomputed],
    job: Job,
    run: Callable[[Sequence[Scan]], list[Outcome]],
    on_outcome: Callable[[Outcome], None],
) -> list[Outcome]:
    """Run scans in an order in which the anchor of each is preprocessed before it.

    An anchor that is not among the scans, and that no earlier run has left, is preprocessed too.

    Parameters
    ----------
    given
        What was found for each scan, by stem.
    run
        Does to some scans what is to be done, and tells their outcomes.
    on_outcome
        Is told of scans whose anchor cannot be used.

    Returns
    -------
    What became of the scans of `todo`.
    """
    waiting = {s.stem: s.anchor for s in todo if s.anchor and _waits(given[s.stem])}
    if not waiting:
        return run(todo)
    first = [s for s in todo if s.stem not in waiting]
    outcomes = run(first) if first else []
    missing = {a.stem: a for a in waiting.values() if not _is_there(a, job)}
    tried = {s.stem for s in first}
    stop = job.engine.stop_on_first_crash and any(o.status == "failed" for o in outcomes)
    more = [] if stop else [a for stem, a in missing.items() if stem not in tried]
    why = {o.stem: o for o in [*outcomes, *_preprocess(more, job)]}
    ready = []
    for scan in todo:
        anchor = waiting.get(scan.stem)
        if anchor is None:
            continue
        if not stop and (anchor.stem not in missing or _is_there(anchor, job)):
            ready.append(scan)
            continue
        outcomes.append(_lost(scan, anchor, None if stop else why.get(anchor.stem)))
        on_outcome(outcomes[-1])
    return outcomes + (run(ready) if ready else [])


def anchor_of(scan: Scan, given: Precomputed, job: Job) -> Anchor | None:
    """What the scan is registered with; None when its way to the template is known or its own."""
    if scan.anchor is None or not _waits(given):
        return None
    other, out_dir = scan.anchor, job.place.out_dir
    theirs = find_given(other, job)
    assert theirs.to_template is not None  # `anchors_first` has seen to it
    return Anchor(
        name=other.stem,
        path=other.path,
        mask=derivative_path(out_dir, other, desc="brain", suffix="mask"),
        to_template=theirs.to_template,
        gigabytes=gigabytes(other.path),
        bias_field=theirs.bias_field,
    )


def _waits(given: Precomputed) -> bool:
    return bool(given.registered_to) and given.to_template is None


def _is_there(scan: Scan, job: Job) -> bool:
    return is_preprocessed(scan, job, find_given(scan, job))


def _preprocess(scans: Sequence[Scan], job: Job) -> list[Outcome]:
    """Brain mask, bias field and registration of anchors that nothing else is done to."""

    def build(scan: Scan) -> Workflow:
        workflow = Workflow(name=workflow_name(scan))
        part = init_preprocess_wf(
            scan=scan,
            prep=job.prep,
            place=job.place,
            given=find_given(scan, job),
            scale_kind="robust",
            gigabytes=gigabytes(scan.path),
            leave_out=("scale", "to_template"),
        )
        workflow.add_nodes([part])
        return workflow

    def tell(outcome: Outcome) -> None:
        if outcome.status == "preprocessed":
            LOG.log(PROGRESS, "%s: preprocessed, for its session", outcome.stem)

    words = [job.prep.fingerprint, str(job.place.out_dir)]
    label = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:10]
    return run_scans(
        scans,
        build,
        job.engine,
        status="preprocessed",
        last_nodes=frozenset({"write_preprocessed"}),
        clean=job.clean,
        on_outcome=tell,
        label=f"anchors_{label}",
    )


def _lost(scan: Scan, anchor: Scan, cause: Outcome | None) -> Outcome:
    """Outcome of a scan that has nothing to be registered to."""
    cause = cause or Outcome(anchor.stem, scan.subject, "failed", NOT_RUN, ExitCode.FAILURE)
    cure = "; mend it, or leave it out with --bids-filter-file" * (cause.status == "refused")
    message = f"{scan.path}: registered with {anchor.stem}, of which: {cause.message}{cure}"
    return replace(cause, stem=scan.stem, subject=scan.subject, message=message, seconds=None)
