"""Write outputs atomically and byte for byte reproducibly.

Every file is written to a temporary name in its own folder and renamed over the old one, so that a
reader, or another process that writes the same file, sees the old content or the new one, never
half of it.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from bids_harmony.errors import OutputError

# A float32 T1w of 24 MB, seconds and MB on one core: level 1 0.2 and 5.2, level 4 0.2 and 4.6,
# level 6 0.9 and 4.2, level 9 6.7 and 4.1.
GZIP_LEVEL = 4

_CURES = {
    errno.ENOSPC: "free some space or choose another output folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another output folder",
    errno.EROFS: "the file system is read-only; mount the output folder writable",
    errno.EACCES: "no permission; make the output folder writable for this user",
    errno.EPERM: "no permission; make the output folder writable for this user",
    errno.ENOTDIR: "part of this path is a file, not a folder; choose another output folder",
}


def output_error(path: Path, error: OSError) -> OutputError:
    """Say which output could not be written, why and what to do."""
    cure = _CURES.get(error.errno or 0, "check the output folder")
    return OutputError(f"cannot write {path}: {error.strerror or error}; {cure}")


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that becomes `path` when the block ends without an error.

    Raises
    ------
    OutputError
        If the file cannot be created, written or renamed. No temporary file is left behind.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".harmony-", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            # mkstemp makes files only their owner can read; outputs are shared like any other.
            os.fchmod(stream.fileno(), 0o666 & ~_umask())
            # Without this a full disk may be told only after the rename (NFS, delayed allocation).
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _umask() -> int:
    """Umask of this process, read without changing it where the system tells it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0o022
    for line in status.splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022


def atomic_write_bytes(path: Path, content: bytes) -> bool:
    """Write `content` to `path`, unless it is already there; True when something was written."""
    with suppress(OSError):
        if path.stat().st_size == len(content) and path.read_bytes() == content:
            return False
    with atomic_file(path) as stream:
        stream.write(content)
    return True


def atomic_write_text(path: Path, content: str) -> bool:
    """Write UTF-8 text to `path`, unless it is already there; True when something was written."""
    return atomic_write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, content: Mapping[str, Any]) -> bool:
    """Write a JSON object with sorted keys; True when something was written.

    Raises
    ------
    ValueError
        If a number is not finite: JSON cannot hold it.
    """
    text = json.dumps(
        content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False, default=_plain
    )
    return atomic_write_text(path, text + "\n")


def _plain(value: Any) -> Any:
    """Numpy scalars and arrays, and paths, as JSON knows them."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def write_tsv(
    path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> bool:
    """Write a BIDS table; True when something was written.

    Missing values, None and non-finite numbers become ``n/a``; tabs and line ends in a text become
    spaces.

    Parameters
    ----------
    rows
        One mapping per row.
    columns
        Column order; by default the order in which the keys first appear.
    """
    names = (
        list(columns) if columns is not None else list(dict.fromkeys(k for r in rows for k in r))
    )
    lines = ["\t".join(names)]
    lines += ["\t".join(_cell(row.get(name)) for name in names) for row in rows]
    return atomic_write_text(path, "\n".join(lines) + "\n")


def _cell(value: Any) -> str:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "n/a"
    if isinstance(value, float):
        return format(value, ".7g")
    return " ".join(str(value).split()) or "n/a"


def save_nifti(
    data: NDArray[Any],
    affine: NDArray[np.floating[Any]],
    path: Path,
    *,
    dtype: type[np.floating[Any]] | type[np.integer[Any]] = np.float32,
    header: nib.Nifti1Header | None = None,
) -> Path:
    """Write a NIfTI-1 image whose sform and qform are the same.

    The same arguments give the same bytes: no time stamp, no file name and a fixed compression
    level.

    Parameters
    ----------
    data
        Shape (X, Y, Z) or (X, Y, Z, N), finite.
    affine
        Voxel to world in mm, shape (4, 4).
    path
        Ends with ``.nii.gz`` (or ``.nii``).
    dtype
        ``float32`` for images, ``uint8`` for masks; values must fit.
    header
        Header of the source: its xform code and its text fields are kept.

    Returns
    -------
    path
        The file written.

    Raises
    ------
    ValueError
        If `data` is not finite, does not fit `dtype`, or `affine` is not a proper affine.
    OutputError
        If the file cannot be written.
    """
    values = _as_type(data, np.dtype(dtype), path)
    if not np.isfinite(affine).all() or abs(np.linalg.det(np.asarray(affine)[:3, :3])) < 1e-12:
        raise ValueError(f"{path.name}: the affine is singular or not finite")
    image = nib.Nifti1Image(values, affine, dtype=values.dtype)
    image.header.set_xyzt_units("mm")
    if header is not None:
        image.header["descrip"] = header["descrip"]
    code = _xform_code(header)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    raw = image.to_bytes()
    with atomic_file(path) as stream:
        if path.name.endswith(".gz"):
            with gzip.GzipFile("", "wb", GZIP_LEVEL, stream, mtime=0) as packed:
                packed.write(raw)
        else:
            stream.write(raw)
    return path


def _as_type(data: NDArray[Any], dtype: np.dtype[Any], path: Path) -> NDArray[Any]:
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        count = int(data.size - np.count_nonzero(np.isfinite(data)))
        raise ValueError(f"{path.name}: {count} values are not finite, nothing was written")
    if data.dtype == dtype:
        return data
    if dtype.kind in "iu" and data.size:
        bounds = np.iinfo(dtype)
        whole = data.dtype.kind in "iub" or np.array_equal(data, np.rint(data))
        if not whole or data.min() < bounds.min or data.max() > bounds.max:
            raise ValueError(f"{path.name}: the values do not fit {dtype}")
    with np.errstate(over="ignore"):
        converted = data.astype(dtype)
    if dtype.kind == "f" and not np.isfinite(converted).all():
        raise ValueError(f"{path.name}: the values do not fit {dtype}")
    return converted


def _xform_code(header: nib.Nifti1Header | None) -> int:
    """Code of the source's best affine; 1 (scanner) when the source does not tell."""
    if header is None:
        return 1
    return int(header["sform_code"]) or int(header["qform_code"]) or 1
