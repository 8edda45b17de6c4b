"""Brain masks and coarse grids as plain array work."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.interpolate import make_interp_spline

Array = NDArray[Any]
BoolArray = NDArray[np.bool_]
BAND = 15.0
EVIDENCE = 3.0
GENEROUS = 2.0
SMOOTHING = 1.5
BRIDGE = 3.0
SULCUS = 4.0
STRIPPED_ML = (600.0, 2200.0)


def shrink_factors(zooms: Array, spacing: float) -> tuple[int, int, int]:
    """Whole factors that bring each voxel size close to ``spacing`` mm; never below 1."""
    factors = [max(1, int(np.floor(spacing / zoom + 0.34))) for zoom in zooms]
    return factors[0], factors[1], factors[2]


def coarse_affine(affine: Array, factors: tuple[int, int, int]) -> Array:
    """Affine of the grid whose voxels are blocks of ``factors`` voxels."""
    step = np.diag([*map(float, factors), 1.0])
    step[:3, 3] = (np.array(factors) - 1) / 2
    return affine @ step


def block_mean(data: Array, factors: tuple[int, int, int]) -> NDArray[np.float32]:
    """Mean of blocks of ``factors`` voxels; the last block of an axis is padded by its edge."""
    out = data
    for axis, factor in enumerate(factors):
        if factor == 1:
            continue
        short = -out.shape[axis] % factor
        if short:
            width = [(0, short if k == axis else 0) for k in range(3)]
            out = np.pad(out, width, mode="edge")
        shape = list(out.shape)
        shape[axis : axis + 1] = [shape[axis] // factor, factor]
        out = out.reshape(shape).mean(axis=axis + 1, dtype=np.float32)
    return np.asarray(out, dtype=np.float32)


def _weights(coarse: int, fine: int, factor: int) -> Array:
    """Matrix (fine, coarse) of cubic interpolation at fine voxels, clamped at the ends."""
    if coarse == 1:
        return np.ones((fine, 1))
    where = np.clip((np.arange(fine) - (factor - 1) / 2) / factor, 0, coarse - 1)
    spline = make_interp_spline(np.arange(coarse), np.eye(coarse), k=min(3, coarse - 1))
    return np.asarray(spline(where))


def upsample(
    field: Array, shape: tuple[int, ...], factors: tuple[int, int, int], slab: slice = slice(None)
) -> NDArray[np.float32]:
    """Interpolate a field on the grid of `block_mean` back to voxels (cubic, separable).

    Parameters
    ----------
    field
        Coarse field.
    shape
        Shape (X, Y, Z) of the fine grid.
    slab
        Planes of the last axis that are wanted.

    Returns
    -------
    Shape (X, Y, planes of ``slab``).
    """
    planes = np.tensordot(field, _weights(field.shape[2], shape[2], factors[2])[slab], axes=(2, 1))
    rows = np.tensordot(_weights(field.shape[1], shape[1], factors[1]), planes, axes=(1, 1))
    out = np.tensordot(_weights(field.shape[0], shape[0], factors[0]), rows, axes=(1, 1))
    return np.asarray(out, dtype=np.float32)


def largest_component(mask: BoolArray) -> BoolArray:
    """Keep the largest face-connected component (empty stays empty)."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask.astype(bool)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray(labels == sizes.argmax())


def fill_holes(mask: BoolArray) -> BoolArray:
    """Fill cavities that do not reach the border of the field of view."""
    return np.asarray(ndimage.binary_fill_holes(mask))


def mask_from_stripped(data: Array) -> BoolArray:
    """Brain mask of a skull-stripped scan: its largest non-background part, holes filled.

    Parameters
    ----------
    data
        Shape (X, Y, Z), one constant outside the brain.
    """
    return fill_holes(largest_component(data != background_value(data)))


def background_value(data: Array) -> float:
    """Most frequent value on the six faces of the field of view."""
    faces = [np.take(data, index, axis).ravel() for axis in range(3) for index in (0, -1)]
    values, counts = np.unique(np.concatenate(faces), return_counts=True)
    return float(values[counts.argmax()])


def intensity_evidence(data: Array, prior: Array, zooms: Array) -> NDArray[np.float32]:
    """Log-odds of brain by intensity, learned from the scan itself.

    Histograms of the certain brain (prior above .9) and of what lies within `BAND` mm around the
    possible brain (prior below .1) give p(value | brain) / p(value | around).

    Parameters
    ----------
    data, prior
        Shape (X, Y, Z); prior 0..1.
    zooms
        Voxel size in mm.

    Returns
    -------
    Shape (X, Y, Z), clipped to +-`EVIDENCE`.
    """
    brain, around = prior > 0.9, prior < 0.1
    distance = ndimage.distance_transform_edt(around, sampling=zooms)
    around &= distance < BAND
    edges = np.unique(np.quantile(data[brain | around], np.linspace(0, 1, 65)))
    level = np.clip(np.searchsorted(edges, data) - 1, 0, max(len(edges) - 2, 0))
    counts = [
        ndimage.gaussian_filter1d(np.bincount(level[part], minlength=len(edges)) + 1.0, 1.5)
        for part in (brain, around)
    ]
    odds = np.log(counts[0] / counts[0].sum()) - np.log(counts[1] / counts[1].sum())
    return np.clip(odds, -EVIDENCE, EVIDENCE)[level].astype(np.float32)


def refine_mask(data: Array, prior: Array, zooms: Array) -> BoolArray:
    """Brain mask from a registered prior and the scan's own intensities.

    The log-odds of the prior and of the intensities are added and smoothed, with `GENEROUS` in
    favour of the brain, since a mask that cuts cortex harms more than one that holds some CSF;
    thin bridges to the scalp are opened, sulci closed, cavities filled. Voxels with a prior below
    .02 are never brain, those above .98 always, so that lesions and ventricles stay.

    Parameters
    ----------
    data, prior
        Scan and brain probability on one grid, shape (X, Y, Z).
    zooms
        Voxel size in mm.
    """
    known = np.clip(prior, 0.005, 0.995)
    odds = np.log(known / (1 - known)) + intensity_evidence(data, prior, zooms) + GENEROUS
    smooth = ndimage.gaussian_filter(odds, SMOOTHING / np.asarray(zooms))
    mask = (smooth > 0) & (prior > 0.02)
    core = largest_component(ball_erode(mask, BRIDGE, zooms) | (prior > 0.98))
    mask &= ball_dilate(core, BRIDGE + 1.0, zooms)
    mask = ball_erode(ball_dilate(mask | core, SULCUS, zooms), SULCUS, zooms)
    return fill_holes(largest_component(mask))


def ball_dilate(mask: BoolArray, radius: float, zooms: Array) -> BoolArray:
    """Dilate by a ball of ``radius`` mm."""
    if not mask.any():
        return mask
    return np.asarray(ndimage.distance_transform_edt(~mask, sampling=zooms) <= radius)


def ball_erode(mask: BoolArray, radius: float, zooms: Array) -> BoolArray:
    """Erode by a ball of ``radius`` mm; what lies outside the field of view does not erode."""
    return ~ball_dilate(~mask, radius, zooms)


def looks_skull_stripped(data: Array, affine: Array | None = None) -> bool:
    """Tell whether everything but the brain was removed from a scan.

    A stripped scan is one constant in most of the field of view; the rest is one piece without
    constant holes (bone and air of a head whose air was zeroed make such holes), which leaves the
    field of view through at most one face, and has an adult brain's volume. When the voxel size is
    unknown, it must be less than 30 % of the field of view instead.

    Parameters
    ----------
    data
        Shape (X, Y, Z).
    affine
        RAS affine in mm; give it when it is known.
    """
    inside = data != background_value(data)
    if not 0.02 < inside.mean() < 0.65:
        return False
    brain = largest_component(inside)
    size = int(brain.sum())
    if size < 0.97 * inside.sum() or crossed_faces(brain) > 1:
        return False
    holes = int(fill_holes(brain).sum()) - size
    if affine is None:
        return bool(inside.mean() < 0.3 and holes < 0.001 * size)
    millilitres = size * abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    low, high = STRIPPED_ML
    return bool(low < millilitres < high and holes < 0.02 * size)


def crossed_faces(mask: BoolArray) -> int:
    """Number of faces of the field of view of which the mask covers more than 2 %."""
    faces = (np.take(mask, index, axis) for axis in range(3) for index in (0, -1))
    return sum(bool(face.mean() > 0.02) for face in faces)
