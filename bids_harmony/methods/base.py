"""The contract behind which every harmonization method stands.

A method knows arrays only: no BIDS, no Nipype, no files besides its bundle. It is fitted on
volumes of the reference domain (`Method.fit`), gives its state as plain arrays (`arrays`,
`params`), is rebuilt from them (`from_state`), and harmonizes one volume at a time (`harmonize`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from bids_harmony.errors import UsageError

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

NATIVE_GRID = "native"
_Preset = TypeVar("_Preset")


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
    labels
        True: scans to learn from have tissue labels; those without are left out.
    together
        True: a scan is harmonized together with those of the other modalities of its session
        (`Volume.others`), and one that lacks them is refused. While fitting, one scan of a
        session with labels is enough. Not for methods that adapt.

    Raises
    ------
    UsageError
        If scans are to be harmonized together on the native grid: theirs may differ.
    """

    modalities: tuple[str, ...]
    grid: str = NATIVE_GRID
    resolution: float | None = None
    scale: str = "robust"
    masked: bool = True
    labels: bool = False
    together: bool = False

    def __post_init__(self) -> None:
        if self.together and self.grid == NATIVE_GRID:
            raise UsageError(
                "a method that harmonizes the scans of a session together needs a template grid; "
                "repair its contract"
            )


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
    subject
        Label of the participant, so that training can be split by subject; empty when unknown.
    axes
        Side to which each array axis runs: R or L, A or P, S or I.
    session
        Label of the session; scans of one subject and session show the same anatomy. Empty when
        there is none.
    labels
        Tissue of each voxel, shape (X, Y, Z): 0 background, 1 CSF, 2 grey matter, 3 white matter;
        None unless the contract asks for them.
    others
        By modality, scans of the same session in the contract's other modalities, on the same
        grid; empty unless the contract asks for them, and while fitting.
    """

    data: FloatArray
    mask: BoolArray
    modality: str
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    site: str = "n/a"
    name: str = ""
    subject: str = ""
    axes: tuple[str, str, str] = ("R", "A", "S")
    session: str = ""
    labels: NDArray[np.uint8] | None = None
    others: Mapping[str, Volume] = field(default_factory=dict)


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
    tissues
        Probabilities of CSF, grey and white matter, shape (3, X, Y, Z), float32, 0 outside the
        mask; None for a method that segments nothing.
    keep_distribution
        Whether the brain shall have the histogram of `data` on the raw grid too, by an increasing
        map; interpolation between grids alters it, in each scan otherwise.
    """

    data: FloatArray
    details: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    tissues: FloatArray | None = None
    keep_distribution: bool = False


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


@dataclass(frozen=True)
class Training:
    """How a neural method is trained.

    Attributes
    ----------
    preset
        One of the method's `NeuralMethod.presets`: the size of the networks and of the training.
    max_minutes
        Limit for the whole training, after which the best state so far is kept; None for the
        preset's own.
    device, threads
        ``cpu`` or ``cuda``, and CPU threads.
    folder
        Where checkpoints are kept, so that a killed training goes on where it stopped; None for
        none. Its owner names it by everything that decides the training.
    options
        Values of `NeuralMethod.train_options` that were chosen; the others have their defaults.
    wanted
        Names of the volumes of the reference's site, among those of all sites.
    """

    preset: str = "cpu"
    max_minutes: float | None = None
    device: str = "cpu"
    threads: int = 1
    folder: Path | None = None
    options: Mapping[str, float] = field(default_factory=dict)
    wanted: frozenset[str] = frozenset()

    def minutes(self, share: float) -> float | None:
        """A part of the time limit, for one of several networks; None without a limit."""
        return None if self.max_minutes is None else share * self.max_minutes

    def below(self, name: str) -> Path | None:
        """Folder for the checkpoints of one of several networks."""
        return None if self.folder is None else self.folder / name


@dataclass(frozen=True)
class Adaptation:
    """What a trained method learned from the scans of a new site.

    Attributes
    ----------
    arrays
        Learned arrays.
    details
        JSON-serialisable facts for the sidecar: bits per dimension before and after, steps, stop
        reason, names of the scans.
    """

    arrays: Mapping[str, NDArray[Any]]
    details: Mapping[str, Any]


def preset_named(method: str, presets: Mapping[str, _Preset], name: str) -> _Preset:
    """One of a method's presets.

    Raises
    ------
    UsageError
        If it is unknown.
    """
    if name not in presets:
        known = ", ".join(presets)
        raise UsageError(f"{method}: no preset {name!r}; choose from {known}")
    return presets[name]


class NeuralMethod(Method):
    """A method with networks: trained with a preset, on a device, adapted to sites."""

    presets: ClassVar[tuple[str, ...]] = ("cpu", "paper")
    #: Whether `adapt` learns something from the scans of a site that training has not seen.
    adapts: ClassVar[bool] = False
    #: Whether `adapt` also takes `segmentation`, a `task_entropy.Segmentation` whose entropy on
    #: the harmonized slices must not rise.
    adapts_by_entropy: ClassVar[bool] = False
    #: Whether it is trained on the scans of several sites, and then takes the wanted appearance
    #: from examples (`towards`). Others are trained on the reference domain's scans alone.
    by_example: ClassVar[bool] = False
    #: Whether it leads all training sites to one appearance that is not the reference's; the
    #: reference then gives the units only.
    common: ClassVar[bool] = False
    #: Whether `harmonize` gives tissues too.
    segments: ClassVar[bool] = False
    #: Whether `fine_tuned` goes on training with the scans of a new site.
    fine_tunes: ClassVar[bool] = False
    #: Numbers that decide what is learned (`Training.options`), and how a scan is harmonized
    #: (`take_options`), with their defaults; the card says what they are.
    train_options: ClassVar[Mapping[str, float]] = {}
    participant_options: ClassVar[Mapping[str, float]] = {}

    @classmethod
    def contract_for_preset(cls, modalities: Sequence[str], preset: str) -> Contract:
        """The contract that holds while fitting with a preset; a preset may have its own grid."""
        return cls.contract_for(modalities)

    @classmethod
    def contract_to_fit(cls, modalities: Sequence[str], training: Training) -> Contract:
        """The contract that holds in a training; its options may matter as well as its preset."""
        return cls.contract_for_preset(modalities, training.preset)

    @classmethod
    @abstractmethod
    def fit(
        cls, volumes: Sequence[Volume], *, seed: int, training: Training | None = None
    ) -> Self:
        """Train on volumes of the reference domain; of all sites, where the card needs several.

        Raises
        ------
        ScanError
            If a volume cannot be used, or too few subjects or sites are left.
        UsageError
            If the preset is unknown.
        """

    @abstractmethod
    def place_on(self, device: str, threads: int) -> None:
        """Run on this device with this many CPU threads from now on."""

    def take_options(self, options: Mapping[str, float]) -> None:
        """Harmonize with these values of `participant_options` from now on."""
        if options:
            raise TypeError(f"{self.name} has no options of its own")

    def files(self) -> Mapping[str, bytes]:
        """Further files for the bundle, known right after `fit`: curves, pictures."""
        return {}

    def scores(self) -> Mapping[str, Any]:
        """JSON-serialisable held-out scores of the training."""
        return {}

    def towards(self, volumes: Sequence[Volume], *, seed: int) -> Self:
        """The same networks, for the appearance of these scans; for methods with `by_example`.

        What `fit` gives must go through it before it harmonizes.

        Parameters
        ----------
        volumes
            Scans of one site, or one scan; the contract then has their modalities.

        Raises
        ------
        ScanError
            If no volume can be used, or the networks do not know a modality.
        """
        raise TypeError(f"{self.name} does not harmonize by example")

    def at_theta(self, theta: Mapping[str, Sequence[float]]) -> Self:
        """The same networks, for an appearance that is given as numbers, where it is such.

        Parameters
        ----------
        theta
            By modality; the contract then has these modalities.

        Raises
        ------
        UsageError
            If the method has no theta, or it is not one of this method and modality.
        """
        raise UsageError(f"{self.name} has no theta: name a site, a participant or a scan")

    def fine_tuned(
        self, volumes: Sequence[Volume], *, seed: int, training: Training | None = None
    ) -> Self:
        """The networks, trained on with scans of one new site; for methods with `fine_tunes`.

        The wanted appearance stays. The method itself is left as it is.

        Raises
        ------
        ScanError
            If the volumes cannot be learned from.
        """
        raise TypeError(f"{self.name} cannot be trained on")

    def adapt(self, volumes: Sequence[Volume], *, seed: int) -> Adaptation:
        """Learn from the scans of one site; for methods with `adapts`.

        Raises
        ------
        ScanError
            If no volume can be used.
        """
        raise TypeError(f"{self.name} does not adapt to sites")

    def adapted(self, adaptation: Adaptation) -> Self:
        """The method as adapted to a site; for methods with `adapts`.

        Raises
        ------
        ScanError
            If the adaptation does not fit the model.
        """
        raise TypeError(f"{self.name} does not adapt to sites")
