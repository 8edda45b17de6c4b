"""HAIL on whole brains: windows that leave no seams, style, drawing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from bids_harmony.imaging.quantiles import Float64Array, brain_values
from bids_harmony.methods.base import Volume
from bids_harmony.networks.hail import HailNetwork, moments, quantiles_of, sums_of

Place = tuple[slice, slice, slice]
Brain = tuple[Tensor, Tensor]  # image and brain mask, (X, Y, Z)

_OVERLAP = 3 / 8  # least share of their side that neighbouring windows have in common, roughly
_WIDTH = 1 / 8  # deviation of the Gaussian weights as a share of a window's side
_BORDER = 8  # the outer 1 / 8 of a window has no say


def brain_of(volume: Volume) -> Brain:
    """Image, 0 outside the mask, and mask of a scan.

    Raises
    ------
    ScanError
        If the mask is empty, or the brain constant or not finite.
    """
    mask = np.asarray(volume.mask, dtype=bool)
    brain_values(volume.data, mask, volume.name or "scan")
    image = np.where(mask, volume.data, 0).astype(np.float32)
    return torch.from_numpy(image), torch.from_numpy(mask.copy())


def windows(
    shape: Sequence[int], side: int, divisor: int
) -> Iterator[tuple[Place, tuple[Float64Array, Float64Array, Float64Array]]]:
    """Overlapping cubes that cover a grid, and their weights along each axis.

    Weights are Gaussian and add to 1 in every voxel. In the outer eighth of a window they are 0,
    where its border lies inside the grid: what was drawn there lacks surroundings.

    Parameters
    ----------
    shape
        Of the grid, multiples of `divisor`.
    side
        Of the cubes, a multiple of `divisor` and at least 8 times as long.
    divisor
        Cubes start at its multiples, so that pooling meets the same cells in all.
    """
    axes = []
    for size in shape:
        starts = _starts(size, side, divisor)
        edge = min(side, size)
        weights = np.zeros((len(starts), size))
        at = np.arange(edge)
        for row, start in zip(weights, starts, strict=True):
            bell = np.exp(-0.5 * ((at - (edge - 1) / 2) / (edge * _WIDTH)) ** 2)
            bell[(at < edge // _BORDER) & (start > 0)] = 0
            bell[(at >= edge - edge // _BORDER) & (start + edge < size)] = 0
            row[start : start + edge] = bell
        weights /= weights.sum(axis=0)
        axes.append(
            [(slice(s, s + edge), w[s : s + edge]) for s, w in zip(starts, weights, strict=True)]
        )
    for (x, u), (y, v), (z, w) in product(*axes):
        yield (x, y, z), (u, v, w)


def _starts(size: int, side: int, divisor: int) -> list[int]:
    if size <= side:
        return [0]
    steps = math.ceil((size - side) / ((1 - _OVERLAP) * side))
    return [round(k * (size - side) / steps / divisor) * divisor for k in range(steps + 1)]


def _padded(image: Tensor, divisor: int) -> Tensor:
    """(X, Y, Z) to (1, 1, X', Y', Z'), sides filled up with 0 to multiples."""
    pad = [n for size in reversed(image.shape) for n in (0, -size % divisor)]
    return functional.pad(image[None, None], pad)


def _parts(network: HailNetwork, shape: Sequence[int], side: int) -> Iterator[tuple[Any, Tensor]]:
    """Index into padded images and weights (1, 1, x, y, z) of every window."""
    device = next(network.parameters()).device
    for place, (u, v, w) in windows(shape, side, network.divisor):
        weight = torch.from_numpy(np.einsum("i,j,k->ijk", u, v, w)).float()
        yield (slice(None), slice(None), *place), weight[None, None].to(device)


@torch.no_grad()
def style_of(network: HailNetwork, brain: Brain, side: int) -> Tensor:
    """Style (S,) of a whole brain, on the CPU.

    Parameters
    ----------
    network
        On any device.
    brain
        Image and mask (X, Y, Z), on the CPU; the mask is not empty.
    side
        Of the windows in voxels.
    """
    device = next(network.parameters()).device
    image, mask = (_padded(v.float(), network.divisor).to(device) for v in brain)
    total: list[Tensor] = []
    for part, weight in _parts(network, image.shape[2:], side):
        found = sums_of(network.encoder(image[part]), mask[part] * weight)
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
    mean, deviation = moments(total)
    values = quantiles_of(brain[0][brain[1]])
    return torch.cat((mean[0].cpu(), deviation[0].cpu(), values))


@torch.no_grad()
def draw_brain(
    network: HailNetwork, brain: Brain, own: Tensor, wanted: Tensor, side: int
) -> tuple[Tensor, Tensor]:
    """What the network draws of a whole brain.

    Parameters
    ----------
    network, brain, side
        As for `style_of`.
    own, wanted
        Styles (S,) of the scan and of the examples.

    Returns
    -------
    drawn, redrawn
        In the wanted style, and in the scan's own, (X, Y, Z), on the CPU, 0 outside the mask.
    """
    device = next(network.parameters()).device
    image = _padded(brain[0], network.divisor).to(device)
    both = torch.zeros(2, *image.shape[2:])
    styles = own[None].to(device), wanted[None].to(device)
    for part, weight in _parts(network, image.shape[2:], side):
        drawn = network.draw(network.encoder(image[part])[-1], *styles)
        for total, picture in zip(both, drawn, strict=True):
            total[part[2:]] += (picture * weight)[0, 0].float().cpu()
    x, y, z = brain[0].shape
    both = both[:, :x, :y, :z] * brain[1]
    return both[0], both[1]


def redrawing_error(image: Tensor, redrawn: Tensor, mask: Tensor) -> float:
    """How badly the network draws a scan in its own style.

    Deviation of the difference's means over 3 x 3 x 3 voxels, which leaves noise out, as a share
    of the brain's own deviation.
    """
    inside = mask.numpy()
    difference = np.where(inside, (redrawn - image).numpy(), 0)
    blurred = ndimage.uniform_filter(difference, 3, mode="constant")
    return float(np.sqrt(np.mean(blurred[inside] ** 2)) / image.numpy()[inside].std())
