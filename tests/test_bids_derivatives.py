"""Precomputed masks and transforms: taken only when they are surely of this scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bids_harmony.bids.derivatives import find_precomputed
from bids_harmony.bids.entities import split_name
from bids_harmony.bids.names import derivative_path, sidecar_path
from bids_harmony.bids.scan import Scan
from bids_harmony.bids.write import save_nifti, write_json

TEMPLATE = "MNI152NLin2009aSym"
AFFINE = np.diag([2.0, 2, 2, 1])
DATA = np.ones((20, 22, 24), np.float32)


def raw(tmp_path: Path, name: str, affine=AFFINE) -> Scan:
    """Write a raw scan and describe it."""
    parsed = split_name(f"{name}.nii.gz")
    assert parsed is not None
    scan = Scan(Path("/x"), parsed.entities, parsed.suffix)
    path = tmp_path / "raw" / scan.folder / f"{name}.nii.gz"
    save_nifti(DATA, affine, path)
    return Scan(path, parsed.entities, parsed.suffix)


def put(
    tmp_path: Path, name: str, *, affine=AFFINE, data=DATA, pipeline="prep", **sidecar
) -> Path:
    """Write a derivative, named by its path below the pipeline's folder."""
    path = tmp_path / pipeline / name
    if name.endswith((".h5", ".txt")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    else:
        save_nifti(data, affine, path)
    if sidecar:
        write_json(sidecar_path(path), sidecar)
    return path


def look(tmp_path: Path, scan: Scan, *pipelines: str):
    return find_precomputed(scan, {p: tmp_path / p for p in pipelines or ("prep",)}, TEMPLATE)


def orig_xfm(tmp_path: Path, name: str, shift: float) -> None:
    path = put(tmp_path, name)
    path.write_text(
        "#Insight Transform File V1.0\n#Transform 0\n"
        "Transform: AffineTransform_double_3_3\n"
        f"Parameters: 1 0 0 0 1 0 0 0 1 {shift} 0 0\nFixedParameters: 0 0 0\n"
    )


def test_fmriprep_layout(tmp_path):
    scan = raw(tmp_path, "sub-01_ses-1_acq-x_run-2_T1w")
    stem = "sub-01/ses-1/anat/sub-01_ses-1_acq-x_run-2"
    mask = put(tmp_path, f"{stem}_desc-brain_mask.nii.gz")
    preproc = put(tmp_path, f"{stem}_desc-preproc_T1w.nii.gz")
    xfm = put(tmp_path, f"{stem}_from-T1w_to-{TEMPLATE}_mode-image_xfm.h5")
    put(tmp_path, f"{stem}_from-T1w_to-MNI152NLin6Asym_mode-image_xfm.h5")
    put(tmp_path, f"{stem}_space-{TEMPLATE}_desc-brain_mask.nii.gz")
    orig_xfm(tmp_path, f"{stem}_from-orig_to-T1w_mode-image_xfm.txt", 0)
    found = look(tmp_path, scan)
    assert (found.mask, found.preproc, found.to_template) == (mask, preproc, xfm)
    assert found.sources == {"mask": "prep", "preproc": "prep", "to_template": "prep"}
    assert found.notes == []


@pytest.mark.parametrize(
    "name",
    [
        "sub-01_desc-brain_mask.nii.gz",
        "sub-01_desc-synthstrip_mask.nii.gz",
        "sub-01_mask.nii.gz",
        "sub-01_mask.nii",
        "sub-01_T1w_mask.nii.gz",
        "sub-01_T1w_desc-brain_mask.nii.gz",
    ],
)
def test_names_of_masks(tmp_path, name):
    scan = raw(tmp_path, "sub-01_T1w")
    mask = put(tmp_path, f"sub-01/anat/{name}")
    assert look(tmp_path, scan).mask == mask


@pytest.mark.parametrize(
    ("scan", "mask"),
    [
        ("sub-01_ses-1_T1w", "sub-01/ses-2/anat/sub-01_ses-2"),
        ("sub-01_ses-1_T1w", "sub-01/anat/sub-01"),
        ("sub-01_T1w", "sub-01/ses-1/anat/sub-01_ses-1"),
        ("sub-01_run-1_T1w", "sub-01/anat/sub-01_run-2"),
        ("sub-01_run-1_T1w", "sub-01/anat/sub-01_run-01"),
        ("sub-01_run-1_T1w", "sub-01/anat/sub-01"),
        ("sub-01_T1w", "sub-01/anat/sub-01_acq-x"),
        ("sub-01_acq-x_T1w", "sub-01/anat/sub-01"),
    ],
)
def test_entities_must_be_the_same(tmp_path, scan, mask):
    put(tmp_path, f"{mask}_desc-brain_mask.nii.gz")
    one = raw(tmp_path, scan)
    found = look(tmp_path, one)
    assert found.mask is None
    assert found.sources == {}
    (note,) = found.notes
    stem = scan.removesuffix("_T1w")
    assert f"looked for {one.folder}/{stem}_desc-brain_mask.nii.gz" in note
    assert f"there is {mask}_desc-brain_mask.nii.gz, whose entities" in note


def test_nothing_there(tmp_path):
    scan = raw(tmp_path, "sub-01_T1w")
    (note,) = look(tmp_path, scan).notes
    assert "which does not exist" in note
    (tmp_path / "prep").mkdir()
    (note,) = look(tmp_path, scan).notes
    assert note.endswith(f"desc-brain_mask.nii.gz in {tmp_path / 'prep'}")


def test_content_that_was_dropped(tmp_path):
    scan = raw(tmp_path, "sub-01_T1w")
    link = tmp_path / "prep/sub-01/anat/sub-01_desc-brain_mask.nii.gz"
    link.parent.mkdir(parents=True)
    link.symlink_to(".git/annex/objects/x")
    found = look(tmp_path, scan)
    assert found.mask is None
    assert f"run `datalad get {link}`" in found.notes[0]


def test_the_first_folder_wins_for_each_kind(tmp_path):
    scan = raw(tmp_path, "sub-01_T1w")
    first = put(tmp_path, "sub-01/anat/sub-01_desc-brain_mask.nii.gz", pipeline="a")
    put(tmp_path, "sub-01/anat/sub-01_desc-brain_mask.nii.gz", pipeline="b")
    xfm = f"sub-01/anat/sub-01_from-T1w_to-{TEMPLATE}_mode-image_xfm.txt"
    second = put(tmp_path, xfm, pipeline="b")
    found = look(tmp_path, scan, "a", "b")
    assert (found.mask, found.to_template) == (first, second)
    assert found.sources == {"mask": "a", "to_template": "b"}


@pytest.mark.parametrize(
    ("sidecar", "used"),
    [
        ({"RawSources": ["sub-01/anat/sub-01_T1w.nii.gz"]}, True),
        ({"Sources": ["bids:raw:sub-01/anat/sub-01_T1w.nii.gz"]}, True),
        ({"Sources": "bids:raw:sub-01/anat/sub-01_T1w.nii.gz"}, True),
        ({"Sources": ["bids:raw:sub-01/anat/sub-01_run-2_T1w.nii.gz"]}, False),
        ({"Sources": ["bids:raw:sub-01/anat/sub-01_T2w.nii.gz"]}, False),
        ({"RawSources": ["x/sub-01_T1w.nii.gz", "x/sub-01_acq-b_T1w.nii.gz"]}, False),
    ],
)
def test_sources_decide(tmp_path, sidecar, used):
    scan = raw(tmp_path, "sub-01_T1w")
    mask = put(tmp_path, "sub-01/anat/sub-01_desc-brain_mask.nii.gz", **sidecar)
    found = look(tmp_path, scan)
    assert found.mask == (mask if used else None)
    assert bool(found.notes) != used
    if not used:
        assert "not from this scan alone" in found.notes[0]


def test_sources_are_followed_through_preproc(tmp_path):
    """sMRIPrep's mask names the preprocessed T1w, and that one names the raw scans."""
    scan = raw(tmp_path, "sub-01_T1w")
    stem = "sub-01/anat/sub-01_desc-"
    put(tmp_path, f"{stem}brain_mask.nii.gz", Sources=[f"bids::{stem}preproc_T1w.nii.gz"])
    sources = ["bids:raw:sub-01/anat/sub-01_T1w.nii.gz"]
    put(tmp_path, f"{stem}preproc_T1w.nii.gz", Sources=sources)
    assert look(tmp_path, scan).mask is not None
    sources = [*sources, "bids:raw:sub-01/anat/sub-01_acq-b_T1w.nii.gz"]
    put(tmp_path, f"{stem}preproc_T1w.nii.gz", Sources=sources)
    found = look(tmp_path, scan)
    assert (found.mask, found.preproc, found.to_template) == (None, None, None)
    assert "sub-01_T1w, sub-01_acq-b_T1w" in found.notes[0] or "sub-01_acq-b_T1w" in found.notes[0]


def test_circular_and_broken_sidecars(tmp_path):
    scan = raw(tmp_path, "sub-01_T1w")
    stem = "sub-01/anat/sub-01_desc-"
    put(tmp_path, f"{stem}preproc_T1w.nii.gz", Sources=[f"bids::{stem}preproc_T1w.nii.gz"])
    mask = put(tmp_path, f"{stem}brain_mask.nii.gz")
    sidecar_path(mask).write_text("{broken")
    assert look(tmp_path, scan).mask == mask


@pytest.mark.parametrize(
    ("scan", "other", "used"),
    [
        # An average of these two T1w would have the name of the first one.
        ("sub-01_T1w", "sub-01_acq-b_T1w", False),
        ("sub-01_acq-b_T1w", "sub-01_T1w", True),
        ("sub-01_run-1_T1w", "sub-01_run-2_T1w", True),
        ("sub-01_acq-a_T1w", "sub-01_acq-a_run-2_T1w", False),
        # A mask that does not tell its modality is the T1w's.
        ("sub-01_T1w", "sub-01_T2w", True),
        ("sub-01_T2w", "sub-01_T1w", False),
        ("sub-01_T2w", "sub-01_acq-b_T1w", False),
        ("sub-01_FLAIR", "sub-01_T2w", False),
        ("sub-01_FLAIR", "sub-02_T1w", True),
        ("sub-01_ses-1_T1w", "sub-01_ses-2_T1w", True),
        ("sub-01_T1w", "sub-01_ses-2_T1w", False),
    ],
)
def test_without_sources_a_rival_decides(tmp_path, scan, other, used):
    raw(tmp_path, other)
    one = raw(tmp_path, scan)
    stem = one.stem.removesuffix(f"_{one.suffix}")
    put(tmp_path, f"{one.folder}/{stem}_desc-brain_mask.nii.gz")
    found = look(tmp_path, one)
    assert (found.mask is not None) == used
    if not used:
        assert f"average with {other}" in found.notes[0]


def test_a_moved_scan_is_refused(tmp_path):
    """fMRIPrep's from-orig_to-T1w is the identity only for a scan that was not averaged."""
    scan = raw(tmp_path, "sub-01_run-1_T1w")
    stem = "sub-01/anat/sub-01_run-1"
    mask = put(tmp_path, f"{stem}_desc-brain_mask.nii.gz")
    name = f"{stem}_from-orig_to-T1w_mode-image_xfm.txt"
    orig_xfm(tmp_path, name, 0.5)
    found = look(tmp_path, scan)
    assert found.mask is None
    assert "is not the identity" in found.notes[0]
    (tmp_path / "prep" / name).write_text("binary")
    assert "cannot be read as an ITK transform" in look(tmp_path, scan).notes[0]
    orig_xfm(tmp_path, name, 0)
    assert look(tmp_path, scan).mask == mask


@pytest.mark.parametrize("name", ["label-L_mask", "label-lesion_mask", "desc-lesion_mask"])
def test_lesions_come_from_any_folder(tmp_path, name):
    scan = raw(tmp_path, "sub-01_T1w")
    mask = put(tmp_path, "sub-01/anat/sub-01_desc-brain_mask.nii.gz")
    lesions = put(tmp_path, f"sub-01/anat/sub-01_{name}.nii.gz", pipeline="marks")
    found = look(tmp_path, scan, "prep", "marks")
    assert (found.mask, found.lesions) == (mask, lesions)
    assert found.sources == {"mask": "prep", "lesions": "marks"}
    assert not found.notes


def test_lesions_of_perhaps_another_scan_are_not_taken(tmp_path):
    scan = raw(tmp_path, "sub-01_FLAIR")
    raw(tmp_path, "sub-01_T1w")
    put(tmp_path, "sub-01/anat/sub-01_label-L_mask.nii.gz")
    found = look(tmp_path, scan)
    assert found.lesions is None
    assert "sub-01_T1w" in found.notes[0]
    own = put(tmp_path, "sub-01/anat/sub-01_FLAIR_label-L_mask.nii.gz")
    assert look(tmp_path, scan).lesions == own


def test_own_earlier_run(tmp_path):
    """T1w and T2w of one session find their own files, by the names that this package gives."""
    out = tmp_path / "prep"
    for one in (raw(tmp_path, "sub-01_T1w"), raw(tmp_path, "sub-01_T2w")):
        mask = derivative_path(out, one, desc="brain", suffix="mask")
        save_nifti(DATA, AFFINE, mask, dtype=np.uint8)
        source = f"bids:raw:{one.folder}/{one.stem}.nii.gz"
        write_json(sidecar_path(mask), {"Sources": [source]})
        xfm = derivative_path(out, one, from_=one.suffix, to=TEMPLATE, extension=".txt")
        xfm.write_text("x")
        found = look(tmp_path, one)
        assert (found.mask, found.to_template) == (mask, xfm)
        mask.unlink()
        sidecar_path(mask).unlink()
        assert look(tmp_path, one).to_template == xfm


def test_other_grids(tmp_path):
    scan = raw(tmp_path, "sub-01_T1w")
    name = "sub-01/anat/sub-01_desc-brain_mask.nii.gz"
    flipped = np.diag([-2.0, 2, 2, 1])
    flipped[0, 3] = 2 * (DATA.shape[0] - 1)
    mask = put(tmp_path, name, affine=flipped)
    found = look(tmp_path, scan)
    assert found.mask == mask
    assert "has another grid: shape (20, 22, 24), affine [[-2.0" in found.notes[0]
    assert "is resampled to the grid of sub-01_T1w" in found.notes[0]
    away = AFFINE.copy()
    away[0, 3] = 500
    put(tmp_path, name, affine=away)
    found = look(tmp_path, scan)
    assert found.mask is None
    assert "lies elsewhere than sub-01_T1w, not used" in found.notes[0]
    mask.write_bytes(b"broken")
    found = look(tmp_path, scan)
    assert found.mask is None
    assert "cannot be read" in found.notes[0]
