"""Networks of HAIL: encoder with taps, adaptive instance normalisation, decoder (Parida et al.).

A style is a row of numbers that says how a whole brain looks: mean and standard deviation of every
channel at every tap of the encoder, and quantiles of the image. It is measured once over the whole
brain and given to the networks from outside, so that what they draw of a part does not depend on
where the part was cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bids_harmony.networks.modules import Modules

#: Quantiles of the image in a style, at (k + .5) / QUANTILES.
QUANTILES = 17
_QUANTILE_UNIT = 0.2  # of the intensity scale; differences of quantiles are told in it
_FAR = 3.0  # differences of styles beyond it count as it
_RATIO = 4.0  # most that AdaIN stretches a channel, and its inverse the least
_FLOOR = 0.05  # of a channel's usual deviation: below it a channel counts as silent


class Encoder(nn.Module):
    """Two 3 x 3 x 3 convolutions with ReLU per level, max-pooling between levels (figure 3)."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        inputs = (1, *widths[:-1])
        self.first = Modules(_convolution(a, b) for a, b in zip(inputs, widths, strict=True))
        self.second = Modules(_convolution(b, b) for b in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Taps of an image (B, 1, X, Y, Z): level l has shape (B, widths[l], X/2^l, ...)."""
        taps = []
        x = x.contiguous(memory_format=torch.channels_last_3d)  # twice as fast on a CPU
        for level, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            x = functional.max_pool3d(x, 2) if level else x
            x = torch.relu(second(torch.relu(first(x))))
            taps.append(x)
        return taps


class Decoder(nn.Module):
    """Mirror of the encoder, upsampling by nearest neighbours (figure 4).

    Beyond the paper, every level is also scaled and shifted, channel by channel, by a linear
    function of how the wanted style differs from the scan's own; equal styles change nothing.

    Parameters
    ----------
    widths
        Channels of the encoder's levels.
    style
        Length of a difference of styles.
    """

    def __init__(self, widths: Sequence[int], style: int) -> None:
        super().__init__()
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.first = Modules(_convolution(a, b) for a, b in pairs)
        self.second = Modules(_convolution(b, b) for _, b in pairs)
        self.turn = Modules(nn.Linear(style, 2 * b, bias=False) for _, b in pairs)
        self.last = _convolution(widths[0], 1)
        for turn in self.turn:
            nn.init.zeros_(turn.weight)

    def forward(self, x: Tensor, difference: Tensor) -> Tensor:
        """Image (B, 1, X, Y, Z) from deepest features and difference of styles (B, style)."""
        # many numbers that turn together: unscaled, one step of the optimizer would be too long
        told = difference / difference.shape[1] ** 0.5
        for first, second, turn in zip(self.first, self.second, self.turn, strict=True):
            x = torch.relu(first(x))
            x = functional.interpolate(x, scale_factor=2, mode="nearest-exact")
            scale, shift = turn(told)[:, :, None, None, None].chunk(2, dim=1)
            x = torch.relu(second(x) * (1 + scale) + shift)
        out: Tensor = self.last(x)
        return out


class HailNetwork(nn.Module):
    """Encoder and decoder of one modality.

    Parameters
    ----------
    widths
        Channels of each level, the paper's (64, 128, 256, 512); two levels or more.

    Raises
    ------
    ValueError
        If there is one level only.
    """

    usual: Tensor

    def __init__(self, widths: Sequence[int] = (64, 128, 256, 512)) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError("HAIL needs two levels or more")
        self.widths = tuple(widths)
        self.encoder = Encoder(self.widths)
        self.decoder = Decoder(self.widths, self.style_size)
        #: A channel's usual deviation over the training brains, its unit in losses and ratios.
        self.register_buffer("usual", torch.ones(sum(self.widths)))

    @property
    def style_size(self) -> int:
        """Length of a style."""
        return 2 * sum(self.widths) + QUANTILES

    @property
    def divisor(self) -> int:
        """Every side of an image must be a multiple of it."""
        return int(2 ** (len(self.widths) - 1))

    def config(self) -> dict[str, Any]:
        """Arguments that make the same network, untrained."""
        return {"widths": list(self.widths)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HailNetwork:
        """Inverse of `config`."""
        return cls([int(width) for width in config["widths"]])

    def split(self, style: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means (B, C), deviations (B, C) of all C channels, and quantiles of styles (B, S)."""
        channels = sum(self.widths)
        means, deviations, quantiles = style.split([channels, channels, QUANTILES], dim=1)
        return means, deviations, quantiles

    def difference(self, own: Tensor, wanted: Tensor) -> Tensor:
        """How two styles (B, S) differ, in units that are alike, each within -3..3.

        Means by their mean deviation, deviations by the logarithm of their ratio.
        """
        (m, s, q), (wm, ws, wq) = self.split(own), self.split(wanted)
        floor = _FLOOR * self.usual
        parts = (
            (wm - m) / (0.5 * (s + ws) + floor),
            torch.log((ws + floor) / (s + floor)),
            (wq - q) / _QUANTILE_UNIT,
        )
        return torch.cat(parts, dim=1).clamp(-_FAR, _FAR)

    def adain(self, features: Tensor, own: Tensor, wanted: Tensor) -> Tensor:
        """Deepest features (B, C, ...) with the wanted style's mean and deviation.

        ``(f - mean) * wanted_deviation / deviation + wanted_mean`` (Huang & Belongie 2017, eq. 8)
        with statistics of whole brains. The ratio is kept within 1/4..4.
        """
        deepest = self.widths[-1]
        (m, s, _), (wm, ws, _) = self.split(own), self.split(wanted)
        floor = _FLOOR * self.usual[-deepest:]
        ratio = (ws[:, -deepest:] + floor) / (s[:, -deepest:] + floor)
        ratio = ratio.clamp(1 / _RATIO, _RATIO)
        wide = (..., None, None, None)
        return (features - m[:, -deepest:][wide]) * ratio[wide] + wm[:, -deepest:][wide]

    def draw(self, features: Tensor, own: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder draws of deepest features (B, C, ...).

        Returns
        -------
        drawn, redrawn
            In the wanted style, and in the scan's own, shape (B, 1, X, Y, Z).
        """
        nothing = features.new_zeros(len(features), self.style_size)
        drawn = self.decoder(self.adain(features, own, wanted), self.difference(own, wanted))
        return drawn, self.decoder(features, nothing)


def share_at(mask: Tensor, level: int) -> Tensor:
    """Weights (B, 1, X, Y, Z), e.g. a mask, on the grid of a level: means of its cells."""
    return functional.avg_pool3d(mask, 2**level) if level else mask


def sums_of(taps: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """Sums of w, w f and w f^2 for every tap's channels; they may be added over parts of a brain.

    Parameters
    ----------
    taps
        As `Encoder.forward` gives them.
    weight
        Shape (B, 1, X, Y, Z), >= 0, on the image's grid.

    Returns
    -------
    sums
        Shape (B, 3, C) for every tap, float32.
    """
    found = []
    for level, tap in enumerate(taps):
        values, at = tap.float().flatten(2), share_at(weight, level).flatten(2)
        weighted = values * at
        total = at.sum(2).expand(-1, values.shape[1])
        found.append(torch.stack((total, weighted.sum(2), (weighted * values).sum(2)), dim=1))
    return found


def moments(sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Means and standard deviations (B, C) of all taps' channels from `sums_of`."""
    total, first, second = torch.cat(list(sums), dim=2).unbind(1)
    total = total.clamp(min=1e-6)
    mean = first / total
    variance = (second / total - mean.square()).clamp(min=0)
    return mean, (variance + 1e-8).sqrt()


def quantiles_of(values: Tensor) -> Tensor:
    """Quantiles of intensities (N,) at (k + .5) / 17, shape (17,)."""
    at = (torch.arange(QUANTILES, device=values.device) + 0.5) / QUANTILES
    return torch.quantile(values.float(), at)


def _convolution(inputs: int, outputs: int) -> nn.Conv3d:
    layer = nn.Conv3d(inputs, outputs, 3, padding=1)
    nn.init.kaiming_normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
