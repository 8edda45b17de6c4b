"""deepNormalize (Delisle et al. 2021): a normalization that a segmentation drives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from bids_harmony.imaging.tissues import TISSUES
from bids_harmony.methods.base import (
    Contract,
    FloatArray,
    Harmonized,
    Training,
    Volume,
    preset_named,
)
from bids_harmony.methods.by_modality import ByModality
from bids_harmony.methods.deepnormalize_part import (
    Part,
    fit_part,
    matched,
    normalized_brain,
    wanted_quantiles,
)
from bids_harmony.methods.deepnormalize_training import (
    Preset,
    labelled_brain,
    stacked,
    standardized,
)
from bids_harmony.methods.held_out import held_out_subjects
from bids_harmony.methods.learnable import learnable
from bids_harmony.methods.sessions import by_session, session_of, whole_sessions
from bids_harmony.networks.deepnormalize import BRIGHTEST
from bids_harmony.training.plan import Plan
from bids_harmony.training.tissue_cubes import LabelledBrain

_GRID = "MNI152NLin2009aSym"
_IN_COMMON = 0.9  # of a brain that must be brain in its session's other scans, or is warned of
_TOO_BRIGHT = 0.01  # of the brain above what the generator can draw: worth a warning

_CPU = Preset(
    resolution=2.0,
    widths=(16, 32, 64),
    side=32,
    batch=6,
    plan=Plan(1200, 2e-3, every=100, patience=10, weight_decay=1e-5),
    judge_rate=2e-4,
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

    Trained on labelled scans of two sites or more; all are led to one appearance, that of the
    site whose tissues are told apart best, and the segmentation comes with it. Lambda (option
    ``lambda``) weighs appearance and discriminator. With the option ``together`` all modalities
    of a session are normalized and segmented at once.

    Departures from the paper: see `normalizer_losses`, `CommonAppearance`, `matched`,
    `NormalizerNetworks.normalize` and `train_normalizer`; bias fields lie along any axis.
    """

    name: ClassVar[str] = "deepnormalize"
    common: ClassVar[bool] = True
    segments: ClassVar[bool] = True
    train_options: ClassVar[Mapping[str, float]] = {"lambda": 1.5, "together": 0.0}
    participant_options: ClassVar[Mapping[str, float]] = {"stride": 16.0, "match": 1.0}
    presets_by_name: ClassVar[Mapping[str, Preset]] = {"cpu": _CPU, "paper": _PAPER}
    #: Whether brains are standardized and no generator is trained.
    standardizes: ClassVar[bool] = False

    def __init__(self, parts: Mapping[str, Part], preset: str) -> None:
        super().__init__(parts, preset)
        self.take_options({})

    @classmethod
    def contract_for(cls, modalities: Sequence[str]) -> Contract:
        """The contract of the preset ``cpu``."""
        return cls.contract_for_preset(modalities, "cpu")

    @classmethod
    def contract_for_preset(cls, modalities: Sequence[str], preset: str) -> Contract:
        """The template grid at the preset's resolution, robust scale, skull-stripped, labels."""
        resolution = preset_named(cls.name, cls.presets_by_name, preset).resolution
        return Contract(tuple(modalities), _GRID, resolution, labels=True)

    @classmethod
    def contract_to_fit(cls, modalities: Sequence[str], training: Training) -> Contract:
        """That of the preset; with the option ``together`` for whole sessions."""
        contract = cls.contract_for_preset(modalities, training.preset)
        return replace(contract, together=bool(training.options.get("together")))

    @property
    def contract(self) -> Contract:
        """For the modalities of the training."""
        parts = list(self._parts.values())
        modalities = tuple(m for part in parts for m in part.modalities)
        contract = self.contract_for_preset(modalities, self._preset)
        return replace(contract, together=any(len(p.modalities) > 1 for p in parts))

    @classmethod
    def fit(
        cls, volumes: Sequence[Volume], *, seed: int, training: Training | None = None
    ) -> Self:
        """Train on labelled scans of all sites, each modality by itself or all together.

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
        together = bool(training.options.get("together"))

        def learn(chosen: Sequence[Volume], share: Training) -> tuple[Part, dict[str, bytes]]:
            modalities, brains = cls._brains(chosen, together)
            return fit_part(
                brains, modalities, preset, strength, seed, share, generator=not cls.standardizes
            )

        if together:
            return cls._learned(
                volumes, whole_sessions(cls.name, volumes, training.wanted), training, learn
            )
        groups = learnable(
            cls.name,
            volumes,
            training.wanted,
            lambda people: held_out_subjects([k.whose for k in people]),
        )
        return cls._learned(volumes, groups, training, learn)

    @classmethod
    def _brains(
        cls, volumes: Sequence[Volume], together: bool
    ) -> tuple[tuple[str, ...], list[LabelledBrain]]:
        """Modalities, and training brains: one for each session, or each volume."""
        if together:
            sessions = list(by_session(volumes).values())
            rows = [[index for (index,) in scans.values()] for scans in sessions]
            modalities = tuple(sessions[0])
        else:
            rows = [[index] for index in range(len(volumes))]
            modalities = (volumes[0].modality,)
        return modalities, [labelled_brain([cls._seen(volumes[i]) for i in row]) for row in rows]

    @classmethod
    def _seen(cls, volume: Volume) -> Volume:
        """A volume as the networks see it."""
        return standardized(volume) if cls.standardizes else volume

    def take_options(self, options: Mapping[str, float]) -> None:
        """Harmonize with this ``stride`` between cubes (voxels), and `matched` or not."""
        values = {**self.participant_options, **options}
        self._stride, self._match = round(values["stride"]), bool(values.get("match"))

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
        volumes = session_of(volume, part.modalities, self.name)
        own = part.modalities.index(volume.modality)
        images, mask = stacked([self._seen(v) for v in volumes])
        found = [
            known.admit(image, mask, v.spacing, name=v.name or name, modality=v.modality)
            for known, image, v in zip(part.likeness, images, volumes, strict=True)
        ]
        others = [v.name for v in volumes if v is not volume]
        stride = min(max(self._stride, 1), part.networks.side)
        drawn, tissues = normalized_brain(part.networks, images, mask, stride)
        inside = mask.numpy()
        appearance = part.appearance if self._match else None
        wanted, reason = wanted_quantiles(tissues, inside, appearance)
        normalized = matched(drawn, inside, wanted)
        by_matching = float(np.abs(normalized - drawn)[own][inside].mean())
        brain = np.asarray(volume.mask, dtype=bool)
        # what is brain in this scan alone is not drawn anew
        before = np.where(brain, np.maximum(volume.data, 0), 0).astype(np.float32)
        data = np.where(inside, normalized[own], before)
        warnings = [
            *(text for _, texts in found for text in texts),
            *_doubts(images[own].numpy()[inside], float(inside.sum() / brain.sum()), reason),
            *part.odd_shares(tissues, inside),
        ]
        shares = tissues[:, inside].mean(axis=1)
        details = {
            "stride_voxels": stride,
            "unlikeness": round(found[own][0], 4),
            **({"together_with": others} if others else {}),
            **{k: v for k, v in part.scores.items() if k == "appearance_of"},
            "mean_absolute_change": round(float(np.abs(data - before)[inside].mean()), 4),
            **({"changed_by_matching": round(by_matching, 4)} if wanted else {}),
            "tissue_shares": {k: round(float(v), 4) for k, v in zip(TISSUES, shares, strict=True)},
        }
        return Harmonized(data, details, tuple(warnings), tissues, keep_distribution=bool(wanted))

    def _part(self, volume: Volume) -> Part:
        """That of the volume's modality, alone or among others."""
        holds = [p for p in self._parts.values() if volume.modality in p.modalities]
        return holds[0] if holds else super()._part(volume)

    @classmethod
    def _part_from(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Part:
        return Part.from_state(arrays, params)


def _doubts(values: FloatArray, common: float, unmatched: str) -> list[str]:
    """Sentences on a brain's values that cannot be drawn, on how much of it all scans show, and
    on why it is not `matched`.
    """
    found = []
    bright = float((values > BRIGHTEST).mean())
    if bright > _TOO_BRIGHT:
        found.append(
            f"{bright:.0%} of the brain is brighter than what the generator can draw "
            f"({BRIGHTEST:g} of the scale) and was darkened."
        )
    if common < _IN_COMMON:
        found.append(
            f"Only {common:.0%} of the brain lies in the brain masks of the session's other "
            "scans too; the rest was left as it is (a map of the whole brain holds for it too)."
        )
    if unmatched:
        found.append(f"The brain is as drawn, without the map that follows: {unmatched}.")
    return found


class PreProcessor(DeepNormalize):
    """The pre-processor of Drozdzal et al. (2018): the same without a discriminator.

    Its pictures serve the segmentation and need not look like scans.
    """

    name: ClassVar[str] = "preprocessor"
    train_options: ClassVar[Mapping[str, float]] = {"together": 0.0}
    participant_options: ClassVar[Mapping[str, float]] = {"stride": 16.0}


class Standardization(DeepNormalize):
    """Every brain to one mean and deviation, and the same segmenter: the paper's baseline."""

    name: ClassVar[str] = "standardization"
    train_options: ClassVar[Mapping[str, float]] = {"together": 0.0}
    participant_options: ClassVar[Mapping[str, float]] = {"stride": 16.0}
    standardizes: ClassVar[bool] = True
