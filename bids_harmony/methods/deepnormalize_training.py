"""Train deepNormalize: brains with labels, networks, and what held-out brains look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bids_harmony.errors import ScanError
from bids_harmony.imaging.quantiles import brain_values
from bids_harmony.methods.base import Training, Volume
from bids_harmony.methods.held_out import held_out_subjects
from bids_harmony.networks.deepnormalize import NormalizerNetworks
from bids_harmony.training.common_appearance import CommonAppearance
from bids_harmony.training.fit import train_network
from bids_harmony.training.normalizer_losses import (
    discriminator_loss,
    divergence,
    histograms,
    normalizer_loss,
    segmentation_loss,
)
from bids_harmony.training.plan import Adversary, Plan, Trained
from bids_harmony.training.tissue_cubes import LabelledBrain, TissueBatch, TissueDrawer

_CHECKED = 96  # cubes of the held-out score
_ALIKE = 0.1  # weight of the divergence between sites in it, for each unit of lambda
_AT_ONCE = 8
_MEAN, _SPREAD = 0.6, 0.2  # of a standardized brain
_LEAST_LABELLED = 0.5  # of the brain
_LEAST_OVERLAP = 0.5  # of a session's brain masks


@dataclass(frozen=True)
class Preset:
    """Sizes and lengths of a training.

    Attributes
    ----------
    resolution
        Voxel size of the grid in mm.
    widths
        Channels of the U-Nets' levels.
    side, batch
        Edge of the cubes in voxels, and cubes of a step.
    plan
        How long to train.
    judge_steps, judge_rate
        Of the discriminator: steps before each of the others', and learning rate.
    """

    resolution: float
    widths: tuple[int, ...]
    side: int
    batch: int
    plan: Plan
    judge_steps: int = 3
    judge_rate: float = 1e-4


def labelled_brain(volumes: Sequence[Volume]) -> LabelledBrain:
    """Training brain from the volumes of one session, one of each modality, in this order.

    The labels are those of the first volume that has any.

    Raises
    ------
    ScanError
        If a brain is unusable, has no labels or few, or the masks have less than half in common.
    """
    first = volumes[0]
    name = first.name or "scan"
    known = next((v.labels for v in volumes if v.labels is not None), None)
    if known is None:
        raise ScanError(f"{name}: it has no tissue labels; name derivatives with labels (-d)")
    images, mask = stacked(volumes)
    labels = torch.from_numpy(np.where(mask.numpy(), known, 0).astype(np.uint8))
    if float((labels[mask] > 0).float().mean()) < _LEAST_LABELLED:
        raise ScanError(
            f"{name}: less than half of the brain mask has a tissue label; are the labels those "
            "of this scan?"
        )
    box = box_of(mask)
    return LabelledBrain(
        images[(slice(None), *box)].clone(), mask[box].clone(), labels[box].clone(),
        first.site, first.subject or name, name,
    )  # fmt: skip


def standardized(volume: Volume) -> Volume:
    """A volume whose brain has mean 0.6 and standard deviation 0.2, not below 0.

    Raises
    ------
    ScanError
        If the mask is empty, or the brain constant or not finite.
    """
    mask = np.asarray(volume.mask, dtype=bool)
    values = brain_values(volume.data, mask, volume.name or "scan")
    data = _MEAN + _SPREAD * (volume.data - values.mean()) / values.std()
    return replace(volume, data=np.where(mask, np.maximum(data, 0), 0).astype(np.float32))


def stacked(volumes: Sequence[Volume]) -> tuple[Tensor, Tensor]:
    """Images (C, X, Y, Z), 0 outside the mask, and the brain that all masks have in common.

    Raises
    ------
    ScanError
        If a brain is unusable, the grids differ, or the masks have less than half in common.
    """
    name = volumes[0].name or "scan"
    if len({v.data.shape for v in volumes}) > 1:
        raise ScanError(f"{name}: the scans of its session must be on one grid")
    masks = [np.asarray(v.mask, dtype=bool) for v in volumes]
    for volume, mask in zip(volumes, masks, strict=True):
        brain_values(volume.data, mask, volume.name or "scan")
    common = np.logical_and.reduce(masks)
    if common.sum() < _LEAST_OVERLAP * max(int(mask.sum()) for mask in masks):
        raise ScanError(
            f"{name}: the brain masks of its session have less than half in common; check masks "
            "and registration"
        )
    images = np.stack([np.where(common, v.data, 0) for v in volumes]).astype(np.float32)
    return torch.from_numpy(images), torch.from_numpy(common)


def box_of(mask: Tensor) -> tuple[slice, slice, slice]:
    """Smallest box around a mask (X, Y, Z) that is not empty."""
    ends = []
    for axis in range(3):
        inside = torch.nonzero(mask.movedim(axis, 0).flatten(1).any(1))
        ends.append(slice(int(inside.min()), int(inside.max()) + 1))
    return ends[0], ends[1], ends[2]


def split(brains: Sequence[LabelledBrain]) -> tuple[list[LabelledBrain], list[LabelledBrain]]:
    """Brains to learn from, and those of held-out subjects; ScanError as `held_out_subjects`."""
    apart = held_out_subjects([(brain.site, brain.subject) for brain in brains])
    learn = [brain for brain in brains if brain.subject not in apart]
    return learn, [brain for brain in brains if brain.subject in apart]


def train_normalizer(
    learn: Sequence[LabelledBrain],
    apart: Sequence[LabelledBrain],
    preset: Preset,
    strength: float,
    seed: int,
    training: Training,
    *,
    appearance: CommonAppearance | None = None,
    generator: bool = True,
) -> tuple[NormalizerNetworks, Trained]:
    """Train generator, segmenter and, with an `appearance` to come to, discriminator.

    `strength` (lambda) weighs both against the segmentation.

    Algorithm 1 of the paper, with one change in time: all rates fall along half a cosine. The
    generator begins as the identity, so that no warm-up as an autoencoder is needed.

    Returns
    -------
    networks, run
        In eval mode on the training's device, and how the training went.
    """
    torch.manual_seed(seed)  # of the first weights
    sites = sorted({brain.site for brain in learn})
    networks = NormalizerNetworks(
        learn[0].images.shape[0], len(sites), preset.widths, preset.side,
        appearance is not None, generator,
    )  # fmt: skip
    torch.nn.Module.to(networks, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    run = train_network(
        networks,
        name="normalizer",
        draw=TissueDrawer(learn, sites, side=preset.side, count=preset.batch),
        loss=lambda batch, generator: normalizer_loss(networks, batch, strength, appearance),
        held_out=held_out_score(networks, apart, sites, strength, seed),
        plan=preset.plan.with_limit(training.minutes(1.0)),
        seed=seed,
        device=training.device,
        folder=training.below("normalizer"),
        adversary=_adversary(networks, preset),
    )
    networks.to(training.device).eval().requires_grad_(False)
    return networks, run


def _adversary(networks: NormalizerNetworks, preset: Preset) -> Adversary | None:
    if networks.discriminator is None:
        return None
    return Adversary(
        networks.discriminator,
        lambda batch, generator: discriminator_loss(networks, batch),
        preset.judge_steps,
        preset.judge_rate,
    )


def _fixed_batches(
    side: int, brains: Sequence[LabelledBrain], sites: Sequence[str], seed: int
) -> list[TissueBatch]:
    """Cubes for scores: the same for the same seed."""
    drawer = TissueDrawer(brains, sites, side=side, count=_AT_ONCE)
    source = torch.Generator().manual_seed(seed)
    return [drawer(source) for _ in range(_CHECKED // _AT_ONCE)]


def held_out_score(
    networks: NormalizerNetworks,
    brains: Sequence[LabelledBrain],
    sites: Sequence[str],
    strength: float,
    seed: int,
) -> Callable[[], float]:
    """Segmentation loss on fixed held-out cubes, plus how far normalized sites differ.

    The latter is the Jensen-Shannon divergence (bits) of their intensities, times a tenth of
    lambda: the discriminator's own loss changes with the discriminator.
    """
    batches = _fixed_batches(networks.side, brains, sites, seed + 7)

    def score() -> float:
        device = next(networks.parameters()).device
        losses, counts = [], torch.zeros(())
        for batch in batches:
            here = TissueBatch(*(part.to(device) for part in batch))
            drawn = networks.normalize(here.shown, here.mask)
            losses.append(segmentation_loss(networks.segment(drawn), here.labels))
            counts = counts + histograms(drawn, here.mask, here.sites, len(sites)).cpu()
        return float(torch.stack(losses).mean()) + _ALIKE * strength * divergence(counts)

    return score


@torch.no_grad()
def discriminator_scores(
    networks: NormalizerNetworks, brains: Sequence[LabelledBrain], sites: Sequence[str], seed: int
) -> dict[str, Any]:
    """What the discriminator takes real and normalized cubes for (paper, table 7 and figure 9).

    Returns
    -------
    ``accuracy``: share of cubes, real and normalized ones as often, whose class it knows;
    ``normalized_taken_for``: share of normalized cubes that it takes for each site's or for
    normalized. Empty without a discriminator.
    """
    judge = networks.discriminator
    if judge is None:
        return {}
    device = next(networks.parameters()).device
    right, total, taken = 0, 0, torch.zeros(len(sites) + 1)
    for drawn_batch in _fixed_batches(networks.side, brains, sites, seed + 8):
        batch = TissueBatch(*(part.to(device) for part in drawn_batch))
        real = judge(batch.clean).argmax(1)
        drawn = judge(networks.normalize(batch.shown, batch.mask)).argmax(1)
        right += int((real == batch.sites).sum() + (drawn == len(sites)).sum())
        total += len(real) + len(drawn)
        taken += torch.bincount(drawn.cpu(), minlength=len(sites) + 1)
    shares = (taken / taken.sum()).tolist()
    return {
        "accuracy": round(right / total, 4),
        "normalized_taken_for": {
            name: round(share, 4)
            for name, share in zip((*sites, "normalized"), shares, strict=True)
        },
    }
