"""Are lesions still seen? Contrast to what lies around them, and volume at half of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

_RING_MM, _RING_VOXELS = 6.0, 3  # whichever is wider
_REACH_MM = 2.0
_RANGE = (5, 95)  # per cent


def lesion_contrast(
    image: NDArray[Any],
    lesions: NDArray[np.bool_],
    mask: NDArray[np.bool_],
    spacing: Sequence[float],
) -> float:
    """How far lesions stand out from the brain around them, in units of the brain's range.

    Median of the lesions minus median of the ring, over the difference of the brain's 95th and
    5th percentiles: the same number on every linear scale of intensity.

    Parameters
    ----------
    image
        Shape (X, Y, Z), any scale.
    lesions, mask
        Same shape; lesions outside the brain mask do not count.
    spacing
        Voxel size in mm. The ring is the brain up to 6 mm from a lesion (up to three of the
        smallest voxel edges, if that is more), without the voxels that touch one.

    Returns
    -------
    Negative for dark lesions; NaN if there is no lesion or no ring.
    """
    inside, ring, _ = _places(lesions, mask, spacing)
    if not (inside.any() and ring.any()):
        return float("nan")
    low, high = np.percentile(image[mask], _RANGE)
    difference = float(np.median(image[inside]) - np.median(image[ring]))
    return difference / float(high - low) if high > low else float("nan")


def lesion_volume(
    image: NDArray[Any],
    lesions: NDArray[np.bool_],
    mask: NDArray[np.bool_],
    spacing: Sequence[float],
) -> float:
    """Volume, in ml, of what looks like lesion in a marked lesion and up to 2 mm around it.

    What looks like lesion is nearer to the lesions' median intensity than to the ring's.

    Parameters
    ----------
    image, lesions, mask, spacing
        As for `lesion_contrast`.

    Returns
    -------
    NaN if there is no lesion or no ring.
    """
    inside, ring, near = _places(lesions, mask, spacing)
    if not (inside.any() and ring.any()):
        return float("nan")
    lesion, around = float(np.median(image[inside])), float(np.median(image[ring]))
    values = image[near]
    alike = np.abs(values - lesion) < np.abs(values - around)
    return float(np.count_nonzero(alike) * np.prod(spacing) / 1000)


def _places(
    lesions: NDArray[np.bool_], mask: NDArray[np.bool_], spacing: Sequence[float]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Lesions in the brain, the ring around them, and lesions with their nearest surroundings."""
    inside = lesions & mask
    away = np.asarray(ndimage.distance_transform_edt(~inside, sampling=tuple(spacing)))
    touching = ndimage.binary_dilation(inside, np.ones((3, 3, 3)))
    ring = mask & ~touching & (away <= max(_RING_MM, _RING_VOXELS * min(spacing)))
    return inside, ring, mask & (away <= _REACH_MM)
