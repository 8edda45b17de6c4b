"""Training of CALAMITI: the slice networks, the fusion of three orientations, a new site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bids_harmony.imaging.layout import Coarse, Layout
from bids_harmony.methods.base import Training, Volume
from bids_harmony.methods.calamiti_admission import Known
from bids_harmony.methods.calamiti_data import Cohort, paired_sessions, split_sessions
from bids_harmony.methods.calamiti_drawing import (
    draw_brain,
    drawing_error,
    fused,
    side_for,
    theta_of_brain,
)
from bids_harmony.methods.calamiti_files import ThetaRow
from bids_harmony.methods.calamiti_fusion import LEARNED, train_fusion
from bids_harmony.methods.calamiti_learned import Learned, Preset, spread
from bids_harmony.methods.training_files import run_facts
from bids_harmony.networks.calamiti import BETAS, CalamitiNetworks, FusionNetwork
from bids_harmony.training.calamiti_losses import adaptation_loss, calamiti_loss, pair_error
from bids_harmony.training.classes import joint_classes
from bids_harmony.training.contrasts import PairBatch, PairDrawer, Session
from bids_harmony.training.fit import train_network
from bids_harmony.training.slices import canvas_size

_CHECKED = 32  # pairs of the held-out score
_AT_ONCE = 4
_LEAST_SIDE = 16  # of the theta encoder


def train_calamiti(
    cohort: Cohort,
    preset: Preset,
    *,
    seed: int,
    training: Training,
    discriminator: bool,
    same_slice: bool,
    tones: bool,
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
    tones
        Show each volume in random tones too.
    """
    first = cohort.first_site if discriminator else None
    torch.manual_seed(seed)  # of the first weights
    networks = CalamitiNetworks(**preset.networks, discriminator=first is not None)
    shapes = [tuple(s.mask.shape) for s in (*cohort.learn, *cohort.held_out)]
    side = max(
        canvas_size(shapes, (0, 1, 2), networks.divisor),
        -(-_LEAST_SIDE // networks.divisor) * networks.divisor,
    )
    classes = joint_classes(cohort.learn, BETAS)
    drawer = PairDrawer(
        cohort.learn, side=side, count=preset.batch, first=first, same_slice=same_slice,
        tones=tones, classes=classes,
    )  # fmt: skip
    runs = {
        "networks": train_network(
            networks,
            name="networks",
            draw=drawer,
            loss=partial(calamiti_loss, networks, start=preset.start),
            held_out=held_out_score(networks, cohort.held_out, side, seed, tones),
            plan=preset.plan.with_limit(training.minutes(0.8)),
            seed=seed,
            device=training.device,
            folder=training.below("networks"),
        )
    }
    networks.requires_grad_(False).to(training.device)
    fusion, run, fusion_scores = train_fusion(networks, cohort, side, preset, seed, training)
    runs["fusion"] = run
    thetas = theta_rows(networks, (*cohort.learn, *cohort.held_out), side)
    known = _known(networks, fusion, cohort, side, thetas)
    scores = {
        "held_out_error": round(runs["networks"].best, 5),
        "fusion": fusion_scores,
        "drawing_error": {m: round(k.error, 4) for m, k in known.items()},
        "discriminator": _discriminator_words(cohort, discriminator),
        "sessions": len(cohort.learn),
        "sessions_with_classes": sum(bool(found.any()) for found in classes),
        "held_out_sessions": len(cohort.held_out),
        "left_out": list(cohort.left_out),
        "networks": {name: run_facts(run) for name, run in runs.items()},
    }
    networks.cpu()
    return Learned(networks, fusion, side, known, tuple(thetas), runs, scores)


def held_out_score(
    networks: CalamitiNetworks, sessions: Sequence[Session], side: int, seed: int, tones: bool
) -> Callable[[], float]:
    """`pair_error` of fixed held-out pairs, theta always from another slice."""
    drawer = PairDrawer(sessions, side=side, count=_AT_ONCE, first=None, tones=tones)
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
            for part in (held_out, spread(learn, LEARNED))
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


def adapt_learned(
    learned: Learned,
    volumes: Sequence[Volume],
    preset: Preset,
    *,
    seed: int,
    training: Training,
    same_slice: bool,
    tones: bool,
) -> Learned:
    """What was learned, adapted to a new site: the last layers of both encoders (paper, 2.4).

    Decoder, discriminator and fusion stay as they are; the discriminator goes on asking for
    betas like the first site's. The new scans' thetas join those of the training scans. Where
    the held-out error does not fall, the encoders stay as they were.

    Raises
    ------
    ScanError
        If a scan cannot be used, or no session has two modalities.
    """
    sessions, left_out = paired_sessions(volumes, preset.resolution)
    alone = len({s.subject for s in sessions}) < 2
    learn, held_out = (sessions, sessions) if alone else split_sessions(sessions)
    divisor = learned.networks.divisor
    side = max(side_for(s.mask.shape, learned.side, divisor) for s in sessions)
    networks = deepcopy(learned.networks).cpu().requires_grad_(False)
    for layer in networks.last_layers():
        layer.requires_grad_(True)
    score = held_out_score(networks, held_out, side, seed, tones)
    with torch.no_grad():
        before = score()
    run = train_network(
        networks,
        name="adaptation",
        draw=PairDrawer(
            learn, side=side, count=preset.batch, first=None, same_slice=same_slice, tones=tones
        ),
        loss=partial(adaptation_loss, networks),
        held_out=score,
        plan=preset.adaptation_plan.with_limit(training.max_minutes),
        seed=seed,
        device=training.device,
        folder=training.below("adaptation"),
    )
    helped = run.best < before
    networks = networks if helped else deepcopy(learned.networks).cpu()
    networks.requires_grad_(False).eval()
    rows = theta_rows(networks, sessions, side)
    known = {}
    for modality, of in learned.known.items():
        new = [(r.theta1, r.theta2) for r in rows if r.modality == modality]
        known[modality] = replace(of, thetas=np.array([*of.thetas.tolist(), *new]))
    facts = {
        **run_facts(run),
        "best_held_out_before": round(before, 5),
        "kept": "adapted encoders" if helped else "encoders as they were: the error did not fall",
        "sites": sorted({s.site for s in sessions}),
        "held_out_is_learned": alone,
        "left_out": left_out,
    }
    scores = {**learned.scores, "adaptation": facts}
    return replace(
        learned, networks=networks, fusion=deepcopy(learned.fusion), known=known, scores=scores,
        runs={"adaptation": run},
    )  # fmt: skip


def _discriminator_words(cohort: Cohort, wanted: bool) -> str:
    if not wanted:
        return "none: this method has no discriminator"
    if cohort.first_site is None:
        return "left out: it needs the paired scans of two sites"
    return f"knows site {cohort.first_site}"
