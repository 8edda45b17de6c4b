"""For methods that harmonize the scans of a session together: find the others, preprocess them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from bids_harmony.bids.scan import Scan, ScanProblem, first_of_session
from bids_harmony.errors import ExitCode
from bids_harmony.workflows.cohort import NOT_RUN, Outcome
from bids_harmony.workflows.reuse import made_of
from bids_harmony.workflows.settings import Job, Other, Target
from bids_harmony.workflows.volumes import store_volumes


def find_others(
    scans: Sequence[Scan],
    pool: Sequence[Scan],
    problems: Sequence[ScanProblem],
    target: Target,
    job: Job,
) -> tuple[dict[str, dict[str, Other]], list[Outcome]]:
    """The other modalities of each scan's session: the first of each, by path.

    Parameters
    ----------
    pool, problems
        All scans of the participants, of all modalities of the contract, and those of them that
        cannot be used.

    Returns
    -------
    others, refused
        By stem and modality; scans whose session lacks a modality.
    """
    others: dict[str, dict[str, Other]] = {}
    refused = []
    for scan in scans:
        needed = [m for m in target.contract.modalities if m != scan.suffix]
        found = {m: first_of_session(scan, m, pool) for m in needed}
        missing = [m for m, other in found.items() if other is None]
        if missing:
            message = (
                f"{scan.path}: model {target.name} harmonizes {' and '.join(needed)} together "
                f"with {scan.suffix}, and {_why(scan, missing[0], pool, problems)}"
            )
            refused.append(Outcome(scan.stem, scan.subject, "refused", message, ExitCode.DATA))
            continue
        others[scan.stem] = {
            m: Other(other, made_of(other, job)) for m, other in found.items() if other
        }
    return others, refused


def store_others(
    scans: Sequence[Scan], target: Target, job: Job, on_outcome: Callable[[Outcome], None]
) -> tuple[dict[str, dict[str, Other]], list[Outcome]]:
    """Preprocess what some scans are harmonized together with onto the model's grid.

    Returns
    -------
    others, lost
        `target.others`, with the paths of these scans' volumes; scans whose others could not be
        preprocessed.
    """
    made = {stem: dict(others) for stem, others in target.others.items()}
    wanted = {o.scan.stem: o.scan for scan in scans for o in made[scan.stem].values()}
    contract = replace(target.contract, labels=False, together=False)
    stems, outcomes = store_volumes(
        list(wanted.values()), contract, target.grid_file, job, on_outcome
    )
    places = {stem.name: stem for stem in stems}
    why = {o.stem: o for o in outcomes if o.exit_code != ExitCode.OK}
    lost = []
    for scan in scans:
        mine = made[scan.stem]
        gone = [o.scan for o in mine.values() if o.scan.stem not in places]
        if not gone:
            made[scan.stem] = {m: replace(o, stem=places[o.scan.stem]) for m, o in mine.items()}
            continue
        unknown = Outcome(gone[0].stem, scan.subject, "failed", NOT_RUN, ExitCode.FAILURE)
        cause = why.get(gone[0].stem, unknown)
        message = f"{scan.path}: to go together with {gone[0].stem}, of which: {cause.message}"
        lost.append(replace(cause, stem=scan.stem, subject=scan.subject, message=message))
    return made, lost


def _why(scan: Scan, modality: str, pool: Sequence[Scan], problems: Sequence[ScanProblem]) -> str:
    """Why a scan's session lacks a modality."""
    for problem in problems:
        if problem.subject == scan.subject and f"_{modality}." in problem.path.name:
            return f"its {modality} cannot be used: {problem.message}"
    for other in pool:
        same = (other.subject, other.session) == (scan.subject, scan.session)
        if same and other.suffix == modality:
            return f"the session's {modality} is of another site ({other.site}, not {scan.site})"
    return f"the session has no {modality}; use a model that was trained on {scan.suffix} alone"
