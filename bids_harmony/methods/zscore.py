"""Z-score standardization to the reference domain's mean and standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from bids_harmony.errors import ScanError
from bids_harmony.imaging.quantiles import Float64Array
from bids_harmony.methods.base import Contract, Volume
from bids_harmony.methods.statistical import StatisticalMethod, in_mask


class ZScore(StatisticalMethod):
    """``(x - mean) / sd * reference sd + reference mean``, brain voxels only, clipped at 0.

    Model: mean and standard deviation (divisor n) of the brain, averaged over the reference
    volumes. Monotone.
    """

    name: ClassVar[str] = "zscore"
    state_name: ClassVar[str] = "moments"

    @classmethod
    def contract_for(cls, modalities: Sequence[str]) -> Contract:
        """Native grid, robust scale, skull-stripped."""
        return Contract(tuple(modalities))

    @classmethod
    def _learn(cls, volumes: Sequence[Volume]) -> Float64Array:
        brains = [in_mask(volume) for volume in volumes]
        return np.mean([(brain.mean(), brain.std()) for brain in brains], axis=0)

    @classmethod
    def _check_state(cls, state: Float64Array, shape: tuple[int, ...] | None) -> None:
        if state.shape != (2,) or state[1] <= 0:
            raise ScanError(f"{cls.name}: moments must be a mean and a positive SD")

    def _map(
        self, volume: Volume, state: Float64Array
    ) -> tuple[Float64Array, dict[str, Any], tuple[str, ...]]:
        values = in_mask(volume)
        mean, sd = float(values.mean()), float(values.std())
        return (values - mean) / sd * state[1] + state[0], {"mean": mean, "sd": sd}, ()
