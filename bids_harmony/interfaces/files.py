"""Reading and writing of the NIfTI files that pass between nodes (work folder only)."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np
from nibabel.processing import resample_from_to
from numpy.typing import NDArray

from bids_harmony.errors import ScanError


def load(path: str | Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Voxels (float32) and affine of a work file."""
    img: Any = nb.loadsave.load(path)
    return np.asanyarray(img.dataobj, dtype=np.float32), img.affine


def load_mask(path: str | Path) -> NDArray[np.bool_]:
    """Voxels above .5."""
    img: Any = nb.loadsave.load(path)
    return np.asanyarray(img.dataobj) > 0.5


def load_given_mask(
    path: str | Path, shape: tuple[int, ...], affine: NDArray[Any], what: str
) -> NDArray[np.bool_]:
    """A mask of the user's, resampled to this grid if it has another.

    Parameters
    ----------
    what
        For the message, such as ``brain mask``.

    Raises
    ------
    ScanError
        If it has not three axes.
    """
    img: Any = nb.funcs.squeeze_image(nb.loadsave.load(path))
    if len(img.shape) != 3:
        raise ScanError(
            f"{path}: a {what} has three axes, not {len(img.shape)}; mend it or leave out "
            "--derivatives"
        )
    binary = np.asanyarray(img.dataobj) > 0.5
    if img.shape == shape and np.allclose(img.affine, affine, atol=1e-3):
        return binary
    moved = nb.nifti1.Nifti1Image(binary.astype("f4"), img.affine)
    return np.asanyarray(resample_from_to(moved, (shape, affine), order=1).dataobj) > 0.5


def store(data: NDArray[Any], affine: NDArray[np.float64], path: Path) -> str:
    """Write a work file (uncompressed, equal sform and qform) and return its path."""
    img = nb.nifti1.Nifti1Image(data, affine)
    img.set_sform(affine, code=1)
    img.set_qform(affine, code=1, strip_shears=True)
    img.header.set_xyzt_units("mm", "sec")
    img.to_filename(path)
    return str(path)


def sha256(path: str | Path) -> str:
    """Checksum of a file's bytes, read again when size or time of change are others."""
    state = Path(path).stat()
    return _sha256(str(path), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=65536)
def _sha256(path: str, size: int, changed: int) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
