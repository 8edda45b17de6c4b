"""What the learned comparators share: brains, whole brains drawn slice by slice, admission."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bids_harmony.errors import ScanError
from bids_harmony.methods.base import Contract, Harmonized, Training, Volume, preset_named
from bids_harmony.methods.by_modality import ByModality
from bids_harmony.methods.hail_volumes import brain_of
from bids_harmony.methods.held_out import some_held_out
from bids_harmony.methods.learnable import Known, learnable
from bids_harmony.methods.likeness import Likeness, rank_cells
from bids_harmony.methods.tone import load_arrays, state_arrays
from bids_harmony.training.contrasts import full_slices
from bids_harmony.training.plan import Plan
from bids_harmony.training.slices import canvas_size, on_canvas
from bids_harmony.training.translation import SiteBrain

GRID = "MNI152NLin2009aSym"
_AT_ONCE = 8
_BRIGHTEST = 1.5  # of the scale: no brain voxel is drawn brighter


@dataclass(frozen=True)
class Preset:
    """Sizes and lengths of a training.

    Attributes
    ----------
    resolution
        Voxel size of the grid in mm.
    base, levels
        Channels at full resolution, and how often the size is halved.
    batch
        Slices of a step.
    plan
        How long to train.
    judge_rate
        Learning rate of the discriminators.
    """

    resolution: float
    base: int
    levels: int
    batch: int
    plan: Plan
    judge_rate: float = 4e-4


def site_brains(volumes: Sequence[Volume], wanted: frozenset[str]) -> list[SiteBrain]:
    """Training brains from volumes on one grid.

    Parameters
    ----------
    wanted
        Names of the reference's volumes.

    Raises
    ------
    ScanError
        If a brain is unusable or too small, or the grids differ.
    """
    brains = []
    for index in range(len(volumes)):
        volume = volumes[index]
        image, mask = brain_of(volume)
        name = volume.name or "scan"
        if any(len(full_slices(mask, axis)) < 2 for axis in range(3)):
            raise ScanError(f"{name}: too little brain to learn from; check the brain mask")
        subject = volume.subject or name
        brains.append(SiteBrain(image, mask, volume.site, subject, name, name in wanted))
    if len({tuple(brain.mask.shape) for brain in brains}) > 1:
        raise ScanError("the training scans are on grids of different shapes; give all on one")
    return brains


def split_brains(brains: Sequence[SiteBrain]) -> tuple[list[SiteBrain], list[SiteBrain]]:
    """Brains to learn from, and those of held-out subjects; ScanError as `some_held_out`."""
    apart = some_held_out((brain.site, brain.subject) for brain in brains)
    return [b for b in brains if b.subject not in apart], [b for b in brains if b.subject in apart]


def canvas_of(brains: Sequence[SiteBrain], divisor: int) -> int:
    """Side of the canvas for all slices of these brains; 16 at least."""
    shapes = [tuple(brain.mask.shape) for brain in brains]
    return max(canvas_size(shapes, (0, 1, 2), divisor), -(-16 // divisor) * divisor)


@torch.no_grad()
def drawn_across(
    image: Tensor,
    mask: Tensor,
    side: int,
    device: torch.device | str,
    draw: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """A brain drawn slice by slice across each of the three axes: their voxel median.

    Parameters
    ----------
    image, mask
        Shape (X, Y, Z), on the CPU.
    side
        Of the canvas, not smaller than any slice.
    draw
        Slices and masks (B, 1, side, side) on `device` to slices.

    Returns
    -------
    brain
        Shape (X, Y, Z), on the CPU, 0 outside the mask.
    """
    drawn = torch.zeros((3, *image.shape))
    for axis in range(3):
        stack, inside = image.movedim(axis, 0), mask.movedim(axis, 0)
        height, width = stack.shape[1:]
        top, left = (side - height) // 2, (side - width) // 2
        for rows in torch.nonzero(inside.flatten(1).any(1))[:, 0].split(_AT_ONCE):
            seen = on_canvas(stack[rows][:, None], side, side).to(device)
            brain = on_canvas(inside[rows][:, None].float(), side, side).to(device)
            made = draw(seen, brain)[:, 0].cpu()
            drawn[axis].movedim(axis, 0)[rows] = made[:, top : top + height, left : left + width]
    return drawn.median(0).values * mask


@dataclass(frozen=True)
class TranslationPart:
    """Network and limits of one modality.

    Attributes
    ----------
    network
        In eval mode.
    side
        Of the training's canvas.
    likeness
        Where bright and dark tissue lie in the training brains.
    scores
        Held-out scores and facts of the training.
    wanted, examples
        Style of the wanted appearance and the names of the scans that show it, for methods by
        example.
    """

    network: Any
    side: int
    likeness: Likeness
    scores: Mapping[str, Any]
    wanted: Tensor | None = None
    examples: tuple[str, ...] = ()

    def to(self, device: str) -> None:
        """Move the network."""
        self.network.to(device)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Weights, likeness and wanted style."""
        found = {**self.likeness.arrays(), **state_arrays(self.network, "network")}
        if self.wanted is not None:
            found["wanted"] = self.wanted.numpy()
        return found

    def params(self) -> dict[str, Any]:
        """JSON-serialisable form of the rest."""
        return {
            "network": self.network.config(),
            "side": self.side,
            "scores": dict(self.scores),
            "examples": list(self.examples),
        }


P = TypeVar("P", bound=nn.Module)


class SliceTranslation(ByModality[TranslationPart], Generic[P]):
    """A comparator that draws brains slice by slice.

    The drawing itself is given back, as in the papers: what the network blurs or invents is in
    the result.
    """

    presets_by_name: ClassVar[Mapping[str, Preset]]
    network_kind: ClassVar[type[Any]]

    @classmethod
    def contract_for(cls, modalities: Sequence[str]) -> Contract:
        """The contract of the preset ``cpu``."""
        return cls.contract_for_preset(modalities, "cpu")

    @classmethod
    def contract_for_preset(cls, modalities: Sequence[str], preset: str) -> Contract:
        """The template grid at the preset's resolution, robust scale, skull-stripped."""
        resolution = preset_named(cls.name, cls.presets_by_name, preset).resolution
        return Contract(tuple(modalities), GRID, resolution)

    @property
    def contract(self) -> Contract:
        """For the modalities of the training."""
        return self.contract_for_preset(tuple(self._parts), self._preset)

    @classmethod
    def fit(
        cls, volumes: Sequence[Volume], *, seed: int, training: Training | None = None
    ) -> Self:
        """Train on scans of several sites, each modality by itself; see the class.

        Raises
        ------
        ScanError
            If a brain is unusable, or too few sites or subjects are left.
        UsageError
            If the preset is unknown.
        """
        training = training or Training()
        preset = preset_named(cls.name, cls.presets_by_name, training.preset)
        reference = frozenset() if cls.by_example else training.wanted
        return cls._learned(
            volumes,
            learnable(cls.name, volumes, reference, cls._check_people),
            training,
            lambda chosen, share: cls._fit_part(
                site_brains(chosen, training.wanted), preset, seed, share
            ),
        )

    @classmethod
    @abstractmethod
    def _check_people(cls, people: Sequence[Known]) -> None:
        """ScanError if nothing can be learned of these people's scans."""

    @classmethod
    @abstractmethod
    def _fit_part(
        cls, brains: Sequence[SiteBrain], preset: Preset, seed: int, training: Training
    ) -> tuple[TranslationPart, dict[str, bytes]]:
        """Train for one modality."""

    @abstractmethod
    def _draw(self, part: TranslationPart, seen: Tensor, brain: Tensor) -> Tensor:
        """Slices and masks (B, 1, s, s) as they are wanted."""

    def harmonize(self, volume: Volume, *, seed: int) -> Harmonized:
        """Draw `volume` as the reference domain shows it; nothing is drawn at random.

        Raises
        ------
        ScanError
            If there is no such modality, the brain is unusable, or it is no upright brain of the
            modality.
        """
        torch.set_num_threads(self._threads)
        part, name = self._part(volume), volume.name or "scan"
        image, mask = brain_of(volume)
        unlikeness, warnings = part.likeness.admit(
            image, mask, volume.spacing, name=name, modality=volume.modality
        )
        side = canvas_size([tuple(image.shape), (part.side,) * 3], (0, 1, 2), part.network.divisor)
        drawn = drawn_across(
            image, mask, side, self._device, lambda seen, brain: self._draw(part, seen, brain)
        )
        data = drawn.clamp(0, _BRIGHTEST).numpy()
        change = np.abs(data - image.numpy())[mask.numpy()]
        details = {
            "unlikeness": round(unlikeness, 4),
            "mean_absolute_change": round(float(change.mean()), 4),
            **({"examples": list(part.examples)} if part.examples else {}),
        }
        return Harmonized(data, details, tuple(warnings))

    @classmethod
    def _part_from(
        cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]
    ) -> TranslationPart:
        network = cls.network_kind.from_config(params["network"])
        load_arrays(network, arrays, "network")
        network.requires_grad_(False)
        wanted = arrays.get("wanted")
        return TranslationPart(
            network,
            int(params["side"]),
            Likeness.from_arrays(arrays),
            params["scores"],
            None if wanted is None else torch.from_numpy(np.array(wanted, dtype=np.float32)),
            tuple(params["examples"]),
        )


def likeness_of(
    learn: Sequence[SiteBrain], apart: Sequence[SiteBrain], resolution: float
) -> Likeness:
    """From training and held-out brains."""
    spacing = (resolution,) * 3
    return Likeness.of(
        *([rank_cells(b.image, b.mask, spacing)[0] for b in group] for group in (learn, apart))
    )
