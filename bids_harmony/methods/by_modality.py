"""What neural methods share that learn one part for each modality: look-up, device, bundle."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from numpy.typing import NDArray

from bids_harmony.errors import ScanError
from bids_harmony.methods.base import NeuralMethod, Training, Volume
from bids_harmony.methods.lazy_volumes import Chosen
from bids_harmony.methods.tone import arrays_below

Arrays = Mapping[str, NDArray[Any]]


class LearnedPart(Protocol):
    """What was learned of one modality."""

    @property
    def scores(self) -> Mapping[str, Any]:
        """Held-out scores and facts of the training."""

    def to(self, device: str) -> None:
        """Move the networks."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything learned, as arrays."""

    def params(self) -> dict[str, Any]:
        """JSON-serialisable form of the rest."""


P = TypeVar("P", bound=LearnedPart)


class ByModality(NeuralMethod, Generic[P]):
    """A method that has a part for each modality.

    Parameters
    ----------
    parts
        What was learned, by modality.
    preset
        With which it was trained.
    """

    def __init__(self, parts: Mapping[str, P], preset: str) -> None:
        if not parts:
            raise ScanError(f"{self.name}: the model has no modality")
        self._parts, self._preset = dict(sorted(parts.items())), preset
        self._device, self._threads = "cpu", 1
        self._files: dict[str, bytes] = {}

    @classmethod
    def _learned(
        cls,
        volumes: Sequence[Volume],
        groups: Mapping[str, Sequence[int]],
        training: Training,
        learn: Callable[[Sequence[Volume], Training], tuple[P, Mapping[str, bytes]]],
    ) -> Self:
        """Train a part for each modality in turn; each has an even share of the time.

        Parameters
        ----------
        groups
            Indices of the volumes of each modality.
        learn
            Gives the part of some volumes, and files for the bundle.
        """
        torch.set_num_threads(training.threads)
        parts: dict[str, P] = {}
        files: dict[str, bytes] = {}
        for modality, indices in groups.items():
            share = replace(
                training,
                max_minutes=training.minutes(1 / len(groups)),
                folder=training.below(modality),
            )
            parts[modality], extra = learn(Chosen(volumes, indices), share)
            files |= {f"{modality}_{name}": content for name, content in extra.items()}
        made = cls(parts, training.preset)
        made._files = files
        return made

    @classmethod
    @abstractmethod
    def _part_from(cls, arrays: Arrays, params: Mapping[str, Any]) -> P:
        """Rebuild a part; ScanError if arrays and params do not fit together."""

    def place_on(self, device: str, threads: int) -> None:
        """Run on this device with this many CPU threads from now on."""
        self._device, self._threads = device, threads
        for part in self._parts.values():
            part.to(device)

    def _part(self, volume: Volume) -> P:
        if volume.modality not in self._parts:
            raise ScanError(
                f"{volume.name or 'scan'}: the {self.name} model was trained on "
                f"{', '.join(self._parts)} only; train it on {volume.modality} too"
            )
        return self._parts[volume.modality]

    def _copy(self, parts: Mapping[str, P]) -> Self:
        """The same method with other parts, in the same place."""
        made = type(self)(parts, self._preset)
        made.place_on(self._device, self._threads)
        return made

    def files(self) -> Mapping[str, bytes]:
        """Training curves and pictures; empty after loading."""
        return dict(self._files)

    def scores(self) -> Mapping[str, Any]:
        """Held-out scores of the training, by modality."""
        return {modality: dict(part.scores) for modality, part in self._parts.items()}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Arrays of every part, keys ``<modality>/...``."""
        return {
            f"{modality}/{key}": value
            for modality, part in self._parts.items()
            for key, value in part.arrays().items()
        }

    def params(self) -> dict[str, Any]:
        """Preset, and what each part says of itself."""
        return {
            "preset": self._preset,
            "parts": {modality: part.params() for modality, part in self._parts.items()},
        }

    @classmethod
    def from_state(cls, arrays: Arrays, params: Mapping[str, Any]) -> Self:
        """Rebuild from `arrays` and `params`; ScanError if they do not fit together."""
        parts = {}
        for modality, content in params["parts"].items():
            parts[modality] = cls._part_from(arrays_below(arrays, modality), content)
        return cls(parts, str(params["preset"]))
