"""Masks and coarse grids against arrays with known answers; brain masks of real heads."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from bids_harmony.imaging.mask import (
    background_value,
    ball_dilate,
    ball_erode,
    block_mean,
    coarse_affine,
    crossed_faces,
    fill_holes,
    largest_component,
    looks_skull_stripped,
    mask_from_stripped,
    refine_mask,
    shrink_factors,
    upsample,
)
from bids_harmony.interfaces.ants import BrainMask
from bids_harmony.interfaces.brain_mask import head_template, volume_warnings

DATA = Path(__file__).parents[2] / "shared" / "data" / "openmulti"
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real scans at {DATA}")


def ball(shape, centre, radius):
    """Boolean ball in voxels."""
    index = np.indices(shape)
    return sum((i - c) ** 2 for i, c in zip(index, centre, strict=True)) <= radius**2


def head(noise=0.0):
    """Head of 2 mm voxels: brain with a ventricle, dark bone, scalp, neck to the floor."""
    shape = (96, 112, 96)
    centre = (48, 56, 52)
    scalp = ball(shape, centre, 43)
    neck = np.zeros(shape, bool)
    neck[30:66, 38:74, :40] = True
    data = np.where(scalp | neck, 180.0, 0.0)
    data[ball(shape, centre, 39)] = 15.0
    brain = ball(shape, centre, 34)
    data[brain] = 90.0
    data[ball(shape, centre, 27)] = 130.0
    data[ball(shape, centre, 8)] = 20.0
    if noise:
        data = np.abs(data + np.random.default_rng(0).normal(0, noise, shape))
    return data, brain


@pytest.mark.parametrize(
    ("zooms", "spacing", "expected"),
    [
        ((1, 1, 1), 4, (4, 4, 4)),
        ((0.7, 0.67, 0.67), 2, (3, 3, 3)),
        ((1, 1.33, 1.33), 4, (4, 3, 3)),
        ((0.6, 0.6, 3.3), 2, (3, 3, 1)),
        ((5, 5, 5), 2, (1, 1, 1)),
    ],
)
def test_shrink_factors(zooms, spacing, expected):
    assert shrink_factors(np.array(zooms), spacing) == expected


def test_block_mean_matches_a_plain_mean_and_keeps_world_positions():
    data = np.random.default_rng(0).random((7, 8, 9))
    factors = (2, 3, 1)
    out = block_mean(data, factors)
    assert out.shape == (4, 3, 9)
    assert out[1, 1, 4] == pytest.approx(data[2:4, 3:6, 4].mean(), rel=1e-6)
    assert out[3, 0, 0] == pytest.approx(data[6, 0:3, 0].mean(), rel=1e-6)
    affine = np.array([[-1, 0, 0, 9.0], [0, 0, 2, 3], [0, 1.5, 0, 4], [0, 0, 0, 1]])
    centre = affine @ np.array([2.5, 4, 4, 1])
    assert np.allclose(coarse_affine(affine, factors) @ np.array([1, 1, 4, 1]), centre)


def test_upsample_is_exact_for_a_cubic_field_inside_the_grid():
    factors = (3, 2, 1)
    shape = (30, 24, 10)
    coarse = np.indices((10, 12, 10)).astype(float)
    at = [coarse[k] * f + (f - 1) / 2 for k, f in enumerate(factors)]
    fine = np.indices(shape).astype(float)

    def field(x, y, z):
        return 1 + (x / 30) ** 3 - 2 * (y / 24) ** 2 + x * y * z / 5000

    out = upsample(field(*at), shape, factors)
    inner = (slice(1, -1), slice(1, -1), slice(None))
    assert np.abs(out - field(*fine))[inner].max() < 1e-5
    slab = upsample(field(*at), shape, factors, slice(4, 7))
    assert np.array_equal(slab, out[..., 4:7])


def test_ball_morphology_is_in_millimetres():
    mask = np.zeros((41, 41, 21), bool)
    mask[20, 20, 10] = True
    zooms = (1.0, 1.0, 2.0)
    grown = ball_dilate(mask, 6.0, zooms)
    assert grown[26, 20, 10]
    assert not grown[27, 20, 10]
    assert grown[20, 20, 13]
    assert not grown[20, 20, 14]
    assert np.array_equal(ball_erode(ball_dilate(mask, 6.0, zooms), 6.0, zooms), mask)
    full = np.ones((5, 5, 5), bool)
    assert ball_erode(full, 2.0, (1, 1, 1)).all()
    assert not ball_dilate(~full, 2.0, (1, 1, 1)).any()


def test_largest_component_and_holes():
    mask = ball((40, 40, 40), (20, 20, 20), 12) & ~ball((40, 40, 40), (20, 20, 20), 5)
    spot = mask.copy()
    spot[1, 1, 1] = True
    assert np.array_equal(largest_component(spot), mask)
    assert np.array_equal(fill_holes(mask), ball((40, 40, 40), (20, 20, 20), 12))
    assert not largest_component(np.zeros((3, 3, 3), bool)).any()


@pytest.mark.parametrize("constant", [0.0, -7.0])
def test_stripped_phantom_is_recognised_and_masked(constant):
    data, brain = head()
    data[ball(data.shape, (48, 56, 52), 8)] = constant
    stripped = np.where(brain, data, constant)
    assert background_value(stripped) == constant
    assert np.array_equal(mask_from_stripped(stripped), brain)
    whole = np.where(brain, head()[0], constant)
    assert looks_skull_stripped(whole, AFFINE)
    assert looks_skull_stripped(whole)


def test_heads_are_never_taken_for_stripped():
    data, brain = head()
    bone = np.where(data == 15.0, 0, data)
    for case in (data, bone, head(noise=4)[0]):
        assert not looks_skull_stripped(case, AFFINE)
        assert not looks_skull_stripped(case)
    assert not looks_skull_stripped(np.zeros((20, 20, 20)), AFFINE)
    assert not looks_skull_stripped(np.where(brain, data, 0), np.diag([4.0, 4, 4, 1]))


def test_crossed_faces():
    mask = np.zeros((20, 20, 20), bool)
    mask[5:15, 5:15, :15] = True
    assert crossed_faces(mask) == 1
    mask[5:15, :15, 5:15] = True
    assert crossed_faces(mask) == 2


@pytest.mark.parametrize("shift", [(0, 0, 0), (2, -1, 1)])
def test_refinement_corrects_a_displaced_prior(shift):
    data, brain = head(noise=5)
    prior = ndimage.gaussian_filter(np.roll(brain, shift, (0, 1, 2)).astype(float), 1.5)
    mask = refine_mask(data, prior, np.full(3, 2.0))
    before = np.roll(brain, shift, (0, 1, 2))

    def dice(other):
        return 2 * (other & brain).sum() / (other.sum() + brain.sum())

    assert dice(mask) > max(0.95, dice(before) - 0.04)
    assert mask[48, 56, 52]
    assert (brain & ~mask).sum() < 0.02 * brain.sum()
    assert ndimage.label(mask)[1] == 1


def test_head_template_is_what_the_mask_needs():
    shape = head_template()
    assert shape.data.shape == shape.probability.shape
    assert np.allclose(np.abs(np.diag(shape.affine)[:3]), 2)
    assert shape.probability.min() >= 0
    assert shape.probability.max() <= 1
    assert 1400 < shape.probability.sum() * 8 / 1000 < 2000
    assert np.all(shape.data[shape.probability > 0.5] > 0)
    assert np.allclose(shape.probability, shape.probability[::-1], atol=0.01)
    known = ndimage.distance_transform_edt(shape.probability < 0.5, sampling=(2, 2, 2))
    assert known[shape.data > 0].max() < 25.5


def test_volume_warnings():
    mask = np.zeros((100, 100, 100), bool)
    mask[:50, :50, :50] = True
    assert volume_warnings(mask, AFFINE) == []
    (warning,) = volume_warnings(mask, np.eye(4))
    assert "125 ml" in warning


@needs_data
@pytest.mark.real
@pytest.mark.slow
def test_only_the_stripped_scans_look_stripped():
    seen = 0
    for path in sorted(DATA.glob("sub-*/**/anat/*.nii.gz")):
        image = nib.load(path)
        data = np.asarray(image.dataobj)
        stripped = path.name.startswith("sub-nov") or "trv01_ses-a" in path.name
        assert looks_skull_stripped(data, image.affine) is stripped, path.name
        assert looks_skull_stripped(data) is stripped, path.name
        seen += 1
    assert seen == 49


@needs_data
@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("subject", ["ixi012", "ixi051"])
def test_mask_matches_labels_of_another_tool(subject, tmp_path):
    name = f"sub-{subject}"
    scan = DATA / name / "anat" / f"{name}_T1w.nii.gz"
    labels = DATA / "derivatives" / "dlmuse" / name / "anat" / f"{name}_dseg.nii.gz"
    truth = fill_holes(np.asarray(nib.load(labels).dataobj) > 0)
    done = BrainMask(in_file=str(scan), modality="T1w").run(cwd=str(tmp_path)).outputs
    image = nib.load(done.out_file)
    mask = np.asarray(image.dataobj) > 0
    assert image.get_data_dtype() == np.uint8
    assert np.allclose(image.affine, nib.load(scan).affine)
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.95
    assert done.warnings == []
    assert done.confidence == 1.0
    assert [item.name for item in tmp_path.iterdir()] == [Path(done.out_file).name]


@needs_data
@pytest.mark.real
@pytest.mark.slow
def test_a_head_that_lies_unusually_is_still_found(tmp_path):
    image = nib.load(DATA / "sub-sky01" / "anat" / "sub-sky01_T1w.nii.gz")
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(0.6), -np.sin(0.6)], [np.sin(0.6), np.cos(0.6)]]
    masks = []
    for name, affine in (("straight", image.affine), ("nodding", turn @ image.affine)):
        path = tmp_path / f"{name}_T1w.nii.gz"
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj, np.float32), affine), path)
        done = BrainMask(in_file=str(path), modality="T1w").run(cwd=str(tmp_path)).outputs
        assert done.warnings == []
        masks.append(np.asarray(nib.load(done.out_file).dataobj) > 0)
    assert 2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum()) > 0.95
