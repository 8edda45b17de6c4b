"""The train level: preprocess scans, fit a method, write the bundle."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bids_harmony._version import __version__
from bids_harmony.bids.scan import Scan
from bids_harmony.errors import (
    ExitCode,
    HarmonyError,
    NothingSelectedError,
    ScanError,
    UsageError,
)
from bids_harmony.imaging.quantiles import mid_quantiles
from bids_harmony.imaging.scale import IntensityScale, median_scale
from bids_harmony.interfaces.files import sha256
from bids_harmony.interfaces.volumes import StoredVolumes, VolumesInSessions
from bids_harmony.methods.base import Contract, Method, NeuralMethod, Training, Volume
from bids_harmony.methods.bundle import save_bundle
from bids_harmony.methods.registry import load as load_method
from bids_harmony.workflows.cohort import Outcome
from bids_harmony.workflows.lock import one_at_a_time
from bids_harmony.workflows.models import reference_words
from bids_harmony.workflows.settings import Job, Preprocessing
from bids_harmony.workflows.volumes import store_volumes

LOG = logging.getLogger("bids_harmony")
_QUANTILES = 2001
_PROBABILITY = (np.arange(_QUANTILES) + 0.5) / _QUANTILES


@dataclass(frozen=True)
class Fit:
    """What is fitted on what.

    Attributes
    ----------
    method, name
        Of the method and of the bundle.
    reference
        Site, participant or scan, as the user named it.
    grid_file
        Template image on the contract's grid; None on the native grid.
    training
        For neural methods; its folder is found here.
    """

    method: str
    name: str
    reference: str
    grid_file: Path | None = None
    training: Training = field(default_factory=Training)


def contract_while_fitting(
    kind: type[Method], modalities: Sequence[str], training: Training
) -> Contract:
    """What a method wants to be given for training; `training` matters to neural methods."""
    if issubclass(kind, NeuralMethod):
        return kind.contract_to_fit(modalities, training)
    return kind.contract_for(modalities)


def training_scans(scans: Sequence[Scan], reference: str) -> list[Scan]:
    """Scans of the reference: all of a site or a participant, or the one file that was named.

    Raises
    ------
    NothingSelectedError
        If neither a site, a participant nor a scan of the data set has this name.
    UsageError
        If the participant was scanned at several sites.
    """
    path, subject = Path(reference).absolute(), reference.removeprefix("sub-")
    chosen = [s for s in scans if s.site == reference] or [s for s in scans if s.path == path]
    if not chosen:
        chosen = [s for s in scans if s.subject == subject]
        sites = ", ".join(sorted({s.site for s in chosen}))
        if len({s.site for s in chosen}) > 1:
            raise UsageError(
                f"--reference {reference}: this participant was scanned at several sites "
                f"({sites}); name one of the scans by its path"
            )
    if not chosen:
        sites = ", ".join(sorted({s.site for s in scans}))
        raise NothingSelectedError(
            f"--reference {reference}: no scan of this site or participant, nor is it a scan of "
            f"the data set; its sites are {sites}"
        )
    return chosen


def fit_reference(
    scans: Sequence[Scan], fit: Fit, job: Job, on_outcome: Callable[[Outcome], None]
) -> tuple[Path, list[Outcome]]:
    """Fit a method and write its bundle below OUT_DIR/models.

    Scans that cannot be used are left out and told; concurrent jobs write the same bundle.

    Parameters
    ----------
    scans
        Of the reference domain; for methods that harmonize by example, of all sites.

    Returns
    -------
    folder, outcomes
        The bundle, and what became of each training scan.

    Raises
    ------
    UsageError
        If no scan is left to learn from.
    """
    kind = load_method(fit.method)
    modalities = sorted({s.suffix for s in scans})
    contract = contract_while_fitting(kind, modalities, fit.training)
    stems, outcomes = preprocessed(scans, contract, fit.grid_file, job, on_outcome)
    wanted = reference_volumes(scans, stems, fit.reference)
    if not (issubclass(kind, NeuralMethod) and kind.by_example):
        stems = in_reference_modalities(stems, wanted)
    volumes = StoredVolumes(stems)
    meta = {**reference_meta(wanted, fit, job.prep), **seen_meta(volumes), "seed": job.prep.seed}
    folder = job.place.out_dir / "models" / fit.name
    if not issubclass(kind, NeuralMethod):
        return save_bundle(folder, kind.fit(volumes, seed=job.prep.seed), meta=meta), outcomes
    home = {f["site"] for f in wanted.facts}
    names = frozenset(f["name"] for f in volumes.facts if f["site"] in home)
    with training_folder(fit, stems, job) as training:
        with memory_in_words(fit):
            shown = replace(training, wanted=names)
            model = kind.fit(volumes, seed=job.prep.seed, training=shown)
            files = model.files()
            if kind.by_example:
                model.place_on(training.device, training.threads)
                model = model.towards(wanted, seed=job.prep.seed)
            if kind.common:
                model.place_on(training.device, training.threads)
                together = model.contract.together
                shown_by = VolumesInSessions(wanted, volumes) if together else wanted
                meta |= common_meta(model, shown_by, volumes, fit, job.prep)
        meta["scores"] |= model.scores()
        meta["training"] = {
            "preset": training.preset,
            "device": training.device,
            **({"options": dict(training.options)} if training.options else {}),
        }
        save_bundle(folder, model, meta=meta, files=files)
    return folder, outcomes


def preprocessed(
    scans: Sequence[Scan],
    contract: Contract,
    grid_file: Path | None,
    job: Job,
    on_outcome: Callable[[Outcome], None],
) -> tuple[list[Path], list[Outcome]]:
    """`store_volumes` for a model: scans may be refused, but none lost to a failure.

    A model that was made of what is left would be used from then on and never be made again.

    Raises
    ------
    HarmonyError
        If the preprocessing of a scan failed.
    """
    stems, outcomes = store_volumes(scans, contract, grid_file, job, on_outcome)
    lost = [o for o in outcomes if o.exit_code not in (ExitCode.OK, ExitCode.DATA)]
    if lost:
        error = HarmonyError(
            f"{len(lost)} of {len(scans)} scans to learn from could not be preprocessed, such as "
            f"{lost[0].stem}: {lost[0].message}; no model was made of the others. Run again, or "
            "leave them out: train --participant-label"
        )
        error.exit_code = lost[0].exit_code
        raise error
    return stems, outcomes


@contextmanager
def training_folder(
    fit: Fit, stems: Sequence[Path], job: Job, networks: str = ""
) -> Iterator[Training]:
    """How to train, with a folder for checkpoints that no other job uses meanwhile.

    It is named by all that decides the training: one that was killed goes on under the same name.
    `networks` is the checksum of those that are trained on, if any.
    """
    scratch = job.place.work_dir / "training" / _training_key(fit, stems, job.prep, networks)
    with one_at_a_time(scratch.parent, scratch.name):
        scratch.mkdir(parents=True, exist_ok=True)
        yield replace(fit.training, folder=scratch)
        if job.clean:
            shutil.rmtree(scratch, ignore_errors=True)


def reference_volumes(
    scans: Sequence[Scan], stems: Sequence[Path], reference: str
) -> StoredVolumes:
    """Of all stored volumes, those of the reference.

    Raises
    ------
    UsageError
        If none of the reference's scans could be used.
    """
    chosen = training_scans(scans, reference)
    names = {scan.stem for scan in chosen}
    wanted = [stem for stem in stems if stem.name in names]
    if not wanted:
        raise UsageError(f"--reference {reference}: none of its {len(chosen)} scans can be used")
    return StoredVolumes(wanted)


def in_reference_modalities(stems: Sequence[Path], wanted: StoredVolumes) -> list[Path]:
    """Stored volumes of the reference's modalities; the model would have no unit for others."""
    known = {facts["modality"] for facts in wanted.facts}
    modality = dict(zip(stems, (f["modality"] for f in StoredVolumes(stems).facts), strict=True))
    for other in sorted(set(modality.values()) - known):
        LOG.warning("left out of the training: %s: the reference has none", other)
    return [stem for stem in stems if modality[stem] in known]


@contextmanager
def memory_in_words(fit: Fit) -> Iterator[None]:
    """Memory that runs out in a training is told in one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # of a GPU: a RuntimeError
        if not isinstance(error, MemoryError) and "out of memory" not in str(error).lower():
            raise
        raise HarmonyError(
            f"training {fit.method} with the preset {fit.training.preset} ran out of memory on "
            f"{fit.training.device}; take a smaller preset, another --device or a larger machine"
        ) from error


def _training_key(fit: Fit, stems: Sequence[Path], prep: Preprocessing, networks: str) -> str:
    """Checksum of all that decides a training: one that was killed goes on under the same key.

    The time limit, the device and the number of threads may change on the way.
    """
    parts = [
        [sha256(f"{stem}{end}") for end in ("_scaled.nii", "_mask.nii", ".json")] for stem in stems
    ]
    words = [fit.method, fit.training.preset, prep.seed, __version__, parts]
    words += [networks] if networks else []
    words += [dict(fit.training.options)] if fit.training.options else []
    words += [fit.reference]
    digest = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]
    return f"{fit.method}-{digest}"


def reference_meta(volumes: StoredVolumes, fit: Fit, prep: Preprocessing) -> dict[str, Any]:
    """What the bundle says of its reference domain: name, scale and quantiles."""
    curves: dict[str, list[Any]] = {}
    scales: dict[str, list[IntensityScale]] = {}
    for volume, facts in zip(volumes, volumes.facts, strict=True):
        values = np.asarray(volume.data[volume.mask], dtype=np.float64)
        curves.setdefault(volume.modality, []).append(mid_quantiles(values, _PROBABILITY))
        scales.setdefault(volume.modality, []).append(IntensityScale.from_dict(facts["scale"]))
    means = {m: np.mean(c, axis=0) for m, c in curves.items()}
    spread = {
        m: round(float(np.mean([np.abs(c - means[m]).mean() for c in curves[m]])), 5)
        for m in means
    }
    return {
        "name": fit.name,
        "reference": reference_words(fit.reference),
        "reference_scans": [
            {"name": f["name"], "subject": f["subject"], "sha256": f["key"]["InputSHA256"]}
            for f in volumes.facts
        ],
        "preprocessing": prep.fingerprint,
        "scores": {"mean Wasserstein distance of a training scan to their mean": spread},
        "output_scale": {m: median_scale(s).to_dict() for m, s in scales.items()},
        "reference_quantiles": {m: np.round(q, 6).tolist() for m, q in means.items()},
    }


def common_meta(
    model: Method,
    wanted: Sequence[Volume],
    volumes: StoredVolumes,
    fit: Fit,
    prep: Preprocessing,
) -> dict[str, Any]:
    """What a bundle says whose method leads all sites to one appearance.

    How intensities are distributed there is seen on the reference's own scans.
    """
    sites = ", ".join(sorted({facts["site"] for facts in volumes.facts}))
    curves: dict[str, list[Any]] = {}
    for volume in wanted:
        try:
            data = model.harmonize(volume, seed=prep.seed).data
        except ScanError as error:
            LOG.warning("does not show the common appearance: %s", error)
            continue
        values = np.asarray(data[volume.mask], dtype=np.float64)
        curves.setdefault(volume.modality, []).append(mid_quantiles(values, _PROBABILITY))
    return {
        "common": f"common appearance of {sites}, units of {reference_words(fit.reference)}",
        "reference_quantiles": {
            m: np.round(np.mean(found, axis=0), 6).tolist() for m, found in curves.items()
        },
    }


def seen_meta(volumes: StoredVolumes) -> dict[str, Any]:
    """What the bundle says of the scans that its training has seen."""
    return {
        "training_sites": sorted({f["site"] for f in volumes.facts}),
        "training_subjects": sorted({f["subject"] for f in volumes.facts}),
        "training_scans": dict(sorted(Counter(f["modality"] for f in volumes.facts).items())),
    }
