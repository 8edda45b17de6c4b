"""Brains of the reference domain on the model's grid, to learn from and held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from bids_harmony.errors import ScanError
from bids_harmony.imaging.layout import Coarse, Layout
from bids_harmony.methods.base import Volume
from bids_harmony.methods.lazy_volumes import Chosen
from bids_harmony.methods.likelihood import usable_slices
from bids_harmony.methods.scan_tone import toned_scan
from bids_harmony.methods.tone import Brain, Placed, Tone
from bids_harmony.methods.volume_grid import on_model_grid

_HELD_OUT = 0.2


@dataclass(frozen=True)
class ReferenceBrains:
    """Some brains of the reference domain.

    Attributes
    ----------
    volumes
        The scans; each is read when it is asked for.
    resolution
        Voxel size of the model's grid in mm.
    brains
        Image and brain mask of each on the model's grid, (X, Y, Z).
    subjects
        Label of each brain's subject.
    spacings
        Voxel sizes of each on the model's grid in mm.
    """

    volumes: Sequence[Volume]
    resolution: float
    brains: tuple[Brain, ...]
    subjects: tuple[str, ...]
    spacings: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, volumes: Sequence[Volume], resolution: float) -> Self:
        """These scans; ScanError if a brain is too small."""
        brains, subjects, spacings = [], [], []
        for volume in volumes:
            grid = on_model_grid(volume, resolution)
            brain = (torch.from_numpy(grid.data), torch.from_numpy(grid.mask))
            if not all(usable_slices(brain[1], axis) for axis in range(3)):
                raise ScanError(
                    f"{volume.name or 'scan'}: too little brain to learn from; check the brain "
                    "mask"
                )
            brains.append(brain)
            subjects.append(volume.subject or volume.name)
            spacings.append(grid.spacing)
        return cls(volumes, resolution, tuple(brains), tuple(subjects), tuple(spacings))

    def only(self, indices: Sequence[int]) -> Self:
        """Some of them."""
        return type(self)(
            Chosen(self.volumes, indices),
            self.resolution,
            tuple(self.brains[k] for k in indices),
            tuple(self.subjects[k] for k in indices),
            tuple(self.spacings[k] for k in indices),
        )

    def toned(self, tone: Tone) -> list[Brain]:
        """The brains after their tone was mapped, as any scan's is."""
        scans = (toned_scan(tone, volume, self.resolution) for volume in self.volumes)
        return [(scan.start, scan.mask) for scan in scans]

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
    brains = ReferenceBrains.of(volumes, resolution)
    subjects = sorted(set(brains.subjects))
    if len(subjects) < 2:
        raise ScanError(
            "a neural method needs two subjects of the reference domain or more, one of which is "
            "held out; give more scans or use a statistical method"
        )
    apart = set(subjects[-max(round(_HELD_OUT * len(subjects)), 1) :])
    learn, held_out = (
        [k for k, label in enumerate(brains.subjects) if (label in apart) is wanted]
        for wanted in (False, True)
    )
    return brains.only(learn), brains.only(held_out)


def layout_of(toned: Sequence[Brain], spacings: Sequence[Sequence[float]]) -> Layout:
    """Layout of brains whose tone was mapped."""
    return Layout.of([
        Coarse(image.numpy(), mask.numpy(), spacing).cells()
        for (image, mask), spacing in zip(toned, spacings, strict=True)
    ])  # fmt: skip
