"""Networks of deepNormalize (Delisle et al. 2021): generator, segmenter, discriminator.

Intensities are those of the robust scale (brain about 0 to 1); a scan of several modalities has a
channel for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bids_harmony.networks.unet3d import UNet3d

#: Background, CSF, grey matter, white matter.
CLASSES = 4
#: Largest intensity that the generator draws.
BRIGHTEST = 1.25
_DARKEST = 0.004  # share of the brightest: the sigmoid ends there
_DISCRIMINATOR = (16, 32, 64, 128)
_SLOPE, _DROPOUT = 0.2, 0.25


class DomainDiscriminator(nn.Module):
    """Which site a cube comes from, or whether it was generated (paper, 2.1; DCGAN in 3D).

    Parameters
    ----------
    channels
        Modalities.
    sites
        Domains of real cubes; one class more is for generated ones.
    side
        Edge of the cubes in voxels, a multiple of 16.

    Raises
    ------
    ValueError
        If the edge is no multiple of 16.
    """

    def __init__(self, channels: int, sites: int, side: int) -> None:
        super().__init__()
        if side % 2 ** len(_DISCRIMINATOR):
            raise ValueError(f"cubes of {side} voxels cannot be halved four times")
        self.channels, self.sites, self.side = channels, sites, side
        layers: list[nn.Module] = []
        for a, b in pairwise((channels, *_DISCRIMINATOR)):
            layers += [
                nn.Conv3d(a, b, 3, stride=2, padding=1),
                nn.LeakyReLU(_SLOPE),
                nn.Dropout3d(_DROPOUT),
            ]
        self.layers = nn.Sequential(*layers)
        last = side // 2 ** len(_DISCRIMINATOR)
        self.head = nn.Linear(_DISCRIMINATOR[-1] * last**3, sites + 1)

    def forward(self, cubes: Tensor) -> Tensor:
        """(B, channels, s, s, s) to logarithms of probabilities (B, sites + 1), float32."""
        found: Tensor = self.head(self.layers(cubes).flatten(1)).float()
        return found.log_softmax(dim=1)


class NormalizerNetworks(nn.Module):
    """All networks of one training.

    Parameters
    ----------
    channels
        Modalities that are normalized together.
    sites
        Domains of the training.
    widths
        Of both U-Nets; the paper's are those of Cicek et al., 32 to 256.
    side
        Edge of the cubes in voxels.
    discriminator
        Whether there is one; without it this is the pre-processor of Drozdzal et al. (2018).
    generator
        Whether there is one; without it the segmenter sees the cubes as they are.
    """

    def __init__(
        self,
        channels: int,
        sites: int,
        widths: Sequence[int],
        side: int = 32,
        discriminator: bool = True,
        generator: bool = True,
    ) -> None:
        super().__init__()
        self.channels, self.sites, self.side = channels, sites, side
        self.generator = UNet3d(channels, channels, widths) if generator else None
        if self.generator is not None:
            for part in self.generator.head.parameters():
                nn.init.zeros_(part)  # it begins as the identity
        self.segmenter = UNet3d(channels, CLASSES, widths)
        self.discriminator = DomainDiscriminator(channels, sites, side) if discriminator else None

    def config(self) -> dict[str, Any]:
        """Arguments that make the same networks, untrained."""
        return {
            "channels": self.channels,
            "sites": self.sites,
            "widths": list(self.segmenter.widths),
            "side": self.side,
            "discriminator": self.discriminator is not None,
            "generator": self.generator is not None,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NormalizerNetworks:
        """Inverse of `config`."""
        return cls(
            int(config["channels"]), int(config["sites"]), config["widths"], int(config["side"]),
            bool(config["discriminator"]), bool(config["generator"]),
        )  # fmt: skip

    def normalize(self, x: Tensor, mask: Tensor) -> Tensor:
        """Cubes (B, C, s, s, s) as the common domain shows them, 0 to 1.25; 0 outside the mask.

        The generator's last layer is a sigmoid, as in the paper; what goes into it is added to
        the cube's own logit, so that an untrained generator leaves the cube as it is.
        """
        if self.generator is None:
            return x.float().clamp(0, BRIGHTEST) * mask
        share = (x.float() / BRIGHTEST).clamp(_DARKEST, 1 - _DARKEST)
        drawn = torch.sigmoid(torch.logit(share) + self.generator(x).float())
        return BRIGHTEST * drawn * mask

    def segment(self, normalized: Tensor) -> Tensor:
        """Logarithms of class probabilities (B, 4, s, s, s) of normalized cubes, float32."""
        found: Tensor = self.segmenter(normalized).float()
        return found.log_softmax(dim=1)
