"""Preprocessed scans on a model's grid, kept in the work folder for training and adaptation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nipype.pipeline.engine import Node, Workflow

from bids_harmony.bids.derivatives import Precomputed
from bids_harmony.bids.scan import Scan
from bids_harmony.interfaces.ants import ApplyTransform
from bids_harmony.interfaces.files import sha256
from bids_harmony.interfaces.volumes import StoreVolume
from bids_harmony.methods.base import NATIVE_GRID, Contract
from bids_harmony.workflows.cohort import Outcome, gigabytes, run_scans
from bids_harmony.workflows.preprocess import init_preprocess_wf
from bids_harmony.workflows.reuse import find_given
from bids_harmony.workflows.scan import workflow_name
from bids_harmony.workflows.settings import Job, Preprocessing, given_files


def volume_key(prep: Preprocessing, contract: Contract) -> dict[str, Any]:
    """What decides the voxels of a stored volume, besides the scan."""
    return {
        **prep.fingerprint,
        "Grid": [contract.grid, contract.resolution],
        "Scale": contract.scale,
    }


def store_volumes(
    scans: Sequence[Scan],
    contract: Contract,
    grid_file: Path | None,
    job: Job,
    on_outcome: Callable[[Outcome], None],
) -> tuple[list[Path], list[Outcome]]:
    """Preprocess the scans whose volume is not in the work folder yet.

    Returns
    -------
    stems, outcomes
        Path without extension of each volume that could be made, in the order of the scans, and
        what became of the scans that were preprocessed now.
    """
    key = volume_key(job.prep, contract)
    label = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    folder = job.place.work_dir / "volumes" / label
    folder.mkdir(parents=True, exist_ok=True)
    given = {s.stem: find_given(s, job.folders, job.prep, job.place.out_dir) for s in scans}
    keys = {
        s.stem: {
            **key,
            "Site": s.site,
            "Session": s.session or "",
            "Given": given_files(given[s.stem], job.place.out_dir),
        }
        for s in scans
    }
    todo = [s for s in scans if not _is_stored(folder / s.stem, s, keys[s.stem])]

    def build(scan: Scan) -> Workflow:
        return _init_volume_wf(
            scan=scan, job=job, contract=contract, grid_file=grid_file, given=given[scan.stem],
            stem=folder / scan.stem, key=keys[scan.stem],
        )  # fmt: skip

    outcomes = run_scans(
        todo,
        build,
        job.engine,
        status="preprocessed",
        last_nodes=frozenset({"store", "write_preprocessed"}),
        clean=job.clean,
        on_outcome=on_outcome,
        label=f"train_{label}",
    )
    return [
        folder / s.stem for s in scans if _is_stored(folder / s.stem, s, keys[s.stem])
    ], outcomes


def _is_stored(stem: Path, scan: Scan, key: Mapping[str, Any]) -> bool:
    try:
        facts = json.loads(Path(f"{stem}.json").read_text())
        return bool(facts["key"] == {**key, "InputSHA256": sha256(scan.path)})
    except (OSError, ValueError, KeyError):
        return False


def _init_volume_wf(
    *,
    scan: Scan,
    job: Job,
    contract: Contract,
    grid_file: Path | None,
    given: Precomputed,
    stem: Path,
    key: dict[str, Any],
) -> Workflow:
    """Preprocessing of one scan, and its volume on the model's grid."""
    prep = job.prep
    size = gigabytes(scan.path)
    workflow = Workflow(name=workflow_name(scan))
    preprocess_wf = init_preprocess_wf(
        scan=scan,
        prep=prep,
        place=job.place,
        given=given,
        scale_kind=contract.scale,
        gigabytes=size,
        leave_out=("to_template",),
    )
    facts = {"modality": scan.suffix, "site": scan.site, "name": scan.stem}
    facts |= {"subject": scan.subject, "session": scan.session or ""}
    store = Node(StoreVolume(out_stem=str(stem), key=key, facts=facts), name="store", mem_gb=size)
    workflow.connect([
        (preprocess_wf, store, [("outputnode.scale", "scale"),
                                ("outputnode.checksum", "checksum")]),
    ])  # fmt: skip
    for field, interpolation in (("scaled_file", "linear"), ("mask_file", "nearestNeighbor")):
        if contract.grid == NATIVE_GRID:
            workflow.connect(preprocess_wf, f"outputnode.{field}", store, field)
            continue
        to_grid = Node(
            ApplyTransform(
                reference_file=str(grid_file),
                interpolation=interpolation,
                num_threads=prep.threads,
                random_seed=prep.seed,
            ),
            name=f"{field}_to_grid",
            n_procs=prep.threads,
            mem_gb=size,
        )
        workflow.connect([
            (preprocess_wf, to_grid, [
                (f"outputnode.{field}", "in_file"), ("outputnode.transform_file", "transforms"),
            ]),
            (to_grid, store, [("out_file", field)]),
        ])  # fmt: skip
    return workflow
