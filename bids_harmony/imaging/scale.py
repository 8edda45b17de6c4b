"""Volume-wise intensity scales: one linear map per scan, stored and undone after the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bids_harmony.errors import ScanError
from bids_harmony.imaging.quantiles import brain_values

KINDS = ("minmax", "robust")
_LOW_PERCENT, _HIGH_PERCENT = 0.5, 99.5


@dataclass(frozen=True)
class IntensityScale:
    """Linear map that takes `low` to 0 and `high` to 1, without clipping.

    Attributes
    ----------
    kind
        How it was fitted: ``robust`` or ``minmax``.
    low, high
        In the scan's own units; ``low < high``.

    Raises
    ------
    ScanError
        If `kind` is unknown or the limits are not finite and increasing.
    """

    kind: str
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ScanError(
                f"unknown intensity scale {self.kind!r}; use one of {', '.join(KINDS)}"
            )
        if not (np.isfinite(self.low) and np.isfinite(self.high) and self.low < self.high):
            raise ScanError(
                f"intensity scale needs finite low < high, not {self.low!r} and {self.high!r}"
            )

    def apply(self, data: NDArray[Any]) -> NDArray[np.float32]:
        """``(data - low) / (high - low)`` as float32, any shape."""
        span = self.high - self.low
        return ((np.asarray(data, dtype=np.float64) - self.low) / span).astype(np.float32)

    def invert(self, data: NDArray[Any]) -> NDArray[np.float32]:
        """Undo `apply`: ``data * (high - low) + low`` as float32, exact to float32 rounding."""
        span = self.high - self.low
        return (np.asarray(data, dtype=np.float64) * span + self.low).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return {"kind": self.kind, "low": self.low, "high": self.high}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> IntensityScale:
        """Rebuild from `to_dict`; ScanError if a key is missing or not a number."""
        try:
            return cls(str(content["kind"]), float(content["low"]), float(content["high"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ScanError(f"not an intensity scale (kind, low, high): {content!r}") from error


def fit_scale(
    data: NDArray[Any], mask: NDArray[np.bool_], kind: str, *, name: str = "scan"
) -> IntensityScale:
    """Fit an intensity scale to one scan.

    Parameters
    ----------
    data
        Shape (X, Y, Z), the scan's own units.
    mask
        Brain mask, same shape.
    kind
        ``robust``: high = 99.5th percentile of the brain; low = 0 unless the brain's 0.5th
        percentile is negative, then that percentile. With low = 0 a zero background stays zero.
        ``minmax``: low = minimum of the whole image (the background, usually 0), high = maximum
        inside the brain: what minimum and maximum of the skull-stripped image would give, and
        bright fat outside the brain has no say.
    name
        For messages.

    Raises
    ------
    ScanError
        If the mask is empty, the brain is constant, a value is not finite, or `kind` is unknown.
    """
    if not np.isfinite(data).all():
        raise ScanError(f"{name}: NaN or infinite voxels; repair the image")
    values = brain_values(data, mask, name)
    if kind == "minmax":
        return IntensityScale(kind, float(data.min()), float(values.max()))
    low, high = (float(q) for q in np.percentile(values, (_LOW_PERCENT, _HIGH_PERCENT)))
    low = min(low, 0.0)
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        raise ScanError(
            f"{name}: {_HIGH_PERCENT} % of the brain voxels are {high:g} or less, too few bright "
            "ones to set a scale; check image and mask"
        )
    return IntensityScale(kind, low, high)


def median_scale(scales: Sequence[IntensityScale]) -> IntensityScale:
    """Scale with the median limits of `scales`: the units of the reference domain.

    Raises
    ------
    ScanError
        If `scales` is empty or mixes kinds.
    """
    kinds = {scale.kind for scale in scales}
    if len(kinds) != 1:
        raise ScanError("the median scale needs at least one scale, and all of one kind")
    low = float(np.median([scale.low for scale in scales]))
    high = float(np.median([scale.high for scale in scales]))
    return IntensityScale(kinds.pop(), low, high)
