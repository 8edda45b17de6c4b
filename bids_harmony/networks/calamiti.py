"""Networks of CALAMITI (Zuo et al., IPMI 2021): anatomy and contrast of a slice, taken apart.

beta, the anatomy, is a one-hot map of a few channels; theta, the contrast, is two numbers. One
decoder draws a slice from both, whatever the site.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from bids_harmony.networks.slice_unet import SLOPE, SliceUNet

BETAS, THETAS = 4, 2
_LAST_TEMPERATURE = 0.5
_STRIDES = 16  # of the theta encoder's four convolutions together
_FIRST_LOG_VARIANCE = -5.0


def temperature(step: int, decay: float) -> float:
    """Gumbel temperature: 1 at first, falls as ``exp(-decay * step)``, not below 0.5."""
    return max(math.exp(-decay * step), _LAST_TEMPERATURE)


def one_hot(logits: Tensor) -> Tensor:
    """The largest of the channels, (B, C, H, W), as 1, the others as 0; without noise."""
    hot = torch.zeros_like(logits)
    return hot.scatter_(1, logits.argmax(1, keepdim=True), 1.0)


def gumbel_one_hot(logits: Tensor, tau: float, generator: torch.Generator) -> Tensor:
    """One-hot sample of a categorical distribution with the gradient of its soft form.

    Straight-through Gumbel-softmax (Jang et al. 2017).

    Parameters
    ----------
    logits
        Shape (B, C, H, W), float32.
    tau
        Temperature of the softmax whose gradient is taken, > 0.
    generator
        Of the noise, on the device of the logits.
    """
    drawn = torch.rand(logits.shape, generator=generator, device=logits.device)
    noise = -torch.log(-torch.log(drawn.clamp(1e-7, 1 - 1e-7)))
    soft = ((logits + noise) / tau).softmax(1)
    return one_hot(soft.detach()) + soft - soft.detach()


class ThetaEncoder(nn.Module):
    """Contrast of a slice: mean and log-variance of two numbers.

    Four strided convolutions and three fully connected layers as in the paper; between them the
    mean over the brain, so that slices of any size are taken. No norm: intensities are what it
    is about.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in zip((1, 32, 64, 128), (32, 64, 128, 128), strict=True):
            layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Linear(128, 64), nn.LeakyReLU(SLOPE),
            nn.Linear(64, 32), nn.LeakyReLU(SLOPE),
            nn.Linear(32, 2 * THETAS),
        )  # fmt: skip
        for part in (*self.features, *self.head):
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(part.weight, a=SLOPE)
                nn.init.zeros_(cast(Tensor, part.bias))
        with torch.no_grad():  # noise as large as theta itself would hide it from the decoder
            last = cast(nn.Linear, self.head[-1])
            last.weight[THETAS:] *= 0.1
            last.bias[THETAS:] = _FIRST_LOG_VARIANCE

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, H, W), 0 outside the brain, H and W >= 16, to two times (B, 2), float32."""
        inside = functional.avg_pool2d((x != 0).float(), _STRIDES)
        found = (self.features(x).float() * inside).sum((2, 3))
        mean, log_variance = self.head(found / inside.sum((2, 3)).clamp(min=1e-6)).chunk(2, dim=1)
        return mean.float(), log_variance.float().clamp(-12, 4)


class BetaDiscriminator(nn.Module):
    """Whether beta comes from one certain site, as a logit for each patch; spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        widths = (BETAS, 16, 32, 64)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            conv = spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1))
            layers += [conv, nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1)))

    def forward(self, beta: Tensor) -> Tensor:
        """(B, 4, H, W) to (B, 1, H / 8, W / 8), float32."""
        out: Tensor = self.layers(beta).float()
        return out


class CalamitiNetworks(nn.Module):
    """The four networks, and how many steps they were trained, on which the temperature depends.

    Parameters
    ----------
    beta_base, decoder_base
        Channels of the two U-Nets at full resolution; the paper has 8 and 16.
    levels
        How often they halve the size; the paper has 4.
    discriminator
        Whether there is one.
    decay
        Of the Gumbel temperature with every step.
    """

    steps: Tensor

    def __init__(
        self,
        beta_base: int = 8,
        decoder_base: int = 16,
        levels: int = 4,
        discriminator: bool = True,
        decay: float = 2e-4,
    ) -> None:
        super().__init__()
        self.beta_base, self.decoder_base, self.levels = beta_base, decoder_base, levels
        self.decay = decay
        self.beta = SliceUNet(1, BETAS, beta_base, levels, norm=True)
        self.theta = ThetaEncoder()
        self.decoder = SliceUNet(BETAS + THETAS, 1, decoder_base, levels, norm=False)
        self.discriminator = BetaDiscriminator() if discriminator else None
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @property
    def divisor(self) -> int:
        """Height and width of slices must be multiples of it, and at least 16."""
        return int(2**self.levels)

    def config(self) -> dict[str, Any]:
        """Arguments that make the same networks, untrained."""
        return {
            "beta_base": self.beta_base,
            "decoder_base": self.decoder_base,
            "levels": self.levels,
            "discriminator": self.discriminator is not None,
            "decay": self.decay,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CalamitiNetworks:
        """Inverse of `config`."""
        return cls(
            int(config["beta_base"]), int(config["decoder_base"]), int(config["levels"]),
            bool(config["discriminator"]), float(config["decay"]),
        )  # fmt: skip

    def sampled_beta(self, x: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """Anatomy of slices while training, (B, 1, H, W) to (B, 4, H, W), 0 outside the mask."""
        return self.sampled(self.beta(x).float(), mask, generator)

    def sampled(self, logits: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """Anatomy drawn at random from the logits of the labels, both (B, 4, H, W), float32."""
        tau = temperature(int(self.steps), self.decay)
        return gumbel_one_hot(logits, tau, generator) * mask

    def applied_beta(self, x: Tensor, mask: Tensor) -> Tensor:
        """The same without noise: the likeliest channel."""
        return one_hot(self.beta(x).float()) * mask

    def draw(self, beta: Tensor, theta: Tensor, mask: Tensor) -> Tensor:
        """Slices with this anatomy (B, 4, H, W) and contrast (B, 2): (B, 1, H, W)."""
        maps = theta[:, :, None, None].expand(-1, -1, *beta.shape[-2:])
        out: Tensor = self.decoder(torch.cat((beta, maps), dim=1)).float() * mask
        return out

    def last_layers(self) -> tuple[nn.Module, ...]:
        """Of both encoders, those that adaptation to a site changes (paper, 2.4)."""
        last = list(self.beta.up)[-1]
        return last, self.beta.head, self.theta.head


class FusionNetwork(nn.Module):
    """One volume of the three that were drawn slice by slice; starts as their mean.

    Parameters
    ----------
    width
        Channels between the convolutions.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        last = nn.Conv3d(width, 1, 3, padding=1)
        for part in last.parameters():
            nn.init.zeros_(part)
        self.layers = nn.Sequential(
            nn.Conv3d(3, width, 3, padding=1), nn.LeakyReLU(SLOPE),
            nn.Conv3d(width, width, 3, padding=1), nn.LeakyReLU(SLOPE),
            last,
        )  # fmt: skip

    def forward(self, drawn: Tensor) -> Tensor:
        """(B, 3, X, Y, Z) to (B, 1, X, Y, Z), float32."""
        mean = drawn.mean(1, keepdim=True)
        return cast(Tensor, mean + self.layers(drawn).float())
