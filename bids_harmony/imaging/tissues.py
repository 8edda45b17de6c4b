"""Tissue labels: their numbers, and how far two segmentations agree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bids_harmony.errors import ScanError

Labels = NDArray[Any]
CSF, GREY_MATTER, WHITE_MATTER = 1, 2, 3
#: By their names in file names; 0 is background.
TISSUES = {"CSF": CSF, "GM": GREY_MATTER, "WM": WHITE_MATTER}


def check_one_grid(first: Labels, second: Labels) -> None:
    """ScanError if two segmentations differ in shape."""
    if first.shape != second.shape:
        raise ScanError(f"segmentations of shape {first.shape} and {second.shape}; resample one")


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
    check_one_grid(first, second)
    found = {}
    for label in labels:
        a, b = first == label, second == label
        total = np.count_nonzero(a) + np.count_nonzero(b)
        overlap = 2 * np.count_nonzero(a & b)
        found[int(label)] = overlap / total if total else float("nan")
    return found
