"""Affine couplings with bounded scale, on a checkerboard or on channels, and their network."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from bids_harmony.networks.modules import Modules


class ConcatELU(nn.Module):
    """ELU of x and of -x, side by side: twice the channels."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 2 C, H, W)."""
        return functional.elu(torch.cat((x, -x), dim=1))


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of each location."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape, (B, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Stage(nn.Sequential):
    """ConcatELU, 3 x 3 convolution, normalization over channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            ConcatELU(), nn.Conv2d(2 * inputs, outputs, 3, padding=1), ChannelNorm(outputs)
        )


class SmallUNet(nn.Module):
    """U-Net of one stage per level and direction; any image size.

    The last convolution starts at zero, so that a coupling starts as the identity.

    Parameters
    ----------
    inputs, outputs
        Channels.
    widths
        Channels of each level, finest first.
    """

    def __init__(self, inputs: int, outputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, widths[0], 3, padding=1)
        before = (widths[0], *widths[:-1])
        self.down = Modules(Stage(a, b) for a, b in zip(before, widths, strict=True))
        pairs = pairwise(widths)
        self.up = Modules(Stage(fine + coarse, fine) for fine, coarse in pairs)
        self.last = nn.Conv2d(2 * widths[0], outputs, 1)
        self.elu = ConcatELU()
        nn.init.zeros_(self.last.weight)
        if self.last.bias is not None:
            nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        h = self.first(x.contiguous(memory_format=torch.channels_last))
        skips = []
        for i, stage in enumerate(self.down):
            if i:
                h = functional.avg_pool2d(h, 2, ceil_mode=True)
            h = stage(h)
            skips.append(h)
        for stage, skip in zip(reversed(self.up), reversed(skips[:-1]), strict=True):
            h = functional.interpolate(h, size=skip.shape[-2:], mode="nearest")
            h = stage(torch.cat((skip, h), dim=1))
        return self.last(self.elu(h))


class BoundedScale(nn.Module):
    """log-scale s = tanh(raw / e^g) e^g for each channel, with learned g (Harmonizing Flows)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(channels))

    def forward(self, raw: Tensor) -> Tensor:
        """Bounded to (-e^g, e^g), (B, C, H, W)."""
        bound = self.g.exp().view(1, -1, 1, 1)
        return torch.tanh(raw / bound) * bound


class CheckerboardCoupling(nn.Module):
    """Every other pixel is scaled and shifted, given the rest (Dinh et al. 2017, Real NVP, 3.4).

    Parameters
    ----------
    channels
        Image channels.
    widths
        Channels of each level of the network.
    odd
        Which of the two colours of the board changes.
    context
        Channels of an image that the network sees besides; 0 for none.
    """

    def __init__(
        self, channels: int, widths: tuple[int, ...], *, odd: bool, context: int = 0
    ) -> None:
        super().__init__()
        self.odd = odd
        self.network = SmallUNet(channels + context, 2 * channels, widths)
        self.bounded = BoundedScale(channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The image after the coupling, and the log-scale of each element, (B, C, H, W)."""
        log_scale, shift = self._scale_shift(x, context)
        return x * log_scale.exp() + shift, log_scale

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """The image before the coupling."""
        log_scale, shift = self._scale_shift(y, context)
        return (y - shift) * (-log_scale).exp()

    def _scale_shift(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        changed = self._changed(x)
        seen = x.masked_fill(changed, 0)
        if context is not None:
            seen = torch.cat((seen, context), dim=1)
        raw, shift = self.network(seen).to(x.dtype).chunk(2, dim=1)
        return self.bounded(raw).masked_fill(~changed, 0), shift.masked_fill(~changed, 0)

    def _changed(self, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[2], device=x.device).view(-1, 1)
        columns = torch.arange(x.shape[3], device=x.device)
        return (rows + columns + int(self.odd)) % 2 == 0


class ChannelCoupling(nn.Module):
    """One half of the channels is scaled and shifted, given the other half.

    Parameters
    ----------
    channels
        Number of channels, even.
    widths
        Channels of each level of the network.
    odd
        True: the second half changes; False: the first.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], *, odd: bool) -> None:
        super().__init__()
        self.odd = odd
        self.network = SmallUNet(channels // 2, channels, widths)
        self.bounded = BoundedScale(channels // 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tensor after the coupling, and its log-determinant by place (B, 1, H, W)."""
        changed, given = self._halves(x)
        log_scale, shift = self._scale_shift(given)
        y = self._join(changed * log_scale.exp() + shift, given)
        return y, log_scale.sum(dim=1, keepdim=True)

    def inverse(self, y: Tensor) -> Tensor:
        """The tensor before the coupling."""
        changed, given = self._halves(y)
        log_scale, shift = self._scale_shift(given)
        return self._join((changed - shift) * (-log_scale).exp(), given)

    def _scale_shift(self, given: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self.network(given).to(given.dtype).chunk(2, dim=1)
        return self.bounded(raw), shift

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, dim=1)
        return (second, first) if self.odd else (first, second)

    def _join(self, changed: Tensor, given: Tensor) -> Tensor:
        return torch.cat((given, changed) if self.odd else (changed, given), dim=1)
