"""Monotone rational-quadratic splines with linear tails (Durkan et al. 2019, Neural Spline Flows).

The parameters of an element lie along the last axis but one, so that every operation runs over
long rows. All elements, inside and outside the tail bound, take one path, and only the bin that
holds an element is worked out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

#: Least width and height of a bin as a share of the interval, and least slope at a knot.
MIN_SIZE = 1e-3
MIN_SLOPE = 1e-3
#: Least discriminant: the gradient of the root at zero would not be finite.
TINY = 1e-20


class Bin(NamedTuple):
    """The bin of each element: lower corner, size, slopes at both ends; shaped as the input."""

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

    Durkan et al. 2019, eqs. 4-8. Where rounding loses the discriminant of the inverse, it counts
    as (nearly) zero. Second derivatives are not available.

    Parameters
    ----------
    x
        Shape (..., N).
    parameters
        Shape (..., 3 K - 1, N) for K >= 2 bins: K unnormalized widths, K heights, K - 1 slopes at
        the inner knots.

    Returns
    -------
    y, log_slope
        Shape (..., N); log_slope is log dy/dx, for the inverse as well.
    """
    value = x.clamp(-tail_bound, tail_bound)
    found = Bin(*FindBin.apply(value.detach(), parameters, tail_bound, inverse))
    y, log_slope = (_invert if inverse else _evaluate)(value, found)
    # In the tails `y` is the bound and log_slope 0, up to rounding.
    inside = (x.abs() <= tail_bound).to(x.dtype)
    return y * inside + x * (1 - inside), log_slope * inside


class FindBin(torch.autograd.Function):
    """The `Bin` of each element, by its x coordinate or, `by_height`, by its y coordinate.

    With p the softmax of K unnormalized sizes, m the least share and s the whole interval, a bin's
    size is s (m + (1 - m K) p). The gradient by the sizes is that of the size of the bin found,
    and of its corner, the sum of the sizes before it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parameters: Tensor, tail_bound: float, by_height: bool
    ) -> tuple[Tensor, ...]:
        """See the class; `x` (..., N), `parameters` (..., 3 K - 1, N)."""
        bins = (parameters.shape[-2] + 1) // 3
        share = parameters[..., : 2 * bins, :].unflatten(-2, (2, bins)).softmax(dim=-2)
        upto = running_sum(share)
        whole, rest = 2 * tail_bound, 1 - MIN_SIZE * bins
        number = torch.arange(1, bins, dtype=x.dtype, device=x.device).unsqueeze(-1)
        axis = upto[..., int(by_height), :-1, :] * rest + MIN_SIZE * number
        position = ((x + tail_bound) / whole).unsqueeze(-2)
        index = (position >= axis).sum(dim=-2, keepdim=True)
        both = index.unsqueeze(-3).expand(*share.shape[:-2], 1, -1)
        picked = share.gather(-2, both).squeeze(-2)
        before = upto.gather(-2, both).squeeze(-2) - picked
        size = whole * (MIN_SIZE + rest * picked)
        corner = whole * (MIN_SIZE * index.to(x.dtype) + rest * before) - tail_bound
        slopes = parameters[..., 2 * bins :, :]
        raw = [
            slopes.gather(-2, (index + side).clamp(0, bins - 2)).squeeze(-2) for side in (-1, 0)
        ]
        # The tails have slope 1.
        ends = [index.squeeze(-2) == edge for edge in (0, bins - 1)]
        slope = [
            (functional.softplus(r) + MIN_SLOPE).masked_fill(end, 1)
            for r, end in zip(raw, ends, strict=True)
        ]
        ctx.save_for_backward(share, index, *raw)
        ctx.factor = whole * rest
        left, bottom = corner.unbind(-2)
        width, height = size.unbind(-2)
        return left, width, bottom, height, slope[0], slope[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None]:
        """Gradient by `parameters` alone: a bin is constant around `x`."""
        share, index, raw_left, raw_right = ctx.saved_tensors
        bins = share.shape[-2]
        left, width, bottom, height, slope_left, slope_right = grads
        corner = torch.stack((left, bottom), dim=-2).unsqueeze(-2)
        size = torch.stack((width, height), dim=-2).unsqueeze(-2)
        number = torch.arange(bins, dtype=share.dtype, device=index.device).unsqueeze(-1)
        both = index.unsqueeze(-3)
        by_share = (both - number).clamp_(0, 1) * corner
        by_share.scatter_(-2, both.expand_as(size), size)
        by_share.mul_(share)
        total = by_share.sum(dim=-2, keepdim=True)
        shape = (*share.shape[:-3], 3 * bins - 1, share.shape[-1])
        out = torch.zeros(shape, dtype=share.dtype, device=share.device)
        by_size = out[..., : 2 * bins, :].unflatten(-2, (2, bins))
        torch.addcmul(by_share, share, total, value=-1, out=by_share)
        by_size.copy_(by_share.mul_(ctx.factor))
        by_slope = out[..., 2 * bins :, :]
        for side, raw, grad in ((-1, raw_left, slope_left), (0, raw_right, slope_right)):
            edge = index == (0 if side else bins - 1)
            value = (grad * torch.sigmoid(raw)).unsqueeze(-2).masked_fill(edge, 0)
            by_slope.scatter_add_(-2, (index + side).clamp(0, bins - 2), value)
        return None, out, None, None


def running_sum(share: Tensor) -> Tensor:
    """The cumulative sum along the last axis but one; faster than `cumsum` for long rows."""
    out = share.clone()
    for k in range(1, share.shape[-2]):
        out[..., k, :] += out[..., k - 1, :]
    return out


def _log_slope(theta: Tensor, steep: Tensor, curve: Tensor, found: Bin) -> Tensor:
    """log dy/dx at the place `theta` (0..1) of the bin; `steep` is its mean slope."""
    across = theta * (1 - theta)
    numerator = (
        found.slope_right * theta.square()
        + 2 * steep * across
        + found.slope_left * (1 - theta).square()
    )
    return torch.log(numerator * (steep / (steep + curve * across)).square())


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
    root = (b.square() - 4 * a * c).clamp_min(TINY).sqrt()
    theta = (2 * c / (-b - root)).clamp(0, 1)
    return theta * found.width + found.left, -_log_slope(theta, steep, curve, found)
