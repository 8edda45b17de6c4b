"""What Harmonizing Flows and BlindHarmony share: parts per modality, grid, refusal, bundle."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bids_harmony.errors import ScanError
from bids_harmony.imaging.layout import Coarse, side_words
from bids_harmony.imaging.model_grid import ModelGrid
from bids_harmony.imaging.tone import ToneCurve
from bids_harmony.methods.base import (
    Adaptation,
    Contract,
    Harmonized,
    Training,
    Volume,
    preset_named,
)
from bids_harmony.methods.by_modality import ByModality
from bids_harmony.methods.flow_training import Part, Preset, fit_part
from bids_harmony.methods.likelihood import bits_of_brain, smoothed
from bids_harmony.methods.scan_tone import toned_scan
from bids_harmony.networks.flow import Flow
from bids_harmony.networks.harmonizer import HarmonizerUNet

LOG = logging.getLogger("bids_harmony")
_MOST_CHANGE = 0.3  # of the scale, beyond the tone: more is invention, not harmonization


@dataclass
class Case:
    """One scan on its way through a method.

    Attributes
    ----------
    modality
        Of the scan.
    grid
        The brain on the model's grid.
    image, mask
        The same as tensors.
    curve
        Its tone curve.
    start
        The brain after the curve.
    details, warnings
        For the sidecar and the report.
    """

    modality: str
    grid: ModelGrid
    image: Tensor
    mask: Tensor
    curve: ToneCurve
    start: Tensor
    details: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class FlowMethod(ByModality[Part]):
    """A method that has a flow of the reference domain for each modality.

    Subclasses give `presets_by_name`, `axis`, `build`, `_refine` and, if they adapt, `adapt`.
    """

    #: Sizes and lengths by preset's name.
    presets_by_name: ClassVar[Mapping[str, Preset]]
    #: Across which axis (0 sagittal, 1 coronal, 2 axial) the flow's slices lie.
    axis: ClassVar[int]

    @classmethod
    def contract_for(cls, modalities: Sequence[str]) -> Contract:
        """The scan's own grid, robust scale, skull-stripped; regridding is the method's."""
        return Contract(tuple(modalities))

    @property
    def contract(self) -> Contract:
        """The contract for the fitted modalities."""
        return self.contract_for(tuple(self._parts))

    @classmethod
    def fit(
        cls, volumes: Sequence[Volume], *, seed: int, training: Training | None = None
    ) -> Self:
        """Train tone, networks and flow for each modality; one subject in five is held out.

        Raises
        ------
        ScanError
            If a brain is unusable, or no modality has two subjects. A modality that has not is
            left out, with a warning in the log.
        UsageError
            If the preset is unknown.
        """
        training = training or Training()
        preset = preset_named(cls.name, cls.presets_by_name, training.preset)
        return cls._learned(
            volumes,
            _learnable(cls.name, volumes),
            training,
            lambda chosen, share: fit_part(cls, chosen, preset, seed, share),
        )

    @classmethod
    @abstractmethod
    def build(cls, preset: Preset) -> tuple[Flow, HarmonizerUNet | None]:
        """The untrained flow, and the untrained harmonizer if the method has one."""

    @abstractmethod
    def _refine(self, part: Part, case: Case, seed: int) -> Tensor:
        """Harmonized brain on the model's grid; may add details and warnings to the case."""

    def harmonize(self, volume: Volume, *, seed: int) -> Harmonized:
        """Make `volume` look like the reference domain.

        Raises
        ------
        ScanError
            If the model has no such modality, the brain is unusable, or it is so unlikely under
            the flow that it cannot be a brain of this modality in this orientation.
        """
        torch.set_num_threads(self._threads)
        torch.manual_seed(seed)
        part = self._part(volume)
        case = self._case(part, volume)
        bits = {
            "input": self._bits(part, case.image, case),
            "tone": self._bits(part, case.start, case),
        }
        bits["smoothed"] = self._admitted(part, case, volume)
        toned, curve = case.start, case.curve
        result = self._refine(part, case, seed)
        change = (result - case.start).clamp(-_MOST_CHANGE, _MOST_CHANGE)
        result = (case.start + change).clamp(min=0) * case.mask
        bits["output"] = self._bits(part, result, case)
        applied = bits["output"] <= max(bits["tone"], part.normal.flag)
        if not applied:
            case.warnings.append(
                "The networks made the scan less likely than its tone curve alone did; only the "
                "curve was applied."
            )
            case.start, case.curve = toned, curve
            result, bits["output"] = toned, bits["tone"]
        if bits["output"] > part.normal.flag:
            case.warnings.append(
                f"Still unlike the reference domain: {bits['output']:.2f} bits per dimension, its "
                f"own brains have {part.normal.mean:.2f}. Look at the result before you use it."
            )
        case.details["networks_applied"] = bool(applied)
        case.details["bits_per_dimension"] = {
            **{k: round(v, 4) for k, v in bits.items() if np.isfinite(v)},
            "held_out_reference": round(part.normal.mean, 4),
        }
        data = self._to_scan(volume, case, (result - case.start).numpy())
        return Harmonized(data, case.details, tuple(case.warnings))

    def bits_of(self, volume: Volume) -> tuple[float, float]:
        """Bits per dimension of a scan as it is, and as it is judged: toned and smoothed."""
        part = self._part(volume)
        case = self._case(part, volume)
        return self._bits(part, case.image, case), self._judged(part, case)

    @staticmethod
    def _case(part: Part, volume: Volume) -> Case:
        scan = toned_scan(part.tone, volume, part.resolution)
        return Case(volume.modality, scan.grid, scan.image, scan.mask, scan.curve, scan.start)

    def _usable(self, volumes: Sequence[Volume]) -> tuple[Part, list[Case], list[str]]:
        """The part for these volumes' modality, those to adapt to, and why others are left out.

        Raises
        ------
        ScanError
            If they are of several modalities, or none can be used.
        """
        modalities = {volumes[i].modality for i in range(len(volumes))}
        if len(modalities) != 1:
            raise ScanError(f"{self.name} adapts to scans of one modality, not {len(modalities)}")
        part = self._part(volumes[0])
        cases: list[Case] = []
        left_out: list[str] = []
        for index in range(len(volumes)):
            volume = volumes[index]
            try:
                case = self._case(part, volume)
                self._admitted(part, case, volume)
            except ScanError as error:
                left_out.append(str(error))
            else:
                cases.append(case)
        if not cases:
            raise ScanError(f"no scan can be adapted to: {left_out[0]}")
        return part, cases, left_out

    def _bits(self, part: Part, image: Tensor, case: Case) -> float:
        return bits_of_brain(part.flow, image, case.mask, self.axis)

    def _copy_for(self, adaptation: Adaptation) -> tuple[Self, str]:
        """A copy of the method to be changed for a site, and the adaptation's modality.

        Raises
        ------
        ScanError
            If the model was not trained on that modality.
        """
        modality = str(adaptation.details.get("modality"))
        if modality not in self._parts:
            raise ScanError(f"{self.name}: the model was not trained on {modality}")
        return self._copy(self._parts), modality

    def _judged(self, part: Part, case: Case) -> float:
        """Bits per dimension by which a scan is refused or not."""
        return self._bits(part, smoothed(case.start, case.mask), case)

    def _admitted(self, part: Part, case: Case, volume: Volume) -> float:
        """Refuse what is no upright brain of the modality; bits by which it was judged."""
        normal, bits = part.smooth, self._judged(part, case)
        if not bits <= normal.refuse:
            raise ScanError(
                f"{volume.name or 'scan'}: {bits:.2f} bits per dimension once smoothed, the "
                f"reference domain's brains have {normal.mean:.2f} (refused above "
                f"{normal.refuse:.2f}): no {volume.modality} brain, or full of artefacts; check "
                "modality, mask and header, or use a statistical method"
            )
        grid = case.grid
        axes, saved = part.layout.turned(Coarse(case.start.numpy(), grid.mask, grid.spacing))
        if saved > 0:
            raise ScanError(
                f"{volume.name or 'scan'}: the brain lies turned: what the header calls right, "
                f"anterior, superior seems to be {side_words(axes)} "
                f"(saves {saved:.2f} bits per cell; left and right may be exchanged); correct "
                "the header's orientation"
            )
        return bits

    @staticmethod
    def _to_scan(volume: Volume, case: Case, rest: NDArray[np.float32]) -> NDArray[np.float32]:
        """The curve on the scan's own voxels, and the rest of the change interpolated to them."""
        inside = np.asarray(volume.mask, dtype=bool)
        return case.grid.add_change(case.curve(volume.data), inside, rest)

    @classmethod
    def _part_from(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Part:
        return Part.from_state(arrays, params)


def _learnable(method: str, volumes: Sequence[Volume]) -> dict[str, list[int]]:
    """Indices of the volumes of each modality that can be learned, before any is."""
    groups: dict[str, list[int]] = {}
    subjects: dict[str, set[str]] = {}
    for index in range(len(volumes)):
        volume = volumes[index]
        groups.setdefault(volume.modality, []).append(index)
        subjects.setdefault(volume.modality, set()).add(volume.subject or volume.name)
    found = {m: groups[m] for m in sorted(groups) if len(subjects[m]) > 1}
    few = [m for m in sorted(groups) if m not in found]
    if few:
        words = (
            f"{method} learns from two subjects of the reference domain or more, one of which is "
            f"held out; there is one with {', '.join(few)}"
        )
        if not found:
            raise ScanError(f"{words}: give more scans or use a statistical method")
        LOG.warning("left out of the training: %s", words)
    return found
