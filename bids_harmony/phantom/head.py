"""Everything around the brain: fluid, skull, scalp, muscle, eyes and air."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bids_harmony.phantom.person import Person, stream
from bids_harmony.phantom.signal import TISSUES
from bids_harmony.phantom.warp import smooth_noise, upsample

FloatArray = NDArray[np.floating]

_LATTICE = 4.0
#: Fluid between the brain mask and the skull, mm.
FLUID = 1.5


def _thicknesses(
    person: Person, shape: tuple[int, ...], spacing: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Skull and fat thickness, mm, and a texture for the muscles, each smooth and irregular."""
    rng = stream(person.seed, person.index, "head")
    lattice = tuple(int((n - 1) * spacing / _LATTICE) + 1 for n in shape)
    skull_mean, fat_mean = rng.uniform(5.5, 7.5), rng.uniform(2.5, 6.0)

    def field(sigma: float) -> FloatArray:
        return upsample(smooth_noise(lattice, sigma, rng), round(_LATTICE / spacing), shape)

    skull = np.maximum(skull_mean + 1.2 * field(3.0), 2.5)
    fat = np.maximum(fat_mean * (1 + 0.35 * field(3.0)), 0.5)
    return skull, fat, field(0.8)


def head_fractions(
    fractions: FloatArray,
    brain: FloatArray,
    surfaces: Mapping[str, FloatArray],
    person: Person,
    spacing: float,
) -> None:
    """Fill in the tissue outside the brain mask.

    Parameters
    ----------
    fractions
        Shape (8, X, Y, Z) in the order of ``TISSUES``; zero; changed in place.
    brain
        Signed distance to the border of the brain mask, mm, positive inside.
    surfaces
        The same for ``skin``, ``air``, ``orbit`` and ``eye``.
    person
        Whose head.
    spacing
        Voxel size, mm.

    Notes
    -----
    From the brain outward: fluid, skull (two tables with marrow between them), muscle, fat,
    skin. Face and neck are muscle and fat with an orbit, eyes and air-filled cavities.
    """
    width = max(spacing, 1.0)

    def above(distance: FloatArray, limit: FloatArray | float) -> FloatArray:
        return np.clip((distance - limit) / width + 0.5, 0, 1).astype(np.float32)

    skull, fat_depth, texture = _thicknesses(person, brain.shape, spacing)
    skin = surfaces["skin"]
    inner = above(brain, -FLUID)
    head = above(skin, 0.0)
    within_skull = np.minimum(above(brain, -FLUID - skull), np.maximum(head, inner))
    thick = np.clip((skull - 4.0) / 2.0, 0, 1)
    marrow = above(brain, -FLUID - 0.7 * skull) - above(brain, -FLUID - 0.28 * skull)
    marrow = np.minimum(marrow * thick, within_skull - inner)
    rest = np.maximum(head - within_skull, 0) * (1 - above(surfaces["air"], 0.0))
    in_orbit = rest * above(surfaces["orbit"], 0.0)
    eye = in_orbit * above(surfaces["eye"], 0.0)
    soft = rest - in_orbit
    below_skin, deep = above(skin, 1.8), above(skin, 1.8 + fat_depth)
    streak = np.clip(0.5 + 2.5 * (texture - 1.1), 0, 0.85)
    fat = soft * (0.25 * (1 - below_skin) + (below_skin - deep) + deep * streak)
    fractions[TISSUES.index("CSF")] = inner - above(brain, 0.0) + eye
    fractions[TISSUES.index("bone")] = within_skull - inner - marrow
    fractions[TISSUES.index("marrow")] = marrow
    fractions[TISSUES.index("fat")] = fat + in_orbit - eye
    fractions[TISSUES.index("muscle")] = soft - fat
