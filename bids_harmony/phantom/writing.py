"""Files of the phantom: the same bytes for the same content, never half-written."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from bids_harmony.errors import OutputError


def write_new(path: Path, content: bytes) -> None:
    """Write a file in one step: a temporary file in the same folder, then a rename.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as handle:
            temporary = Path(handle.name)
            try:
                handle.write(content)
                handle.close()
                temporary.chmod(0o666 & ~_umask())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, keys in the order given."""
    write_new(path, (json.dumps(content, indent=2) + "\n").encode())


def write_tsv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table with a header row, tab-separated."""
    lines = ["\t".join(str(cell) for cell in row) for row in (header, *rows)]
    write_new(path, ("\n".join(lines) + "\n").encode())


def image_bytes(data: NDArray[Any], affine: NDArray[np.floating], *, slope: float = 1.0) -> bytes:
    """NIfTI file, compressed, without a time stamp.

    Parameters
    ----------
    data
        Voxels as stored.
    affine
        Voxel to scanner coordinates, mm; goes to sform and qform.
    slope
        Factor from stored to real values.
    """
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(slope, 0.0)
    return gzip.compress(image.to_bytes(), compresslevel=3, mtime=0)
