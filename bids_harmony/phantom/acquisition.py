"""One scan of one subject at one site: geometry, image formation and imperfections."""

from __future__ import annotations

from dataclasses import dataclass, replace

import nibabel as nib
import numpy as np
from nibabel.eulerangles import euler2mat
from numpy.polynomial import legendre
from numpy.typing import NDArray
from scipy import ndimage

from bids_harmony.phantom.anatomy import LATTICE, Anatomy
from bids_harmony.phantom.person import Person, stream
from bids_harmony.phantom.signal import TISSUES, Tissue, tissue_table, vary_tissues
from bids_harmony.phantom.sites import Protocol, Site

FloatArray = NDArray[np.floating]

#: Field of view and its centre in the head, mm: right, front, up.
FIELD_OF_VIEW = np.array([198.0, 236.0, 206.0])
CENTRE = np.array([0.0, -8.0, -6.0])
#: Full width at half maximum of a Gaussian over its standard deviation.
_FWHM = 2.3548


@dataclass(frozen=True)
class Scan:
    """What the scanner stores, and the truth on the same grid.

    Attributes
    ----------
    image
        Stored voxels (the site's data type).
    slope
        Factor from stored to real values.
    affine
        Voxel to scanner coordinates, mm, RAS+.
    fractions
        Share of each class of ``TISSUES``, shape (8, X, Y, Z).
    brain
        Share of the voxel inside the brain mask.
    bias
        Receive bias field, geometric mean 1 over the field of view.
    truth
        The image without bias field, transmit error and noise, per contrast, float32; white
        matter is at the gain of the site whose contrast it is.
    """

    image: NDArray[np.generic]
    slope: float
    affine: FloatArray
    fractions: FloatArray
    brain: FloatArray
    bias: FloatArray
    truth: dict[str, FloatArray]


def _rotation(degrees: FloatArray) -> FloatArray:
    """Rotation about x, then y, then z."""
    x, y, z = np.deg2rad(degrees)
    return euler2mat(z=z, y=y, x=x)


def scan_grid(
    site: Site, protocol: Protocol, voxel: FloatArray
) -> tuple[tuple[int, ...], FloatArray]:
    """Shape and affine of a scan.

    Parameters
    ----------
    site
        Gives the tilt of the field of view.
    protocol
        Gives the orientation of the axes.
    voxel
        Voxel size along the three array axes, mm.

    Returns
    -------
    Shape, and the map from voxel to scanner coordinates (mm, RAS+).
    """
    orientation = nib.orientations.axcodes2ornt(protocol.codes)
    world = orientation[:, 0].astype(int)
    size = FIELD_OF_VIEW[world]
    shape = tuple(int(np.ceil(s / v)) for s, v in zip(size, voxel, strict=True))
    affine = np.eye(4)
    linear = np.zeros((3, 3))
    for axis, (direction, sign) in enumerate(orientation):
        linear[int(direction), axis] = sign * voxel[axis]
    affine[:3, :3] = _rotation(np.array([site.tilt, 0.3 * site.tilt, 0.2 * site.tilt])) @ linear
    affine[:3, 3] = CENTRE - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return shape, affine


def head_pose(rng: np.random.Generator) -> FloatArray:
    """Where the head lies: map from scanner to head coordinates (rigid, mm)."""
    pose = np.eye(4)
    pose[:3, :3] = _rotation(np.clip(rng.normal(0, 3.0, 3), -7, 7))
    pose[:3, 3] = np.clip(rng.normal(0, 2.5, 3), -6, 6)
    return pose


def resample(
    values: FloatArray, to_index: FloatArray, shape: tuple[int, ...], parts: tuple[int, ...]
) -> FloatArray:
    """Average a map over every voxel of a scan.

    Each voxel is sampled at ``parts`` points per axis, spread evenly, and averaged: partial
    volume over the whole voxel, along the scan's own axes.

    Parameters
    ----------
    values
        Map in the head.
    to_index
        Affine from scan voxel to index of ``values``.
    shape
        Shape of the scan.
    parts
        Points per voxel along each axis.

    Returns
    -------
    Mean per voxel, float32, shape ``shape``.
    """
    out = np.zeros(shape, dtype=np.float32)
    box = _touched(values, to_index, shape)
    if box is None:
        return out
    size = np.array([s.stop - s.start for s in box])
    fine = np.eye(4)
    fine[:3, :3] = np.diag(1 / np.array(parts))
    fine[:3, 3] = (1 / np.array(parts) - 1) / 2 + [s.start for s in box]
    matrix = to_index @ fine
    dense = ndimage.affine_transform(
        values,
        matrix[:3, :3],
        offset=matrix[:3, 3],
        output_shape=tuple(size * parts),
        order=1,
    )
    split = dense.reshape([k for n, p in zip(size, parts, strict=True) for k in (n, p)])
    out[box] = split.mean(axis=(1, 3, 5), dtype=np.float32)
    return out


def _index_map(start: FloatArray, spacing: float) -> FloatArray:
    """Affine from position in the head (mm) to index of a grid."""
    matrix = np.diag([1 / spacing] * 3 + [1.0])
    matrix[:3, 3] = -start / spacing
    return matrix


def _touched(
    values: FloatArray, to_index: FloatArray, shape: tuple[int, ...]
) -> tuple[slice, ...] | None:
    """Box of scan voxels that can be other than zero; None when there is none."""
    found = ndimage.find_objects((values != 0).astype(np.uint8))
    if not found:
        return None
    ends = [(s.start - 1, s.stop) for s in found[0]]
    corners = np.array(np.meshgrid(*ends)).reshape(3, -1)
    back = np.linalg.inv(to_index)
    voxel = back[:3, :3] @ corners + back[:3, 3:]
    low = np.clip(np.floor(voxel.min(axis=1)).astype(int) - 1, 0, shape)
    high = np.clip(np.ceil(voxel.max(axis=1)).astype(int) + 2, 0, shape)
    if (high <= low).any():
        return None
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def bias_field(shape: tuple[int, ...], strength: float, rng: np.random.Generator) -> FloatArray:
    """Smooth multiplicative field: exponential of a random cubic polynomial of position.

    Parameters
    ----------
    shape
        Shape of the scan.
    strength
        Standard deviation of its logarithm over the field of view.
    rng
        Random numbers of the scan.

    Returns
    -------
    Field above 0 with geometric mean 1, shape ``shape``.
    """
    weights = rng.standard_normal((4, 4, 4))
    order = np.add.outer(np.add.outer(np.arange(4), np.arange(4)), np.arange(4))
    weights = np.where((order > 0) & (order <= 3), weights / np.maximum(order, 1), 0)
    x, y, z = (np.linspace(-1, 1, n) for n in shape)
    field = np.asarray(legendre.leggrid3d(x, y, z, weights))
    field -= field.mean()
    return np.exp(strength * field / field.std()).astype(np.float32)


def transmit_field(shape: tuple[int, ...], affine: FloatArray, spread: float) -> FloatArray:
    """Transmit field relative to nominal: strong in the centre of the head, weak at its rim.

    Parameters
    ----------
    shape, affine
        Grid of the scan.
    spread
        Excess in the centre; at 90 mm from it the field is this much too weak.
    """
    parts = []
    for axis in range(3):
        sizes = [1, 1, 1]
        sizes[axis] = shape[axis]
        step = np.arange(shape[axis], dtype=float) - (shape[axis] - 1) / 2
        parts.append((step * np.linalg.norm(affine[:3, axis]) / 90.0).reshape(sizes) ** 2)
    radius = parts[0] + parts[1] + parts[2]
    return np.maximum(1 + spread * (1 - 2 * np.minimum(radius, 1.6)), 0.3).astype(np.float32)


def contrast(
    fractions: FloatArray,
    t1_change: FloatArray,
    person: Person,
    site: Site,
    protocol: Protocol,
    b1: FloatArray | None,
) -> FloatArray:
    """Signal of mixed tissue, relative to pure white matter of the average adult.

    Parameters
    ----------
    fractions
        Share of each class of ``TISSUES``, shape (8, X, Y, Z).
    t1_change
        Logarithm of T1 over the mean T1 of the tissue, for brain tissue, shape (X, Y, Z); small:
        its effect is linearised.
    person
        Whose relaxation times.
    site, protocol
        Field strength and sequence.
    b1
        Transmit field, shape (X, Y, Z); None for a perfect one.

    Returns
    -------
    Signed signal, float32, shape (X, Y, Z).
    """
    average = tissue_table(site.field_strength)
    table = vary_tissues(average, person.t1_scale)
    unit = float(protocol.signal(average["WM"], np.ones(())))
    nodes = np.linspace(0.3, 1.7, 57)
    total = np.zeros(fractions.shape[1:], dtype=np.float32)
    for share, name in zip(fractions, TISSUES, strict=True):
        if b1 is None:
            total += share * np.float32(float(protocol.signal(table[name], np.ones(()))) / unit)
        else:
            values = protocol.signal(table[name], nodes) / unit
            total += share * np.interp(b1, nodes, values).astype(np.float32)
        if name in ("GM", "WM", "lesion"):
            total += share * t1_change * np.float32(_t1_slope(protocol, table[name]) / unit)
    return total


def _t1_slope(protocol: Protocol, tissue: Tissue) -> float:
    """Change of the signal per change of the logarithm of T1, at the nominal flip angle."""
    step = 0.03
    longer, shorter = (
        protocol.signal(replace(tissue, t1=tissue.t1 * np.exp(sign * step)), np.ones(()))
        for sign in (1, -1)
    )
    return float(longer - shorter) / (2 * step)


def _blurred(image: FloatArray, protocol: Protocol, voxel: FloatArray, scale: float) -> FloatArray:
    sigma = [scale * b / _FWHM / v for b, v in zip(protocol.blur, voxel, strict=True)]
    return ndimage.gaussian_filter(image, sigma, truncate=3) if any(sigma) else image


def _store(image: FloatArray, dtype: str) -> tuple[NDArray[np.generic], float]:
    """Quantise as the scanner does; 12-bit scanners clip what is brighter than their range."""
    if dtype == "float32":
        return image.astype(np.float32), 1.0
    if dtype == "uint8":
        slope = float(np.float32(np.percentile(image[image > 0], 99.9) / 255))
        return np.clip(np.rint(image / slope), 0, 255).astype(np.uint8), slope
    return np.clip(np.rint(image), 0, 4095).astype(np.int16), 1.0


_LONGEST = 1.5  # of the smallest edge


def voxel_size(protocol: Protocol, resolution: float | None) -> tuple[FloatArray, float]:
    """Voxel size (mm), smallest edge ``resolution``, and its ratio to the protocol's own.

    Edges are made at most half as long again as `resolution`, unless they are longer by
    themselves: nobody acquires slices of 10 mm.
    """
    voxel = np.array(protocol.voxel, dtype=float)
    scale = 1.0 if resolution is None else resolution / float(voxel.min())
    if resolution is None:
        return voxel, scale
    return np.minimum(voxel * scale, np.maximum(voxel, _LONGEST * resolution)), scale


def acquire(
    anatomy: Anatomy,
    person: Person,
    site: Site,
    modality: str,
    contrasts: dict[str, Site],
    resolution: float | None = None,
) -> Scan:
    """Scan one subject at one site.

    Parameters
    ----------
    anatomy, person
        The subject.
    site
        The scanner.
    modality
        ``T1w``, ``T2w`` or ``FLAIR``.
    contrasts
        Sites whose contrast is wanted as truth on this scan's grid, by name.
    resolution
        Smallest voxel edge, mm; None for the protocol's own. The ratio of the edges is kept,
        but slices do not become thicker than it and the protocol's own.

    Returns
    -------
    The scan and its truth; voxel-identical for the same arguments.
    """
    protocol = site.protocols[modality]
    rng = stream(person.seed, person.index, f"scan {site.name} {modality}")
    voxel, scale = voxel_size(protocol, resolution)
    shape, affine = scan_grid(site, protocol, voxel)
    to_head = head_pose(rng) @ affine
    to_index = _index_map(anatomy.start, anatomy.spacing) @ to_head
    parts = tuple(max(1, round(v / anatomy.spacing)) for v in voxel)
    fractions = np.stack([resample(f, to_index, shape, parts) for f in anatomy.fractions])
    brain = resample(anatomy.brain, to_index, shape, parts)
    to_lattice = _index_map(anatomy.start, LATTICE) @ to_head
    t1_change = resample(anatomy.t1_change, to_lattice, shape, (1, 1, 1))
    bias = bias_field(shape, site.bias, rng)
    b1 = transmit_field(shape, affine, site.b1_spread)
    gain = site.gain * protocol.gain * float(np.exp(rng.normal(0, 0.12)))
    clean = np.abs(contrast(fractions, t1_change, person, site, protocol, b1))
    clean = _blurred(clean, protocol, voxel, scale) * bias
    noise = rng.standard_normal((2, *shape), dtype=np.float32) / np.float32(protocol.snr)
    image, slope = _store(gain * np.hypot(clean + noise[0], noise[1]), site.dtype)
    truth: dict[str, FloatArray] = {}
    for name, other in contrasts.items():
        theirs = other.protocols[modality]
        ideal = np.abs(contrast(fractions, t1_change, person, other, theirs, None))
        level = np.float32(other.gain * theirs.gain)
        truth[name] = (level * _blurred(ideal, protocol, voxel, scale)).astype(np.float32)
    return Scan(image, slope, affine, fractions, brain, bias, truth)
