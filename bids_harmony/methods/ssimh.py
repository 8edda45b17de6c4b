"""Low-frequency swap (SSIMH) after Guan et al. (2022), slice by slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from scipy import fft

from bids_harmony.errors import ScanError
from bids_harmony.imaging.quantiles import Float64Array
from bids_harmony.methods.base import Contract, Volume
from bids_harmony.methods.statistical import StatisticalMethod

ORDER = 3
MIN_VOXELS = 50


class Ssimh(StatisticalMethod):
    """The lowest 3 x 3 cosine coefficients of each axial slice come from the reference domain.

    Coefficients are those of the orthonormal DCT-II, orders 0..2 in both directions, of the
    skull-stripped slice. The zero background takes part in the transform, so they also tell how
    large the brain is, and a plain swap would darken a brain larger than the reference's.
    Hence the reference slice is taken as its mean intensity times its mask plus a rest: the scan
    gets the mean times the coefficients of its OWN mask, plus the rest's coefficients. With equal
    masks this is the plain swap; brains that differ in size only are left as they are.

    Model, per slice: mean intensity (kept at order 0, 0, where the rest is zero by definition) and
    the rest's coefficients, averaged over the reference volumes with 50 brain voxels or more
    there. Slices with fewer in the scan or in all reference volumes are left alone.

    The swap adds a smooth field to the whole slice; outside the mask the field is dropped, so the
    result's coefficients equal the wanted ones only where the mask fills the slice. Not monotone:
    the field depends on position.
    """

    name: ClassVar[str] = "ssimh"
    state_name: ClassVar[str] = "coefficients"
    one_shape: ClassVar[bool] = True

    @classmethod
    def contract_for(cls, modalities: Sequence[str]) -> Contract:
        """Template grid at 2 mm, robust scale, skull-stripped."""
        return Contract(tuple(modalities), grid="MNI152NLin2009aSym", resolution=2.0)

    @classmethod
    def _learn(cls, volumes: Sequence[Volume]) -> Float64Array:
        total = np.zeros((volumes[0].data.shape[2], ORDER, ORDER))
        present = np.zeros(len(total))
        for volume in volumes:
            voxels = volume.mask.sum(axis=(0, 1))
            usable = voxels >= MIN_VOXELS
            coefficients, shape = _coefficients(volume)
            mean = coefficients[:, 0, 0] / np.where(usable, shape[:, 0, 0], 1)
            rest = coefficients - mean[:, None, None] * shape
            rest[:, 0, 0] = mean
            total[usable] += rest[usable]
            present += usable
        return total / np.maximum(present, 1)[:, None, None]

    @classmethod
    def _check_state(cls, state: Float64Array, shape: tuple[int, ...] | None) -> None:
        if shape is None or state.shape != (shape[2], ORDER, ORDER) or min(shape[:2]) < ORDER:
            raise ScanError(f"{cls.name}: coefficients {state.shape} do not fit the grid {shape}")
        if not state.any():
            raise ScanError(
                f"{cls.name}: no reference slice has {MIN_VOXELS} brain voxels; check the masks"
            )

    def _map(
        self, volume: Volume, state: Float64Array
    ) -> tuple[Float64Array, dict[str, Any], tuple[str, ...]]:
        voxels = volume.mask.sum(axis=(0, 1))
        swapped = (voxels >= MIN_VOXELS) & state.any(axis=(1, 2))
        coefficients, shape = _coefficients(volume)
        rest = state.copy()
        rest[:, 0, 0] = 0
        step = state[:, :1, :1] * shape + rest - coefficients
        spectrum = np.zeros(volume.data.shape)
        spectrum[:ORDER, :ORDER, swapped] = np.moveaxis(step[swapped], 0, 2)
        field = fft.idctn(spectrum, axes=(0, 1), norm="ortho")
        details = {
            "slices_swapped": int(swapped.sum()),
            "slices_left": int(np.sum(~swapped & (voxels > 0))),
        }
        return (volume.data + field)[volume.mask], details, ()


def _coefficients(volume: Volume) -> tuple[Float64Array, Float64Array]:
    """Lowest DCT coefficients of the masked axial slices and of the mask, each (Z, 3, 3)."""
    brain = np.where(volume.mask, volume.data, 0).astype(np.float64)
    low = [
        fft.dctn(image, axes=(0, 1), norm="ortho")[:ORDER, :ORDER]
        for image in (brain, volume.mask.astype(np.float64))
    ]
    return np.moveaxis(low[0], 2, 0), np.moveaxis(low[1], 2, 0)
