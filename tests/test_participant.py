"""The participant level from command to files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
from conftest import DataSet, call, give_transform, quick, serial, snapshot
from scipy.stats import rankdata

from bids_harmony.imaging.templates import template_image
from bids_harmony.interfaces.files import load, load_mask, sha256

SPACE = "MNI152NLin2009aSym"
SPACES = ["--output-spaces", "native", f"{SPACE}:res-4"]
RECORD = {
    "Version", "Template", "SkullStrip", "BiasField", "Threads", "Seed", "Method", "ModelName",
    "ModelHash", "ModelChoice", "Reference", "Device", "Site", "SiteSource", "Registration",
    "OutputSpaces", "InputSHA256", "Conform", "BrainMask", "InputScale", "OutputScale",
    "Details", "Metrics", "Warnings",
}  # fmt: skip


def out_file(out, sub, desc="harmonized", space=None, suffix="T1w"):
    entities = f"_space-{space}_res-4" if space else ""
    return out / f"sub-{sub}" / "anat" / f"sub-{sub}{entities}_desc-{desc}_{suffix}.nii.gz"


def sidecar(path):
    return json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())


def voxel_files(out):
    """Checksum of every output that a run makes, less logs and pages (they hold durations)."""
    return {
        name: digest
        for name, (digest, _) in snapshot(out).items()
        if name.endswith((".nii.gz", ".json", ".tsv", ".txt")) and not name.startswith("logs/")
    }


@pytest.fixture(scope="module")
def done(tiny, bundle, transforms, tmp_path_factory):
    """A run over the tiny data set without the slow steps."""
    folder = tmp_path_factory.mktemp("done")
    before = tiny.snapshot()
    options = quick(folder / "work", transforms)
    ran = call(tiny.root, folder / "out", "participant", "--model", bundle, *options, *SPACES)
    assert ran.code == 0, ran.out + ran.err
    ran.out_dir, ran.work, ran.raw_is_untouched = (
        folder / "out", folder / "work", tiny.snapshot() == before,
    )  # fmt: skip
    return ran


@pytest.fixture(scope="module")
def full(brains, bundle, tmp_path_factory):
    """One scan through every step: N4, registration, a template space."""
    folder = tmp_path_factory.mktemp("full")
    made = DataSet(folder / "raw")
    made.scan("01", *brains.brain("B", 5))
    made.site("01", "B")
    before, place = made.snapshot(), tempfile.tempdir
    tempfile.tempdir = str(folder / "temp")
    (folder / "temp").mkdir()
    options = ["--model", bundle, *serial(folder / "work"), *SPACES]
    try:
        ran = call(made.root, folder / "out", "participant", *options)
    finally:
        tempfile.tempdir = place
    assert ran.code == 0, ran.out + ran.err
    assert made.snapshot() == before
    ran.raw, ran.out_dir, ran.folder, ran.options = made, folder / "out", folder, options
    return ran


def test_what_is_said(done):
    assert "model: nyul-A (Nyul-Udupa landmarks), asked for with --model" in done.out
    assert "reference domain: A" in done.out
    assert "4 scans in" in done.out
    assert ": 4 harmonized" in done.out
    assert done.raw_is_untouched


@pytest.mark.parametrize("sub", ["01", "02", "03", "04"])
def test_native_output(done, tiny, sub):
    image, raw = nb.load(out_file(done.out_dir, sub)), nb.load(tiny.path(sub))
    data, before = np.asanyarray(image.dataobj), np.asanyarray(raw.dataobj)
    assert image.shape == raw.shape
    assert image.get_data_dtype() == np.float32
    np.testing.assert_allclose(image.affine, raw.affine, atol=1e-5)
    assert np.isfinite(data).all()
    assert data.min() == 0
    assert (data[before == 0] == 0).all()
    assert (data[before > 0] > 0).mean() > 0.999


def test_sites_come_closer(done, tiny):
    def median(load_one):
        return [np.median(v[v > 0]) for v in map(load_one, ("01", "02", "03", "04"))]

    before = median(lambda s: load(tiny.path(s))[0])
    after = median(lambda s: load(out_file(done.out_dir, s))[0])
    assert np.mean(before[:2]) / np.mean(before[2:]) > 1.3
    np.testing.assert_allclose(after, np.mean(before[:2]), rtol=0.05)


def test_rank_order_is_kept(done, tiny):
    raw, out = load(tiny.path("03"))[0], load(out_file(done.out_dir, "03"))[0]
    ranks = [rankdata(x[raw > 0]) for x in (raw, out)]
    assert np.corrcoef(ranks)[0, 1] > 0.9999


def test_template_space_output(done):
    grid = template_image(SPACE, 4.0)
    path = out_file(done.out_dir, "03", space=SPACE)
    image = nb.load(path)
    assert image.shape == grid.shape
    np.testing.assert_allclose(image.affine, grid.affine, atol=1e-4)
    data = np.asanyarray(image.dataobj)
    assert np.isfinite(data).all()
    assert data.min() >= 0
    words = sidecar(path)
    assert words["Resolution"] == {"4": f"{SPACE}, 4x4x4 mm voxels"}
    assert SPACE in words["SpatialReference"]


def test_sidecar(done, bundle):
    words = sidecar(out_file(done.out_dir, "03"))
    assert words["Sources"] == ["bids:raw:sub-03/anat/sub-03_T1w.nii.gz"]
    assert words["SkullStripped"] is True
    assert words["MagneticFieldStrength"] == 3
    assert "harmonized with nyul to the reference domain A" in words["Description"]
    record = words["Harmonization"]
    assert set(record) >= RECORD
    assert record["ModelHash"] == json.loads((bundle / "model.json").read_text()).get(
        "hash", record["ModelHash"]
    )
    assert (record["Method"], record["Reference"], record["Site"]) == ("nyul", "A", "B")
    assert record["BiasField"] == "not corrected (--ignore bias-field)"
    assert record["Registration"].startswith("theirs (sha256 ")
    assert record["BrainMask"] == "nonzero part of the skull-stripped scan"
    names = {m["name"] for m in record["Metrics"]}
    assert len(names) == len(record["Metrics"]) > 0


def test_second_run_skips_all(done, tiny, bundle, transforms):
    before = voxel_files(done.out_dir)
    options = ["--model", bundle, *quick(done.work, transforms), *SPACES]
    ran = call(tiny.root, done.out_dir, "participant", *options)
    assert ran.code == 0
    assert "4 skipped" in ran.out
    assert voxel_files(done.out_dir) == before
    dry = call(tiny.root, done.out_dir, "participant", *options, "--dry-run")
    assert "4 skipped" in dry.out


def test_same_settings_same_voxels(done, tiny, bundle, transforms, tmp_path):
    """Another OUT_DIR and two worker processes give the same bytes."""
    options = ["--model", bundle, *quick(tmp_path / "work", transforms), *SPACES]
    options += ["--nprocs", "2", "--participant-label", "03", "04"]
    ran = call(tiny.root, tmp_path / "out", "participant", *options)
    assert ran.code == 0, ran.out + ran.err
    one, two = voxel_files(done.out_dir), voxel_files(tmp_path / "out")
    assert {k for k in two if k.startswith("sub-04")} == {k for k in one if k.startswith("sub-04")}
    assert {k: one[k] for k in two if k.startswith("sub-")} == {
        k: v for k, v in two.items() if k.startswith("sub-")
    }


def test_plugin_of_nipype(done, tiny, bundle, transforms, tmp_path):
    plugin = tmp_path / "plugin.yml"
    plugin.write_text("plugin: Linear\n")
    options = ["--model", bundle, *quick(tmp_path / "work", transforms), "--participant-label"]
    options = [*options, "03", "--use-plugin", plugin]
    ran = call(tiny.root, tmp_path / "out", "participant", *options)
    assert ran.code == 0, ran.out + ran.err
    np.testing.assert_array_equal(
        load(out_file(tmp_path / "out", "03"))[0], load(out_file(done.out_dir, "03"))[0]
    )
    plugin.write_text("plugin: Teleport\n")
    ran = call(tiny.root, tmp_path / "out2", "participant", *options)
    assert (ran.code, "no plugin 'Teleport'" in ran.err) == (64, True)


def test_one_label_one_model(done, tiny, transforms, tmp_path):
    rest = ["--method", "zscore", "--reference", "A", *quick(tmp_path / "work", transforms)]
    before = voxel_files(done.out_dir)
    out = tmp_path / "out"
    shutil.copytree(done.out_dir, out)
    ran = call(tiny.root, out, "participant", *rest)
    assert ran.code == 64
    assert "choose another --desc or another OUT_DIR" in ran.err
    one = [*rest, "--desc", "zscore", "--participant-label", "03"]
    ran = call(tiny.root, out, "participant", *one)
    assert ran.code == 0, ran.out + ran.err
    assert out_file(out, "03", desc="zscore").is_file()
    assert {k: v for k, v in voxel_files(out).items() if k in before and "tsv" not in k} == {
        k: v for k, v in before.items() if "tsv" not in k
    }
    table = (out / "descriptions.tsv").read_text()
    assert "desc-harmonized\t" in table
    assert "desc-zscore\t" in table
    page = (out / "sub-03.html").read_text()
    assert "desc-zscore" in page
    assert "desc-harmonized" in page


def test_reports_only(done, tiny, bundle, transforms):
    page = done.out_dir / "sub-03.html"
    before = voxel_files(done.out_dir)
    page.unlink()
    options = ["--model", bundle, *quick(done.work, transforms), "--reports-only"]
    ran = call(tiny.root, done.out_dir, "participant", *options)
    assert ran.code == 0
    assert "sub-03_T1w" in page.read_text()
    assert voxel_files(done.out_dir) == before


def test_every_step(full):
    anat = full.out_dir / "sub-01" / "anat"
    names = {p.name for p in anat.iterdir()}
    assert {
        "sub-01_desc-brain_mask.nii.gz",
        "sub-01_desc-n4_biasfield.nii.gz",
        f"sub-01_from-T1w_to-{SPACE}_mode-image_xfm.txt",
        "sub-01_desc-harmonized_T1w.nii.gz",
        f"sub-01_space-{SPACE}_res-4_desc-harmonized_T1w.nii.gz",
    } <= names
    record = sidecar(out_file(full.out_dir, "01"))["Harmonization"]
    assert record["Registration"] == f"rigid to {SPACE}"
    assert record["BiasField"] == "N4"
    raw = load(full.raw.path("01"))[0] > 0
    mask = load_mask(out_file(full.out_dir, "01", desc="brain", suffix="mask"))
    assert 2 * (raw & mask).sum() / (raw.sum() + mask.sum()) > 0.98


def test_registration_finds_the_template(full):
    grid = template_image(SPACE, 4.0).get_fdata() > 0.25
    moved = load(out_file(full.out_dir, "01", space=SPACE))[0] > 100
    assert 2 * (grid & moved).sum() / (grid.sum() + moved.sum()) > 0.93


def test_no_file_is_left_in_temporary_or_work_folders(full, done):
    assert list((full.folder / "temp").iterdir()) == []
    for out in (full.out_dir, done.out_dir):
        assert not list(out.rglob(".harmony-*"))
    assert list(done.work.glob("bids_harmony_*_wf"))
    assert not list(done.work.glob("bids_harmony_*_wf/*_wf"))


def test_run_is_logged(full):
    import tomllib

    logs = full.out_dir / "logs"
    (toml,) = logs.glob("*.toml")
    table = tomllib.loads(toml.read_text())["bids_harmony"]
    assert table["random_seed"] == 20200220
    assert table["bids_dir"] == str(full.raw.root)
    assert "N4" in (logs / "CITATION.md").read_text()


def test_minimal_level_is_reused(full, bundle, tmp_path):
    """Mask and transform of one run serve another; nothing of it is harmonized."""
    out = tmp_path / "out"
    shutil.copytree(full.out_dir, out)
    for path in out.rglob("*harmonized*"):
        path.unlink()
    options = ["--level", "minimal", *serial(tmp_path / "work")]
    ran = call(full.raw.root, out, "participant", *options)
    assert ran.code == 0
    assert "skipped: done by an earlier run" in ran.line("sub-01_T1w")
    assert not list(out.rglob("*harmonized*.nii.gz"))


def test_another_run_fits_no_second_bias_field(full, bundle, tmp_path, monkeypatch):
    """The field of an earlier run serves, and gives the same voxels."""
    out = tmp_path / "out"
    shutil.copytree(full.out_dir, out)
    stem = "sub-01_desc-harmonized_T1w.nii.gz"
    (made,) = out.rglob(stem)
    before = made.read_bytes()
    made.unlink()

    def fit_bias(*_args):
        raise AssertionError("fitted again")

    monkeypatch.setattr("bids_harmony.interfaces.ants.fit_bias", fit_bias)
    options = ["--model", bundle, *serial(tmp_path / "work"), *SPACES]
    ran = call(full.raw.root, out, "participant", *options)
    assert ran.code == 0, ran.err
    assert made.read_bytes() == before


def test_what_was_made_with_a_given_mask_serves_while_the_mask_is_the_same(
    tiny, bundle, tmp_path, monkeypatch
):
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    raw, affine = load(tiny.path("01"))
    path = theirs / "sub-01" / "anat" / "sub-01_desc-brain_mask.nii.gz"
    path.parent.mkdir(parents=True)
    nb.Nifti1Image((raw > 0).astype(np.uint8), affine).to_filename(path)
    options = ["--participant-label", "01", "--derivatives", f"theirs={theirs}"]
    options += serial(tmp_path / "work")
    ran = call(tiny.root, out, "participant", "--level", "minimal", *options)
    assert ran.code == 0, ran.out + ran.err

    def again(*_args, **_kwargs):
        raise AssertionError("made again")

    for name in ("fit_bias", "register_rigid"):
        monkeypatch.setattr(f"bids_harmony.interfaces.ants.{name}", again)
    options += ["--model", bundle]
    ran = call(tiny.root, out, "participant", *options)
    assert ran.code == 0, ran.out + ran.err
    assert sidecar(out_file(out, "01"))["Harmonization"]["BrainMask"] == "theirs"
    smaller = raw > 0
    smaller[:25] = False
    nb.Nifti1Image(smaller.astype(np.uint8), affine).to_filename(path)
    ran = call(tiny.root, out, "participant", *options)
    assert ran.code == 1
    assert "made again" in ran.line("sub-01_T1w")


def test_minimal_level(tiny, transforms, tmp_path):
    out = tmp_path / "out"
    options = ["--level", "minimal", "--participant-label", "01", "--modality", "T1w"]
    options += quick(tmp_path / "work", transforms)
    ran = call(tiny.root, out, "participant", *options)
    assert ran.code == 0, ran.err
    assert ": preprocessed" in ran.line("sub-01_T1w")
    assert {p.name for p in out.rglob("*.nii.gz")} == {"sub-01_desc-brain_mask.nii.gz"}
    ran = call(tiny.root, out, "participant", *options)
    assert "skipped: done by an earlier run" in ran.line("sub-01_T1w")


@pytest.mark.parametrize("which", ["done", "full"])
def test_outputs_are_valid_bids(which, request):
    tool = shutil.which("bids-validator-deno", path=f"{Path(sys.executable).parent}:{os.defpath}")
    if tool is None:
        pytest.skip("bids-validator-deno is not installed (extra: validator)")
    out = request.getfixturevalue(which).out_dir
    ran = subprocess.run(
        [tool, "--format", "json", str(out)], capture_output=True, text=True, check=False
    )
    issues = json.loads(ran.stdout)["issues"]["issues"]
    errors = [i for i in issues if i["severity"] == "error"]
    assert not errors, errors


def test_given_mask(tiny, bundle, transforms, tmp_path):
    """The user's mask replaces ours and the sidecar says whose it is."""
    theirs = tmp_path / "theirs"
    shutil.copytree(transforms, theirs)
    raw, affine = load(tiny.path("03"))
    mask = raw > 0
    mask[:25] = False
    path = theirs / "sub-03" / "anat" / "sub-03_desc-brain_mask.nii.gz"
    nb.Nifti1Image(mask.astype(np.uint8), affine).to_filename(path)
    options = ["--model", bundle, "--participant-label", "03", "04"]
    ran = call(
        tiny.root, tmp_path / "out", "participant", *options, *quick(tmp_path / "work", theirs)
    )
    assert ran.code == 0, ran.out + ran.err
    ours = load_mask(out_file(tmp_path / "out", "03", desc="brain", suffix="mask"))
    np.testing.assert_array_equal(ours, mask)
    record = sidecar(out_file(tmp_path / "out", "03"))["Harmonization"]
    assert record["BrainMask"] == "theirs"
    assert record["GivenMask"] == f"theirs (sha256 {sha256(path)[:12]})"
    other = sidecar(out_file(tmp_path / "out", "04"))["Harmonization"]
    assert other["GivenMask"] == ""


def test_skull_strip(tiny, bundle, transforms, tmp_path, monkeypatch):
    """auto tells stripped scans; skip refuses a head; force never trusts the zeros."""
    made = DataSet(tmp_path / "raw")
    data, affine = load(tiny.path("01"))
    made.scan("head", np.where(data > 0, data, 40).astype(np.float32), affine)
    made.scan("small", data, np.diag([2.0, 2.0, 2.0, 1.0]))
    made.scan("brain", data, affine)
    for path in made.root.rglob("*_T1w.nii.gz"):
        give_transform(tmp_path / "theirs", path)
    rest = ["--model", bundle, *quick(tmp_path / "work", tmp_path / "theirs"), "--skull-strip"]
    ran = call(made.root, tmp_path / "out", "participant", *rest, "skip")
    assert ran.code == 65
    assert "no zero background; use --skull-strip auto" in ran.line("sub-head_T1w")
    assert "the brain mask holds 226 ml, which is no brain" in ran.line("sub-small_T1w")
    assert ": harmonized" in ran.line("sub-brain_T1w")

    from bids_harmony.errors import ScanError
    from bids_harmony.interfaces.mask import SelectBrainMask

    def extraction(*_):
        raise ScanError("own brain extraction was called")

    monkeypatch.setattr(SelectBrainMask, "_own_mask", extraction)
    one = ["force", "--participant-label", "brain", "--desc", "forced"]
    ran = call(made.root, tmp_path / "out2", "participant", *rest, *one)
    assert "own brain extraction was called" in ran.line("sub-brain_T1w")


def test_a_known_map_comes_back(brains, tmp_path):
    """Matching a monotone copy of a scan to that scan gives the scan."""
    made = DataSet(tmp_path / "raw")
    data, affine = brains.brain("A", 21)
    copy = np.where(data > 0, 30 + 12 * data**0.6, 0).astype(np.float32)
    made.scan("ref", data, affine)
    made.scan("copy", copy, affine)
    made.site("ref", "A")
    made.site("copy", "B")
    for path in made.root.rglob("*_T1w.nii.gz"):
        give_transform(tmp_path / "theirs", path)
    options = ["--method", "histogram-matching", "--reference", "A", "--participant-label", "copy"]
    options += quick(tmp_path / "work", tmp_path / "theirs")
    ran = call(made.root, tmp_path / "out", "participant", *options)
    assert ran.code == 0, ran.out + ran.err
    after = load(out_file(tmp_path / "out", "copy"))[0]
    brain = data > 0
    low, high = np.percentile(data[brain], (1, 99))
    middle = brain & (data > low) & (data < high)
    assert np.abs(after[middle] - data[middle]).max() < 0.03 * high
    assert np.abs(after[brain] - data[brain]).mean() < 0.005 * high
    order = np.argsort(copy[brain], kind="stable")
    assert (np.diff(after[brain][order]) >= -1e-3 * high).all()


def test_method_on_a_template_grid(tiny, transforms, tmp_path):
    options = ["--method", "ssimh", "--reference", "A", "--participant-label", "03"]
    options += quick(tmp_path / "work", transforms)
    ran = call(tiny.root, tmp_path / "out", "participant", *options)
    assert ran.code == 0, ran.out + ran.err
    image, raw = nb.load(out_file(tmp_path / "out", "03")), nb.load(tiny.path("03"))
    data, before = np.asanyarray(image.dataobj), np.asanyarray(raw.dataobj)
    assert image.shape == raw.shape
    np.testing.assert_allclose(image.affine, raw.affine, atol=1e-5)
    assert (data[before == 0] == 0).all()
    assert np.corrcoef(data[before > 0], before[before > 0])[0, 1] > 0.8
    assert sidecar(out_file(tmp_path / "out", "03"))["Harmonization"]["Method"] == "ssimh"


@pytest.mark.parametrize("extra", [1, 2])
def test_given_mask_with_more_axes(tiny, bundle, transforms, tmp_path, extra):
    theirs = tmp_path / "theirs"
    shutil.copytree(transforms, theirs)
    raw, affine = load(tiny.path("03"))
    path = theirs / "sub-03" / "anat" / "sub-03_desc-brain_mask.nii.gz"
    mask = np.stack([(raw > 0).astype(np.uint8)] * extra, -1)
    nb.Nifti1Image(mask, affine).to_filename(path)
    options = ["--model", bundle, "--participant-label", "03", *quick(tmp_path / "work", theirs)]
    ran = call(tiny.root, tmp_path / "out", "participant", *options)
    assert ran.code == (0 if extra == 1 else 65), ran.out + ran.err
    if extra == 2:
        assert "a brain mask has three axes, not 4; mend it" in ran.line("sub-03_T1w")


def test_labels_that_differ_in_a_plus_only(tiny, bundle, tmp_path):
    made = DataSet(tmp_path / "raw")
    for sub in ("01", "0+1"):
        give_transform(tmp_path / "theirs", made.scan(sub, *load(tiny.path("03"))))
    options = ["--model", bundle, *quick(tmp_path / "work", tmp_path / "theirs")]
    ran = call(made.root, tmp_path / "out", "participant", *options)
    assert ran.code == 0, ran.out + ran.err
    assert "2 harmonized" in ran.out
    assert len(list((tmp_path / "out").glob("sub-*/anat/*harmonized_T1w.nii.gz"))) == 2


def test_a_report_that_cannot_be_drawn_is_told(tiny, bundle, transforms, tmp_path, monkeypatch):
    from bids_harmony.interfaces import report

    def fail(*_):
        raise ValueError("no slice to draw")

    monkeypatch.setattr(report, "render_fragment", fail)
    options = ["--model", bundle, "--participant-label", "03"]
    options += quick(tmp_path / "work", transforms)
    ran = call(tiny.root, tmp_path / "out", "participant", *options)
    assert ran.code == 0
    assert "this report could not be drawn" in ran.err
    assert "no slice to draw" in (tmp_path / "out" / "sub-03.html").read_text()
    assert out_file(tmp_path / "out", "03").is_file()


def test_debugging_aids(tiny, bundle, transforms, tmp_path):
    """Kept work files, the graph and the resource trace are where they are promised."""
    options = ["--model", bundle, "--participant-label", "03", "--no-clean-workdir"]
    options += [*quick(tmp_path / "work", transforms), "--write-graph", "--resource-monitor"]
    ran = call(tiny.root, tmp_path / "out", "participant", *options)
    assert ran.code == 0, ran.out + ran.err
    (kept,) = (tmp_path / "work").glob("bids_harmony_*_wf/sub03_T1w_wf")
    assert list(kept.rglob("conformed.nii"))
    names = {p.name for p in (tmp_path / "out" / "logs").iterdir()}
    assert any("graph" in name for name in names), names
    assert any("resource" in name for name in names), names
    from nipype import config

    assert not config.resource_monitor  # later interfaces of this process leave no traces


def test_a_page_does_not_wait_for_other_participants(done):
    pages = [(done.out_dir / f"sub-0{k}.html").stat().st_mtime_ns for k in range(1, 5)]
    scans = [out_file(done.out_dir, f"0{k}").stat().st_mtime_ns for k in range(1, 5)]
    assert min(pages) < max(scans)


def test_reports_only_before_any_run(tiny, bundle, tmp_path):
    options = ["--model", bundle, "--reports-only", *serial(tmp_path / "work")]
    ran = call(tiny.root, tmp_path / "out", "participant", *options)
    assert ran.code == 0
    assert "sub-03: nothing to report, no scan of it was harmonized here" in ran.err


def test_nothing_stays_from_a_scan_that_became_bad(tiny, bundle, transforms, tmp_path):
    """A scan that is replaced by a broken one is refused; its page says so."""
    made = DataSet(tmp_path / "raw")
    path = made.scan("01", *load(tiny.path("01")))
    options = ["--model", bundle, *quick(tmp_path / "work", transforms)]
    assert call(made.root, tmp_path / "out", "participant", *options).code == 0
    good = path.read_bytes()
    path.write_bytes(good[:1000])
    ran = call(made.root, tmp_path / "out", "participant", *options)
    assert ran.code == 65
    assert "refused" in (tmp_path / "out" / "sub-01.html").read_text()
    path.write_bytes(good)
    ran = call(made.root, tmp_path / "out", "participant", *options)
    assert ran.code == 0
    assert not list((tmp_path / "out").rglob("*.failed.html"))


@pytest.fixture
def mounted(tmp_path):
    """Mount a small disk; only root may."""
    places = []

    def mount(options):
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        ran = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)],
            capture_output=True,
            check=False,
        )
        if ran.returncode:
            pytest.skip("a file system can only be mounted by root")
        places.append(place)
        return place

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a file system can only be mounted by root")
    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("which", ["out", "work"])
def test_no_space_left(tiny, bundle, transforms, tmp_path, mounted, which):
    disk = mounted("size=256k" if which == "out" else "size=4m")
    out, work = (disk, tmp_path / "work") if which == "out" else (tmp_path / "out", disk)
    options = ["--model", bundle, "--participant-label", "03", *quick(work, transforms)]
    ran = call(tiny.root, out, "participant", *options)
    assert ran.code == 73, ran.out + ran.err
    assert "no space left" in (ran.out + ran.err).lower()
    assert "free some" in ran.out + ran.err
    assert "Traceback" not in ran.out + ran.err
    for path in out.rglob("*.nii.gz"):
        assert np.isfinite(load(path)[0]).all()
    assert not list(out.rglob(".harmony-*"))


def test_read_only_output(tiny, bundle, transforms, tmp_path, mounted):
    out = mounted("ro,size=1m")
    options = ["--model", bundle, *quick(tmp_path / "work", transforms)]
    ran = call(tiny.root, out, "participant", *options)
    assert ran.code == 73, ran.out + ran.err
    assert f"cannot write to {out}; make it writable or name another folder" in ran.err
    work = mounted("ro,size=1m")
    options = ["--model", bundle, *quick(work, transforms)]
    ran = call(tiny.root, tmp_path / "out", "participant", *options)
    assert ran.code == 73, ran.out + ran.err
    assert str(work) in ran.out + ran.err


def test_output_is_a_file(tiny, bundle, tmp_path):
    (tmp_path / "out").write_text("x")
    options = ["--model", bundle, *serial(tmp_path / "work")]
    ran = call(tiny.root, tmp_path / "out", "participant", *options)
    assert ran.code == 73, ran.err
    assert "choose another output folder" in ran.err or "check the output folder" in ran.err


@pytest.mark.slow
def test_registration_and_n4_repeat_bit_by_bit(full, tmp_path):
    out = tmp_path / "out"
    options = [str(tmp_path / "work") if o == str(full.folder / "work") else o
               for o in full.options]  # fmt: skip
    assert call(full.raw.root, out, "participant", *options).code == 0
    one, two = voxel_files(full.out_dir), voxel_files(out)
    assert one.pop("dataset_description.json")
    assert two.pop("dataset_description.json")
    assert one == two


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "force"])
def test_whole_head(bundle, tmp_path, mode):
    """Own brain extraction on the shipped head: outside the brain nothing turns to zero."""
    from bids_harmony.interfaces.brain_mask import head_template

    head = head_template()
    made = DataSet(tmp_path / "raw")
    rng = np.random.default_rng(0)
    noise = np.abs(rng.normal(0, 0.004 * head.data.max(), head.data.shape))
    made.scan("01", (head.data + noise).astype(np.float32), head.affine)
    options = ["--model", bundle, "--skull-strip", mode, *serial(tmp_path / "work")]
    ran = call(made.root, tmp_path / "out", "participant", *options, "--ignore", "bias-field")
    assert ran.code == 0, ran.out + ran.err
    mask = load_mask(out_file(tmp_path / "out", "01", desc="brain", suffix="mask"))
    truth = head.probability > 0.5
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.95
    words = sidecar(out_file(tmp_path / "out", "01"))
    assert words["SkullStripped"] is False
    assert words["Harmonization"]["BrainMask"].startswith("own brain extraction")
    assert (load(out_file(tmp_path / "out", "01"))[0][~mask] > 0).mean() > 0.5


def test_modality_the_model_does_not_know(tiny, bundle, transforms, tmp_path):
    options = ["--model", bundle, "--modality", "T2w", *quick(tmp_path / "work", transforms)]
    ran = call(tiny.root, tmp_path / "out", "participant", *options)
    assert ran.code == 64
    assert "T2w" in ran.err
    assert "was fitted on T1w only" in ran.err


def test_out_dir_is_no_source_of_given_masks(tiny, bundle, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    options = ["--model", bundle, "--derivatives", str(out), *serial(tmp_path / "work")]
    ran = call(tiny.root, out, "participant", *options)
    assert ran.code == 64
    assert "is OUT_DIR" in ran.err


def test_a_mended_mask_is_another_mask(tiny, bundle, transforms, tmp_path):
    """The same file name with other voxels makes the scan be done again."""
    theirs = tmp_path / "theirs"
    shutil.copytree(transforms, theirs)
    path = theirs / "sub-03" / "anat" / "sub-03_desc-brain_mask.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    data, affine = load(tiny.path("03"))
    options = ["--model", bundle, "--participant-label", "03", *quick(tmp_path / "work", theirs)]
    lines = []
    for floor in (0, np.percentile(data[data > 0], 5)):
        nb.save(nb.Nifti1Image((data > floor).astype("u1"), affine), path)
        ran = call(tiny.root, tmp_path / "out", "participant", *options)
        assert ran.code == 0, ran.out + ran.err
        lines.append(ran.line("sub-03_T1w"))
    assert all(": harmonized" in line for line in lines), lines
    again = call(tiny.root, tmp_path / "out", "participant", *options)
    assert ": skipped" in again.line("sub-03_T1w")
