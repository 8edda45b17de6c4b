"""Cohorts whose volumes are read when they are asked for, and not kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import overload

from bids_harmony.methods.base import Volume


class LazyVolumes(Sequence[Volume]):
    """Volumes that `read` gives; a slice is as lazy as the whole."""

    @abstractmethod
    def read(self, index: int) -> Volume:
        """The volume at an index from 0 to the length - 1."""

    @overload
    def __getitem__(self, index: int) -> Volume: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Volume]: ...
    def __getitem__(self, index: int | slice) -> Volume | Sequence[Volume]:
        places = range(len(self))[index]
        return self.read(places) if isinstance(places, int) else Chosen(self, places)


class Chosen(LazyVolumes):
    """Some of a cohort's volumes."""

    def __init__(self, volumes: Sequence[Volume], indices: Sequence[int]) -> None:
        self._volumes, self._indices = volumes, tuple(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> Volume:
        """That of the cohort."""
        return self._volumes[self._indices[index]]
