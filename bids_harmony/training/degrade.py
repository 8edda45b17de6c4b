"""What other scanners do to an image, drawn at random, and what quantile mapping leaves of it.

Harmonizing Flows pre-trains its harmonizer to undo random increasing intensity maps, shifts,
gains and gammas. Mapping quantiles undoes all of these by itself, so what is drawn here is what
it cannot undo: tone that depends on the tissue, low contrast on a pedestal, and the noise and bias
field that are amplified with it. (Tissue fractions that differ are drawn in `training.tone`.)
All randomness comes from the generator that is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_KNOTS = 17
_TOP = 1.25


def uniform(
    low: float, high: float, generator: torch.Generator, shape: Sequence[int] = ()
) -> Tensor:
    """Numbers drawn evenly between two limits."""
    return low + (high - low) * torch.rand(tuple(shape), generator=generator)


def smooth_field(shape: Sequence[int], cells: int, generator: torch.Generator) -> Tensor:
    """Smooth random field (X, Y, Z), mean 0 and standard deviation 1, `cells` knots an axis."""
    knots = torch.randn((1, 1, cells, cells, cells), generator=generator)
    field = functional.interpolate(knots, size=tuple(shape), mode="trilinear", align_corners=True)
    return (field[0, 0] - field.mean()) / (field.std() + 1e-6)


def increasing_map(levels: int, trim: float, generator: torch.Generator) -> Tensor:
    """Random strictly increasing map of 0..1 onto itself at ``2**levels + 1`` even knots.

    Dyadic subdivision: each new knot is drawn evenly in the interval of its neighbours, of which
    the share `trim` is left out at both ends.
    """
    knots = torch.tensor([0.0, 1.0])
    for _ in range(levels):
        part = uniform(trim, 1 - trim, generator, (len(knots) - 1,))
        between = knots[:-1] + part * knots.diff()
        finer = torch.empty(2 * len(knots) - 1)
        finer[0::2], finer[1::2] = knots, between
        knots = finer
    return knots


def apply_knots(values: Tensor, knots: Tensor, top: float) -> Tensor:
    """Piecewise-linear functions with even knots on 0..`top`, one for each image of a batch.

    Parameters
    ----------
    values
        Shape (B, ...); beyond the ends the outer knot's value holds.
    knots
        Shape (B, K).
    """
    last = knots.shape[1] - 1
    place = (values / top).clamp(0, 1) * last
    low = place.floor().clamp(max=last - 1).long()
    index = low.flatten(1)
    below = knots.gather(1, index).view_as(values)
    above = knots.gather(1, index + 1).view_as(values)
    return below + (above - below) * (place - low)


def soften(image: Tensor, deviation: Tensor) -> Tensor:
    """Blur (B, X, Y, Z) with a three-point kernel of this standard deviation (B,), 0..1 voxels."""
    side = (deviation.square() / 2).view(-1, 1, 1, 1)
    for axis in (1, 2, 3):
        near = torch.roll(image, 1, axis) + torch.roll(image, -1, axis)
        image = (1 - 2 * side) * image + side * near
    return image


def degrade_slabs(clean: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Slabs of the reference domain as a foreign scanner's look after quantile mapping.

    Parameters
    ----------
    clean
        Slabs of neighbouring slices, (B, S, H, W), reference domain's scale, S >= 3.
    mask
        Brain mask, same shape.
    generator
        Of all draws.

    Returns
    -------
    degraded
        Same shape, >= 0, 0 outside the mask.
    """
    count = len(clean)

    def each(low: float, high: float) -> Tensor:
        return uniform(low, high, generator, (count, 1, 1, 1))

    image = apply_knots(clean, _tones(count, 0.03, generator, identity=True), _TOP)
    image = image + (clean - _TOP).clamp(min=0)  # what is brighter than all knots stays brighter
    # scanners' tissue contrasts: the tone depends on what lies around a voxel
    around = _neighbourhood(clean, mask)
    where = torch.sigmoid((around - each(0.35, 0.7)) * each(4, 16)) * (each(0, 1) < 0.5)
    image = image + where * apply_knots(clean, _tones(count, 0.03, generator), _TOP)
    blurred = soften(image, uniform(0, 0.7, generator, (count,)))
    image = torch.where(each(0, 1) < 0.5, blurred, image)
    slope = _waves(count, generator) * uniform(0, 0.6, generator, (count, 1))
    gain = apply_knots(clean, slope, _TOP).exp()
    knots = torch.randn((count, 1, 4, 4, 4), generator=generator)
    field = functional.interpolate(
        knots, size=clean.shape[1:], mode="trilinear", align_corners=True
    )[:, 0]
    noise = torch.randn(clean.shape, generator=generator)
    noise = soften(noise, uniform(0, 0.7, generator, (count,)))
    noise = noise / noise.flatten(1).std(1).view(-1, 1, 1, 1) * each(0, 0.09)
    image = image + gain * (field * each(0, 0.08) * (clean + each(0, 0.8)) + noise)
    return image.clamp(min=0) * mask


def _waves(count: int, generator: torch.Generator, modes: int = 5) -> Tensor:
    """Random smooth functions at `_KNOTS` knots, (count, `_KNOTS`), slow waves the strongest."""
    mode = torch.arange(modes).float()
    size = torch.randn((count, modes), generator=generator) / (1 + mode)
    phase = 2 * math.pi * torch.rand((count, modes, 1), generator=generator)
    angle = math.pi * mode[None, :, None] * torch.linspace(0, 1, _KNOTS) + phase
    return (size[:, :, None] * angle.cos()).sum(1)


def _tones(
    count: int, most: float, generator: torch.Generator, *, identity: bool = False
) -> Tensor:
    """Small random tone changes that leave 0 where it is; with `identity` increasing maps."""
    size = uniform(0, 1, generator, (count, 1)).square() * most
    base = torch.linspace(0, _TOP, _KNOTS)
    change = _waves(count, generator) * size * (4 * base).clamp(max=1)
    return torch.cummax(base + change, dim=1).values if identity else change


def _neighbourhood(image: Tensor, mask: Tensor) -> Tensor:
    """Mean of the brain voxels around each voxel, (B, S, H, W)."""

    def mean(values: Tensor) -> Tensor:
        return functional.avg_pool3d(values[:, None], (3, 5, 5), 1, (1, 2, 2))[:, 0]

    return mean(image) / mean(mask.to(image.dtype)).clamp(min=0.05)
