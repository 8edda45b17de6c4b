"""The head of one simulated subject: fractions of tissue in every voxel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_harmony.phantom.head import head_fractions
from bids_harmony.phantom.person import Person, stream
from bids_harmony.phantom.signal import TISSUES
from bids_harmony.phantom.template import BOX_START, COARSE, Template, load_template
from bids_harmony.phantom.warp import exponential, smooth_noise, upsample

FloatArray = NDArray[np.floating]

#: Spacing of the velocity field, mm.
LATTICE = 4.0
#: Corner and size of a subject's box, mm: head-centred coordinates, right, front, up.
START = np.array([-100.0, -128.0, -112.0])
SIZE = np.array([200.0, 240.0, 212.0])
#: Width of the borders of tissue and of white matter, in units of the average maps.
_TISSUE_EDGE, _WHITE_EDGE = 0.34, 0.42


@dataclass(frozen=True)
class Anatomy:
    """One subject's head.

    Attributes
    ----------
    fractions
        Share of each class of ``TISSUES`` per voxel, 0 to 1, shape (8, X, Y, Z).
    brain
        Share of the voxel inside the brain mask (tissue, ventricles, sulci), shape (X, Y, Z).
    spacing
        Voxel size, mm.
    start
        Position of voxel (0, 0, 0), mm.
    displacement
        Non-linear part of the map from this head to the template, mm, at ``LATTICE`` mm.
    t1_change
        Logarithm of T1 over the subject's mean T1 of that tissue, at ``LATTICE`` mm.
    """

    fractions: FloatArray
    brain: FloatArray
    spacing: float
    start: FloatArray
    displacement: FloatArray
    t1_change: FloatArray


def ramp(distance: FloatArray, width: float) -> FloatArray:
    """Share of a voxel on the positive side of a surface at a signed distance (mm)."""
    return np.clip(distance / width + 0.5, 0, 1).astype(np.float32)


def _shape(spacing: float) -> tuple[int, int, int]:
    x, y, z = (int(size / spacing) + 1 for size in SIZE)
    return x, y, z


def _affine_scale(person: Person, template: Template) -> FloatArray:
    """Template mm per subject mm along each axis."""
    rng = stream(person.seed, person.index, "size")
    aspect = np.clip(rng.normal(0, 0.022, 3), -0.045, 0.045)
    aspect -= aspect.mean()
    return (template.volume / person.icv) ** (1 / 3) * np.exp(aspect)


def _linear(scale: FloatArray, spacing: float) -> FloatArray:
    """Template position of every voxel before the non-linear warp, shape (3, X, Y, Z)."""
    axes = [
        s * (a + spacing * np.arange(n))
        for s, a, n in zip(scale, START, _shape(spacing), strict=True)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)


def _on_template(values: FloatArray, position: FloatArray) -> FloatArray:
    """Value of a coarse template map at template positions (mm)."""
    index = (position - BOX_START[:, None, None, None].astype(np.float32)) / COARSE
    return ndimage.map_coordinates(values, index, order=1, mode="nearest")


def _random_velocity(person: Person, depth: FloatArray) -> FloatArray:
    """Random smooth deformation: the whole head's shape, and smaller changes deep in the brain."""
    rng = stream(person.seed, person.index, "warp")
    inside = np.clip(0.2 + depth / 12.0, 0.2, 1.0)
    layers = ((7.0, 3.4, np.ones_like(inside)), (3.0, 2.0, inside), (1.6, 1.0, inside))
    return np.stack(
        [
            sum(mm * share * smooth_noise(depth.shape, sigma, rng) for sigma, mm, share in layers)
            for _ in range(3)
        ]
    )


def _ventricle_velocity(template: Template, position: FloatArray) -> FloatArray:
    """Unit flow away from the ventricles that fades within two centimetres."""
    smooth = ndimage.gaussian_filter(template.ventricles, 1.0)
    outward = np.stack([-_on_template(g, position) for g in np.gradient(smooth, COARSE)])
    distance = _on_template(template.ventricles, position)
    return outward * np.exp(-((distance / 16.0) ** 2))


def _ventricle_volume(template: Template, scale: FloatArray, displacement: FloatArray) -> float:
    """Volume of the deformed ventricles, mL, on the coarse grid in the middle of the head."""
    factor = round(LATTICE / COARSE)
    low = np.round((np.array([-60, -92, -52]) - START) / LATTICE).astype(int)
    high = np.round((np.array([60, 72, 68]) - START) / LATTICE).astype(int)
    box = tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))
    shape = tuple(int(n) for n in (high - low) * factor + 1)
    position = np.stack([upsample(d[box], factor, shape) for d in displacement])
    for axis, first in enumerate(START + low * LATTICE):
        line = (scale[axis] * (first + COARSE * np.arange(shape[axis]))).astype(np.float32)
        position[axis] += line.reshape([-1 if k == axis else 1 for k in range(3)])
    inside = ramp(_on_template(template.ventricles, position), COARSE)
    return float(inside.sum()) * COARSE**3 / 1000


def deform(person: Person, template: Template) -> tuple[FloatArray, FloatArray]:
    """Map from the subject's head to the template.

    Parameters
    ----------
    person
        Whose head.
    template
        Average anatomy.

    Returns
    -------
    Template mm per subject mm along each axis, and the displacement to add after scaling, mm,
    shape (3, X, Y, Z) at ``LATTICE`` mm. The flow away from the ventricles is sized, by secant
    steps, so that they get the subject's volume.
    """
    scale = _affine_scale(person, template)
    straight = _linear(scale, LATTICE)
    random = _random_velocity(person, _on_template(template.brain, straight))
    start = straight + exponential(random, LATTICE)
    volume = float(ramp(_on_template(template.brain, start), LATTICE).sum()) * LATTICE**3 / 1000
    scale = scale * (volume / person.icv) ** (1 / 3)
    flow = _ventricle_velocity(template, _linear(scale, LATTICE))
    target = person.ventricles * person.icv
    amounts: list[float] = [0.0, 2.0]
    volumes: list[float] = []
    for _ in range(5):
        displacement = exponential(random - amounts[len(volumes)] * flow, LATTICE)
        volumes.append(_ventricle_volume(template, scale, displacement))
        if len(volumes) < len(amounts):
            continue
        slope = (volumes[-1] - volumes[-2]) / (amounts[-1] - amounts[-2])
        if abs(volumes[-1] - target) < 0.02 * target or slope <= 0:
            break
        amounts.append(float(np.clip(amounts[-1] + (target - volumes[-1]) / slope, -5, 12)))
    return scale, displacement


def solve(volume: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Threshold at which a volume that falls with the threshold meets its target (bisection)."""
    for _ in range(14):
        middle = (low + high) / 2
        if volume(middle) > target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _brain_maps(
    person: Person, template: Template, coarse: FloatArray, spacing: float, brain: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Tissue and white-matter levels in the subject's space, made individual by noise."""
    box = ndimage.find_objects((brain > 0).astype(np.uint8))[0]
    factor = round(COARSE / spacing)
    index = np.stack([upsample(c, factor, brain.shape)[box] for c in coarse])
    index -= template.origin[:, None, None, None].astype(np.float32)
    rng = stream(person.seed, person.index, "folds")
    levels = []
    for values, amount in ((template.tissue, 0.07), (template.share, 0.09)):
        noise = smooth_noise(_shape(LATTICE), 0.6, rng)
        level = amount * upsample(noise, round(LATTICE / spacing), brain.shape)
        level[box] += ndimage.map_coordinates(values, index, order=1, mode="nearest")
        levels.append(level)
    return levels[0], levels[1]


def _fractions_in_brain(
    person: Person,
    brain: FloatArray,
    tissue: FloatArray,
    share: FloatArray,
    step: int,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """CSF, grey and white matter with the subject's volumes (all CSF inside the brain mask).

    ``tissue`` and ``share`` are levels; the thresholds that give the volumes are found on every
    ``step``-th voxel.
    """
    sub = (slice(None, None, step),) * 3
    inside = brain[sub] > 0
    few, few_t, few_s = brain[sub][inside], tissue[sub][inside], share[sub][inside]
    total = float(few.sum())
    cut = solve(
        lambda t: float((few * ramp(few_t - t, _TISSUE_EDGE)).sum()),
        (1 - person.csf) * total,
        0.0,
        1.1,
    )
    few = few * ramp(few_t - cut, _TISSUE_EDGE)
    edge = solve(
        lambda t: float((few * ramp(few_s - t, _WHITE_EDGE)).sum()), person.wm * total, 0.0, 1.0
    )
    solid = brain * ramp(tissue - cut, _TISSUE_EDGE)
    wm = solid * ramp(share - edge, _WHITE_EDGE)
    return brain - solid, solid - wm, wm


def _t1_change(person: Person, position: FloatArray) -> FloatArray:
    """Regional differences of T1: shorter in the deep nuclei (iron), a few per cent elsewhere.

    Putamen against cortex: Rooney et al. 2007, Magn Reson Med 57:308.
    """
    rng = stream(person.seed, person.index, "t1")
    centre = np.array([0.0, -4.0, 2.0], dtype=np.float32)[:, None, None, None]
    radius = np.linalg.norm((position - centre) / 26.0, axis=0)
    shape = position.shape[1:]
    noise = 0.02 * smooth_noise(shape, 3.0, rng) + 0.02 * smooth_noise(shape, 1.2, rng)
    return (noise - 0.10 * np.exp(-(radius**2))).astype(np.float32)


def _lesion_fraction(
    person: Person, wm: FloatArray, ventricles: FloatArray, spacing: float
) -> FloatArray:
    """Hyperintensities in the white matter: caps around the ventricles and scattered spots."""
    rng = stream(person.seed, person.index, "lesions")
    spots = smooth_noise(_shape(LATTICE), 0.9, rng)
    level = upsample(spots, round(LATTICE / spacing), wm.shape)
    level = level + 3.0 * np.exp(np.minimum(ventricles, 0) / 6.0)
    eligible = np.clip((wm - 0.7) / 0.3, 0, 1)

    def volume(threshold: float) -> float:
        return float((eligible * ramp(level - threshold, 0.5)).sum()) * spacing**3 / 1000

    threshold = solve(volume, person.lesions, -4.0, 9.0)
    return eligible * ramp(level - threshold, 0.5)


def build_anatomy(person: Person, spacing: float = 1.0) -> Anatomy:
    """Build one subject's head.

    Parameters
    ----------
    person
        Age, volumes and seed.
    spacing
        Voxel size, mm: 1 or 2 (``LATTICE`` must be a multiple of it).

    Returns
    -------
    The anatomy; voxel-identical for the same person and spacing.
    """
    template = load_template()
    scale, displacement = deform(person, template)
    coarse_shape, shape = _shape(COARSE), _shape(spacing)
    coarse = _linear(scale, COARSE)
    coarse += np.stack([upsample(d, round(LATTICE / COARSE), coarse_shape) for d in displacement])
    mm = 1 / float(scale.mean())

    def surface(values: FloatArray) -> FloatArray:
        return upsample(_on_template(values, coarse) * mm, round(COARSE / spacing), shape)

    brain_distance = surface(template.brain)
    brain = ramp(brain_distance, max(spacing, 1.0))
    tissue, share = _brain_maps(person, template, coarse, spacing, brain)
    ventricles = surface(template.ventricles)
    # Sulci widen by a higher threshold; the walls of the ventricles are where the warp put them.
    wall = np.exp(-((np.minimum(ventricles, 0) / 5.0) ** 2))
    tissue = tissue + wall * np.clip(-ventricles / 3.0, -1, 1) * 0.5
    step = max(1, round(COARSE / spacing))
    csf, gm, wm = _fractions_in_brain(person, brain, tissue, share, step)
    fractions = np.zeros((len(TISSUES), *shape), dtype=np.float32)
    surfaces = {name: surface(getattr(template, name)) for name in ("skin", "air", "orbit", "eye")}
    head_fractions(fractions, brain_distance, surfaces, person, spacing)
    if person.lesions > 0:
        lesion = _lesion_fraction(person, wm, ventricles, spacing)
        fractions[TISSUES.index("lesion")] = lesion
        wm = wm - lesion
    for name, part in (("CSF", csf), ("GM", gm), ("WM", wm)):
        fractions[TISSUES.index(name)] += part
    t1_change = _t1_change(person, _linear(scale, LATTICE) + displacement)
    return Anatomy(fractions, brain, spacing, START, displacement, t1_change)
