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
from bids_harmony.methods.bundle import bundle_meta, bundle_method, is_bundle, load_bundle
from bids_harmony.methods.options import options_for
from bids_harmony.methods.registry import available
from bids_harmony.methods.registry import load as load_method
from bids_harmony.resources import pick_device
from bids_harmony.workflows.cohort import Outcome
from bids_harmony.workflows.examples import (
    bundle_at_theta,
    bundle_fine_tuned,
    bundle_towards,
    is_towards,
    name_adapted,
    name_towards,
    shows,
)
from bids_harmony.workflows.lock import one_at_a_time
from bids_harmony.workflows.models import (
    bundle_name,
    choose_bundle,
    load_target,
    networks_for,
    theta_of,
)
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
    """Scans of the reference, or of all sites for a method that learns from several.

    What narrows a participant run does not narrow them.
    """
    modalities: Sequence[str] = available()[method].modalities
    training = context.config.analysis_level == "train"
    if training:
        modalities = context.config.modality or modalities
    scans, problems = context.find(modalities, participants, plain=not training)
    for problem in problems:
        LOG.warning("left out: %s", problem.message)
    chosen = training_scans(scans, reference)
    card = available()[method]
    several = card.by_example or card.sites_to_train > 1
    return _of_all_sites(method, scans) if several else chosen


def _of_all_sites(method: str, scans: Sequence[Scan]) -> list[Scan]:
    """All scans, for a method that learns from several sites.

    Raises
    ------
    UsageError
        If there are too few sites.
    """
    sites, needed = sorted({scan.site for scan in scans}), available()[method].sites_to_train
    if len(sites) < needed:
        raise UsageError(
            f"{method} learns from scans of at least {needed} sites, these are of "
            f"{', '.join(sites)} only; check --site-from and --participant-label"
        )
    return list(scans)


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
        options=options_for(method, card.options, "train", _given_options(config, "train")),
    )


def _given_options(config: Config, level: str) -> tuple[str, ...]:
    """Options of the method that were given at a level; a run of the other level has none."""
    return config.method_option if config.analysis_level == level else ()


def fit(
    context: Context, method: str, reference: str, name: str | None, participants: Sequence[str]
) -> tuple[Path, list[Outcome]]:
    """Fit a method on a reference and write its bundle."""
    training = training_of(context, method)
    kind = load_method(method)
    scans = scans_to_learn_from(context, method, reference, participants)
    contract = contract_while_fitting(kind, sorted({s.suffix for s in scans}), training)
    job = context.job(contract.grid)
    name = name or bundle_name(method, reference)
    wanted = Fit(method, name, reference, context.grid_file(contract), training)
    progress = Progress(len(scans))
    try:
        return fit_reference(scans, wanted, job, progress)
    finally:
        progress.close()


def fit_further(
    context: Context, networks: Path, reference: str, name: str | None
) -> tuple[Path, list[Outcome]]:
    """A bundle from the networks of another: for another reference, or with a new site learned.

    The latter with ``--adapt-to``; `reference` is then the new site.
    """
    make, named = bundle_towards, name_towards
    if context.config.adapt_to:
        make, named = bundle_fine_tuned, name_adapted
    method = bundle_method(networks)
    contract = load_bundle(networks).method.contract
    theta = {} if context.config.adapt_to else theta_of(reference)
    scans = [] if theta else examples_of(context, networks, reference)
    wanted = Fit(
        method,
        name or named(networks, reference),
        reference,
        context.grid_file(contract),
        training_of(context, method),
    )
    if theta:
        return bundle_at_theta(networks, theta, wanted, context.job(contract.grid)), []
    progress = Progress(len(scans))
    try:
        return make(networks, scans, wanted, context.job(contract.grid), progress)
    finally:
        progress.close()


def examples_of(context: Context, networks: Path, reference: str) -> list[Scan]:
    """Scans whose appearance the networks of a bundle are to give, or that they are to learn.

    What narrows a participant run does not narrow them; what narrows the train level does.
    """
    config = context.config
    training = config.analysis_level == "train"
    known: Sequence[str] = sorted(bundle_meta(networks)["training_scans"])
    scans, problems = context.find(
        (config.modality or known) if training else known,
        config.participant_label if training else (),
        plain=not training,
    )
    for problem in problems:
        LOG.warning("left out: %s", problem.message)
    return training_scans(scans, reference)


def target_of(context: Context) -> Target | None:
    """The model of a participant run; a reference that was never fitted is fitted first.

    None in a dry run that would fit it.
    """
    config = context.config
    chosen = _bundle_of(context)
    if chosen is None:
        return None
    folder, why = chosen
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
        options=options_for(
            target.method,
            available()[target.method].options,
            "participant",
            _given_options(config, "participant"),
        ),
    )


def _bundle_of(context: Context) -> tuple[Path, str] | None:
    """The bundle of a participant run, fitted first if need be, and why it is this one."""
    config, reference = context.config, context.config.reference
    chosen = {"method": config.method, "model": config.model}
    if not reference:
        return choose_bundle(config.out_dir, **chosen, reference=None)
    networks = networks_for(config.out_dir, **chosen, reference=reference)
    if networks is None:
        if theta_of(reference):
            raise UsageError(
                f"--reference {reference}: theta belongs to trained networks; name them with "
                "--method or --model (train them first)"
            )
        if not _fit_first(context, reference):
            return None
        networks = networks_for(config.out_dir, **chosen, reference=reference)
    if networks is None:
        return choose_bundle(config.out_dir, **chosen, reference=reference)
    if _shows(context, networks, reference):
        return networks, f"trained for {reference} as --reference asks"
    return _towards(context, networks, reference)


def _fit_first(context: Context, reference: str) -> bool:
    """Fit the method on a reference unless that was done; False in a dry run that would."""
    config, method = context.config, context.config.method or DEFAULT_METHOD
    name = bundle_name(method, reference)
    fitted = is_bundle(config.out_dir / "models" / name)
    _segmentation(config, method)
    if config.dry_run and not fitted:
        load_method(method)
        scans = scans_to_learn_from(context, method, reference, ())
        print(f"would first fit {method} on {len(scans)} scan(s) of {reference}")
        return False
    _refuse_to_fit(config, name, fitted)
    with nullcontext() if fitted else one_at_a_time(config.out_dir / "models"):
        there = is_bundle(config.out_dir / "models" / name) or networks_for(
            config.out_dir, method=method, model=None, reference=reference
        )  # another job may have trained meanwhile
        if not there:
            print(f"fitting {method} on {reference} first (train level)")
            fit(context, method, reference, name, ())
    return True


def _shows(context: Context, folder: Path, reference: str) -> bool:
    """Whether the bundle's reference is that of this data set."""
    meta = bundle_meta(folder)
    if theta_of(reference):
        return bool(meta.get("reference") == reference)
    modalities = sorted(meta["training_scans"])
    return shows(
        meta, reference, lambda subjects: context.find(modalities, subjects, plain=True)[0]
    )


def _towards(context: Context, networks: Path, reference: str) -> tuple[Path, str] | None:
    """The bundle with the networks of another and this reference; made now if it is not there."""
    config = context.config
    folder = config.out_dir / "models" / name_towards(networks, reference)
    prep = context.job(load_bundle(networks).method.contract.grid).prep

    def there() -> bool:
        return (
            is_towards(folder, networks)
            and bundle_meta(folder)["preprocessing"] == prep.fingerprint
            and _shows(context, folder, reference)
        )

    made = there()
    if config.dry_run and not made:
        given = theta_of(reference)
        count = "" if given else f"{len(examples_of(context, networks, reference))} scan(s) of "
        print(f"would first give {networks.name} the appearance of {count}{reference}")
        return None
    _refuse_to_fit(config, folder.name, made)
    with nullcontext() if made else one_at_a_time(config.out_dir / "models"):
        if not there():
            print(f"giving {networks.name} the appearance of {reference} first (train level)")
            fit_further(context, networks, reference, folder.name)
    return folder, f"networks of {networks.name}, appearance of {reference} as --reference asks"


def _refuse_to_fit(config: Config, name: str, fitted: bool) -> None:
    if not fitted and (config.reports_only or config.boilerplate_only):
        raise UsageError(f"{name} was never fitted; run participant or train first")


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
