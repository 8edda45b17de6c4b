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
from bids_harmony.workflows.settings import EARLIER_RUN, Job, Place, Preprocessing, given_files

LINEAR = (".txt", ".mat")


def find_given(scan: Scan, job: Job) -> Precomputed:
    """Mask and transform from the user's derivatives, else from an earlier run of ours.

    An earlier run counts only with the same settings and the same raw file; its transform and
    its bias field only with the mask that they were made with, its own or the user's, and the
    transform only with the same anchor. Without ``--derivatives`` a mask is never taken over a
    forced brain extraction.
    """
    prep, out_dir = job.prep, job.place.out_dir
    given = find_precomputed(scan, job.folders, prep.template) if job.folders else Precomputed()
    mask = derivative_path(out_dir, scan, desc="brain", suffix="mask")
    bias = derivative_path(out_dir, scan, desc="n4", suffix="biasfield")
    theirs = given_files(given, out_dir).get("mask", "")
    words = _own(mask, scan, prep, theirs)
    if words is not None and given.mask is None:
        sources = {**given.sources, "mask": words["Description"]}
        given = replace(given, mask=mask, sources=sources, doubts=words.get("Warnings", []))
    if words is not None and prep.bias_field and _own(bias, scan, prep, theirs):
        given = replace(given, bias_field=bias)
    if given.to_template:
        return given
    given = replace(given, registered_to=_anchor_words(scan, job))
    return given if words is None else _with_own_transform(scan, given, theirs, job)


def _with_own_transform(scan: Scan, given: Precomputed, theirs: str, job: Job) -> Precomputed:
    """The transform of an earlier run, if it has the anchor that the scan has now."""
    path = derivative_path(
        job.place.out_dir, scan, from_=scan.suffix, to=job.prep.template, extension=".txt"
    )
    words = _own(path, scan, job.prep, theirs)
    if words is None or words.get("RegisteredTo", "") != given.registered_to:
        return given
    return replace(
        given,
        to_template=path,
        sources={**given.sources, "to_template": EARLIER_RUN},
        transform_doubts=words.get("Warnings", []),
    )


def _anchor_words(scan: Scan, job: Job) -> str:
    """Anchor in words; none counts whose own way to the template is given and not linear."""
    if scan.anchor is None:
        return ""
    theirs = find_given(scan.anchor, job).to_template
    return "" if theirs and theirs.suffix not in LINEAR else made_of(scan.anchor, job)


def made_of(scan: Scan, job: Job) -> str:
    """What decides the voxels of a preprocessed scan, in words, besides the settings."""
    given = find_given(scan, job)
    theirs = given_files(given, job.place.out_dir)
    words = [f"{scan.stem} (sha256 {checksum_of(scan)[:12]})"]
    words += [f"{kind} {text}" for kind, text in sorted(theirs.items())]
    words += [f"registered to {given.registered_to}"] * bool(given.registered_to)
    return ", ".join(words)


def _own(path: Path, scan: Scan, prep: Preprocessing, given: str) -> dict[str, Any] | None:
    """Sidecar of our own derivative when it may be used again, with the user's mask if any."""
    words = _read(sidecar_path(path))
    if words is None or not path.is_file():
        return None
    made = words.get("Preprocessing", {})
    wanted = {**prep.fingerprint, "InputSHA256": checksum_of(scan)}
    return words if made == wanted and (words.get("Given") or "") == given else None


def is_preprocessed(scan: Scan, job: Job, given: Precomputed) -> bool:
    """Whether an earlier run left mask (which is written last), bias field and transform."""
    mask = derivative_path(job.place.out_dir, scan, desc="brain", suffix="mask")
    theirs = given_files(given, job.place.out_dir).get("mask", "")
    whole = given.to_template and (given.bias_field or not job.prep.bias_field)
    return bool(whole) and _own(mask, scan, job.prep, theirs) is not None


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
