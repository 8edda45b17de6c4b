"""Slices and losses for the learned comparators: paired, cycle-consistent, by style."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bids_harmony.networks.translation import CycleNetworks, SliceTranslator, StyleNetworks
from bids_harmony.training.contrasts import full_slices
from bids_harmony.training.patches import pick
from bids_harmony.training.slice_losses import edge_difference, masked_l1
from bids_harmony.training.slices import on_canvas

# A tenth of the paper's: with those no translator left the identity, sites differ too little.
_CYCLE, _IDENTITY = 1.0, 0.5
_EDGES = 0.5
_STYLE, _DIVERSITY, _STYLE_CYCLE = 1.0, 0.2, 1.0
_QUANTILES = 17


@dataclass(frozen=True)
class SiteBrain:
    """A training brain: image (0 outside the mask) and mask (bool), (X, Y, Z), and whose it is.

    `wanted` tells the reference's brains.
    """

    image: Tensor
    mask: Tensor
    site: str
    subject: str
    name: str
    wanted: bool


class SlicePair(NamedTuple):
    """Slices (B, 1, s, s) of the input and of what is wanted, with their masks.

    For paired training they show one place of one person; else two people's slices across the
    same axis. `wanted_site` (B,) is the number of the wanted slice's site in the order of names, 0
    where one site is wanted.
    """

    input: Tensor
    input_mask: Tensor
    wanted: Tensor
    wanted_mask: Tensor
    wanted_site: Tensor


class PairedSlices:
    """Draws the same slices of two scans of a person.

    Parameters
    ----------
    pairs
        Input, and the wanted brain on its grid.
    side, count
        Of the canvas, and slices of a batch.
    """

    def __init__(
        self, pairs: Sequence[tuple[SiteBrain, SiteBrain]], *, side: int, count: int
    ) -> None:
        self._side, self._count = side, count
        self._masks = [a.mask & b.mask for a, b in pairs]
        self._images = [
            [brain.image * mask for brain in pair]
            for pair, mask in zip(pairs, self._masks, strict=True)
        ]
        self._full = [[full_slices(mask, k) for k in range(3)] for mask in self._masks]

    def __call__(self, generator: torch.Generator) -> SlicePair:
        rows = []
        for _ in range(self._count):
            index, axis = pick(len(self._masks), generator), pick(3, generator)
            usable = self._full[index][axis]
            place, mirrored = usable[pick(len(usable), generator)], pick(2, generator)
            common = _slice(self._masks[index], axis, place)
            parts = []
            for image in self._images[index]:
                parts += [_slice(image, axis, place), common]
            placed = _placed(parts, self._side, bool(mirrored) and axis != 0)
            rows.append([*placed, torch.tensor(0)])
        return SlicePair(*(torch.stack(part) for part in zip(*rows, strict=True)))


class UnpairedSlices:
    """Draws slices of two people across one axis.

    Parameters
    ----------
    brains, others
        Of the inputs, and of what is wanted; every site of each as often as any other.
    side, count
        Of the canvas, and slices of a batch.
    """

    def __init__(
        self,
        brains: Sequence[SiteBrain],
        others: Sequence[SiteBrain],
        *,
        side: int,
        count: int,
    ) -> None:
        self._groups = [_by_site(brains), _by_site(others)]
        self._side, self._count = side, count
        self._full = {
            b.name: [full_slices(b.mask, k) for k in range(3)] for b in (*brains, *others)
        }

    def __call__(self, generator: torch.Generator) -> SlicePair:
        rows = []
        for _ in range(self._count):
            axis, mirrored = pick(3, generator), pick(2, generator)
            parts, number = [], 0
            for by_site in self._groups:  # the wanted one is the last
                number = pick(len(by_site), generator)
                of_site = by_site[number]
                brain = of_site[pick(len(of_site), generator)]
                usable = self._full[brain.name][axis]
                place = usable[pick(len(usable), generator)]
                parts += [_slice(brain.image, axis, place), _slice(brain.mask, axis, place)]
            placed = _placed(parts, self._side, bool(mirrored) and axis != 0)
            rows.append([*placed, torch.tensor(number)])
        return SlicePair(*(torch.stack(part) for part in zip(*rows, strict=True)))


def fixed_slices(
    draw: Callable[[torch.Generator], SlicePair], count: int, seed: int
) -> list[SlicePair]:
    """Batches for a held-out score: the same for the same seed, others than of the training."""
    source = torch.Generator().manual_seed(seed + 7)
    return [draw(source) for _ in range(count)]


def joined(batches: Sequence[SlicePair]) -> SlicePair:
    """All slices of some batches as one."""
    return SlicePair(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def _by_site(brains: Sequence[SiteBrain]) -> list[list[SiteBrain]]:
    return [[b for b in brains if b.site == site] for site in sorted({b.site for b in brains})]


def _slice(volume: Tensor, axis: int, place: int) -> Tensor:
    return volume.movedim(axis, 0)[place][None].float()


def _placed(parts: Sequence[Tensor], side: int, mirrored: bool) -> list[Tensor]:
    return [on_canvas(p.flip(1) if mirrored else p, side, side) for p in parts]


def paired_loss(network: SliceTranslator, batch: SlicePair) -> Tensor:
    """L1 to the other scan of the same person (DeepHarmony), and to its edges."""
    drawn = network(batch.input, batch.input_mask)
    return masked_l1(drawn, batch.wanted, batch.input_mask) + _EDGES * edge_difference(
        drawn, batch.wanted
    )


def patch_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of what a discriminator says of patches (B, 1, h, w), each by its share of brain.

    Patches without any look the same at every site and only slow the discriminator down.
    """
    weights = functional.adaptive_avg_pool2d(mask, (values.shape[2], values.shape[3]))
    return (values * weights).sum() / weights.sum().clamp(min=1e-6)


def cycle_loss(networks: CycleNetworks, batch: SlicePair) -> Tensor:
    """Least-squares GAN losses of both translators, cycle (1) and identity (0.5) losses."""
    x, x_mask, y, y_mask, _ = batch
    to_y, to_x = networks.to_reference(x, x_mask), networks.to_other(y, y_mask)
    judge_y, judge_x = networks.judges
    fooled = patch_mean((judge_y(to_y) - 1).square(), x_mask)
    fooled = fooled + patch_mean((judge_x(to_x) - 1).square(), y_mask)
    back_x, back_y = networks.to_other(to_y, x_mask), networks.to_reference(to_x, y_mask)
    cycle = masked_l1(back_x, x, x_mask) + masked_l1(back_y, y, y_mask)
    same = masked_l1(networks.to_reference(y, y_mask), y, y_mask)
    same = same + masked_l1(networks.to_other(x, x_mask), x, x_mask)
    return fooled + _CYCLE * cycle + _IDENTITY * same


def cycle_judge_loss(networks: CycleNetworks, batch: SlicePair) -> Tensor:
    """Least-squares GAN losses of both discriminators."""
    x, x_mask, y, y_mask, _ = batch
    with torch.no_grad():
        to_y, to_x = networks.to_reference(x, x_mask), networks.to_other(y, y_mask)
    judge_y, judge_x = networks.judges
    real = patch_mean((judge_y(y) - 1).square(), y_mask)
    real = real + patch_mean((judge_x(x) - 1).square(), x_mask)
    drawn = patch_mean(judge_y(to_y).square(), x_mask)
    return 0.5 * (real + drawn + patch_mean(judge_x(to_x).square(), y_mask))


def style_loss(networks: StyleNetworks, batch: SlicePair) -> Tensor:
    """Adversarial, style, cycle and diversity losses of StarGAN v2, styles from slices alone.

    The second style of the diversity loss is the next slice's of the batch. Beside the way there
    and back the slice in its own style shall be the slice.
    """
    x, mask, y, _, site = batch
    style = networks.encoder(y)
    drawn = networks.draw(x, style, mask)
    fooled = patch_mean(functional.softplus(-_taken_for(networks, drawn, site)), mask)
    told = (networks.encoder(drawn) - style).abs().mean()
    other = networks.draw(x, style.roll(1, 0), mask).detach()
    diverse = masked_l1(drawn, other, mask)
    back = networks.draw(drawn, networks.encoder(x), mask)
    same = networks.draw(x, networks.encoder(x), mask)
    cycle = masked_l1(back, x, mask) + masked_l1(same, x, mask)
    return fooled + _STYLE * told - _DIVERSITY * diverse + _STYLE_CYCLE * cycle


def style_judge_loss(networks: StyleNetworks, batch: SlicePair) -> Tensor:
    """Logistic loss of the discriminator: slices of the wanted site, and those drawn like them."""
    x, mask, y, y_mask, site = batch
    with torch.no_grad():
        drawn = networks.draw(x, networks.encoder(y), mask)
    real = patch_mean(functional.softplus(-_taken_for(networks, y, site)), y_mask)
    return real + patch_mean(functional.softplus(_taken_for(networks, drawn, site)), mask)


def _taken_for(networks: StyleNetworks, x: Tensor, site: Tensor) -> Tensor:
    """What the discriminator says to slices as those of sites (B,), (B, 1, h, w)."""
    found = networks.judge(x)
    return found[torch.arange(len(found), device=found.device), site][:, None]


def intensity_distance(first: Tensor, mask: Tensor, second: Tensor, other_mask: Tensor) -> float:
    """Mean distance of the quantiles of the brain pixels of two sets of slices."""
    at = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
    a, b = (
        torch.quantile(_some(image[inside > 0]).double(), at)
        for image, inside in ((first.cpu(), mask.cpu()), (second.cpu(), other_mask.cpu()))
    )
    return float((a - b).abs().mean())


def _some(values: Tensor) -> Tensor:
    """At most a million of them, evenly: more than `torch.quantile` takes is not needed."""
    return values[:: max(1, -(-len(values) // 1_000_000))]
