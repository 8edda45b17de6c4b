"""BlindHarmony's optimization (Jeong et al. 2023, Algorithm 1) on a stack of slices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bids_harmony.networks.flow import Flow

_SIZES = 5  # of a step, each half the one before
_EDGE_SHARE = 0.3  # the smoothest share of a slice counts as free of edges
_EDGE_LEAST = 0.05
_CHUNK = 8


@dataclass(frozen=True)
class Weights:
    """The paper's hyperparameters.

    Attributes
    ----------
    alpha
        Share by which latents shrink towards their mean in each iteration (eq. 12).
    beta1, beta2
        Weights of 1 minus the correlation with the source, and of gradients where the source has
        no edges (eq. 3).
    iterations
        N of Algorithm 1.
    """

    alpha: float = 0.001
    beta1: float = 1000.0
    beta2: float = 0.001
    iterations: int = 10


@dataclass(frozen=True)
class Optimized:
    """Result of the optimization.

    Attributes
    ----------
    images
        Shape (N, 1, H, W), >= 0, 0 outside the mask.
    accepted, rejected
        Iterations that lowered a slice's objective, and those that could not, over all slices.
    steps
        Most iterations that lowered a slice's objective.
    """

    images: Tensor
    accepted: int
    rejected: int
    steps: int


def distance(
    image: Tensor, source: Tensor, masks: Tensor, flat: Tensor, weights: Weights
) -> Tensor:
    """D of eq. 3 for each slice, (N,): centred correlation in the mask, gradients off the edges.

    Parameters
    ----------
    image, source, masks, flat
        Shape (N, 1, H, W); `flat` is 1 where the source has no edges.
    weights
        beta1 and beta2.
    """
    similar = masked_ncc(image, source, masks)
    rough = (flat * gradient_magnitude(image)).sum((1, 2, 3))
    return weights.beta1 * (1 - similar) + weights.beta2 * rough


def masked_ncc(first: Tensor, second: Tensor, masks: Tensor) -> Tensor:
    """Pearson's r of two images inside the mask, for each slice, (N,)."""
    voxels = masks.sum((1, 2, 3), keepdim=True).clamp(min=1)
    centred = [
        (v - (v * masks).sum((1, 2, 3), keepdim=True) / voxels) * masks for v in (first, second)
    ]
    a, b = centred
    product = (a * b).sum((1, 2, 3))
    norm = (a.square().sum((1, 2, 3)) * b.square().sum((1, 2, 3))).clamp(min=1e-12).sqrt()
    return product / norm


def gradient_magnitude(image: Tensor) -> Tensor:
    """Magnitude of central differences per voxel, (N, 1, H, W), differentiable everywhere."""
    down = functional.pad(image[:, :, 2:] - image[:, :, :-2], (0, 0, 1, 1)) / 2
    right = functional.pad(image[..., 2:] - image[..., :-2], (1, 1)) / 2
    return (down.square() + right.square() + 1e-10).sqrt()


def flat_places(source: Tensor, masks: Tensor) -> Tensor:
    """M of eq. 2, (N, 1, H, W): brain voxels among the smoothest share of their slice."""
    magnitude = gradient_magnitude(source)
    inside = masks > 0.5
    flat = torch.zeros_like(source)
    for index in range(len(source)):
        own = magnitude[index][inside[index]]
        if own.numel():
            limit = own.quantile(_EDGE_SHARE)
            smooth = (magnitude[index] <= limit) & (source[index] > _EDGE_LEAST)
            flat[index] = (smooth & inside[index]).float()
    return flat


def optimize_slices(flow: Flow, source: Tensor, masks: Tensor, weights: Weights) -> Optimized:
    """Bring slices nearer to the centre of the flow's latents without leaving the source.

    Each iteration takes the gradient step on D (eq. 13) and shrinks the latents (eq. 12). It is
    taken back for slices whose objective ``D + alpha |z|^2`` (eq. 11) rose, with half the step,
    `_SIZES` sizes of a step in all; a slice that none of them lowers has arrived.

    Parameters
    ----------
    flow
        Frozen, in eval mode.
    source, masks
        Shape (N, 1, H, W), on the flow's device: what the result must correlate with.
    weights
        The paper's hyperparameters.
    """
    parts = []
    for part in range(0, len(source), _CHUNK):
        chosen = slice(part, part + _CHUNK)
        parts.append(_optimize(flow, source[chosen], masks[chosen], weights))
    return Optimized(
        torch.cat([part.images for part in parts]),
        sum(part.accepted for part in parts),
        sum(part.rejected for part in parts),
        max((part.steps for part in parts), default=0),
    )


def _optimize(flow: Flow, source: Tensor, masks: Tensor, weights: Weights) -> Optimized:
    image, flat = source.clone(), flat_places(source, masks)
    accepted = rejected = steps = 0
    best = _objective(flow, image, source, masks, flat, weights)
    active = torch.ones(len(image), dtype=torch.bool, device=image.device)
    for _ in range(weights.iterations):
        rows = torch.nonzero(active)[:, 0]
        if not len(rows):
            break
        part = image[rows].clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(
            distance(part, source[rows], masks[rows], flat[rows], weights).sum(), part
        )
        lowered = torch.zeros_like(active)
        size = 1.0
        for _ in range(_SIZES):
            left = rows[~lowered[rows]]
            if not len(left):
                break
            step = size * slope[~lowered[rows]]
            moved = _shrunk(flow, image[left] - step, size * weights.alpha) * masks[left]
            value = _objective(flow, moved, source[left], masks[left], flat[left], weights)
            good = torch.isfinite(value) & (value < best[left])
            image[left[good]], best[left[good]] = moved[good], value[good]
            lowered[left[good]] = True
            size /= 2
        accepted += int(lowered.sum())
        rejected += int((active & ~lowered).sum())
        active = lowered
        steps += int(active.any())
    return Optimized(image.clamp(min=0) * masks, accepted, rejected, steps)


def _shrunk(flow: Flow, image: Tensor, share: float) -> Tensor:
    """The image whose latents are nearer to 0 by this share."""
    with torch.no_grad():
        return flow.inverse([(1 - share) * z for z in flow(image).latents])


def _objective(
    flow: Flow, image: Tensor, source: Tensor, masks: Tensor, flat: Tensor, weights: Weights
) -> Tensor:
    """Eq. 11 for each slice, (N,)."""
    with torch.no_grad():
        prior = sum(z.square().flatten(1).sum(1) for z in flow(image).latents)
        return distance(image, source, masks, flat, weights) + weights.alpha * prior
