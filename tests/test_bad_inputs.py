"""Every bad scan is refused with a cure, odd ones are mended, and the others always go on."""

from __future__ import annotations

import gzip
import json

import nibabel as nb
import numpy as np
import pytest
from conftest import DataSet, call, give_transform, quick

from bids_harmony.interfaces.files import load

# Participant: what the message must say besides the file.
REFUSED = {
    "truncated": "copy or download it again",
    "badcrc": "copy or download it again",
    "zerobytes": "the file is empty; copy or download it again",
    "notnifti": "this is not a NIfTI file; convert the scan again",
    "fourd": "3 volumes in one file (shape 50 x 59 x 48 x 3); split it",
    "twod": "a single slice",
    "slab": "a single slice",
    "zeros": "every voxel is 0: there is no image; export it again",
    "constant": "every voxel is 7: there is no image; export it again",
    "allnan": "every voxel is NaN or infinite: there is no image; export it again",
    "complex": "complex values; take the magnitude first",
    "singular": "header",
    "nanaffine": "header",
    "elongated": "voxels must be 0.1 to 10 mm",
    "rgb": "colour (RGB) values; convert",
    "twins": "are the same scan twice; remove one of them",
    "annex": "content not present: run `datalad get",
    "brokenjson": "broken JSON",
    "toosmall": "the brain mask holds",
    "folder": "check",
}
MENDED = {
    "nan": "were NaN or infinite and are 0 now",
    "inf": "were NaN or infinite and are 0 now",
    "negative": "were negative",
    "disagree": "sform",
}
ODD = (
    *MENDED, "uint8slope", "bigendian", "oblique", "flipped", "permuted", "thick", "trailing",
    "nosidecar", "notable", "nosite", "plain", "hugevalues",
)  # fmt: skip


def _image(data, affine, **header):
    image = nb.Nifti1Image(data, affine)
    for key, value in header.items():
        image.header[key] = value
    image.header.set_xyzt_units("mm")
    return image


def _write_refused(made: DataSet, data, affine) -> None:
    whole = gzip.compress(nb.Nifti1Image(data, affine).to_bytes(), 1)
    made.path("truncated").write_bytes(whole[: len(whole) // 2])
    made.path("badcrc").write_bytes(whole[:-8] + bytes(4) + whole[-4:])
    made.path("zerobytes").write_bytes(b"")
    made.path("notnifti").write_bytes(gzip.compress(b"<html>quota exceeded</html>" * 99))
    made.scan("fourd", np.stack([data] * 3, -1), affine)
    made.scan("twod", data[:, :, 20], affine)
    made.scan("slab", data[:, :, 20:21], affine)
    made.scan("zeros", np.zeros_like(data), affine)
    made.scan("constant", np.full_like(data, 7), affine)
    made.scan("allnan", np.full_like(data, np.nan), affine)
    made.scan("complex", data.astype(np.complex64), affine)
    for sub, wrong in (("singular", np.diag([0, 4, 4, 1.0])), ("nanaffine", affine * np.nan)):
        image = nb.Nifti1Image(data, None)
        for row, name in zip(wrong, ("srow_x", "srow_y", "srow_z"), strict=False):
            image.header[name] = row
        image.header["sform_code"], image.header["qform_code"] = 1, 0
        made.scan(sub, image, None)
    made.scan("elongated", data, np.diag([1, 1, 30, 1.0]))
    colour = np.zeros(data.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    made.scan("rgb", nb.Nifti1Image(colour, affine), affine)
    made.scan("twins", data, affine)
    made.scan("twins", data, affine, ext=".nii")
    made.path("annex").symlink_to("../../.git/annex/objects/Xx/MD5E-s1--0.nii.gz")
    made.scan("brokenjson", data, affine)
    made.path("brokenjson", ext=".json").write_text('{"Manufacturer": ')
    made.scan("toosmall", data, np.diag([2, 2, 2, 1.0]))
    made.path("folder").mkdir()


def _write_odd(made: DataSet, data, affine) -> None:
    hurt = data.copy()
    hurt[25, 30, 20:24] = np.nan
    made.scan("nan", hurt, affine)
    hurt = data.copy()
    hurt[0, 0, 0], hurt[25, 30, 20] = -np.inf, np.inf
    made.scan("inf", hurt, affine)
    hurt = data.copy()
    hurt[20, 20, 2:6] = -3
    made.scan("negative", hurt, affine)
    image = _image(np.round(data / data.max() * 255).astype(np.uint8), affine)
    image.header.set_slope_inter(float(data.max()) / 255, 0)
    made.scan("uint8slope", image, affine)
    header = nb.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    made.scan("bigendian", nb.Nifti1Image(np.round(data).astype(">i2"), affine, header), affine)
    angle = np.deg2rad(17)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    made.scan("oblique", data, turn @ affine)
    for sub, codes in (("flipped", "LPI"), ("permuted", "SAL")):
        base = nb.Nifti1Image(data, affine)
        change = nb.orientations.ornt_transform(
            nb.io_orientation(affine), nb.orientations.axcodes2ornt(codes)
        )
        turned = base.as_reoriented(change)
        made.scan(sub, np.asanyarray(turned.dataobj), turned.affine)
    image = nb.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    wrong = affine.copy()
    wrong[0, 3] += 40
    image.set_qform(wrong, 1)
    made.scan("disagree", image, affine)
    thin = (data[:, :, ::2] + data[:, :, 1::2]) / 2 * ((data[:, :, ::2] * data[:, :, 1::2]) > 0)
    made.scan("thick", thin, affine @ np.diag([1, 1, 2, 1.0]))
    made.scan("trailing", data[..., None], affine)
    made.scan("nosidecar", data, affine, sidecar=False)
    made.scan("notable", data, affine, sidecar=False)
    made.scan("nosite", data, affine, sidecar=False)
    made.scan("plain", data, affine)
    made.scan("hugevalues", data * np.float32(1e6), affine)


@pytest.fixture(scope="module")
def odd(tmp_path_factory, brains):
    """A data set of bad and odd scans of the same brain."""
    made = DataSet(tmp_path_factory.mktemp("odd") / "raw")
    data, affine = brains.brain("B", 11, move=False)
    _write_refused(made, data, affine)
    _write_odd(made, data, affine)
    for sub in (*REFUSED, *ODD):
        if sub != "notable":
            made.site(sub, "n/a" if sub == "nosite" else "B")
    return made


@pytest.fixture(scope="module")
def run(odd, bundle, tmp_path_factory):
    """One run of the command over all of them; what it printed, and where it wrote."""
    folder = tmp_path_factory.mktemp("odd_run")
    for path in odd.root.rglob("*_T1w.nii*"):
        give_transform(folder / "theirs", path)
    before = odd.snapshot()
    options = quick(folder / "work", folder / "theirs")
    ran = call(odd.root, folder / "out", "participant", "--model", bundle, *options)
    ran.changed = before != odd.snapshot()
    ran.out_dir, ran.folder = folder / "out", folder
    return ran


def _output(run, sub):
    return run.out_dir / f"sub-{sub}" / "anat" / f"sub-{sub}_desc-harmonized_T1w.nii.gz"


def _record(run, sub):
    path = _output(run, sub)
    return json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())


def test_the_run_as_a_whole(run):
    assert run.code == 65, run.out + run.err
    total = len(REFUSED) + len(ODD)
    assert f"{total} scans in" in run.out
    assert f"{len(ODD)} harmonized, {len(REFUSED)} refused" in run.out
    assert "Traceback" not in run.out + run.err
    assert not run.changed


@pytest.mark.parametrize("sub", REFUSED)
def test_a_bad_scan_is_refused_with_a_cure(run, sub):
    line = run.line(f"sub-{sub}_T1w")
    assert ": refused: " in line
    assert f"sub-{sub}_T1w" in line.split(": refused: ")[1]
    assert REFUSED[sub] in line
    assert not _output(run, sub).exists()
    page = (run.out_dir / f"sub-{sub}.html").read_text()
    assert "refused" in page.lower()
    assert f"sub-{sub}_T1w" in page


@pytest.mark.parametrize("sub", ODD)
def test_an_odd_scan_is_harmonized_where_it_is(run, odd, sub):
    assert ": harmonized" in run.line(f"sub-{sub}_T1w")
    image = nb.load(_output(run, sub))
    raw = nb.load(odd.path(sub))
    data = np.asanyarray(image.dataobj)
    assert image.shape == raw.shape[:3]
    assert image.get_data_dtype() == np.float32
    np.testing.assert_allclose(image.affine, raw.affine, atol=1e-4)
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
    assert np.isfinite(data).all()
    assert data.min() == 0
    given = np.nan_to_num(np.asanyarray(raw.dataobj).reshape(image.shape), posinf=0, neginf=0)
    outside = given <= 0 if sub != "nan" else (given <= 0) & (data == 0)
    assert (data[outside] == 0).all()
    assert (data[given > 0] > 0).mean() > 0.99


@pytest.mark.parametrize("sub", MENDED)
def test_what_was_mended_is_told(run, sub):
    notes = _record(run, sub)["Harmonization"]["Conform"]
    assert any(MENDED[sub] in note for note in notes), notes
    assert MENDED[sub] in (run.out_dir / f"sub-{sub}.html").read_text()


@pytest.mark.parametrize("sub", ["flipped", "permuted"])
def test_orientation_does_not_matter(run, sub):
    plain, turned = (nb.load(_output(run, s)) for s in ("plain", sub))
    back = turned.as_reoriented(
        nb.orientations.ornt_transform(
            nb.io_orientation(turned.affine), nb.io_orientation(plain.affine)
        )
    )
    np.testing.assert_allclose(back.affine, plain.affine, atol=1e-4)
    np.testing.assert_array_equal(np.asanyarray(back.dataobj), np.asanyarray(plain.dataobj))


@pytest.mark.parametrize("sub", ["oblique", "trailing", "disagree", "nosidecar"])
def test_voxels_do_not_depend_on_the_header(run, sub):
    np.testing.assert_array_equal(load(_output(run, sub))[0], load(_output(run, "plain"))[0])


@pytest.mark.parametrize(("sub", "close"), [("uint8slope", 0.01), ("bigendian", 0.005),
                                            ("hugevalues", 1e-4)])  # fmt: skip
def test_units_and_storage_hardly_matter(run, sub, close):
    plain, stored = load(_output(run, "plain"))[0], load(_output(run, sub))[0]
    assert np.abs(plain - stored).max() < close * plain.max()


def test_site_of_each(run):
    sites = {s: _record(run, s)["Harmonization"]["Site"] for s in ("plain", "notable", "nosite")}
    assert sites == {"plain": "B", "notable": "n/a", "nosite": "n/a"}
    assert _record(run, "plain")["Harmonization"]["SiteSource"] == "participants.tsv column site"


def test_nothing_is_left_behind(run):
    assert not list(run.out_dir.rglob("*.tmp"))
    (graph,) = (run.folder / "work").glob("bids_harmony_*_wf")
    left = [p for p in graph.iterdir() if p.is_dir()]
    assert {p.name for p in left} <= {f"sub{s}_T1w_wf" for s in REFUSED}
