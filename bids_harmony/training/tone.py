"""Teach a `ToneNetwork` on parts of reference brains made to look foreign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import monotonic

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from bids_harmony.networks.tone import KNOTS, TOP, ToneNetwork, joint_histogram, knots_of
from bids_harmony.training.degrade import (
    apply_knots,
    increasing_map,
    smooth_field,
    soften,
    uniform,
)

_STEEPNESS = 0.03  # weight of differences between neighbouring knots' errors
_BATCH = 64
_JITTER = 0.1  # of the features' spread


@dataclass(frozen=True)
class Quantiles:
    """Mean quantiles of the reference domain at `probabilities`, and the mapping to them."""

    values: Tensor

    def own(self, brain: Tensor) -> Tensor:
        """Intensities of a brain, (N,), at the same probabilities, (n,); ties are possible."""
        place = probabilities(len(self.values)) * (len(brain) - 1)
        return brain.sort().values[place.round().long()]

    def map_of(self, brain: Tensor) -> Tensor:
        """The same as knots of the brain's map: strictly increasing."""
        own = self.own(brain)
        step = torch.clamp(1e-6 * own.abs().max(), min=1e-6)
        return own + torch.arange(len(own)) * step

    def apply(self, values: Tensor, own: Tensor) -> Tensor:
        """Map intensities, (N,), by the knots from `map_of`; the end segments go on."""
        last = len(own) - 1
        upper = torch.searchsorted(own, values.contiguous()).clamp(1, last)
        part = (values - own[upper - 1]) / (own[upper] - own[upper - 1])
        low, high = self.values[upper - 1], self.values[upper]
        return (low + part.clamp(-2, 3) * (high - low)).clamp(min=0)


def probabilities(count: int) -> Tensor:
    """Where quantiles are taken, (count,): even, inside 0..1.

    The outermost are those of one voxel in five hundred. Closer to the ends subjects differ too
    much: cross-validated on reference brains, quantiles dense in the tails were worse.
    """
    return (torch.arange(count) + 0.5) / count


def mean_quantiles(brains: Sequence[tuple[Tensor, Tensor]], count: int = 256) -> Quantiles:
    """Mean over brains (image, mask) of their quantiles."""
    empty = Quantiles(torch.zeros(count))
    return Quantiles(torch.stack([empty.own(image[mask]) for image, mask in brains]).mean(0))


@dataclass(frozen=True)
class ToneSamples:
    """Parts of reference brains made to look foreign.

    Attributes
    ----------
    features, targets, weights
        As `foreign_part` gives them, (N, ...) each.
    brains
        Number of the brain that each was made of, (N,).
    """

    features: Tensor
    targets: Tensor
    weights: Tensor
    brains: Tensor

    def without(self, brains: Sequence[int]) -> ToneSamples:
        """Those of other brains."""
        keep = ~torch.isin(self.brains, torch.tensor(list(brains), dtype=torch.long))
        return ToneSamples(
            self.features[keep], self.targets[keep], self.weights[keep], self.brains[keep]
        )

    def towards(self, old: Quantiles, new: Quantiles) -> ToneSamples:
        """As if they had been mapped to `new` quantiles, which are near the `old` ones.

        What the mapping adds, the correction need not, and what it moves is corrected where it
        comes to lie; features are kept.
        """
        knots = torch.linspace(0, TOP, KNOTS).double()
        ends = new.values.double().numpy()
        came_from = knots - torch.from_numpy(np.interp(knots, ends, ends - old.values.numpy()))
        low, part = knots_of(came_from)
        there = self.targets[:, low] + part * (self.targets[:, low + 1] - self.targets[:, low])
        return replace(self, targets=(there + came_from - knots).float())


def tone_samples(
    brains: Sequence[tuple[Tensor, Tensor]],
    quantiles: Quantiles,
    *,
    count: int,
    seed: int,
    minutes: float | None = None,
) -> ToneSamples:
    """Up to `count` samples, from the brains in turn; fewer when time runs out, one of each."""
    generator = torch.Generator().manual_seed(seed)
    start, rows = monotonic(), []
    for index in range(max(count, len(brains))):
        late = minutes is not None and monotonic() - start > 60 * minutes
        if late and index >= len(brains):
            break
        image, mask = brains[index % len(brains)]
        rows.append(foreign_part(image, mask, quantiles, generator))
    features, targets, weights = (torch.stack(part) for part in zip(*rows, strict=True))
    return ToneSamples(features, targets, weights, torch.arange(len(rows)) % len(brains))


def tone_errors(
    network: ToneNetwork,
    brains: Sequence[tuple[Tensor, Tensor]],
    quantiles: Quantiles,
    *,
    count: int,
    seed: int,
    minutes: float | None = None,
) -> dict[str, float]:
    """Root mean square tone error of parts of held-out brains before and after correction."""
    checks = tone_samples(brains, quantiles, count=count, seed=seed, minutes=minutes)
    with torch.no_grad():
        rest = checks.targets - network(checks.features)

    def rms(error: Tensor) -> float:
        return float((checks.weights * error.square()).sum(1).mean().sqrt())

    return {"before": rms(checks.targets), "after": rms(rest)}


def foreign_part(
    image: Tensor, mask: Tensor, quantiles: Quantiles, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """One training sample: features, wanted correction at the knots, and weight of each knot.

    A random box of the brain stands for another subject: its tissue fractions differ. It gets a
    mask of other make, a foreign contrast, noise and bias field, and its quantiles are mapped to
    the reference domain's.
    What is wanted is the mean difference between the true intensity and the one that the mapping
    gives without noise and bias field, at each knot.
    """
    image, mask = _part(image, mask, generator)
    mask = _other_make(mask, generator)
    clean = image
    if uniform(0, 1, generator) < 0.3:
        clean = apply_knots(clean[None], increasing_map(4, 0.35, generator)[None], 1.0)[0]
        clean = clean + (image - 1).clamp(min=0)
    pedestal = uniform(0, 0.5, generator) * (uniform(0, 1, generator) < 0.5)
    clean = pedestal + (1 - pedestal) * clean
    cells = int(torch.randint(3, 6, (), generator=generator))
    field = smooth_field(image.shape, cells, generator) * uniform(0, 0.08, generator)
    noise = torch.randn(image.shape, generator=generator)
    noise = noise * uniform(0, 1, generator) ** 1.5 * 0.11 * (1 - pedestal)
    seen = clean * field.exp() + noise
    if uniform(0, 1, generator) < 0.3:
        seen = soften(seen[None], uniform(0, 0.5, generator, (1,)))[0]
    own = quantiles.map_of(seen[mask])
    mapped = torch.zeros_like(image)
    mapped[mask] = quantiles.apply(seen[mask], own)
    intended = quantiles.apply(clean[mask], own)
    low, part = knots_of(intended)
    error = image[mask] - intended
    weight, total = torch.zeros(KNOTS), torch.zeros(KNOTS)
    for index, share in ((low, 1 - part), (low + 1, part)):
        weight.index_add_(0, index, share)
        total.index_add_(0, index, share * error)
    return joint_histogram(mapped, mask), total / weight.clamp(min=1), weight / weight.sum()


def _part(image: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random box of a brain, stretched and bent at random in half of the cases."""
    if uniform(0, 1, generator) < 0.85:
        for axis, size in enumerate(image.shape):
            wide = max(int(size * uniform(0.55, 1, generator)), 8)
            start = int(torch.randint(size - wide + 1, (), generator=generator))
            box = (image.narrow(axis, start, wide), mask.narrow(axis, start, wide))
            if box[1].sum() > 1000:
                image, mask = box
    if uniform(0, 1, generator) < 0.5:
        return image, mask
    stretch = torch.diag(1 / uniform(0.85, 1.15, generator, (3,)))
    affine = torch.cat((stretch, torch.zeros(3, 1)), dim=1)[None]
    grid = functional.affine_grid(affine, [1, 1, *image.shape], align_corners=False)
    cells = int(torch.randint(4, 11, (), generator=generator))
    bend = torch.randn((1, 3, cells, cells, cells), generator=generator)
    bend = bend * uniform(0, 0.25, generator) / cells
    bend = functional.interpolate(bend, image.shape, mode="trilinear", align_corners=True)
    grid = grid + bend.permute(0, 2, 3, 4, 1)

    def moved(values: Tensor) -> Tensor:
        return functional.grid_sample(values[None, None], grid, align_corners=False)[0, 0]

    bent = moved(mask.float()) > 0.5
    return (moved(image) * bent, bent) if bent.sum() > 1000 else (image, mask)


def _other_make(mask: Tensor, generator: torch.Generator) -> Tensor:
    """A brain mask, in half of the cases one voxel tighter on a random part of the brain."""
    if uniform(0, 1, generator) < 0.5:
        return mask
    cut = smooth_field(mask.shape, 4, generator) < uniform(-1, 1, generator)
    tight = torch.from_numpy(ndimage.binary_erosion(mask.numpy())) | (mask & ~cut)
    return tight if tight.sum() > 1000 else mask


def train_tone(samples: ToneSamples, *, epochs: int, seed: int) -> ToneNetwork:
    """Train on samples; the network is in eval mode.

    No dropout, and little noise: cross-validated on reference brains, more made it worse.
    """
    features, targets, weights = samples.features, samples.targets, samples.weights
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the first weights
        network = ToneNetwork()
    network.standardize(features)
    rate = 2e-3
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.02)
    network.train()
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.5 + 0.5 * math.cos(math.pi * epoch / epochs))
        for rows in torch.randperm(len(features), generator=generator).split(_BATCH):
            jitter = torch.randn((len(rows), features.shape[1]), generator=generator)
            seen = features[rows] + _JITTER * jitter * network.spread
            error = network(seen) - targets[rows]
            fit = ((weights[rows] * error.square()).sum(1) + 1e-5).sqrt().mean()
            loss = fit + _STEEPNESS * error.diff(dim=1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()
