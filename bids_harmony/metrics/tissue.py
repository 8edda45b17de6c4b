"""Agreement of tissue segmentations: volumes and overlap per label."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bids_harmony.errors import ScanError

Labels = NDArray[Any]
CSF, GREY_MATTER, WHITE_MATTER = 1, 2, 3
TISSUES = {"CSF": CSF, "GM": GREY_MATTER, "WM": WHITE_MATTER}


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


def dice(first: Labels, second: Labels, labels: Iterable[int]) -> dict[int, float]:
    """Dice overlap, 0..1, per label: twice the common voxels over the sum of both.

    Parameters
    ----------
    first, second
        Whole numbers on one grid.
    labels
        Which to compare.

    Returns
    -------
    Per label; NaN where neither segmentation has it.

    Raises
    ------
    ScanError
        If the shapes differ.
    """
    if first.shape != second.shape:
        raise ScanError(f"segmentations of shape {first.shape} and {second.shape}; resample one")
    found = {}
    for label in labels:
        a, b = first == label, second == label
        total = np.count_nonzero(a) + np.count_nonzero(b)
        overlap = 2 * np.count_nonzero(a & b)
        found[int(label)] = overlap / total if total else float("nan")
    return found
