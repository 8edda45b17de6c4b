"""What is asked of ANTs, as functions of arrays; each is given the module by `ants_session`.

Images cross into ANTs as arrays with an explicit geometry and come back as arrays: ITK never
touches a NIfTI header.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from bids_harmony.errors import ScanError
from bids_harmony.imaging.geometry import MAX_SHEAR
from bids_harmony.imaging.mask import block_mean, coarse_affine, shrink_factors, upsample

Array = NDArray[Any]
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
N4_SPACING = 6.0
N4_ITERATIONS = (50, 50, 30, 20)
N4_SPLINE = 300.0
BIAS_LIMITS = (0.05, 20.0)
REGISTRATION_SPACING = 2.0
START_SPACING = 4.0
TRIED = 3
PITCHES = (0.0, -20.0, 20.0, -40.0, 40.0)
WIDE_PITCHES = (-75.0, -50.0, -25.0, 0.0, 25.0, 50.0, 75.0)
YAWS = (-45.0, 0.0, 45.0)


def load(path: str | Path) -> tuple[Array, Array]:
    """Read a 3-D image as finite float32 values and its affine.

    Raises
    ------
    ScanError
        The image is not 3-D, holds non-finite values, or its affine shears.
    """
    image = nib.load(path)
    data = np.asarray(image.dataobj, dtype=np.float32)  # type: ignore[attr-defined]
    if data.ndim != 3:
        raise ScanError(f"{path}: {data.ndim} dimensions; conform it to one 3-D volume first")
    if not np.isfinite(data).all():
        raise ScanError(f"{path}: holds non-finite values; conform it first")
    axes = np.asarray(image.affine)[:3, :3]  # type: ignore[attr-defined]
    axes = axes / np.linalg.norm(axes, axis=0)
    if np.abs(axes.T @ axes - np.eye(3)).max() > MAX_SHEAR:
        raise ScanError(f"{path}: its affine shears; resample it to orthogonal axes first")
    return data, np.asarray(image.affine, dtype=float)  # type: ignore[attr-defined]


def save(data: Array, affine: Array, path: str | Path) -> str:
    """Write a 3-D array (float32, or uint8 as it is) with millimetre units; return the path."""
    if not np.isfinite(data).all():
        raise ScanError(f"{path}: non-finite values; check the scan's intensities")
    kind = np.uint8 if data.dtype in (np.uint8, np.bool_) else np.float32
    image = nib.Nifti1Image(np.asarray(data, dtype=kind), affine)
    image.header.set_xyzt_units("mm")
    target = Path(path)
    draft = target.with_name(f".draft_{target.name}")
    nib.save(image, draft)
    draft.replace(target)
    return str(path)


def to_ants(ants: Any, data: Array, affine: Array) -> Any:
    """Array (X, Y, Z) with RAS affine -> ANTs image (float32), axes made exactly orthonormal."""
    lps = RAS_TO_LPS @ affine
    zooms = np.linalg.norm(lps[:3, :3], axis=0)
    left, _, right = np.linalg.svd(lps[:3, :3] / zooms)
    return ants.from_numpy(
        np.ascontiguousarray(data, dtype=np.float32),
        origin=tuple(float(v) for v in lps[:3, 3]),
        spacing=tuple(float(v) for v in zooms),
        direction=left @ right,
    )


def coarse(data: Array, affine: Array, spacing: float) -> tuple[Array, Array]:
    """Average blocks of voxels until each axis is near ``spacing`` mm (coarser axes stay)."""
    factors = voxel_factors(affine, spacing)
    return block_mean(data, factors), coarse_affine(affine, factors)


def voxel_factors(affine: Array, spacing: float) -> tuple[int, int, int]:
    """Block size, in voxels, of `coarse`."""
    return shrink_factors(np.linalg.norm(affine[:3, :3], axis=0), spacing)


def fit_bias(
    ants: Any,
    data: Array,
    affine: Array,
    mask: Array | None = None,
    spacing: float = N4_SPACING,
    spline: float = N4_SPLINE,
) -> Array:
    """N4 bias field of a scan on the grid of `coarse` (Tustison 2010).

    Parameters
    ----------
    data
        Shape (X, Y, Z), non-negative.
    mask
        Where the field is fitted; None: voxels above a tenth of the 98th percentile.
    spacing, spline
        Voxel size of the coarse grid and distance of the spline's knots at the first level, mm.

    Returns
    -------
    Coarse field, positive, mean 1 over the fitted voxels.
    """
    small, grid = coarse(data, affine, spacing)
    if mask is None:
        inside = small > 0.1 * np.percentile(small, 98)
    else:
        inside = (coarse(mask.astype(np.float32), affine, spacing)[0] > 0.5) & (small > 0)
    if inside.sum() < 100:
        raise ScanError("the brain mask holds too few voxels above zero to fit a bias field")
    level = float(np.median(small[inside]))
    box = bounding_box(inside, 2)
    field = ants.n4_bias_field_correction(
        to_ants(ants, small[box] / level, grid),
        mask=to_ants(ants, inside[box], grid),
        shrink_factor=1,
        convergence={"iters": list(N4_ITERATIONS), "tol": 1e-6},
        spline_param=spline,
        return_bias_field=True,
    ).numpy()
    fitted = field[inside[box]]
    if not np.isfinite(field).all() or fitted.min() <= 0:
        raise ScanError("N4 found no positive, finite bias field; check the scan's intensities")
    field = np.clip(field / fitted.mean(), *BIAS_LIMITS)
    around = [(s.start, n - s.stop) for s, n in zip(box, small.shape, strict=True)]
    return np.pad(field, around, mode="edge").astype(np.float32)


def bounding_box(mask: Array, margin: int) -> tuple[slice, ...]:
    """Slices of the box around a mask that is not empty, widened by ``margin`` voxels."""
    box = []
    for axis, size in enumerate(mask.shape):
        seen = np.flatnonzero(mask.any(axis=tuple(k for k in range(3) if k != axis)))
        box.append(slice(max(0, int(seen[0]) - margin), min(size, int(seen[-1]) + 1 + margin)))
    return tuple(box)


def divide_by_bias(data: Array, affine: Array, field: Array, spacing: float = N4_SPACING) -> Array:
    """Divide a scan by the coarse field of `fit_bias`; exact zeros stay exact zeros."""
    out = np.empty(data.shape, np.float32)
    factors = voxel_factors(affine, spacing)
    log_field = np.log(field)
    for start in range(0, data.shape[2], 32):
        slab = slice(start, min(start + 32, data.shape[2]))
        fine = np.exp(upsample(log_field, data.shape, factors, slab))
        np.divide(data[..., slab], fine, out=out[..., slab])
    return out


def centre_of_mass(data: Array, affine: Array) -> Array:
    """World coordinates (RAS, mm) of the centre of mass of non-negative weights."""
    weights = [data.sum(axis=tuple(k for k in range(3) if k != axis)) for axis in range(3)]
    index = [float((w * np.arange(w.size)).sum() / w.sum()) for w in weights]
    return (affine @ np.array([*index, 1.0]))[:3]


def start_matrix(
    centre_fixed: Array, centre_moving: Array, pitch: float, yaw: float = 0.0
) -> Array:
    """Rigid RAS map from fixed to moving points: a turn (yaw) and a nod (pitch), in degrees."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("zx", [yaw, pitch], degrees=True).as_matrix()
    turn[:3, 3] = centre_moving - turn[:3, :3] @ centre_fixed
    return turn


def write_affine(ants: Any, matrix: Array, path: str | Path) -> str:
    """Write a RAS point map (fixed -> moving) as an ITK text transform."""
    lps = RAS_TO_LPS @ matrix @ RAS_TO_LPS
    transform = ants.new_ants_transform(
        precision="float",
        dimension=3,
        transform_type="AffineTransform",
        parameters=[*lps[:3, :3].ravel(), *lps[:3, 3]],
    )
    ants.write_transform(transform, str(path))
    return str(path)


def inverted(ants: Any, paths: Sequence[str], invert: Sequence[bool], folder: Path) -> list[str]:
    """Paths with the flagged linear transforms replaced by their inverses, written to a folder.

    antspyx inverts ``.mat`` files only, and ours are text.

    Raises
    ------
    ScanError
        A flagged transform is a displacement field; give its inverse field instead.
    """
    out = []
    for number, (path, flag) in enumerate(zip(paths, invert, strict=True)):
        if flag and str(path).endswith((".nii", ".nii.gz", ".h5")):
            raise ScanError(f"{path}: only linear transforms can be inverted; give the inverse")
        if flag:
            target = str(folder / f"inverse_{number}.mat")
            ants.write_transform(ants.read_transform(str(path)).invert(), target)
        out.append(target if flag else str(path))
    return out


def register(
    ants: Any,
    fixed: Any,
    moving: Any,
    kind: str,
    start: Sequence[str],
    prefix: str | Path,
    fixed_mask: Any | None = None,
    iterations: tuple[int, ...] = (500, 250, 100),
    sampling: float = 0.2,
) -> list[str]:
    """Register two ANTs images from a start; return transforms that carry moving onto fixed.

    Parameters
    ----------
    kind
        ``Rigid``, ``Affine`` (Mattes mutual information, shrink 4, 2, 1) or ``SyN`` (Avants 2008).
    start
        Transform files to start from.
    prefix
        Path prefix of the files that ANTs writes.
    iterations
        Per level, coarse to fine.
    sampling
        Share of voxels that the metric of ``Rigid`` and ``Affine`` sees.
    """
    levels = len(iterations)
    sizes = tuple(2**k for k in reversed(range(levels)))
    smoothing = tuple(reversed(range(levels)))
    options: dict[str, Any] = (
        {"type_of_transform": "SyNOnly", "reg_iterations": iterations}
        if kind == "SyN"
        else {
            "type_of_transform": kind,
            "aff_iterations": iterations,
            "aff_shrink_factors": sizes,
            "aff_smoothing_sigmas": smoothing,
            "aff_random_sampling_rate": sampling,
        }
    )
    result = ants.registration(
        fixed,
        moving,
        initial_transform=list(start),
        outprefix=str(prefix),
        mask=fixed_mask,
        mask_all_stages=True,
        **options,
    )
    return list(result["fwdtransforms"])


def starts(
    fixed: tuple[Array, Array], moving: tuple[Array, Array], wide: bool = False
) -> list[Array]:
    """Rigid starts (RAS, fixed -> moving): header as it is, then centres of mass, turned."""
    centres = [centre_of_mass(np.maximum(data, 0), affine) for data, affine in (fixed, moving)]
    pitches, yaws = (WIDE_PITCHES, YAWS) if wide else (PITCHES, (0.0,))
    turns = [start_matrix(centres[0], centres[1], pitch, yaw) for pitch in pitches for yaw in yaws]
    return [np.eye(4), *turns]


def align(
    ants: Any,
    fixed: tuple[Array, Array],
    moving: tuple[Array, Array],
    kind: str,
    folder: Path,
    region: Array | None = None,
    wide: bool = False,
) -> list[str]:
    """Register two small images rigidly or affinely from the best of several starts.

    The `TRIED` starts of highest mutual information are each registered; the best result is kept.
    A wide search first registers every start briefly at 16 mm.

    Parameters
    ----------
    fixed, moving
        Data (X, Y, Z), about 4 mm voxels, and RAS affine.
    kind
        ``Rigid`` or ``Affine``.
    region
        Where the fixed image counts, on its grid.
    wide
        Search unusual head positions too.
    """
    pair = [to_ants(ants, *item) for item in (fixed, moving)]
    where = np.ones(fixed[0].shape, bool) if region is None else region
    mask = None if region is None else to_ants(ants, region, fixed[1])

    def score(path: str) -> float:
        moved = ants.apply_transforms(pair[0], pair[1], [path]).numpy()
        return mutual_information(fixed[0][where], moved[where])

    paths = [
        write_affine(ants, matrix, folder / f"start_{number}.txt")
        for number, matrix in enumerate(starts(fixed, moving, wide))
    ]
    if wide:
        paths = [
            register(ants, pair[0], pair[1], "Rigid", [path], f"{path}_", mask, (60, 0, 0), 0.5)[0]
            for path in paths
        ]
    found = []
    for number, start in enumerate(sorted(paths, key=score, reverse=True)[:TRIED]):
        prefix = folder / f"try_{number}_"
        found += register(ants, pair[0], pair[1], kind, [start], prefix, mask, (200, 100, 50))
    return [max(found, key=score)]


def mutual_information(first: Array, second: Array, bins: int = 32) -> float:
    """Mutual information (nats) of two arrays of the same shape from their joint histogram."""
    joint, _, _ = np.histogram2d(first.ravel(), second.ravel(), bins=bins)
    joint = joint / joint.sum()
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / product[seen])).sum())


def register_rigid(
    ants: Any,
    fixed: tuple[Array, Array],
    moving: tuple[Array, Array],
    kind: str,
    folder: Path,
    moving_mask: Array | None = None,
    *,
    fine: bool = True,
) -> Any:
    """Rigid or affine transform of a scan to a template at 2 mm (Mattes mutual information).

    Parameters
    ----------
    fixed, moving
        Data (X, Y, Z) and RAS affine of the template and the scan.
    moving_mask
        Brain mask of the scan; with it only the brain is registered.
    fine
        Go on from 4 mm to 2 mm.

    Returns
    -------
    ANTs transform that, in ``apply_transforms(fixed=template, moving=scan)``, carries the scan.
    """
    if moving_mask is not None:
        moving = (moving[0] * (moving_mask > 0), moving[1])
    return ants.read_transform(coarse_to_fine(ants, fixed, moving, kind, folder, fine=fine))


def coarse_to_fine(
    ants: Any,
    fixed: tuple[Array, Array],
    moving: tuple[Array, Array],
    kind: str,
    folder: Path,
    regions: tuple[Array, Array] | None = None,
    *,
    fine: bool = True,
) -> str:
    """`align` at 4 mm and go on at 2 mm; return the path of the transform.

    Parameters
    ----------
    regions
        Where the fixed image counts, on its `coarse` grids of 4 and 2 mm.
    """
    small = [coarse(*pair, REGISTRATION_SPACING) for pair in (fixed, moving)]
    rough = [coarse(*pair, START_SPACING) for pair in small]
    found = align(ants, rough[0], rough[1], kind, folder, regions[0] if regions else None)
    if not fine:
        return found[0]
    images = [to_ants(ants, *item) for item in small]
    mask = to_ants(ants, regions[1], small[0][1]) if regions else None
    prefix = folder / "fine_"
    return register(ants, images[0], images[1], kind, found, prefix, mask, (50, 20), 0.25)[0]


def load_mask(path: str | Path, data: Array, affine: Array) -> Array:
    """Read a mask as booleans and check that it lies on the scan's grid."""
    mask, grid = load(path)
    if mask.shape != data.shape or not np.allclose(grid, affine, atol=1e-3):
        raise ScanError(f"{path}: not on the scan's grid; resample the mask to the scan")
    if not (mask > 0).any():
        raise ScanError(f"{path}: the brain mask is empty; give another one")
    return mask > 0
