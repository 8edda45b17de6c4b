"""ANTs layer against phantoms with known answers."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.special import expit

from bids_harmony.errors import ScanError
from bids_harmony.interfaces.ants import (
    ApplyTransform,
    N4BiasField,
    RigidRegistration,
    ants_session,
)
from bids_harmony.interfaces.ants_functions import bounding_box, load, save

SHAPE = (48, 56, 44)
SPACING = 3.0


def brain(points):
    """A lopsided brain-like phantom (0..1) at world points, shape (3, ...)."""
    x, y, z = points
    outer = (x / 55) ** 2 + (y / 68) ** 2 + (z / 50) ** 2
    core = ((x - 6) / 38) ** 2 + ((y + 5) / 50) ** 2 + ((z - 4) / 32) ** 2
    cave = ((x + 15) / 9) ** 2 + ((y - 18) / 22) ** 2 + ((z - 5) / 10) ** 2
    bump = ((x - 30) / 12) ** 2 + ((y - 35) / 12) ** 2 + ((z + 20) / 14) ** 2
    soft = [expit((1 - part) * 14) for part in (outer, core, cave, bump)]
    return 0.6 * soft[0] + 0.4 * soft[1] - 0.5 * soft[2] - 0.3 * soft[3]


def grid_points(shape, affine):
    """World points of every voxel, shape (3, X, Y, Z)."""
    index = np.indices(shape).reshape(3, -1)
    return (affine[:3, :3] @ index + affine[:3, 3:]).reshape(3, *shape)


def centred(shape, axes):
    """Affine with the given axes (columns, mm) whose field of view is centred on the origin."""
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def turn(degrees, shift):
    """Rigid RAS map: rotations about x, y, z in degrees, then a shift in mm."""
    out = np.eye(4)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        one = np.eye(3)
        first, second = [k for k in range(3) if k != axis]
        one[first, first] = one[second, second] = np.cos(angle)
        one[first, second], one[second, first] = -np.sin(angle), np.sin(angle)
        out[:3, :3] = one @ out[:3, :3]
    out[:3, 3] = shift
    return out


def ras_map(path):
    """Point map (template -> scan, RAS) of an ITK text transform, read without ANTs."""
    text = dict(line.split(": ") for line in Path(path).read_text().splitlines() if ": " in line)
    values = np.array(text["Parameters"].split(), float)
    centre = np.array(text["FixedParameters"].split(), float)
    lps = np.eye(4)
    lps[:3, :3] = values[:9].reshape(3, 3)
    lps[:3, 3] = values[9:] + centre - lps[:3, :3] @ centre
    flip = np.diag([-1, -1, 1, 1])
    return flip @ lps @ flip


@pytest.fixture
def template(tmp_path):
    affine = centred(SHAPE, np.eye(3) * SPACING)
    return save(brain(grid_points(SHAPE, affine)), affine, tmp_path / "template.nii.gz")


def write_scan(folder, move, axes, shape, contrast=lambda v: v):
    """Scan of the phantom moved by the RAS map template -> scan; returns scan and mask paths."""
    affine = centred(shape, axes)
    back = np.linalg.inv(move)
    points = grid_points(shape, affine).reshape(3, -1)
    points = (back[:3, :3] @ points + back[:3, 3:]).reshape(3, *shape)
    data = brain(points)
    noise = np.random.default_rng(1).normal(0, 0.01, shape)
    scan = np.where(data > 0.05, np.maximum(contrast(data) + noise, 0), 0)
    return (
        save(scan, affine, folder / "scan.nii.gz"),
        save(data > 0.3, affine, folder / "mask.nii.gz"),
    )


PSR = np.array([[0, 0, 1], [-1, 0, 0], [0, 1, 0]]) @ np.diag([3.0, 3.0, 3.0])
CASES = {
    "RAS": (np.eye(3) * 3.0, (52, 60, 48), lambda v: v),
    "PSR, T2-like": (PSR, (60, 48, 52), lambda v: np.where(v > 0.05, 1.3 - v, 0)),
    "thick slices": (np.diag([-2.0, 2.0, 4.8]), (76, 88, 28), lambda v: v),
}


@pytest.mark.parametrize("case", CASES)
def test_rigid_recovers_a_known_motion(case, template, tmp_path):
    axes, shape, contrast = CASES[case]
    move = turn((9, -5, 7), (6, -9, 5))
    scan, mask = write_scan(tmp_path, move, axes, shape, contrast)
    node = RigidRegistration(moving=scan, moving_mask=mask, fixed=template)
    found = ras_map(node.run(cwd=str(tmp_path)).outputs.out_transform)
    error = np.linalg.inv(move) @ found
    angle = np.rad2deg(np.arccos(np.clip((np.trace(error[:3, :3]) - 1) / 2, -1, 1)))
    assert angle < 0.5
    assert np.linalg.norm((found - move)[:3, 3]) < 0.3
    assert np.allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-4)


def test_apply_matches_scipy_and_its_inverse_round_trips(template, tmp_path):
    move = turn((4, 3, -6), (5, 2, -4))
    scan, _ = write_scan(tmp_path, move, np.eye(3) * 3.0, (52, 60, 48))
    flip = np.diag([-1, -1, 1, 1])
    lps = flip @ move @ flip
    numbers = " ".join(str(v) for v in [*lps[:3, :3].ravel(), *lps[:3, 3]])
    path = tmp_path / "move.txt"
    path.write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        f"Parameters: {numbers}\nFixedParameters: 0 0 0\n"
    )
    there = ApplyTransform(
        in_file=scan, reference_file=template, transforms=[str(path)], default_value=-1.0
    ).run(cwd=str(tmp_path))
    moved, grid = load(there.outputs.out_file)
    data, affine = load(scan)
    whole = np.linalg.inv(affine) @ move @ grid
    expected = ndimage.affine_transform(
        data, whole[:3, :3], whole[:3, 3], output_shape=moved.shape, order=1, cval=-1.0
    )
    covered = ndimage.affine_transform(
        np.ones_like(data), whole[:3, :3], whole[:3, 3], output_shape=moved.shape, order=1
    )
    well_inside, outside = covered > 0.999, ndimage.binary_erosion(covered == 0, iterations=1)
    assert well_inside.mean() > 0.5
    assert np.abs(moved - expected)[well_inside].max() < 2e-3
    assert np.all(moved[outside & (covered == 0)] <= 0)
    folder = tmp_path / "back"
    folder.mkdir()
    back = ApplyTransform(
        in_file=there.outputs.out_file,
        reference_file=scan,
        transforms=[str(path)],
        invert=[True],
        interpolation="bSpline",
    ).run(cwd=str(folder))
    returned, same = load(back.outputs.out_file)
    assert np.allclose(same, affine)
    inside = ndimage.binary_erosion(data > 0.1, iterations=3)
    assert np.abs(returned - data)[inside].mean() < 0.02
    assert np.corrcoef(returned[inside], data[inside])[0, 1] > 0.97


def biased_scan(folder):
    """Phantom with a known multiplicative field; returns paths and the field."""
    affine = centred(SHAPE, np.eye(3) * SPACING)
    points = grid_points(SHAPE, affine)
    clean = brain(points)
    x, y, z = points
    field = np.exp(0.35 * x / 70 - 0.3 * (y / 70) ** 2 + 0.25 * z / 60)
    noise = np.random.default_rng(3).normal(0, 0.01, SHAPE)
    data = np.where(clean > 0.25, np.maximum(clean + noise, 0.01) * field * 400, 0)
    mask = clean > 0.25
    return (
        save(data, affine, folder / "scan.nii.gz"),
        save(mask, affine, folder / "mask.nii.gz"),
        field,
        mask,
        clean,
    )


def test_n4_recovers_a_known_field_and_keeps_zeros(tmp_path):
    scan, mask_file, field, mask, clean = biased_scan(tmp_path)
    done = N4BiasField(in_file=scan, mask_file=mask_file).run(cwd=str(tmp_path)).outputs
    data, affine = load(scan)
    out, grid = load(done.out_file)
    bias, coarse_grid = load(done.bias_file)
    assert np.allclose(grid, affine)
    assert bias.min() > 0
    assert np.all(out[data == 0] == 0)
    assert np.isfinite(out).all()
    found = data[mask] / out[mask]
    assert found.mean() == pytest.approx(1, abs=0.02)
    assert np.corrcoef(found, field[mask])[0, 1] > 0.95
    white = clean > 0.97
    assert np.std(out[white]) / out[white].mean() < 0.3 * np.std(data[white]) / data[white].mean()
    where = np.linalg.inv(coarse_grid) @ affine
    again = ndimage.affine_transform(
        bias, where[:3, :3], where[:3, 3], output_shape=data.shape, order=3, mode="nearest"
    )
    assert np.abs(again[mask] / found - 1).max() < 0.02


def test_n4_takes_the_field_of_an_earlier_run(tmp_path):
    scan, mask_file, *_ = biased_scan(tmp_path)
    first = N4BiasField(in_file=scan, mask_file=mask_file).run(cwd=str(tmp_path)).outputs
    kept, divided = load(first.bias_file), load(first.out_file)[0]
    double = save(2 * kept[0], kept[1], tmp_path / "double.nii.gz")
    again = N4BiasField(in_file=scan, mask_file=mask_file, given_file=double)
    out = again.run(cwd=str(tmp_path)).outputs
    assert np.allclose(load(out.out_file)[0], divided / 2, rtol=1e-6)
    small = save(kept[0][1:], kept[1], tmp_path / "small.nii.gz")
    with pytest.raises(ScanError, match=r"small\.nii\.gz: not a bias field of this scan"):
        N4BiasField(in_file=scan, mask_file=mask_file, given_file=small).run(cwd=str(tmp_path))


def test_n4_refuses_negative_values_and_foreign_masks(tmp_path):
    affine = np.diag([3.0, 3, 3, 1])
    scan = save(np.full((10, 10, 10), -1.0), affine, tmp_path / "negative.nii.gz")
    with pytest.raises(ScanError, match="negative"):
        N4BiasField(in_file=scan).run(cwd=str(tmp_path))
    good = save(np.ones((10, 10, 10)), affine, tmp_path / "good.nii.gz")
    mask = save(np.ones((9, 10, 10), bool), affine, tmp_path / "foreign.nii.gz")
    with pytest.raises(ScanError, match="grid"):
        N4BiasField(in_file=good, mask_file=mask).run(cwd=str(tmp_path))


def test_load_refuses_what_itk_would_misread(tmp_path):
    shear = np.diag([2.0, 2, 2, 1])
    shear[0, 1] = 1.0
    path = save(np.ones((4, 4, 4)), shear, tmp_path / "shear.nii.gz")
    with pytest.raises(ScanError, match="shears"):
        load(path)
    values = np.ones((4, 4, 4), np.float32)
    values[1, 1, 1] = np.nan
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "nan.nii.gz")
    with pytest.raises(ScanError, match="non-finite"):
        load(tmp_path / "nan.nii.gz")
    with pytest.raises(ScanError, match="non-finite"):
        save(values, np.eye(4), tmp_path / "out.nii.gz")
    assert not (tmp_path / "out.nii.gz").exists()


def test_bounding_box_is_widened_and_clipped():
    mask = np.zeros((10, 10, 10), bool)
    mask[0:2, 4:5, 7:10] = True
    assert bounding_box(mask, 2) == (slice(0, 4), slice(2, 7), slice(5, 10))


def test_session_restores_environment(tmp_path):
    before = (os.environ.get("TMPDIR"), os.environ.get("ANTS_RANDOM_SEED"), tempfile.gettempdir())
    with ants_session(1, 0, tmp_path):
        assert os.environ["ANTS_RANDOM_SEED"] == "1"
        assert tempfile.gettempdir() == str(tmp_path)
    after = (os.environ.get("TMPDIR"), os.environ.get("ANTS_RANDOM_SEED"), tempfile.gettempdir())
    assert after == before


PROGRAM = """
import os, sys
from bids_harmony.interfaces.ants import RigidRegistration, ants_session
assert "ants" not in sys.modules
scan, template, folder = sys.argv[1:]
node = RigidRegistration(moving=scan, fixed=template, num_threads=1, random_seed=7)
node.run(cwd=folder)
with ants_session(1, 7, folder):
    assert os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert os.environ["ANTS_RANDOM_SEED"] == "8"
"""


def test_registration_is_bit_identical_and_leaves_nothing_behind(template, tmp_path):
    scan, _ = write_scan(tmp_path, turn((5, 0, 3), (3, 2, 1)), np.eye(3) * 3.0, SHAPE)
    digests = []
    for number in range(2):
        folder, scratch = tmp_path / f"run{number}", tmp_path / f"tmp{number}"
        folder.mkdir()
        scratch.mkdir()
        environment = {**os.environ, "TMPDIR": str(scratch)}
        for name in ("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "ANTS_RANDOM_SEED"):
            environment.pop(name, None)
        command = [sys.executable, "-c", PROGRAM, scan, template, str(folder)]
        root = Path(__file__).parents[1]
        subprocess.run(command, env=environment, check=True, cwd=root)
        assert list(scratch.iterdir()) == []
        (made,) = folder.iterdir()
        digests.append(hashlib.sha256(made.read_bytes()).hexdigest())
    assert digests[0] == digests[1]
