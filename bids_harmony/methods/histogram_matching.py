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

KNOTS = 1001


class HistogramMatching(StatisticalMethod):
    """Histogram specification with continuous distribution functions.

    Model: quantiles of the brain, averaged over the reference volumes (the barycentre of their
    distributions in the Wasserstein-2 sense), at `KNOTS` probabilities ``sin^2``-spaced to keep
    the tails, and as many that cut the reference intensities evenly to keep sparse ranges.
    Row 0 holds the probabilities, row 1 the intensities.

    A scan's value v goes to the reference quantile at F(v), F its mid-rank distribution function.
    Ties, as in integer-valued images, share one probability on both sides, so that neither
    leaves steps in the other. Monotone.
    """

    name: ClassVar[str] = "histogram-matching"
    state_name: ClassVar[str] = "quantiles"

    @classmethod
    def contract_for(cls, modalities: Sequence[str]) -> Contract:
        """Native grid, robust scale, skull-stripped."""
        return Contract(tuple(modalities))

    @classmethod
    def _learn(cls, volumes: Sequence[Volume]) -> Float64Array:
        brains = [in_mask(volume) for volume in volumes]
        spread = [_probability_of_even_levels(brain) for brain in brains]
        probability = np.unique([*tail_dense_probabilities(KNOTS), *np.mean(spread, axis=0)])
        quantiles = [mid_quantiles(brain, probability) for brain in brains]
        return np.stack([probability, np.mean(quantiles, axis=0)])

    @classmethod
    def _check_state(cls, state: Float64Array, shape: tuple[int, ...] | None) -> None:
        good = state.ndim == 2 and len(state) == 2 and state.shape[1] > 1
        if not good or np.any(np.diff(state) < 0) or state[1, 0] == state[1, -1]:
            raise ScanError(f"{cls.name}: quantiles must be two non-decreasing rows")

    def _map(
        self, volume: Volume, state: Float64Array
    ) -> tuple[Float64Array, dict[str, Any], tuple[str, ...]]:
        values = in_mask(volume)
        levels, cumulative = mid_cdf(values)
        targets = np.interp(cumulative, state[0], state[1])
        details = {"distinct_values": int(levels.size)}
        warnings: tuple[str, ...] = ()
        if levels.size < 64:
            warnings = (
                f"Only {levels.size} distinct intensities in the brain; steps stay visible.",
            )
        return np.interp(values, levels, targets), details, warnings


def _probability_of_even_levels(values: Float64Array) -> Float64Array:
    """Distribution function at `KNOTS` intensities evenly spaced from minimum to maximum."""
    levels, cumulative = mid_cdf(values)
    return np.interp(np.linspace(levels[0], levels[-1], KNOTS), levels, cumulative)
