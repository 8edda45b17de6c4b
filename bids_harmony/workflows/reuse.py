"""What an earlier run left behind and can be used again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bids_harmony.bids.derivatives import Precomputed, find_precomputed
from bids_harmony.bids.names import derivative_path, fragment_path, sidecar_path
from bids_harmony.bids.scan import Scan
from bids_harmony.interfaces.files import sha256
from bids_harmony.interfaces.tissues import tissue_label, tissue_paths
from bids_harmony.workflows.settings import EARLIER_RUN, Place, Preprocessing, given_files


def find_given(
    scan: Scan, folders: Mapping[str, Path], prep: Preprocessing, out_dir: Path
) -> Precomputed:
    """Mask and transform from the user's derivatives, else from an earlier run of ours.

    An earlier run counts only with the same settings and the same raw file; its transform and
    its bias field only with the mask that they were made with, its own or the user's. Without
    ``--derivatives`` a mask is never taken over a forced brain extraction.
    """
    given = find_precomputed(scan, folders, prep.template) if folders else Precomputed()
    mask = derivative_path(out_dir, scan, desc="brain", suffix="mask")
    transform = derivative_path(
        out_dir, scan, from_=scan.suffix, to=prep.template, extension=".txt"
    )
    bias = derivative_path(out_dir, scan, desc="n4", suffix="biasfield")
    sources, doubts = dict(given.sources), []
    mask_file, transform_file = given.mask, given.to_template
    theirs = given_files(given, out_dir).get("mask", "")
    words = _own(mask, scan, prep, theirs)
    if mask_file is None and words is not None:
        mask_file, sources["mask"] = mask, words["Description"]
        doubts = words.get("Warnings", [])
    if words is not None and transform_file is None and _own(transform, scan, prep, theirs):
        transform_file, sources["to_template"] = transform, EARLIER_RUN
    again = words is not None and prep.bias_field and _own(bias, scan, prep, theirs)
    return replace(
        given,
        mask=mask_file,
        to_template=transform_file,
        bias_field=bias if again else None,
        sources=sources,
        doubts=doubts,
    )


def _own(path: Path, scan: Scan, prep: Preprocessing, given: str) -> dict[str, Any] | None:
    """Sidecar of our own derivative when it may be used again, with the user's mask if any."""
    words = _read(sidecar_path(path))
    if words is None or not path.is_file():
        return None
    made = words.get("Preprocessing", {})
    wanted = {**prep.fingerprint, "InputSHA256": checksum_of(scan)}
    return words if made == wanted and (words.get("Given") or "") == given else None


def is_preprocessed(scan: Scan, prep: Preprocessing, out_dir: Path, given: Precomputed) -> bool:
    """Whether an earlier run left the brain mask (which is written last) of this file."""
    mask = derivative_path(out_dir, scan, desc="brain", suffix="mask")
    theirs = given_files(given, out_dir).get("mask", "")
    return _own(mask, scan, prep, theirs) is not None


def checksum_of(scan: Scan) -> str:
    """Checksum of the raw file; empty when it cannot be read (its first node says why)."""
    try:
        return sha256(scan.path)
    except OSError:
        return ""


def is_done(
    scan: Scan, place: Place, settings: Mapping[str, Any], *, segments: bool = False
) -> bool:
    """Whether every output of the scan exists and was made with these settings from this file."""
    images = [
        derivative_path(
            place.out_dir,
            scan,
            space=None if s.name == "native" else s.name,
            res=s.res or None,
            desc=place.desc,
        )
        for s in place.spaces
    ]
    # why a model was chosen does not change a voxel
    wanted = {k: v for k, v in settings.items() if k != "ModelChoice"}
    if not fragment_path(place.out_dir, scan, place.desc).is_file():
        return False
    if segments:
        label = tissue_label(str(settings["Method"]), place.desc)
        images += tissue_paths(place.out_dir, scan, label).values()
    for image in images:
        record = (_read(sidecar_path(image)) or {}).get("Harmonization", {})
        if not image.is_file() or any(record.get(k) != v for k, v in wanted.items()):
            return False
        if record.get("InputSHA256") != checksum_of(scan):
            return False
    return True


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
