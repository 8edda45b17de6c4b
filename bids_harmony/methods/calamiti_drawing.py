"""Whole brains through CALAMITI's networks: theta of a brain, the brain drawn with a theta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from bids_harmony.imaging.guided import bounded_change
from bids_harmony.networks.calamiti import CalamitiNetworks, FusionNetwork
from bids_harmony.training.contrasts import full_slices
from bids_harmony.training.slices import canvas_size, on_canvas

_SLICES = 16  # across each axis, of which theta is the mean
_AT_ONCE = 8
_BLUR = 3  # voxels
_MOST_LOST = 2.0
_RADIUS_MM = 6.0
_NOISE = 0.05


def side_for(shape: Sequence[int], trained: int, divisor: int) -> int:
    """Side of the canvas for a brain: that of the training, or larger where it does not fit."""
    return canvas_size([tuple(shape), (trained, trained, trained)], (0, 1, 2), divisor)


def theta_of_brain(
    networks: CalamitiNetworks, image: Tensor, mask: Tensor, side: int
) -> tuple[float, float]:
    """Mean theta of evenly spaced slices across all three axes.

    Parameters
    ----------
    networks
        In eval mode, on any device.
    image, mask
        Shape (X, Y, Z), on the CPU; the image is 0 outside the mask.
    side
        Of the canvas.
    """
    device = networks.steps.device
    found = []
    for axis in range(3):
        usable = full_slices(mask, axis)
        chosen = np.linspace(0, len(usable) - 1, min(_SLICES, len(usable)))
        stack = image.movedim(axis, 0)[[usable[round(i)] for i in chosen]][:, None]
        with torch.no_grad():
            mean, _ = networks.theta(on_canvas(stack, side, side).to(device))
        found.append(mean.cpu())
    one, two = torch.cat(found).double().mean(0).tolist()
    return one, two


def draw_brain(
    networks: CalamitiNetworks,
    image: Tensor,
    mask: Tensor,
    thetas: Sequence[tuple[float, float]],
    side: int,
) -> Tensor:
    """A brain's anatomy in some contrasts, drawn slice by slice across each of the three axes.

    Returns
    -------
    drawn
        Shape (len(thetas), 3, X, Y, Z), on the CPU, 0 outside the mask.
    """
    device = networks.steps.device
    wanted = torch.tensor(list(thetas), dtype=torch.float32, device=device)
    drawn = torch.zeros((len(thetas), 3, *image.shape))
    for axis in range(3):
        stack, inside = image.movedim(axis, 0), mask.movedim(axis, 0)
        height, width = stack.shape[1:]
        top, left = (side - height) // 2, (side - width) // 2
        for rows in torch.nonzero(inside.flatten(1).any(1))[:, 0].split(_AT_ONCE):
            seen = on_canvas(stack[rows][:, None], side, side).to(device)
            brain = on_canvas(inside[rows][:, None].float(), side, side).to(device)
            with torch.no_grad():
                beta = networks.applied_beta(seen, brain)
                for index, theta in enumerate(wanted):
                    made = networks.draw(beta, theta.expand(len(rows), -1), brain)[:, 0].cpu()
                    made = made[:, top : top + height, left : left + width]
                    drawn[index, axis].movedim(axis, 0)[rows] = made
    return drawn


def fused(fusion: FusionNetwork | None, drawn: Tensor, mask: Tensor) -> Tensor:
    """One volume of the three of `draw_brain`, (3, X, Y, Z): network, or voxel median without."""
    if fusion is None:
        return drawn.median(0).values * mask
    device = next(fusion.parameters()).device
    with torch.no_grad():
        return fusion(drawn[None].to(device))[0, 0].cpu() * mask


def lost_contrast(drawn: Tensor, image: Tensor, mask: Tensor) -> float:
    """By what factor a brain's own contrast exceeds that of the brain as drawn, 1 to 2.

    Ratio of the standard deviations of means over 3 x 3 x 3 voxels, which leaves noise out. What
    the decoder cannot tell it draws as a mean, so its drawings are too flat, and so is the
    difference of two.
    """
    inside = mask.numpy()
    share = ndimage.uniform_filter(inside.astype(np.float32), _BLUR)[inside]
    spread = [
        float((ndimage.uniform_filter(np.where(inside, v, 0), _BLUR)[inside] / share).std())
        for v in (image.numpy(), drawn.numpy())
    ]
    return float(np.clip(spread[0] / max(spread[1], 1e-6), 1.0, _MOST_LOST))


def drawing_error(drawn: Tensor, image: Tensor, mask: Tensor) -> float:
    """Mean absolute error of a drawn brain, relative to the scan's about its own median.

    0: perfect; 1: no better than one grey value.
    """
    values = image[mask]
    spread = (values - values.median()).abs().mean().clamp(min=1e-6)
    return float((drawn[mask] - values).abs().mean() / spread)


@dataclass(frozen=True)
class Change:
    """What a scan shall be changed by.

    Attributes
    ----------
    values
        Shape (X, Y, Z), at most 0.5 of the scale (brain roughly 0..1) up or down.
    lost
        Contrast that drawing cost (`lost_contrast`).
    mean
        Of the brain's absolute changes.
    at_bound
        Share of the brain's voxels whose change was cut there.
    radius
        In voxels, of what counts as local.
    """

    values: NDArray[np.float32]
    lost: float
    mean: float
    at_bound: float
    radius: int


def change_between(
    drawn: tuple[Tensor, Tensor], image: Tensor, mask: Tensor, resolution: float
) -> Change:
    """From a brain as drawn to the same brain drawn otherwise, as far as the scan has it.

    The difference of the two drawings times the contrast that drawing costs; of it only what is
    locally a straight line of the scan's own intensity (`bounded_change`).

    Parameters
    ----------
    drawn
        With the scan's own theta, and with the wanted one; shape (X, Y, Z) each, on the CPU.
    image, mask
        The scan, same shape; the mask is not empty.
    resolution
        Voxel size in mm.
    """
    own, other = drawn
    inside = mask.numpy()
    radius = max(round(_RADIUS_MM / resolution), 1)
    lost = lost_contrast(own, image, mask)
    values, at_bound = bounded_change(
        image.numpy(), (lost * (other - own)).numpy(), inside, radius=radius, noise=_NOISE
    )
    return Change(values, lost, float(np.abs(values[inside]).mean()), at_bound, radius)
