"""Average anatomy that every subject is a deformation of: brain maps and a made-up head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_harmony.errors import MissingInputError

FloatArray = NDArray[np.floating]

#: Spacing of the smooth maps of the head, mm.
COARSE = 2.0
#: Corner and size of the template box, mm, in MNI space (left to right, back to front, upward).
BOX_START = np.array([-106.0, -142.0, -118.0])
BOX_SIZE = np.array([212.0, 256.0, 228.0])


@dataclass(frozen=True)
class Template:
    """Average brain and head in MNI space.

    Attributes
    ----------
    tissue
        Grey + white matter, 0 to 1, at 1 mm.
    share
        White matter / (grey + white matter), 0 to 1, at 1 mm, continued beyond the brain.
    origin
        World position of voxel (0, 0, 0) of ``tissue`` and ``share``, mm.
    brain, ventricles, skin, air, orbit, eye
        Signed distance to a surface, mm, positive inside, on the box at ``COARSE`` mm.
    volume
        Volume of the brain mask, mL.
    """

    tissue: FloatArray
    share: FloatArray
    origin: FloatArray
    brain: FloatArray
    ventricles: FloatArray
    skin: FloatArray
    air: FloatArray
    orbit: FloatArray
    eye: FloatArray
    volume: float


def _read(name: str) -> nib.Nifti1Image:
    """Open a tissue map of nilearn without importing nilearn (a second of start-up)."""
    spec = find_spec("nilearn")
    folder = Path(next(iter(spec.submodule_search_locations or [""]))) if spec else Path()
    path = folder / "datasets" / "data" / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
    if not path.exists():
        raise MissingInputError(f"{path} is missing: reinstall nilearn, which ships it")
    return nib.Nifti1Image.from_filename(path)


def signed_distance(inside: NDArray[np.bool_], spacing: float) -> FloatArray:
    """Distance to the border of a region, mm: positive inside, negative outside."""
    outer = ndimage.distance_transform_edt(~inside)
    inner = ndimage.distance_transform_edt(inside)
    half = np.where(inside, inner - 0.5, 0.5 - outer)
    return (half * spacing).astype(np.float32)


def box_coordinates(spacing: float) -> list[FloatArray]:
    """Open grids of world x, y and z over the template box, mm."""
    axes = [
        start + spacing * np.arange(int(size / spacing) + 1)
        for start, size in zip(BOX_START, BOX_SIZE, strict=True)
    ]
    return [axis.astype(np.float32) for axis in np.ix_(*axes)]


def _ellipsoids(shapes: list[tuple[tuple[float, ...], tuple[float, ...]]]) -> FloatArray:
    """Union of ellipsoids (centre, radii) as an approximate signed distance on the box."""
    grid = box_coordinates(COARSE)
    level: FloatArray | None = None
    for centre, radii in shapes:
        squared = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True))
        one = ((1 - np.sqrt(squared)) * min(radii)).astype(np.float32)
        level = one if level is None else np.maximum(level, one)
    assert level is not None
    return level


def _mirrored(
    centre: tuple[float, float, float], radii: tuple[float, float, float]
) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    x, y, z = centre
    return [((x, y, z), radii), ((-x, y, z), radii)]


def _skin(brain: FloatArray) -> FloatArray:
    """Surface of the head: scalp around the brain, face, jaw, nose, ears and neck."""
    face = _ellipsoids(
        [
            ((0, 40, -58), (64, 48, 56)),
            ((0, 36, -100), (50, 54, 46)),
            ((0, 88, -60), (13, 20, 22)),
            ((0, -38, -112), (60, 58, 70)),
            *_mirrored((84, -22, -42), (7, 16, 28)),
        ]
    )
    inside = (brain > -14.5) | (face > 0)
    smooth = ndimage.gaussian_filter(inside.astype(np.float32), 1.6, mode="nearest")
    return signed_distance(smooth > 0.5, COARSE)


def _air() -> FloatArray:
    """Nasal cavity, sinuses, pharynx and mastoid cells."""
    return _ellipsoids(
        [
            ((0, 66, -62), (11, 28, 20)),
            ((0, 76, -8), (15, 5, 9)),
            ((0, 38, -38), (11, 9, 8)),
            ((0, 14, -84), (11, 8, 30)),
            *_mirrored((29, 56, -68), (11, 14, 13)),
            *_mirrored((52, -38, -56), (8, 10, 11)),
        ]
    )


def _ventricle_mask(tissue: FloatArray, mask: NDArray[np.bool_], origin: FloatArray) -> FloatArray:
    """Lateral and third ventricles: the largest fluid space in the middle of the brain."""
    low = np.round(np.array([-40, -60, -12]) - origin).astype(int)
    high = np.round(np.array([41, 35, 38]) - origin).astype(int)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    fluid = (tissue[box] < 0.5) & mask[box]
    parts, count = ndimage.label(fluid)
    sizes = ndimage.sum(fluid, parts, range(1, count + 1))
    ventricles = np.zeros(tissue.shape, dtype=np.float32)
    ventricles[box] = parts == int(np.argmax(sizes)) + 1
    return ventricles


def _onto_box(values: FloatArray, origin: FloatArray) -> FloatArray:
    """Sample a 1 mm map on the box at ``COARSE`` mm; zero outside the map."""
    smooth = ndimage.gaussian_filter(values.astype(np.float32), 0.8)
    grid = box_coordinates(COARSE)
    return ndimage.affine_transform(
        smooth,
        np.diag(np.full(3, COARSE)),
        offset=BOX_START - origin,
        output_shape=tuple(max(g.shape) for g in grid),
        order=1,
    )


@lru_cache(maxsize=1)
def load_template() -> Template:
    """Build the average anatomy from the tissue maps that nilearn ships (ICBM 2009a symmetric).

    Raises
    ------
    MissingInputError
        nilearn's files are not there.

    Notes
    -----
    Fonov et al. 2011, NeuroImage 54:313. The head outside the brain is invented.
    """
    images = {name: _read(name) for name in ("gm", "wm", "t1")}
    gm, wm = (np.asarray(images[k].dataobj, dtype=np.float32) / 255 for k in ("gm", "wm"))
    mask = np.asarray(images["t1"].dataobj) > 0
    origin = np.asarray(images["t1"].affine)[:3, 3]
    tissue = (gm + wm) * mask
    # Smoothing both before dividing continues the share where there is hardly any tissue.
    wide = [ndimage.gaussian_filter(a * mask, 1.5) for a in (wm, gm + wm)]
    near = np.clip(tissue / 0.2, 0, 1)
    share = near * wm / np.maximum(gm + wm, 1e-3) + (1 - near) * wide[0] / np.maximum(
        wide[1], 1e-3
    )
    brain = signed_distance(_onto_box(mask.astype(np.float32), origin) > 0.5, COARSE)
    brain = ndimage.gaussian_filter(brain, 0.8)
    ventricles = _onto_box(_ventricle_mask(tissue, mask, origin), origin)
    return Template(
        tissue=tissue,
        share=np.clip(share, 0, 1).astype(np.float32),
        origin=origin,
        brain=brain,
        ventricles=signed_distance(ventricles > 0.5, COARSE),
        skin=_skin(brain),
        air=_air(),
        orbit=_ellipsoids(_mirrored((32, 54, -38), (19, 26, 18))),
        eye=_ellipsoids(_mirrored((32, 64, -38), (12, 12.5, 12))),
        volume=float(mask.sum()) / 1000,
    )
