"""Find brain masks and transforms that other pipelines, or an earlier run, have already made.

A mask in the wrong space is worse than none. A file is therefore taken only when its entities are
exactly those of the scan, and when nothing suggests that it was made from another scan, or from
several scans averaged: fMRIPrep and sMRIPrep average all T1w of a session or participant, and
their mask then lies in the space of the average.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage

from bids_harmony.bids.entities import IMAGE_EXTENSIONS, split_name
from bids_harmony.bids.names import derivative_path, strip_extension
from bids_harmony.bids.scan import MODALITIES, Scan
from bids_harmony.bids.sidecar import read_sidecar
from bids_harmony.errors import ScanError

#: desc- labels of a brain mask; None is a mask without desc-.
MASK_LABELS = ("brain", "synthstrip", None)
#: Names of a mask of lesions.
LESION_NAMES = ("label-L_mask", "label-lesion_mask", "desc-lesion_mask")
XFM_EXTENSIONS = (".h5", ".txt", ".mat")
#: Largest difference from the identity, mm or parameter units, of from-orig_to-T1w.
IDENTITY = 1e-4


@dataclass(frozen=True)
class Precomputed:
    """What was found for one scan.

    Attributes
    ----------
    mask
        Brain mask in the scan's world space, perhaps on another grid.
    to_template
        Transform from the scan to the template asked for.
    preproc
        Preprocessed (bias-corrected) version of the scan.
    sources
        Name of the folder each came from: keys ``mask``, ``to_template``, ``preproc``,
        ``lesions``.
    notes
        Sentences about what was looked for, taken or refused.
    doubts
        What an earlier run of ours doubted about the mask.
    bias_field
        An earlier run's, on the coarse grid.
    lesions
        Mask of the scan's lesions, in its world space, perhaps on another grid.
    registered_to
        The scan's anchor in words, with what decides its voxels; empty when the scan is registered
        to the template itself or its transform is the user's.
    transform_doubts
        What an earlier run of ours doubted about the transform.
    """

    mask: Path | None = None
    to_template: Path | None = None
    preproc: Path | None = None
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    bias_field: Path | None = None
    lesions: Path | None = None
    registered_to: str = ""
    transform_doubts: list[str] = field(default_factory=list)


def find_precomputed(scan: Scan, folders: Mapping[str, Path], template: str) -> Precomputed:
    """Look for precomputed files of `scan`; the first folder that has one wins.

    Parameters
    ----------
    scan
        The raw scan.
    folders
        Root of each derivative data set by name, in order of preference.
    template
        Template space of a transform, e.g. ``MNI152NLin2009aSym``.

    Returns
    -------
    Precomputed
        Paths are None where nothing is safe to use; `notes` say why.
    """
    found: dict[str, Path] = {}
    sources: dict[str, str] = {}
    notes: list[str] = []
    for name, folder in folders.items():
        here = _in_folder(scan, folder, template)
        marked = first_file(_lesion_names(scan, folder))
        if marked and "lesions" not in found:
            _take(scan, folder, name, {"lesions": marked}, found, sources, notes)
        if here:
            _take(scan, folder, name, here, found, sources, notes)
        elif not marked:
            notes.append(f"{name}: nothing for {scan.stem}; {_looked_for(scan, folder)}")
    return Precomputed(
        found.get("mask"),
        found.get("to_template"),
        found.get("preproc"),
        sources,
        notes,
        lesions=found.get("lesions"),
    )


def _take(
    scan: Scan,
    folder: Path,
    name: str,
    here: Mapping[str, Path],
    found: dict[str, Path],
    sources: dict[str, str],
    notes: list[str],
) -> None:
    """Add what a folder has and no earlier one had, unless it may be of another space."""
    fault = wrong_space(scan, folder, here)
    if fault is not None:
        notes.append(f"{name}: not used for {scan.stem}: {fault}")
        return
    for kind, path in here.items():
        if kind in found:
            continue
        text = grid_note(scan, path) if kind in ("mask", "lesions") else None
        if text is not None:
            notes.append(f"{name}: {text[1]}")
            if not text[0]:
                continue
        found[kind] = path
        sources[kind] = name


def _in_folder(scan: Scan, folder: Path, template: str) -> dict[str, Path]:
    """Files with exactly the scan's entities."""
    found: dict[str, Path | None] = {
        "mask": first_file(_mask_names(scan, folder)),
        "to_template": first_file(
            derivative_path(folder, scan, from_=scan.suffix, to=template, extension=extension)
            for extension in XFM_EXTENSIONS
        ),
        "preproc": first_file(
            derivative_path(folder, scan, desc="preproc", extension=extension)
            for extension in IMAGE_EXTENSIONS
        ),
    }
    return {kind: path for kind, path in found.items() if path is not None}


def _mask_names(scan: Scan, folder: Path) -> Iterable[Path]:
    stem = scan.stem.removesuffix(f"_{scan.suffix}")
    where = folder / scan.folder
    for extension in IMAGE_EXTENSIONS:
        for label in MASK_LABELS:
            desc = f"_desc-{label}" if label else ""
            # The suffix kept in the name can only mean this scan, so it is tried first.
            yield where / f"{scan.stem}{desc}_mask{extension}"
            if label and scan.suffix != "T1w":
                yield where / f"{stem}_desc-{label}{scan.suffix}_mask{extension}"
            yield where / f"{stem}{desc}_mask{extension}"


def _lesion_names(scan: Scan, folder: Path) -> Iterable[Path]:
    stem = scan.stem.removesuffix(f"_{scan.suffix}")
    for extension in IMAGE_EXTENSIONS:
        for name in LESION_NAMES:
            yield folder / scan.folder / f"{scan.stem}_{name}{extension}"
            yield folder / scan.folder / f"{stem}_{name}{extension}"


def first_file(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _looked_for(scan: Scan, folder: Path) -> str:
    stem = scan.stem.removesuffix(f"_{scan.suffix}")
    looked = f"looked for {scan.folder}/{stem}_desc-brain_mask.nii.gz in {folder}"
    if not folder.is_dir():
        return f"{looked}, which does not exist"
    gone = [path for path in _mask_names(scan, folder) if path.is_symlink()]
    if gone:
        return f"content not present: run `datalad get {gone[0]}`"
    near = sorted((folder / f"sub-{scan.subject}").glob("**/*_mask.nii*"))
    near = [path for path in near if "_space-" not in path.name]
    if near:
        there = ", ".join(path.relative_to(folder).as_posix() for path in near[:3])
        looked += f"; there is {there}, whose entities are not those of the scan"
    return looked


def wrong_space(scan: Scan, folder: Path, found: Mapping[str, Path]) -> str | None:
    """Say why the files found may not be in the space of the scan; None when they are."""
    vouching = dict(found)
    if not _named_for(scan, found):  # the scan's own name must not vouch for a file of no name
        vouching.pop("preproc", None)
    raw = _raw_sources(folder, found if scan.suffix == "T1w" else vouching)
    if raw is not None and raw != {scan.stem}:
        return f"it was made from {', '.join(sorted(raw))}, not from this scan alone"
    moved = _moved(scan, folder)
    if moved is not None:
        return moved
    if raw is None and not _named_for(scan, found):
        others = _rivals(scan)
        if others:
            return (
                f"it has no Sources, and may belong to or be an average with {', '.join(others)}"
            )
    return None


def _named_for(scan: Scan, found: Mapping[str, Path]) -> bool:
    """Whether a file's own name tells that it is of this T2w or FLAIR, or of this very scan."""
    mask = found.get("mask") or found.get("lesions")
    if mask is None:
        return scan.suffix != "T1w"
    stem = strip_extension(mask.name)
    own = stem.startswith(f"{scan.stem}_")
    return own or (scan.suffix != "T1w" and stem.endswith(f"{scan.suffix}_mask"))


def _raw_sources(folder: Path, found: Mapping[str, Path]) -> set[str] | None:
    """Stems of the raw scans that the files were made from; None when no sidecar tells."""
    for kind in ("mask", "lesions", "preproc", "to_template"):
        path = found.get(kind)
        if path is None:
            continue
        raw = _raw_parents(path, folder, depth=3)
        if raw:
            return raw
    return None


def _raw_parents(path: Path, folder: Path, depth: int) -> set[str]:
    sidecar = path.with_name(strip_extension(path.name) + ".json")
    if depth == 0 or not sidecar.is_file():
        return set()
    content = read_quietly(sidecar)
    raw: set[str] = set()
    for key in ("RawSources", "Sources"):
        value = content.get(key, [])
        for source in [value] if isinstance(value, str) else list(value or []):
            name = Path(str(source).rsplit(":", 1)[-1]).name
            parsed = split_name(name)
            if parsed is None or parsed.suffix not in MODALITIES:
                continue
            if {"desc", "space"} & parsed.entities.keys():
                raw |= _raw_parents(path.with_name(name), folder, depth - 1)
            else:
                raw.add(strip_extension(name))
    return raw


def read_quietly(sidecar: Path) -> dict[str, Any]:
    """Content of a sidecar; a broken one tells nothing, and the stricter rule then holds."""
    try:
        return read_sidecar(sidecar)
    except ScanError:
        return {}


def _moved(scan: Scan, folder: Path) -> str | None:
    """Say so when fMRIPrep moved the scan before it made the mask: from-orig is no identity."""
    path = derivative_path(folder, scan, from_="orig", to=scan.suffix, extension=".txt")
    if not path.is_file():
        return None
    values = _itk_parameters(path)
    if values is None:
        return f"{path.name} cannot be read as an ITK transform"
    identity = np.r_[np.eye(3).ravel(), np.zeros(3)]
    if values.shape != identity.shape or np.abs(values - identity).max() > IDENTITY:
        return f"{path.name} is not the identity: the mask is in the space of an average"
    return None


def _itk_parameters(path: Path) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
        rows = [line for line in lines if line.startswith("Parameters:")]
        return np.array(rows[0].split()[1:], dtype=float) if len(rows) == 1 else None
    except (OSError, ValueError):
        return None


def _rivals(scan: Scan) -> list[str]:
    """Raw scans for which, or together with which, a file of this name may have been made.

    An average of several scans is named by the entities they share, so it can have this scan's
    name only when another scan has all entities of this one. A T2w or FLAIR must have no T1w
    beside it with these entities either.
    """
    rivals = []
    folders = [scan.path.parent]
    if scan.session is None:
        folders += sorted(scan.path.parent.parent.glob("ses-*/anat"))
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        parsed = split_name(path.name)
        if parsed is None or parsed.extension not in IMAGE_EXTENSIONS:
            continue
        stem = strip_extension(path.name)
        if stem == scan.stem or parsed.suffix not in MODALITIES:
            continue
        # A mask without modality beside a T1w belongs to the T1w, as in fMRIPrep.
        if scan.suffix == "T1w" and parsed.suffix != "T1w":
            continue
        if scan.entities.items() <= parsed.entities.items():
            rivals.append(stem)
    return rivals


def grid_note(scan: Scan, mask: Path) -> tuple[bool, str] | None:
    """Whether a mask on another grid is usable, with a sentence; None for the scan's own grid."""
    try:
        raw, other = open_header(scan.path), open_header(mask)
        shapes = tuple(raw.shape[:3]), tuple(other.shape[:3])
        affines = np.asarray(raw.affine), np.asarray(other.affine)
    except (OSError, ImageFileError, HeaderDataError, ValueError, EOFError) as error:
        return False, f"{mask.name} cannot be read ({error}); not used"
    if shapes[0] == shapes[1] and np.allclose(*affines, atol=1e-2):
        return None
    told = (
        f"{mask.name} has another grid: shape {shapes[1]}, affine {affines[1].round(3).tolist()}"
    )
    if not np.isfinite(affines[1]).all() or abs(np.linalg.det(affines[1][:3, :3])) < 1e-6:
        return False, f"{told}; its affine is not usable, not used"
    if not _overlap(shapes, affines):
        return False, f"{told}; it lies elsewhere than {scan.stem}, not used"
    return True, f"{told}; it is resampled to the grid of {scan.stem}"


def open_header(path: Path) -> SpatialImage:
    """Open an image without reading its voxels.

    Raises
    ------
    ValueError
        If it has no grid.
    """
    image = nib.load(path)
    if not isinstance(image, SpatialImage):
        raise ValueError(f"{path.name} is not an image on a grid")
    return image


def _overlap(shapes: tuple[tuple[int, ...], tuple[int, ...]], affines: tuple[Any, Any]) -> bool:
    """Whether the centre of each image lies within the other."""
    for a, b in ((0, 1), (1, 0)):
        centre = affines[a] @ np.r_[(np.array(shapes[a]) - 1) / 2, 1]
        index = np.linalg.solve(affines[b], centre)[:3]
        if (index < -0.5).any() or (index > np.array(shapes[b]) - 0.5).any():
            return False
    return True
