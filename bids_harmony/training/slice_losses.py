"""Losses on slices that several methods share."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

_SCALES = 3


def masked_l1(drawn: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference over the mask; all shapes broadcast to that of `drawn`."""
    return ((drawn - wanted).abs() * mask).sum() / mask.expand_as(drawn).sum().clamp(min=1)


def edge_difference(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute difference of the gradients of images (B, C, H, W), sum over 3 scales.

    Gradients are differences of neighbouring pixels along both axes; each scale is half as fine
    as the one before (means of 2 x 2 pixels).
    """
    total = drawn.new_zeros(())
    for scale in range(_SCALES):
        if scale:
            drawn, wanted = (functional.avg_pool2d(image, 2) for image in (drawn, wanted))
        rest = drawn - wanted
        total = total + rest.diff(dim=-1).abs().mean() + rest.diff(dim=-2).abs().mean()
    return total
