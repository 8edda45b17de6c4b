"""Smooth invertible deformations: stationary velocity fields and their exponential."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

FloatArray = NDArray[np.floating]


def smooth_noise(
    shape: tuple[int, ...], sigma: float, rng: np.random.Generator
) -> NDArray[np.floating]:
    """White noise smoothed to ``sigma`` voxels, scaled to mean 0 and standard deviation 1."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="reflect")
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


def _sample(field: FloatArray, coordinates: FloatArray) -> FloatArray:
    return np.stack(
        [ndimage.map_coordinates(f, coordinates, order=1, mode="nearest") for f in field]
    )


def exponential(velocity: FloatArray, spacing: float, steps: int = 6) -> FloatArray:
    """Displacement at time 1 of a stationary velocity field, by scaling and squaring.

    Parameters
    ----------
    velocity
        Shape (3, X, Y, Z), mm per unit of time.
    spacing
        Voxel size of the lattice, mm.
    steps
        Number of squarings.

    Returns
    -------
    Displacement, mm, shape of ``velocity``.

    Notes
    -----
    Arsigny et al. 2006, MICCAI, LNCS 4190:924.
    """
    moved = velocity / 2**steps
    index = np.indices(velocity.shape[1:], dtype=np.float32)
    for _ in range(steps):
        moved = moved + _sample(moved, index + moved / spacing)
    return moved.astype(np.float32)


def jacobian_determinant(displacement: FloatArray, spacing: float) -> FloatArray:
    """Local volume change of ``x -> x + displacement(x)``.

    Parameters
    ----------
    displacement
        Shape (3, X, Y, Z), mm.
    spacing
        Voxel size of the lattice, mm.

    Returns
    -------
    Determinant of the Jacobian, shape (X, Y, Z); positive where the map is invertible.
    """
    rows = np.stack([np.stack(np.gradient(d, spacing)) for d in displacement])
    rows += np.eye(3, dtype=rows.dtype)[:, :, None, None, None]
    return np.linalg.det(np.moveaxis(rows, (0, 1), (-2, -1)))


def upsample(field: FloatArray, factor: int, shape: tuple[int, ...]) -> FloatArray:
    """Interpolate a lattice linearly to a grid ``factor`` times finer with the same first point.

    Parameters
    ----------
    field
        Values on the lattice.
    factor
        Points of the fine grid per lattice step.
    shape
        Shape of the fine grid; beyond the last lattice point its value is repeated.
    """
    out = field.astype(np.float32)
    if factor == 1 and field.shape == shape:
        return out
    for axis, size in enumerate(shape):
        place = np.minimum(np.arange(size) / factor, out.shape[axis] - 1)
        low = np.minimum(place.astype(int), max(out.shape[axis] - 2, 0))
        step = np.diff(out, axis=axis)
        weight = (place - low).astype(np.float32)
        weight = weight.reshape([-1 if k == axis else 1 for k in range(3)])
        out = np.take(out, low, axis=axis) + weight * np.take(step, low, axis=axis)
    return out
