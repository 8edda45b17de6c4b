"""Values inside the brain mask, and their quantiles."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bids_harmony.errors import ScanError

Float64Array = NDArray[np.float64]


def brain_values(data: NDArray[Any], mask: NDArray[np.bool_], name: str = "scan") -> Float64Array:
    """Values of `data` inside `mask`, in array order.

    Parameters
    ----------
    data, mask
        Same shape.
    name
        For messages.

    Raises
    ------
    ScanError
        If the shapes differ, the mask is empty, or the brain holds non-finite or constant values.
    """
    if data.shape != mask.shape:
        raise ScanError(
            f"{name}: image {data.shape} and brain mask {mask.shape} differ in shape; "
            "give a mask on the image's grid"
        )
    values = np.asarray(data[np.asarray(mask, dtype=bool)], dtype=np.float64)
    if values.size == 0:
        raise ScanError(f"{name}: the brain mask is empty; check the mask or give another one")
    if not np.isfinite(values).all():
        raise ScanError(f"{name}: NaN or infinite values inside the brain; repair the image")
    low, high = float(values.min()), float(values.max())
    if not _apart(low, high):
        raise ScanError(f"{name}: all brain voxels have the value {low:g}; check image and mask")
    return values


def _apart(low: float, high: float) -> bool:
    """Whether float32 can tell values between `low` and `high` apart."""
    return high - low > 4 * float(np.finfo(np.float32).eps) * max(abs(low), abs(high), 1e-30)


def mid_cdf(values: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Continuous cumulative distribution function of a sample, ties shared at mid-rank.

    Returns
    -------
    levels, probability
        The distinct values (increasing) and ``(n_below + n_equal / 2) / n`` of each, in (0, 1).
        Without ties these are Hazen's plotting positions (i + 0.5) / n.
    """
    levels, counts = np.unique(values, return_counts=True)
    below = np.cumsum(counts) - counts
    return levels, (below + 0.5 * counts) / values.size


def mid_quantiles(values: Float64Array, probability: Float64Array) -> Float64Array:
    """Inverse of `mid_cdf`, linear between levels: no steps for integer-valued images.

    Without ties equal to ``numpy.quantile(values, probability, method="hazen")``.
    """
    levels, cumulative = mid_cdf(values)
    return np.interp(probability, cumulative, levels)


def tail_dense_probabilities(count: int) -> Float64Array:
    """`count` probabilities from 0 to 1, ``sin^2``-spaced: both tails are finely sampled."""
    return np.sin(0.5 * np.pi * np.linspace(0.0, 1.0, count)) ** 2


def merge_ties(x: Float64Array, y: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Knots with strictly increasing `x` and non-decreasing `y`; tied `x` share their mean `y`.

    Parameters
    ----------
    x
        Non-decreasing, shape (K,).
    y
        Shape (K,).
    """
    levels, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    mean = np.bincount(inverse, weights=y) / counts
    return levels, np.maximum.accumulate(mean)


def distributed(values: NDArray[Any], quantiles: NDArray[Any]) -> Float64Array:
    """A sample's values mapped so that they are distributed as given; increasing.

    Ties share one rank, those of the mapped values too.

    Parameters
    ----------
    values
        Not empty, finite.
    quantiles
        Wanted, at even levels from 0 to 1, non-decreasing.
    """
    levels, cumulative = mid_cdf(np.asarray(values, dtype=np.float64))
    targets = np.interp(cumulative, np.linspace(0.0, 1.0, len(quantiles)), quantiles)
    return np.interp(values, levels, targets)
