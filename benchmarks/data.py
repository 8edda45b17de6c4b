"""Small BIDS data sets for the tables, made of scans that stay where they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_harmony.bids.scan import Scan
from bids_harmony.bids.write import atomic_write_text, save_nifti, write_json
from bids_harmony.errors import MissingInputError
from bids_harmony.imaging.mask import looks_skull_stripped
from bids_harmony.methods.base import Volume

MARGIN = 8  # voxels


def volume_of(
    scan: Scan, scaled: NDArray[Any], mask: NDArray[np.bool_], affine: NDArray[Any], modality: str
) -> Volume:
    """A scaled scan on the raw grid as methods are given it."""
    zooms = [float(z) for z in nb.affines.voxel_sizes(affine)]
    return Volume(
        np.where(mask, scaled, 0).astype(np.float32), mask, modality,
        (zooms[0], zooms[1], zooms[2]), scan.site, scan.stem, scan.subject,
        nb.orientations.aff2axcodes(affine),
    )  # fmt: skip


def need(path: Path) -> Path:
    """Return a path that exists.

    Raises
    ------
    MissingInputError
        If it does not.
    """
    if not path.exists():
        raise MissingInputError(f"{path} does not exist; name the data set with --data")
    return path


def write_description(root: Path, name: str) -> None:
    """Write dataset_description.json of a raw data set."""
    words = {"Name": name, "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    write_json(root / "dataset_description.json", words)


def write_participants(root: Path, sites: Mapping[str, str]) -> None:
    """Write participants.tsv with the site of each; it comes last and marks a finished set."""
    lines = ["participant_id\tsite", *(f"sub-{k}\t{v}" for k, v in sites.items())]
    atomic_write_text(root / "participants.tsv", "\n".join(lines) + "\n")


def copy_participant(source: Path, root: Path) -> None:
    """Put a participant's files below another root: skull-stripped scans cut, the rest linked."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        target = root / source.name / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            continue
        if not (path.name.endswith("_T1w.nii.gz") and cut(path, target)):
            target.symlink_to(path.absolute())


def cut(path: Path, target: Path) -> bool:
    """Write a skull-stripped scan cut to its brain; False, and nothing written, for a head.

    Voxels and their places stay; what is cut away is zero and only costs time.
    """
    image = nb.load(path)
    data = np.asarray(image.dataobj, dtype=np.float32)  # type: ignore[attr-defined]
    if not looks_skull_stripped(data, image.affine):  # type: ignore[attr-defined]
        return False
    (box,) = ndimage.find_objects((data != 0).astype(np.uint8))
    corner = [max(0, s.start - MARGIN) for s in box]
    box = tuple(slice(c, s.stop + MARGIN) for c, s in zip(corner, box, strict=True))
    affine = image.affine.copy()  # type: ignore[attr-defined]
    affine[:3, 3] += affine[:3, :3] @ corner
    save_nifti(data[box], affine, target)
    return True
