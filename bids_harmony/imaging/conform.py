"""Make a raw image safe to work on: 3-D, finite, not negative, with an affine that can be right.

Voxels are never moved or resampled: the result has the shape and the affine that nibabel gives for
the input, unless that affine is invalid (see `header_affine`).
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage
from numpy.typing import NDArray

from bids_harmony.errors import ScanError
from bids_harmony.imaging.geometry import header_affine, zooms

#: Limits of what can be a brain scan; mm and voxels.
MIN_VOXEL, MAX_VOXEL = 0.1, 10.0
NOTE_RATIO, MAX_RATIO = 10.0, 25.0
MIN_FIELD, NOTE_FIELD, MAX_FIELD = 30.0, 100.0, 1000.0
MIN_VOXELS = 8
#: Air counts as zero within this share of the bright end of the image.
AIR_SHARE = 0.02
#: With zero air, negative values are ringing or noise up to these pairs of share of the voxels and
#: depth as a share of the bright end.
RINGING = ((0.5, 0.05), (0.02, 0.25), (0.001, np.inf))

#: Bytes unpacked at a time.
PIECE = 1 << 20

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Conformed:
    """An image that is safe to work on.

    Attributes
    ----------
    data
        Shape (X, Y, Z), float32, finite, >= 0.
    affine
        Voxel to RAS+ world in mm, shape (4, 4).
    zooms
        Voxel size in mm.
    notes
        Sentences for the report, empty when nothing was odd.
    offset
        What was added to every voxel to lift a negative background; 0 in general.
    blank
        Where the input was NaN or infinite (now 0), or None when it was finite everywhere.
    """

    data: FloatArray
    affine: NDArray[np.float64]
    zooms: tuple[float, float, float]
    notes: tuple[str, ...] = ()
    offset: float = 0.0
    blank: NDArray[np.bool_] | None = None


def conform(image: SpatialImage | Path | str) -> Conformed:
    """Check an image and make its values finite and not negative.

    - Trailing axes of length 1 are dropped; several volumes are refused.
    - Scale factors of the header are applied.
    - NaN and infinite values become 0.
    - Negative values: with zero air they are clipped at 0 when few and small (interpolation
      ringing); with zero air and many negative values (an image normalised before) everything but
      the air is shifted up; with a negative background the whole image is shifted up.
    - Voxels above 10 mm or below 0.1 mm, a voxel ratio above 25, a field of view below 30 mm or
      above 1 m, or fewer than 8 voxels along an axis are refused; a voxel ratio above 10 or a
      field of view below 100 mm is noted.

    Needs little more memory than the float32 result.

    Raises
    ------
    ScanError
        If the file cannot be read or cannot be a 3-D magnitude image of a brain.
    """
    name = str(image) if isinstance(image, Path | str) else str(image.get_filename() or "image")
    try:
        opened = open_image(Path(image)) if isinstance(image, Path | str) else image
        return _conform(opened)
    except ScanError as error:
        raise ScanError(f"{name}: {error}") from error
    except HeaderDataError as error:
        raise ScanError(
            f"{name}: the header is not usable ({_first_line(error)}); repair it"
        ) from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ScanError(
            f"{name}: cannot be read ({_first_line(error)}); the file may be truncated or "
            "damaged, copy or download it again"
        ) from error


def _conform(image: SpatialImage) -> Conformed:
    shape = _three_axes(tuple(int(n) for n in image.shape))
    _check_dtype(np.dtype(image.get_data_dtype()))
    affine, notes = header_affine(image)
    notes += _check_grid(shape, affine)
    data = _read(image).reshape(shape, order="A")
    blank, found = _zero_nonfinite(data)
    notes += found
    if data.max() == data.min():
        raise ScanError(f"every voxel is {data.flat[0]:g}: there is no image; export it again")
    _check_wrapped(np.dtype(image.get_data_dtype()), data)
    offset, found = _lift_negative(data)
    notes += found
    return Conformed(data, affine, zooms(affine), tuple(notes), offset, blank)


def open_image(path: Path) -> SpatialImage:
    """Open an image without reading its voxels.

    Raises
    ------
    ScanError
        If the file is missing, empty, a git-annex pointer or not an image. The message has no file
        name.
    """
    if not path.exists():
        if path.is_symlink():
            raise ScanError(f"content not present: run `datalad get {path}`")
        raise ScanError("no such file")
    if path.stat().st_size == 0:
        raise ScanError("the file is empty; copy or download it again")
    with path.open("rb") as stream:
        start = stream.read(32)
    if start.startswith((b"/annex/objects/", b"../.git/annex", b".git/annex")):
        raise ScanError(f"content not present: run `datalad get {path}`")
    try:
        loaded = nib.load(path)
    except ImageFileError as error:
        raise ScanError("this is not a NIfTI file; convert the scan again") from error
    except (HeaderDataError, ValueError) as error:
        # With the sform unset, nibabel needs the qform to open a file at all.
        raise ScanError(
            f"neither sform nor qform is usable ({_first_line(error)}); repair the header"
        ) from error
    if not isinstance(loaded, SpatialImage):
        raise ScanError(f"{type(loaded).__name__} is not an image on a grid; convert it to NIfTI")
    return loaded


def _three_axes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        volumes = int(np.prod(shape[3:]))
        raise ScanError(f"{volumes} volumes in one file (shape {_times(shape)}); split it")
    if len(shape) < 3 or min(shape) == 1:
        raise ScanError(f"a single slice (shape {_times(shape)}); a 3-D scan is needed")
    if min(shape) < MIN_VOXELS:
        raise ScanError(f"shape {_times(shape)}: fewer than {MIN_VOXELS} voxels along an axis")
    return shape[0], shape[1], shape[2]


def _check_dtype(dtype: np.dtype[Any]) -> None:
    if dtype.kind == "c":
        raise ScanError("complex values; take the magnitude first")
    if dtype.fields is not None:
        raise ScanError("colour (RGB) values; convert the scan to one intensity per voxel")
    if dtype.kind not in "biuf":
        raise ScanError(f"values of type {dtype}; convert the scan to numbers")


def _check_grid(shape: tuple[int, int, int], affine: NDArray[Any]) -> list[str]:
    sizes = np.array(zooms(affine))
    field = sizes * shape
    told = f"voxels of {_times(sizes)} mm, field of view {_times(field)} mm"
    if sizes.max() > MAX_VOXEL or sizes.min() < MIN_VOXEL:
        raise ScanError(
            f"{told}: voxels must be {MIN_VOXEL:g} to {MAX_VOXEL:g} mm; check the units"
        )
    if field.max() > MAX_FIELD or field.min() < MIN_FIELD:
        raise ScanError(
            f"{told}: the field of view must be {MIN_FIELD:g} to {MAX_FIELD:g} mm along every axis"
        )
    ratio = sizes.max() / sizes.min()
    if ratio > MAX_RATIO:
        raise ScanError(f"{told}: slices are {ratio:.0f} times as thick as wide, too thick to use")
    notes = []
    if ratio > NOTE_RATIO:
        notes.append(f"{told}: slices are {ratio:.0f} times as thick as wide")
    if field.min() < NOTE_FIELD:
        notes.append(f"{told}: this covers only a part of the brain")
    return notes


def _read(image: SpatialImage) -> FloatArray:
    """Voxels as a fresh float32 array, with the header's scale factors applied in place."""
    proxy: Any = image.dataobj
    # Values beyond float32 become infinite and are told as such later.
    with np.errstate(over="ignore", invalid="ignore"):
        if not hasattr(proxy, "get_unscaled"):
            return np.array(proxy, dtype=np.float32, order="K")
        if str(proxy.file_like).endswith(".gz"):
            data = _unpack(proxy)
        else:
            data = np.array(proxy.get_unscaled(), dtype=np.float32, order="K")
        slope, inter = float(proxy.slope), float(proxy.inter)
        if slope != 1:
            data *= np.float32(slope)
        if inter != 0:
            data += np.float32(inter)
    return data


def _unpack(proxy: Any) -> FloatArray:
    """Stored values of a .gz file as float32, converted piece by piece.

    The file is read to its end for the checksum there: nibabel stops before it, and gives wrong
    voxels for a damaged file.
    """
    dtype = np.dtype(proxy.dtype)
    data = np.empty(int(np.prod(proxy.shape)), np.float32)
    step = PIECE // dtype.itemsize
    with gzip.open(proxy.file_like) as stream:
        stream.seek(proxy.offset)
        for start in range(0, data.size, step):
            stop = min(start + step, data.size)
            piece = stream.read((stop - start) * dtype.itemsize)
            if len(piece) < (stop - start) * dtype.itemsize:
                raise EOFError("the file ends before its last voxel")
            data[start:stop] = np.frombuffer(piece, dtype)
        while stream.read(PIECE):
            pass
    return data.reshape(proxy.shape, order=proxy.order)


def _zero_nonfinite(data: FloatArray) -> tuple[NDArray[np.bool_] | None, list[str]]:
    """Set NaN and infinite values to 0 in place."""
    finite = np.isfinite(data)
    bad = int(data.size - np.count_nonzero(finite))
    if bad == 0:
        return None, []
    if bad == data.size:
        raise ScanError("every voxel is NaN or infinite: there is no image; export it again")
    blank = np.logical_not(finite, out=finite)
    data[blank] = 0
    share = bad / data.size
    text = f"{bad} voxels ({100 * share:.2g} %) were NaN or infinite and are 0 now"
    if share > 0.5:
        text += ", more than half the field of view: check that the brain is complete"
    return blank, [text]


def _check_wrapped(dtype: np.dtype[Any], data: FloatArray) -> None:
    """Refuse unsigned 16-bit values stored as signed ones: bright tissue would be negative."""
    if dtype == np.int16 and data.min() < -29000 and data.max() > 29000 and abs(_air(data)) < 3000:
        raise ScanError(
            "values run from one end of int16 to the other with air at 0: unsigned values seem to "
            "be stored as signed; convert the scan again"
        )


def _air(data: FloatArray) -> float:
    """Background level: median over the faces of the field of view."""
    faces = [np.take(data, i, axis=axis).ravel() for axis in range(3) for i in (0, -1)]
    return float(np.median(np.concatenate(faces)))


def _lift_negative(data: FloatArray) -> tuple[float, list[str]]:
    """Make `data` not negative in place; the offset added and what was done."""
    lowest = float(data.min())
    if lowest >= 0:
        return 0.0, []
    air = _air(data)
    bright = float(np.percentile(data[:: max(1, data.shape[0] // 64)], 99.5))
    span = max(bright - min(air, 0.0), 1e-30)
    negative = int(np.count_nonzero(data < 0))
    share = negative / data.size
    told = f"{negative} voxels ({100 * share:.2g} %) were negative, lowest {lowest:g}"
    if air < -AIR_SHARE * span:
        floor = lowest if air - lowest <= 0.1 * span else air
        data -= np.float32(floor)
        np.maximum(data, 0, out=data)
        return -floor, [f"{told}: the background was negative, {-floor:g} was added everywhere"]
    if bright > 0 and _is_ringing(share, -lowest / bright):
        np.maximum(data, 0, out=data)
        return 0.0, [f"{told}: they are 0 now (interpolation ringing)"]
    np.subtract(data, np.float32(lowest), out=data, where=data != 0)
    return -lowest, [
        f"{told}: THE SCAN SEEMS TO BE NORMALISED ALREADY; {-lowest:g} was added to every voxel "
        "that was not 0; use the raw scan if there is one"
    ]


def _is_ringing(share: float, depth: float) -> bool:
    """Whether so many and so deep negative values (share of the bright end) mean nothing."""
    return any(share <= most and depth <= deepest for most, deepest in RINGING)


def _times(values: Any) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def _first_line(error: BaseException) -> str:
    if isinstance(error, gzip.BadGzipFile):
        return "not a gzip file" if str(error).startswith("Not a gz") else "wrong checksum"
    return (str(error).splitlines() or [type(error).__name__])[0]
