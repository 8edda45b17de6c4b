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


def lesion_contrast_and_volume(
    images: Sequence[NDArray[Any]],
    lesions: NDArray[np.bool_],
    mask: NDArray[np.bool_],
    spacing: Sequence[float],
) -> list[tuple[float, float]]:
    """How far lesions stand out from the brain around them, and how large they look.

    Contrast: median of the lesions minus median of the ring, over the difference of the brain's
    95th and 5th percentiles: the same number on every linear scale of intensity. Volume: what is
    nearer to the lesions' median intensity than to the ring's, in a lesion and up to 2 mm from it.

    Parameters
    ----------
    images
        Of one brain, shape (X, Y, Z) each, any scale.
    lesions, mask
        Same shape; lesions outside the brain mask do not count.
    spacing
        Voxel size in mm. The ring is the brain up to 6 mm from a lesion (up to three of the
        smallest voxel edges, if that is more), without the voxels that touch one.

    Returns
    -------
    For each image contrast, negative for dark lesions, and volume in ml; NaN if there is no
    lesion or no ring.
    """
    inside, ring, near = _places(lesions, mask, spacing)
    if not (inside.any() and ring.any()):
        return [(float("nan"), float("nan"))] * len(images)
    found = []
    for image in images:
        lesion, around = float(np.median(image[inside])), float(np.median(image[ring]))
        low, high = np.percentile(image[mask], _RANGE)
        contrast = (lesion - around) / float(high - low) if high > low else float("nan")
        alike = np.abs(image[near] - lesion) < np.abs(image[near] - around)
        found.append((contrast, float(np.count_nonzero(alike) * np.prod(spacing) / 1000)))
    return found


def _places(
    lesions: NDArray[np.bool_], mask: NDArray[np.bool_], spacing: Sequence[float]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Lesions in the brain, the ring around them, and lesions with their nearest surroundings."""
    inside = lesions & mask
    away = np.asarray(ndimage.distance_transform_edt(~inside, sampling=tuple(spacing)))
    touching = ndimage.binary_dilation(inside, np.ones((3, 3, 3)))
    ring = mask & ~touching & (away <= max(_RING_MM, _RING_VOXELS * min(spacing)))
    return inside, ring, mask & (away <= _REACH_MM)
