"""U-Net on slices."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bids_harmony.networks.modules import Modules

#: Of the LeakyReLU.
SLOPE = 0.1


class SliceUNet(nn.Module):
    """U-Net on slices: LeakyReLU, bilinear upsampling, no final activation.

    Parameters
    ----------
    inputs, outputs
        Channels.
    base
        Channels at full resolution; they double with every level.
    levels
        How often the size is halved.
    norm
        Instance norm after each convolution. Not for the decoder: it would take away what a
        constant channel, which theta is, adds to the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, base: int, levels: int, *, norm: bool) -> None:
        super().__init__()
        self.levels = levels
        widths = [base * 2**level for level in range(levels + 1)]
        self.down = Modules(
            _block(a, b, norm) for a, b in zip((inputs, *widths[:-1]), widths, strict=True)
        )
        self.up = Modules(
            _block(a + b, b, norm) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(base, outputs, 1)
        nn.init.kaiming_normal_(self.head.weight, nonlinearity="linear")

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W).

        Raises
        ------
        ValueError
            If H or W cannot be halved so often.
        """
        if any(size % 2**self.levels for size in x.shape[-2:]):
            raise ValueError(f"image size must be a multiple of {2**self.levels}: pad or crop")
        x = x.contiguous(memory_format=torch.channels_last)  # convolutions twice as fast on a CPU
        taps = []
        for level, block in enumerate(self.down):
            x = block(functional.max_pool2d(x, 2) if level else x)
            taps.append(x)
        for block, tap in zip(self.up, taps[-2::-1], strict=True):
            x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = block(torch.cat((x, tap), dim=1))
        out: Tensor = self.head(x)
        return out


class _InstanceNorm(nn.InstanceNorm2d):
    """Instance norm that keeps channels last in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous(memory_format=torch.channels_last)


def _block(inputs: int, outputs: int, norm: bool) -> nn.Sequential:
    """Two convolutions, each with activation, and with instance norm before it."""
    layers: list[nn.Module] = []
    for a, b in ((inputs, outputs), (outputs, outputs)):
        conv = nn.Conv2d(a, b, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, a=SLOPE)
        layers.append(conv)
        if norm:
            layers.append(_InstanceNorm(b, affine=True))
        layers.append(nn.LeakyReLU(SLOPE))
    return nn.Sequential(*layers)
