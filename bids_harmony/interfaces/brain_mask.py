"""Brain mask of a whole head, by registration of a head template and refinement on the scan."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from bids_harmony.imaging.mask import fill_holes, largest_component, refine_mask, upsample
from bids_harmony.interfaces.ants_functions import (
    START_SPACING,
    Array,
    align,
    coarse,
    divide_by_bias,
    fit_bias,
    load,
    mutual_information,
    register,
    to_ants,
    voxel_factors,
)

HEAD = "head_T1w.nii.gz"
HEAD_MASK = "head_brain_probability.nii.gz"
SPACING = 2.0
ROUGH_BIAS_SPACING = 8.0
ROUGH_BIAS_SPLINE = 150.0
VOLUME_LIMITS = (900.0, 2000.0)
MATCH_LIMITS = {"T1w": 0.12, "T2w": 0.09, "FLAIR": 0.09}
COVER_LIMIT = 0.98


@dataclass(frozen=True)
class Head:
    """A head to register to.

    Attributes
    ----------
    data
        T1-weighted head, shape (X, Y, Z); zero where nothing is known.
    probability
        Probability of brain, same shape, 0..1.
    affine
        RAS affine.
    """

    data: Array
    probability: Array
    affine: Array


def head_template() -> Head:
    """Head template that ships with the package: 2 mm, MNI space."""
    folder = files("bids_harmony.data") / "templates"
    with as_file(folder / HEAD) as head, as_file(folder / HEAD_MASK) as brain:
        data, affine = load(head)
        probability, _ = load(brain)
    return Head(data, probability / 255.0, affine)


def working_copy(ants: Any, data: Array, affine: Array) -> tuple[Array, Array]:
    """The scan at 2 mm (thick slices stay thick) without its strongest shading, and its affine."""
    small, grid = coarse(data, affine, SPACING)
    field = fit_bias(ants, small, grid, None, ROUGH_BIAS_SPACING, ROUGH_BIAS_SPLINE)
    return divide_by_bias(small, grid, field, spacing=ROUGH_BIAS_SPACING), grid


def register_head(
    ants: Any, head: Head, scan: tuple[Array, Array], folder: Path, wide: bool = False
) -> tuple[list[str], list[str]]:
    """Affine and SyN registration of a head to the template.

    Parameters
    ----------
    wide
        Start from many head positions, for a head that lies unusually.

    Returns
    -------
    Transform files scan -> template, and template -> scan (give these with
    ``whichtoinvert=[True, False]``).
    """
    fixed, moving = [coarse(*pair, START_SPACING) for pair in ((head.data, head.affine), scan)]
    region = fixed[0] > 0
    found = align(ants, fixed, moving, "Affine", folder, region, wide)
    pair = [to_ants(ants, *item) for item in (fixed, moving)]
    mask = to_ants(ants, region, fixed[1])
    forward = register(ants, pair[0], pair[1], "SyN", found, folder / "syn_", mask, (40, 10))
    return forward, [forward[1], forward[0].replace("1Warp", "1InverseWarp")]


def warped_prior(ants: Any, head: Head, scan: tuple[Array, Array], backward: list[str]) -> Array:
    """Brain probability of the template on the scan's grid, 0..1."""
    return np.asarray(
        ants.apply_transforms(
            to_ants(ants, *scan),
            to_ants(ants, head.probability, head.affine),
            backward,
            whichtoinvert=[True, False],
        ).numpy()
    )


def brain_mask(
    ants: Any, data: Array, affine: Array, folder: Path, modality: str = "T1w"
) -> tuple[Array, list[str]]:
    """Brain mask of a whole head.

    Parameters
    ----------
    data
        Shape (X, Y, Z), finite, non-negative.
    affine
        RAS affine.
    folder
        Folder for the transforms.
    modality
        ``T1w``, ``T2w`` or ``FLAIR``: how alike scan and template must be.

    Returns
    -------
    Mask (uint8) on the scan's grid, and warnings.
    """
    head, limit = head_template(), MATCH_LIMITS[modality]
    scan = working_copy(ants, data, affine)
    forward, backward = register_head(ants, head, scan, folder)
    match, covered = match_and_cover(ants, head, scan, forward)
    if match < limit:
        forward, backward = register_head(ants, head, scan, folder, wide=True)
        match, covered = match_and_cover(ants, head, scan, forward)
    prior = warped_prior(ants, head, scan, backward)
    small = refine_mask(scan[0], prior, np.linalg.norm(scan[1][:3, :3], axis=0))
    level = upsample(small.astype(np.float32), data.shape, voxel_factors(affine, SPACING))
    mask = fill_holes(largest_component(level > 0.5))
    doubts = match_warnings(match, limit, covered) + volume_warnings(mask, affine)
    return mask.astype(np.uint8), doubts


def match_warnings(match: float, limit: float, covered: float) -> list[str]:
    """Say when a registered scan resembles the template badly, or does not cover the brain."""
    doubts = []
    if match < limit:
        doubts.append(
            f"head registered badly to the template (normalised mutual information {match:.2f}, "
            f"expected {limit:.2f} or more): look at the brain mask"
        )
    if covered < COVER_LIMIT:
        doubts.append(f"the field of view holds only about {100 * covered:.0f} % of the brain")
    return doubts


def match_and_cover(
    ants: Any, head: Head, scan: tuple[Array, Array], forward: list[str]
) -> tuple[float, float]:
    """Mutual information per entropy of the template in the brain, and share of brain covered."""
    grid, affine = coarse(head.data, head.affine, START_SPACING)
    probability, _ = coarse(head.probability, head.affine, START_SPACING)
    fixed = to_ants(ants, grid, affine)
    moved, seen = [
        ants.apply_transforms(fixed, to_ants(ants, part, scan[1]), forward).numpy()
        for part in (scan[0], np.ones(scan[0].shape))
    ]
    inside = (probability > 0.05) & (seen > 0.5)
    covered = float(probability[seen > 0.5].sum() / probability.sum())
    if not inside.any():
        return 0.0, covered
    entropy = mutual_information(grid[inside], grid[inside])
    return mutual_information(grid[inside], moved[inside]) / entropy, covered


def volume_warnings(mask: Array, affine: Array) -> list[str]:
    """Say when a brain mask's volume is not that of an adult's brain."""
    millilitres = float(mask.sum()) * abs(np.linalg.det(affine[:3, :3])) / 1000
    low, high = VOLUME_LIMITS
    if low <= millilitres <= high:
        return []
    return [f"brain mask of {millilitres:.0f} ml, expected {low:.0f} to {high:.0f} ml"]
