"""Training of the network that makes one volume of slices drawn across three axes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bids_harmony.methods.base import Training
from bids_harmony.methods.calamiti_data import Cohort
from bids_harmony.methods.calamiti_drawing import draw_brain, fused, theta_of_brain
from bids_harmony.methods.calamiti_learned import Preset, spread
from bids_harmony.networks.calamiti import CalamitiNetworks, FusionNetwork
from bids_harmony.training.contrasts import Session
from bids_harmony.training.fit import train_network, weights_key
from bids_harmony.training.plan import Trained
from bids_harmony.training.slice_losses import masked_l1

LOG = logging.getLogger("bids_harmony")
LEARNED = 12  # most sessions to learn from
_HELD_OUT = 4
_PATCH, _PATCHES = 32, 4


@dataclass(frozen=True)
class Stack:
    """A brain drawn across three axes, (3, X, Y, Z), with the scan and mask it should be."""

    drawn: Tensor
    wanted: Tensor
    mask: Tensor


def stacks_of(networks: CalamitiNetworks, sessions: Sequence[Session], side: int) -> list[Stack]:
    """The first image of two modalities of each session, both drawn from the same anatomy."""
    found = []
    for index, session in enumerate(sessions):
        modalities = sorted(session.images)
        chosen = [modalities[(index + k) % len(modalities)] for k in range(2)]
        images = [session.images[m][0] for m in chosen]
        thetas = [theta_of_brain(networks, image, session.mask, side) for image in images]
        drawn = draw_brain(networks, images[0], session.mask, thetas, side)
        found += [Stack(d, i, session.mask) for d, i in zip(drawn, images, strict=True)]
    return found


def train_fusion(
    networks: CalamitiNetworks,
    cohort: Cohort,
    side: int,
    preset: Preset,
    seed: int,
    training: Training,
) -> tuple[FusionNetwork | None, Trained, dict[str, Any]]:
    """Fusion on patches of training brains; None where the voxel median is better held out."""
    stacks = stacks_of(networks, spread(cohort.learn, LEARNED), side)
    checks = stacks_of(networks, spread(cohort.held_out, _HELD_OUT), side)
    torch.manual_seed(seed + 1)
    fusion = FusionNetwork(preset.fusion_width)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        return draw_patches(stacks, _PATCHES, generator)

    def loss(batch: Any, generator: torch.Generator) -> Tensor:
        drawn, wanted, mask = batch
        return masked_l1(fusion(drawn), wanted, mask)

    def error(network: FusionNetwork | None) -> float:
        each = [masked_l1(fused(network, s.drawn, s.mask), s.wanted, s.mask) for s in checks]
        return float(torch.stack(each).mean())

    run = train_network(
        fusion,
        name="fusion",
        draw=draw,
        loss=loss,
        held_out=lambda: error(fusion),
        plan=preset.fusion_plan.with_limit(training.minutes(0.1)),
        seed=seed,
        device=training.device,
        folder=training.below(f"fusion-{weights_key(networks)}"),
    )
    fusion.requires_grad_(False)
    median = error(None)
    scores: dict[str, Any] = {"network": round(run.best, 5), "voxel_median": round(median, 5)}
    scores["used"] = "network" if run.best < median else "voxel median"
    LOG.info("fusion: held-out error %.5f, of the voxel median %.5f", run.best, median)
    return (fusion if run.best < median else None), run, scores


def draw_patches(
    stacks: Sequence[Stack], count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random patches around brain voxels: drawn (B, 3, ...), wanted and mask (B, 1, ...)."""
    edges = [min(_PATCH, min(s.mask.shape[a] for s in stacks)) for a in range(3)]
    rows = []
    for _ in range(count):
        stack = stacks[int(torch.randint(len(stacks), (), generator=generator))]
        brain = torch.nonzero(stack.mask)
        centre = brain[int(torch.randint(len(brain), (), generator=generator))].tolist()
        box = []
        for place, edge, size in zip(centre, edges, stack.mask.shape, strict=True):
            start = min(max(place - edge // 2, 0), size - edge)
            box.append(slice(start, start + edge))
        where = tuple(box)
        rows.append((
            stack.drawn[(slice(None), *where)],
            stack.wanted[where][None],
            stack.mask[where][None].float(),
        ))  # fmt: skip
    drawn, wanted, mask = (torch.stack(part) for part in zip(*rows, strict=True))
    return drawn, wanted, mask
