"""The flow of BlindHarmony: a Glow-type multiscale neural spline flow."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bids_harmony.networks.dequantize import UniformNoise
from bids_harmony.networks.flow import Flow
from bids_harmony.networks.keep import Keeper
from bids_harmony.networks.layers import (
    ActNorm,
    Conditioner,
    PointwiseConvolution,
    joined,
    pointwise,
    squeeze,
    unsqueeze,
)
from bids_harmony.networks.modules import Modules
from bids_harmony.networks.spline import rational_quadratic


class Step(nn.Module):
    """ActNorm, 1x1 convolution, spline coupling, 1x1 convolution on `channels` channels.

    The first half of the channels is transformed, given the second half.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        blocks: int,
        bins: int,
        tail_bound: float,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        self.changed, self.bins, self.tail_bound = channels // 2, bins, tail_bound
        self.act_norm = ActNorm(channels)
        self.mix_in = PointwiseConvolution(channels)
        given, wanted = channels - self.changed, self.changed * (3 * bins - 1)
        self.conditioner = Conditioner(given, wanted, hidden, blocks, batch_norm)
        self.mix_out = PointwiseConvolution(channels)
        # Widths and heights are scaled down by sqrt(hidden), so that bins start about equal.
        scale = torch.ones(self.changed, 3 * bins - 1)
        scale[:, : 2 * bins] = 1 / math.sqrt(hidden)
        self.register_buffer("scale", scale.flatten(), persistent=False)

    def couple(self, h: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """The spline coupling of `h` (C, B, H, W); also its log-determinant (1, B, H, W)."""
        changed, given = h.split((self.changed, len(h) - self.changed))
        parameters = self.conditioner(given, self.scale).to(h.dtype)
        parameters = parameters.reshape(self.changed, 3 * self.bins - 1, -1)
        flat, log_slope = rational_quadratic(
            changed.flatten(1), parameters, self.tail_bound, inverse=inverse
        )
        out = torch.cat((flat.view(changed.shape), given))
        return out, log_slope.sum(dim=0).view(1, *h.shape[1:])


class Maps(NamedTuple):
    """The channel maps of a level, before each coupling and after the last: W h + b."""

    matrices: list[Tensor]
    biases: list[Tensor]
    log_det: Tensor


class Level(nn.Module):
    """The steps on one grid. What lies between two couplings is one matrix product."""

    def __init__(self, channels: int, steps: int, **sizes: Any) -> None:
        super().__init__()
        self.steps = Modules(Step(channels, **sizes) for _ in range(steps))
        self.keeper = Keeper()

    def encode(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """`h` (C, B, H, W) after all steps; log-determinant map (1, B, H, W)."""
        if self.training:
            self._initialize(h)
        maps = self._maps()
        total = maps.log_det
        for step, matrix, bias in zip(self.steps, maps.matrices, maps.biases, strict=False):
            h, log_det = step.couple(pointwise(h, matrix, bias))
            total = total + log_det
        return pointwise(h, maps.matrices[-1], maps.biases[-1]), total

    def decode(self, h: Tensor) -> Tensor:
        """The inverse of `encode`."""
        maps = self._inverse_maps()
        h = pointwise(h, maps.matrices[-1], maps.biases[-1])
        rest = list(zip(self.steps, maps.matrices, maps.biases, strict=False))
        for step, matrix, bias in reversed(rest):
            h = pointwise(step.couple(h, inverse=True)[0], matrix, bias)
        return h

    def _initialize(self, h: Tensor) -> None:
        """Set the ActNorms that have not seen data yet."""
        seen = [step.act_norm.initialized for step in self.steps]
        if self.keeper.get("seen", seen, lambda: all(bool(value) for value in seen)):
            return
        with torch.no_grad():
            for step in self.steps:
                if not bool(step.act_norm.initialized):
                    step.act_norm.initialize(h)
                h = pointwise(h, *joined(step.act_norm.matrix_bias(), step.mix_in.matrix_bias()))
                h = pointwise(step.couple(h)[0], *step.mix_out.matrix_bias())

    def _maps(self) -> Maps:
        def make() -> Maps:
            first = [
                joined(step.act_norm.matrix_bias(), step.mix_in.matrix_bias())
                for step in self.steps
            ]
            last = [step.mix_out.matrix_bias() for step in self.steps]
            between = [joined(a, b) for a, b in zip(last[:-1], first[1:], strict=True)]
            matrices, biases = zip(first[0], *between, last[-1], strict=True)
            return Maps(list(matrices), list(biases), self._log_det())

        return self.keeper.get("forward", self._sources(), make)

    def _inverse_maps(self) -> Maps:
        """Maps as in `_maps`, each inverted: made in double precision from the LU factors."""

        def make() -> Maps:
            first = [
                joined(step.mix_in.inverse_matrix_bias(), step.act_norm.inverse_matrix_bias())
                for step in self.steps
            ]
            last = [step.mix_out.inverse_matrix_bias() for step in self.steps]
            between = [joined(b, a) for a, b in zip(last[:-1], first[1:], strict=True)]
            dtype = next(self.parameters()).dtype
            matrices, biases = zip(first[0], *between, last[-1], strict=True)
            return Maps(
                [m.to(dtype) for m in matrices], [b.to(dtype) for b in biases], -self._log_det()
            )

        return self.keeper.get("inverse", self._sources(), make)

    def _log_det(self) -> Tensor:
        """Log-determinant of all maps of the level at one location."""
        parts = [
            step.act_norm.log_scale.sum() + step.mix_in.logabsdet() + step.mix_out.logabsdet()
            for step in self.steps
        ]
        return torch.stack(parts).sum()

    def _sources(self) -> list[Tensor]:
        return [
            parameter
            for step in self.steps
            for layer in (step.act_norm, step.mix_in, step.mix_out)
            for parameter in layer.parameters()
        ]


class SplineFlow(Flow):
    """Multiscale neural spline flow (Kim et al. 2023, BlindHarmony; Durkan et al. 2019).

    Each level squeezes 2 x 2 pixels into channels and does `steps` steps; all levels but the last
    then give half of the channels away as latents.

    The defaults are those of BlindHarmony (14.5 million parameters at one channel). For training
    on a CPU: 3 levels of 4 steps, hidden 16, 1 block (83 thousand parameters).

    Parameters
    ----------
    channels
        Image channels.
    levels, steps
        Levels, and steps in each.
    hidden, blocks, batch_norm
        Channels and residual blocks of each coupling's network, and whether it has batch norm.
    bins, tail_bound
        Bins of the splines; outside [-tail_bound, tail_bound] a spline is the identity.
    grey_levels
        See `Flow`.

    Raises
    ------
    ValueError
        If a size is not positive, or there are less than two bins.
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        levels: int = 4,
        steps: int = 7,
        hidden: int = 96,
        blocks: int = 3,
        bins: int = 8,
        tail_bound: float = 3.0,
        batch_norm: bool = True,
        grey_levels: int = 256,
    ) -> None:
        super().__init__()
        if min(channels, levels, steps, hidden, blocks, bins - 1, grey_levels, tail_bound) <= 0:
            raise ValueError("sizes of a spline flow must be positive, with two bins or more")
        self.channels, self.divisor, self.grey_levels = channels, 2**levels, grey_levels
        self._steps = steps
        self._sizes = {
            "hidden": hidden,
            "blocks": blocks,
            "bins": bins,
            "tail_bound": tail_bound,
            "batch_norm": batch_norm,
        }
        self.noise = UniformNoise()
        self.levels = Modules(
            Level(channels * 2 ** (level + 2), steps, **self._sizes) for level in range(levels)
        )

    def config(self) -> dict[str, Any]:
        """JSON-serialisable settings from which `build_flow` makes the same flow, untrained."""
        return {
            "kind": "spline",
            "channels": self.channels,
            "levels": len(self.levels),
            "steps": self._steps,
            **self._sizes,
            "grey_levels": self.grey_levels,
        }

    def encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Latents, and log-determinants as maps (B, 1, H_j, W_j), finest grid first."""
        h = x.transpose(0, 1)
        latents, maps = [], []
        for level in self.levels:
            h, log_det = level.encode(squeeze(h))
            maps.append(log_det.transpose(0, 1))
            if level is not self.levels[-1]:
                latent, h = h.chunk(2)
                latents.append(latent.transpose(0, 1))
        return [*latents, h.transpose(0, 1)], maps

    def decode(self, latents: list[Tensor]) -> Tensor:
        """The image with these latents, unchecked."""
        h = latents[-1].transpose(0, 1)
        for level, latent in zip(
            reversed(self.levels), [*reversed(latents[:-1]), None], strict=True
        ):
            h = unsqueeze(level.decode(h))
            if latent is not None:
                h = torch.cat((latent.transpose(0, 1), h))
        return h.transpose(0, 1)

    def latent_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """(C_i, H_i, W_i) of each latent of an image of this size."""
        count = len(self.levels)
        shapes = [
            (self.channels * 2 ** (i + 1), height >> (i + 1), width >> (i + 1))
            for i in range(count)
        ]
        channels, *grid = shapes[-1]
        return [*shapes[:-1], (2 * channels, grid[0], grid[1])]

    def train(self, mode: bool = True) -> SplineFlow:
        """Switch between training and evaluation; what was kept of the parameters is dropped."""
        for level in self.levels:
            level.keeper.forget()
        return super().train(mode)
