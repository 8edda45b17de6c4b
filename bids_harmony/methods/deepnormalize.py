"""deepNormalize (Delisle et al. 2021): a normalization that a segmentation drives."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from bids_harmony.imaging.tissues import TISSUES
from bids_harmony.methods.base import Contract, Harmonized, Training, Volume, preset_named
from bids_harmony.methods.by_modality import ByModality
from bids_harmony.methods.deepnormalize_part import Part, fit_part, normalized_brain
from bids_harmony.methods.deepnormalize_training import (
    Preset,
    stacked,
    standardized,
)
from bids_harmony.methods.held_out import held_out_subjects
from bids_harmony.methods.learnable import learnable
from bids_harmony.networks.deepnormalize import BRIGHTEST
from bids_harmony.training.fit import Plan

LOG = logging.getLogger("bids_harmony")
_GRID = "MNI152NLin2009aSym"
_TOO_BRIGHT = 0.01  # of the brain above what the generator can draw: worth a warning

_CPU = Preset(
    resolution=2.0,
    widths=(8, 16, 32),
    side=32,
    batch=6,
    plan=Plan(2400, 2e-3, every=100, patience=12, half=False, weight_decay=1e-5),
    judge_rate=5e-4,
)
_PAPER = Preset(
    resolution=1.0,
    widths=(32, 64, 128, 256),
    side=32,
    batch=16,
    plan=Plan(60_000, 1e-3, every=1000, patience=20, weight_decay=1e-3),
)


class DeepNormalize(ByModality[Part]):
    """Generator, segmenter, and a discriminator that tells sites and generated cubes apart.

    Trained on labelled scans of two sites or more; all are led to one appearance that they have
    in common, and the segmentation comes with it. Lambda (option ``lambda``) weighs the
    discriminator.

    Departures from the paper: see `normalizer_losses.deception`,
    `NormalizerNetworks.normalize` and `train_normalizer`; bias fields lie along any axis.
    """

    name: ClassVar[str] = "deepnormalize"
    common: ClassVar[bool] = True
    segments: ClassVar[bool] = True
    train_options: ClassVar[Mapping[str, float]] = {"lambda": 1.5}
    participant_options: ClassVar[Mapping[str, float]] = {"stride": 16.0}
    presets_by_name: ClassVar[Mapping[str, Preset]] = {"cpu": _CPU, "paper": _PAPER}
    #: Whether brains are standardized and no generator is trained.
    standardizes: ClassVar[bool] = False

    def __init__(self, parts: Mapping[str, Part], preset: str) -> None:
        super().__init__(parts, preset)
        self._stride = int(self.participant_options["stride"])

    @classmethod
    def contract_for(cls, modalities: Sequence[str]) -> Contract:
        """The contract of the preset ``cpu``."""
        return cls.contract_for_preset(modalities, "cpu")

    @classmethod
    def contract_for_preset(cls, modalities: Sequence[str], preset: str) -> Contract:
        """The template grid at the preset's resolution, robust scale, skull-stripped, labels."""
        resolution = preset_named(cls.name, cls.presets_by_name, preset).resolution
        return Contract(tuple(modalities), _GRID, resolution, labels=True)

    @property
    def contract(self) -> Contract:
        """For the modalities of the training."""
        return self.contract_for_preset(tuple(self._parts), self._preset)

    @classmethod
    def fit(
        cls, volumes: Sequence[Volume], *, seed: int, training: Training | None = None
    ) -> Self:
        """Train on labelled scans of all sites, each modality by itself.

        Raises
        ------
        ScanError
            If a brain is unusable or has no labels, or too few sites or subjects are left.
        UsageError
            If the preset is unknown.
        """
        training = training or Training()
        preset = preset_named(cls.name, cls.presets_by_name, training.preset)
        strength = training.options.get("lambda", cls.train_options.get("lambda", 0.0))
        return cls._learned(
            volumes,
            learnable(
                cls.name,
                volumes,
                training.wanted,
                lambda people: held_out_subjects([k.whose for k in people]),
            ),
            training,
            lambda chosen, share: fit_part(
                [{v.modality: cls._seen(v)} for v in chosen],
                preset,
                strength,
                seed,
                share,
                generator=not cls.standardizes,
            ),
        )

    @classmethod
    def _seen(cls, volume: Volume) -> Volume:
        """A volume as the networks see it."""
        return standardized(volume) if cls.standardizes else volume

    def take_options(self, options: Mapping[str, float]) -> None:
        """Harmonize with this ``stride`` between cubes, in voxels, from now on."""
        self._stride = round(options.get("stride", self.participant_options["stride"]))

    def harmonize(self, volume: Volume, *, seed: int) -> Harmonized:
        """Give `volume` the common appearance, and segment it; nothing is drawn at random.

        Raises
        ------
        ScanError
            If there is no such modality, the brain is unusable, or it is no upright brain of the
            modality.
        """
        torch.set_num_threads(self._threads)
        part, name = self._part(volume), volume.name or "scan"
        images, mask = stacked([self._seen(volume)])
        unlikeness, warnings = part.likeness.admit(
            images[0], mask, volume.spacing, name=name, modality=volume.modality
        )
        stride = min(max(self._stride, 1), part.networks.side)
        normalized, tissues = normalized_brain(part.networks, images, mask, stride)
        inside = mask.numpy()
        data, before = normalized[0], volume.data
        bright = float((images[0].numpy()[inside] > BRIGHTEST).mean())
        if bright > _TOO_BRIGHT:
            warnings.append(
                f"{bright:.0%} of the brain is brighter than what the generator can draw "
                f"({BRIGHTEST:g} of the scale) and was darkened to that."
            )
        warnings += part.odd_shares(tissues, inside)
        shares = tissues[:, inside].mean(axis=1)
        details = {
            "stride_voxels": stride,
            "unlikeness": round(unlikeness, 4),
            "mean_absolute_change": round(float(np.abs(data - before)[inside].mean()), 4),
            "tissue_shares": {k: round(float(v), 4) for k, v in zip(TISSUES, shares, strict=True)},
        }
        return Harmonized(data, details, tuple(warnings), tissues)

    @classmethod
    def _part_from(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Part:
        return Part.from_state(arrays, params)


class PreProcessor(DeepNormalize):
    """The pre-processor of Drozdzal et al. (2018): the same without a discriminator.

    Its pictures serve the segmentation and need not look like scans.
    """

    name: ClassVar[str] = "preprocessor"
    train_options: ClassVar[Mapping[str, float]] = {}


class Standardization(DeepNormalize):
    """Every brain to one mean and deviation, and the same segmenter: the paper's baseline."""

    name: ClassVar[str] = "standardization"
    train_options: ClassVar[Mapping[str, float]] = {}
    standardizes: ClassVar[bool] = True
