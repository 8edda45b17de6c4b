"""What the statistical methods share: one learned array per modality, maths inside the mask."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from bids_harmony.errors import ScanError
from bids_harmony.imaging.quantiles import Float64Array, brain_values
from bids_harmony.methods.base import Contract, FloatArray, Harmonized, Method, Volume

_CLIPPED_WARNING = 0.01


class StatisticalMethod(Method):
    """A method whose model is one array per modality.

    Subclasses give `contract_for`, `state_name`, `_learn` and `_map`.

    Parameters
    ----------
    states
        Learned array per modality.
    counts
        Number of reference volumes per modality.
    shape
        Shape of the template grid that the model is bound to; None on the native grid.
    """

    state_name: ClassVar[str]
    #: Whether every volume must have the shape of the first one.
    one_shape: ClassVar[bool] = False

    def __init__(
        self,
        states: Mapping[str, NDArray[Any]],
        counts: Mapping[str, int],
        shape: Sequence[int] | None = None,
    ) -> None:
        if not states or set(states) != set(counts):
            raise ScanError(f"{self.name}: the model has no modality, or states without counts")
        self._states = {key: np.array(states[key], dtype=np.float64) for key in sorted(states)}
        self._counts = {key: int(counts[key]) for key in sorted(counts)}
        self._shape = None if shape is None else tuple(int(size) for size in shape)
        if self.one_shape != (self._shape is not None and len(self._shape) == 3):
            raise ScanError(f"{self.name}: grid shape {shape} does not belong to this method")
        for modality, state in self._states.items():
            if not np.isfinite(state).all():
                raise ScanError(f"{self.name}: {modality}/{self.state_name} is not finite")
            self._check_state(state, self._shape)
        self._contract = self.contract_for(tuple(self._states))

    @property
    def contract(self) -> Contract:
        """The contract for the fitted modalities."""
        return self._contract

    @classmethod
    def fit(cls, volumes: Sequence[Volume], *, seed: int) -> Self:
        """Learn each modality's array; deterministic, `seed` has no effect."""
        if not volumes:
            raise ScanError(f"{cls.name}: no reference volume to learn from")
        groups: dict[str, list[Volume]] = {}
        for volume in volumes:
            groups.setdefault(volume.modality, []).append(_checked(volume))
        shape = volumes[0].data.shape if cls.one_shape else None
        for volume in volumes:
            _check_shape(volume, shape, cls.name)
        states = {modality: cls._learn(group) for modality, group in groups.items()}
        return cls(states, {modality: len(group) for modality, group in groups.items()}, shape)

    def harmonize(self, volume: Volume, *, seed: int) -> Harmonized:
        """Map one volume to the reference domain; deterministic, `seed` has no effect."""
        if volume.modality not in self._states:
            raise ScanError(
                f"{volume.name or 'scan'}: the {self.name} model was fitted on "
                f"{', '.join(self._states)} only; train it on {volume.modality} too"
            )
        volume = _checked(volume)
        _check_shape(volume, self._shape, self.name)
        mapped, details, warnings = self._map(volume, self._states[volume.modality])
        if not np.isfinite(mapped).all():
            raise ScanError(f"{volume.name or 'scan'}: {self.name} gave non-finite intensities")
        clipped = float(np.mean(mapped < 0))
        if clipped > _CLIPPED_WARNING:
            warnings = (*warnings, f"{clipped:.1%} of the brain voxels became negative, set to 0.")
        data: FloatArray = np.zeros(volume.data.shape, dtype=np.float32)
        data[volume.mask] = np.maximum(mapped, 0)
        return Harmonized(data, {**details, "clipped_fraction": clipped}, warnings)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Learned arrays as ``<modality>/<state name>``."""
        return {f"{key}/{self.state_name}": value.copy() for key, value in self._states.items()}

    def params(self) -> dict[str, Any]:
        """Number of reference volumes per modality, and the grid's shape if bound to one."""
        shape = {} if self._shape is None else {"shape": list(self._shape)}
        return {"reference_volumes": dict(self._counts), **shape}

    @classmethod
    def from_state(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Self:
        """Rebuild from `arrays` and `params`; ScanError if they do not fit together."""
        counts = params["reference_volumes"]
        wanted = {f"{modality}/{cls.state_name}" for modality in counts}
        if wanted != set(arrays):
            raise ScanError(f"{cls.name}: needs the arrays {sorted(wanted)}, got {sorted(arrays)}")
        states = {key: arrays[f"{key}/{cls.state_name}"] for key in counts}
        return cls(states, counts, params.get("shape"))

    @classmethod
    @abstractmethod
    def _learn(cls, volumes: Sequence[Volume]) -> Float64Array:
        """The array of one modality, from its checked reference volumes (at least one)."""

    @classmethod
    @abstractmethod
    def _check_state(cls, state: Float64Array, shape: tuple[int, ...] | None) -> None:
        """Raise ScanError if an array cannot be this method's state."""

    @abstractmethod
    def _map(
        self, volume: Volume, state: Float64Array
    ) -> tuple[Float64Array, dict[str, Any], tuple[str, ...]]:
        """New in-mask values (array order, may be negative), details and warnings."""


def in_mask(volume: Volume) -> Float64Array:
    """Brain values of a volume, checked (ScanError)."""
    return brain_values(volume.data, volume.mask, volume.name or "scan")


def extended_interp(values: Float64Array, x: Float64Array, y: Float64Array) -> Float64Array:
    """Piecewise-linear map through knots (`x` strictly increasing), end segments continued."""
    mapped = np.interp(values, x, y)
    first = (y[1] - y[0]) / (x[1] - x[0])
    last = (y[-1] - y[-2]) / (x[-1] - x[-2])
    mapped += np.minimum(values - x[0], 0) * first
    mapped += np.maximum(values - x[-1], 0) * last
    return mapped


def _checked(volume: Volume) -> Volume:
    """The volume with a boolean mask, once its brain is known to be usable."""
    in_mask(volume)
    return replace(volume, mask=np.asarray(volume.mask, dtype=bool))


def _check_shape(volume: Volume, shape: tuple[int, ...] | None, name: str) -> None:
    if shape is not None and volume.data.shape != shape:
        raise ScanError(
            f"{volume.name or 'scan'}: shape {volume.data.shape}, but the {name} model works on "
            f"{shape}; resample to the model's grid"
        )
