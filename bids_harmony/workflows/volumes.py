"""Preprocessed scans on a model's grid, kept in the work folder for training and adaptation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nipype.pipeline.engine import Node, Workflow

from bids_harmony.bids.derivatives import Precomputed
from bids_harmony.bids.scan import Scan
from bids_harmony.bids.tissue_labels import TissueLabels, find_tissue_labels
from bids_harmony.errors import ExitCode
from bids_harmony.imaging.tissues import TISSUES
from bids_harmony.interfaces.ants import ApplyTransform
from bids_harmony.interfaces.files import sha256
from bids_harmony.interfaces.tissues import ReadTissueLabels
from bids_harmony.interfaces.volumes import StoreVolume
from bids_harmony.methods.base import NATIVE_GRID, Contract
from bids_harmony.methods.sessions import SessionKey, session_key
from bids_harmony.workflows.anchors import anchors_first
from bids_harmony.workflows.cohort import Outcome, gigabytes, run_scans
from bids_harmony.workflows.preprocess import init_preprocess_wf
from bids_harmony.workflows.reuse import find_given
from bids_harmony.workflows.scan import workflow_name
from bids_harmony.workflows.settings import Anchor, Job, Preprocessing, given_files


def volume_key(prep: Preprocessing, contract: Contract) -> dict[str, Any]:
    """What decides the voxels of a stored volume, besides the scan."""
    return {
        **prep.fingerprint,
        "Grid": [contract.grid, contract.resolution],
        "Scale": contract.scale,
        **({"Labels": "tissues"} if contract.labels else {}),
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
    labels, refused = _labels(scans, job) if contract.labels else ({}, [])
    if contract.together:
        refused = _not_whole(scans, contract, labels)
    for outcome in refused:
        on_outcome(outcome)
    lost = {outcome.stem for outcome in refused}
    scans = [s for s in scans if s.stem not in lost]
    given = {s.stem: find_given(s, job) for s in scans}
    keys = {
        s.stem: {
            **key,
            "Site": s.site,
            "Session": s.session or "",
            "Given": given_files(given[s.stem], job.place.out_dir),
            **({"RegisteredTo": to} if (to := given[s.stem].registered_to) else {}),
            **({"Labels": _labels_key(labels[s.stem])} if s.stem in labels else {}),
        }
        for s in scans
    }
    todo = [s for s in scans if not _is_stored(folder / s.stem, s, keys[s.stem])]

    def build(scan: Scan, anchor: Anchor | None) -> Workflow:
        return _init_volume_wf(
            scan=scan, job=job, contract=contract, grid_file=grid_file, given=given[scan.stem],
            anchor=anchor, stem=folder / scan.stem, key=keys[scan.stem],
            labels=labels.get(scan.stem),
        )  # fmt: skip

    run = partial(
        run_scans,
        engine=job.engine,
        status="preprocessed",
        last_nodes=frozenset({"store", "write_preprocessed"}),
        clean=job.clean,
        on_outcome=on_outcome,
        label=f"train_{label}",
    )
    outcomes = anchors_first(todo, given, job, build, run, on_outcome)
    stems = [folder / s.stem for s in scans if _is_stored(folder / s.stem, s, keys[s.stem])]
    return stems, [*refused, *outcomes]


def _labels(scans: Sequence[Scan], job: Job) -> tuple[dict[str, TissueLabels], list[Outcome]]:
    """Tissue labels by stem, and a refusal of each scan that has none."""
    found, refused = {}, []
    for scan in scans:
        labels, notes = find_tissue_labels(scan, job.folders)
        if labels is not None:
            found[scan.stem] = labels
            continue
        why = "; ".join(notes) or "name derivatives that have them with --derivatives"
        message = f"{scan.path}: no tissue labels to learn from: {why}"
        refused.append(Outcome(scan.stem, scan.subject, "refused", message, ExitCode.DATA))
    return found, refused


def _not_whole(
    scans: Sequence[Scan], contract: Contract, labels: Mapping[str, TissueLabels]
) -> list[Outcome]:
    """A refusal of each scan whose session lacks a modality, or labels of any of its scans."""
    sessions: dict[SessionKey, list[Scan]] = {}
    for scan in scans:
        key = session_key(scan.site, scan.subject, scan.session or "", scan.stem)
        sessions.setdefault(key, []).append(scan)
    refused = []
    for found in sessions.values():
        there = {scan.suffix for scan in found}
        missing = [m for m in contract.modalities if m not in there]
        why = f"the session has no {' and no '.join(missing)} of the same site" if missing else ""
        if contract.labels and not any(scan.stem in labels for scan in found):
            why = (
                why
                or "no scan of the session has tissue labels; name derivatives with --derivatives"
            )
        refused += [
            Outcome(s.stem, s.subject, "refused", f"{s.path}: {why}", ExitCode.DATA)
            for s in found
            if why
        ]
    return refused


def _labels_key(labels: TissueLabels) -> dict[str, Any]:
    """Source, checksums and meaning of a scan's labels: labels that were mended are others."""
    sums = {name: sha256(path)[:12] for name, path in sorted(labels.files.items())}
    mapping = {str(number): tissue for number, tissue in sorted(labels.mapping.items())}
    return {"source": labels.source, **sums, "mapping": mapping}


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
    anchor: Anchor | None,
    stem: Path,
    key: dict[str, Any],
    labels: TissueLabels | None,
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
        anchor=anchor,
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
    moved = [
        (preprocess_wf, f"outputnode.{field}", field, interpolation)
        for field, interpolation in (("scaled_file", "linear"), ("mask_file", "nearestNeighbor"))
    ]
    if labels is not None:
        read = _read_labels(workflow, labels, contract, size)
        moved += [(read, tissue, tissue, "linear") for tissue in TISSUES]
    for source, output, field, interpolation in moved:
        if contract.grid == NATIVE_GRID:
            workflow.connect(source, output, store, field)
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
            (source, to_grid, [(output, "in_file")]),
            (preprocess_wf, to_grid, [("outputnode.transform_file", "transforms")]),
            (to_grid, store, [("out_file", field)]),
        ])  # fmt: skip
    return workflow


def _read_labels(
    workflow: Workflow, labels: TissueLabels, contract: Contract, size: float
) -> Node:
    """Shares of the tissues in the scan's world space; on a native contract on its grid."""
    files = {name: str(path) for name, path in labels.files.items()}
    read = Node(
        ReadTissueLabels(files=files, mapping=dict(labels.mapping)), name="labels", mem_gb=size
    )
    workflow.add_nodes([read])
    if contract.grid == NATIVE_GRID:
        source = workflow.get_node("preprocess_wf")
        workflow.connect(source, "outputnode.scaled_file", read, "grid_file")
    return read
