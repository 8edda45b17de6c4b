"""Lesions: contrast and volume against known ones, the marks that are found, and the report."""

from __future__ import annotations

import json
import shutil

import nibabel as nb
import numpy as np
import pytest
from conftest import call, quick
from scipy import ndimage

from bids_harmony.interfaces.files import load
from bids_harmony.metrics.lesions import lesion_contrast_and_volume
from bids_harmony.reports.scores import score_lesions

SPACING = (1.0, 1.0, 2.0)


def lesion_contrast(image, *where):
    return lesion_contrast_and_volume([image], *where)[0][0]


def lesion_volume(image, *where):
    return lesion_contrast_and_volume([image], *where)[0][1]


def ball(radius: float, centre=(0.0, 0.0, 0.0), shape=(80, 80, 40)):
    """Voxels of a ball, in mm about the middle of the grid."""
    axes = [
        (np.arange(n) - (n - 1) / 2) * s - c
        for n, s, c in zip(shape, SPACING, centre, strict=True)
    ]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return x**2 + y**2 + z**2 <= radius**2


@pytest.fixture(scope="module")
def brain():
    """White matter with a dark core of fluid, a grey rim, and one lesion of 6 mm radius."""
    mask, lesion = ball(38), ball(6, (0, 20, 0))
    image = np.where(mask, 0.8, 0.0)
    image[mask & ~ball(34)] = 0.5
    image[ball(9)] = 0.1
    image[lesion] = 0.55
    return image, lesion, mask


def test_contrast_is_over_the_brains_range(brain):
    image, lesion, mask = brain
    low, high = np.percentile(image[mask], (5, 95))
    wanted = (0.55 - 0.8) / (high - low)
    assert lesion_contrast(image, lesion, mask, SPACING) == pytest.approx(wanted)
    other = lesion_contrast(3 * image + 7, lesion, mask, SPACING)
    assert other == pytest.approx(wanted), "no linear scale changes it"


def test_volume_of_a_blurred_lesion_is_that_of_the_ball(brain):
    image, lesion, mask = brain
    blurred = ndimage.gaussian_filter(image, [0.8 / s for s in SPACING])
    wanted = 4 / 3 * np.pi * 6**3 / 1000
    for marked in (lesion, ball(5, (0, 20, 0)), ball(7, (0, 20, 0))):
        assert lesion_volume(blurred, marked, mask, SPACING) == pytest.approx(wanted, rel=0.12)


def test_a_lesion_that_was_painted_over_is_missed(brain):
    image, lesion, mask = brain
    gone = np.where(lesion, 0.8, image)
    rows, warnings = score_lesions(image, gone, mask, lesion, SPACING)
    assert rows[0].after == 0
    assert rows[1].after == 0
    assert [w.split(" was ")[0] for w in warnings] == [
        "lesions may have been changed: their contrast",
        "lesions may have been changed: their volume",
    ]


def test_a_lesion_that_stays_gives_no_warning(brain):
    image, lesion, mask = brain
    rows, warnings = score_lesions(image, 1.3 * image - 0.1, mask, lesion, SPACING)
    assert not warnings
    assert rows[0].after == pytest.approx(rows[0].before)
    assert rows[1].after == rows[1].before


def test_marks_outside_the_brain(brain):
    image, lesion, mask = brain
    rows, warnings = score_lesions(image, image, mask & ~lesion, lesion, SPACING)
    assert not rows
    assert "marks nothing in the brain" in warnings[0]
    assert np.isnan(lesion_contrast(image, np.zeros_like(mask), mask, SPACING))


def test_lesions_are_found_and_reported(tiny, bundle, transforms, tmp_path):
    """A mask of the user's on another grid; a mended one makes the report anew."""
    theirs = tmp_path / "theirs"
    shutil.copytree(transforms, theirs)
    path = theirs / "sub-03" / "anat" / "sub-03_label-L_mask.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    data, affine = load(tiny.path("03"))
    middle = [int(v) for v in np.argwhere(data > np.median(data[data > 0])).mean(0)]
    marked = np.zeros(data.shape, dtype=np.uint8)
    marked[tuple(slice(m - 3, m + 3) for m in middle)] = 1
    finer = np.kron(marked, np.ones((2, 2, 2), dtype=np.uint8))
    half = affine @ np.diag([0.5, 0.5, 0.5, 1])
    half[:3, 3] -= affine[:3, :3] @ [0.25, 0.25, 0.25]
    nb.save(nb.Nifti1Image(finer, half), path)
    options = ["--model", bundle, "--participant-label", "03", *quick(tmp_path / "work", theirs)]
    out = tmp_path / "out"
    ran = call(tiny.root, out, "participant", *options)
    assert ran.code == 0, ran.out + ran.err
    written = out / "sub-03" / "anat" / "sub-03_desc-harmonized_T1w.json"
    record = json.loads(written.read_text())["Harmonization"]
    rows = {m["name"]: m for m in record["Metrics"]}
    assert rows["lesion volume"]["before"] <= finer.sum() * abs(np.linalg.det(half)) / 1000 * 4
    assert np.isfinite(rows["lesion contrast"]["before"])
    assert record["Lesions"].startswith("theirs (sha256 ")
    assert "lesion contrast" in (out / "sub-03.html").read_text()
    assert ": skipped" in call(tiny.root, out, "participant", *options).line("sub-03_T1w")
    nb.save(nb.Nifti1Image(np.roll(finer, 2, 0), half), path)
    assert ": harmonized" in call(tiny.root, out, "participant", *options).line("sub-03_T1w")
