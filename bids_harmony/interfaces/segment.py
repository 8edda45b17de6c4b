"""Tissue segmentation of T1w brains with ANTs' Atropos."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bids_harmony.errors import ScanError
from bids_harmony.interfaces.ants_functions import Array, bounding_box, to_ants

_LEAST_VOXELS = 1000
_LOW_PERCENT, _HIGH_PERCENT = 0.5, 99.5


def atropos(
    ants: Any,
    data: Array,
    affine: Array,
    mask: Array,
    *,
    classes: int = 3,
    smoothing: float = 0.1,
    iterations: int = 5,
) -> NDArray[np.uint8]:
    """Segment a brain into classes of rising intensity (Avants 2011).

    Finite mixture of Gaussians, started by K-means, with a Markov random field over the 26
    neighbours. No random numbers are drawn: the same scan gives the same labels. Of a T1w scan the
    three classes are 1 CSF, 2 grey matter, 3 white matter, as in `bids_harmony.imaging.tissues`.

    Parameters
    ----------
    ants
        Module from `ants_session`.
    data
        Bias-corrected scan, shape (X, Y, Z), any linear unit: it is scaled and its tails beyond
        the 0.5th and 99.5th percentile of the brain are cut, so that vessels make no class.
    affine
        RAS affine, mm.
    mask
        Brain mask, same shape.
    classes
        Number of classes.
    smoothing
        Weight of the Markov random field.
    iterations
        At most so many.

    Returns
    -------
    Labels, shape (X, Y, Z), 0 outside the mask, 1 the darkest class.

    Raises
    ------
    ScanError
        If the brain is not finite, constant, or smaller than 1000 voxels, or a class stays empty.
    """
    inside = np.asarray(mask) > 0
    if inside.shape != data.shape or np.count_nonzero(inside) < _LEAST_VOXELS:
        raise ScanError(
            "the brain mask is too small, or not on the scan's grid, to segment tissue"
        )
    if not np.isfinite(data[inside]).all():
        raise ScanError("NaN or infinite values inside the brain; repair the image")
    low, high = np.percentile(data[inside], (_LOW_PERCENT, _HIGH_PERCENT))
    if not low < high:
        raise ScanError("the brain is constant; there is no tissue to tell apart")
    box = bounding_box(inside, 2)
    scaled = np.where(inside, np.clip((data - low) / (high - low), 0, 1), 0)[box]
    found = ants.atropos(
        a=to_ants(ants, scaled, affine),
        x=to_ants(ants, inside[box].astype(np.float32), affine),
        i=f"kmeans[{classes}]",
        m=f"[{smoothing},1x1x1]",
        c=f"[{iterations},0]",
        r=0,
    )["segmentation"].numpy()
    labels = np.zeros(data.shape, np.uint8)
    labels[box] = _ordered(np.where(inside[box], found, 0), scaled, classes)
    return labels


def _ordered(found: Array, scaled: Array, classes: int) -> NDArray[np.uint8]:
    """Number the classes by mean intensity."""
    kept = [k for k in range(1, classes + 1) if np.any(found == k)]
    if len(kept) < classes:
        raise ScanError(f"only {len(kept)} of {classes} tissue classes found; check the scan")
    ranking = sorted(kept, key=lambda k: float(scaled[found == k].mean()))
    out = np.zeros(found.shape, np.uint8)
    for number, label in enumerate(ranking, start=1):
        out[found == label] = number
    return out
