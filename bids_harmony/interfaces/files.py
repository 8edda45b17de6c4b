"""Reading and writing of the NIfTI files that pass between nodes (work folder only)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np
from numpy.typing import NDArray


def load(path: str | Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Voxels (float32) and affine of a work file."""
    img: Any = nb.loadsave.load(path)
    return np.asanyarray(img.dataobj, dtype=np.float32), img.affine


def load_mask(path: str | Path) -> NDArray[np.bool_]:
    """Voxels above .5."""
    img: Any = nb.loadsave.load(path)
    return np.asanyarray(img.dataobj) > 0.5


def store(data: NDArray[Any], affine: NDArray[np.float64], path: Path) -> str:
    """Write a work file (uncompressed, equal sform and qform) and return its path."""
    img = nb.nifti1.Nifti1Image(data, affine)
    img.set_sform(affine, code=1)
    img.set_qform(affine, code=1, strip_shears=True)
    img.header.set_xyzt_units("mm", "sec")
    img.to_filename(path)
    return str(path)


def sha256(path: str | Path) -> str:
    """Checksum of a file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
