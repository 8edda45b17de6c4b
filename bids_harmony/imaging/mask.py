"""Brain masks and coarse grids as plain array work."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.interpolate import make_interp_spline

Array = NDArray[Any]
BoolArray = NDArray[np.bool_]


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


def looks_skull_stripped(data: Array) -> bool:
    """Tell whether everything but the brain was removed from a scan.

    A stripped scan is one constant over most of the field of view, and what is left is one solid
    piece: closing its sulci adds little, and no shell of scalp lies around a dark ring.

    Parameters
    ----------
    data
        Shape (X, Y, Z).
    """
    inside = data != background_value(data)
    if not 0.02 < inside.mean() < 0.3:
        return False
    brain = largest_component(inside)
    return bool(brain.sum() > 0.95 * inside.sum())
