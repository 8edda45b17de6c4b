"""For methods that harmonize the scans of a session together: find the others, preprocess them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from bids_harmony.bids.scan import Scan
from bids_harmony.errors import ExitCode
from bids_harmony.workflows.cohort import Outcome
from bids_harmony.workflows.reuse import checksum_of, find_given
from bids_harmony.workflows.settings import Job, Other, Target, given_files
from bids_harmony.workflows.volumes import store_volumes

Others = Mapping[str, Mapping[str, Other]]


def find_others(
    scans: Sequence[Scan], pool: Sequence[Scan], target: Target, job: Job
) -> tuple[dict[str, dict[str, Other]], list[Outcome]]:
    """The other modalities of each scan's session: the first of each, by path.

    Parameters
    ----------
    pool
        All scans of the participants, of all modalities of the contract.

    Returns
    -------
    others, refused
        By stem and modality; scans whose session lacks a modality.
    """
    first: dict[tuple[str, str | None, str], dict[str, Scan]] = {}
    for scan in sorted(pool, key=lambda s: s.path):
        first.setdefault(_session(scan), {}).setdefault(scan.suffix, scan)
    others: dict[str, dict[str, Other]] = {}
    refused = []
    for scan in scans:
        there = first.get(_session(scan), {})
        needed = [m for m in target.contract.modalities if m != scan.suffix]
        missing = [m for m in needed if m not in there]
        if missing:
            message = (
                f"{scan.path}: model {target.name} harmonizes {' and '.join(sorted(needed))} "
                f"together with {scan.suffix}, and the session has no {' and no '.join(missing)}; "
                f"train {target.method} on {scan.suffix} alone"
            )
            refused.append(_lost(scan, message))
            continue
        others[scan.stem] = {m: Other(there[m], _made_of(there[m], job)) for m in needed}
    return others, refused


def store_others(
    scans: Sequence[Scan],
    others: Others,
    target: Target,
    job: Job,
    on_outcome: Callable[[Outcome], None],
) -> tuple[dict[str, dict[str, Other]], list[Outcome]]:
    """Preprocess the others onto the model's grid.

    Returns
    -------
    others, lost
        With the paths of their volumes; scans whose others could not be preprocessed.
    """
    wanted = {o.scan.stem: o.scan for by_modality in others.values() for o in by_modality.values()}
    contract = replace(target.contract, labels=False)
    stems, outcomes = store_volumes(
        list(wanted.values()), contract, target.grid_file, job, on_outcome
    )
    places = {stem.name: stem for stem in stems}
    why = {outcome.stem: outcome for outcome in outcomes}
    made: dict[str, dict[str, Other]] = {}
    lost = []
    for scan in scans:
        mine = others[scan.stem]
        gone = [o.scan.stem for o in mine.values() if o.scan.stem not in places]
        if gone:
            outcome = why[gone[0]]
            message = f"{scan.path}: harmonized together with {gone[0]}, of which: "
            lost.append(_lost(scan, message + outcome.message, outcome))
            continue
        made[scan.stem] = {m: replace(o, stem=places[o.scan.stem]) for m, o in mine.items()}
    return made, lost


def _lost(scan: Scan, message: str, cause: Outcome | None = None) -> Outcome:
    if cause is None:
        return Outcome(scan.stem, scan.subject, "refused", message, ExitCode.DATA)
    return replace(cause, stem=scan.stem, subject=scan.subject, message=message)


def _session(scan: Scan) -> tuple[str, str | None, str]:
    return scan.subject, scan.session, scan.site


def _made_of(scan: Scan, job: Job) -> str:
    given = find_given(scan, job.folders, job.prep, job.place.out_dir)
    theirs = given_files(given, job.place.out_dir)
    words = [f"{scan.stem} (sha256 {checksum_of(scan)[:12]})"]
    return ", ".join([*words, *(f"{kind} {text}" for kind, text in sorted(theirs.items()))])
