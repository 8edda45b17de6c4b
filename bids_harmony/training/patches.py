"""Cubes from brains that lie on one grid, and what losses on them are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_LEAST_BRAIN = 0.4  # share of a cube of the first brain; of the others half of it
_TRIES = 200
_SSIM_SIDE = 7
_K1, _K2 = 0.01**2, 0.03**2

Brain = tuple[Tensor, Tensor]  # image and brain mask, (X, Y, Z)


def pick(high: int, generator: torch.Generator) -> int:
    """A number from 0 to `high` - 1."""
    return int(torch.randint(high, (), generator=generator))


def draw_place(
    masks: Sequence[Tensor], side: int, generator: torch.Generator
) -> tuple[slice, slice, slice]:
    """Where to cut a cube that holds enough of every brain.

    Parameters
    ----------
    masks
        Brain masks (bool) of one shape (X, Y, Z), no side shorter than the cube's.
    side
        Of the cube, in voxels.
    generator
        Of all draws.

    Returns
    -------
    place
        At least two fifths of the cube are brain in the first mask, and one fifth in the others;
        if no such cube was found in 200 draws, the one with the most brain among them.
    """
    best, place = -1.0, (slice(0, side),) * 3
    for _ in range(_TRIES):
        starts = [pick(n - side + 1, generator) for n in masks[0].shape]
        cut = (
            slice(starts[0], starts[0] + side),
            slice(starts[1], starts[1] + side),
            slice(starts[2], starts[2] + side),
        )
        shares = [float(mask[cut].float().mean()) for mask in masks]
        enough = min(shares[0], *(2 * s for s in shares[1:])) if shares[1:] else shares[0]
        if enough > best:
            best, place = enough, cut
        if enough >= _LEAST_BRAIN:
            break
    return place


def cut_cubes(
    brains: Sequence[Brain], side: int, places: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Cubes at the same places of some brains; half of them with left and right exchanged.

    Parameters
    ----------
    brains
        On one grid whose first axis runs from left to right or back.
    side, places
        Edge of the cubes in voxels, and how many of each brain.
    generator
        Of all draws.

    Returns
    -------
    images, masks
        Shape (brains, places, side, side, side), float32.
    """
    images, masks = [], []
    for _ in range(places):
        place = draw_place([mask for _, mask in brains], side, generator)
        image = torch.stack([image[place] for image, _ in brains])
        mask = torch.stack([mask[place] for _, mask in brains]).float()
        if pick(2, generator):
            image, mask = image.flip(1), mask.flip(1)
        images.append(image)
        masks.append(mask)
    return torch.stack(images, dim=1), torch.stack(masks, dim=1)


def box_mean(image: Tensor, side: int, *, pad: bool) -> Tensor:
    """Mean over cubes of odd edge `side`, shape (B, 1, X, Y, Z), one axis after the other.

    With `pad` the result has the image's shape and zeros count around it; without, only cubes
    that lie inside the image are taken.
    """
    for axis in range(3):
        kernel = [1, 1, 1]
        kernel[axis] = side
        padding = [n // 2 if pad else 0 for n in kernel]
        image = functional.avg_pool3d(image, kernel, stride=1, padding=padding)
    return image


def dissimilarity(drawn: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """L1 distance plus 1 - SSIM, equal weights, both means over the brain (HAIL, 2.1).

    SSIM of Wang et al. (2004) with uniform cubes of 7 voxels and data range 1.

    Parameters
    ----------
    drawn, image, mask
        Shape (B, 1, X, Y, Z), no side shorter than 7 voxels; the mask's brain is not empty.
    """
    a, b = (drawn * mask).float(), (image * mask).float()
    inner = mask[..., 3:-3, 3:-3, 3:-3]
    mean_a, mean_b = (box_mean(v, _SSIM_SIDE, pad=False) for v in (a, b))
    spread = box_mean(a * a + b * b, _SSIM_SIDE, pad=False) - mean_a**2 - mean_b**2
    shared = box_mean(a * b, _SSIM_SIDE, pad=False) - mean_a * mean_b
    ssim = (2 * mean_a * mean_b + _K1) * (2 * shared + _K2)
    ssim = ssim / ((mean_a**2 + mean_b**2 + _K1) * (spread + _K2))
    lost = ((1 - ssim) * inner).sum() / inner.sum().clamp(min=1)
    return (a - b).abs().sum() / mask.sum().clamp(min=1) + lost


def local_change(
    scan: Tensor, change: Tensor, mask: Tensor, *, radius: int, noise: float
) -> Tensor:
    """`imaging.guided.guided_transfer` of a change on the scan, for a batch and with gradients.

    Parameters
    ----------
    scan, change, mask
        Shape (B, 1, X, Y, Z).
    radius, noise
        As there.

    Returns
    -------
    change
        In each cube a straight line of the scan's intensity; 0 outside the mask.
    """
    x, y = (scan * mask).float(), (change * mask).float()
    share = box_mean(mask, 2 * radius + 1, pad=True).clamp(min=1e-6)

    def mean(values: Tensor) -> Tensor:
        return box_mean(values, 2 * radius + 1, pad=True) / share * mask

    mean_x, mean_y = mean(x), mean(y)
    variance = (mean(x * x) - mean_x**2).clamp(min=0)
    slope = (mean(x * y) - mean_x * mean_y) / (variance + noise**2)
    return mean(slope) * x + mean(mean_y - slope * mean_x)
