"""Dewey et al. (MICCAI 2020), from which CALAMITI grew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from bids_harmony.methods.calamiti import Calamiti
from bids_harmony.methods.calamiti_learned import Preset

_STEPS = {"cpu": 3000, "paper": 30_000}  # none goes to a discriminator


class Dewey2020(Calamiti):
    """CALAMITI without discriminator and tones, theta from the slice that is drawn."""

    name: ClassVar[str] = "dewey2020"
    discriminator: ClassVar[bool] = False
    same_slice: ClassVar[bool] = True
    tones: ClassVar[bool] = False
    presets_by_name: ClassVar[Mapping[str, Preset]] = {
        name: replace(preset, plan=replace(preset.plan, steps=_STEPS[name]))
        for name, preset in Calamiti.presets_by_name.items()
    }
