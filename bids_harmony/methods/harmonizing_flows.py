"""Harmonizing Flows (Beizaee et al.): a pre-trained harmonizer, adapted to sites by a flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from bids_harmony.imaging.tone import composed
from bids_harmony.methods.base import Adaptation, Volume
from bids_harmony.methods.flow_method import Case, FlowMethod
from bids_harmony.methods.flow_training import Part, Preset
from bids_harmony.methods.guided_adaptation import AdaptationPlan, adapt_harmonizer
from bids_harmony.methods.likelihood import from_slices, slices_of
from bids_harmony.methods.task_entropy import Segmentation
from bids_harmony.methods.tone import Brain, load_arrays, mapped, state_arrays
from bids_harmony.networks.affine_flow import AffineFlow
from bids_harmony.networks.flow import Flow
from bids_harmony.networks.harmonizer import HarmonizerUNet
from bids_harmony.training.plan import Plan
from bids_harmony.training.slices import on_canvas

_CPU = Preset(
    resolution=2.0,
    batch=16,
    tone_samples=900,
    tone_epochs=30,
    flow={"widths": (16,), "blocked": True, "split": True, "noise_couplings": 0},
    flow_plan=Plan(900, 1e-3, every=75, half=False),
    harmonizer={"slices": 3, "widths": (16, 32, 64), "activation": "leaky-relu"},
    harmonizer_plan=Plan(2500, 2e-3, every=100, patience=12),
    negatives=0.2,
)
_PAPER = Preset(
    resolution=1.0,
    batch=24,
    tone_samples=4000,
    tone_epochs=40,
    flow={},
    flow_plan=Plan(40_000, 1e-3, every=500, patience=20, half=False),
    harmonizer={"slices": 1},
    harmonizer_plan=Plan(40_000, 1e-3, every=500, patience=20),
    negatives=0.2,
)


class HarmonizingFlows(FlowMethod):
    """The scan's tone curve, then a U-Net that undoes what scanners add, adapted by the flow.

    The U-Net takes noise and residual bias field away, after which the tone can be told better:
    a second tone curve, found on its output, follows.

    The U-Net sees slices across all three axes and the mean of its three answers is taken, so no
    plane shows stripes. Its output differs from the tone-mapped scan by a gain for each slice and
    a map; both are small where the scan is already like the reference domain.

    `adapt` follows the paper's test-time adaptation with bounds of our own: see
    `guided_adaptation`.
    """

    name: ClassVar[str] = "harmonizing-flows"
    adapts: ClassVar[bool] = True
    adapts_by_entropy: ClassVar[bool] = True
    axis: ClassVar[int] = 1
    presets_by_name: ClassVar[Mapping[str, Preset]] = {"cpu": _CPU, "paper": _PAPER}
    adaptation_plan: ClassVar[AdaptationPlan] = AdaptationPlan()

    @classmethod
    def build(cls, preset: Preset) -> tuple[Flow, HarmonizerUNet | None]:
        """Affine-coupling flow and harmonizer of the preset's size."""
        return AffineFlow(**preset.flow), HarmonizerUNet(**preset.harmonizer)

    def _refine(self, part: Part, case: Case, seed: int) -> Tensor:
        assert part.harmonizer is not None
        out = apply_harmonizer(part.harmonizer, case.start).clamp(min=0) * case.mask
        again = part.tone.curve(out, case.mask, case.grid.spacing)
        case.curve = composed(case.curve, again)
        case.start = mapped(again, case.start, case.mask)
        return mapped(again, out, case.mask)

    def adapt(
        self,
        volumes: Sequence[Volume],
        *,
        seed: int,
        segmentation: Segmentation | None = None,
    ) -> Adaptation:
        """Adapt the harmonizer to the scans of one site and modality; the method is unchanged.

        Parameters
        ----------
        volumes, seed
            As for every method.
        segmentation
            Network of the user's task; states that make it less sure of the site are not kept.

        Raises
        ------
        ScanError
            If no volume can be used, or they are of several modalities.
        UsageError
            If the segmentation network fails on the slices, or its scores are not finite.
        """
        torch.set_num_threads(self._threads)
        torch.manual_seed(seed)
        part, cases, left_out = self._usable(volumes)
        harmonizer = deepcopy(part.harmonizer)
        assert harmonizer is not None
        details = adapt_harmonizer(
            harmonizer,
            part.flow,
            [(case.start, case.mask) for case in cases],
            goal=part.goal,
            axis=self.axis,
            plan=self.adaptation_plan,
            seed=seed,
            entropy=segmentation.entropy if segmentation else None,
        )
        if segmentation:
            details |= segmentation.words
        arrays = state_arrays(harmonizer, "harmonizer") if details["kept_step"] else {}
        facts = {"modality": cases[0].modality, **details, "left_out": left_out}
        return Adaptation(arrays, facts)

    def adaptation_inputs(self, volumes: Sequence[Volume]) -> tuple[Part, list[Brain]]:
        """What `adapt` works with: the modality's part, and the volumes after their tone curves.

        Raises
        ------
        ScanError
            If no volume can be used, or they are of several modalities.
        """
        part, cases, _ = self._usable(volumes)
        return part, [(case.start, case.mask) for case in cases]

    def adapted(self, adaptation: Adaptation) -> Self:
        """The method with the adapted harmonizer in place of the pre-trained one."""
        made, modality = self._copy_for(adaptation)
        if adaptation.arrays:
            part = self._parts[modality]
            assert part.harmonizer is not None
            harmonizer = deepcopy(part.harmonizer)
            load_arrays(harmonizer, adaptation.arrays, "harmonizer")
            made._parts[modality] = replace(part, harmonizer=harmonizer.to(self._device))
        return made


def apply_harmonizer(
    harmonizer: HarmonizerUNet, image: Tensor, axes: Sequence[int] = (0, 1, 2)
) -> Tensor:
    """Mean of the harmonizer's answers across the axes.

    Parameters
    ----------
    harmonizer
        On any device.
    image
        Shape (X, Y, Z), on the CPU.
    """
    device = next(harmonizer.parameters()).device
    total = torch.zeros_like(image)
    with torch.no_grad():
        for axis in axes:
            parts = slabs(image, axis, harmonizer).split(8)
            out = torch.cat([harmonizer(s.to(device)).float().cpu() for s in parts])
            total += from_slices(out, image.shape, axis)
    return total / len(axes)


def slabs(image: Tensor, axis: int, harmonizer: HarmonizerUNet) -> Tensor:
    """Every slice across `axis` with its neighbours, (N, slices, side, side).

    Squares as in training: how near the canvas ends is seen by convolutions.
    """
    side = -(-max(image.shape) // harmonizer.divisor) * harmonizer.divisor
    stack = on_canvas(slices_of(image, axis, 1), side, side)
    reach = harmonizer.slices // 2
    padded = functional.pad(stack[:, 0], (0, 0, 0, 0, reach, reach))
    count = stack.shape[0]
    neighbours = torch.stack([padded[i : i + count] for i in range(harmonizer.slices)], dim=1)
    return neighbours.contiguous(memory_format=torch.channels_last)
