"""Losses of CALAMITI (Zuo et al., IPMI 2021, 2.3), with the weights of its authors' code.

The paper's perceptual loss needs a network trained on photographs. In its place stands the
difference of image gradients at three scales, which needs none and likewise asks for edges.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bids_harmony.networks.calamiti import CalamitiNetworks
from bids_harmony.training.contrasts import PairBatch
from bids_harmony.training.slice_losses import edge_difference, masked_l1

_IMAGE, _BETA, _KL, _ADVERSARIAL, _EDGES = 4.0, 0.03, 1e-7, 0.03, 0.04
_CLASSES = 0.2  # least weight of `class_error`


def kl_to_standard(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of normal distributions (B, n) from the standard one, mean over B."""
    each = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance)
    return each.sum(1).mean()


def same_label(logits: Tensor, label: Tensor) -> Tensor:
    """Binary cross entropy of patch logits (B, 1, h, w) with one label (B,) for all patches."""
    wanted = label.view(-1, 1, 1, 1).expand_as(logits)
    return functional.binary_cross_entropy_with_logits(logits, wanted)


def class_weight(step: int, start: int) -> float:
    """Of `class_error`: falls from 1 by 1 / `start` a step, and stays at 0.2."""
    return max(1 - step / start, _CLASSES)


def class_error(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy of labels (B, C, H, W) with classes 1 to C (B, H, W) where they are known."""
    wanted = classes.long() - 1
    total = functional.cross_entropy(logits, wanted, ignore_index=-1, reduction="sum")
    return total / (wanted >= 0).sum().clamp(min=1)


def calamiti_loss(
    networks: CalamitiNetworks, batch: PairBatch, generator: torch.Generator, *, start: int
) -> Tensor:
    """Loss of a training step; the steps that the networks have had go up by one.

    In a `judging` step the discriminator learns to tell the first site's beta, and nothing else
    gets a gradient. In the others it stays as it is and is to take every beta for the first
    site's, and beta is held to the classes of the voxels, most of all at first (`class_weight`;
    not in the paper).
    """
    networks.steps += 1
    judge = networks.discriminator
    if judge is not None:
        judge.requires_grad_(bool(batch.judging))
    count = len(batch.images)
    mask = batch.mask.repeat_interleave(2, dim=0)
    seen = batch.seen.flatten(0, 1)[:, None]
    known = batch.first_site.repeat_interleave(2)
    if judge is not None and bool(batch.judging):
        with torch.no_grad():
            beta = networks.sampled_beta(seen, mask, generator)
        return same_label(judge(beta), known)
    logits = networks.beta(seen).float()
    beta = networks.sampled(logits, mask, generator)
    loss = drawing_loss(networks, batch, beta.unflatten(0, (count, 2)), generator)
    classes = batch.classes.repeat_interleave(2, dim=0)
    loss = loss + class_weight(int(networks.steps), start) * class_error(logits, classes)
    if judge is not None:
        loss = loss + _ADVERSARIAL * same_label(judge(beta), torch.ones_like(known))
    return loss


def adaptation_loss(
    networks: CalamitiNetworks, batch: PairBatch, generator: torch.Generator
) -> Tensor:
    """Loss of a step on the scans of a new site; the discriminator is used, never trained."""
    count = len(batch.images)
    mask = batch.mask.repeat_interleave(2, dim=0)
    seen = batch.seen.flatten(0, 1)[:, None]
    beta = networks.sampled_beta(seen, mask, generator)
    loss = drawing_loss(networks, batch, beta.unflatten(0, (count, 2)), generator)
    judge = networks.discriminator
    if judge is None:
        return loss
    judge.eval()  # spectral norm would go on with its power iteration
    logits = judge(beta)
    return loss + _ADVERSARIAL * same_label(logits, torch.ones_like(logits[:, 0, 0, 0]))


def drawing_loss(
    networks: CalamitiNetworks, batch: PairBatch, beta: Tensor, generator: torch.Generator
) -> Tensor:
    """All but the adversarial term, from the anatomies (B, 2, 4, H, W) of both contrasts."""
    mean, log_variance = networks.theta(batch.others.flatten(0, 1)[:, None])
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    theta = mean + (log_variance / 2).exp() * noise
    crossed = batch.crossed[:, :, None, None, None]
    chosen = torch.where(crossed, beta.flip(1), beta).flatten(0, 1)
    mask = batch.mask.repeat_interleave(2, dim=0)
    drawn = networks.draw(chosen, theta, mask)
    wanted = batch.images.flatten(0, 1)[:, None] * mask
    return (
        _IMAGE * masked_l1(drawn, wanted, mask)
        + _EDGES * edge_difference(drawn, wanted)
        + _BETA * masked_l1(beta[:, 0], beta[:, 1], batch.mask)
        + _KL * kl_to_standard(mean, log_variance)
    )


def pair_error(networks: CalamitiNetworks, batch: PairBatch) -> Tensor:
    """Mean absolute error of slices drawn as they are when applied, from crossed anatomy and not.

    Half of the errors are of contrasts drawn from the other contrast's anatomy; no noise.
    """
    mask = batch.mask.repeat_interleave(2, dim=0)
    seen = batch.seen.flatten(0, 1)[:, None]
    theta, _ = networks.theta(batch.others.flatten(0, 1)[:, None])
    beta = networks.applied_beta(seen, mask)
    other = beta.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    wanted = batch.images.flatten(0, 1)[:, None]
    errors = [masked_l1(networks.draw(b, theta, mask), wanted, mask) for b in (beta, other)]
    return torch.stack(errors).mean()
