"""Volumes as they are looked at: RAS+, true proportions, cropped to the head.

Display convention: neurological. Axial and coronal slices show the patient's left on the left;
sagittal slices show posterior on the left. Oblique grids are shown along their own axes, named by
the nearest anatomical direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from skimage.transform import resize

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]
Plane = Literal["axial", "coronal", "sagittal"]
Box = tuple[slice, slice, slice]

PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")
#: Axis that the slices of a plane cut.
NORMAL: dict[Plane, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
#: Letters at the left, right, top and bottom edge of a slice.
EDGES: dict[Plane, tuple[str, str, str, str]] = {
    "axial": ("L", "R", "A", "P"),
    "coronal": ("L", "R", "S", "I"),
    "sagittal": ("P", "A", "S", "I"),
}


@dataclass(frozen=True)
class DisplayVolume:
    """A volume whose axes run left-right, posterior-anterior, inferior-superior.

    Attributes
    ----------
    data
        Shape (X, Y, Z), axes towards right, anterior, superior.
    spacing
        Voxel size in mm.
    affine
        Shape (4, 4), voxels of `data` to mm.
    """

    data: NDArray[Any]
    spacing: tuple[float, float, float]
    affine: NDArray[np.float64]


def display_volume(data: NDArray[Any], affine: FloatArray) -> DisplayVolume:
    """Flip and permute axes to the nearest RAS+ orientation; no voxel value is interpolated.

    Parameters
    ----------
    data
        Shape (X, Y, Z).
    affine
        Shape (4, 4), voxels to mm (RAS+).
    """
    affine = np.asarray(affine, dtype=np.float64)
    orientation = nib.orientations.io_orientation(affine)
    canonical = nib.orientations.apply_orientation(data, orientation)
    moved = affine @ nib.orientations.inv_ornt_aff(orientation, np.shape(data))
    sizes = nib.affines.voxel_sizes(moved)
    return DisplayVolume(canonical, (float(sizes[0]), float(sizes[1]), float(sizes[2])), moved)


def obliquity_degrees(affine: FloatArray) -> float:
    """Largest angle in degrees between a voxel axis and its nearest anatomical axis."""
    return float(np.rad2deg(np.max(nib.affines.obliquity(np.asarray(affine, dtype=np.float64)))))


def extent(mask: BoolArray, axis: int) -> tuple[int, int]:
    """First and last index of `mask` along `axis`; the mask must not be empty."""
    others = tuple(a for a in range(3) if a != axis)
    hits = np.flatnonzero(mask.any(axis=others))
    return int(hits[0]), int(hits[-1])


def head_box(
    data: FloatArray,
    mask: BoolArray,
    spacing: tuple[float, float, float],
    *,
    reach_mm: float = 30.0,
    margin_mm: float = 4.0,
) -> Box:
    """Box round the head, at most `reach_mm` beyond the brain mask (the neck is cut).

    Parameters
    ----------
    data, mask
        Shape (X, Y, Z), RAS+.
    """
    bright = data > 0.15 * np.percentile(data[mask], 95)
    slices = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        first, last = extent(mask, axis)
        head = np.flatnonzero(bright.mean(axis=others) > 0.01)
        reach, margin = reach_mm / spacing[axis], margin_mm / spacing[axis]
        low = min(first, max(head.min(initial=first), first - reach)) - margin
        high = max(last, min(head.max(initial=last), last + reach)) + margin
        stop = min(data.shape[axis], int(np.ceil(high)) + 1)
        slices.append(slice(max(0, int(np.floor(low))), stop))
    return slices[0], slices[1], slices[2]


def choose_slices(mask: BoolArray, axis: int, count: int, *, rim: float = 0.1) -> list[int]:
    """Evenly spaced indices through the mask's extent along `axis`.

    `rim` of the extent is left out at both ends. Fewer than `count` indices
    come back when the extent has fewer slices.
    """
    first, last = extent(mask, axis)
    rim_voxels = rim * (last - first)
    wanted = np.linspace(first + rim_voxels, last - rim_voxels, count)
    return [int(i) for i in np.unique(np.rint(wanted).astype(int))]


def take_slice(
    volume: NDArray[Any], plane: Plane, index: int, box: Box | None = None
) -> NDArray[Any]:
    """One slice as an image.

    Row 0 is anterior (axial) or superior; columns run from left to right, or from posterior to
    anterior (sagittal).
    """
    cut: list[Any] = list(box or (slice(None), slice(None), slice(None)))
    cut[NORMAL[plane]] = index
    return np.asarray(volume[tuple(cut)]).T[::-1]


def image_spacing(plane: Plane, spacing: tuple[float, float, float]) -> tuple[float, float]:
    """Height and width of a slice's pixel in mm."""
    across, up = (spacing[axis] for axis in range(3) if axis != NORMAL[plane])
    return up, across


def to_pixels(
    image: NDArray[Any], pixel_mm: tuple[float, float], mm_per_pixel: float
) -> NDArray[np.float64]:
    """Resample a slice linearly to square pixels of `mm_per_pixel`; smoothed when made smaller."""
    shape = tuple(
        max(1, round(n * mm / mm_per_pixel)) for n, mm in zip(image.shape, pixel_mm, strict=True)
    )
    smaller = any(new < old for new, old in zip(shape, image.shape, strict=True))
    return np.asarray(
        resize(
            image.astype(np.float64),
            shape,
            order=1,
            mode="edge",
            preserve_range=True,
            anti_aliasing=smaller,
        )
    )


def slice_millimetres(affine: FloatArray, axis: int, index: int, box: Box) -> float:
    """Scanner coordinate in mm along `axis` of the centre of slice `index` within `box`."""
    voxel = [(s.start + s.stop - 1) / 2 for s in box]
    voxel[axis] = index
    return float((np.asarray(affine) @ [*voxel, 1.0])[axis])
