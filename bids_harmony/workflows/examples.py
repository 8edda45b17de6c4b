"""Another reference for a trained method that harmonizes by example: same networks, new bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bids_harmony.bids.scan import Scan
from bids_harmony.errors import UsageError
from bids_harmony.interfaces.volumes import StoredVolumes
from bids_harmony.methods.base import NeuralMethod
from bids_harmony.methods.bundle import bundle_meta, is_bundle, load_bundle, save_bundle
from bids_harmony.workflows.cohort import Outcome
from bids_harmony.workflows.models import bundle_name
from bids_harmony.workflows.settings import Job
from bids_harmony.workflows.train import Fit, reference_meta, reference_volumes
from bids_harmony.workflows.volumes import store_volumes


def name_towards(networks: Path, reference: str) -> str:
    """Name of the bundle with the networks of another bundle and a reference of its own."""
    return bundle_name(f"{networks.name}-as", reference)


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
    wanted: StoredVolumes = reference_volumes(scans, stems, fit.reference)
    model = method.towards(wanted, seed=job.prep.seed)
    mine = reference_meta(wanted, fit, job.prep)
    source = bundle.meta.get("networks", {"name": networks.name, "hash": bundle.hash})
    scores = {**bundle.meta.get("scores", {}), **mine["scores"]}
    meta: dict[str, Any] = {**bundle.meta, **mine, "scores": scores, "networks": source}
    folder = job.place.out_dir / "models" / fit.name
    return save_bundle(folder, model, meta=meta), outcomes
