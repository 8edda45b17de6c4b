"""Volumes of tissue segmentations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[Any]


def label_volumes(
    segmentation: Labels, labels: Iterable[int], *, voxel: float = 1.0
) -> dict[int, float]:
    """Volume of each label.

    Parameters
    ----------
    segmentation
        Whole numbers, any shape.
    labels
        Which to measure; one that does not occur has volume 0.
    voxel
        Volume of a voxel in mm^3; 1 counts voxels.
    """
    return {int(k): float(np.count_nonzero(segmentation == k)) * voxel for k in labels}


def relative_volume_difference(
    reference: Labels, segmentation: Labels, labels: Iterable[int], *, ratio: float = 1.0
) -> dict[int, float]:
    """Relative absolute volume difference (rAVD) in per cent, per label, >= 0.

    ``100 |vol(p) - vol(r)| / vol(r)``. Source: HAIL, equation 2, where the reference r is the
    segmentation of the input.

    Parameters
    ----------
    reference, segmentation
        Whole numbers; the shapes may differ, since volumes are compared, not places.
    labels
        Which to compare.
    ratio
        Voxel volume of `segmentation` divided by that of `reference`.

    Returns
    -------
    Per label; NaN where the reference has none of it.
    """
    wanted = tuple(labels)
    before = label_volumes(reference, wanted)
    after = label_volumes(segmentation, wanted, voxel=ratio)
    return {
        k: 100 * abs(after[k] - before[k]) / before[k] if before[k] else float("nan")
        for k in before
    }
