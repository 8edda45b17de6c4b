"""Train HAIL for one modality: autoencoder of all sites, then transfer between pairs of sites."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bids_harmony.errors import ScanError
from bids_harmony.methods.base import Training, Volume
from bids_harmony.methods.hail_losses import (
    Batch,
    Cubes,
    Weights,
    reconstruction,
    transfer,
    weighted,
)
from bids_harmony.methods.hail_volumes import Brain, brain_of, style_of
from bids_harmony.networks.hail import HailNetwork
from bids_harmony.training.fit import train_network, weights_key
from bids_harmony.training.patches import cut_cubes, pick
from bids_harmony.training.plan import Plan, Trained

LOG = logging.getLogger("bids_harmony")
_CHECKS = 4  # batches of the held-out score
_SILENT = 0.05  # of a tap's median deviation: least unit of a channel
_PHASE_ONE = 0.4  # of a limited time


@dataclass(frozen=True)
class Preset:
    """Sizes and lengths of a training.

    Attributes
    ----------
    resolution
        Voxel size of the grid in mm.
    widths
        Channels of the encoder's levels.
    patch, places, pairs
        Edge of the cubes in voxels, cubes of each pair of scans, and pairs of a step (even: each
        couple of scans is learned in both directions).
    window
        Edge of the cubes in voxels in which whole brains are worked on.
    radius, noise
        Of the guided transfer: half its cubes' edge in voxels, and what counts as flat.
    autoencoder, transfer
        How long to train each phase.
    """

    resolution: float
    widths: tuple[int, ...]
    patch: int
    places: int
    pairs: int
    window: int
    radius: int
    noise: float
    autoencoder: Plan
    transfer: Plan


@dataclass(frozen=True)
class Scan:
    """A training scan: image (0 outside the mask) and mask, and whose it is."""

    brain: Brain
    site: str
    subject: str
    volume: str
    spacing: tuple[float, float, float]


def scans_of(volumes: Sequence[Volume]) -> list[Scan]:
    """The volumes as tensors.

    Raises
    ------
    ScanError
        If a brain is unusable, or the grids differ.
    """
    scans = []
    for index in range(len(volumes)):
        volume = volumes[index]
        name = volume.name or "scan"
        label = volume.subject or name
        scans.append(Scan(brain_of(volume), volume.site, label, name, volume.spacing))
    if len({tuple(scan.brain[0].shape) for scan in scans}) != 1:
        raise ScanError("the training scans are on grids of different shapes; give all on one")
    return scans


def draw_cubes(scans: Sequence[Scan], count: int, side: int, generator: torch.Generator) -> Cubes:
    """Cubes of random scans for phase 1, every site as often as any other.

    Returns
    -------
    images, masks
        Shape (count, 1, side, side, side).
    """
    sites = sorted({scan.site for scan in scans})
    found = []
    for _ in range(count):
        site = sites[pick(len(sites), generator)]
        of_site = [scan for scan in scans if scan.site == site]
        brain = of_site[pick(len(of_site), generator)].brain
        found.append(cut_cubes([brain], side, 1, generator))
    images, masks = (torch.cat([cubes[k] for cubes in found]) for k in (0, 1))
    return images, masks


def draw_pairs(
    scans: Sequence[Scan],
    examples: Sequence[Scan],
    styles: Mapping[str, Tensor],
    preset: Preset,
    generator: torch.Generator,
) -> Batch:
    """Cubes at the same places of scans of two sites for phase 2, in both directions.

    Parameters
    ----------
    scans
        One of each couple; every site of theirs is drawn as often as any other.
    examples
        The other, of another site.
    styles
        Of the whole brains, by the scan's name.

    Raises
    ------
    ScanError
        If a drawn scan's site is the only one of `examples`.
    """
    parts: list[tuple[Tensor, ...]] = []
    while len(parts) < preset.pairs:
        first = _any_of(scans, generator)
        others = [scan for scan in examples if scan.site != first.site]
        if not others:
            raise ScanError(f"hail: no training scan is of another site than {first.site}")
        second = _any_of(others, generator)
        cubes = cut_cubes([first.brain, second.brain], preset.patch, preset.places, generator)
        (image, other), (mask, other_mask) = cubes
        own, wanted = styles[first.volume], styles[second.volume]
        parts.append((image, mask, other, other_mask, own, wanted))
        if len(parts) < preset.pairs:
            parts.append((other, other_mask, image, mask, wanted, own))
    x, m, t, n, own, wanted = (torch.stack(column) for column in zip(*parts, strict=True))
    return x, m, t, n, own, wanted


def _any_of(scans: Sequence[Scan], generator: torch.Generator) -> Scan:
    sites = sorted({scan.site for scan in scans})
    site = sites[pick(len(sites), generator)]
    of_site = [scan for scan in scans if scan.site == site]
    return of_site[pick(len(of_site), generator)]


def train_phases(
    scans: Sequence[Scan],
    held_out: Sequence[Scan],
    preset: Preset,
    seed: int,
    training: Training,
) -> tuple[HailNetwork, dict[str, Tensor], dict[str, Trained]]:
    """Both phases.

    Returns
    -------
    network, styles, runs
        In eval mode on the training's device; styles of all scans by name; how the trainings went.
    """
    torch.manual_seed(seed)
    network = HailNetwork(preset.widths)
    torch.nn.Module.to(network, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    runs = {"autoencoder": _train_autoencoder(network, scans, held_out, preset, seed, training)}
    network.encoder.requires_grad_(False)
    network.to(training.device)
    styles = {
        scan.volume: style_of(network, scan.brain, preset.window) for scan in (*scans, *held_out)
    }
    set_units(network, [styles[scan.volume] for scan in scans])
    runs["transfer"] = _train_transfer(network, scans, held_out, styles, preset, seed, training)
    network.to(training.device).eval().requires_grad_(False)
    return network, styles, runs


def set_units(network: HailNetwork, styles: Sequence[Tensor]) -> None:
    """Set the channels' usual deviations from the training brains' styles (S,).

    The least is a twentieth of the tap's median: a channel that is nearly silent must not count
    as much as the others.
    """
    _, deviations, _ = network.split(torch.stack(list(styles)))
    parts = [
        part.clamp(min=max(_SILENT * float(part.median()), 1e-3))
        for part in deviations.mean(0).split(list(network.widths))
    ]
    network.usual.copy_(torch.cat(parts))


def _train_autoencoder(
    network: HailNetwork,
    scans: Sequence[Scan],
    held_out: Sequence[Scan],
    preset: Preset,
    seed: int,
    training: Training,
) -> Trained:
    count = preset.pairs * preset.places
    source = torch.Generator().manual_seed(seed + 7)
    checks = [draw_cubes(held_out, count, preset.patch, source) for _ in range(_CHECKS)]

    def score() -> float:
        device = next(network.parameters()).device
        found = [reconstruction(network, (x.to(device), m.to(device))) for x, m in checks]
        return float(torch.stack(found).mean())

    return train_network(
        network,
        name="autoencoder",
        draw=lambda generator: draw_cubes(scans, count, preset.patch, generator),
        loss=lambda batch, generator: reconstruction(network, batch),
        held_out=score,
        plan=preset.autoencoder.with_limit(training.minutes(_PHASE_ONE)),
        seed=seed,
        device=training.device,
        folder=training.below("autoencoder"),
    )


def _train_transfer(
    network: HailNetwork,
    scans: Sequence[Scan],
    held_out: Sequence[Scan],
    styles: Mapping[str, Tensor],
    preset: Preset,
    seed: int,
    training: Training,
) -> Trained:
    """The decoder alone; held-out scans go towards training scans of other sites."""
    weights = replace(Weights(), **training.options)

    def loss(batch: Any, generator: torch.Generator | None = None) -> Tensor:
        return weighted(
            transfer(network, batch, radius=preset.radius, noise=preset.noise), weights
        )

    source = torch.Generator().manual_seed(seed + 7)
    sites = {scan.site for scan in scans}
    usable = [scan for scan in held_out if sites - {scan.site}]
    checks = [draw_pairs(usable, scans, styles, preset, source) for _ in range(_CHECKS)]

    def score() -> float:
        device = next(network.parameters()).device
        found = [loss([part.to(device) for part in batch]) for batch in checks]
        return float(torch.stack(found).mean())

    return train_network(
        network,
        name="transfer",
        draw=lambda generator: draw_pairs(scans, scans, styles, preset, generator),
        loss=loss,
        held_out=score,
        plan=preset.transfer.with_limit(training.minutes(1 - _PHASE_ONE)),
        seed=seed + 1,
        device=training.device,
        folder=training.below(f"transfer-{weights_key(network)}"),
    )
