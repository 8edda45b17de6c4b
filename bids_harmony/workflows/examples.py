"""New bundles from trained networks: another reference by example, or a new site learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bids_harmony.bids.scan import Scan
from bids_harmony.errors import NothingSelectedError, UsageError
from bids_harmony.interfaces.files import sha256
from bids_harmony.methods.base import NeuralMethod
from bids_harmony.methods.bundle import (
    LoadedBundle,
    bundle_hash,
    bundle_meta,
    is_bundle,
    load_bundle,
    save_bundle,
)
from bids_harmony.workflows.cohort import Outcome
from bids_harmony.workflows.models import bundle_name, reference_words
from bids_harmony.workflows.settings import Job
from bids_harmony.workflows.train import (
    Fit,
    memory_in_words,
    preprocessed,
    reference_meta,
    reference_volumes,
    seen_meta,
    training_folder,
    training_scans,
)

_LOOKED = 8


def name_towards(networks: Path, reference: str, /) -> str:
    """Name of the bundle with the networks of another bundle and a reference of its own."""
    return bundle_name(f"{networks.name}-as", reference)


def name_adapted(networks: Path, site: str, /) -> str:
    """Name of the bundle whose networks were trained on with a new site."""
    return bundle_name(f"{networks.name}-adapted-to", site)


def is_towards(folder: Path, networks: Path) -> bool:
    """Whether a bundle exists and has the networks that the other bundle has now."""
    if not is_bundle(folder):
        return False
    theirs = bundle_meta(networks).get("networks", {}).get("hash") or bundle_hash(networks)
    return bool(bundle_meta(folder).get("networks", {}).get("hash") == theirs)


def shows(
    meta: Mapping[str, Any], reference: str, find: Callable[[Sequence[str]], list[Scan]]
) -> bool:
    """Whether a bundle's reference is the one of this data set, not another of the same name.

    At most eight of the scans it was made from are looked at, so that it costs no more in a large
    cohort. Scans that came later do not matter.

    Parameters
    ----------
    meta
        Of the bundle.
    reference
        As the user named it.
    find
        Finds the scans of some participants.
    """
    known = meta.get("reference_scans", [])
    if meta.get("reference") != reference_words(reference) or not known:
        return False
    looked = known[:: -(-len(known) // _LOOKED)]
    try:
        scans = find(sorted({row["subject"] for row in looked}))
        there = {scan.stem: scan for scan in training_scans(scans, reference)}
        return all(
            row["name"] in there and sha256(there[row["name"]].path) == row["sha256"]
            for row in looked
        )
    except (NothingSelectedError, UsageError, OSError):
        return False  # a participant or the site is not in this data set


def bundle_towards(
    networks: Path,
    scans: Sequence[Scan],
    fit: Fit,
    job: Job,
    on_outcome: Callable[[Outcome], None],
) -> tuple[Path, list[Outcome]]:
    """Write a bundle with the networks of another and the appearance of some scans.

    Parameters
    ----------
    networks
        Bundle of a method that harmonizes by example.
    scans
        Of the reference.
    fit
        Name of the new bundle and its reference.

    Returns
    -------
    folder, outcomes
        The new bundle, and what became of each of its scans.

    Raises
    ------
    UsageError
        If the method does not harmonize by example, or no scan can be used.
    """
    bundle, method = _networks_of(networks)
    stems, outcomes = preprocessed(scans, method.contract, fit.grid_file, job, on_outcome)
    wanted = reference_volumes(scans, stems, fit.reference)
    method.place_on(fit.training.device, fit.training.threads)
    with memory_in_words(fit):
        model = method.towards(wanted, seed=job.prep.seed)
    mine = reference_meta(wanted, fit, job.prep)
    scores = {**bundle.meta.get("scores", {}), **mine["scores"]}
    meta: dict[str, Any] = {
        **bundle.meta,
        **mine,
        "scores": scores,
        "networks": _source(bundle, networks),
    }
    folder = job.place.out_dir / "models" / fit.name
    return save_bundle(folder, model, meta=meta), outcomes


def bundle_at_theta(
    networks: Path, theta: Mapping[str, Sequence[float]], fit: Fit, job: Job
) -> Path:
    """Write a bundle with the networks of another and an appearance given as numbers.

    Its units are those of the other bundle's reference; how intensities are distributed there
    is not known, so its reports compare with no reference.

    Raises
    ------
    UsageError
        If the method does not harmonize by example, has no theta, or it is not one of this method
        and modality.
    """
    bundle, method = _networks_of(networks)
    if lacking := sorted(theta.keys() - bundle.output_scale.keys()):
        raise UsageError(
            f"{networks}: its reference has no {', '.join(lacking)} scan to take units from"
        )
    meta: dict[str, Any] = {
        **bundle.meta,
        "name": fit.name,
        "reference": reference_words(fit.reference),
        "reference_scans": [],
        "reference_quantiles": {},
        "preprocessing": job.prep.fingerprint,
        "output_scale": {m: bundle.meta["output_scale"][m] for m in theta},
        "networks": _source(bundle, networks),
    }
    folder = job.place.out_dir / "models" / fit.name
    return save_bundle(folder, method.at_theta(theta), meta=meta)


def _networks_of(folder: Path) -> tuple[LoadedBundle, NeuralMethod]:
    """A bundle whose networks serve for another reference too, and its method."""
    bundle = load_bundle(folder)
    method = bundle.method
    if not (isinstance(method, NeuralMethod) and method.by_example):
        raise UsageError(
            f"{folder} has a reference of its own: {method.name} does not harmonize by "
            "example; give --model or --reference"
        )
    return bundle, method


def _source(bundle: LoadedBundle, folder: Path) -> dict[str, str]:
    """Name and hash of the bundle that a bundle's networks were trained for."""
    return dict(bundle.meta.get("networks", {"name": folder.name, "hash": bundle.hash}))


def bundle_fine_tuned(
    networks: Path,
    scans: Sequence[Scan],
    fit: Fit,
    job: Job,
    on_outcome: Callable[[Outcome], None],
) -> tuple[Path, list[Outcome]]:
    """Write a bundle whose networks were trained on with the scans of a new site.

    Parameters
    ----------
    networks
        Bundle of a method that can be fine-tuned; its reference stays.
    scans
        Of the new site.
    fit
        Name of the new bundle, the new site as its `reference`, device and threads.

    Returns
    -------
    folder, outcomes
        The new bundle, and what became of each scan.

    Raises
    ------
    UsageError
        If the method cannot be fine-tuned, training has seen the site, or no scan can be used.
    """
    bundle = load_bundle(networks)
    method = bundle.method
    if not (isinstance(method, NeuralMethod) and method.fine_tunes):
        raise UsageError(f"--adapt-to: {method.name} cannot learn a new site after its training")
    stems, outcomes = preprocessed(scans, method.contract, fit.grid_file, job, on_outcome)
    volumes = reference_volumes(scans, stems, fit.reference)
    method.place_on(fit.training.device, fit.training.threads)
    seen, new = bundle.meta, seen_meta(volumes)
    if known := set(new["training_sites"]) & set(seen.get("training_sites", ())):
        raise UsageError(f"--adapt-to: the training of {networks.name} saw {', '.join(known)}")
    folder = job.place.out_dir / "models" / fit.name
    with training_folder(fit, stems, job, bundle.hash) as training, memory_in_words(fit):
        model = method.fine_tuned(volumes, seed=job.prep.seed, training=training)
        meta = {
            **seen,
            **{key: sorted({*seen.get(key, ()), *new[key]}) for key in ("training_sites",
                                                                        "training_subjects")},
            "name": fit.name,
            "fine_tuned": {"site": fit.reference, "scans": len(volumes)},
            "scores": {**seen.get("scores", {}), **model.scores()},
        }  # fmt: skip
        meta.pop("networks", None)  # they are its own now
        save_bundle(folder, model, meta=meta, files=model.files())
    return folder, outcomes
