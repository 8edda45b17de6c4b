"""Training of CALAMITI: the slice networks, the fusion of three orientations, a new site."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bids_harmony.imaging.layout import Coarse, Layout
from bids_harmony.methods.base import Training
from bids_harmony.methods.calamiti_admission import Known
from bids_harmony.methods.calamiti_data import Cohort
from bids_harmony.methods.calamiti_drawing import (
    draw_brain,
    drawing_error,
    fused,
    theta_of_brain,
)
from bids_harmony.methods.calamiti_files import ThetaRow
from bids_harmony.networks.calamiti import CalamitiNetworks, FusionNetwork
from bids_harmony.training.calamiti_losses import (
    adaptation_loss,
    calamiti_loss,
    masked_l1,
    pair_error,
)
from bids_harmony.training.contrasts import PairBatch, PairDrawer, Session
from bids_harmony.training.fit import Plan, Trained, train_network
from bids_harmony.training.slices import canvas_size

LOG = logging.getLogger("bids_harmony")
_CHECKED = 32  # pairs of the held-out score
_AT_ONCE = 4
_FUSED = 12  # sessions to learn fusion from
_FUSED_HELD_OUT = 4
_PATCH, _PATCHES = 32, 4
_LEAST_SIDE = 16  # of the theta encoder


@dataclass(frozen=True)
class Preset:
    """Sizes and lengths of a training.

    Attributes
    ----------
    resolution
        Voxel size of the model's grid in mm.
    batch
        Pairs of a step.
    networks
        Arguments of `CalamitiNetworks`.
    plan, fusion_plan, adaptation_plan
        How long to train the slice networks, the fusion, and the encoders' last layers on a new
        site.
    fusion_width
        Of `FusionNetwork`.
    """

    resolution: float
    batch: int
    networks: Mapping[str, Any]
    plan: Plan
    fusion_plan: Plan
    adaptation_plan: Plan
    fusion_width: int = 8


@dataclass(frozen=True)
class Learned:
    """What a training gave.

    Attributes
    ----------
    networks
        In eval mode, on the CPU.
    fusion
        None: the voxel median is taken.
    side
        Of the canvas.
    known
        By modality.
    thetas
        Of every image of the training.
    runs
        How the trainings went, by network.
    scores
        JSON-serialisable.
    """

    networks: CalamitiNetworks
    fusion: FusionNetwork | None
    side: int
    known: Mapping[str, Known]
    thetas: tuple[ThetaRow, ...]
    runs: Mapping[str, Trained]
    scores: Mapping[str, Any]


def train_calamiti(
    cohort: Cohort,
    preset: Preset,
    *,
    seed: int,
    training: Training,
    discriminator: bool,
    same_slice: bool,
) -> Learned:
    """Train the slice networks, then the fusion, then measure what is normal.

    Parameters
    ----------
    cohort, preset, seed, training
        What to learn from, and how.
    discriminator
        Train the discriminator of beta, if there are two sites.
    same_slice
        Take theta from the slice that is drawn.
    """
    first = cohort.first_site if discriminator else None
    torch.manual_seed(seed)  # of the first weights
    networks = CalamitiNetworks(**preset.networks, discriminator=first is not None)
    shapes = [tuple(s.mask.shape) for s in (*cohort.learn, *cohort.held_out)]
    side = max(
        canvas_size(shapes, (0, 1, 2), networks.divisor),
        -(-_LEAST_SIDE // networks.divisor) * networks.divisor,
    )
    drawer = PairDrawer(
        cohort.learn, side=side, count=preset.batch, first=first, same_slice=same_slice
    )
    runs = {
        "networks": train_network(
            networks,
            name="networks",
            draw=drawer,
            loss=lambda batch, generator: calamiti_loss(networks, batch, generator),
            held_out=held_out_score(networks, cohort.held_out, side, seed),
            plan=_limited(preset.plan, training, 0.8),
            seed=seed,
            device=training.device,
            folder=training.folder / "networks" if training.folder else None,
        )
    }
    networks.requires_grad_(False).to(training.device)
    fusion, run, fusion_scores = _train_fusion(networks, cohort, side, preset, seed, training)
    runs["fusion"] = run
    thetas = theta_rows(networks, (*cohort.learn, *cohort.held_out), side)
    known = _known(networks, fusion, cohort, side, thetas)
    scores = {
        "held_out_error": round(runs["networks"].best, 5),
        "fusion": fusion_scores,
        "drawing_error": {m: round(k.error, 4) for m, k in known.items()},
        "discriminator": _discriminator_words(cohort, discriminator),
        "sessions": len(cohort.learn),
        "held_out_sessions": len(cohort.held_out),
        "left_out": list(cohort.left_out),
        "networks": {name: _facts(run) for name, run in runs.items()},
    }
    networks.cpu()
    return Learned(networks, fusion, side, known, tuple(thetas), runs, scores)


def held_out_score(
    networks: CalamitiNetworks, sessions: Sequence[Session], side: int, seed: int
) -> Callable[[], float]:
    """`pair_error` of fixed held-out pairs, theta always from another slice."""
    drawer = PairDrawer(sessions, side=side, count=_AT_ONCE, first=None)
    generator = torch.Generator().manual_seed(seed + 7)
    batches = [drawer(generator) for _ in range(_CHECKED // _AT_ONCE)]

    def score() -> float:
        device = networks.steps.device
        found = [
            pair_error(networks, PairBatch(*(part.to(device) for part in batch)))
            for batch in batches
        ]
        return float(torch.stack(found).mean())

    return score


def theta_rows(
    networks: CalamitiNetworks, sessions: Sequence[Session], side: int
) -> list[ThetaRow]:
    """Theta of every image of some sessions."""
    return [
        ThetaRow(
            name, session.site, session.subject, session.session, modality,
            *theta_of_brain(networks, image, session.mask, side),
        )
        for session in sessions
        for modality in sorted(session.images)
        for name, image in zip(session.names[modality], session.images[modality], strict=True)
    ]  # fmt: skip


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


def _train_fusion(
    networks: CalamitiNetworks,
    cohort: Cohort,
    side: int,
    preset: Preset,
    seed: int,
    training: Training,
) -> tuple[FusionNetwork | None, Trained, dict[str, Any]]:
    """Fusion on patches of training brains; None where the voxel median is better held out."""
    stacks = stacks_of(networks, _spread(cohort.learn, _FUSED), side)
    checks = stacks_of(networks, _spread(cohort.held_out, _FUSED_HELD_OUT), side)
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
        plan=_limited(preset.fusion_plan, training, 0.1),
        seed=seed,
        device=training.device,
        folder=training.folder / "fusion" if training.folder else None,
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


def _known(
    networks: CalamitiNetworks,
    fusion: FusionNetwork | None,
    cohort: Cohort,
    side: int,
    thetas: Sequence[ThetaRow],
) -> dict[str, Known]:
    """What scans of each modality are like: errors as `harmonize` measures them."""
    known = {}
    for modality in cohort.modalities:
        held_out, learn = (
            [s for s in part if modality in s.images] for part in (cohort.held_out, cohort.learn)
        )
        apart, own = (
            [own_error(networks, fusion, s.images[modality][0], s.mask, side) for s in part]
            for part in (held_out, _spread(learn, _FUSED))
        )
        cells = [
            Coarse(s.images[modality][0].numpy(), s.mask.numpy(), (1.0, 1.0, 1.0)).cells()
            for s in (*learn, *held_out)
        ]
        known[modality] = Known(
            np.array([(r.theta1, r.theta2) for r in thetas if r.modality == modality]),
            float(np.mean(apart or own)),
            float(np.std([*apart, *own])),
            Layout.of(cells),
        )
    return known


def own_error(
    networks: CalamitiNetworks,
    fusion: FusionNetwork | None,
    image: Tensor,
    mask: Tensor,
    side: int,
) -> float:
    """`drawing_error` of a brain that is drawn with its own theta."""
    theta = theta_of_brain(networks, image, mask, side)
    drawn = draw_brain(networks, image, mask, [theta], side)[0]
    return drawing_error(fused(fusion, drawn, mask), image, mask)


def adapt_networks(
    networks: CalamitiNetworks,
    learn: Sequence[Session],
    held_out: Sequence[Session],
    preset: Preset,
    *,
    side: int,
    seed: int,
    training: Training,
    same_slice: bool,
) -> tuple[CalamitiNetworks, Trained]:
    """Networks whose encoders' last layers were trained on a new site (paper, 2.4).

    Decoder and discriminator stay as they are; the discriminator goes on asking for betas like
    the first site's.
    """
    adapted = deepcopy(networks).cpu().requires_grad_(False)
    for layer in adapted.last_layers():
        layer.requires_grad_(True)
    drawer = PairDrawer(learn, side=side, count=preset.batch, first=None, same_slice=same_slice)
    run = train_network(
        adapted,
        name="adaptation",
        draw=drawer,
        loss=lambda batch, generator: adaptation_loss(adapted, batch, generator),
        held_out=held_out_score(adapted, held_out, side, seed),
        plan=_limited(preset.adaptation_plan, training, 1.0),
        seed=seed,
        device=training.device,
        folder=training.folder / "adaptation" if training.folder else None,
    )
    return adapted.requires_grad_(False), run


def _spread(sessions: Sequence[Session], most: int) -> list[Session]:
    """At most so many of the sessions, evenly spaced."""
    chosen = np.linspace(0, len(sessions) - 1, min(most, len(sessions)))
    return [sessions[round(i)] for i in chosen]


def _limited(plan: Plan, training: Training, share: float) -> Plan:
    if training.max_minutes is None:
        return plan
    return replace(plan, minutes=share * training.max_minutes)


def _facts(run: Trained) -> dict[str, Any]:
    return {
        "steps": run.steps,
        "rejected_steps": run.rejected,
        "held_out": round(run.best, 5),
        "stop_reason": run.stop_reason,
    }


def _discriminator_words(cohort: Cohort, wanted: bool) -> str:
    if not wanted:
        return "none: this method has no discriminator"
    if cohort.first_site is None:
        return "left out: it needs the paired scans of two sites"
    return f"knows site {cohort.first_site}"
