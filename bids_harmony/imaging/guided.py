"""Give a scan the intensities of another image while its own anatomy stays.

What an image-to-image network draws is blurred and may hold edges that the scan lacks. In each
neighbourhood the drawn image is therefore taken for a straight line of the scan's own intensity:
contrast may be raised, lowered or inverted there, but no edge appears, moves or is lost. He, Sun
and Tang (IEEE TPAMI 2013), guided filter, restricted to a mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_harmony.errors import ScanError

FloatArray = NDArray[np.float32]
#: Largest change of a voxel, of the intensity scale: more is invention, not harmonization.
MOST_CHANGE = 0.5
_FEW_AT_BOUND = 0.01  # of the brain: may be cut at it without doubt


def guided_transfer(
    scan: NDArray[Any],
    drawn: NDArray[Any],
    mask: NDArray[np.bool_],
    *,
    radius: int,
    noise: float,
) -> FloatArray:
    """The scan with the local contrast of the drawn image.

    In the cube around each voxel, cut to the mask, ``drawn ~ a * scan + b`` by ridge regression;
    the result is ``mean(a) * scan + mean(b)``, means over the cubes that hold the voxel.

    Parameters
    ----------
    scan, drawn
        Shape (X, Y, Z), same grid and intensity scale.
    mask
        Brain mask; voxels outside take no part.
    radius
        Half the edge of the cube, in voxels, at least 1.
    noise
        Standard deviation of the scan's intensity below which a neighbourhood counts as flat:
        there the drawn image's mean is taken, and its details are not.

    Returns
    -------
    transferred
        float32, 0 outside the mask; not clipped.

    Raises
    ------
    ScanError
        If shapes differ or a value in the mask is not finite.
    """
    if not scan.shape == drawn.shape == mask.shape:
        raise ScanError(f"scan {scan.shape}, drawn image {drawn.shape}, mask {mask.shape} differ")
    if not (np.isfinite(scan[mask]).all() and np.isfinite(drawn[mask]).all()):
        raise ScanError("guided transfer: NaN or infinite values in the brain")
    x, y = (np.where(mask, v, 0).astype(np.float64) for v in (scan, drawn))
    size = 2 * radius + 1

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Over the part of the cube that is brain."""
        total = ndimage.uniform_filter(values, size, mode="constant")
        return np.divide(total, share, out=np.zeros_like(total), where=mask)

    share = ndimage.uniform_filter(mask.astype(np.float64), size, mode="constant")
    mean_x, mean_y = mean(x), mean(y)
    variance = np.maximum(mean(x * x) - mean_x**2, 0)
    slope = (mean(x * y) - mean_x * mean_y) / (variance + noise**2)
    slope = np.where(mask, slope, 0)
    offset = np.where(mask, mean_y - slope * mean_x, 0)
    return np.where(mask, mean(slope) * x + mean(offset), 0).astype(np.float32)


def bounded_change(
    scan: NDArray[Any],
    change: NDArray[Any],
    mask: NDArray[np.bool_],
    *,
    radius: int,
    noise: float,
) -> tuple[FloatArray, float]:
    """What of a drawn change has the scan's own anatomy, at most `MOST_CHANGE` up or down.

    Parameters and errors as those of `guided_transfer`.

    Returns
    -------
    change
        float32, 0 outside the mask.
    at_bound
        Share of the brain's voxels whose change was cut.
    """
    found = guided_transfer(scan, change, mask, radius=radius, noise=noise)
    at_bound = float((np.abs(found[mask]) > MOST_CHANGE).mean())
    return np.clip(found, -MOST_CHANGE, MOST_CHANGE), at_bound


def bound_warnings(at_bound: float) -> list[str]:
    """A sentence where more than 1 % of the brain was cut (`bounded_change`), or nothing."""
    if at_bound <= _FEW_AT_BOUND:
        return []
    return [
        f"The change of {at_bound:.0%} of the brain was cut at {MOST_CHANGE:g} of the intensity "
        "scale: the networks wanted more than can be trusted. Look at the result before you use "
        "it."
    ]
