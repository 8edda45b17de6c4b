"""Scans of a session harmonized together: deepNormalize on T1w and T2w, from the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import nibabel as nb
import numpy as np
import pytest
from conftest import DataSet, call, give_transform, quick

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")
pytest.importorskip("monai")

import contrast_brains  # noqa: E402

from bids_harmony.errors import ScanError, UsageError  # noqa: E402
from bids_harmony.interfaces.files import load  # noqa: E402
from bids_harmony.methods.base import Contract, Training  # noqa: E402
from bids_harmony.methods.bundle import load_bundle, save_bundle  # noqa: E402
from bids_harmony.methods.deepnormalize import DeepNormalize, Standardization  # noqa: E402
from bids_harmony.methods.sessions import by_session, whole_sessions  # noqa: E402
from bids_harmony.training.plan import Plan  # noqa: E402

PAIR = ("T1w", "T2w")
TOGETHER = Training(options={"lambda": 1.5, "together": 1.0})


def people(seeds_by_site, modalities=PAIR):
    """Labels of the T1w alone, as they are in T1w space."""
    found = []
    for site, seeds in seeds_by_site.items():
        for seed in seeds:
            for modality in modalities:
                scan = contrast_brains.labelled(seed, site, modality)
                found.append(scan if modality == "T1w" else replace(scan, labels=None))
    return found


VOLUMES = people({"a": (1, 2, 3), "b": (4, 5, 6)})


@pytest.fixture(autouse=True)
def small(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(DeepNormalize, "presets_by_name", {"cpu": SMALL})


SMALL = replace(
    DeepNormalize.presets_by_name["cpu"],
    widths=(4, 8),
    side=16,
    batch=4,
    plan=Plan(8, 2e-3, every=4, half=False),
)


@pytest.fixture(scope="module")
def fitted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepNormalize, "presets_by_name", {"cpu": SMALL})
        yield DeepNormalize.fit(VOLUMES, seed=0, training=TOGETHER)


def pair(seed, site):
    one, two = (contrast_brains.scan(seed, site, m) for m in PAIR)
    return replace(one, others={"T2w": two}), replace(two, others={"T1w": one})


def test_scans_go_together_on_a_common_grid_only():
    with pytest.raises(UsageError, match="needs a template grid"):
        Contract(PAIR, together=True)
    assert Contract(PAIR, "MNI152NLin2009aSym", 2.0, together=True).together


def test_sessions_are_brought_together():
    twice = [*VOLUMES, replace(VOLUMES[0], session="2"), replace(VOLUMES[1], name="again")]
    found = by_session(twice)
    assert list(found)[:2] == [("a", "01", ""), ("a", "01", "2")]
    assert found["a", "01", ""] == {"T1w": [0], "T2w": [1, 13]}
    assert found["a", "01", "2"] == {"T1w": [12]}


def test_sessions_that_lack_something_are_left_out(caplog):
    bare = replace(VOLUMES[2], labels=None)
    volumes = [*VOLUMES[:2], bare, *VOLUMES[3:11], replace(VOLUMES[1], name="again")]
    assert whole_sessions("x", volumes) == {"T1w-T2w": [0, 1, 4, 5, 6, 7, 8, 9]}
    assert "subject 02, session without name, site a: no tissue labels" in caplog.text
    assert "subject 06, session without name, site b: not all of ['T1w', 'T2w']" in caplog.text
    assert "left out of the training: again: a second scan" in caplog.text
    with pytest.raises(ScanError, match="two modalities or more, and all are T1w"):
        whole_sessions("x", VOLUMES[::2])
    with pytest.raises(ScanError, match="no session has T1w and T2w and tissue labels"):
        whole_sessions("x", [replace(v, labels=None) for v in VOLUMES])
    with pytest.raises(ScanError, match="two sites or more"):
        whole_sessions("x", VOLUMES[:6])
    whole_sessions("x", VOLUMES, frozenset({VOLUMES[0].name}))
    with pytest.raises(ScanError, match="no session of the reference's site has T1w and T2w"):
        whole_sessions("x", VOLUMES, frozenset({"a scan of another site"}))


def test_a_labelled_scan_comes_before_one_without():
    second = replace(VOLUMES[0], name="run-2")
    volumes = [replace(VOLUMES[0], labels=None), *VOLUMES[1:], second]
    assert whole_sessions("x", volumes) == {"T1w-T2w": [12, *range(1, 12)]}


def test_networks_see_both_modalities(fitted, tmp_path):
    assert fitted.contract.together
    assert fitted.contract.modalities == PAIR
    one, two = pair(20, "b")
    first, second = (fitted.harmonize(scan, seed=0) for scan in (one, two))
    assert np.array_equal(first.tissues, second.tissues), "one segmentation of the session"
    assert first.details["together_with"] == [two.name]
    near, far = (float(np.abs(first.data - v.data)[one.mask].mean()) for v in (one, two))
    assert near < far
    darker = replace(two, data=0.7 * two.data)
    changed = fitted.harmonize(replace(one, others={"T2w": darker}), seed=0)
    assert not np.array_equal(changed.data, first.data)
    assert not np.array_equal(changed.tissues, first.tissues)
    save_bundle(tmp_path / "model", fitted, meta={"name": "x", "reference": "a"})
    again = load_bundle(tmp_path / "model").method
    assert again.contract == fitted.contract
    assert np.array_equal(again.harmonize(two, seed=1).data, second.data)


def test_a_scan_without_the_other_is_refused(fitted):
    one, _ = pair(20, "b")
    with pytest.raises(ScanError, match="needs T2w of the same session too"):
        fitted.harmonize(replace(one, others={}), seed=0)
    with pytest.raises(ScanError, match="trained on T1w"):
        fitted.harmonize(replace(one, modality="FLAIR"), seed=0)
    swapped = replace(one, others={"T2w": replace(one, modality="T2w")})
    with pytest.raises(ScanError, match="elsewhere than in T2w brains"):
        fitted.harmonize(swapped, seed=0)


def test_what_is_brain_in_one_scan_only_stays_as_it_is(fitted):
    one, two = pair(20, "a")
    cut = two.mask.copy()
    cut[:16] = False
    done = fitted.harmonize(replace(one, others={"T2w": replace(two, mask=cut)}), seed=0)
    rest = one.mask & ~cut
    assert np.array_equal(done.data[rest], one.data[rest])
    assert not done.tissues[:, rest].any()
    assert not np.array_equal(done.data[cut], one.data[cut])
    assert any("the rest was left as it is" in text for text in done.warnings)


def test_standardization_sees_both_as_well():
    made = Standardization.fit(VOLUMES, seed=0, training=Training(options={"together": 1.0}))
    one, _ = pair(20, "b")
    found = made.harmonize(one, seed=0).data[one.mask]
    assert found.mean() == pytest.approx(0.6, abs=0.02)
    assert made._parts["T1w-T2w"].networks.channels == 2


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, brains):
    """Two people at each of two sites with T1w and T2w, labels of the T1w; and two more."""
    folder = tmp_path_factory.mktemp("pairs")
    made, theirs = DataSet(folder / "raw"), folder / "theirs"
    for number, site in enumerate("AABBBA", start=1):
        label = f"0{number}"
        data, affine = brains.brain(site, number, move=False)
        bright = float(data.max())
        paths = [made.scan(label, data, affine)]
        if number != 6:
            other = np.where(data > 0, 1.3 * bright - data, 0).astype(data.dtype)
            paths.append(made.scan(label, other, affine, suffix="T2w"))
        made.site(label, site)
        for path in paths:
            give_transform(theirs, path)
        cuts = np.quantile(data[data > 0], (0.2, 0.6))
        labels = np.where(data > 0, 1 + (data[..., None] > cuts).sum(-1), 0)
        there = theirs / f"sub-{label}" / "anat" / f"sub-{label}_T1w_dseg.nii.gz"
        nb.Nifti1Image(labels.astype(np.uint8), affine).to_filename(there)
    (theirs / "dseg.tsv").write_text("index\tname\n1\tCSF\n2\tgrey matter\n3\twhite matter\n")
    return made, folder


def test_from_pairs_to_pairs(cohort):
    made, folder = cohort
    out = folder / "out"
    options = quick(folder / "work", folder / "theirs")
    learn = ["train", "--method", "deepnormalize", "--reference", "A", "--modality", *PAIR]
    learn += ["--participant-label", "01", "02", "03", "04", *options]
    ran = call(made.root, out, *learn, "--method-option", "together=1")
    assert ran.code == 0, ran.out + ran.err
    bundle = load_bundle(out / "models" / "deepnormalize-A")
    assert bundle.method.contract.together
    assert bundle.meta["training_scans"] == {"T1w": 4, "T2w": 4}
    assert sorted(bundle.meta["reference_quantiles"]) == list(PAIR)

    scan = ["participant", "--participant-label", "05", "06", *options]
    planned = call(made.root, out, *scan, "--dry-run")
    assert "planned" in planned.line("sub-05_T1w")
    assert "the session has no T2w" in planned.line("sub-06_T1w")
    before = made.snapshot()
    ran = call(made.root, out, *scan)
    assert ran.code == 65, ran.out + ran.err
    assert made.snapshot() == before
    assert "harmonized" in ran.line("sub-05_T1w")
    assert "harmonizes T2w together with T1w, and the session has no T2w" in ran.line("sub-06_T1w")
    anat = out / "sub-05" / "anat"
    for modality in PAIR:
        image, _ = load(anat / f"sub-05_desc-harmonized_{modality}.nii.gz")
        raw, _ = load(made.path("05", modality))
        assert image.shape == raw.shape
        assert np.isfinite(image).all()
    one, two = (load(anat / f"sub-05_desc-deepnormalize{m}_dseg.nii.gz")[0] for m in ("", "T2w"))
    brain = load(made.path("05"))[0] > 0
    assert (one == two)[brain].mean() > 0.99
    record = json.loads((anat / "sub-05_desc-harmonized_T1w.json").read_text())["Harmonization"]
    assert record["Together"]["T2w"].startswith("sub-05_T2w (sha256 ")
    again = call(made.root, out, *scan)
    assert again.line("sub-05_T1w").endswith("skipped: done by an earlier run")

    image = nb.load(made.path("05", "T2w"))
    changed = nb.Nifti1Image(0.5 * image.get_fdata() + 5, image.affine)
    changed.to_filename(made.path("05", "T2w"))
    again = call(made.root, out, *scan, "--modality", "T1w")
    assert "sub-05_T1w: harmonized" in again.line("sub-05_T1w"), "the other scan is another now"
    renewed = json.loads((anat / "sub-05_desc-harmonized_T1w.json").read_text())["Harmonization"]
    assert renewed["Together"] != record["Together"]


def test_sessions_that_are_not_whole_are_refused_before_the_training(cohort):
    made, folder = cohort
    options = quick(folder / "work", folder / "theirs")
    learn = ["train", "--method", "deepnormalize", "--reference", "A", "--modality", *PAIR]
    learn += ["--participant-label", "01", "02", "03", "04", "06", *options]
    ran = call(made.root, folder / "more", *learn, "--method-option", "together=1")
    assert ran.code == 65, ran.out + ran.err
    assert "refused: " in ran.line("sub-06_T1w")
    assert "the session has no T2w of the same site" in ran.line("sub-06_T1w")
    meta = load_bundle(folder / "more" / "models" / "deepnormalize-A").meta
    assert meta["training_subjects"] == ["01", "02", "03", "04"]


def test_a_scan_whose_other_is_broken_is_told(cohort):
    made, folder = cohort
    out = folder / "out"
    options = quick(folder / "work", folder / "theirs")
    made.path("05", "T2w").write_bytes(b"no image")
    ran = call(made.root, out, "participant", "--participant-label", "05", "01", *options)
    told = ran.line("sub-05_T1w")
    assert "sub-05_T1w.nii.gz: to go together with sub-05_T2w, of which: " in told
    page = (out / "sub-05.html").read_text()
    assert page.count("Refused: this scan was not harmonized") == 2
    assert "</span> harmonized</span>" not in page, "a section of an earlier run is left"
    assert "sub-01_T1w: harmonized in" in ran.line("sub-01_T1w"), "the others go on"
    assert ran.code == 65
