"""Network that tells a scan's tone from how its intensities lie side by side.

After its quantiles were mapped to the reference domain's, a scan's histogram says nothing more:
every brain has the same one. Where tissues meet, and how large their insides are, still does: a
brain with more cerebrospinal fluid than the reference's has its white matter mapped too low. The
joint histogram of local mean and local standard deviation holds this in a few numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Knots of the tone correction, and of the local mean, from 0 to `TOP`.
KNOTS, TOP = 24, 1.1
_SD_EDGES = (0.012, 0.02, 0.032, 0.05, 0.08, 0.12)
_FULL = 0.6
FEATURES = KNOTS * (len(_SD_EDGES) + 1)


def joint_histogram(image: Tensor, mask: Tensor) -> Tensor:
    """Square root of the shares of brain voxels by local mean and local standard deviation.

    Both are over the brain voxels of the 3 x 3 x 3 neighbourhood; voxels at the brain's rim, where
    less than `_FULL` of it is brain, do not count.

    Parameters
    ----------
    image, mask
        Shape (X, Y, Z): reference domain's scale, and brain mask (bool).

    Returns
    -------
    features
        Shape (`FEATURES`,), their squares sum to 1 (to 0 if no voxel counts).
    """
    weight = mask.float()

    def local(values: Tensor) -> Tensor:
        return functional.avg_pool3d(values[None, None], 3, 1, 1)[0, 0]

    share = local(weight)
    known = mask & (share > _FULL)
    share = share.clamp(min=1e-3)
    mean = local(image * weight) / share
    deviation = (local(image.square() * weight) / share - mean.square()).clamp(min=0).sqrt()
    rows = len(_SD_EDGES) + 1
    low, part = knots_of(mean[known])
    row = torch.bucketize(deviation[known], deviation.new_tensor(_SD_EDGES))
    counts = image.new_zeros(FEATURES)
    counts.index_add_(0, low * rows + row, 1 - part)
    counts.index_add_(0, (low + 1) * rows + row, part)
    return (counts / counts.sum().clamp(min=1)).sqrt()


def knots_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the knot at or below each value, and how far (0..1) it is to the next."""
    place = (values * ((KNOTS - 1) / TOP)).clamp(0, KNOTS - 1 - 1e-3)
    low = place.floor().long()
    return low, place - low


class ToneNetwork(nn.Module):
    """From `joint_histogram` to what is to be added to intensities at the knots.

    Parameters
    ----------
    hidden
        Width of the hidden layer.
    """

    shift: Tensor
    spread: Tensor

    def __init__(self, hidden: int = 96) -> None:
        super().__init__()
        self.hidden = hidden
        self.register_buffer("shift", torch.zeros(FEATURES))
        self.register_buffer("spread", torch.ones(FEATURES))
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, KNOTS)
        )
        last = self.layers[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def standardize(self, features: Tensor) -> None:
        """Take mean and spread of the features, shape (N, `FEATURES`), for the input's scale."""
        self.shift.copy_(features.mean(0))
        self.spread.copy_(features.std(0) + 0.01)

    def forward(self, features: Tensor) -> Tensor:
        """Correction at the knots, shape (N, `KNOTS`), from (N, `FEATURES`)."""
        out: Tensor = self.layers((features - self.shift) / self.spread)
        return out
