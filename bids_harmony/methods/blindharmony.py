"""BlindHarmony (Jeong et al. 2023): the reference domain's flow as prior of an optimization."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Self

import torch
from scipy import ndimage
from torch import Tensor

from bids_harmony.errors import ScanError
from bids_harmony.methods.base import Adaptation, Volume
from bids_harmony.methods.flow_method import Case, FlowMethod
from bids_harmony.methods.flow_optimization import Weights, masked_ncc, optimize_slices
from bids_harmony.methods.flow_training import Part, Preset
from bids_harmony.methods.likelihood import from_slices, slices_of, usable_slices
from bids_harmony.networks.flow import Flow
from bids_harmony.networks.harmonizer import HarmonizerUNet
from bids_harmony.networks.spline_flow import SplineFlow
from bids_harmony.training.plan import Plan
from bids_harmony.training.slices import on_canvas

BETA1 = (250.0, 500.0, 1000.0, 2000.0)
_CHOICE_SLICES = 12
_SMOOTH = 2.0  # slices: standard deviation of what a slice's mean may follow

_CPU = Preset(
    resolution=2.0,
    batch=16,
    tone_samples=900,
    tone_epochs=30,
    flow={"levels": 3, "steps": 4, "hidden": 16, "blocks": 1},
    flow_plan=Plan(1200, 1e-3, every=100, half=False),
)
_PAPER = Preset(
    resolution=1.2,
    batch=256,
    tone_samples=4000,
    tone_epochs=40,
    flow={},
    flow_plan=Plan(20_000, 5e-4, every=500, patience=20, half=False),
)


class BlindHarmony(FlowMethod):
    """Slices that correlate with the scan and are likely under the reference domain's flow.

    Departures from the paper, all for safety or because they measured better:

    - The source is the scan after its tone curve, and so is the first image. The correlation is
      blind to linear maps only, so a foreign contrast would be pulled back in; and a mean image
      needs a template.
    - Correlation is centred and taken inside the brain mask.
    - Steps that raise the objective are taken back, instead of a fallback for overflows.
    - The scale is the volume's, and the mean change of a slice follows that of its neighbours.
    - beta1 is chosen for each site by bits per dimension (`adapt`), where the paper retunes it.
    """

    name: ClassVar[str] = "blindharmony"
    adapts: ClassVar[bool] = True
    axis: ClassVar[int] = 2
    presets_by_name: ClassVar[Mapping[str, Preset]] = {"cpu": _CPU, "paper": _PAPER}

    def __init__(self, parts: Mapping[str, Part], preset: str) -> None:
        super().__init__(parts, preset)
        self._weights = {modality: Weights() for modality in parts}

    @classmethod
    def build(cls, preset: Preset) -> tuple[Flow, HarmonizerUNet | None]:
        """Neural spline flow of the preset's size; there is no harmonizer."""
        return SplineFlow(**preset.flow), None

    def _refine(self, part: Part, case: Case, seed: int) -> Tensor:
        weights = self._weights[case.modality]
        device = next(part.flow.parameters()).device
        usable = usable_slices(case.mask, self.axis)
        stack = slices_of(case.start, self.axis, part.flow.divisor)
        inside = slices_of(case.mask.float(), self.axis, part.flow.divisor)
        done = optimize_slices(
            part.flow, stack[usable].to(device), inside[usable].to(device), weights
        )
        out = stack.clone()
        out[usable] = done.images.cpu()
        out = from_slices(out, case.start.shape, self.axis)
        change = consistent(out - case.start, case.mask, self.axis)
        case.details |= {
            "alpha": weights.alpha,
            "beta1": weights.beta1,
            "beta2": weights.beta2,
            "steps": done.steps,
            "accepted_steps_of_slices": done.accepted,
            "rejected_steps_of_slices": done.rejected,
            "stop_reason": (
                "all steps"
                if done.steps == weights.iterations
                else "no step lowered the objective"
            ),
        }
        return case.start + change * case.mask

    def adapt(self, volumes: Sequence[Volume], *, seed: int) -> Adaptation:
        """Choose beta1 for a site: the one whose results come nearest to the reference's bits.

        Raises
        ------
        ScanError
            If no volume can be used, or they are of several modalities.
        """
        torch.set_num_threads(self._threads)
        part, cases, left_out = self._usable(volumes)
        modality = cases[0].modality
        source, masks = self._choice(part, cases)
        bits: dict[float, float] = {}
        likeness: dict[float, float] = {}
        for beta1 in BETA1:
            weights = replace(self._weights[modality], beta1=beta1)
            images = optimize_slices(part.flow, source, masks, weights).images
            bits[beta1] = _bits(part.flow, images, masks)
            with torch.no_grad():
                likeness[beta1] = float(masked_ncc(images, source, masks).mean())
        before = _bits(part.flow, source, masks)
        if not all(math.isfinite(b) for b in (before, *bits.values())):
            raise ScanError(
                f"{cases[0].modality} scans of one site: likelihood that is not finite; check "
                "them for artefacts, or choose --adapt none"
            )
        chosen = min(BETA1, key=lambda b: (abs(bits[b] - part.goal), -b))
        details = {
            "modality": modality,
            "beta1": chosen,
            "bpd_before": round(before, 4),
            "bpd_after": round(bits[chosen], 4),
            "bpd_goal": round(part.goal, 4),
            "bpd_by_beta1": {f"{b:g}": round(v, 4) for b, v in bits.items()},
            "ncc_by_beta1": {f"{b:g}": round(v, 5) for b, v in likeness.items()},
            "steps": len(BETA1),
            "stop_reason": "all values of beta1 tried",
            "left_out": left_out,
        }
        return Adaptation({}, details)

    def adapted(self, adaptation: Adaptation) -> Self:
        """The method with the site's beta1."""
        made, modality = self._copy_for(adaptation)
        beta1 = adaptation.details.get("beta1")
        if beta1 not in BETA1:
            raise ScanError(f"{self.name}: the adaptation does not fit the model; make it anew")
        made._weights = {
            **self._weights,
            modality: replace(self._weights[modality], beta1=float(beta1)),
        }
        return made

    def _choice(self, part: Part, cases: Sequence[Case]) -> tuple[Tensor, Tensor]:
        """Some evenly spaced slices of the tone-mapped brains, and their masks."""
        device = next(part.flow.parameters()).device
        each = max(_CHOICE_SLICES // len(cases), 2)
        images, masks = [], []
        side = 0
        for case in cases:
            usable = usable_slices(case.mask, self.axis)
            chosen = [usable[(2 * i + 1) * len(usable) // (2 * each)] for i in range(each)]
            images.append(slices_of(case.start, self.axis, part.flow.divisor)[chosen])
            masks.append(slices_of(case.mask.float(), self.axis, part.flow.divisor)[chosen])
            side = max(side, *images[-1].shape[2:])
        stacks = [
            torch.cat([on_canvas(v, side, side) for v in part_]).to(device)
            for part_ in (images, masks)
        ]
        return stacks[0], stacks[1]


def consistent(change: Tensor, mask: Tensor, axis: int) -> Tensor:
    """The change with each slice's mean replaced by a smooth function of its height.

    Slices are optimized one by one; without this their mean would jump from one to the next.

    Parameters
    ----------
    change, mask
        Shape (X, Y, Z).
    axis
        Across the slices.
    """
    weight = mask.movedim(axis, 0).flatten(1).sum(1).double().numpy()
    total = (change * mask).movedim(axis, 0).flatten(1).sum(1).double().numpy()
    smooth = ndimage.gaussian_filter1d(total, _SMOOTH, mode="constant")
    norm = ndimage.gaussian_filter1d(weight, _SMOOTH, mode="constant")
    mean = total / weight.clip(min=1)
    shift = torch.from_numpy((smooth / norm.clip(min=1e-6) - mean) * (weight > 0)).float()
    shape = [1, 1, 1]
    shape[axis] = -1
    return change + shift.reshape(shape) * mask


def _bits(flow: Flow, images: Tensor, masks: Tensor) -> float:
    """Bits per dimension of slices, weighted by their brain voxels as `bits_of_brain` does."""
    weight = masks.sum((1, 2, 3))
    with torch.no_grad():
        bits = flow.bits_per_dim(images, masks)
    return float((bits * weight).sum() / weight.sum())
