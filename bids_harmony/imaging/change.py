"""Carry the change that a method made to the raw grid without losing detail or making seams.

All intensities are on the contract's scale (brain roughly 0..1). The change is harmonized minus
scaled input. Between grids the change is interpolated instead of the image, less the part of it
that has the anatomy's edges (see `tone`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_harmony.errors import ScanError
from bids_harmony.imaging.quantiles import (
    brain_values,
    merge_ties,
    mid_quantiles,
    tail_dense_probabilities,
)
from bids_harmony.imaging.tone import ToneCurve

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

SEAM_SIGMA = 2.5
_SEAM_REACH = 3.0
_SEAM_GAIN = (0.5, 2.0)
_END_SLOPE = (0.5, 2.0)


def extend_change(
    change: NDArray[Any], mask: NDArray[np.bool_], distance_vox: float
) -> FloatArray:
    """Continue the change outside the mask with the value of the nearest brain voxel.

    Interpolating a change that drops to zero at the mask would halve it at the brain's edge.

    Parameters
    ----------
    change
        Shape (X, Y, Z); values outside `mask` are ignored.
    mask
        Brain mask, same shape.
    distance_vox
        Reach in voxels; 0 beyond. Three voxels are enough for linear interpolation.

    Raises
    ------
    ScanError
        If the mask is empty or the change is not finite inside it.
    """
    _check(change, mask, "change")
    box = _box(mask, int(np.ceil(distance_vox)))
    inside = mask[box]
    distance, index = ndimage.distance_transform_edt(
        ~inside, return_distances=True, return_indices=True
    )
    nearest = np.asarray(change[box], dtype=np.float32)[tuple(index)]
    extended = np.zeros(change.shape, dtype=np.float32)
    extended[box] = np.where(distance <= distance_vox, nearest, np.float32(0))
    return extended


def brain_curve(
    before: NDArray[Any], after: NDArray[Any], mask: NDArray[np.bool_], knots: int = 101
) -> ToneCurve:
    """Summarise what a method did to the brain as one monotone intensity map.

    The map pairs equal quantiles of both images inside the mask, which is exact where the method
    is a monotone map. It is for the head's other voxels, so that head and brain stay on one scale.
    Below the darkest brain voxels it is the straight line to (0, 0), and 0 below 0. Beyond the
    brightest it continues with the secant of the upper twentieth, bounded to 0.5..2 times the
    gain at the last knot (the slopes of power laws with exponents 0.5..2).

    Parameters
    ----------
    before, after
        Scaled input and harmonized image on one grid, shape (X, Y, Z).
    mask
        Brain mask.
    knots
        Number of quantile pairs, at least 5.

    Raises
    ------
    ScanError
        If the mask is empty, or either brain is constant, non-finite or without positive values.
    """
    if knots < 5:
        raise ValueError("brain_curve needs at least 5 knots")
    probability = np.clip(tail_dense_probabilities(knots), 5e-4, 1 - 5e-4)
    x = mid_quantiles(brain_values(before, mask, "scaled input"), probability)
    y = np.maximum(mid_quantiles(brain_values(after, mask, "harmonized image"), probability), 0)
    keep = x > 0
    if not keep.any() or y[-1] <= 0:
        raise ScanError("no positive voxel inside the brain mask; check image and mask")
    x, y = merge_ties(np.append(0.0, x[keep]), np.append(0.0, y[keep]))
    start = min(int(np.searchsorted(x, x[-1] - max(0.05 * x[-1], 1e-12))), x.size - 2)
    slope = (y[-1] - y[start]) / (x[-1] - x[start])
    gain = y[-1] / x[-1]
    slope = float(np.clip(slope, _END_SLOPE[0] * gain, _END_SLOPE[1] * gain))
    return ToneCurve(tuple(x.tolist()), tuple(y.tolist()), 0.0, slope)


def distributed_change(
    scaled: NDArray[Any],
    change: NDArray[Any],
    mask: NDArray[np.bool_],
    quantiles: NDArray[Any],
    blur_vox: Sequence[float] = (0.0, 0.0, 0.0),
) -> FloatArray:
    """The change that gives the brain the histogram of the grid that it was made on.

    Interpolation alters the histogram, in each scan otherwise. An increasing map mends that. It is
    read off the brain as blurred as that grid shows it, so that finer voxels keep their noise and
    their tissues come to the intensities that these have there.

    Parameters
    ----------
    scaled, change, mask
        As for `apply_change`.
    quantiles
        Of the brain on the other grid, at even levels from 0 to 1.
    blur_vox
        Standard deviation of the blur along each axis, voxels.

    Raises
    ------
    ScanError
        If shapes differ, the mask is empty or a value is not finite.
    """
    _check(scaled, mask, "scaled scan")
    _check(change, mask, "change")
    found, box = np.array(change, dtype=np.float32), _box(mask, 0)
    inside = mask[box]
    after = np.where(inside, np.asarray(scaled[box], np.float64) + found[box], 0.0)
    blurred = ndimage.gaussian_filter(after, blur_vox)[inside]
    blurred /= ndimage.gaussian_filter(inside.astype(np.float64), blur_vox)[inside]
    levels = np.linspace(0.0, 1.0, len(quantiles))
    x, y = merge_ties(np.quantile(blurred, levels), np.asarray(quantiles, dtype=np.float64))
    curve = ToneCurve(tuple(x.tolist()), tuple(y.tolist()), 1.0, 1.0)
    found[mask] = curve(after[inside]) - np.asarray(scaled, np.float32)[mask]
    return found


def blur_to(spacing: Sequence[float], other: float) -> tuple[float, ...]:
    """Standard deviation (voxels) of a blur from one voxel size to another (mm), along each axis.

    Voxels are taken for Gaussians of their width at half maximum; 0 where they are no smaller.
    """
    wide = 2 * math.sqrt(2 * math.log(2))
    return tuple(math.sqrt(max(other**2 - z**2, 0.0)) / wide / z for z in spacing)


def apply_change(
    scaled: NDArray[Any],
    change: NDArray[Any],
    mask: NDArray[np.bool_],
    curve: ToneCurve | None,
    keep_head: bool,
    *,
    zero: NDArray[np.bool_] | None = None,
) -> FloatArray:
    """Harmonized scan on the raw grid, from the scaled raw scan and the change on the same grid.

    Inside the mask: ``max(scaled + change, 0)``. Outside: 0, or with `keep_head` the curve of the
    scan. Where the change at the brain's edge differs from the curve (a change that varies in
    space), the curve is multiplied by the local brain's ratio of the two, a Gaussian average (SD
    `SEAM_SIGMA` voxels) that fades to 1 with the mask's, so that no edge appears at the mask.
    A ratio, not a difference: dark voxels beside the brain stay dark.

    Parameters
    ----------
    scaled, change
        Shape (X, Y, Z), scaled units. Interpolate the change from `extend_change`'s result.
    mask
        Brain mask on the raw grid.
    curve
        From `brain_curve`; needed when `keep_head` is true.
    keep_head
        Keep the voxels outside the mask.
    zero
        Voxels that are exactly 0 in the raw image; by default those that are 0 in `scaled`
        (the same when the scale's low limit is 0). Outside the mask they stay exactly 0.

    Returns
    -------
    harmonized
        float32, finite, >= 0.

    Raises
    ------
    ScanError
        If shapes differ, the mask is empty or a value is not finite.
    """
    _check(scaled, mask, "scaled scan", everywhere=keep_head)
    _check(change, mask, "change")
    brain = np.maximum(np.asarray(scaled, np.float32) + np.asarray(change, np.float32), 0)
    if not keep_head:
        return np.where(mask, brain, np.float32(0))
    if curve is None:
        raise ValueError("keep_head needs the brain's curve")
    head = curve(scaled)
    box = _box(mask, int(np.ceil(_SEAM_REACH * SEAM_SIGMA)))
    head[box] *= _seam_gain(brain[box], head[box], mask[box])
    head[np.asarray(scaled) == 0 if zero is None else zero] = 0
    return np.where(mask, brain, head)


def _seam_gain(brain: FloatArray, head: FloatArray, mask: BoolArray) -> FloatArray:
    """Factor for voxels outside the mask: the local brain's harmonized-to-curve ratio, fading."""
    numerator, denominator = _blur(np.where(mask, brain, 0)), _blur(np.where(mask, head, 0))
    ratio = np.ones_like(numerator)
    # Far from the brain both sums vanish and their ratio would be rounding noise.
    np.divide(numerator, denominator, out=ratio, where=denominator > 1e-5)
    fade = np.minimum(2 * _blur(mask), 1)  # 1 at a flat edge, where half the Gaussian is inside
    return 1 + fade * (np.clip(ratio, *_SEAM_GAIN) - 1)


def _blur(image: NDArray[Any]) -> FloatArray:
    return ndimage.gaussian_filter(
        image.astype(np.float32), SEAM_SIGMA, mode="constant", truncate=_SEAM_REACH
    )


def _box(mask: BoolArray, margin: int) -> tuple[slice, ...]:
    """Bounding box of the mask with a margin in voxels, cut at the grid's edge."""
    (found,) = ndimage.find_objects(mask.astype(np.uint8))
    return tuple(
        slice(max(s.start - margin, 0), min(s.stop + margin, n))
        for s, n in zip(found, mask.shape, strict=True)
    )


def _check(
    data: NDArray[Any], mask: NDArray[np.bool_], what: str, *, everywhere: bool = False
) -> None:
    """Raise ScanError for a shape mismatch, an empty mask or non-finite values."""
    if data.shape != mask.shape:
        raise ScanError(f"{what} {data.shape} and brain mask {mask.shape} differ in shape")
    if not mask.any():
        raise ScanError("the brain mask is empty; check the mask or give another one")
    if not np.isfinite(data if everywhere else data[mask]).all():
        raise ScanError(f"the {what} holds NaN or infinite values")
