"""Training of a flow method on one modality: tone, harmonizer, flow, what is normal for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bids_harmony.errors import ScanError
from bids_harmony.imaging.layout import Layout
from bids_harmony.methods.base import Training, Volume
from bids_harmony.methods.guided_adaptation import goal_of
from bids_harmony.methods.likelihood import Normal, bits_of_brain, normal_of, smoothed
from bids_harmony.methods.reference_brains import layout_of, split_by_subject
from bids_harmony.methods.tone import Brain, Tone, load_arrays, state_arrays
from bids_harmony.methods.tone_fitting import fit_tone_model
from bids_harmony.methods.training_files import curves_csv, run_facts, samples_png, training_png
from bids_harmony.networks.flow import Flow, build_flow
from bids_harmony.networks.harmonizer import HarmonizerUNet
from bids_harmony.training.degrade import degrade_slabs
from bids_harmony.training.fit import train_network
from bids_harmony.training.plan import Plan, Trained
from bids_harmony.training.slices import canvas_size, draw_slabs

if TYPE_CHECKING:
    from bids_harmony.methods.flow_method import FlowMethod

LOG = logging.getLogger("bids_harmony")
_CHECKED = 32  # slices of the held-out score
_NEGATIVE = 20 / 255  # least change of a negative example, Harmonizing Flows


@dataclass(frozen=True)
class Preset:
    """Sizes and lengths of a training.

    Attributes
    ----------
    resolution
        Voxel size of the model's grid in mm.
    batch
        Slices of a step.
    tone_samples, tone_epochs
        Of the tone network.
    flow, harmonizer
        Arguments of the flow's class, and of `HarmonizerUNet` (empty: none).
    flow_plan, harmonizer_plan
        How long to train them.
    negatives
        Share of degraded slices that the flow is taught to find unlikely (guided training).
    """

    resolution: float
    batch: int
    tone_samples: int
    tone_epochs: int
    flow: Mapping[str, Any]
    flow_plan: Plan
    harmonizer: Mapping[str, Any] = field(default_factory=dict)
    harmonizer_plan: Plan | None = None
    negatives: float = 0.0


@dataclass
class Part:
    """What a flow method learned of one modality.

    Attributes
    ----------
    resolution
        Voxel size of the model's grid in mm.
    tone, flow, harmonizer
        The networks.
    layout
        Where brain and brightness lie in the reference domain's brains.
    normal, smooth
        Bits per dimension of held-out reference brains, and of the same after `smoothed`, by
        which scans are refused.
    goal
        Bits per dimension at which adaptation to a site ends: those of held-out reference brains
        after the harmonizer, if there is one.
    scores
        Held-out scores and facts of the training.
    """

    resolution: float
    tone: Tone
    flow: Flow
    harmonizer: HarmonizerUNet | None
    layout: Layout
    normal: Normal
    smooth: Normal
    goal: float
    scores: Mapping[str, Any]

    def to(self, device: str) -> None:
        """Move the networks; the tone's stays on the CPU, where its histogram is."""
        self.flow.to(device)
        if self.harmonizer is not None:
            self.harmonizer.to(device)

    def params(self) -> dict[str, Any]:
        """JSON-serialisable form of all but the weights."""
        return {
            "resolution": self.resolution,
            "flow": self.flow.config(),
            "harmonizer": self.harmonizer.config() if self.harmonizer else None,
            "normal": self.normal.to_dict(),
            "smooth": self.smooth.to_dict(),
            "goal": self.goal,
            "scores": dict(self.scores),
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Weights of tone and networks, and the layout."""
        found = {**self.tone.arrays(), **self.layout.arrays(), **state_arrays(self.flow, "flow")}
        if self.harmonizer is not None:
            found |= state_arrays(self.harmonizer, "harmonizer")
        return found

    @classmethod
    def from_state(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Part:
        """Rebuild from `arrays` and `params`; ScanError if they do not fit together."""
        flow = build_flow(params["flow"])
        load_arrays(flow, arrays, "flow")
        flow.requires_grad_(False)
        harmonizer = None
        if params["harmonizer"]:
            harmonizer = HarmonizerUNet.from_config(params["harmonizer"])
            load_arrays(harmonizer, arrays, "harmonizer")
        return cls(
            float(params["resolution"]),
            Tone.from_arrays(arrays),
            flow,
            harmonizer,
            Layout.from_arrays(arrays),
            Normal.from_dict(params["normal"]),
            Normal.from_dict(params["smooth"]),
            float(params["goal"]),
            params["scores"],
        )


def fit_part(
    method: type[FlowMethod],
    volumes: Sequence[Volume],
    preset: Preset,
    seed: int,
    training: Training,
) -> tuple[Part, dict[str, bytes]]:
    """Train everything that a method needs for one modality.

    Returns
    -------
    part, files
        What was learned; training curves and pictures.

    Raises
    ------
    ScanError
        If fewer than two subjects are left, one of which is held out.
    """
    learn, apart = split_by_subject(volumes, preset.resolution)
    brains, held_out = learn.brains, apart.brains
    tone, tone_scores = fit_tone_model(
        learn,
        apart,
        samples=preset.tone_samples,
        epochs=preset.tone_epochs,
        seed=seed,
        minutes=training.minutes(0.2),
    )
    LOG.info("tone: held-out error %(before).4f, corrected %(after).4f", tone_scores)
    torch.manual_seed(seed)
    flow, harmonizer = method.build(preset)
    runs: dict[str, Trained] = {}
    rest = 1.0 if harmonizer is None else 0.5
    if harmonizer is not None:
        runs["harmonizer"] = _train_harmonizer(
            harmonizer, brains, held_out, preset, seed, training
        )
    runs["flow"] = _train_flow(
        flow, brains, held_out, preset, seed, training, method.axis, 0.8 * rest
    )
    flow.eval().requires_grad_(False)
    files = {
        "curves.csv": curves_csv(runs),
        "training.png": training_png(runs),
        "samples.png": samples_png(flow, brains[0], method.axis, seed),
    }
    for network in (flow, harmonizer):
        if network is not None:  # the paper's size takes hours to score on a CPU
            network.to(training.device)
    toned = apart.toned(tone), learn.toned(tone)
    sharp, blurred = (
        [_bits_of(flow, part, method.axis, smooth=smooth) for part in toned]
        for smooth in (False, True)
    )
    normal = _normal(*sharp)
    part = Part(
        resolution=preset.resolution,
        tone=tone,
        flow=flow,
        harmonizer=harmonizer,
        layout=layout_of([*toned[1], *toned[0]], [*learn.spacings, *apart.spacings]),
        normal=normal,
        smooth=_normal(*blurred),
        goal=goal_of(harmonizer, flow, toned[0], axis=method.axis) if harmonizer else normal.mean,
        scores=_scores(tone_scores, (sharp[0], sharp[1]), runs),
    )
    part.to("cpu")
    return part, files


def _normal(held_out: Sequence[float], trained: Sequence[float]) -> Normal:
    """Mean of held-out brains, spread of all."""
    return replace(normal_of(held_out), deviation=normal_of([*held_out, *trained]).deviation)


def _scores(
    tone: Mapping[str, float],
    bits: tuple[Sequence[float], Sequence[float]],
    runs: Mapping[str, Trained],
) -> dict[str, Any]:
    """What the bundle says of a training; no times, so that equal trainings give equal bundles."""
    return {
        "tone_error": {k: round(v, 5) for k, v in tone.items()},
        "held_out_bits_per_dimension": [round(b, 4) for b in bits[0]],
        "training_bits_per_dimension": [round(b, 4) for b in bits[1]],
        **{name: run_facts(run) for name, run in runs.items()},
    }


def _train_harmonizer(
    harmonizer: HarmonizerUNet,
    brains: Sequence[Brain],
    held_out: Sequence[Brain],
    preset: Preset,
    seed: int,
    training: Training,
) -> Trained:
    """Teach the harmonizer to undo `degrade_slabs`; the loss is each slice's error (RMS)."""
    shapes = [tuple(image.shape) for image, _ in [*brains, *held_out]]
    side = canvas_size(shapes, (0, 1, 2), harmonizer.divisor)
    thick = max(harmonizer.slices, 3)
    middle, around = thick // 2, harmonizer.slices // 2

    def draw(
        generator: torch.Generator, source: Sequence[Brain] = brains, count: int = preset.batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        clean, mask = draw_slabs(source, count, generator, side=side, thick=thick)
        seen = degrade_slabs(clean, mask, generator)
        return seen[:, middle - around : middle + around + 1], clean[:, middle], mask[:, middle]

    def loss(batch: Any, generator: torch.Generator | None = None) -> Tensor:
        seen, clean, mask = batch
        seen = seen.contiguous(memory_format=torch.channels_last)
        error = (harmonizer(seen)[:, 0].float() - clean).square() * mask
        return (error.sum((1, 2)) / mask.sum((1, 2)) + 1e-6).sqrt().mean()

    checks = draw(torch.Generator().manual_seed(seed + 7), held_out, _CHECKED)
    assert preset.harmonizer_plan is not None
    torch.nn.Module.to(harmonizer, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def score() -> float:
        device = next(harmonizer.parameters()).device
        return float(loss([part.to(device) for part in checks]))

    return train_network(
        harmonizer,
        name="harmonizer",
        draw=draw,
        loss=loss,
        held_out=score,
        plan=preset.harmonizer_plan.with_limit(training.minutes(0.4)),
        seed=seed,
        device=training.device,
        folder=training.below("harmonizer"),
    )


def _train_flow(
    flow: Flow,
    brains: Sequence[Brain],
    held_out: Sequence[Brain],
    preset: Preset,
    seed: int,
    training: Training,
    axis: int,
    share: float,
) -> Trained:
    """Maximum likelihood on reference slices; with negatives also unlikelihood of degraded ones.

    Harmonizing Flows gives negatives the opposite sign in the loss and bounds it. Here a negative
    counts until it is one bit less likely than the batch's reference slices, which has the same
    effect and needs no scale.
    """
    shapes = [tuple(image.shape) for image, _ in [*brains, *held_out]]
    side = canvas_size(shapes, (axis,), flow.divisor)

    def draw(
        generator: torch.Generator, source: Sequence[Brain] = brains, count: int = preset.batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        clean, mask = draw_slabs(source, count, generator, side=side, axes=(axis,), turned=False)
        seen = clean
        if preset.negatives:
            chosen = torch.rand(count, generator=generator) < preset.negatives
            worse = degrade_slabs(clean, mask, generator)
            change = ((worse - clean).abs() * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)
            chosen &= change > 0.5 * _NEGATIVE
            seen = torch.where(chosen[:, None, None, None], worse, clean)
        else:
            chosen = torch.zeros(count, dtype=torch.bool)
        return seen[:, 1:2], mask[:, 1:2].float(), chosen

    def loss(batch: Any, generator: torch.Generator) -> Tensor:
        seen, _, negative = batch
        bits = flow.bits_bound(seen, generator=generator)
        good = bits[~negative].mean() if bool((~negative).any()) else bits.new_zeros(())
        if not bool(negative.any()):
            return good
        gap = (good.detach() + 1.0 - bits[negative]).clamp(min=0)
        return good + preset.negatives * gap.mean()

    source = torch.Generator().manual_seed(seed + 7)
    seen, mask = draw_slabs(held_out, _CHECKED, source, side=side, axes=(axis,), turned=False)

    def score() -> float:
        device = next(flow.parameters()).device
        bits = [
            flow.bits_per_dim(s.to(device), m.to(device).float()).mean()
            for s, m in zip(seen[:, 1:2].split(8), mask[:, 1:2].split(8), strict=True)
        ]
        return float(torch.stack(bits).mean())

    return train_network(
        flow,
        name="flow",
        draw=draw,
        loss=loss,
        held_out=score,
        plan=preset.flow_plan.with_limit(training.minutes(share)),
        seed=seed,
        device=training.device,
        folder=training.below("flow"),
    )


def _bits_of(flow: Flow, toned: Sequence[Brain], axis: int, *, smooth: bool) -> list[float]:
    """Bits per dimension of reference brains whose tone was mapped, as any scan's is."""
    found = []
    for start, mask in toned:
        seen = smoothed(start, mask) if smooth else start
        found.append(bits_of_brain(flow, seen, mask, axis))
    if not np.isfinite(found).all():
        raise ScanError(
            "the flow gives reference brains a likelihood that is not finite; check the training "
            "scans for artefacts, or train with another --random-seed"
        )
    return found
