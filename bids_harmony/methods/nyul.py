"""Landmark standardization after Nyul, Udupa and Zhang (2000)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from bids_harmony.errors import ScanError
from bids_harmony.imaging.quantiles import Float64Array, merge_ties, mid_quantiles
from bids_harmony.methods.base import Contract, Volume
from bids_harmony.methods.statistical import StatisticalMethod, extended_interp, in_mask

PERCENTILES = (1.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 99.0)


class Nyul(StatisticalMethod):
    """Piecewise-linear map of the brain's percentile landmarks onto a standard scale.

    Model (standard scale): every reference volume's landmarks (percentiles 1, 10, 20, ..., 90, 99
    of the brain) are mapped linearly so that percentiles 1 and 99 lie at their means over
    the volumes, then averaged. The paper fixes the two ends of the standard scale by hand; here
    they stay in the reference domain's units. A scan's landmarks go to the standard
    scale's, linearly between them, the end segments continued beyond. Monotone.
    """

    name: ClassVar[str] = "nyul"
    state_name: ClassVar[str] = "landmarks"

    @classmethod
    def contract_for(cls, modalities: Sequence[str]) -> Contract:
        """Native grid, robust scale, skull-stripped."""
        return Contract(tuple(modalities))

    @classmethod
    def _learn(cls, volumes: Sequence[Volume]) -> Float64Array:
        found = np.stack([_landmarks(volume) for volume in volumes])
        low, high = found[:, :1], found[:, -1:]
        standard = (found - low) / (high - low) * (high.mean() - low.mean()) + low.mean()
        return _strictly_increasing(standard.mean(axis=0))

    @classmethod
    def _check_state(cls, state: Float64Array, shape: tuple[int, ...] | None) -> None:
        if state.shape != (len(PERCENTILES),) or np.any(np.diff(state) <= 0):
            raise ScanError(
                f"{cls.name}: the standard scale must be {len(PERCENTILES)} increasing landmarks"
            )

    def _map(
        self, volume: Volume, state: Float64Array
    ) -> tuple[Float64Array, dict[str, Any], tuple[str, ...]]:
        landmarks = _landmarks(volume)
        x, y = merge_ties(landmarks, state)
        details = {"percentiles": list(PERCENTILES), "landmarks": landmarks.tolist()}
        warnings: tuple[str, ...] = ()
        if x.size < landmarks.size:
            warnings = (f"Only {x.size} of {landmarks.size} landmarks differ; they were merged.",)
        return extended_interp(in_mask(volume), x, y), details, warnings


def _landmarks(volume: Volume) -> Float64Array:
    """Percentile landmarks, non-decreasing; ScanError if first and last coincide."""
    landmarks = mid_quantiles(in_mask(volume), np.array(PERCENTILES) / 100)
    if landmarks[-1] - landmarks[0] <= 1e-6 * abs(landmarks[-1]):
        raise ScanError(
            f"{volume.name or 'scan'}: 98 % of the brain voxels have one value; "
            "check image and mask"
        )
    return landmarks


def _strictly_increasing(landmarks: Float64Array) -> Float64Array:
    """Part tied landmarks by a millionth of the scale, so that the map stays invertible."""
    step = 1e-6 * (landmarks[-1] - landmarks[0])
    ramp = step * np.arange(landmarks.size)
    return np.maximum.accumulate(landmarks - ramp) + ramp if _tied(landmarks, step) else landmarks


def _tied(landmarks: Float64Array, step: float) -> bool:
    return bool(np.any(np.diff(landmarks) < step))
