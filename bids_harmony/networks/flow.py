"""What every normalizing flow offers: exact densities in place, bits per dimension, samples.

A flow maps an image x to latents z that are standard normal under the model, so that
``log p(x) = log N(z) + log |det dz/dx|``. Every term of this sum has a place in the image: the
log-determinant of an element-wise map belongs to its element, that of a 1x1 convolution is the
same at every location, and log N(z) belongs to the element of z. `Flow.forward` therefore gives
log p(x) as maps, one for each grid on which the flow works, whose sum over everything is exactly
log p(x).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bids_harmony.networks.dequantize import UniformNoise, VariationalNoise, round_to_levels

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class Encoding(NamedTuple):
    """An image as its flow sees it.

    Attributes
    ----------
    latents
        Finest first, (B, C_i, H_i, W_i) each.
    densities
        log p(x) in nats by place, (B, 1, H_j, W_j) for each grid on which the flow works, finest
        first; their sum is log p(x).
    """

    latents: list[Tensor]
    densities: list[Tensor]


class Flow(nn.Module, ABC):
    """A normalizing flow of 2-D images (B, `channels`, H, W), intensities about 0..1.

    With batch normalization in its networks a flow is one fixed map in eval mode only; in training
    mode the statistics of the batch stand for the running ones.

    Attributes
    ----------
    channels
        Image channels.
    divisor
        H and W must be multiples of it.
    grey_levels
        Images count as rounded to multiples of 1 / `grey_levels` when bits are counted.
    """

    channels: int
    divisor: int
    grey_levels: int
    noise: UniformNoise | VariationalNoise

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Latents, and log-determinants as maps (B, 1, H_j, W_j), finest grid first."""

    @abstractmethod
    def decode(self, latents: list[Tensor]) -> Tensor:
        """The image with these latents, unchecked."""

    @abstractmethod
    def latent_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """(C_i, H_i, W_i) of each latent of an image of this size."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON-serialisable settings from which `build_flow` makes the same flow, untrained."""

    def forward(self, x: Tensor) -> Encoding:
        """Latents and log p(x) by place.

        Raises
        ------
        ValueError
            If `x` is not (B, `channels`, H, W) with H and W multiples of `divisor`.
        """
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"expected (B, {self.channels}, H, W), got {tuple(x.shape)}")
        self._check_size(x.shape[2], x.shape[3])
        latents, maps = self.encode(x)
        densities = list(maps)
        for latent in latents:
            place = [m.shape[-2:] for m in maps].index(latent.shape[-2:])
            normal = -0.5 * latent.square() - HALF_LOG_TWO_PI
            densities[place] = densities[place] + normal.sum(dim=1, keepdim=True)
        return Encoding(latents, densities)

    def inverse(self, latents: list[Tensor]) -> Tensor:
        """The image (B, `channels`, H, W) whose latents these are.

        Raises
        ------
        ValueError
            If the latents are not those of one image size.
        """
        height, width = (self.divisor * size for size in latents[-1].shape[-2:])
        wanted = self.latent_shapes(height, width)
        if [tuple(latent.shape[1:]) for latent in latents] != wanted:
            raise ValueError(f"expected latents of shapes {wanted}")
        return self.decode(latents)

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-density of each image, in nats, shape (B,)."""
        return sum_over_image(self(x).densities)

    def bits_per_dim(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Bits for each brain voxel, shape (B,): lower is likelier under the model.

        The maps of log p(x) are weighted with the mask, averaged down to the grid of each map,
        summed, and divided by -ln 2 times the number of brain voxels; log2 `grey_levels` is added,
        as if intensities were rounded to `grey_levels` steps from 0 to 1. An all-one mask gives
        -log2 p(x) / (C H W) + log2 `grey_levels` exactly. With any other mask it is that share of
        -log p(x) which falls into the mask, a local mean and not the density of the brain alone:
        a flow must not be *trained* on it, because it could then move the bits it saves inside
        the mask to the outside, where nothing counts them.

        Parameters
        ----------
        x
            Shape (B, C, H, W).
        mask
            Brain mask, (B, 1, H, W), 0..1; None for the whole image.

        Raises
        ------
        ValueError
            If the shapes do not fit, or a mask is empty.
        """
        return self._bits(self(x).densities, x, mask)

    def bits_bound(
        self, x: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """One draw of the dequantization bound on the bits per dimension: the training loss.

        The image is rounded to `grey_levels` and noise is added within each step, so that regions
        of one value (the background) have no infinite density. Flow++, Ho et al. 2019, eq. 12:
        log P(x) >= E_q[log p(x + u) - log q(u | x)]; uniform noise has q = 1. Train without
        `mask`, see `bits_per_dim`. `generator` must be on the device of `x`.
        """
        rounded = round_to_levels(x, self.grey_levels)
        noise, log_noise = self.noise(rounded, generator)
        densities = self(rounded + noise / self.grey_levels).densities
        return self._bits([*densities, -log_noise], x, mask)

    def sample(
        self,
        count: int,
        height: int,
        width: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Images drawn from the model, (count, `channels`, height, width).

        `temperature` is the standard deviation of the latents: below 1 it gives likelier images.
        `generator` must be on the device of the flow.

        Raises
        ------
        ValueError
            If the size is not a multiple of `divisor`.
        """
        self._check_size(height, width)
        like = next(self.parameters())
        latents = [
            temperature
            * torch.randn(count, *shape, device=like.device, dtype=like.dtype, generator=generator)
            for shape in self.latent_shapes(height, width)
        ]
        return self.decode(latents)

    def _check_size(self, height: int, width: int) -> None:
        if min(height, width) < 1 or height % self.divisor or width % self.divisor:
            raise ValueError(
                f"image size {height} x {width} must be a multiple of {self.divisor}: pad or crop"
            )

    def _bits(self, densities: list[Tensor], x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            mask = x.new_ones(len(x), 1, *x.shape[-2:])
        if mask.shape != (len(x), 1, *x.shape[-2:]):
            raise ValueError(f"mask {tuple(mask.shape)} does not fit image {tuple(x.shape)}")
        mask = mask.to(x.dtype)
        voxels = mask.sum(dim=(1, 2, 3)) * self.channels
        if not bool((voxels > 0).all()):
            raise ValueError("the mask of an image is empty")
        weighted = [m * pooled(mask, m) for m in densities]
        bits = -sum_over_image(weighted) / (math.log(2) * voxels)
        return bits + math.log2(self.grey_levels)


def pooled(mask: Tensor, like: Tensor) -> Tensor:
    """The mean of the mask over each cell of the coarser grid of `like`."""
    return functional.avg_pool2d(mask, mask.shape[-1] // like.shape[-1])


def sum_over_image(maps: list[Tensor]) -> Tensor:
    """Sum of maps (B, 1, H_j, W_j) over places and grids, shape (B,)."""
    return torch.stack([m.sum(dim=(1, 2, 3)) for m in maps]).sum(dim=0)


def build_flow(config: Mapping[str, Any]) -> Flow:
    """The untrained flow that `Flow.config` describes.

    Raises
    ------
    ValueError
        If the kind of flow is unknown.
    """
    from bids_harmony.networks.affine_flow import AffineFlow
    from bids_harmony.networks.spline_flow import SplineFlow

    kinds: dict[str, type[Flow]] = {"affine": AffineFlow, "spline": SplineFlow}
    settings = dict(config)
    kind = settings.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"unknown kind of flow {kind!r}: expected one of {sorted(kinds)}")
    return kinds[kind](**settings)
