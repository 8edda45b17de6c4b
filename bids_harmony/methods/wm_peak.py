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
_BANDWIDTH = 0.015
_SMOOTHING_MM = 1.0
_FLAT_PERCENT = 60.0
_PROMINENCE = 0.05
_HEIGHT = 0.15
_USUAL_FACTOR = (0.5, 2.0)
_USUAL_WIDTH = 0.35


class WhiteMatterPeak(StatisticalMethod):
    """One factor per scan that moves its tissue peak to the reference domain's.

    See `find_peak` for how the peak is found in noisy, unevenly lit and atrophied brains. Model:
    median of the reference volumes' peaks. Monotone; ratios between tissues are kept as they are.
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
        peak, width = _locate(volume)
        factor = float(state[0]) / peak
        details = {
            "peak": peak,
            "relative_width": width,
            "reference_peak": float(state[0]),
            "factor": factor,
        }
        warnings = []
        if not _USUAL_FACTOR[0] <= factor <= _USUAL_FACTOR[1]:
            warnings.append(f"The peak needs an unusual factor of {factor:.2f}; look at the scan.")
        if width > _USUAL_WIDTH:
            warnings.append(
                f"The tissue peak is broad ({width:.0%} of its intensity at half height) and its "
                "place uncertain; check the bias correction."
            )
        return in_mask(volume) * factor, details, tuple(warnings)


def find_peak(volume: Volume) -> float:
    """Intensity of the tissue peak that a modality is scaled by.

    T1w: the significant mode of highest intensity, which is white matter. T2w and FLAIR: the
    highest mode. A mode is significant when its density is at least 15 % and its prominence at
    least 5 % of the highest mode's.

    The density is that of the image smoothed inside the brain (Gaussian, SD 1 mm), of the 60 %
    of voxels with the smallest gradient (partial volume is left out), each weighted by its depth
    below the mask's surface (white matter lies deep, cortex and widened sulci do not). It has
    1024 bins up to 1.2 times the 99.5th percentile and is smoothed by a Gaussian with an SD of
    1.5 % of that range, so that the peak scales with the image.

    Raises
    ------
    ScanError
        If no mode lies at a positive intensity.
    """
    return _locate(volume)[0]


def _locate(volume: Volume) -> tuple[float, float]:
    """Peak as in `find_peak`, and its width at half height divided by its intensity."""
    values, depth = _homogeneous_brain(volume)
    top = 1.2 * float(np.percentile(values, 99.5))
    if top <= 0:
        raise ScanError(f"{volume.name or 'scan'}: no positive brain intensity; check the image")
    positive = values > 0
    counts, edges = np.histogram(
        values[positive], bins=_BINS, range=(0.0, top), weights=depth[positive]
    )
    density = ndimage.gaussian_filter1d(counts, _BANDWIDTH * _BINS, mode="constant")
    highest = density.max()
    peaks, _ = signal.find_peaks(
        density, height=_HEIGHT * highest, prominence=_PROMINENCE * highest
    )
    if peaks.size == 0:
        raise ScanError(
            f"{volume.name or 'scan'}: the brain's histogram has no peak; check image and mask"
        )
    chosen = peaks[-1] if volume.modality == "T1w" else peaks[np.argmax(density[peaks])]
    peak = float(0.5 * (edges[chosen] + edges[chosen + 1]))
    above = density >= 0.5 * density[chosen]
    left = chosen - np.argmin(above[chosen::-1]) if not above[: chosen + 1].all() else 0
    right = chosen + np.argmin(above[chosen:]) if not above[chosen:].all() else _BINS
    return peak, float(right - left) / _BINS * top / peak


def _homogeneous_brain(volume: Volume) -> tuple[Float64Array, Float64Array]:
    """Smoothed values of the brain's even voxels, and their depth below the surface in mm."""
    in_mask(volume)
    (box,) = ndimage.find_objects(volume.mask.astype(np.uint8))
    mask = np.pad(volume.mask[box], 2)
    sigma = [_SMOOTHING_MM / size for size in volume.spacing]
    data = np.where(mask, np.pad(volume.data[box], 2), 0).astype(np.float32)
    total = ndimage.gaussian_filter(data, sigma, mode="constant")
    weight = ndimage.gaussian_filter(mask.astype(np.float32), sigma, mode="constant")
    smooth = np.divide(total, weight, out=np.zeros_like(total), where=mask)
    slope = np.zeros_like(total)
    for axis, size in enumerate(volume.spacing):
        slope += np.gradient(total, size, axis=axis) ** 2
    depth = ndimage.distance_transform_edt(mask, sampling=volume.spacing)
    even = mask & (slope <= np.percentile(slope[mask], _FLAT_PERCENT))
    return smooth[even].astype(np.float64), depth[even].astype(np.float64)
