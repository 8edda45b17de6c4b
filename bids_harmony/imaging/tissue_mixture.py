"""How a brain's intensities are distributed, given those of its classes and their shares.

Matching a brain's histogram to another's would make tissue shares look alike that differ between
people; what is mixed in the shares of that very brain does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bids_harmony.errors import ScanError
from bids_harmony.imaging.quantiles import Float64Array, merge_ties

_LEVELS = 1001
_LEAST_SHARE = 1e-3  # of the brain; less only stretches the range
_LEAST_KNOWN = 0.95  # of the brain


def mixture_quantiles(
    classes: NDArray[Any], shares: Sequence[float] | NDArray[Any]
) -> Float64Array:
    """Quantiles of a mixture of classes at 1001 even levels from 0 to 1.

    Classes with less than a thousandth of the brain are left out.

    Parameters
    ----------
    classes
        Quantiles of each class at even levels from 0 to 1, linear in between, shape
        (classes, levels); NaN for a class that is not known.
    shares
        Of the classes, in any unit; together they are the whole brain.

    Raises
    ------
    ScanError
        If less than 95 % of the brain is of known classes.
    """
    tables = np.asarray(classes, dtype=np.float64)
    weights = np.asarray(shares, dtype=np.float64)
    weights = weights / max(weights.sum(), np.finfo(float).tiny)
    mixed = np.isfinite(tables).all(axis=1) & (weights >= _LEAST_SHARE)
    known = float(weights[mixed].sum())
    if known < _LEAST_KNOWN:
        raise ScanError(f"of {1 - known:.0%} of the brain no intensities are known")
    levels = np.linspace(0.0, 1.0, tables.shape[1])
    values = np.unique(tables[mixed])
    total = np.zeros_like(values)
    for table, weight in zip(tables[mixed], weights[mixed], strict=True):
        total += weight * np.interp(values, *merge_ties(table, levels), left=0.0, right=1.0)
    return np.interp(np.linspace(0.0, 1.0, _LEVELS), *merge_ties(total / known, values))
