"""The part of a method's change that depends on intensity alone, as one increasing curve.

Such a change has the anatomy's edges in it and would be blurred by interpolation between grids.
The curve is carried as a function instead, and only what is left of the change is interpolated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from bids_harmony.errors import ScanError
from bids_harmony.imaging.quantiles import Float64Array, brain_values

FloatArray = NDArray[np.float32]

_SEGMENTS = 32
_TAIL = 5e-4
_BLOCK = 2  # voxels: large enough to average noise out, small enough for the cortex
_TIE = 3.0  # of neighbouring segments' slopes to a straight line, relative to the mean evidence
_PRIOR = 1e-6  # the same, of a slope to 1
_END_SLOPE = (0.5, 2.0)
_DARKEST = 1e-3  # of a curve's brightest knot: less is zero


@dataclass(frozen=True)
class ToneCurve:
    """Non-decreasing piecewise-linear intensity map, continued beyond its knots.

    Attributes
    ----------
    x, y
        Knots, `x` strictly increasing, `y` non-decreasing.
    start_slope, end_slope
        Slopes below the first and above the last knot.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    start_slope: float
    end_slope: float

    def __call__(self, data: NDArray[Any]) -> FloatArray:
        """Map intensities of any shape; the result may be below 0."""
        values = np.asarray(data, dtype=np.float64)
        mapped = np.interp(values, self.x, self.y)
        mapped += self.start_slope * np.minimum(values - self.x[0], 0)
        mapped += self.end_slope * np.maximum(values - self.x[-1], 0)
        return mapped.astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ToneCurve:
        """Inverse of `to_dict`."""
        return cls(
            tuple(map(float, content["x"])),
            tuple(map(float, content["y"])),
            float(content["start_slope"]),
            float(content["end_slope"]),
        )


def composed(first: ToneCurve, second: ToneCurve, knots: int = 513) -> ToneCurve:
    """``second(first(x))`` on even knots and those of `first`; slopes beyond them multiply.

    The knots reach as far as those of `second` do, beyond which its slope is another.
    """
    low, high = first.x[0], first.x[-1]
    if first.start_slope > 0:
        low -= max(first.y[0] - second.x[0], 0) / first.start_slope
    if first.end_slope > 0:
        high += max(second.x[-1] - first.y[-1], 0) / first.end_slope
    x = np.union1d(np.linspace(low, high, knots), first.x)
    y = np.maximum.accumulate(second(first(x)).astype(np.float64))
    return ToneCurve(
        tuple(x.tolist()),
        tuple(y.tolist()),
        first.start_slope * second.start_slope,
        first.end_slope * second.end_slope,
    )


def to_zero(curve: ToneCurve, start: float) -> ToneCurve:
    """The curve down to `start`, and below it the straight line to the origin.

    No signal stays no signal. Its own slope would take what is darker than the darkest knots,
    such as dura at the brain's rim, below zero. A curve whose knots reach zero is left as it is.
    """
    if start <= _DARKEST * curve.x[-1]:
        return curve
    x, y = np.array(curve.x), np.array(curve.y)
    level = float(curve(np.array([start]))[0])
    above = x > start
    return ToneCurve(
        (start, *x[above].tolist()),
        (level, *np.maximum(y[above], level).tolist()),
        level / start,
        curve.end_slope,
    )


def fit_tone(before: NDArray[Any], after: NDArray[Any], mask: NDArray[np.bool_]) -> ToneCurve:
    """Increasing curve whose detail comes nearest to what was done to the brain.

    Interpolation loses detail, so the curve is the one that leaves little of it. Images are
    averaged over cubes of 2 x 2 x 2 brain voxels, lest noise that a method removes be taken for
    tone. The differences of `after` from cube to cube are then explained, in least squares, by
    those of the curve of `before`, which is piecewise linear with slopes >= 0 that change
    smoothly. It is the map itself where the method is an increasing map, and nearly the identity
    plus a constant where a smooth field was added or where there is too little to see. Beyond the
    knots it goes on with the outer slopes, bounded to 0.5..2 times the brain's gain.

    Parameters
    ----------
    before, after
        Scaled input and harmonized image on one grid, shape (X, Y, Z).
    mask
        Brain mask.

    Raises
    ------
    ScanError
        If shapes differ, the mask is empty, the input is constant or a value is not finite.
    """
    values = brain_values(before, mask, "scaled input")
    if after.shape != mask.shape or not np.isfinite(after[mask]).all():
        raise ScanError("the harmonized image has another shape or holds NaN or infinite values")
    targets = np.asarray(after[mask], dtype=np.float64)
    x = _knots(values)
    slopes = _slopes(x, values, targets, np.asarray(mask, dtype=bool))
    y = np.append(0.0, np.cumsum(slopes * np.diff(x)))
    gain = float(targets.mean() / values.mean()) if targets.mean() * values.mean() > 0 else 1.0
    start, end = np.clip(slopes[[0, -1]], _END_SLOPE[0] * gain, _END_SLOPE[1] * gain)
    curve = ToneCurve(tuple(x.tolist()), tuple(y.tolist()), float(start), float(end))
    level = float((targets - curve(values)).mean())
    return replace(curve, y=tuple((y + level).tolist()))


def carried(scaled: NDArray[Any], rest: NDArray[Any], curve: ToneCurve) -> FloatArray:
    """Whole change on a grid, from the curve and what it left: ``curve(scaled) + rest - scaled``.

    Parameters
    ----------
    scaled
        Scaled scan on that grid, shape (X, Y, Z).
    rest
        ``after - curve(before)`` of the model's grid, interpolated to that grid.
    curve
        From `fit_tone` on the model's grid.
    """
    return curve(scaled) + np.asarray(rest, np.float32) - np.asarray(scaled, np.float32)


def _knots(values: Float64Array) -> Float64Array:
    """Evenly spaced knots over all but the outermost brain values; at least two."""
    low, high = np.quantile(values, (_TAIL, 1 - _TAIL))
    if high - low < 1e-6 * (values.max() - values.min()):  # nearly all voxels have one value
        low, high = values.min(), values.max()
    return np.linspace(low, high, _SEGMENTS + 1)


def _slopes(
    x: Float64Array, values: Float64Array, targets: Float64Array, mask: NDArray[np.bool_]
) -> Float64Array:
    """Slope of each segment, >= 0, that explains the differences between blocks best."""
    block = _Blocks(mask)
    steps = block.steps(targets)
    ramps = np.empty((steps.size, _SEGMENTS))
    least, most = np.zeros(_SEGMENTS), np.diff(x)
    least[0], most[-1] = -np.inf, np.inf  # the outer segments go on beyond the knots
    for k in range(_SEGMENTS):
        ramps[:, k] = block.steps(np.clip(values - x[k], least[k], most[k]))
    normal, right = ramps.T @ ramps, ramps.T @ steps
    weight = max(float(np.trace(normal)) / _SEGMENTS, 1e-12)
    bend = np.diff(np.eye(_SEGMENTS), n=2, axis=0)
    normal += _TIE * weight * (bend.T @ bend) + _PRIOR * weight * np.eye(_SEGMENTS)
    right += _PRIOR * weight
    lower = np.linalg.cholesky(normal)
    return nnls(lower.T, np.linalg.solve(lower, right))[0]


class _Blocks:
    """Means over cubes of voxels of the brain, and their differences to the next cubes."""

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        shape = tuple(-(-n // _BLOCK) for n in mask.shape)
        index = np.argwhere(mask) // _BLOCK
        self._cell = np.ravel_multi_index(tuple(index.T), shape)
        self._size = int(np.prod(shape))
        counts = np.bincount(self._cell, minlength=self._size)
        full = (counts >= _BLOCK**3 / 2).reshape(shape)
        self._counts = np.maximum(counts, 1)
        cells = np.arange(self._size).reshape(shape)
        pairs = []
        for axis in range(3):
            near = tuple(slice(None, -1) if a == axis else slice(None) for a in range(3))
            far = tuple(slice(1, None) if a == axis else slice(None) for a in range(3))
            both = full[near] & full[far]
            pairs.append(np.stack([cells[near][both], cells[far][both]]))
        self._near, self._far = np.concatenate(pairs, axis=1)

    def steps(self, values: Float64Array) -> Float64Array:
        """Differences of the means of brain values (in array order)."""
        means = np.bincount(self._cell, values, self._size) / self._counts
        return means[self._far] - means[self._near]
