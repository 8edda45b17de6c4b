"""Random slices and slabs of brains, on one canvas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from bids_harmony.errors import ScanError

_LEAST_BRAIN = 0.06  # share of the canvas; slices with less of it teach little
_TRIES = 1000  # in a row that gave no slab


def canvas_size(shapes: Sequence[tuple[int, ...]], axes: Sequence[int], divisor: int) -> int:
    """Side of the smallest square canvas for the slices of these volumes, a multiple."""
    sides = [n for shape in shapes for axis in axes for a, n in enumerate(shape) if a != axis]
    return -(-max(sides) // divisor) * divisor


def on_canvas(image: Tensor, height: int, width: int) -> Tensor:
    """Last two axes padded with 0, or cut, around their middle."""
    for axis, size in ((-2, height), (-1, width)):
        spare = size - image.shape[axis]
        if spare < 0:
            image = image.narrow(image.dim() + axis, -spare // 2, size)
    down, right = height - image.shape[-2], width - image.shape[-1]
    pad = (right // 2, right - right // 2, down // 2, down - down // 2)
    return functional.pad(image, pad)


def draw_slabs(
    brains: Sequence[tuple[Tensor, Tensor]],
    count: int,
    generator: torch.Generator,
    *,
    side: int,
    axes: Sequence[int] = (0, 1, 2),
    thick: int = 3,
    turned: bool = True,
) -> tuple[Tensor, Tensor]:
    """Slabs of neighbouring slices from random brains, axes and places.

    Parameters
    ----------
    brains
        Image and brain mask (bool) of each, (X, Y, Z).
    count
        How many.
    generator
        Of all draws.
    side
        Height and width of the canvas.
    axes
        Across which axes to cut.
    thick
        Slices of a slab.
    turned
        Also mirror and transpose slabs, for networks that see them from all sides; without it
        the first axis may still be mirrored: left and right are alike.

    Returns
    -------
    images, masks
        (count, thick, side, side), float32 and bool.

    Raises
    ------
    ScanError
        If no slice can be found that holds enough brain.
    """

    def pick(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    images: list[Tensor] = []
    masks: list[Tensor] = []
    tries = 0
    while len(images) < count:
        tries += 1
        if tries > _TRIES:
            raise ScanError(
                "the brains are too small to learn from: hardly a slice is "
                f"{_LEAST_BRAIN:.0%} brain; check the brain masks of the reference scans"
            )
        image, mask = brains[pick(len(brains))]
        axis = axes[pick(len(axes))]
        if image.shape[axis] <= thick:
            continue
        start = pick(image.shape[axis] - thick + 1)
        image, mask = (v.narrow(axis, start, thick).movedim(axis, 0) for v in (image, mask))
        if mask[thick // 2].sum() < _LEAST_BRAIN * side**2:
            continue
        tries = 0
        way = pick(8)
        if way & 1 and (turned or axis != 0):
            image, mask = image.flip(1), mask.flip(1)
        if way & 2 and turned:
            image, mask = image.flip(2), mask.flip(2)
        if way & 4 and turned:
            image, mask = image.transpose(1, 2), mask.transpose(1, 2)
        images.append(on_canvas(image, side, side))
        masks.append(on_canvas(mask, side, side))
    return torch.stack(images), torch.stack(masks)
