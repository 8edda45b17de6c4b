"""What neural methods share whose wanted appearance is a style, the mean of examples'."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from bids_harmony.errors import ScanError
from bids_harmony.methods.base import Contract, Volume
from bids_harmony.methods.by_modality import ByModality, LearnedPart

LOG = logging.getLogger("bids_harmony")


class StyledPart(LearnedPart, Protocol):
    """What was learned of one modality; a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def wanted(self) -> Tensor | None:
        """Mean style of the examples; None before there are any."""

    @property
    def examples(self) -> tuple[str, ...]:
        """Their names."""


S = TypeVar("S", bound=StyledPart)


class ByStyle(ByModality[S], Generic[S]):
    """A method that gives scans the mean style of some examples."""

    by_example: ClassVar[bool] = True

    @property
    def contract(self) -> Contract:
        """For the modalities of the examples; before there are any, for all."""
        shown = [name for name, part in self._parts.items() if part.wanted is not None]
        return self.contract_for_preset(tuple(shown or self._parts), self._preset)

    @abstractmethod
    def _style(self, part: S, volume: Volume) -> Tensor:
        """Style of a scan; ScanError if `harmonize` would refuse it."""

    def _wanted(self, volume: Volume) -> Tensor:
        """Style of the examples of a volume's modality; ScanError if there is none."""
        wanted = self._part(volume).wanted
        if wanted is None:
            raise ScanError(
                f"{volume.name or 'scan'}: the {self.name} model was not shown how "
                f"{volume.modality} scans should look; give it examples of the wanted site"
            )
        return wanted

    def towards(self, volumes: Sequence[Volume], *, seed: int) -> Self:
        """The same networks for the mean style of these scans; other appearances are forgotten.

        Raises
        ------
        ScanError
            If no scan can be used. Scans that `harmonize` would refuse are left out, with a
            warning in the log.
        """
        torch.set_num_threads(self._threads)
        found: dict[str, list[tuple[str, Tensor]]] = {}
        left_out: list[str] = []
        for index in range(len(volumes)):
            volume = volumes[index]
            try:
                style = self._style(self._part(volume), volume)
            except ScanError as error:
                left_out.append(str(error))
                LOG.warning("no example: %s", error)
                continue
            found.setdefault(volume.modality, []).append((volume.name or "scan", style))
        if not found:
            why = left_out[0] if left_out else "no scan was given"
            raise ScanError(f"{self.name}: no example can be used: {why}")
        parts = {}
        for modality, part in self._parts.items():
            shown = found.get(modality, [])
            wanted = torch.stack([style for _, style in shown]).mean(0) if shown else None
            names = tuple(name for name, _ in shown)
            parts[modality] = replace(part, wanted=wanted, examples=names)
        made = self._copy(parts)
        made._files = dict(self._files)
        return made
