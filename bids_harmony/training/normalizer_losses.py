"""What the networks of deepNormalize minimise, after Delisle et al. (2021), equations 1 to 3."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from bids_harmony.networks.deepnormalize import BRIGHTEST, CLASSES, NormalizerNetworks
from bids_harmony.training.common_appearance import CommonAppearance, tissue_distance
from bids_harmony.training.tissue_cubes import TissueBatch

#: Of background, CSF, grey matter and white matter (paper, 2.1).
WEIGHTS = (0.22, 0.30, 0.20, 0.28)
_LEAST = 1.0  # voxels: epsilon of equation 1
_BINS = 64
#: Weights for each unit of lambda; more of any costs the segmentation.
_DECEPTION, _APPEARANCE, _BIAS = 0.1, 0.4, 0.15


def segmentation_loss(found: Tensor, labels: Tensor) -> Tensor:
    """1 - weighted mean of the classes' Dice.

    The paper pools all classes into one fraction (equation 1). A class that is never found then
    costs its few voxels only, and fluid was lost in trainings with a discriminator; here it costs
    the class's whole Dice. Without labels of a class nothing of it shall be found.

    Parameters
    ----------
    found
        Logarithms of class probabilities, (B, 4, X, Y, Z).
    labels
        Class of each voxel, (B, X, Y, Z).
    """
    weights = torch.tensor(WEIGHTS, device=found.device)
    probability = found.exp().movedim(1, 0).flatten(1)
    truth = functional.one_hot(labels, CLASSES).movedim(-1, 0).flatten(1).to(probability.dtype)
    shared = (probability * truth).sum(1)
    total = probability.sum(1) + truth.sum(1)
    dice = (_LEAST + 2 * shared) / (_LEAST + total)
    return 1 - (weights * dice).sum() / weights.sum()


def discriminator_loss(networks: NormalizerNetworks, batch: TissueBatch) -> Tensor:
    """Negative log-likelihood of real cubes' sites and of the class of generated ones.

    Raises
    ------
    ValueError
        If the networks have no discriminator.
    """
    judge = networks.discriminator
    if judge is None:
        raise ValueError("the networks have no discriminator")
    with torch.no_grad():
        drawn = networks.normalize(batch.shown, batch.mask)
    generated = torch.full_like(batch.sites, networks.sites)
    real = functional.nll_loss(judge(batch.clean), batch.sites)
    return real + functional.nll_loss(judge(drawn), generated)


def deception(found: Tensor) -> Tensor:
    """How sure the discriminator is that generated cubes are generated (paper, equation 3).

    The paper minimises the logarithm of their class's probability; ``-log(1 - p)`` has its
    minimum in the same place and a gradient where the discriminator is sure.

    Parameters
    ----------
    found
        Logarithms of probabilities (B, sites + 1).
    """
    return -found[:, :-1].logsumexp(1).mean()


def normalizer_loss(
    networks: NormalizerNetworks,
    batch: TissueBatch,
    strength: float,
    appearance: CommonAppearance | None,
) -> Tensor:
    """Segmentation loss of normalized cubes, and `strength` (lambda) times how unlike they are.

    That is `deception`, times .1; the `tissue_distance` from the common appearance, of cubes
    without a bias field, times .4; and the `difference_of_biased`, times .15.
    Deception alone is satisfied by the identity, which leaves each scan the look of its own site.
    Without discriminator and `appearance` the segmentation loss alone counts.
    """
    if networks.discriminator is None or appearance is None:
        drawn = networks.normalize(batch.shown, batch.mask)
        return segmentation_loss(networks.segment(drawn), batch.labels)
    with torch.no_grad():  # all cubes: batch norm would see others in a part of them
        wanted = networks.normalize(batch.clean, batch.mask)
    drawn = networks.normalize(batch.shown, batch.mask)
    loss = segmentation_loss(networks.segment(drawn), batch.labels)
    clean = (batch.shown == batch.clean).flatten(1).all(1)
    unlike = _DECEPTION * deception(networks.discriminator(drawn))
    unlike = unlike + _APPEARANCE * tissue_distance(
        drawn[clean], batch.labels[clean], batch.sites[clean], appearance
    )
    unlike = unlike + _BIAS * difference_of_biased(
        drawn[~clean], wanted[~clean], batch.mask[~clean]
    )
    return loss + strength * unlike


def difference_of_biased(drawn: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference in the brain of cubes with a bias field to what they give without.

    Parameters
    ----------
    drawn, wanted
        Normalized with and without their fields, (B, C, X, Y, Z); B may be 0.
    mask
        Brain, (B, 1, X, Y, Z).
    """
    voxels = mask.sum() * drawn.shape[1]
    return ((drawn - wanted).abs() * mask).sum() / voxels.clamp(min=1)


def histograms(drawn: Tensor, mask: Tensor, sites: Tensor, count: int) -> Tensor:
    """Intensity histograms of the brain voxels of each site's cubes, (count, 64), counts.

    Parameters
    ----------
    drawn, mask
        Shape (B, C, X, Y, Z) and (B, 1, X, Y, Z); of several modalities the first counts.
    sites
        Class of each cube, (B,).
    count
        Of sites.
    """
    rows = []
    for site in range(count):
        chosen = sites == site
        values = drawn[chosen][:, :1][mask[chosen] > 0]
        rows.append(torch.histc(values.float(), _BINS, 0, BRIGHTEST))
    return torch.stack(rows)


def divergence(counts: Tensor) -> float:
    """Jensen-Shannon divergence of several histograms (K, bins), bits; 0 to log2 K.

    Empty histograms are left out.
    """
    kept = counts[counts.sum(1) > 0].double()
    if len(kept) < 2:
        return 0.0
    shares = kept / kept.sum(1, keepdim=True)

    def entropy(p: Tensor) -> Tensor:
        return -torch.special.xlogy(p, p).sum(-1) / math.log(2)

    return float(entropy(shares.mean(0)) - entropy(shares).mean())
