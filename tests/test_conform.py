"""Conforming: odd inputs are repaired with a note or refused with a cure; no voxel moves."""

from __future__ import annotations

import gzip
import tracemalloc
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, inv_ornt_aff

from bids_harmony.errors import ExitCode, ScanError
from bids_harmony.imaging.conform import conform
from bids_harmony.imaging.geometry import (
    corner_distance,
    from_ras,
    header_affine,
    is_valid,
    same_grid,
    shear,
    to_ras,
    zooms,
)

SHAPE = (24, 28, 20)


def oblique(sizes=(5.0, 6.0, 7.0), angle=0.3) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    affine = np.eye(4)
    turn_x = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    turn_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    affine[:3, :3] = turn_x @ turn_z * sizes
    affine[:3, 3] = (-60, -80, -50)
    return affine


AFFINE = oblique()
OTHER = oblique(angle=-0.2)


def head(seed: int = 0, noise: float = 5.0) -> np.ndarray:
    """A bright ball with texture in air of exactly 0."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    inside = (grid**2).sum(axis=0) < 0.6
    rng = np.random.default_rng(seed)
    return (inside * (400 + 200 * grid[0] + noise * rng.normal(size=SHAPE))).astype(np.float32)


def image(data=None, affine=AFFINE, **forms) -> nib.Nifti1Image:
    return nib.Nifti1Image(head() if data is None else data, affine)


def test_a_good_scan_is_left_alone(tmp_path):
    data = head()
    nib.save(image(data), tmp_path / "a.nii.gz")
    done = conform(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(done.data, data)
    np.testing.assert_array_equal(done.affine, nib.load(tmp_path / "a.nii.gz").affine)
    np.testing.assert_allclose(done.zooms, (5, 6, 7), rtol=1e-6)
    assert done.data.dtype == np.float32
    assert done.data.flags.writeable
    assert (done.notes, done.offset, done.blank) == ((), 0.0, None)


def test_the_input_is_never_changed(tmp_path):
    data = head()
    data[0, 0, 0] = np.nan
    data[data > 0] -= 600
    source = image(data.copy())
    path = tmp_path / "a.nii"
    nib.save(source, path)
    before = path.read_bytes()
    conform(source)
    conform(path)
    np.testing.assert_array_equal(np.asarray(source.dataobj), data)
    assert path.read_bytes() == before


def set_form(header, name, code, affine):
    if name == "sform":
        header.set_sform(np.eye(4), code)
        for row, field in enumerate(("srow_x", "srow_y", "srow_z")):
            header[field] = affine[row]
    elif np.isfinite(affine).all():
        header.set_qform(affine, code)
    else:
        header["qform_code"] = code
        header["quatern_b"], header["quatern_c"] = 1.0, 1.0


BAD = np.full((4, 4), np.nan)
SINGULAR = np.diag([1.0, 1.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("sform", "qform", "expected", "told"),
    [
        ((1, AFFINE), (1, AFFINE), AFFINE, None),
        ((2, AFFINE), (1, OTHER), AFFINE, "SFORM AND QFORM DISAGREE"),
        ((1, AFFINE), (0, OTHER), AFFINE, None),
        ((1, AFFINE), (1, BAD), AFFINE, "qform is singular or not finite"),
        ((1, BAD), (1, AFFINE), AFFINE, "sform is singular or not finite"),
        ((1, SINGULAR), (1, AFFINE), AFFINE, "sform is singular or not finite"),
        ((1, BAD), (0, AFFINE), ScanError, "neither sform nor qform is usable"),
        ((1, SINGULAR), (1, BAD), ScanError, "neither sform nor qform is usable"),
        ((0, AFFINE), (1, OTHER), OTHER, None),
        ((0, AFFINE), (1, BAD), ScanError, "neither sform nor qform is usable"),
        ((0, AFFINE), (0, OTHER), None, "ORIENTATION UNKNOWN"),
    ],
)
def test_truth_table_of_forms(tmp_path, sform, qform, expected, told):
    source = nib.Nifti1Image(head(), None)
    source.header.set_zooms((5, 6, 7))
    set_form(source.header, "qform", *qform)
    set_form(source.header, "sform", *sform)
    path = tmp_path / "a.nii"
    source.header["vox_offset"] = 352
    raw = source.header.binaryblock + b"\0" * 4 + head().tobytes(order="F")
    path.write_bytes(raw)
    if expected is ScanError:
        with pytest.raises(ScanError, match=told):
            conform(path)
        return
    done = conform(path)
    if expected is None:
        expected = source.header.get_base_affine()
    np.testing.assert_allclose(done.affine, expected, atol=1e-4)
    if told is None:
        assert done.notes == ()
    else:
        assert told in done.notes[0]
    if not told or "sform is singular" not in told:
        np.testing.assert_array_equal(done.affine, nib.load(path).affine)


def test_disagreement_is_measured_in_mm():
    source = image()
    moved = AFFINE.copy()
    moved[:3, 3] += (3, 0, 4)
    source.set_sform(AFFINE, 1)
    source.set_qform(moved, 1)
    assert "by up to 5.0 mm" in header_affine(source)[1][0]
    moved[:3, 3] = AFFINE[:3, 3] + 0.1
    source.set_qform(moved, 1)
    assert header_affine(source)[1] == []


def test_sheared_affine_is_refused():
    affine = AFFINE.copy()
    affine[:3, 1] += 0.2 * affine[:3, 0]
    with pytest.raises(ScanError, match=r"degrees off the right angle .* rectangular grid"):
        conform(image(affine=affine))
    slight = AFFINE.copy()
    slight[:3, 1] += 0.005 * slight[:3, 0]
    assert 0 < shear(conform(image(affine=slight)).affine) < 0.01


def test_other_formats():
    affine = np.diag([5.0, 6.0, 7.0, 1.0])
    done = conform(nib.MGHImage(head(), affine))
    np.testing.assert_allclose(done.affine, affine, atol=1e-4)
    with pytest.raises(ScanError, match="the affine is singular"):
        conform(nib.Spm99AnalyzeImage(head(), SINGULAR))


@pytest.mark.parametrize("extra", [(1,), (1, 1)])
def test_trailing_axes_of_one_are_dropped(tmp_path, extra):
    data = head()
    nib.save(image(data.reshape(SHAPE + extra)), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(conform(tmp_path / "a.nii.gz").data, data)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((24, 28, 20, 3), "3 volumes in one file"),
        ((24, 28, 20, 1, 2), "2 volumes in one file"),
        ((24, 28, 1), "a single slice"),
        ((1, 28, 20), "a single slice"),
        ((24, 28), "a single slice"),
        ((24, 28, 1, 5), "5 volumes"),
        ((24, 28, 7), "fewer than 8 voxels"),
    ],
)
def test_shapes_that_are_refused(shape, told):
    with pytest.raises(ScanError, match=told):
        conform(nib.Nifti1Image(np.ones(shape, np.float32), AFFINE))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (head().astype(np.complex64), "take the magnitude first"),
        (np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]), "colour"),
        (np.zeros(SHAPE, np.float32), "every voxel is 0"),
        (np.full(SHAPE, 7, np.int16), "every voxel is 7"),
        (np.full(SHAPE, np.nan, np.float32), "every voxel is NaN"),
        (np.full(SHAPE, np.inf, np.float32), "every voxel is NaN or infinite"),
    ],
)
def test_values_that_are_refused(tmp_path, data, told):
    nib.save(image(data), tmp_path / "sub-01_T1w.nii.gz")
    with pytest.raises(ScanError, match=rf"sub-01_T1w\.nii\.gz: .*{told}") as info:
        conform(tmp_path / "sub-01_T1w.nii.gz")
    assert info.value.exit_code == ExitCode.DATA


@pytest.mark.parametrize(
    ("sizes", "result"),
    [
        ((1.0, 1.0, 11.0), "voxels must be 0.1 to 10 mm"),
        ((0.05, 5.0, 5.0), "check the units"),
        ((0.3, 3.0, 9.0), "30 times as thick as wide"),
        ((1.0, 5.0, 5.0), "field of view must be 30 to 1000 mm"),
        ((5.0, 5.0, 4.0), "note:only a part of the brain"),
        ((0.5, 0.5, 6.0), "note:12 times as thick"),
    ],
)
def test_grids_that_cannot_be_right(sizes, result):
    shape = {0.3: (400, 40, 20), 0.5: (250, 250, 20)}.get(sizes[0], SHAPE)
    rng = np.random.default_rng(0)
    source = nib.Nifti1Image(rng.random(shape, np.float32), np.diag([*sizes, 1]))
    if result.startswith("note:"):
        assert result[5:] in conform(source).notes[0]
    else:
        with pytest.raises(ScanError, match=result):
            conform(source)


def test_scale_factors(tmp_path):
    stored = (head() / 4).astype(np.uint8)
    source = nib.Nifti1Image(stored, AFFINE)
    source.header.set_slope_inter(2.5, 10)
    path = tmp_path / "a.nii.gz"
    raw = source.header.copy()
    raw.set_data_dtype(np.uint8)
    raw["scl_slope"], raw["scl_inter"], raw["vox_offset"] = 2.5, 10, 352
    path.write_bytes(gzip.compress(raw.binaryblock + b"\0" * 4 + stored.tobytes(order="F")))
    done = conform(path)
    np.testing.assert_allclose(done.data, stored * 2.5 + 10, rtol=1e-6)
    np.testing.assert_allclose(done.data, nib.load(path).get_fdata(), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i2", "<u2", "<i4", ">f4", "<f8", ">f8", "<i8"])
def test_stored_types_and_byte_orders(tmp_path, dtype):
    data = np.clip(head(), 0, 250).astype(dtype)
    header = nib.Nifti1Header(endianness=">" if dtype[0] == ">" else "<")
    source = nib.Nifti1Image(data, AFFINE, header=header, dtype=np.dtype(dtype))
    nib.save(source, tmp_path / "a.nii.gz")
    done = conform(tmp_path / "a.nii.gz")
    assert done.data.dtype == np.dtype("=f4")
    np.testing.assert_array_equal(done.data, data.astype(np.float32))


def test_not_finite_values_become_zero():
    data = head()
    data[10:12, 14, 10] = (np.nan, np.inf)
    done = conform(image(data))
    assert done.data[10, 14, 10] == done.data[11, 14, 10] == 0
    assert done.blank is not None
    assert done.blank.sum() == 2
    assert done.blank[10, 14, 10]
    assert "2 voxels" in done.notes[0]
    data[data == 0] = np.nan
    assert "more than half the field of view" in conform(image(data)).notes[0]


def test_values_beyond_float32_are_told():
    data = head().astype(np.float64)
    data[12, 14, 10] = 1e300
    assert "1 voxels" in conform(image(data)).notes[0]


def test_ringing_is_clipped():
    data = head()
    data[::7, ::7, ::7] -= 5
    done = conform(image(data))
    np.testing.assert_array_equal(done.data, np.maximum(data, 0))
    assert "interpolation ringing" in done.notes[0]
    assert done.offset == 0
    data = head()
    data[0, 0, 0] = -1e6
    np.testing.assert_array_equal(conform(image(data)).data, np.maximum(data, 0))


def test_negative_background_is_shifted():
    data = head(noise=20) - 1024
    done = conform(image(data))
    np.testing.assert_allclose(done.data, head(noise=20), atol=1e-3)
    assert done.offset == 1024
    assert "1024 was added everywhere" in done.notes[0]
    data[0, 0, 0] = -1e6
    np.testing.assert_allclose(conform(image(data)).data, head(noise=20), atol=1e-3)


def test_a_normalised_scan_keeps_its_order():
    data = head()
    inside = data > 0
    data[inside] = (data[inside] - data[inside].mean()) / data[inside].std()
    done = conform(image(data))
    assert "NORMALISED ALREADY" in done.notes[0]
    assert (done.data[~inside] == 0).all()
    np.testing.assert_allclose(done.data[inside], data[inside] - data.min(), atol=1e-5)


def test_unsigned_values_stored_as_signed():
    data = head()
    wrapped = (data / data.max() * 65535).astype(np.uint16).view(np.int16)
    with pytest.raises(ScanError, match=r"unsigned values seem to be stored as signed"):
        conform(image(wrapped))


def test_files_that_cannot_be_read(tmp_path):
    good = tmp_path / "good.nii.gz"
    nib.save(image(), good)
    packed = good.read_bytes()
    plain = gzip.decompress(packed)
    cases = {
        "cut.nii.gz": (packed[: len(packed) // 2], "truncated or damaged"),
        "cut.nii": (plain[: len(plain) // 2], "truncated or damaged"),
        "header.nii": (plain[:100], "not a NIfTI file"),
        "noise.nii.gz": (packed[:2000] + bytes(2000) + packed[4000:], "truncated or damaged"),
        "short.nii.gz": (gzip.compress(plain[:9000]), "ends before its last voxel"),
        "text.nii.gz": (b"hello world", "not a NIfTI file"),
        "text.nii": (b"hello world", "not a NIfTI file"),
        "zero.nii.gz": (b"", "the file is empty"),
        "pointer.nii.gz": (b"/annex/objects/MD5E-s1--a.nii.gz\n", "run `datalad get"),
    }
    for name, (content, told) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ScanError, match=told) as info:
            conform(path)
        assert str(path) in str(info.value)
        assert "\n" not in str(info.value)


def test_missing_files(tmp_path):
    with pytest.raises(ScanError, match=r"none\.nii: no such file"):
        conform(tmp_path / "none.nii")
    link = tmp_path / "link.nii.gz"
    link.symlink_to(".git/annex/objects/x")
    with pytest.raises(ScanError, match=f"run `datalad get {link}`"):
        conform(link)
    (tmp_path / "folder.nii").mkdir()
    with pytest.raises(ScanError, match=r"folder\.nii: cannot be read"):
        conform(str(tmp_path / "folder.nii"))


@pytest.mark.parametrize(
    ("dtype", "name", "most"),
    [
        (np.int16, "a.nii.gz", 1.7),
        (np.float32, "a.nii.gz", 1.7),
        (np.int16, "a.nii", 1.7),
        (np.uint8, "a.nii.gz", 1.7),
        (np.float64, "a.nii.gz", 1.7),
    ],
)
def test_memory(tmp_path, dtype, name, most):
    """Peak in units of one float32 copy: the result and a mask."""
    rng = np.random.default_rng(0)
    data = rng.integers(0, 200, (128, 128, 128)).astype(dtype)
    nib.save(nib.Nifti1Image(data, np.diag([2, 2, 2, 1])), tmp_path / name)
    conform(tmp_path / name)
    tracemalloc.start()
    conform(tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1] / (4 * data.size)
    tracemalloc.stop()
    assert peak < most


ORIENTATIONS = [
    np.array(list(zip(order, flips, strict=True)))
    for order in permutations(range(3))
    for flips in product((1, -1), repeat=3)
]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_all_48_orientations(orientation):
    """Conforming and reorienting may be swapped, and going to RAS and back changes nothing."""
    data = head()
    data[0, 0, 0] = np.nan
    data[:3, :3, :3] -= 4
    moved = apply_orientation(data, orientation)
    affine = AFFINE @ inv_ornt_aff(orientation, SHAPE)
    plain, turned = conform(image(data)), conform(nib.Nifti1Image(moved, affine))
    np.testing.assert_array_equal(turned.data, apply_orientation(plain.data, orientation))
    np.testing.assert_allclose(turned.affine, affine, atol=1e-4)
    ras, ras_affine, back = to_ras(turned.data, turned.affine)
    np.testing.assert_array_equal(ras, to_ras(plain.data, plain.affine)[0])
    assert nib.aff2axcodes(ras_affine) == ("R", "A", "S")
    np.testing.assert_allclose(ras_affine, to_ras(plain.data, plain.affine)[1], atol=1e-3)
    np.testing.assert_array_equal(from_ras(ras, back), turned.data)
    # The same voxel is at the same place: the brightest one in world coordinates.
    here = np.array([*np.unravel_index(turned.data.argmax(), turned.data.shape), 1])
    there = np.array([*np.unravel_index(plain.data.argmax(), plain.data.shape), 1])
    np.testing.assert_allclose(turned.affine @ here, plain.affine @ there, atol=1e-3)


def test_small_geometry():
    assert zooms(AFFINE) == pytest.approx((5, 6, 7))
    assert shear(AFFINE) == pytest.approx(0, abs=1e-12)
    assert same_grid(SHAPE, AFFINE, SHAPE, AFFINE)
    moved = AFFINE.copy()
    moved[0, 3] += 0.4
    assert same_grid(SHAPE, AFFINE, SHAPE, moved)
    moved[0, 3] += 0.4
    assert not same_grid(SHAPE, AFFINE, SHAPE, moved)
    assert not same_grid(SHAPE, AFFINE, (24, 28, 21), AFFINE)
    assert corner_distance(SHAPE, AFFINE, moved) == pytest.approx(0.8)
    assert not is_valid(None)
    projective = AFFINE.copy()
    projective[3, 0] = 1
    for bad in (BAD, SINGULAR, np.zeros((4, 4)), projective, np.ones((4, 4))):
        assert not is_valid(bad)


REAL = Path(__file__).parents[1].parent / "shared/data/openmulti"


@pytest.mark.real
def test_real_scans_keep_their_values_and_affine():
    paths = sorted(REAL.glob("sub-*/**/*_T1w.nii.gz"))[::16]
    if not paths:
        pytest.skip("the real scans are not here")
    for path in paths:
        source, done = nib.load(path), conform(path)
        np.testing.assert_array_equal(done.affine, source.affine)
        assert done.data.shape == source.shape[:3]
        expected = np.asanyarray(source.dataobj, dtype=np.float32).reshape(done.data.shape)
        expected = np.maximum(np.nan_to_num(expected), 0)
        np.testing.assert_allclose(done.data - done.offset, expected, rtol=1e-5, atol=1e-3)
