"""What HAIL's two phases of training minimise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bids_harmony.networks.hail import HailNetwork, moments, quantiles_of, share_at, sums_of
from bids_harmony.training.patches import dissimilarity, local_change

Cubes = tuple[Tensor, Tensor]  # images and masks
#: Cubes of the scans, cubes of the examples, styles of the scans, styles of the examples.
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Weights:
    """Of the losses: as in the paper, each is brought to the order of 0.1.

    The paper's 100, 150 and 200 do so for features in its encoder's units; here features are told
    in their usual deviation.

    Attributes
    ----------
    style, content, consistency
        Of the paper's losses.
    intensity
        Of the distance between the intensity distributions; not in the paper.
    """

    style: float = 10.0
    content: float = 0.5
    consistency: float = 1.0
    intensity: float = 10.0


def reconstruction(network: HailNetwork, cubes: Cubes) -> Tensor:
    """Phase 1: L1 + (1 - SSIM) of the decoder's picture and the cubes, (B, 1, s, s, s) each."""
    image, mask = cubes
    nothing = image.new_zeros(len(image), network.style_size)
    return dissimilarity(network.decoder(network.encoder(image)[-1], nothing), image, mask)


def transfer(
    network: HailNetwork, batch: Batch, *, radius: int, noise: float
) -> dict[str, Tensor]:
    """Phase 2: the losses of what the method would give out, not yet weighted.

    Three things differ from the paper. AdaIN and the decoder are given styles of the whole brains,
    as when the method is applied: statistics of a cube depend on its share of background and of
    each tissue, and would leave seams. What is compared with the example is the scan after
    `local_change`, since that is given out; the decoder's own picture is blurred. And its
    intensities are compared too, beside the encoder's features.

    Parameters
    ----------
    network
        With a frozen encoder.
    batch
        Cubes and masks (P, N, s, s, s) of N places in P pairs, first of the scans, then of the
        examples, and the styles (P, S) of both.
    radius, noise
        As for `local_change`.

    Returns
    -------
    losses
        ``style`` (mean and deviation at all taps), ``content`` (features of the result, and what
        AdaIN made of the scan's), ``consistency`` (scan, and its picture in its own style) and
        ``intensity``, in the intensity scale's units.
    """
    scan, inside, example, example_inside, own, wanted = batch
    pairs, places = scan.shape[:2]
    x, mask, t, t_mask = (
        v.flatten(0, 1)[:, None] for v in (scan, inside, example, example_inside)
    )
    with torch.no_grad():
        features, goals = network.encoder(x)[-1], network.encoder(t)
    own_each, wanted_each = (v.repeat_interleave(places, dim=0) for v in (own, wanted))
    drawn, redrawn = network.draw(features, own_each, wanted_each)
    change = drawn.float() - redrawn.float()
    result = x + local_change(x, change, mask, radius=radius, noise=noise)
    taps = network.encoder(result)
    goal = network.adain(features, own_each, wanted_each)
    return {
        "style": _style(network, (taps, mask), (goals, t_mask), pairs),
        "content": _content(network, taps[-1], goal, mask),
        "consistency": dissimilarity(redrawn, x, mask),
        "intensity": _intensity(result, mask, t, t_mask, pairs),
    }


def weighted(losses: Mapping[str, Tensor], weights: Weights) -> Tensor:
    """Sum of the losses by their weights."""
    return torch.stack([getattr(weights, name) * loss for name, loss in losses.items()]).sum()


def _style(
    network: HailNetwork,
    found: tuple[Sequence[Tensor], Tensor],
    goal: tuple[Sequence[Tensor], Tensor],
    pairs: int,
) -> Tensor:
    """Mean squared difference of means and deviations, over all places of a pair together.

    Every tap counts alike: its error is told in its own mean squared deviation.
    """
    statistics = []
    for taps, mask in (found, goal):
        sums = [s.unflatten(0, (pairs, -1)).sum(1) for s in sums_of(taps, mask)]
        statistics.append(moments(sums))
    (mean, deviation), (wanted_mean, wanted_deviation) = statistics
    errors = (mean - wanted_mean).square() + (deviation - wanted_deviation).square()
    by_tap = zip(
        *(v.split(list(network.widths), dim=-1) for v in (errors, network.usual)), strict=True
    )
    return torch.stack([error.mean() / usual.square().mean() for error, usual in by_tap]).mean()


def _content(network: HailNetwork, found: Tensor, goal: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference over the brain, told in the tap's mean squared deviation."""
    share = share_at(mask, len(network.widths) - 1)
    error = (found.float() - goal.float()).square().mean(dim=1, keepdim=True)
    unit = network.usual[-network.widths[-1] :].square().mean()
    return (error * share).sum() / share.sum().clamp(min=1e-6) / unit


def _intensity(
    result: Tensor, mask: Tensor, example: Tensor, example_mask: Tensor, pairs: int
) -> Tensor:
    """Mean distance of the quantiles in each pair's brain voxels; an empty cube counts as 0."""
    found = []
    cubes = (v.unflatten(0, (pairs, -1)) for v in (result, mask, example, example_mask))
    for image, inside, other, other_inside in zip(*cubes, strict=True):
        if bool(inside.any()) and bool(other_inside.any()):
            a, b = image[inside > 0], other[other_inside > 0]
            found.append((quantiles_of(a) - quantiles_of(b)).abs().mean())
    return torch.stack(found).mean() if found else result.sum() * 0
