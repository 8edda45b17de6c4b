"""The flow of Harmonizing Flows: affine couplings of the RealNVP type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bids_harmony.networks.coupling import ChannelCoupling, CheckerboardCoupling
from bids_harmony.networks.dequantize import UniformNoise, VariationalNoise
from bids_harmony.networks.flow import Flow
from bids_harmony.networks.modules import Modules

#: Intensities 0..1 become -1..1 before the first coupling.
CENTRE, GAIN = 0.5, 2.0


class AffineFlow(Flow):
    """Affine couplings on three grids (Beizaee et al. 2023/2025, Harmonizing Flows).

    `couplings` checkerboard couplings on the image, squeeze, channel couplings, squeeze, channel
    couplings. The defaults are the paper's (4.1 million parameters at one channel). For training
    on a CPU: widths (16,), blocked, split, uniform noise (63 thousand parameters).

    Parameters
    ----------
    channels
        Image channels.
    couplings
        Couplings on each grid.
    widths
        Channels of each level of a coupling's U-Net.
    blocked
        True: the checkerboard couplings work on 2 x 2 blocks, so that their networks run on half
        the grid, at a quarter of the cost. The two colours of the board are the same.
    split
        True: half of the channels become latents before the last squeeze.
    noise_couplings
        Couplings of the variational dequantization; 0 for uniform noise.
    grey_levels
        See `Flow`.

    Raises
    ------
    ValueError
        If a size is not positive.
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        couplings: int = 4,
        widths: Sequence[int] = (16, 32, 48, 64),
        blocked: bool = False,
        split: bool = False,
        noise_couplings: int = 4,
        grey_levels: int = 256,
    ) -> None:
        super().__init__()
        widths = tuple(widths)
        if min(channels, couplings, *widths, grey_levels) <= 0 or noise_couplings < 0:
            raise ValueError("sizes of an affine flow must be positive")
        self.channels, self.divisor, self.grey_levels = channels, 4, grey_levels
        self.blocked, self.split = blocked, split
        self.widths = widths
        self.noise = (
            VariationalNoise(channels, noise_couplings, widths)
            if noise_couplings
            else UniformNoise()
        )
        odd = [bool(i % 2) for i in range(couplings)]
        middle, last = 4 * channels, (8 if split else 16) * channels
        self.fine = Modules(
            ChannelCoupling(middle, widths, odd=o)
            if blocked
            else CheckerboardCoupling(channels, widths, odd=o)
            for o in odd
        )
        self.middle = Modules(ChannelCoupling(middle, widths, odd=o) for o in odd)
        self.coarse = Modules(ChannelCoupling(last, widths, odd=o) for o in odd)

    def config(self) -> dict[str, Any]:
        """JSON-serialisable settings from which `build_flow` makes the same flow, untrained."""
        noise = self.noise
        return {
            "kind": "affine",
            "channels": self.channels,
            "couplings": len(self.fine),
            "widths": list(self.widths),
            "blocked": self.blocked,
            "split": self.split,
            "noise_couplings": len(noise.couplings) if isinstance(noise, VariationalNoise) else 0,
            "grey_levels": self.grey_levels,
        }

    def encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Latents, and log-determinants as maps (B, 1, H_j, W_j), finest grid first."""
        h, fine = self._encode_fine(GAIN * (x - CENTRE))
        maps = [] if self.blocked else [fine]
        h = h if self.blocked else functional.pixel_unshuffle(h, 2)
        total = fine if self.blocked else torch.zeros_like(h[:, :1])
        for coupling in self.middle:
            h, log_det = coupling(h)
            total = total + log_det
        maps.append(total)
        latents = []
        if self.split:
            latent, h = h.chunk(2, dim=1)
            latents.append(latent)
        h = functional.pixel_unshuffle(h, 2)
        total = torch.zeros_like(h[:, :1])
        for coupling in self.coarse:
            h, log_det = coupling(h)
            total = total + log_det
        return [*latents, h], [*maps, total]

    def decode(self, latents: list[Tensor]) -> Tensor:
        """The image with these latents, unchecked."""
        h = latents[-1]
        for coupling in reversed(self.coarse):
            h = coupling.inverse(h)
        h = functional.pixel_shuffle(h, 2)
        if self.split:
            h = torch.cat((latents[0], h), dim=1)
        for coupling in reversed(self.middle):
            h = coupling.inverse(h)
        h = board_first(h) if self.blocked else functional.pixel_shuffle(h, 2)
        for first in reversed(self.fine):
            h = first.inverse(h)
        if self.blocked:
            h = functional.pixel_shuffle(board_last(h), 2)
        return h / GAIN + CENTRE

    def latent_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """(C_i, H_i, W_i) of each latent of an image of this size."""
        c = self.channels
        if self.split:
            return [(2 * c, height // 2, width // 2), (8 * c, height // 4, width // 4)]
        return [(16 * c, height // 4, width // 4)]

    def _encode_fine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """After the checkerboard couplings, and their log-determinants with that of the gain."""
        h = board_first(functional.pixel_unshuffle(x, 2)) if self.blocked else x
        total = torch.full_like(h[:, :1], h.shape[1] * math.log(GAIN))
        for coupling in self.fine:
            h, log_det = coupling(h)
            total = total + log_det.sum(dim=1, keepdim=True)
        return (board_last(h) if self.blocked else h), total


def board_first(h: Tensor) -> Tensor:
    """2 x 2 blocks (B, 4 C, H, W) with one colour of the checkerboard before the other."""
    blocks = h.unflatten(1, (-1, 4))
    colours = (blocks[:, :, pair].flatten(1, 2) for pair in ([0, 3], [1, 2]))
    return torch.cat(tuple(colours), dim=1)


def board_last(h: Tensor) -> Tensor:
    """The inverse of `board_first`."""
    even, odd = (half.unflatten(1, (-1, 2)) for half in h.chunk(2, dim=1))
    return torch.stack((even[:, :, 0], odd[:, :, 0], odd[:, :, 1], even[:, :, 1]), 2).flatten(1, 2)
