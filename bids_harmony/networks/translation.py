"""Networks of the learned comparators: slices of one site drawn as those of another."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from bids_harmony.networks.modules import Modules
from bids_harmony.networks.slice_unet import SliceUNet

#: Numbers of a style.
STYLE = 16
_LEAK = 0.2


class SliceTranslator(nn.Module):
    """A U-Net whose output is added to the slice; untrained, it changes nothing.

    Parameters
    ----------
    base
        Channels at full resolution.
    levels
        How often the size is halved.
    """

    def __init__(self, base: int = 16, levels: int = 3) -> None:
        super().__init__()
        self.base, self.levels = base, levels
        self.unet = SliceUNet(1, 1, base, levels, norm=False)
        for part in self.unet.head.parameters():
            nn.init.zeros_(part)

    @property
    def divisor(self) -> int:
        """Height and width of slices must be multiples of it."""
        return int(2**self.levels)

    def config(self) -> dict[str, Any]:
        """Arguments that make the same network, untrained."""
        return {"base": self.base, "levels": self.levels}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SliceTranslator:
        """Inverse of `config`."""
        return cls(int(config["base"]), int(config["levels"]))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Slices (B, 1, H, W) as the other site shows them, float32, 0 outside the mask."""
        out: Tensor = (x + self.unet(x).float()) * mask
        return out


class PatchDiscriminator(nn.Module):
    """Whether a slice is real, as a number for each patch of 78 pixels; spectral norm.

    Parameters
    ----------
    base
        Channels of the first convolution.
    sites
        Numbers for each patch: one for each site that a slice can be taken for.
    """

    def __init__(self, base: int = 16, sites: int = 1) -> None:
        super().__init__()
        widths = (1, base, 2 * base, 4 * base, 8 * base)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            conv = nn.Conv2d(a, b, 4, stride=2, padding=1)
            # the norm takes their scale away; larger weights turn more slowly under Adam
            nn.init.kaiming_normal_(conv.weight, a=_LEAK)
            layers += [spectral_norm(conv), nn.LeakyReLU(_LEAK)]
        last = nn.Conv2d(widths[-1], sites, 3, padding=1)
        self.layers = nn.Sequential(*layers, spectral_norm(last))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) to (B, sites, H / 16, W / 16), rounded down, float32; H, W from 16 on."""
        out: Tensor = self.layers(x).float()
        return out


class CycleNetworks(nn.Module):
    """CycleGAN (Zhu et al. 2017): a translator and a discriminator for each of two sites.

    Parameters
    ----------
    base, levels
        Of the translators.
    """

    def __init__(self, base: int = 16, levels: int = 3) -> None:
        super().__init__()
        self.to_reference = SliceTranslator(base, levels)
        self.to_other = SliceTranslator(base, levels)
        self.judges = Modules((PatchDiscriminator(base), PatchDiscriminator(base)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Slices of the other site as the reference shows them."""
        out: Tensor = self.to_reference(x, mask)
        return out


class StyleEncoder(nn.Module):
    """Style of slices: a few numbers each; mean over the brain, so that any size is taken."""

    def __init__(self, base: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in pairwise((1, base, 2 * base, 4 * base, 4 * base)):
            layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.LeakyReLU(_LEAK)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(4 * base, STYLE)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W), 0 outside the brain, H and W at least 16, to (B, 16), float32."""
        inside = functional.avg_pool2d((x != 0).float(), 16)
        total = (self.features(x).float() * inside).sum((2, 3))
        out: Tensor = self.head(total / inside.sum((2, 3)).clamp(min=1e-6)).float()
        return out


class _Styled(nn.Module):
    """Instance norm whose scale and shift come from the style, LeakyReLU, convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(inputs)
        self.turn = nn.Linear(STYLE, 2 * inputs)
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        nn.init.kaiming_normal_(self.conv.weight, a=_LEAK)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale, shift = self.turn(style)[:, :, None, None].chunk(2, dim=1)
        x = functional.leaky_relu(self.norm(x) * (1 + scale) + shift, _LEAK)
        out: Tensor = self.conv(x)
        return out


class StyleNetworks(nn.Module):
    """StarGAN v2 (Choi et al. 2020) with the style of reference slices, as in Liu et al. (2021).

    One translator for all sites takes the wanted style from another slice; a style encoder and
    a discriminator train with it. Slices are drawn anew, not changed by addition.

    Parameters
    ----------
    base, levels
        Channels at full resolution, and how often the size is halved.
    sites
        Of the training; the discriminator looks at each by itself.
    """

    def __init__(self, base: int = 16, levels: int = 2, sites: int = 1) -> None:
        super().__init__()
        self.base, self.levels, self.sites = base, levels, sites
        widths = [base * 2**level for level in range(levels + 1)]
        self.first = nn.Conv2d(1, base, 3, padding=1)
        self.down = Modules(
            nn.Sequential(
                nn.InstanceNorm2d(a, affine=True), nn.LeakyReLU(_LEAK),
                nn.Conv2d(a, b, 3, padding=1), nn.AvgPool2d(2),
            )
            for a, b in pairwise(widths)
        )  # fmt: skip
        self.middle = Modules(_Styled(widths[-1], widths[-1]) for _ in range(2))
        self.up = Modules(_Styled(b, a) for a, b in list(pairwise(widths))[::-1])
        self.last = _Styled(base, 1)
        self.encoder = StyleEncoder(base)
        self.judge = PatchDiscriminator(base, sites)

    @property
    def divisor(self) -> int:
        """Height and width of slices must be multiples of it, and at least 16."""
        return int(2**self.levels)

    def config(self) -> dict[str, Any]:
        """Arguments that make the same networks, untrained."""
        return {"base": self.base, "levels": self.levels, "sites": self.sites}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> StyleNetworks:
        """Inverse of `config`."""
        return cls(int(config["base"]), int(config["levels"]), int(config.get("sites", 1)))

    def draw(self, x: Tensor, style: Tensor, mask: Tensor) -> Tensor:
        """Slices (B, 1, H, W) in styles (B, 16), float32, 0 outside the mask."""
        h = self.first(x)
        taps = []
        for block in self.down:
            taps.append(h)
            h = block(h)
        for styled in self.middle:
            h = h + styled(h, style)
        for styled, tap in zip(self.up, taps[::-1], strict=True):
            h = functional.interpolate(h, scale_factor=2, mode="nearest-exact")
            h = styled(h, style) + tap
        out: Tensor = self.last(h, style).float() * mask
        return out
