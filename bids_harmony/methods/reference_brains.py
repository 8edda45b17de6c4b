"""Brains of the reference domain on the model's grid, to learn from and held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bids_harmony.errors import ScanError
from bids_harmony.imaging.layout import Coarse, Layout
from bids_harmony.imaging.model_grid import ModelGrid, to_model_grid
from bids_harmony.imaging.quantiles import brain_values
from bids_harmony.methods.base import Volume
from bids_harmony.methods.likelihood import usable_slices
from bids_harmony.methods.tone import Brain, Placed, Tone, mapped

_HELD_OUT = 0.2


@dataclass(frozen=True)
class ReferenceBrains:
    """Some brains of the reference domain.

    Attributes
    ----------
    brains
        Image and brain mask of each, (X, Y, Z).
    subjects
        Label of each brain's subject.
    spacings
        Voxel sizes of each in mm.
    """

    brains: tuple[Brain, ...]
    subjects: tuple[str, ...]
    spacings: tuple[tuple[float, ...], ...]

    def toned(self, tone: Tone) -> list[Brain]:
        """The brains after their tone was mapped, as any scan's is."""
        return [
            (mapped(tone.curve(image, mask, spacing), image, mask), mask)
            for (image, mask), spacing in self.placed
        ]

    @property
    def placed(self) -> list[Placed]:
        """Each brain with its voxel size."""
        return list(zip(self.brains, self.spacings, strict=True))


def split_by_subject(
    volumes: Sequence[Volume], resolution: float
) -> tuple[ReferenceBrains, ReferenceBrains]:
    """Brains on the model's grid, to learn from and held out; no subject is in both.

    The last subjects in alphabetical order are held out: one in five, at least one.

    Raises
    ------
    ScanError
        If there are fewer than two subjects, or a brain is too small.
    """
    subjects = sorted({v.subject or v.name for v in volumes})
    if len(subjects) < 2:
        raise ScanError(
            "a neural method needs two subjects of the reference domain or more, one of which is "
            "held out; give more scans or use a statistical method"
        )
    apart = set(subjects[-max(round(_HELD_OUT * len(subjects)), 1) :])
    found: tuple[list[tuple[Brain, str, tuple[float, ...]]], ...] = ([], [])
    for volume in volumes:
        grid = on_model_grid(volume, resolution)
        brain = (torch.from_numpy(grid.data), torch.from_numpy(grid.mask))
        if not all(usable_slices(brain[1], axis) for axis in range(3)):
            raise ScanError(
                f"{volume.name or 'scan'}: too little brain to learn from; check the brain mask"
            )
        label = volume.subject or volume.name
        found[label in apart].append((brain, label, grid.spacing))
    learn, held_out = (ReferenceBrains(*zip(*part, strict=True)) for part in found)
    return learn, held_out


def on_model_grid(volume: Volume, resolution: float) -> ModelGrid:
    """A volume on the model's grid.

    Raises
    ------
    ScanError
        If the mask is empty, or the brain constant or not finite; it names the scan.
    """
    name, mask = volume.name or "scan", np.asarray(volume.mask, dtype=bool)
    brain_values(volume.data, mask, name)
    try:
        return to_model_grid(volume.data, mask, volume.spacing, volume.axes, resolution)
    except ScanError as error:
        raise ScanError(f"{name}: {error}") from error


def layout_of(toned: Sequence[Brain], spacings: Sequence[Sequence[float]]) -> Layout:
    """Layout of brains whose tone was mapped."""
    return Layout.of([
        Coarse(image.numpy(), mask.numpy(), spacing).cells()
        for (image, mask), spacing in zip(toned, spacings, strict=True)
    ])  # fmt: skip
