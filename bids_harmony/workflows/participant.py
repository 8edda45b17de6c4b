"""The participant level: what is left to do, doing it, and the pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from nipype.pipeline.engine import Workflow

from bids_harmony.bids.derivatives import Precomputed
from bids_harmony.bids.names import fragment_path
from bids_harmony.bids.scan import Scan
from bids_harmony.workflows.anchors import anchors_first
from bids_harmony.workflows.cohort import Outcome, gigabytes, run_scans, short_label
from bids_harmony.workflows.reuse import find_given, is_done, is_preprocessed
from bids_harmony.workflows.scan import init_scan_wf
from bids_harmony.workflows.settings import Anchor, Job, Target, scan_settings


def split_done(
    scans: Sequence[Scan], target: Target | None, job: Job
) -> tuple[dict[str, Precomputed], list[Scan], list[Scan]]:
    """Which scans an earlier run has finished with the same settings.

    Returns
    -------
    given, todo, done
        Precomputed masks and transforms by stem; scans to run; scans to skip.
    """
    given: dict[str, Precomputed] = {}
    todo: list[Scan] = []
    done: list[Scan] = []
    for scan in scans:
        found = find_given(scan, job)
        given[scan.stem] = found
        if target is None:
            finished = is_preprocessed(scan, job, found)
        else:
            settings = scan_settings(scan, job.prep, target, job.place, found)
            finished = is_done(scan, job.place, settings, segments=target.segments)
        (done if finished else todo).append(scan)
    return given, todo, done


def forget_sections(scans: Sequence[Scan], job: Job) -> None:
    """Remove the report sections of earlier runs, whose settings are not this run's."""
    for scan in scans:
        fragment_path(job.place.out_dir, scan, job.place.desc).unlink(missing_ok=True)


def harmonize_scans(
    scans: Sequence[Scan],
    target: Target | None,
    job: Job,
    on_outcome: Callable[[Outcome], None],
) -> list[Outcome]:
    """Harmonize (or, without a target, only preprocess) every scan that is not done yet."""
    given, todo, done = split_done(scans, target, job)
    outcomes = [Outcome(s.stem, s.subject, "skipped", "done by an earlier run") for s in done]
    for outcome in outcomes:
        on_outcome(outcome)

    if target is not None:
        forget_sections(todo, job)

    def build(scan: Scan, anchor: Anchor | None) -> Workflow:
        return init_scan_wf(
            scan=scan,
            prep=job.prep,
            target=target,
            place=job.place,
            given=given[scan.stem],
            anchor=anchor,
            gigabytes=gigabytes(scan.path),
        )

    last = {"write_preprocessed"} if target is None else {"write", "report", "write_preprocessed"}
    last |= {"write_tissues"} if target and target.segments else set()

    run = partial(
        run_scans,
        engine=job.engine,
        status="preprocessed" if target is None else "harmonized",
        last_nodes=frozenset(last),
        clean=job.clean,
        on_outcome=on_outcome,
        label=_label(target, job),
    )
    return outcomes + anchors_first(todo, given, job, build, run, on_outcome)


def _label(target: Target | None, job: Job) -> str:
    """Short checksum of what tells this run's work files from another's."""
    model = [target.hash, target.adapt] if target else []
    parts = [job.prep.fingerprint, model, str(job.place.out_dir), job.place.desc]
    return short_label(parts)
