"""The train level: a bundle is written, used, and broken scans are left out."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import DataSet, call, give_transform, quick, snapshot

from bids_harmony.interfaces.files import load
from bids_harmony.interfaces.volumes import StoreVolume
from bids_harmony.methods.bundle import load_bundle
from bids_harmony.workflows.models import bundle_name


@pytest.fixture(scope="module")
def site(tmp_path_factory, brains):
    """Site A with two good and three broken scans, and one scan of site B."""
    folder = tmp_path_factory.mktemp("train")
    made = DataSet(folder / "raw")
    for sub, seed in (("01", 1), ("02", 2)):
        made.scan(sub, *brains.brain("A", seed))
    data, affine = brains.brain("A", 3)
    whole = made.scan("cut", data, affine)
    whole.write_bytes(whole.read_bytes()[:2000])
    made.scan("flat", np.full_like(data, 3), affine)
    made.path("empty").write_bytes(b"")
    made.scan("b", *brains.brain("B", 4))
    for sub in ("01", "02", "cut", "flat", "empty"):
        made.site(sub, "A")
    made.site("b", "B")
    for path in made.root.rglob("*_T1w.nii.gz"):
        give_transform(folder / "theirs", path)
    return made, folder


@pytest.fixture(scope="module")
def trained(site):
    made, folder = site
    before = made.snapshot()
    options = ["--reference", "A", "--name", "mine", *quick(folder / "work", folder / "theirs")]
    ran = call(made.root, folder / "out", "train", *options)
    assert made.snapshot() == before
    ran.bundle = folder / "out" / "models" / "mine"
    return ran


def test_broken_scans_are_left_out_and_told(trained):
    assert trained.code == 65, trained.out + trained.err
    assert "refused" in trained.line("sub-cut_T1w")
    assert "every voxel is 3" in trained.line("sub-flat_T1w")
    assert "sub-empty_T1w.nii.gz: the file is empty" in trained.err
    for sub in ("01", "02"):
        assert ": preprocessed" in trained.line(f"sub-{sub}_T1w")
    assert "sub-b_T1w" not in trained.out
    assert f"model bundle: {trained.bundle}" in trained.out


def test_bundle(trained):
    bundle = load_bundle(trained.bundle)
    assert bundle.method.name == "nyul"
    assert bundle.meta["reference"] == "A"
    assert bundle.meta["training_subjects"] == ["01", "02"]
    assert bundle.meta["training_scans"] == {"T1w": 2}
    assert bundle.meta["training_sites"] == ["A"]
    assert bundle.output_scale["T1w"].high > 300
    quantiles = np.array(bundle.meta["reference_quantiles"]["T1w"])
    assert (np.diff(quantiles) >= 0).all()
    assert not list(trained.bundle.parent.glob("*.tmp"))


def test_settings_are_logged(trained):
    (toml,) = (trained.bundle.parent.parent / "logs").glob("*.toml")
    table = tomllib.loads(toml.read_text())["bids_harmony"]
    assert (table["analysis_level"], table["reference"]) == ("train", "A")


def test_same_scans_same_bundle(trained, site, tmp_path):
    """From stored volumes and from scratch: the same bytes."""
    made, folder = site
    for work in (folder / "work", tmp_path / "work"):
        options = ["--reference", "A", "--name", "mine", *quick(work, folder / "theirs")]
        ran = call(made.root, tmp_path / "out", "train", *options)
        assert ("preprocessed" in ran.out) == (work == tmp_path / "work")
        one, two = snapshot(trained.bundle), snapshot(tmp_path / "out" / "models" / "mine")
        assert {k: v[0] for k, v in one.items()} == {k: v[0] for k, v in two.items()}


def test_participant_uses_the_bundle_and_says_so(trained, site, tmp_path, monkeypatch):
    made, folder = site
    out = folder / "out"
    one = ["--participant-label", "b", *quick(folder / "work", folder / "theirs")]
    ran = call(made.root, out, "participant", *one)
    assert ran.code == 0, ran.out + ran.err
    assert "model: mine (Nyul-Udupa landmarks), the only bundle of OUT_DIR/models" in ran.out
    image = out / "sub-b" / "anat" / "sub-b_desc-harmonized_T1w.nii.gz"
    record = json.loads(image.with_name("sub-b_desc-harmonized_T1w.json").read_text())
    record = record["Harmonization"]
    assert (record["ModelName"], record["Reference"], record["Site"]) == ("mine", "A", "B")
    assert record["ModelHash"] == load_bundle(trained.bundle).hash
    reference, after = (v[v > 0] for v in (load(made.path("01"))[0], load(image)[0]))
    assert np.median(after) == pytest.approx(np.median(reference), rel=0.08)
    ran = call(made.root, out, "participant", *one, "--desc", "named", "--model", "mine")
    assert "asked for with --model" in ran.out
    monkeypatch.setattr("bids_harmony.workflows.models._SHIPPED", tmp_path)
    ran = call(made.root, out, "participant", *one, "--method", "zscore", "--desc", "z")
    assert ran.code == 64
    assert "no model for zscore ships with the package" in ran.err


def test_one_scan_as_reference(site, tmp_path):
    made, folder = site
    options = ["--method", "zscore", *quick(tmp_path / "work", folder / "theirs")]
    ran = call(made.root, tmp_path / "out", "train", "--reference", made.path("02"), *options)
    assert ran.code == 0, ran.out + ran.err
    bundle = load_bundle(tmp_path / "out" / "models" / "zscore-sub-02_T1w")
    assert bundle.meta["training_subjects"] == ["02"]
    assert bundle.meta["reference"] == "sub-02_T1w"


def test_site_without_a_usable_scan(site, tmp_path):
    made, folder = site
    options = ["--participant-label", "flat", "cut", *quick(tmp_path / "w", folder / "theirs")]
    ran = call(made.root, tmp_path / "out", "train", "--reference", "A", *options)
    assert ran.code == 64
    assert "none of its 2 scans can be used" in ran.err
    assert not list((tmp_path / "out").rglob("model.json"))


def test_no_model_is_made_of_what_a_crash_left(site, tmp_path, monkeypatch):
    """It would be used from then on; refused scans are another matter."""
    made, folder = site

    def run(node, cwd, plain=StoreVolume._run):
        if Path(node.inputs.out_stem).name == "sub-02_T1w":
            raise RuntimeError("the worker is gone")
        plain(node, cwd)

    options = quick(tmp_path / "work", folder / "theirs")
    with monkeypatch.context() as patch:
        patch.setattr(StoreVolume, "_run", run)
        for level in ("train", "participant"):
            ran = call(made.root, tmp_path / "out", level, "--reference", "A", *options)
            assert ran.code == 1
            assert "1 of 4 scans to learn from could not be preprocessed, such as" in ran.err
            assert "sub-02_T1w: RuntimeError: the worker is gone" in ran.err
            assert not list((tmp_path / "out").glob("models/*/model.json"))
    again = call(made.root, tmp_path / "out", "train", "--reference", "A", *options)
    assert again.code == 65
    assert list((tmp_path / "out").glob("models/*/model.json"))


def test_several_bundles_need_a_choice(trained, site, tmp_path):
    import shutil

    made, folder = site
    shutil.copytree(trained.bundle, tmp_path / "out" / "models" / "one")
    shutil.copytree(trained.bundle, tmp_path / "out" / "models" / "two")
    options = ["--participant-label", "b", *quick(tmp_path / "work", folder / "theirs")]
    ran = call(made.root, tmp_path / "out", "participant", *options)
    assert ran.code == 64
    assert "holds several bundles (one, two); choose one" in ran.err


def test_damaged_bundle(trained, site, tmp_path):
    import shutil

    made, folder = site
    bad = tmp_path / "bad"
    shutil.copytree(trained.bundle, bad)
    weights = bad / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    options = ["--participant-label", "b", *quick(tmp_path / "work", folder / "theirs")]
    ran = call(made.root, tmp_path / "out", "participant", "--model", bad, *options)
    assert ran.code not in (0, 1), ran.out + ran.err
    assert str(bad) in ran.err


@pytest.mark.parametrize(
    ("one", "other"), [("GE 1.5T MR01", "GE 1.5T MR02"), ("A B", "A-B"), ("a/b", "b")]
)
def test_bundle_names_tell_references_apart(one, other):
    assert bundle_name("nyul", one) != bundle_name("nyul", other)
    assert "/" not in bundle_name("nyul", one)
