"""U-Net on volumes (Cicek et al. 2016) without transposed convolutions (deepNormalize, 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from bids_harmony.networks.modules import Modules


class UNet3d(nn.Module):
    """Two convolutions per level, max-pooling, upsampling by nearest neighbours, shortcuts.

    Each convolution is followed by batch norm and ReLU. No final activation.

    Parameters
    ----------
    inputs, outputs
        Channels.
    widths
        Channels of each level, the finest first; two levels or more.

    Raises
    ------
    ValueError
        If there is one level only.
    """

    def __init__(self, inputs: int, outputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError("a U-Net needs two levels or more")
        self.inputs, self.outputs, self.widths = inputs, outputs, tuple(widths)
        before = (inputs, *self.widths[:-1])
        self.down = Modules(_block(a, b) for a, b in zip(before, self.widths, strict=True))
        self.up = Modules(
            _block(a + b, b) for a, b in zip(self.widths[:0:-1], self.widths[-2::-1], strict=True)
        )
        self.head = nn.Conv3d(self.widths[0], outputs, 1)

    @property
    def divisor(self) -> int:
        """Every side of a volume must be a multiple of it."""
        return int(2 ** (len(self.widths) - 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, X, Y, Z) to (B, outputs, X, Y, Z).

        Raises
        ------
        ValueError
            If a side is not a multiple of `divisor`.
        """
        if any(side % self.divisor for side in x.shape[2:]):
            raise ValueError(f"every side must be a multiple of {self.divisor}: pad or crop")
        x = x.contiguous(memory_format=torch.channels_last_3d)  # twice as fast on a CPU
        taps = []
        for level, block in enumerate(self.down):
            x = block(functional.max_pool3d(x, 2) if level else x)
            taps.append(x)
        for block, tap in zip(self.up, taps[-2::-1], strict=True):
            x = functional.interpolate(x, scale_factor=2, mode="nearest-exact")
            x = block(torch.cat((x, tap), dim=1))
        out: Tensor = self.head(x)
        return out


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in ((inputs, outputs), (outputs, outputs)):
        conv = nn.Conv3d(a, b, 3, padding=1, bias=False)  # the norm has one
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, nn.BatchNorm3d(b), nn.ReLU()]
    return nn.Sequential(*layers)
