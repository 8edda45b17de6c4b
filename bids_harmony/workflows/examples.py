"""New bundles from trained networks: another reference by example, or a new site learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bids_harmony.bids.scan import Scan
from bids_harmony.errors import UsageError
from bids_harmony.methods.base import NeuralMethod
from bids_harmony.methods.bundle import bundle_meta, is_bundle, load_bundle, save_bundle
from bids_harmony.workflows.cohort import Outcome
from bids_harmony.workflows.models import bundle_name
from bids_harmony.workflows.settings import Job
from bids_harmony.workflows.train import Fit, reference_meta, reference_volumes
from bids_harmony.workflows.volumes import store_volumes


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
    source = load_bundle(networks)
    theirs = source.meta.get("networks", {}).get("hash", source.hash)
    return bool(bundle_meta(folder).get("networks", {}).get("hash") == theirs)


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
    bundle = load_bundle(networks)
    method = bundle.method
    if not (isinstance(method, NeuralMethod) and method.by_example):
        raise UsageError(
            f"{networks} has a reference of its own: {method.name} does not harmonize by "
            "example; give --model or --reference"
        )
    stems, outcomes = store_volumes(scans, method.contract, fit.grid_file, job, on_outcome)
    wanted = reference_volumes(scans, stems, fit.reference)
    model = method.towards(wanted, seed=job.prep.seed)
    mine = reference_meta(wanted, fit, job.prep)
    source = bundle.meta.get("networks", {"name": networks.name, "hash": bundle.hash})
    scores = {**bundle.meta.get("scores", {}), **mine["scores"]}
    meta: dict[str, Any] = {**bundle.meta, **mine, "scores": scores, "networks": source}
    folder = job.place.out_dir / "models" / fit.name
    return save_bundle(folder, model, meta=meta), outcomes


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
    if fit.reference in bundle.meta.get("training_sites", ()):
        raise UsageError(f"--adapt-to {fit.reference}: the training of {networks.name} saw it")
    stems, outcomes = store_volumes(scans, method.contract, fit.grid_file, job, on_outcome)
    volumes = reference_volumes(scans, stems, fit.reference)
    model = method.fine_tuned(volumes, seed=job.prep.seed, training=fit.training)
    learned = {"site": fit.reference, "scans": len(volumes), **model.scores()}
    meta = {**bundle.meta, "name": fit.name, "fine_tuned": learned}
    meta.pop("networks", None)  # they are its own now
    folder = job.place.out_dir / "models" / fit.name
    return save_bundle(folder, model, meta=meta, files=model.files()), outcomes
