"""Paired U-Net, as DeepHarmony (Dewey et al. 2019): it needs travelling subjects."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bids_harmony.errors import ScanError
from bids_harmony.imaging.align import find_rigid, moved
from bids_harmony.methods.base import Training
from bids_harmony.methods.learnable import Known
from bids_harmony.methods.slice_translation import (
    Preset,
    SliceTranslation,
    TranslationPart,
    canvas_of,
    likeness_of,
)
from bids_harmony.methods.training_files import curves_csv, run_facts, site_facts, training_png
from bids_harmony.networks.translation import SliceTranslator
from bids_harmony.training.fit import train_network
from bids_harmony.training.plan import Plan
from bids_harmony.training.slice_losses import masked_l1
from bids_harmony.training.translation import (
    PairedSlices,
    SiteBrain,
    SlicePair,
    fixed_slices,
    paired_loss,
)

LOG = logging.getLogger("bids_harmony")
_CHECKS = 8
_GAIN = 1e-3  # bits of mutual information that are worth an interpolation

_CPU = Preset(2.0, 16, 3, 8, Plan(2400, 1e-3, every=150, patience=10))
_PAPER = Preset(1.0, 32, 4, 16, Plan(40_000, 5e-4, every=1000, patience=15))

Pair = tuple[SiteBrain, SiteBrain]


class PairedUNet(SliceTranslation[SliceTranslator]):
    """Learns from people who were scanned at the reference and at other sites.

    The scan at the reference is brought exactly onto the other one (rigidly, by mutual
    information); the network learns to draw it. Trained on all other sites at once.
    """

    name: ClassVar[str] = "unet"
    presets_by_name: ClassVar[Mapping[str, Preset]] = {"cpu": _CPU, "paper": _PAPER}
    network_kind: ClassVar[type[Any]] = SliceTranslator

    @classmethod
    def _check_people(cls, people: Sequence[Known]) -> None:
        there = {person.subject for person in people if person.wanted}
        subjects = sorted({k.subject for k in people if not k.wanted and k.subject in there})
        if not subjects:
            raise ScanError(
                "unet learns from travelling subjects, and nobody of the training scans was "
                "scanned at the reference and at another site; give such scans, or use a method "
                "that needs none"
            )
        if len(subjects) < 2:
            raise ScanError(
                "unet learns from people scanned at the reference and at another site, of whom "
                f"one is held out, and there is only {', '.join(subjects)}; give scans of two "
                "travelling subjects or more, or use a method that needs none"
            )

    @classmethod
    def _fit_part(
        cls, brains: Sequence[SiteBrain], preset: Preset, seed: int, training: Training
    ) -> tuple[TranslationPart, dict[str, bytes]]:
        pairs = travelling_pairs(brains, preset.resolution)
        subjects = sorted({a.subject for a, _ in pairs})
        apart = set(subjects[-max(round(len(subjects) / 5), 1) :])
        learn = [pair for pair in pairs if pair[0].subject not in apart]
        checks = [pair for pair in pairs if pair[0].subject in apart]
        torch.manual_seed(seed)
        network = SliceTranslator(preset.base, preset.levels)
        side = canvas_of(brains, network.divisor)
        drawer = PairedSlices(checks, side=side, count=preset.batch)
        batches = fixed_slices(drawer, _CHECKS, seed)

        def score() -> float:
            device = next(network.parameters()).device
            here = [SlicePair(*(part.to(device) for part in batch)) for batch in batches]
            found = [
                masked_l1(network(b.input, b.input_mask), b.wanted, b.input_mask) for b in here
            ]
            return float(torch.stack(found).mean())

        run = train_network(
            network,
            name="unet",
            draw=PairedSlices(learn, side=side, count=preset.batch),
            loss=lambda batch, generator: paired_loss(network, batch),
            held_out=score,
            plan=preset.plan.with_limit(training.minutes(1.0)),
            seed=seed,
            device=training.device,
            folder=training.below("unet"),
        )
        network.requires_grad_(False)
        inputs = [pair[0] for pair in learn], [pair[0] for pair in checks]
        scores = {**site_facts(*inputs), **run_facts(run), "pairs": len(pairs)}
        part = TranslationPart(network, side, likeness_of(*inputs, preset.resolution), scores)
        files = {
            "curves.csv": curves_csv({"unet": run}),
            "training.png": training_png({"unet": run}),
        }
        return part, files

    def _draw(self, part: TranslationPart, seen: Tensor, brain: Tensor) -> Tensor:
        out: Tensor = part.network(seen, brain)
        return out


def travelling_pairs(brains: Sequence[SiteBrain], resolution: float) -> list[Pair]:
    """Each scan of another site with the first scan of the same subject at the reference.

    The reference's scan is brought onto the other's place.
    """
    wanted: dict[str, SiteBrain] = {}
    for brain in brains:
        if brain.wanted:
            wanted.setdefault(brain.subject, brain)
    pairs = [(b, wanted[b.subject]) for b in brains if not b.wanted and b.subject in wanted]
    return [(other, in_place(other, theirs, resolution)) for other, theirs in pairs]


def in_place(other: SiteBrain, theirs: SiteBrain, resolution: float) -> SiteBrain:
    """The reference's scan of a person on the place of the person's other scan."""
    spacing = (resolution,) * 3
    common = other.mask & theirs.mask
    if not bool(common.any()):
        raise ScanError(
            f"{other.name} and {theirs.name}: the brains of one subject do not overlap; check "
            "masks and registration"
        )
    inside = common.numpy()
    motion, before, after = find_rigid(other.image.numpy(), theirs.image.numpy(), inside, spacing)
    LOG.info("%s onto %s: moved by %s (degrees, mm), mutual information %.3f, then %.3f bits",
             theirs.name, other.name, np.round(motion, 2).tolist(), before, after)  # fmt: skip
    if after - before < _GAIN:
        return theirs
    image = moved(theirs.image.numpy(), inside, motion, spacing)
    mask = moved(theirs.mask.numpy().astype(np.float32), inside, motion, spacing) > 0.5
    image = np.where(mask, image, 0).astype(np.float32)
    return replace(theirs, image=torch.from_numpy(image), mask=torch.from_numpy(mask))
