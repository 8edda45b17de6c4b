"""Brain mask of a whole head, by registration of a head template and refinement on the scan."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bids_harmony.imaging.mask import fill_holes, largest_component
from bids_harmony.interfaces.ants_functions import (
    best_start,
    coarse,
    divide_by_bias,
    fit_bias,
    load,
    register,
    starts,
    to_ants,
)

Array = NDArray[Any]
HEAD = "head_T1w.nii.gz"
HEAD_MASK = "head_brain_probability.nii.gz"
VOLUME_LIMITS = (900.0, 2000.0)


def head_template() -> tuple[Array, Array, Array]:
    """Head template, brain probability (0..1) and affine, 2 mm, MNI space."""
    folder = files("bids_harmony.data") / "templates"
    with as_file(folder / HEAD) as head, as_file(folder / HEAD_MASK) as brain:
        data, affine = load(head)
        probability, _ = load(brain)
    return data, probability / 255.0, affine


def brain_mask(ants: Any, data: Array, affine: Array, folder: Path) -> tuple[Array, list[str]]:
    """Brain mask of a whole head.

    Parameters
    ----------
    data
        Shape (X, Y, Z), finite, non-negative.
    affine
        RAS affine.
    folder
        Folder for the transforms.

    Returns
    -------
    Mask (uint8) on the scan's grid, and warnings.
    """
    head, probability, grid = head_template()
    corrected = divide_by_bias(data, affine, fit_bias(ants, data, affine))
    small, small_grid = coarse(corrected, affine, 2.0)
    rough = [coarse(head, grid, 4.0), coarse(small, small_grid, 4.0)]
    pair = [to_ants(ants, *item) for item in rough]
    start = best_start(ants, pair[0], pair[1], starts(rough[0], rough[1]), folder)
    fixed, moving = to_ants(ants, head, grid), to_ants(ants, small, small_grid)
    region = to_ants(ants, head > 0, grid)
    found = register(ants, fixed, moving, "Affine", [start], folder / "affine_", region)
    warped = register(ants, fixed, moving, "SyN", found, folder / "syn_", region, (40, 20, 0))
    back = [warped[1], warped[0].replace("1Warp", "1InverseWarp")]
    prior = ants.apply_transforms(
        to_ants(ants, data, affine),
        to_ants(ants, probability, grid),
        back,
        whichtoinvert=[True, False],
    ).numpy()
    mask = fill_holes(largest_component(prior > 0.5))
    return mask.astype(np.uint8), volume_warnings(mask, affine)


def volume_warnings(mask: Array, affine: Array) -> list[str]:
    """Say when a brain mask's volume is not that of an adult's brain."""
    millilitres = float(mask.sum()) * abs(np.linalg.det(affine[:3, :3])) / 1000
    low, high = VOLUME_LIMITS
    if low <= millilitres <= high:
        return []
    return [f"brain mask of {millilitres:.0f} ml, expected {low:.0f} to {high:.0f} ml"]
