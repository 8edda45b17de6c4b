"""HAIL (Parida et al. 2023): one-shot style transfer with adaptive instance normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from bids_harmony.errors import ScanError
from bids_harmony.imaging.guided import MOST_CHANGE, bound_warnings
from bids_harmony.methods.base import (
    Contract,
    Harmonized,
    Training,
    Volume,
    preset_named,
)
from bids_harmony.methods.by_style import ByStyle
from bids_harmony.methods.hail_losses import Weights
from bids_harmony.methods.hail_part import (
    Drawing,
    Part,
    distance,
    fit_part,
    intensities,
)
from bids_harmony.methods.hail_training import Preset
from bids_harmony.methods.hail_volumes import Brain, brain_of, redrawing_error, style_of
from bids_harmony.methods.held_out import held_out_subjects
from bids_harmony.methods.learnable import learnable
from bids_harmony.training.plan import Plan

_GRID = "MNI152NLin2009aSym"
_UNLEARNED = 0.7  # error of held-out scans above which the network has learned too little
_NEAR = 0.02  # intensity distance below which nothing needs to be said

# At 2 mm one level fewer than at 1 mm: the deepest features then lie as close together, 8 mm.
_CPU = Preset(
    resolution=2.0,
    widths=(8, 24, 64),
    patch=32,
    places=2,
    pairs=2,
    window=128,
    radius=2,
    noise=0.03,
    autoencoder=Plan(1200, 2e-3, every=75, patience=8, half=False),
    transfer=Plan(1800, 1e-3, every=100, patience=10, half=False),
)
_PAPER = Preset(
    resolution=1.0,
    widths=(64, 128, 256, 512),
    patch=64,
    places=4,
    pairs=4,
    window=128,
    radius=4,
    noise=0.03,
    autoencoder=Plan(20_000, 1e-4, every=500, patience=20),
    transfer=Plan(20_000, 1e-4, every=500, patience=20),
)


class Hail(ByStyle[Part]):
    """A frozen encoder, AdaIN towards the examples' style, a decoder, and the scan's own anatomy.

    Phase 1 trains an autoencoder on cubes of all sites. In phase 2 its encoder is frozen and its
    decoder learns to draw cubes of one site in the style of another. What it draws is blurred, so
    what is given out is the scan itself, changed in each neighbourhood along a straight line of
    its own intensity; the change of a voxel is at most half the intensity scale.

    Departures from the paper: styles are measured over whole brains (see `hail_losses.transfer`);
    the decoder is told at every level how the styles differ; intensities are compared beside
    features; the guided transfer; Adam with half a cosine instead of AdamW with plateaus.
    """

    name: ClassVar[str] = "hail"
    train_options: ClassVar[Mapping[str, float]] = {"consistency": Weights.consistency}
    presets_by_name: ClassVar[Mapping[str, Preset]] = {"cpu": _CPU, "paper": _PAPER}

    @classmethod
    def contract_for(cls, modalities: Sequence[str]) -> Contract:
        """The contract of the preset ``cpu``."""
        return cls.contract_for_preset(modalities, "cpu")

    @classmethod
    def contract_for_preset(cls, modalities: Sequence[str], preset: str) -> Contract:
        """The template grid at the preset's resolution, robust scale, skull-stripped."""
        return Contract(
            tuple(modalities),
            _GRID,
            preset_named(cls.name, cls.presets_by_name, preset).resolution,
        )

    @classmethod
    def fit(
        cls, volumes: Sequence[Volume], *, seed: int, training: Training | None = None
    ) -> Self:
        """Train on the scans of all sites, each modality by itself.

        Raises
        ------
        ScanError
            If a brain is unusable, or no modality has two sites to learn from. A modality that
            has not is left out, with a warning in the log.
        UsageError
            If the preset is unknown.
        """
        training = training or Training()
        preset = preset_named(cls.name, cls.presets_by_name, training.preset)
        return cls._learned(
            volumes,
            learnable(
                cls.name,
                volumes,
                frozenset(),
                lambda people: held_out_subjects([k.whose for k in people]),
            ),
            training,
            lambda chosen, share: fit_part(chosen, preset, seed, share),
        )

    def _style(self, part: Part, volume: Volume) -> torch.Tensor:
        brain = brain_of(volume)
        self._admit(part, brain, volume)
        return style_of(part.network, brain, part.window)

    def harmonize(self, volume: Volume, *, seed: int) -> Harmonized:
        """Make `volume` look like the examples; nothing is drawn at random.

        Raises
        ------
        ScanError
            If there is no such modality or no example of it, the brain is unusable, or it is no
            upright brain of the modality.
        """
        torch.set_num_threads(self._threads)
        part, wanted = self._part(volume), self._wanted(volume)
        brain = brain_of(volume)
        unlikeness, unlike = self._admit(part, brain, volume)
        own = style_of(part.network, brain, part.window)
        drawing = part.draw(brain, own, wanted)
        error = redrawing_error(brain[0], drawing.redrawn, brain[1])
        if not error <= part.redrawing.refuse:
            raise ScanError(
                f"{volume.name or 'scan'}: the network cannot redraw it (error {error:.2f}, "
                f"refused above {part.redrawing.refuse:.2f}): no "
                f"{volume.modality} brain, or full of artefacts; check modality and mask, or use "
                "a statistical method"
            )
        facts = {"redrawing_error": error, "unlikeness": unlikeness}
        before = distance(own, wanted)
        after = distance(intensities(drawing.data, brain[1]), wanted)
        change = np.abs(drawing.data - brain[0].numpy())[brain[1].numpy()]
        details = {
            "examples": len(part.examples),
            "guided_radius_voxels": part.radius,
            "mean_absolute_change": round(float(change.mean()), 4),
            "largest_change_allowed": MOST_CHANGE,
            "share_at_bound": round(drawing.at_bound, 5),
            "intensity_distance_to_examples": {
                "before": round(before, 4),
                "after": round(after, 4),
            },
            **{name: round(value, 4) for name, value in facts.items()},
        }
        warnings = [*_doubts(part, error, drawing, before, after), *unlike]
        return Harmonized(drawing.data, details, tuple(warnings))

    @staticmethod
    def _admit(part: Part, brain: Brain, volume: Volume) -> tuple[float, list[str]]:
        """Refuse what is no upright brain of the modality; how unlike training's it is."""
        return part.likeness.admit(
            *brain, volume.spacing, name=volume.name or "scan", modality=volume.modality
        )

    @classmethod
    def _part_from(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Part:
        return Part.from_state(arrays, params)


def _doubts(part: Part, error: float, drawing: Drawing, before: float, after: float) -> list[str]:
    """Sentences for the report where the result may be wrong."""
    found = []
    if part.redrawing.mean > _UNLEARNED:
        found.append(
            "The network redraws its own held-out scans hardly better than one grey value (error "
            f"{part.redrawing.mean:.2f}, a grey brain has 1): train it for longer."
        )
    if error > part.redrawing.flag:
        found.append(
            f"The network redraws this scan badly (error {error:.2f}, held-out "
            f"scans have {part.redrawing.mean:.2f}): it may be unlike all "
            "training scans. Look at the result before you use it."
        )
    found += bound_warnings(drawing.at_bound)
    if after > max(before, _NEAR):
        found.append(
            "The scan's intensities are further from the examples' than before (distance "
            f"{before:.3f}, then {after:.3f}). Look at the result before you use it."
        )
    elif after > max(0.5 * before, _NEAR):
        found.append(
            "The scan came less than half the way to the examples' intensities (distance "
            f"{before:.3f}, then {after:.3f})."
        )
    return found
