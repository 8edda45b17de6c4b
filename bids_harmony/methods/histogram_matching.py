"""Histogram matching: the brain's intensity distribution becomes the reference domain's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from bids_harmony.errors import ScanError
from bids_harmony.imaging.quantiles import (
    Float64Array,
    mid_cdf,
    mid_quantiles,
    tail_dense_probabilities,
)
from bids_harmony.methods.base import Contract, Volume
from bids_harmony.methods.statistical import StatisticalMethod, in_mask

QUANTILES = 4001


class HistogramMatching(StatisticalMethod):
    """Histogram specification with continuous distribution functions.

    Model: quantiles of the brain at `QUANTILES` probabilities, ``sin^2``-spaced so that the tails
    are kept, averaged over the reference volumes (the barycentre of their distributions in the
    Wasserstein-2 sense). A scan's value v goes to the reference quantile at F(v), F its mid-rank
    distribution function. Ties, as in integer-valued images, share one probability on both sides,
    so that neither leaves steps in the other. Monotone.
    """

    name: ClassVar[str] = "histogram-matching"
    state_name: ClassVar[str] = "quantiles"

    @classmethod
    def contract_for(cls, modalities: Sequence[str]) -> Contract:
        """Native grid, robust scale, skull-stripped."""
        return Contract(tuple(modalities))

    @classmethod
    def _learn(cls, volumes: Sequence[Volume]) -> Float64Array:
        probability = tail_dense_probabilities(QUANTILES)
        return np.mean([mid_quantiles(in_mask(v), probability) for v in volumes], axis=0)

    @classmethod
    def _check_state(cls, state: Float64Array, shape: tuple[int, ...] | None) -> None:
        if state.ndim != 1 or state.size < 2 or np.any(np.diff(state) < 0):
            raise ScanError(f"{cls.name}: quantiles must be a non-decreasing vector")

    def _map(
        self, volume: Volume, state: Float64Array
    ) -> tuple[Float64Array, dict[str, Any], tuple[str, ...]]:
        values = in_mask(volume)
        levels, cumulative = mid_cdf(values)
        targets = np.interp(cumulative, tail_dense_probabilities(state.size), state)
        details = {"distinct_values": int(levels.size)}
        warnings: tuple[str, ...] = ()
        if levels.size < 64:
            warnings = (
                f"Only {levels.size} distinct intensities in the brain; steps stay visible.",
            )
        return np.interp(values, levels, targets), details, warnings
