"""Two scans of one person, nearly in place, brought together exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize
from scipy.spatial.transform import Rotation

Float64Array = NDArray[np.float64]
_BINS = 32
_SAMPLES = 40_000
_MOST = 8.0  # mm or degrees: two scans on one template's grid are never further apart
_TOLERANCE = 0.01


def mutual_information(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Mutual information of paired values in bits, from a histogram of 32 x 32 bins."""
    counts, _, _ = np.histogram2d(first, second, _BINS)
    joint = counts / counts.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log2(joint[there] / apart[there])).sum())


def rigid_matrix(motion: Float64Array) -> Float64Array:
    """Three turns in degrees and three shifts in mm as a 3 x 4 matrix."""
    rotation = Rotation.from_euler("xyz", motion[:3], degrees=True).as_matrix()
    return np.column_stack((rotation, motion[3:]))


def find_rigid(
    fixed: NDArray[Any], moving: NDArray[Any], mask: NDArray[np.bool_], spacing: Sequence[float]
) -> tuple[Float64Array, float, float]:
    """Rigid motion about the mask's centre that brings one image onto another.

    Highest mutual information over brain voxels (at most 40,000, evenly taken), by Powell's
    method from no motion at all.

    Parameters
    ----------
    fixed, moving
        Shape (X, Y, Z), on one grid, nearly in place.
    mask
        Where they are compared, of `fixed`.
    spacing
        Voxel size in mm.

    Returns
    -------
    motion, before, after
        Six numbers: degrees about the axes, mm along them; mutual information without and with
        it (bits). No motion if none is better.
    """
    places = np.argwhere(mask)
    places = places[:: max(1, len(places) // _SAMPLES)]
    values = fixed[tuple(places.T)]
    size = np.asarray(spacing, dtype=np.float64)
    centre = places.mean(0)
    away = (places - centre) * size

    def information(motion: Float64Array) -> float:
        matrix = rigid_matrix(motion)
        there = (away @ matrix[:, :3].T + matrix[:, 3]) / size + centre
        found = ndimage.map_coordinates(moving, there.T, order=1, mode="constant")
        return mutual_information(values, found)

    still = np.zeros(6)
    before = information(still)
    done = optimize.minimize(
        lambda motion: -information(motion),
        still,
        method="Powell",
        bounds=[(-_MOST, _MOST)] * 6,
        options={"xtol": _TOLERANCE, "ftol": 1e-5, "maxiter": 6},
    )
    after = -float(done.fun)
    return (np.asarray(done.x), before, after) if after > before else (still, before, before)


def moved(
    image: NDArray[Any], mask: NDArray[np.bool_], motion: Float64Array, spacing: Sequence[float]
) -> NDArray[np.float32]:
    """An image as `find_rigid` brings it onto the other, whose `mask` gives the centre.

    Interpolated linearly; 0 outside the field of view.
    """
    size = np.asarray(spacing, dtype=np.float64)
    centre = np.argwhere(mask).mean(0)
    matrix = rigid_matrix(motion)
    turn = matrix[:, :3] * size / size[:, None]
    offset = matrix[:, 3] / size + centre - turn @ centre
    found: NDArray[np.float32] = ndimage.affine_transform(
        np.asarray(image, dtype=np.float32), turn, offset, order=1
    )
    return found
