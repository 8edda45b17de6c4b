"""Layers of the spline flow: squeezing, ActNorm, invertible 1x1 convolutions, conditioner.

Activations have their channels first of all, (C, B, H, W), so that a 1x1 convolution is a matrix
product and each spline parameter is one long row.
Parameters have the names and shapes of the `nflows` modules from which the classes derive.
"""

from __future__ import annotations

import torch
from nflows.nn.nets import ConvResidualNet
from nflows.nn.nets.resnet import ConvResidualBlock
from nflows.transforms import ActNorm as BaseActNorm
from nflows.transforms import OneByOneConvolution
from torch import Tensor, nn
from torch.nn import functional

#: Below this standard deviation a channel counts as constant.
CONSTANT = 1e-6

#: A map of channels: (W, b) of y = W x + b.
MatrixBias = tuple[Tensor, Tensor]


def squeeze(h: Tensor) -> Tensor:
    """(C, B, H, W) to (4 C, B, H/2, W/2); the four pixels of a block are neighbours in C."""
    c, b, height, width = h.shape
    blocks = h.reshape(c, b, height // 2, 2, width // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(4 * c, b, height // 2, width // 2)


def unsqueeze(h: Tensor) -> Tensor:
    """The inverse of `squeeze`."""
    c, b, height, width = h.shape
    blocks = h.reshape(c // 4, 2, 2, b, height, width).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(c // 4, b, 2 * height, 2 * width)


def pointwise(h: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """The channel map y = W x + b at every location of `h` (C, B, H, W), in its own precision."""
    with torch.autocast(h.device.type, enabled=False):
        return torch.addmm(bias.unsqueeze(-1), matrix, h.flatten(1)).view(h.shape)


def joined(first: MatrixBias, second: MatrixBias) -> MatrixBias:
    """The channel map that does `first`, then `second`."""
    matrix, bias = second
    with torch.autocast(matrix.device.type, enabled=False):
        return matrix @ first[0], torch.mv(matrix, first[1]) + bias


class ActNorm(BaseActNorm):
    """Scale and shift of each channel, set by the first batch (Kingma & Dhariwal 2018, 3.1)."""

    def initialize(self, x: Tensor) -> None:
        """Give each channel of `x` (C, ...) mean 0 and deviation 1; a constant one mean 0."""
        with torch.no_grad():
            flat = x.flatten(1)
            std = flat.std(dim=1, correction=0)
            std = torch.where(std > CONSTANT, std, torch.ones_like(std))
            self.log_scale.copy_(-std.log())
            self.shift.copy_(-flat.mean(dim=1) / std)
            self.initialized.fill_(True)

    def matrix_bias(self) -> MatrixBias:
        """The layer as a map of channels."""
        return torch.diag(self.log_scale.exp()), self.shift

    def inverse_matrix_bias(self) -> MatrixBias:
        """The inverse map, in double precision."""
        scale = (-self.log_scale.double()).exp()
        return torch.diag(scale), -scale * self.shift.double()


class PointwiseConvolution(OneByOneConvolution):
    """Invertible 1x1 convolution with LU-decomposed weights (Kingma & Dhariwal 2018, 3.2)."""

    def matrix_bias(self) -> MatrixBias:
        """The layer as a map of channels."""
        lower, upper = self._create_lower_upper()
        with torch.autocast(lower.device.type, enabled=False):
            return (lower @ upper)[:, self.permutation._inverse_permutation], self.bias

    def inverse_matrix_bias(self) -> MatrixBias:
        """The inverse map, in double precision."""
        lower, upper = (part.double() for part in self._create_lower_upper())
        eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        half = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        whole = torch.linalg.solve_triangular(upper, half, upper=True)
        matrix = whole[self.permutation._inverse_permutation]
        return matrix, -torch.mv(matrix, self.bias.double())


class Conditioner(ConvResidualNet):
    """Residual network of a coupling (Durkan et al. 2019, B.2), channels first in and out."""

    def __init__(
        self, inputs: int, outputs: int, hidden: int, blocks: int, batch_norm: bool
    ) -> None:
        super().__init__(inputs, outputs, hidden, num_blocks=blocks, use_batch_norm=batch_norm)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """(inputs, B, H, W) to (outputs, B, H, W), the outputs multiplied by `scale`."""
        first, last = self.initial_layer, self.final_layer
        flat = functional.linear(x.flatten(1).t(), first.weight.flatten(1), first.bias)
        h = flat.view(*x.shape[1:], -1).permute(0, 3, 1, 2)
        for block in self.blocks:
            h = self._block(block, h)
        flat = h.permute(0, 2, 3, 1).flatten(0, 2).t()
        weight, bias = last.weight.flatten(1) * scale.unsqueeze(-1), last.bias * scale
        return torch.addmm(bias.unsqueeze(-1), weight, flat).view(-1, *x.shape[1:])

    def _block(self, block: ConvResidualBlock, h: Tensor) -> Tensor:
        if not block.use_batch_norm:
            return block.conv_layers[1](torch.relu_(block.conv_layers[0](torch.relu(h)))).add_(h)
        first, second = block.batch_norm_layers
        inner = torch.relu_(first(h))
        if self.training:
            inner = second(block.conv_layers[0](inner))
        else:
            weight, bias = folded(block.conv_layers[0], second)
            inner = functional.conv2d(inner, weight, bias, padding=1)
        return block.conv_layers[1](torch.relu_(inner)).add_(h)


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> MatrixBias:
    """Weight and bias of the convolution that does `conv`, then `norm` with running statistics."""
    mean, variance, shift = norm.running_mean, norm.running_var, conv.bias
    if mean is None or variance is None or shift is None:
        raise ValueError("a convolution with bias and a norm with running statistics are needed")
    scale = norm.weight / torch.sqrt(variance + norm.eps)
    return conv.weight * scale[:, None, None, None], (shift - mean) * scale + norm.bias
