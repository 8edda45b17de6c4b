"""The train level: preprocess the reference site's scans, fit a method, write the bundle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, overload

import nibabel as nb
import numpy as np
from nipype.pipeline.engine import Node, Workflow

from bids_harmony.bids.derivatives import Precomputed
from bids_harmony.bids.scan import Scan
from bids_harmony.errors import NothingSelectedError, UsageError
from bids_harmony.imaging.quantiles import mid_quantiles
from bids_harmony.imaging.scale import IntensityScale, median_scale
from bids_harmony.interfaces.ants import ApplyTransform
from bids_harmony.interfaces.files import load, load_mask, sha256
from bids_harmony.interfaces.harmonize import StoreVolume
from bids_harmony.methods.base import NATIVE_GRID, Contract, Method, Volume
from bids_harmony.methods.bundle import save_bundle
from bids_harmony.methods.registry import load as load_method
from bids_harmony.workflows.cohort import Outcome, gigabytes, run_scans
from bids_harmony.workflows.engine import Engine
from bids_harmony.workflows.models import reference_words
from bids_harmony.workflows.preprocess import init_preprocess_wf
from bids_harmony.workflows.reuse import find_given
from bids_harmony.workflows.scan import workflow_name
from bids_harmony.workflows.settings import Place, Preprocessing, given_files

_QUANTILES = 2001


class StoredVolumes(Sequence[Volume]):
    """Training volumes on disk, each read when it is asked for."""

    def __init__(self, stems: Sequence[Path]) -> None:
        self._stems = list(stems)
        self.facts = [json.loads(Path(f"{s}.json").read_text()) for s in self._stems]

    def __len__(self) -> int:
        return len(self._stems)

    @overload
    def __getitem__(self, index: int) -> Volume: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Volume]: ...
    def __getitem__(self, index: int | slice) -> Volume | Sequence[Volume]:
        if isinstance(index, slice):
            return StoredVolumes(self._stems[index])
        stem, facts = self._stems[index], self.facts[index]
        data, affine = load(f"{stem}_scaled.nii")
        zooms = nb.affines.voxel_sizes(affine)
        return Volume(
            data=data,
            mask=load_mask(f"{stem}_mask.nii"),
            modality=facts["modality"],
            spacing=(float(zooms[0]), float(zooms[1]), float(zooms[2])),
            site=facts["site"],
            name=facts["name"],
            subject=facts["subject"],
        )


def training_scans(scans: Sequence[Scan], reference: str) -> list[Scan]:
    """Scans of the reference: all of a site, or the one file that was named.

    Raises
    ------
    NothingSelectedError
        If neither a site nor a scan of the data set has this name.
    """
    path = Path(reference).absolute()
    chosen = [s for s in scans if s.site == reference] or [s for s in scans if s.path == path]
    if not chosen:
        sites = ", ".join(sorted({s.site for s in scans}))
        raise NothingSelectedError(
            f"--reference {reference}: no scan of this site, nor is it a scan of the data set; "
            f"its sites are {sites}"
        )
    return chosen


def fit_reference(
    scans: Sequence[Scan],
    *,
    method: str,
    name: str,
    reference: str,
    prep: Preprocessing,
    place: Place,
    grid_file: Path | None,
    folders: Mapping[str, Path],
    engine: Engine,
    clean: bool,
    on_outcome: Callable[[Outcome], None],
) -> tuple[Path, list[Outcome]]:
    """Fit a method on scans of the reference domain and write its bundle below OUT_DIR/models.

    Scans that cannot be used are left out and told; concurrent jobs write the same bundle.

    Returns
    -------
    folder, outcomes
        The bundle, and what became of each training scan.

    Raises
    ------
    UsageError
        If no scan is left to learn from.
    """
    kind = load_method(method)
    contract = kind.contract_for(sorted({s.suffix for s in scans}))
    stems, outcomes = _volumes(
        scans, contract, prep, place, grid_file, folders, engine, clean, on_outcome
    )
    if not stems:
        raise UsageError(f"--reference {reference}: none of its {len(scans)} scans can be used")
    volumes = StoredVolumes(stems)
    model = kind.fit(volumes, seed=prep.seed)
    folder = place.out_dir / "models" / name
    save_bundle(folder, model, meta=_meta(model, volumes, name, reference, prep))
    return folder, outcomes


def _volumes(
    scans: Sequence[Scan],
    contract: Contract,
    prep: Preprocessing,
    place: Place,
    grid_file: Path | None,
    folders: Mapping[str, Path],
    engine: Engine,
    clean: bool,
    on_outcome: Callable[[Outcome], None],
) -> tuple[list[Path], list[Outcome]]:
    """Preprocess the scans whose volume is not in the work folder yet."""
    key = {
        **prep.fingerprint,
        "Grid": [contract.grid, contract.resolution],
        "Scale": contract.scale,
    }
    label = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    folder = place.work_dir / "volumes" / label
    folder.mkdir(parents=True, exist_ok=True)
    given = {s.stem: find_given(s, folders, prep, place.out_dir) for s in scans}
    keys = {
        s.stem: {**key, "Site": s.site, "Given": given_files(given[s.stem], place.out_dir)}
        for s in scans
    }
    todo = [s for s in scans if not _is_stored(folder / s.stem, s, keys[s.stem])]

    def build(scan: Scan) -> Workflow:
        return _init_volume_wf(
            scan=scan, prep=prep, place=place, contract=contract, grid_file=grid_file,
            given=given[scan.stem], stem=folder / scan.stem, key=keys[scan.stem],
        )  # fmt: skip

    outcomes = run_scans(
        todo,
        build,
        engine,
        status="preprocessed",
        last_nodes=frozenset({"store", "write_preprocessed"}),
        clean=clean,
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
    prep: Preprocessing,
    place: Place,
    contract: Contract,
    grid_file: Path | None,
    given: Precomputed,
    stem: Path,
    key: dict[str, Any],
) -> Workflow:
    """Preprocessing of one training scan, and its volume on the model's grid."""
    size = gigabytes(scan.path)
    workflow = Workflow(name=workflow_name(scan))
    preprocess_wf = init_preprocess_wf(
        scan=scan,
        prep=prep,
        place=place,
        given=given,
        scale_kind=contract.scale,
        gigabytes=size,
        leave_out=("to_template",),
    )
    facts = {"modality": scan.suffix, "site": scan.site, "name": scan.stem}
    facts["subject"] = scan.subject
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


def _meta(
    model: Method, volumes: StoredVolumes, name: str, reference: str, prep: Preprocessing
) -> dict[str, Any]:
    """What the bundle says of itself, and the reference domain's scale and quantiles."""
    probability = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    curves: dict[str, list[Any]] = {}
    scales: dict[str, list[IntensityScale]] = {}
    for volume, facts in zip(volumes, volumes.facts, strict=True):
        values = np.asarray(volume.data[volume.mask], dtype=np.float64)
        curves.setdefault(volume.modality, []).append(mid_quantiles(values, probability))
        scales.setdefault(volume.modality, []).append(IntensityScale.from_dict(facts["scale"]))
    means = {m: np.mean(c, axis=0) for m, c in curves.items()}
    spread = {
        m: round(float(np.mean([np.abs(c - means[m]).mean() for c in curves[m]])), 5)
        for m in means
    }
    return {
        "name": name,
        "reference": reference_words(reference),
        "training_sites": sorted({f["site"] for f in volumes.facts}),
        "training_subjects": sorted({f["subject"] for f in volumes.facts}),
        "training_scans": {m: len(c) for m, c in curves.items()},
        "seed": prep.seed,
        "preprocessing": prep.fingerprint,
        "scores": {"mean Wasserstein distance of a training scan to their mean": spread},
        "output_scale": {m: median_scale(s).to_dict() for m, s in scales.items()},
        "reference_quantiles": {m: np.round(q, 6).tolist() for m, q in means.items()},
    }


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let concurrent jobs fit a bundle in turn where the file system has locks.

    Without locks they fit at the same time and write the same bundle.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
