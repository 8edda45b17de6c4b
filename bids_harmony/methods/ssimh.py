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

    Model: per axial slice the orthonormal DCT-II coefficients 0..2 in both directions of the
    skull-stripped slice, divided by its number of brain voxels, averaged over the reference
    volumes that have brain there. A slice without brain in the reference holds zeros and is left
    alone, and so is one with fewer than 50 brain voxels in the scan.

    The zero background takes part in the transform: a larger brain has larger coefficients at the
    same intensities. A plain swap would darken large brains, so coefficients are compared per
    brain voxel and multiplied by the scan's own count; with equal masks this is the plain swap.
    The swap adds a smooth field to the whole slice; outside the mask the field is dropped, so the
    result's coefficients equal the reference's only where the mask fills the slice. Not monotone:
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
            usable = _voxels(volume) >= MIN_VOXELS
            total[usable] += _coefficients(volume)[usable] / _voxels(volume)[usable, None, None]
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
        voxels = _voxels(volume)
        swapped = (voxels >= MIN_VOXELS) & state.any(axis=(1, 2))
        step = state * voxels[:, None, None] - _coefficients(volume)
        spectrum = np.zeros(volume.data.shape)
        spectrum[:ORDER, :ORDER, swapped] = np.moveaxis(step[swapped], 0, 2)
        field = fft.idctn(spectrum, axes=(0, 1), norm="ortho")
        details = {
            "slices_swapped": int(swapped.sum()),
            "slices_left": int(np.sum(~swapped & (voxels > 0))),
        }
        return (volume.data + field)[volume.mask], details, ()


def _coefficients(volume: Volume) -> Float64Array:
    """Lowest orthonormal DCT-II coefficients of the masked axial slices, shape (Z, 3, 3)."""
    brain = np.where(volume.mask, volume.data, 0).astype(np.float64)
    spectrum = fft.dctn(brain, axes=(0, 1), norm="ortho")[:ORDER, :ORDER]
    return np.moveaxis(spectrum, 2, 0)


def _voxels(volume: Volume) -> Float64Array:
    """Number of brain voxels per axial slice, shape (Z,)."""
    return volume.mask.sum(axis=(0, 1)).astype(np.float64)
