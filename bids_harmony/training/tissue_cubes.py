"""Cubes of labelled brains for the training of deepNormalize, half of them with a bias field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bids_harmony.training.patches import pick

_BIASED = 0.5  # of the cubes


@dataclass(frozen=True)
class LabelledBrain:
    """A training brain, cut to its box.

    Attributes
    ----------
    images
        One channel for each modality, (C, X, Y, Z), 0 outside the mask.
    mask
        Brain mask (bool), (X, Y, Z).
    labels
        0 background, 1 CSF, 2 grey matter, 3 white matter (uint8), (X, Y, Z).
    site, subject, name
        Whose it is.
    """

    images: Tensor
    mask: Tensor
    labels: Tensor
    site: str
    subject: str
    name: str


class TissueBatch(NamedTuple):
    """Cubes of B brains: (B, C, s, s, s), mask (B, 1, s, s, s), labels (B, s, s, s), sites (B,).

    `shown` has the bias fields, `clean` has not; `labels` and `sites` are whole numbers.
    """

    shown: Tensor
    clean: Tensor
    mask: Tensor
    labels: Tensor
    sites: Tensor


def bias_field(size: int, slope: float) -> Tensor:
    """Field along one axis of an image, (size,): ``y / H * slope + 1 - slope`` (equation 7).

    Parameters
    ----------
    size
        H, voxels of the image along the axis.
    slope
        0 (none) to 1 (0 at one end).
    """
    return torch.arange(size, dtype=torch.float32) / size * slope + (1 - slope)


class TissueDrawer:
    """Draws batches: every site as often as any other, cubes centred on a voxel of a tissue.

    Parameters
    ----------
    brains
        To draw from.
    sites
        Names of the classes, in order.
    side, count
        Edge of the cubes in voxels, and cubes of a batch.
    biased
        Give half of the cubes a bias field along an axis of the whole brain.
    """

    def __init__(
        self,
        brains: Sequence[LabelledBrain],
        sites: Sequence[str],
        *,
        side: int,
        count: int,
        biased: bool = True,
    ) -> None:
        self._sites, self._side, self._count, self._biased = tuple(sites), side, count, biased
        self._of = [[b for b in brains if b.site == site] for site in sites]
        self._places = {b.name: torch.nonzero(b.labels).to(torch.int16) for b in brains}

    def __call__(self, generator: torch.Generator) -> TissueBatch:
        rows = [self._cube(generator) for _ in range(self._count)]
        shown, clean, mask, labels, sites = zip(*rows, strict=True)
        return TissueBatch(
            torch.stack(shown), torch.stack(clean), torch.stack(mask), torch.stack(labels),
            torch.tensor(sites),
        )  # fmt: skip

    def _cube(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        filled = [k for k, brains in enumerate(self._of) if brains]
        site = filled[pick(len(filled), generator)]
        brain = self._of[site][pick(len(self._of[site]), generator)]
        places = self._places[brain.name]
        centre = [int(v) for v in places[pick(len(places), generator)]]
        clean = cut_cube(brain.images, centre, self._side)
        shown = clean * self._field(brain, centre, generator)
        mask = cut_cube(brain.mask[None], centre, self._side).float()
        labels = cut_cube(brain.labels[None], centre, self._side)[0].long()
        if pick(2, generator):
            shown, clean, mask, labels = (v.flip(-3) for v in (shown, clean, mask, labels))
        return shown, clean, mask, labels, site

    def _field(
        self, brain: LabelledBrain, centre: Sequence[int], generator: torch.Generator
    ) -> Tensor:
        """Part of a field over the whole brain, along one axis in either direction; often 1."""
        axis, backward = pick(3, generator), pick(2, generator)
        slope = float(torch.rand((), generator=generator))
        if not self._biased or float(torch.rand((), generator=generator)) >= _BIASED:
            return torch.ones(1)
        field = bias_field(brain.mask.shape[axis], slope)
        field = field.flip(0) if backward else field
        start = centre[axis] - self._side // 2
        place = torch.arange(start, start + self._side).clamp(0, len(field) - 1)
        return field[place].view([-1 if k == axis else 1 for k in range(3)])


def cut_cube(image: Tensor, centre: Sequence[int], side: int) -> Tensor:
    """Cube (C, side, side, side) of an image (C, X, Y, Z) around a voxel; 0 outside the image."""
    starts = [c - side // 2 for c in centre]
    part, pad = image, list[int]()
    for axis, start in enumerate(starts, start=1):
        low, high = max(start, 0), min(start + side, image.shape[axis])
        part = part.narrow(axis, low, high - low)
        pad = [low - start, start + side - high, *pad]
    return functional.pad(part, pad)
