"""A scan on the model's grid, and its tone curve there: the first step of the flow methods."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bids_harmony.errors import ScanError
from bids_harmony.imaging.model_grid import ModelGrid
from bids_harmony.imaging.tone import ToneCurve, composed, to_zero
from bids_harmony.methods.base import Volume
from bids_harmony.methods.tone import Tone, mapped
from bids_harmony.methods.volume_grid import on_model_grid


@dataclass(frozen=True)
class TonedScan:
    """A scan before and after its tone curve.

    Attributes
    ----------
    grid
        The brain on the model's grid.
    curve
        Its tone curve, for the scan's own voxels.
    image, mask, start
        The brain and its mask on the model's grid, and the brain after the curve, (X, Y, Z).
    """

    grid: ModelGrid
    curve: ToneCurve
    image: Tensor
    mask: Tensor
    start: Tensor


def toned_scan(tone: Tone, volume: Volume, resolution: float) -> TonedScan:
    """A volume on the model's grid, mapped by its tone curve; raises as `scan_curve`."""
    grid, curve = scan_curve(tone, volume, resolution)
    image, mask = torch.from_numpy(grid.data), torch.from_numpy(grid.mask)
    if grid.averaged:
        start = torch.from_numpy(on_model_grid(_mapped(volume, curve), resolution).data)
    else:
        start = mapped(curve, image, mask)
    return TonedScan(grid, curve, image, mask, start)


def scan_curve(tone: Tone, volume: Volume, resolution: float) -> tuple[ModelGrid, ToneCurve]:
    """A volume on the model's grid, and its tone curve.

    Raises
    ------
    ScanError
        As `on_model_grid`, and if nearly all brain voxels have one value.
    """
    grid = on_model_grid(volume, resolution)
    try:
        if grid.averaged:
            return grid, _fine_curve(tone, volume, resolution)
        return grid, tone.curve(
            torch.from_numpy(grid.data), torch.from_numpy(grid.mask), grid.spacing
        )
    except ScanError as error:
        raise ScanError(f"{volume.name or 'scan'}: {error}") from error


def _fine_curve(tone: Tone, volume: Volume, resolution: float) -> ToneCurve:
    """The tone curve of a scan with smaller voxels than the model's.

    Voxels are averaged in the reference domain's tone: the mean of a foreign contrast is not the
    foreign contrast of the mean, and the curve would depend on the contrast it undoes.
    """
    values = torch.from_numpy(volume.data[np.asarray(volume.mask, dtype=bool)]).float()
    first = tone.matching(values)
    grid = on_model_grid(_mapped(volume, first), resolution)
    second = tone.curve(
        torch.from_numpy(grid.data), torch.from_numpy(grid.mask), grid.spacing, whole=True
    )
    darkest = float(np.interp(second.x[0], first.y, first.x))
    whole = to_zero(composed(first, second), darkest)
    return tone.trusted(whole, values)


def _mapped(volume: Volume, curve: ToneCurve) -> Volume:
    return replace(volume, data=np.maximum(curve(volume.data), 0))
