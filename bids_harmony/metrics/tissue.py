"""Volumes of tissue segmentations, and how far two of them lie apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_harmony.imaging.tissues import check_one_grid

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


def mean_hausdorff(
    first: Labels, second: Labels, labels: Iterable[int], spacing: Sequence[float]
) -> dict[int, float]:
    """Mean Hausdorff distance in mm, per label: how far two segmentations of a tissue lie apart.

    Mean distance of the voxels of one from the nearest voxel of the other, averaged over both
    directions. deepNormalize's equation 5 takes the largest distance instead, but its figures
    (0.2 to 0.8 mm at 1 mm) are means.

    Parameters
    ----------
    first, second
        Whole numbers on one grid.
    labels
        Which to compare.
    spacing
        Voxel size in mm.

    Returns
    -------
    Per label; NaN where one of them has none of it.

    Raises
    ------
    ScanError
        If the shapes differ.
    """
    check_one_grid(first, second)
    found = {}
    for label in labels:
        pair = first == label, second == label
        if not all(part.any() for part in pair):
            found[int(label)] = float("nan")
            continue
        apart = [
            float(ndimage.distance_transform_edt(~there, sampling=spacing)[here].mean())
            for here, there in (pair, pair[::-1])
        ]
        found[int(label)] = sum(apart) / 2
    return found
