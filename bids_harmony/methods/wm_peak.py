"""Scaling by the white-matter peak (T1w) or the main tissue peak (T2w, FLAIR)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from scipy import ndimage, signal

from bids_harmony.errors import ScanError
from bids_harmony.imaging.quantiles import Float64Array
from bids_harmony.methods.base import Contract, Volume
from bids_harmony.methods.statistical import StatisticalMethod, in_mask

_BINS = 1024
_BANDWIDTH = 0.02
_SMOOTHING_MM = 1.0
_PROMINENCE = 0.05
_HEIGHT = 0.15
_USUAL_FACTOR = (0.5, 2.0)


class WhiteMatterPeak(StatisticalMethod):
    """One factor per scan that moves its tissue peak to the reference domain's.

    The histogram is that of the image smoothed inside the brain (Gaussian, SD 1 mm), which parts
    grey and white matter in noisy scans; see `find_peak`. Model: median of the reference
    volumes' peaks. Monotone, and contrast between tissues is kept as it is.
    """

    name: ClassVar[str] = "wm-peak"
    state_name: ClassVar[str] = "peak"

    @classmethod
    def contract_for(cls, modalities: Sequence[str]) -> Contract:
        """Native grid, robust scale, skull-stripped."""
        return Contract(tuple(modalities))

    @classmethod
    def _learn(cls, volumes: Sequence[Volume]) -> Float64Array:
        return np.array([np.median([find_peak(volume) for volume in volumes])])

    @classmethod
    def _check_state(cls, state: Float64Array, shape: tuple[int, ...] | None) -> None:
        if state.shape != (1,) or state[0] <= 0:
            raise ScanError(f"{cls.name}: the peak must be one positive number")

    def _map(
        self, volume: Volume, state: Float64Array
    ) -> tuple[Float64Array, dict[str, Any], tuple[str, ...]]:
        peak = find_peak(volume)
        factor = float(state[0]) / peak
        details = {"peak": peak, "reference_peak": float(state[0]), "factor": factor}
        warnings: tuple[str, ...] = ()
        if not _USUAL_FACTOR[0] <= factor <= _USUAL_FACTOR[1]:
            warnings = (f"The peak needs an unusual factor of {factor:.2f}; look at the scan.",)
        return in_mask(volume) * factor, details, warnings


def find_peak(volume: Volume) -> float:
    """Intensity of the tissue peak that a modality is scaled by.

    T1w: the significant mode of highest intensity, which is white matter. T2w and FLAIR: the
    highest mode. A mode is significant when its density is at least 15 % and its prominence at
    least 5 % of the highest mode's. The density is a histogram of 1024 bins up to 1.2 times the
    99.5th percentile, smoothed by a Gaussian with an SD of 2 % of that range, so that the
    peak scales with the image.

    Raises
    ------
    ScanError
        If no mode lies at a positive intensity.
    """
    values = _smoothed_brain(volume)
    top = 1.2 * float(np.percentile(values, 99.5))
    if top <= 0:
        raise ScanError(f"{volume.name or 'scan'}: no positive brain intensity; check the image")
    counts, edges = np.histogram(values[values > 0], bins=_BINS, range=(0.0, top))
    density = ndimage.gaussian_filter1d(counts.astype(float), _BANDWIDTH * _BINS, mode="constant")
    highest = density.max()
    peaks, _ = signal.find_peaks(
        density, height=_HEIGHT * highest, prominence=_PROMINENCE * highest
    )
    if peaks.size == 0:
        raise ScanError(
            f"{volume.name or 'scan'}: the brain's histogram has no peak; check image and mask"
        )
    chosen = peaks[-1] if volume.modality == "T1w" else peaks[np.argmax(density[peaks])]
    return float(0.5 * (edges[chosen] + edges[chosen + 1]))


def _smoothed_brain(volume: Volume) -> Float64Array:
    """Brain values after Gaussian smoothing that does not mix in the background."""
    in_mask(volume)
    (box,) = ndimage.find_objects(volume.mask.astype(np.uint8))
    mask = volume.mask[box]
    sigma = [_SMOOTHING_MM / size for size in volume.spacing]
    data = np.where(mask, volume.data[box], 0).astype(np.float32)
    total = ndimage.gaussian_filter(data, sigma, mode="constant")
    weight = ndimage.gaussian_filter(mask.astype(np.float32), sigma, mode="constant")
    return (total[mask] / weight[mask]).astype(np.float64)
