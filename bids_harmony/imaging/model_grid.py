"""A scan on the grid of a network, along its own axes, and back.

Networks see every scan in the same orientation (first axis to the Right, second to the Anterior,
third to the Superior side, nearest right angles) and with voxels of about one size. Nothing is
rotated, so that a scan whose voxels are near that size is not interpolated at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nb
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_harmony.errors import ScanError
from bids_harmony.imaging.change import extend_change

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

#: Voxels up to this much smaller than the model's are left as they are; larger ones always are.
_TOLERANCE = 1.33
#: Standard deviation of the blur before voxels are made larger, in new voxels.
_BLUR = 0.4
_MARGIN = 2
#: How far a change is continued outside the mask before it is interpolated, in model voxels.
_REACH = 3


@dataclass(frozen=True)
class ModelGrid:
    """A brain on the model's grid, and the way back.

    Attributes
    ----------
    data
        Shape (R, A, S), float32, 0 outside the mask.
    mask
        Brain mask, same shape.
    box
        Where the brain's box lies in the scan, in the model's orientation.
    full_shape
        Shape of the scan in the model's orientation.
    order, flips
        Axis of the scan for each axis of the model, and whether it runs the other way.
    spacing
        Voxel size along the model's axes, mm.
    """

    data: FloatArray
    mask: BoolArray
    box: tuple[slice, ...]
    full_shape: tuple[int, ...]
    order: tuple[int, ...]
    flips: tuple[bool, ...]
    spacing: tuple[float, ...]

    @property
    def averaged(self) -> bool:
        """Whether voxels of the scan were averaged to the model's."""
        return self.data.shape != tuple(s.stop - s.start for s in self.box)

    def to_scan(self, image: NDArray[Any]) -> FloatArray:
        """An image on the model's grid, interpolated linearly to the scan's; 0 outside the box.

        Parameters
        ----------
        image
            Shape of `data`. Continue it outside the mask first where its edge matters.
        """
        wanted = tuple(s.stop - s.start for s in self.box)
        full = np.zeros(self.full_shape, dtype=np.float32)
        full[self.box] = _resize(np.asarray(image, dtype=np.float32), wanted)
        for axis, flip in enumerate(self.flips):
            if flip:
                full = np.flip(full, axis)
        return np.ascontiguousarray(np.transpose(full, np.argsort(self.order)))

    def add_change(
        self, scan: NDArray[Any], inside: NDArray[np.bool_], change: NDArray[Any]
    ) -> FloatArray:
        """A scan with a change of the model's grid; >= 0, and 0 outside the brain mask.

        The change is continued outside the model's mask, else interpolation would halve it at
        the brain's edge.

        Parameters
        ----------
        scan, inside
            Image on the scan's grid, and its brain mask.
        change
            Shape of `data`.
        """
        if change.any():
            scan = scan + self.to_scan(extend_change(change, self.mask, _REACH))
        return np.where(inside, np.maximum(scan, 0), 0).astype(np.float32)


def to_model_grid(
    data: NDArray[Any],
    mask: NDArray[np.bool_],
    spacing: Sequence[float],
    axes: Sequence[str],
    resolution: float,
) -> ModelGrid:
    """Turn a scan to the model's orientation, cut it to its brain, make small voxels larger.

    Axes whose voxels are more than a quarter smaller than `resolution` are averaged down to it
    inside the mask; others are kept, so that nothing is invented between thick slices.

    Parameters
    ----------
    data, mask
        Shape (X, Y, Z).
    spacing
        Voxel size in mm.
    axes
        Direction in which each axis runs, such as ``("R", "A", "S")`` or ``("P", "S", "R")``.
    resolution
        Of the model, in mm.

    Raises
    ------
    ScanError
        If the mask is empty.
    """
    if not mask.any():
        raise ScanError("the brain mask is empty; check the mask or give another one")
    turn = nb.orientations.axcodes2ornt(axes)
    order = tuple(int(a) for a in np.argsort(turn[:, 0]))
    flips = tuple(bool(turn[a, 1] < 0) for a in order)
    image, brain = (_turned(v, order, flips) for v in (data, mask))
    box = _box(brain)
    image = np.where(brain, image, 0)[box].astype(np.float32, order="C")
    brain = np.array(brain[box], dtype=bool, order="C")  # torch takes no turned views
    zooms = [float(spacing[a]) for a in order]
    factors = [z / resolution if z * _TOLERANCE < resolution else 1.0 for z in zooms]
    if any(f < 1 for f in factors):
        shape = tuple(max(round(n * f), 1) for n, f in zip(brain.shape, factors, strict=True))
        blur = [_BLUR / f if f < 1 else 0.0 for f in factors]
        weight = _resize(ndimage.gaussian_filter(brain.astype(np.float32), blur), shape)
        image = _resize(ndimage.gaussian_filter(image, blur), shape)
        brain = weight > 0.5
        if not brain.any():
            raise ScanError(f"no brain is left at {resolution:g} mm; check the mask")
        image = np.where(brain, image / np.maximum(weight, 0.5), 0).astype(np.float32)
    full = tuple(data.shape[a] for a in order)
    wide = [z * (s.stop - s.start) for z, s in zip(zooms, box, strict=True)]
    size = tuple(w / n for w, n in zip(wide, image.shape, strict=True))
    return ModelGrid(image, brain, box, full, order, flips, size)


def _turned(image: NDArray[Any], order: Sequence[int], flips: Sequence[bool]) -> NDArray[Any]:
    image = np.transpose(image, order)
    for axis, flip in enumerate(flips):
        if flip:
            image = np.flip(image, axis)
    return image


def _resize(image: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Linear interpolation between grids that cover the same field of view."""
    if image.shape == shape:
        return image
    zoom = [new / old for new, old in zip(shape, image.shape, strict=True)]
    resized: FloatArray = ndimage.zoom(image, zoom, order=1, mode="nearest", grid_mode=True)
    return resized


def _box(mask: BoolArray) -> tuple[slice, ...]:
    (found,) = ndimage.find_objects(mask.astype(np.uint8))
    return tuple(
        slice(max(s.start - _MARGIN, 0), min(s.stop + _MARGIN, n))
        for s, n in zip(found, mask.shape, strict=True)
    )
