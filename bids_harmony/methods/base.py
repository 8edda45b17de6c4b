"""The contract behind which every harmonization method stands.

A method knows arrays only: no BIDS, no Nipype, no files besides its bundle. It is fitted on
volumes of the reference domain (`Method.fit`), gives its state as plain arrays (`arrays`,
`params`), is rebuilt from them (`from_state`), and harmonizes one volume at a time (`harmonize`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

NATIVE_GRID = "native"


@dataclass(frozen=True)
class Contract:
    """What a method wants to be given; the workflow is built from it, not from the name.

    Attributes
    ----------
    modalities
        Modalities the model can harmonize.
    grid
        ``native`` (the scan's own voxels) or a template name such as ``MNI152NLin2009aSym``.
    resolution
        Isotropic voxel size in mm on the template grid; None on the native grid.
    scale
        Name of the intensity scale applied before the method: ``robust`` or ``minmax``.
    masked
        True: voxels outside the brain mask are zero when the method sees them.
    """

    modalities: tuple[str, ...]
    grid: str = NATIVE_GRID
    resolution: float | None = None
    scale: str = "robust"
    masked: bool = True


@dataclass(frozen=True)
class Volume:
    """One scan as a method sees it.

    Attributes
    ----------
    data
        Shape (X, Y, Z), float32, on the contract's intensity scale (brain roughly 0..1, values
        above 1 possible).
    mask
        Brain mask, shape (X, Y, Z).
    modality
        ``T1w``, ``T2w`` or ``FLAIR``.
    spacing
        Voxel size in mm.
    site
        Site label, ``n/a`` when unknown.
    name
        For messages, e.g. ``sub-01_T1w``.
    """

    data: FloatArray
    mask: BoolArray
    modality: str
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    site: str = "n/a"
    name: str = ""


@dataclass(frozen=True)
class Harmonized:
    """What a method gives back.

    Attributes
    ----------
    data
        Shape (X, Y, Z), float32, same scale as the reference domain's scaled volumes, >= 0,
        zero outside the mask.
    details
        JSON-serialisable facts for the sidecar (landmarks found, peak position, bpd, steps,
        stop reason, ...).
    warnings
        Sentences for the report.
    """

    data: FloatArray
    details: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Method(ABC):
    """A harmonization method together with what it has learned."""

    #: Same as the entry point and the card, e.g. ``nyul``.
    name: ClassVar[str]

    @property
    @abstractmethod
    def contract(self) -> Contract:
        """What this fitted method wants to be given."""

    @classmethod
    @abstractmethod
    def contract_for(cls, modalities: Sequence[str]) -> Contract:
        """The contract that holds while fitting, when nothing has been learned yet."""

    @classmethod
    @abstractmethod
    def fit(cls, volumes: Sequence[Volume], *, seed: int) -> Method:
        """Learn the reference domain from its volumes (at least one, modalities may be mixed).

        Raises
        ------
        ScanError
            If a volume's mask is empty or its brain is constant.
        """

    @abstractmethod
    def harmonize(self, volume: Volume, *, seed: int) -> Harmonized:
        """Make `volume` look like the reference domain.

        Raises
        ------
        ScanError
            If the model has no such modality, the mask is empty or the brain is constant.
        """

    @abstractmethod
    def arrays(self) -> dict[str, NDArray[Any]]:
        """Learned arrays, keys like ``T1w/quantiles``; they go to ``weights.safetensors``."""

    @abstractmethod
    def params(self) -> dict[str, Any]:
        """JSON-serialisable settings; they go to ``model.json``."""

    @classmethod
    @abstractmethod
    def from_state(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Method:
        """Rebuild a fitted method from `arrays` and `params`."""
