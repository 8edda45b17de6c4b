"""Noise that makes rounded intensities continuous: uniform, or learned (Flow++)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bids_harmony.networks.coupling import CheckerboardCoupling
from bids_harmony.networks.modules import Modules


def round_to_levels(x: Tensor, grey_levels: int) -> Tensor:
    """Nearest multiples of 1 / `grey_levels`."""
    return torch.round(x * grey_levels) / grey_levels


class UniformNoise(nn.Module):
    """Noise uniform over one step, centred on it, in units of a step."""

    def forward(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Noise in [-.5, .5) like `x`, and its log-density by place (B, 1, H, W), zero."""
        noise = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator) - 0.5
        return noise, x.new_zeros(len(x), 1, *x.shape[-2:])


class VariationalNoise(nn.Module):
    """Noise within one step whose distribution depends on the image (Ho et al. 2019, Flow++).

    A small conditional flow: normal noise goes through checkerboard couplings that also see the
    image, then through the logistic function.

    Parameters
    ----------
    channels
        Image channels.
    couplings
        Number of checkerboard couplings.
    widths
        Channels of each level of the U-Net in each coupling.
    """

    def __init__(self, channels: int, couplings: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.couplings = Modules(
            CheckerboardCoupling(channels, widths, odd=bool(i % 2), context=channels)
            for i in range(couplings)
        )

    def forward(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Noise in (-.5, .5) like `x`, and its log-density by place (B, 1, H, W)."""
        z = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        noise, log_det = self.shape(z, x)
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(z)
        return noise, normal.sum(dim=1, keepdim=True) - log_det

    def shape(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Noise made from `z` for the image `x`, and its log-determinant by place (B, 1, H, W)."""
        total = torch.zeros_like(z)
        for coupling in self.couplings:
            z, log_scale = coupling(z, x)
            total = total + log_scale
        total = total + functional.logsigmoid(z) + functional.logsigmoid(-z)
        return torch.sigmoid(z) - 0.5, total.sum(dim=1, keepdim=True)
