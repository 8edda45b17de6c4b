"""Refuse settings that contradict each other before anything is read."""

from __future__ import annotations

import re

from bids_harmony.config import ADAPTED, DEFAULT_METHOD, Config
from bids_harmony.errors import UsageError
from bids_harmony.methods.options import options_for
from bids_harmony.methods.registry import available


def checked(config: Config) -> Config:
    """The settings, if they can work.

    Raises
    ------
    UsageError
        If options contradict each other.
    """
    if config.out_dir == config.bids_dir:
        raise UsageError(
            f"OUT_DIR is the raw data set {config.bids_dir}, which is only read; "
            f"write for example to {config.bids_dir / 'derivatives' / 'bids_harmony'}"
        )
    if (
        config.bids_dir in config.out_dir.parents
        and config.out_dir.relative_to(config.bids_dir).parts[0] != "derivatives"
    ):
        raise UsageError(
            f"OUT_DIR {config.out_dir} lies inside the raw data set, which is only read; "
            f"only {config.bids_dir / 'derivatives'} may be written there"
        )
    if config.work_dir == config.bids_dir or config.bids_dir in config.work_dir.parents:
        raise UsageError(
            f"the work folder {config.work_dir} lies inside the data set; name another with -w"
        )
    if config.work_dir == config.out_dir:
        raise UsageError(f"the work folder is OUT_DIR {config.out_dir}; name another with -w")
    if not (config.desc.isascii() and config.desc.replace("+", "").isalnum()):
        raise UsageError(f"--desc {config.desc!r}: only letters, digits and + are allowed")
    (_check_train if config.analysis_level == "train" else _check_participant)(config)
    return config


def _check_train(config: Config) -> None:
    if config.adapt_to and (config.reference or not config.model):
        raise UsageError("--adapt-to needs --model, whose reference stays: leave out --reference")
    if not (config.reference or config.adapt_to):
        raise UsageError("train needs --reference SITE (or one participant or scan)")
    untrained = config.preset or config.method_option
    if config.model and (untrained or (config.max_time and not config.adapt_to)):
        raise UsageError(
            "train --model takes trained networks: leave out --preset, --max-time and "
            "--method-option"
        )
    if config.reports_only or config.boilerplate_only or config.level != "full":
        raise UsageError("--reports-only, --boilerplate-only and --level are for participant")
    if config.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", config.name):
        raise UsageError(f"--name {config.name!r}: only letters, digits and . _ + - are allowed")
    if config.name == ADAPTED:
        raise UsageError(f"--name {ADAPTED} is where adaptations to sites are kept; name another")
    if config.adapt or config.adapt_scans or config.adapt_segmentation:
        raise UsageError("--adapt, --adapt-scans and --adapt-segmentation are for participant")
    _check_training(config)


def _check_training(config: Config) -> None:
    if config.model:
        return
    card = available()[config.method or DEFAULT_METHOD]
    if card.kind != "neural" and (config.preset or config.max_time):
        raise UsageError(
            f"--preset and --max-time are for neural methods; {card.name} is fitted in one step"
        )
    if config.preset and config.preset not in card.presets:
        raise UsageError(
            f"--preset {config.preset}: {card.name} has {', '.join(card.presets)} only"
        )
    options_for(card.name, card.options, "train", config.method_option)


def _check_participant(config: Config) -> None:
    if config.name:
        raise UsageError("--name is for train; participant takes --model")
    if config.preset or config.max_time or config.adapt_to:
        raise UsageError("--preset, --max-time and --adapt-to are for train")
    if config.adapt_scans and config.adapt in ("scan", "none"):
        raise UsageError(f"--adapt-scans is for --adapt site, not --adapt {config.adapt}")
    if config.adapt_segmentation and config.adapt == "none":
        raise UsageError("--adapt-segmentation is for --adapt site or scan, not --adapt none")
    if config.method and config.method_option:
        card = available()[config.method]
        options_for(card.name, card.options, "participant", config.method_option)
    if config.level == "full":
        return
    adapting = config.adapt or config.adapt_scans or config.adapt_segmentation
    if config.method or config.model or config.reference or config.method_option or adapting:
        raise UsageError(
            "--level minimal harmonizes nothing; leave out --method, --model, --reference, "
            "--method-option and --adapt"
        )
    if config.reports_only or config.boilerplate_only:
        raise UsageError("--level minimal writes no report; leave it out")
