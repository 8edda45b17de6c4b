"""Which way up a brain lies, told from where brain and brightness are in it.

A flow that sees slices knows texture and contrast; a brain upside down has both. Seen as a whole
and very coarsely, brains of one contrast are alike, and none of them is alike when turned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bids_harmony.imaging.quantiles import Float64Array

_CELLS = 12
_REACH = 1.5  # from the centre, in radii of a ball of the brain's volume
_LEAST_DEVIATION = 0.1
_BRIGHTEST = 1.5  # a vessel is no layout
#: A turn is believed that saves so many bits per cell, and leaves at most so many more than the
#: reference domain's own brains have: half a brain fits nowhere.
_SAVED, _MISFIT = 0.1, 0.5
#: Nods and rolls, in degrees, as which a brain may lie without being turned.
_NODS, _ROLLS = (-30, -15, 0, 15, 30), (-15, 0, 15)
_SIDES = "RAS"


def side_words(axes: str) -> str:
    """Sides in words, such as ``right, anterior, superior`` for ``RAS``."""
    words = {"R": "right", "L": "left", "A": "anterior", "P": "posterior", "S": "superior"}
    return ", ".join(words.get(side, "inferior") for side in axes)


@dataclass(frozen=True)
class Layout:
    """Share of brain, and brightness, in the cells of a cube around the brain's centre.

    Attributes
    ----------
    mean, deviation
        Over brains of the reference domain and their mirror images, shape (2, 12, 12, 12).
    normal
        Mean bits per cell of these brains.
    """

    mean: Float64Array
    deviation: Float64Array
    normal: float

    @classmethod
    def of(cls, brains: Sequence[Float64Array]) -> Layout:
        """Mean and spread of the `cells` of some brains, left and right alike."""
        both = np.stack([*brains, *(np.flip(b, 1) for b in brains)])
        made = cls(both.mean(0), np.maximum(both.std(0), _LEAST_DEVIATION), 0.0)
        return replace(made, normal=float(np.mean([made.bits(b) for b in brains])))

    def bits(self, cells: Float64Array) -> float:
        """Bits per cell under independent normal distributions, shape (2, 12, 12, 12)."""
        far = (cells - self.mean) / self.deviation
        return float(np.mean(np.log2(self.deviation * np.sqrt(2 * np.pi)) + far**2 / np.log(4)))

    def turned(self, brain: Coarse) -> tuple[str, float]:
        """The right-angled turn that a brain must have undergone, and the bits that show it.

        As the brain lies counts also with a nod of up to 30 or a roll of up to 15 degrees.

        Returns
        -------
        axes
            Sides to which the axes, taken for R, A, S, run in truth; ``"RAS"``: it lies as it
            should, or it cannot be told. Left and right are never told apart.
        saved
            Bits per cell below those of the brain as it lies; 0 for ``"RAS"``.
        """
        as_given = min(self.bits(brain.cells(n, r)) for n in _NODS for r in _ROLLS)
        found = {axes: self.bits(turn) for axes, turn in _turns(brain.cells())}
        best = min(found, key=lambda axes: (found[axes], axes != _SIDES))
        saved = as_given - found[best]
        if best == _SIDES or saved <= _SAVED or found[best] > self.normal + _MISFIT:
            return _SIDES, 0.0
        return best, saved

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Inverse of `from_arrays`."""
        return {
            "layout/mean": self.mean,
            "layout/deviation": self.deviation,
            "layout/normal": np.array([self.normal]),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Layout:
        """From `arrays`."""
        return cls(
            np.array(arrays["layout/mean"], dtype=np.float64),
            np.array(arrays["layout/deviation"], dtype=np.float64),
            float(arrays["layout/normal"][0]),
        )


class Coarse:
    """A brain seen in coarse cells around its centre, its size taken out.

    Parameters
    ----------
    image, mask
        Shape (R, A, S), intensities on the reference domain's scale; the mask is not empty.
    spacing
        Voxel size along these axes, mm.
    """

    def __init__(
        self, image: NDArray[Any], mask: NDArray[np.bool_], spacing: Sequence[float]
    ) -> None:
        self._size = np.asarray(spacing, dtype=np.float64)
        self._centre = np.array(ndimage.center_of_mass(mask))
        radius = np.cbrt(mask.sum() * self._size.prod() * 3 / (4 * np.pi))
        self._side = 2 * _REACH * float(radius) / _CELLS
        blur = self._side / self._size / 2.5
        self._blurred = [
            ndimage.gaussian_filter(np.where(mask, values, 0).astype(np.float32), blur)
            for values in (np.ones_like(image), np.clip(image, 0, _BRIGHTEST))
        ]

    def cells(self, nod: float = 0.0, roll: float = 0.0) -> Float64Array:
        """Share of brain, and mean brightness times that share; shape (2, 12, 12, 12).

        Parameters
        ----------
        nod, roll
            Degrees by which the brain is turned about its R and its A axis before.
        """
        turn = Rotation.from_euler("xy", (nod, roll), degrees=True).as_matrix()
        step = turn * self._side / self._size[:, None]
        start = self._centre - step @ np.full(3, (_CELLS - 1) / 2)
        shape = (_CELLS,) * 3
        return np.stack([
            ndimage.affine_transform(values, step, start, shape, order=1).astype(np.float64)
            for values in self._blurred
        ])  # fmt: skip


def _turns(given: Float64Array) -> Iterator[tuple[str, Float64Array]]:
    """Every right-angled turn of some cells; of mirror images, one."""
    for order in permutations(range(3)):
        for flips in product((False, True), repeat=2):
            turn = np.transpose(given, (0, *(1 + a for a in order)))
            # to flip what is taken for left and right changes nothing: the layout is symmetric
            turn = np.flip(turn, [2 + a for a, flip in enumerate(flips) if flip])
            names = [""] * 3
            for axis, (source, flip) in enumerate(zip(order, (False, *flips), strict=True)):
                names[source] = "LPI"[axis] if flip else _SIDES[axis]
            yield "".join(names), turn
