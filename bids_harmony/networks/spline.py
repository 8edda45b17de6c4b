"""Monotone rational-quadratic splines with linear tails (Durkan et al. 2019, Neural Spline Flows).

Only the knots of the bin that holds the input are brought to full form; all elements, inside and
outside the tail bound, take one path, without boolean indexing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

MIN_WIDTH = 1e-3
MIN_HEIGHT = 1e-3
MIN_SLOPE = 1e-3


class Bin(NamedTuple):
    """The bin of each element: lower corner, size and slopes at both ends, shape of the input."""

    left: Tensor
    width: Tensor
    bottom: Tensor
    height: Tensor
    slope_left: Tensor
    slope_right: Tensor


def rational_quadratic(
    x: Tensor, parameters: Tensor, tail_bound: float, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Element-wise monotone spline on [-tail_bound, tail_bound], the identity outside.

    Durkan et al. 2019, eqs. 4-8. Where float32 loses the discriminant of the inverse, it counts
    as zero.

    Parameters
    ----------
    x
        Any shape.
    parameters
        Shape of `x` plus 3 K - 1 for K bins: K unnormalized widths, K heights, K - 1 slopes at
        the inner knots.

    Returns
    -------
    y, log_slope
        Shape of `x`; log_slope is log dy/dx, for the inverse as well.
    """
    inside = x.abs() <= tail_bound
    value = x.clamp(-tail_bound, tail_bound)
    found = find_bin(value, parameters, tail_bound, by_height=inverse)
    y, log_slope = (_invert if inverse else _evaluate)(value, found)
    return torch.where(inside, y, x), log_slope * inside


def find_bin(x: Tensor, parameters: Tensor, tail_bound: float, *, by_height: bool) -> Bin:
    """The bin of each element, by its x coordinate or, `by_height`, by its y coordinate."""
    bins = (parameters.shape[-1] + 1) // 3
    sizes = parameters[..., : 2 * bins].unflatten(-1, (2, bins)).softmax(dim=-1)
    least = MIN_WIDTH
    sizes = (2 * tail_bound) * (least + (1 - least * bins) * sizes)
    knots = sizes.cumsum(dim=-1) - tail_bound
    axis = knots[..., int(by_height), :-1]
    index = (x.unsqueeze(-1) >= axis).sum(dim=-1, keepdim=True)
    both = index.unsqueeze(-1).expand(*index.shape[:-1], 2, 1)
    size = sizes.gather(-1, both).squeeze(-1)
    corner = knots.gather(-1, both).squeeze(-1) - size
    # The tails have slope 1: softplus of `outer` plus the least slope.
    outer = math.log(math.exp(1 - MIN_SLOPE) - 1)
    padded = functional.pad(parameters[..., 2 * bins :], (1, 1), value=outer)
    ends = torch.cat((index, index + 1), dim=-1)
    slopes = MIN_SLOPE + functional.softplus(padded.gather(-1, ends))
    return Bin(
        corner[..., 0], size[..., 0], corner[..., 1], size[..., 1], slopes[..., 0], slopes[..., 1]
    )


def _log_slope(theta: Tensor, steep: Tensor, curve: Tensor, found: Bin) -> Tensor:
    """log dy/dx at the place `theta` (0..1) of the bin; `steep` its mean slope."""
    across = theta * (1 - theta)
    numerator = (
        found.slope_right * theta.square()
        + 2 * steep * across
        + found.slope_left * (1 - theta).square()
    )
    return 2 * torch.log(steep / (steep + curve * across)) + torch.log(numerator)


def _evaluate(x: Tensor, found: Bin) -> tuple[Tensor, Tensor]:
    steep = found.height / found.width
    curve = found.slope_left + found.slope_right - 2 * steep
    theta = (x - found.left) / found.width
    across = theta * (1 - theta)
    rise = found.height * (steep * theta.square() + found.slope_left * across)
    y = found.bottom + rise / (steep + curve * across)
    return y, _log_slope(theta, steep, curve, found)


def _invert(y: Tensor, found: Bin) -> tuple[Tensor, Tensor]:
    steep = found.height / found.width
    curve = found.slope_left + found.slope_right - 2 * steep
    rise = y - found.bottom
    a = found.height * (steep - found.slope_left) + rise * curve
    b = found.height * found.slope_left - rise * curve
    c = -steep * rise
    root = (b.square() - 4 * a * c).clamp_min(0).sqrt()
    theta = (2 * c / (-b - root)).clamp(0, 1)
    return theta * found.width + found.left, -_log_slope(theta, steep, curve, found)
