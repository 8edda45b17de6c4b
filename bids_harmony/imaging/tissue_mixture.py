"""How a brain's intensities are distributed, given those of each tissue and the tissues' shares.

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


def mixture_quantiles(
    tissues: NDArray[Any], shares: Sequence[float] | NDArray[Any]
) -> Float64Array:
    """Quantiles of a mixture of tissues at 1001 even levels from 0 to 1.

    Parameters
    ----------
    tissues
        Quantiles of each tissue at even levels from 0 to 1, linear in between, shape
        (tissues, levels); NaN for a tissue that is not known, which is left out.
    shares
        Of the tissues, in any unit.

    Raises
    ------
    ScanError
        If no known tissue has a share.
    """
    tables = np.asarray(tissues, dtype=np.float64)
    weights = np.asarray(shares, dtype=np.float64)
    mixed = np.isfinite(tables).all(axis=1) & (weights > 0)
    if not mixed.any():
        raise ScanError("no tissue was found whose intensities are known")
    levels = np.linspace(0.0, 1.0, tables.shape[1])
    values = np.unique(tables[mixed])
    total = np.zeros_like(values)
    for table, weight in zip(tables[mixed], weights[mixed], strict=True):
        total += weight * np.interp(values, *merge_ties(table, levels), left=0.0, right=1.0)
    return np.interp(
        np.linspace(0.0, 1.0, _LEVELS), *merge_ties(total / weights[mixed].sum(), values)
    )
