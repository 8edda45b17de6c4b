"""A volume of the contract on the grid of a network."""

from __future__ import annotations

import numpy as np

from bids_harmony.errors import ScanError
from bids_harmony.imaging.model_grid import ModelGrid, to_model_grid
from bids_harmony.imaging.quantiles import brain_values
from bids_harmony.methods.base import Volume


def on_model_grid(volume: Volume, resolution: float) -> ModelGrid:
    """A volume on the model's grid.

    Raises
    ------
    ScanError
        If the mask is empty, or the brain constant or not finite; it names the scan.
    """
    name, mask = volume.name or "scan", np.asarray(volume.mask, dtype=bool)
    brain_values(volume.data, mask, name)
    try:
        return to_model_grid(volume.data, mask, volume.spacing, volume.axes, resolution)
    except ScanError as error:
        raise ScanError(f"{name}: {error}") from error
