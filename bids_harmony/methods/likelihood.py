"""How likely a brain is under the reference domain's flow, and what is too unlikely to touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from bids_harmony.networks.flow import Flow
from bids_harmony.training.slices import on_canvas

_LEAST_VOXELS = 200
#: Above the reference brains' mean by so many of their standard deviations, at least so many bits.
_FLAG, _REFUSE = (4.0, 0.35), (8.0, 0.8)
_SMOOTH = 0.6  # voxels


@dataclass(frozen=True)
class Normal:
    """Bits per dimension of the reference domain's brains.

    Attributes
    ----------
    mean
        Over held-out brains, after their tone was mapped like any scan's.
    deviation
        Over all of its brains, which are more.
    """

    mean: float
    deviation: float

    @property
    def flag(self) -> float:
        """Above it a scan is told to be unlike the reference domain."""
        return self.mean + max(_FLAG[0] * self.deviation, _FLAG[1])

    @property
    def refuse(self) -> float:
        """Above it a scan is refused: not a brain of this contrast and orientation."""
        return self.mean + max(_REFUSE[0] * self.deviation, _REFUSE[1])

    def to_dict(self) -> dict[str, float]:
        """JSON-serialisable form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Normal:
        """Inverse of `to_dict`."""
        return cls(float(content["mean"]), float(content["deviation"]))


def normal_of(bits: Sequence[float]) -> Normal:
    """Mean and standard deviation of some brains' bits per dimension."""
    spread = float(np.std(bits, ddof=1)) if len(bits) > 1 else 0.0
    return Normal(float(np.mean(bits)), spread)


def smoothed(image: Tensor, mask: Tensor) -> Tensor:
    """A brain after a slight blur inside its mask, which takes most of the noise's bits away.

    What a scan shows is judged on it, not how noisy it is: a sharp scan of 2 mm has three bits
    more than one that was averaged to 2 mm, as many as another contrast has.
    """
    inside = mask.numpy().astype(np.float32)
    weight = np.maximum(ndimage.gaussian_filter(inside, _SMOOTH), 0.1)
    return torch.from_numpy(ndimage.gaussian_filter(image.numpy(), _SMOOTH) / weight) * mask


def usable_slices(mask: Tensor, axis: int) -> list[int]:
    """Slices across `axis` with at least `_LEAST_VOXELS` brain voxels."""
    voxels = mask.movedim(axis, 0).flatten(1).sum(1)
    return [int(i) for i in torch.nonzero(voxels >= _LEAST_VOXELS)[:, 0]]


def slices_of(image: Tensor, axis: int, divisor: int) -> Tensor:
    """All slices across `axis`, (N, 1, H, W), padded to multiples of `divisor`."""
    stack = image.movedim(axis, 0)[:, None]
    height, width = (-(-size // divisor) * divisor for size in stack.shape[2:])
    return on_canvas(stack, height, width)


def from_slices(stack: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Inverse of `slices_of`: the image of this shape whose slices are (N, 1, H, W)."""
    height, width = (size for a, size in enumerate(shape) if a != axis)
    return on_canvas(stack[:, 0], height, width).movedim(0, axis)


def bits_of_brain(
    flow: Flow, image: Tensor, mask: Tensor, axis: int, *, slices: int = 16
) -> float:
    """Bits per dimension over brain voxels, from evenly spaced slices.

    Parameters
    ----------
    flow
        Of the reference domain, in eval mode.
    image, mask
        Shape (X, Y, Z), model's grid, on the CPU; intensities on the reference domain's scale.
    axis
        Across which the flow's slices lie.
    slices
        Most slices to look at.

    Returns
    -------
    bits
        Weighted by each slice's brain voxels; infinity if not finite or no slice has enough brain.
    """
    usable = usable_slices(mask, axis)
    if not usable:
        return float("inf")
    chosen = [usable[round(i)] for i in np.linspace(0, len(usable) - 1, min(slices, len(usable)))]
    device = next(flow.parameters()).device
    stack = slices_of(image.movedim(axis, 0)[chosen], 0, flow.divisor)
    inside = slices_of(mask.movedim(axis, 0)[chosen].float(), 0, flow.divisor)
    with torch.no_grad():
        bits = torch.cat([
            flow.bits_per_dim(s.to(device), m.to(device)).cpu()
            for s, m in zip(stack.split(4), inside.split(4), strict=True)
        ])  # fmt: skip
    weight = inside.sum((1, 2, 3))
    found = float((bits * weight).sum() / weight.sum())
    return found if np.isfinite(found) else float("inf")
