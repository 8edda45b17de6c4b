"""A scan as CALAMITI sees it: on the model's grid, with its theta, drawn anew, and admitted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bids_harmony.errors import ScanError
from bids_harmony.imaging.layout import Coarse
from bids_harmony.imaging.model_grid import ModelGrid
from bids_harmony.methods.base import Volume
from bids_harmony.methods.calamiti_admission import admit
from bids_harmony.methods.calamiti_drawing import (
    draw_brain,
    drawing_error,
    fused,
    side_for,
    theta_of_brain,
)
from bids_harmony.methods.calamiti_learned import Learned
from bids_harmony.methods.volume_grid import on_model_grid


@dataclass(frozen=True)
class Case:
    """A scan on the model's grid, with its theta and itself drawn across three axes.

    Attributes
    ----------
    grid, image, mask
        The grid, and the scan on it, (X, Y, Z) each, on the CPU.
    theta
        Of the scan.
    drawn
        Drawn with its own theta first, then with the wanted ones.
    error
        `drawing_error` of the first.
    warnings
        What is doubtful about the scan.
    """

    grid: ModelGrid
    image: Tensor
    mask: Tensor
    theta: tuple[float, float]
    drawn: tuple[Tensor, ...]
    error: float
    warnings: tuple[str, ...]

    @classmethod
    def of(
        cls, learned: Learned, volume: Volume, resolution: float, *wanted: tuple[float, float]
    ) -> Case:
        """Draw a scan with its own and the wanted thetas.

        Raises
        ------
        ScanError
            If the brain is unusable, or it is refused (`admit`).
        """
        grid, image, mask = _on_grid(volume, resolution)
        side = _side(learned, image)
        theta = theta_of_brain(learned.networks, image, mask, side)
        drawn = draw_brain(learned.networks, image, mask, [theta, *wanted], side)
        whole = tuple(fused(learned.fusion, part, mask) for part in drawn)
        error = drawing_error(whole[0], image, mask)
        warnings = admit(
            learned.known, volume.modality, name=volume.name or "scan", theta=theta, error=error,
            brain=Coarse(grid.data, grid.mask, grid.spacing),
        )  # fmt: skip
        return cls(grid, image, mask, theta, whole, error, tuple(warnings))


def theta_of_volume(learned: Learned, volume: Volume, resolution: float) -> tuple[float, float]:
    """The two numbers that describe the contrast of a scan.

    Raises
    ------
    ScanError
        If the mask is empty, or the brain constant or not finite.
    """
    _, image, mask = _on_grid(volume, resolution)
    return theta_of_brain(learned.networks, image, mask, _side(learned, image))


def _on_grid(volume: Volume, resolution: float) -> tuple[ModelGrid, Tensor, Tensor]:
    mask = np.asarray(volume.mask, dtype=bool)
    if volume.data.shape != mask.shape:
        raise ScanError(f"{volume.name or 'scan'}: image and brain mask differ in shape")
    grid = on_model_grid(volume, resolution)
    return grid, torch.from_numpy(grid.data), torch.from_numpy(grid.mask)


def _side(learned: Learned, image: Tensor) -> int:
    return side_for(image.shape, learned.side, learned.networks.divisor)
