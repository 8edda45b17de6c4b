"""The model of a run: fitted, or chosen among those that are there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from bids_harmony.bids.scan import Scan
from bids_harmony.cli.context import Context
from bids_harmony.cli.progress import Progress
from bids_harmony.config import ADAPT_SCANS, DEFAULT_METHOD, Config
from bids_harmony.errors import UsageError
from bids_harmony.methods.base import Training
from bids_harmony.methods.bundle import is_bundle
from bids_harmony.methods.registry import available
from bids_harmony.methods.registry import load as load_method
from bids_harmony.resources import pick_device
from bids_harmony.workflows.cohort import Outcome
from bids_harmony.workflows.lock import one_at_a_time
from bids_harmony.workflows.models import bundle_name, choose_bundle, load_target
from bids_harmony.workflows.settings import SegmentationFile, Target
from bids_harmony.workflows.train import (
    Fit,
    contract_while_fitting,
    fit_reference,
    training_scans,
)

LOG = logging.getLogger("bids_harmony")


def scans_to_learn_from(
    context: Context, method: str, reference: str, participants: Sequence[str]
) -> list[Scan]:
    """Scans of the reference; what narrows a participant run does not narrow them."""
    modalities: Sequence[str] = available()[method].modalities
    training = context.config.analysis_level == "train"
    if training:
        modalities = context.config.modality or modalities
    scans, problems = context.find(modalities, participants, plain=not training)
    for problem in problems:
        LOG.warning("left out: %s", problem.message)
    return training_scans(scans, reference)


def training_of(context: Context, method: str) -> Training:
    """How a neural method is trained in this run; statistical methods take no notice.

    Raises
    ------
    UsageError
        If the device is not there.
    """
    config, card = context.config, available()[method]
    return Training(
        preset=config.preset or (card.presets[0] if card.presets else Training.preset),
        max_minutes=config.max_time,
        device=pick_device(config.device, card.devices)[0],
        threads=context.resources.nprocs,
    )


def fit(
    context: Context, method: str, reference: str, name: str | None, participants: Sequence[str]
) -> tuple[Path, list[Outcome]]:
    """Fit a method on a reference and write its bundle."""
    training = training_of(context, method)
    kind = load_method(method)
    scans = scans_to_learn_from(context, method, reference, participants)
    contract = contract_while_fitting(kind, sorted({s.suffix for s in scans}), training.preset)
    job = context.job(contract.grid)
    name = name or bundle_name(method, reference)
    wanted = Fit(method, name, reference, context.grid_file(contract), training)
    progress = Progress(len(scans))
    try:
        return fit_reference(scans, wanted, job, progress)
    finally:
        progress.close()


def target_of(context: Context) -> Target | None:
    """The model of a participant run; a reference that was never fitted is fitted first.

    None in a dry run that would fit it.
    """
    config = context.config
    if config.reference:
        method = config.method or DEFAULT_METHOD
        name = bundle_name(method, config.reference)
        fitted = is_bundle(config.out_dir / "models" / name)
        _segmentation(config, method)
        if config.dry_run and not fitted:
            load_method(method)
            scans = scans_to_learn_from(context, method, config.reference, ())
            print(f"would first fit {method} on {len(scans)} scan(s) of {config.reference}")
            return None
        if not fitted and (config.reports_only or config.boilerplate_only):
            raise UsageError(f"{name} was never fitted; run participant or train first")
        with nullcontext() if fitted else one_at_a_time(config.out_dir / "models"):
            if not is_bundle(config.out_dir / "models" / name):
                print(f"fitting {method} on {config.reference} first (train level)")
                fit(context, method, config.reference, name, ())
    folder, why = choose_bundle(
        config.out_dir, method=config.method, model=config.model, reference=config.reference
    )
    target = load_target(
        folder, why, method=config.method, device=config.device, adapt=config.adapt
    )
    segmentation = _segmentation(config, target.method)
    grid_file = context.grid_file(target.contract)
    return replace(
        target,
        grid_file=grid_file,
        segmentation=segmentation,
        adapt_scans=config.adapt_scans or ADAPT_SCANS,
    )


def _segmentation(config: Config, method: str) -> SegmentationFile | None:
    """The network of ``--adapt-segmentation``, after a look whether the method can adapt so.

    Raises
    ------
    UsageError
        If the method does not adapt, or not by a segmentation, or the network cannot be used.
    MissingInputError
        If the file cannot be read.
    """
    path = config.adapt_segmentation
    if (config.adapt or config.adapt_scans or path) and not available()[method].adapts:
        raise UsageError(
            "--adapt, --adapt-scans and --adapt-segmentation: the method "
            f"{method} does not adapt to sites; leave them out"
        )
    if path is None:
        return None
    if not getattr(load_method(method), "adapts_by_entropy", False):
        raise UsageError(
            f"--adapt-segmentation: the method {method} takes no segmentation; leave it out"
        )
    from bids_harmony.methods.task_entropy import read_segmentation  # torch only when wanted

    return SegmentationFile(path.absolute(), read_segmentation(path).sha256)
