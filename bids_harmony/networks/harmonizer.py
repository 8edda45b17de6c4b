"""The harmonizer of Harmonizing Flows: a small U-Net that changes a slice as little as needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bids_harmony.networks.modules import Modules

ACTIVATIONS = ("concat-elu", "leaky-relu")


class HarmonizerUNet(nn.Module):
    """U-Net whose output is ``gain * slice + bias`` (Beizaee et al., Harmonizing Flows).

    The gain is one number for each slice, from the bottleneck; the bias is a map. Both start as
    the identity. No normalisation layers: intensities are what it is about.

    Parameters
    ----------
    slices
        Neighbouring slices seen, odd; the middle one is changed.
    widths
        Channels of each level.
    activation
        ``concat-elu`` (the paper's: doubles the channels that the next layer sees) or
        ``leaky-relu`` (half the cost).

    Raises
    ------
    ValueError
        If `slices` is even, or the activation unknown.
    """

    def __init__(
        self,
        slices: int = 1,
        widths: Sequence[int] = (16, 32, 48, 64, 64),
        activation: str = "concat-elu",
    ) -> None:
        super().__init__()
        if slices < 1 or slices % 2 == 0:
            raise ValueError(f"an odd number of slices is needed, not {slices}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}")
        self.slices, self.widths, self.activation = slices, tuple(widths), activation
        inputs = (slices, *self.widths[:-1])
        self.down = Modules(
            _Block(a, b, activation) for a, b in zip(inputs, self.widths, strict=True)
        )
        self.up = Modules(
            _Block(a + b, b, activation)
            for a, b in zip(self.widths[:0:-1], self.widths[-2::-1], strict=True)
        )
        self.gain = nn.Linear(self.widths[-1], 1)
        self.bias = nn.Conv2d(self.widths[0], 1, 1)
        for part in (*self.gain.parameters(), *self.bias.parameters()):
            nn.init.zeros_(part)

    @property
    def divisor(self) -> int:
        """Height and width must be multiples of it."""
        return 2 ** (len(self.widths) - 1)

    def config(self) -> dict[str, Any]:
        """Arguments that make the same network, untrained."""
        return {
            "slices": self.slices,
            "widths": list(self.widths),
            "activation": self.activation,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HarmonizerUNet:
        """Inverse of `config`."""
        return cls(int(config["slices"]), config["widths"], str(config["activation"]))

    def forward(self, x: Tensor) -> Tensor:
        """The middle slice, changed: (B, `slices`, H, W) to (B, 1, H, W).

        Raises
        ------
        ValueError
            If H or W is not a multiple of `divisor`.
        """
        if x.shape[-2] % self.divisor or x.shape[-1] % self.divisor:
            raise ValueError(f"image size must be a multiple of {self.divisor}: pad or crop")
        middle = x[:, self.slices // 2, None]
        taps = []
        for level, block in enumerate(self.down):
            x = block(functional.max_pool2d(x, 2) if level else x)
            taps.append(x)
        # over the brain only: the answer must not depend on the zeros around it
        inside = functional.avg_pool2d((middle != 0).float(), self.divisor)
        total = inside.sum(dim=(2, 3)).clamp(min=1e-6)
        gain = self.gain((x * inside).sum(dim=(2, 3)) / total)[:, :, None, None]
        for block, tap in zip(self.up, taps[-2::-1], strict=True):
            x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = block(torch.cat((x, tap), dim=1))
        out: Tensor = (1 + gain) * middle + self.bias(x)
        return out


class _Block(nn.Module):
    """Twice activation and 3 x 3 convolution, the activation before it where it is ConcatELU."""

    def __init__(self, inputs: int, outputs: int, activation: str) -> None:
        super().__init__()
        self.concat = activation == "concat-elu"
        factor = 2 if self.concat else 1
        self.first = nn.Conv2d(factor * inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(factor * outputs, outputs, 3, padding=1)
        for layer in (self.first, self.second):
            nn.init.kaiming_normal_(layer.weight, a=0.1)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.concat:
            x = self.first(functional.elu(torch.cat((x, -x), dim=1)))
            out: Tensor = self.second(functional.elu(torch.cat((x, -x), dim=1)))
            return out
        x = functional.leaky_relu(self.first(x), 0.1)
        return functional.leaky_relu(self.second(x), 0.1)
