"""Methods that harmonize by example: trained on all sites, the reference chosen at run time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import call, quick
from test_neural import log, plugin  # noqa: F401 - fixtures

from bids_harmony.bids.scan import Scan
from bids_harmony.errors import UsageError
from bids_harmony.interfaces.files import load, load_mask
from bids_harmony.methods.bundle import load_bundle
from bids_harmony.workflows.models import bundle_name, theta_of
from bids_harmony.workflows.train import training_scans

ALL = ["fit cpu None cpu 1", *(f"step {n}" for n in range(1, 6))]


def run(tiny, transforms, work, out, level, *options):
    return call(tiny.root, out, level, *options, *quick(work, transforms))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny, transforms, plugin):  # noqa: F811
    """Out and work folder with a bundle that was trained for site A."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_LOG", str(folder / "log"))
        ran = run(tiny, transforms, folder / "work", folder / "out", "train",
                  "--method", "example", "--reference", "A")  # fmt: skip
    assert ran.code == 0, ran.out + ran.err
    return folder


def brain_mean(trained, sub, desc):
    anat = trained / "out" / f"sub-{sub}" / "anat"
    data = load(anat / f"sub-{sub}_desc-{desc}_T1w.nii.gz")[0]
    return data[load_mask(anat / f"sub-{sub}_desc-brain_mask.nii.gz")].mean()


def test_networks_learn_from_all_sites_and_the_bundle_has_one_reference(trained):
    lines = (trained / "log").read_text().splitlines()
    assert lines[:-1] == ALL
    meta = load_bundle(trained / "out" / "models" / "example-A").meta
    assert meta["training_sites"] == ["A", "B"]
    assert meta["reference"] == "A"
    examples = lines[-1].split()[1:]
    assert 0 < len(examples) < meta["training_scans"]["T1w"]


def test_another_reference_at_run_time_trains_nothing(tiny, transforms, trained, log):  # noqa: F811
    for label, reference in (("toA", "A"), ("toB", "B"), ("toB", "B")):
        options = ["--method", "example", "--reference", reference, "--desc", label]
        ran = run(tiny, transforms, trained / "work", trained / "out", "participant",
                  "--participant-label", "01", *options)  # fmt: skip
        assert ran.code == 0, ran.out + ran.err
    made = log()
    assert [line.split()[0] for line in made] == ["towards"]
    bundles = {
        n: load_bundle(trained / "out" / "models" / n) for n in ("example-A", "example-A-as-B")
    }
    for (name, bundle), label in zip(bundles.items(), ("toA", "toB"), strict=True):
        scale = bundle.output_scale["T1w"]
        wanted = scale.low + bundle.method.mean * (scale.high - scale.low)
        assert brain_mean(trained, "01", label) == pytest.approx(wanted, rel=0.05), (
            name
        )  # other grid
    assert bundles["example-A-as-B"].meta["networks"]["hash"] == bundles["example-A"].hash
    record = json.loads(
        (trained / "out" / "sub-01" / "anat" / "sub-01_desc-toB_T1w.json").read_text()
    )["Harmonization"]
    assert record["Reference"] == "B"
    assert record["ModelName"] == "example-A-as-B"


def test_a_participant_or_a_scan_can_be_the_reference(tiny, transforms, trained, log):  # noqa: F811
    scan = next(tiny.root.glob("sub-02/anat/*_T1w.nii.gz"))
    for reference, name in (("sub-02", "example-A-as-sub-02"), (str(scan), None)):
        ran = run(tiny, transforms, trained / "work", trained / "out", "train",
                  "--model", "example-A", "--reference", reference)  # fmt: skip
        assert ran.code == 0, ran.out + ran.err
        assert name is None or (trained / "out" / "models" / name / "model.json").is_file()
    assert log() == ["towards sub-02_T1w"] * 2


def test_numbers_can_be_the_reference(tiny, transforms, trained, log):  # noqa: F811
    work, out = trained / "work", trained / "out"
    options = ["--model", "example-A", "--reference", "T1w=0.25", "--participant-label", "01"]
    dry = run(tiny, transforms, work, out, "participant", *options, "--dry-run")
    assert "would first give example-A the appearance of T1w=0.25" in dry.out
    for label in ("numbers", "numbers2"):
        ran = run(tiny, transforms, work, out, "participant", *options, "--desc", label)
        assert ran.code == 0, ran.out + ran.err
    assert log() == ["at_theta {'T1w': (0.25,)}"]
    bundle = load_bundle(out / "models" / bundle_name("example-A-as", "T1w=0.25"))
    before = load_bundle(out / "models" / "example-A")
    assert bundle.output_scale == before.output_scale
    assert bundle.meta["networks"]["hash"] == before.hash
    scale = bundle.output_scale["T1w"]
    wanted = scale.low + 0.25 * (scale.high - scale.low)
    assert brain_mean(trained, "01", "numbers") == pytest.approx(wanted, rel=0.05)
    record = json.loads((out / "sub-01" / "anat" / "sub-01_desc-numbers_T1w.json").read_text())[
        "Harmonization"
    ]
    assert record["Reference"] == "T1w=0.25"


def test_numbers_need_networks_and_units(tiny, transforms, trained, tmp_path):
    options = ["--method", "example", "--reference", "T1w=0.25"]
    ran = run(tiny, transforms, trained / "work", tmp_path / "out", "participant", *options)
    assert ran.code == 64
    assert "theta belongs to trained networks" in ran.err
    options = ["--model", "example-A", "--reference", "T1w=0.25/FLAIR=1"]
    ran = run(tiny, transforms, trained / "work", trained / "out", "participant", *options)
    assert ran.code == 64
    assert "its reference has no FLAIR scan to take units from" in ran.err
    options = ["--model", "nyul-default", "--reference", "T1w=0.25"]
    for level in ("train", "participant"):
        ran = run(tiny, transforms, trained / "work", tmp_path / "out", level, *options)
        assert ran.code == 64, ran.out + ran.err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("T1w=0.3,-1.2/T2w=.1,4e-1", {"T1w": (0.3, -1.2), "T2w": (0.1, 0.4)}),
        ("FLAIR=1", {"FLAIR": (1.0,)}),
        ("T1w", {}),
        ("T1w=", {}),
        ("T1w=a,b", {}),
        ("T1w=nan,1", {}),
        ("site=0.3,1", {}),
        ("T1w=0.3,1/", {}),
    ],
)
def test_theta_in_words(words, found):
    assert theta_of(words) == found


def test_a_new_site_is_learned_and_the_reference_stays(
    tiny, transforms, trained, log, monkeypatch  # noqa: F811
):  # fmt: skip
    options = ["--model", "example-A", "--adapt-to", "B"]
    work, out = trained / "work", trained / "out"
    ran = run(tiny, transforms, work, out, "train", *options)
    assert ran.code == 64
    assert "the training of example-A saw B" in ran.err
    sites = tiny.root / "participants.tsv"
    text = sites.read_text()
    try:
        sites.write_text(text.replace("\tB", "\tnew"))
        ran = run(
            tiny, transforms, work, out, "train", "--model", "example-A", "--adapt-to", "new"
        )
    finally:
        sites.write_text(text)
    assert ran.code == 0, ran.out + ran.err
    (line,) = log()
    assert line.startswith("fine_tuned ")
    made, before = (
        load_bundle(out / "models" / n) for n in ("example-A-adapted-to-new", "example-A")
    )
    assert made.meta["reference"] == "A"
    assert made.meta["fine_tuned"]["site"] == "new"
    assert made.output_scale == before.output_scale
    assert made.method.mean == before.method.mean
    assert made.method.tuned
    assert not before.method.tuned


def test_a_reference_of_the_same_name_in_another_data_set_is_another_reference(
    tiny, transforms, trained, log, tmp_path  # noqa: F811
):  # fmt: skip
    foreign = tmp_path / "foreign"
    shutil.copytree(trained / "out" / "models" / "example-A", foreign)
    model = foreign / "model.json"
    content = json.loads(model.read_text())
    for row in content["meta"]["reference_scans"]:
        row["sha256"] = "0" * 64  # as if its site A had other scans
    model.write_text(json.dumps(content))
    options = ["--reference", "A", "--participant-label", "01", "--model", str(foreign)]
    ran = run(tiny, transforms, trained / "work", tmp_path / "out", "participant", *options)
    assert ran.code == 0, ran.out + ran.err
    assert "networks of foreign, appearance of A" in ran.out
    (line,) = log()
    assert line.startswith("towards ")
    ran = run(tiny, transforms, trained / "work", tmp_path / "out", "participant", *options)
    assert ran.code == 0, ran.out + ran.err
    assert not log(), "the bundle that was made is used again"


def test_a_person_seen_at_several_sites_is_no_reference():
    scans = [
        Scan(Path(f"/raw/{s}.nii"), {"sub": "07", "ses": s}, "T1w", site=s) for s in ("A", "B")
    ]
    with pytest.raises(UsageError, match=r"several sites \(A, B\)"):
        training_scans(scans, "sub-07")
    assert training_scans(scans, "A") == scans[:1]
    assert training_scans(scans, "/raw/B.nii") == scans[1:]


def test_train_with_a_model_heeds_the_selection(tiny, transforms, trained, log):  # noqa: F811
    ran = run(tiny, transforms, trained / "work", trained / "out", "train", "--model", "example-A",
              "--reference", "A", "--participant-label", "01", "--name", "one")  # fmt: skip
    assert ran.code == 0, ran.out + ran.err
    assert log() == ["towards sub-01_T1w"]


def test_networks_that_were_trained_anew_get_the_reference_anew(
    tiny, transforms, trained, log, tmp_path  # noqa: F811
):  # fmt: skip
    options = ["--method", "example", "--participant-label", "01"]
    work, out = trained / "work", tmp_path / "out"
    for seed in ("1", "2"):
        more = ["--reference", "A", "--random-seed", seed, "--name", "mine"]
        assert run(tiny, transforms, work, out, "train", "--method", "example", *more).code == 0
        ran = run(tiny, transforms, work, out, "participant", *options, "--reference", "B",
                  "--desc", f"s{seed}")  # fmt: skip
        assert ran.code == 0, ran.out + ran.err
        networks = load_bundle(out / "models" / "mine-as-B").meta["networks"]
        assert networks == {"name": "mine", "hash": load_bundle(out / "models" / "mine").hash}


def test_dry_run_says_what_it_would_do(tiny, transforms, trained, log, tmp_path):  # noqa: F811
    options = ["--method", "example", "--reference", "B", "--dry-run"]
    ran = run(tiny, transforms, trained / "work", tmp_path / "out", "participant", *options)
    assert ran.code == 0, ran.err
    assert "would first fit example" in ran.out
    ran = run(tiny, transforms, trained / "work", trained / "out", "train",
              "--model", "example-A", "--reference", "sub-01", "--dry-run")  # fmt: skip
    assert ran.code == 0, ran.err
    assert "networks of example-A and take the appearance of sub-01" in ran.out
    assert not log()


def test_refusals_in_words(tiny, transforms, trained, log, tmp_path):  # noqa: F811
    work, out = trained / "work", tmp_path / "out"
    nyul = ["train", "--method", "nyul", "--reference", "A"]
    assert run(tiny, transforms, work, out, *nyul).code == 0
    for argv, told in (
        (["train", "--model", "nyul-A", "--reference", "B"], "has a reference of its own"),
        (["participant", "--model", "nyul-A", "--reference", "B"], "has a reference of its own"),
        (["train", "--model", "none", "--reference", "B"], "no bundle in"),
        (["train", "--model", "nyul-A", "--adapt-to", "B"], "cannot learn a new site"),
        (["train", "--adapt-to", "B"], "--adapt-to needs --model"),
        (["train", "--model", "none", "--reference", "B", "--preset", "cpu", "--method",
          "example"], "leave out --preset"),
        (["train", "--method", "example", "--reference", "A", "--participant-label", "01"],
         "at least 2 sites"),
        (["train", "--method", "example", "--reference", "Q"], "no scan of this site"),
    ):  # fmt: skip
        ran = run(tiny, transforms, work, out, *argv)
        assert ran.code in (18, 64, 66), (argv, ran.out, ran.err)
        assert told in ran.err, ran.err
        assert "Traceback" not in ran.err
    assert not log()
