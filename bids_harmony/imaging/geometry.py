"""Affines: which one a header means, whether it can be right, and reorientation without loss."""

from __future__ import annotations

from itertools import product
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from bids_harmony.errors import ScanError

FloatMatrix = NDArray[np.float64]

#: sform and qform agree when no corner of the image moves by more than this share of a voxel.
AGREE_VOXELS = 0.1
#: Largest cosine between two voxel axes that still counts as a right angle (0.6 degrees).
MAX_SHEAR = 0.01


def is_valid(affine: NDArray[Any] | None) -> bool:
    """Whether an affine is finite, not singular and has 0 0 0 1 as its last row."""
    if affine is None or not np.isfinite(affine).all():
        return False
    if not np.allclose(affine[3], (0, 0, 0, 1)):
        return False
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if (sizes < 1e-6).any():
        return False
    return bool(abs(np.linalg.det(affine[:3, :3] / sizes)) > 1e-3)


def corners(shape: tuple[int, ...], affine: NDArray[Any]) -> FloatMatrix:
    """World coordinates in mm of the 8 corner voxels, shape (8, 3)."""
    index = np.array(list(product(*((0, n - 1) for n in shape[:3]))), dtype=float)
    return index @ np.asarray(affine, float)[:3, :3].T + np.asarray(affine, float)[:3, 3]


def corner_distance(shape: tuple[int, ...], first: NDArray[Any], second: NDArray[Any]) -> float:
    """Largest distance in mm between the same corner under two affines."""
    difference = corners(shape, first) - corners(shape, second)
    return float(np.linalg.norm(difference, axis=1).max())


def zooms(affine: NDArray[Any]) -> tuple[float, float, float]:
    """Voxel size in mm along the three array axes."""
    x, y, z = np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0)
    return float(x), float(y), float(z)


def shear(affine: NDArray[Any]) -> float:
    """Largest absolute cosine between two voxel axes; 0 when all are at right angles."""
    axes = np.asarray(affine, float)[:3, :3] / np.array(zooms(affine))
    cosines = np.abs(axes.T @ axes - np.eye(3))
    return float(cosines.max())


def same_grid(
    shape: tuple[int, ...],
    affine: NDArray[Any],
    other_shape: tuple[int, ...],
    other_affine: NDArray[Any],
    *,
    tolerance: float = AGREE_VOXELS,
) -> bool:
    """Whether two images have the same voxels at the same places (`tolerance` in voxels)."""
    if tuple(shape[:3]) != tuple(other_shape[:3]):
        return False
    return corner_distance(shape, affine, other_affine) <= tolerance * min(zooms(affine))


def header_affine(image: nib.spatialimages.SpatialImage) -> tuple[FloatMatrix, list[str]]:
    """Affine that an image means, and what is odd about it.

    The sform wins, as in nibabel and fMRIPrep: a valid one can only have been written on purpose,
    and the result is then what every nibabel-based program reads. ITK may prefer the qform, so a
    disagreement is told loudly; what this package hands to ITK always has one affine only.

    ========== ========== ========= ==================================================
    sform      qform      agree     result
    ========== ========== ========= ==================================================
    >0 valid   >0 valid   yes       sform
    >0 valid   >0 valid   no        sform, loud note
    >0 valid   0                    sform
    >0 valid   >0 invalid           sform, note
    >0 invalid >0 valid             qform, note
    >0 invalid 0                    ScanError
    >0 invalid >0 invalid           ScanError
    0          >0 valid             qform
    0          >0 invalid           ScanError
    0          0                    voxel sizes only, loud note: left and right unknown
    ========== ========== ========= ==================================================

    An sheared sform (angle between voxel axes off by more than 0.6 degrees) is not representable
    in ITK: ScanError.

    Returns
    -------
    affine, notes
        Shape (4, 4), float64, voxel to RAS+ world in mm; sentences for the report.

    Raises
    ------
    ScanError
        If no form is usable. The message has no file name; the caller adds it.
    """
    header = image.header
    if not isinstance(header, nib.Nifti1Header):
        affine = np.asarray(image.affine, float)
        notes: list[str] = []
        if not is_valid(affine):
            raise ScanError("the affine is singular or not finite; repair the header")
    else:
        affine, notes = _nifti_affine(header, tuple(image.shape))
    if shear(affine) > MAX_SHEAR:
        angle = np.degrees(np.arcsin(min(1.0, shear(affine))))
        raise ScanError(
            f"the voxel axes are {angle:.1f} degrees off the right angle (sheared affine); "
            "resample the scan to a rectangular grid"
        )
    return affine, notes


def _form(header: nib.Nifti1Header, name: str) -> tuple[int, FloatMatrix | None]:
    """Code of a form and its affine; None when it is unset or invalid."""
    code = int(header[f"{name}_code"])
    if code == 0:
        return 0, None
    try:
        affine = header.get_sform() if name == "sform" else header.get_qform()
    except (HeaderDataError, ValueError, np.linalg.LinAlgError):
        return code, None
    return code, (np.asarray(affine, float) if is_valid(affine) else None)


def _nifti_affine(
    header: nib.Nifti1Header, shape: tuple[int, ...]
) -> tuple[FloatMatrix, list[str]]:
    s_code, sform = _form(header, "sform")
    q_code, qform = _form(header, "qform")
    if sform is not None:
        return sform, _sform_notes(sform, q_code, qform, shape)
    if qform is not None:
        odd = ["the sform is singular or not finite: the qform is used"] if s_code else []
        return qform, odd
    if s_code or q_code:
        raise ScanError(
            "neither sform nor qform is usable (singular or not finite); repair the header"
        )
    base = np.asarray(header.get_base_affine(), float)
    if not is_valid(base):
        raise ScanError("the header has no orientation and no voxel size; repair the header")
    return base, [
        "ORIENTATION UNKNOWN: sform and qform codes are both 0, so left and right cannot be told; "
        "the voxel sizes are used with the axes as stored (taken as left, anterior, superior)"
    ]


def _sform_notes(
    sform: FloatMatrix, q_code: int, qform: FloatMatrix | None, shape: tuple[int, ...]
) -> list[str]:
    if q_code == 0:
        return []
    if qform is None:
        return ["the qform is singular or not finite: the sform is used"]
    distance = corner_distance(shape, sform, qform)
    if distance <= AGREE_VOXELS * min(zooms(sform)):
        return []
    return [
        f"SFORM AND QFORM DISAGREE by up to {distance:.1f} mm: the sform is used; "
        "check left and right in the report"
    ]


def to_ras(
    data: NDArray[Any], affine: NDArray[Any]
) -> tuple[NDArray[Any], FloatMatrix, NDArray[Any]]:
    """Flip and permute axes so that they run left-right, posterior-anterior, inferior-superior.

    Only whole axes move; no value changes. `from_ras` is the exact inverse.

    Returns
    -------
    data, affine, orientation
        View of the data, its affine, and the nibabel orientation needed to go back.
    """
    orientation = io_orientation(affine)
    moved = apply_orientation(data, orientation)
    return moved, np.asarray(affine) @ inv_ornt_aff(orientation, data.shape[:3]), orientation


def from_ras(data: NDArray[Any], orientation: NDArray[Any]) -> NDArray[Any]:
    """Undo `to_ras`: bring data (X, Y, Z, ...) in RAS order back to the axes it came from."""
    back = ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), orientation)
    return apply_orientation(data, back)
