"""The appearance that deepNormalize gives the scans of all sites, tissue by tissue.

It is that of the training site whose tissues are told apart best. The paper leaves it to the
adversarial game; a discriminator that knows every site sees through whatever lies between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bids_harmony.errors import ScanError
from bids_harmony.imaging.tissues import TISSUES
from bids_harmony.networks.deepnormalize import BRIGHTEST, CLASSES
from bids_harmony.training.tissue_cubes import LabelledBrain

_LEVELS = 257  # even, from the smallest intensity to the largest
_FEWEST = 200  # voxels of a tissue that say how its intensities are distributed


@dataclass(frozen=True)
class CommonAppearance:
    """Intensities that each tissue shall have.

    Attributes
    ----------
    site
        Whose scans have them.
    quantiles
        Shape (channels, 4, 257): brain without a label, CSF, grey and white matter at even levels
        from 0 to 1, mean over the site's brains; NaN for a class with few voxels in all of them.
    """

    site: str
    quantiles: Tensor

    @classmethod
    def of(cls, brains: Sequence[LabelledBrain]) -> CommonAppearance:
        """That of the site with the best `separation`, on average over its brains.

        Parameters
        ----------
        brains
            Of the training, not empty; intensities above `BRIGHTEST` are cut: none is drawn.

        Raises
        ------
        ScanError
            If no brain has labels of two neighbouring tissues.
        """
        of_site: dict[str, list[LabelledBrain]] = {}
        for brain in brains:
            of_site.setdefault(brain.site, []).append(brain)
        means = {
            site: sum(separation(b) for b in group) / len(group) for site, group in of_site.items()
        }
        site = max(sorted(means), key=lambda name: means[name])
        if not means[site] > 0:
            raise ScanError(
                "no training scan has labels of neighbouring tissues (CSF and grey matter, grey "
                "and white matter) whose intensities differ; check the labels"
            )
        found = [
            [
                _quantiles(
                    brain.images[:, brain.mask & (brain.labels == number)].clamp(0, BRIGHTEST)
                )
                for number in range(CLASSES)
            ]
            for brain in of_site[site]
        ]
        rows = [torch.stack(classes, dim=1) for classes in found]
        return cls(site, torch.stack(rows).nanmean(0))


def separation(brain: LabelledBrain) -> float:
    """How well neighbouring tissues are told apart by intensity, in pooled standard deviations.

    The smaller of CSF from grey and grey from white matter (d'; of several modalities the root of
    the sum of squares); of the one that there is where a tissue is missing, 0 without any.
    Intensities above `BRIGHTEST` are cut.
    """
    values = [
        brain.images[:, brain.labels == tissue].double().clamp(0, BRIGHTEST)
        for tissue in TISSUES.values()
    ]
    apart = []
    for a, b in pairwise(values):
        if min(a.shape[1], b.shape[1]) >= _FEWEST:
            spread = (a.var(1) + b.var(1)) / 2
            apart.append(float(((a.mean(1) - b.mean(1)).square() / spread).sum().sqrt()))
    return min(apart, default=0.0)


def tissue_distance(
    drawn: Tensor, labels: Tensor, sites: Tensor, appearance: CommonAppearance
) -> Tensor:
    """How far the tissues of each site's cubes are from the common appearance.

    Mean over sites, tissues and channels of the 1-Wasserstein distance of intensities. A tissue
    with few voxels in a site's cubes is left out.

    Parameters
    ----------
    drawn, labels, sites
        Normalized cubes (B, C, X, Y, Z), their tissues (B, X, Y, Z) and sites (B,).
    appearance
        Wanted.
    """
    wanted = appearance.quantiles.to(drawn.device)
    distances = []
    for site in sites.unique():
        for tissue in TISSUES.values():
            chosen = (labels == tissue) & (sites == site)[:, None, None, None]
            if int(chosen.sum()) >= _FEWEST and not wanted[:, tissue].isnan().any():
                found = drawn.movedim(1, 0)[:, chosen].sort(dim=1).values
                distances.append((found - _read(wanted[:, tissue], found.shape[1])).abs().mean())
    return torch.stack(distances).mean() if distances else drawn.sum() * 0


def _read(quantiles: Tensor, count: int) -> Tensor:
    """Quantiles (C, 257) at `count` levels, (C, count), linear in between."""
    levels = (torch.arange(count, device=quantiles.device) + 0.5) / count
    place = levels * (_LEVELS - 1)
    below = place.floor().long().clamp(max=_LEVELS - 2)
    return torch.lerp(quantiles[:, below], quantiles[:, below + 1], place - below)


def _quantiles(values: Tensor) -> Tensor:
    """Quantiles of each channel (C, N), (C, 257); not a number where there are few values."""
    if values.shape[1] < _FEWEST:
        return values.new_full((len(values), _LEVELS), float("nan"))
    levels = torch.linspace(0, 1, _LEVELS, device=values.device)
    return torch.quantile(values.float(), levels, dim=1).T
