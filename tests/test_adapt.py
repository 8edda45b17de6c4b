"""Adaptation to sites that training has not seen: once per site, the same for every job."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_neural
from conftest import DataSet, Ran, call, give_transform, quick

from bids_harmony.interfaces.files import load, sha256
from bids_harmony.interfaces.harmonize import AdaptToSite
from bids_harmony.interfaces.volumes import StoreVolume
from bids_harmony.methods.adaptation import load_adaptation
from bids_harmony.methods.base import Contract
from bids_harmony.workflows.adapt import Adapting
from bids_harmony.workflows.settings import Target

TWO = ["--adapt-scans", "2"]


class Cohort:
    """Site A to train on; four scans of site B, one of them broken; one scan of no site."""

    def __init__(self, folder, brains):
        self.folder, self.log_file = folder, folder / "tiny.log"
        self.log_file.touch()
        self.raw = DataSet(folder / "raw")
        for number, sub in enumerate(("a1", "b1", "b2", "b3", "b4", "x1")):
            brain = brains.brain("A" if sub[0] == "a" else "B", number)
            self.raw.scan(sub, *brain, sidecar=sub != "x1")
            if sub != "x1":
                self.raw.site(sub, sub[0].upper())
        data, affine = brains.brain("B", 3)
        self.raw.scan("b2", np.full_like(data, 3), affine)
        for path in self.raw.root.rglob("*_T1w.nii.gz"):
            give_transform(folder / "theirs", path)
        self.options = quick(folder / "work", folder / "theirs")
        ran = self.run("train", "model", "--method", "tiny", "--reference", "A")
        assert ran.code == 0, ran.out + ran.err
        self.model = folder / "model" / "models" / "tiny-A"
        self.log()

    def run(self, level, out, *options) -> Ran:
        return call(self.raw.root, self.folder / out, level, *self.options, *options)

    def participant(self, out, *labels, more=(), count=TWO) -> Ran:
        """A participant run that goes well, of a job's participants."""
        which = ["--participant-label", *labels, *count]
        ran = self.run("participant", out, "--model", self.model, *which, *more)
        assert ran.code == 0, ran.out + ran.err
        return ran

    def log(self) -> list[str]:
        """What the method noted since the last call."""
        found = self.log_file.read_text().splitlines()
        self.log_file.write_text("")
        return found

    def image(self, out, sub, desc="harmonized"):
        anat = self.folder / out / f"sub-{sub}" / "anat"
        return anat / f"sub-{sub}_desc-{desc}_T1w.nii.gz"

    def record(self, out, sub, desc="harmonized"):
        path = self.image(out, sub, desc)
        text = path.with_name(path.name.replace(".nii.gz", ".json")).read_text()
        return json.loads(text)["Harmonization"]

    def stored(self, out):
        return sorted((self.folder / out).glob("models/adapted/*/*/adaptation.json"))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, brains):
    folder = tmp_path_factory.mktemp("adapt")
    root = str(tiny_neural.install(folder / "site"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        patch.setenv("TINY_LOG", str(folder / "tiny.log"))
        yield Cohort(folder, brains)
    for name in [name for name in sys.modules if name.startswith("tiny_plugin")]:
        del sys.modules[name]


FIRST = [f"sub-{sub}_T1w" for sub in ("b1", "b3")]  # b2 is broken


@pytest.fixture(scope="module")
def job(cohort):
    """One participant of an array, who is not among the scans that are adapted to."""
    ran = cohort.participant("out", "b4")
    ran.log = cohort.log()
    return ran


def test_a_job_adapts_to_the_first_scans_of_the_site(cohort, job):
    assert job.log == ["adapt " + " ".join(FIRST)]
    assert "adapting tiny-A to site B (T1w) first" in job.out
    assert f"progress: {FIRST[0]}: preprocessed, to adapt to its site" in job.err
    assert re.search(r"progress: adapted to site B \(T1w\) after \d+ s", job.err)
    assert "left out: sub-b2_T1w: " in job.err
    assert ": harmonized" in job.out
    (path,) = cohort.stored("out")
    model = json.loads((cohort.model / "model.json").read_text())
    assert model["method"] == "tiny"
    record = cohort.record("out", "b4")
    assert path.parent.parent.name == f"tiny-A-{record['ModelHash'][:12]}"
    assert path.parent.name.startswith("B_T1w-")
    stored = load_adaptation(path.parent)
    assert record["Adapt"] == f"site {stored.hash}"
    assert record["Adaptation"] == {
        "scope": "site",
        "reason": "training has not seen the site",
        "site": "B",
        "hash": stored.hash,
        "scans": [f"sub-{s[4:6]}/anat/{s}.nii.gz" for s in FIRST],
        "bpd_before": 3.0,
        "bpd_after": 2.5,
        "steps": 7,
        "stop_reason": "converged",
    }
    assert record["Details"]["gain"] == stored.adaptation.arrays["gain"][0] != 1
    page = (cohort.folder / "out" / "sub-b4.html").read_text()
    assert "adapted to the site B" in page


def test_the_site_comes_closer(cohort, job):
    reference = load(cohort.raw.path("a1"))[0]
    image = load(cohort.image("out", "b4"))[0]
    medians = [np.median(v[v > 0]) for v in (reference, image)]
    assert medians[1] == pytest.approx(medians[0], rel=0.1)


def test_other_jobs_reuse_it_and_the_same_job_skips(cohort, job):
    before = cohort.stored("out")[0].stat().st_mtime_ns
    ran = cohort.participant("out", "b1", "b4")
    assert cohort.log() == []
    assert "adapting" not in ran.out
    assert "skipped: done by an earlier run" in ran.line("sub-b4_T1w")
    assert ": harmonized" in ran.line("sub-b1_T1w")
    assert cohort.record("out", "b1")["Adapt"] == cohort.record("out", "b4")["Adapt"]
    assert cohort.stored("out")[0].stat().st_mtime_ns == before


def test_jobs_of_one_participant_and_one_run_of_all_give_the_same_voxels(cohort, job):
    cohort.participant("whole", "a1", "b4", "x1")
    assert cohort.log()[0] == "adapt " + " ".join(FIRST)
    np.testing.assert_array_equal(
        load(cohort.image("whole", "b4"))[0], load(cohort.image("out", "b4"))[0]
    )
    assert cohort.record("whole", "b4") == cohort.record("out", "b4")
    assert cohort.record("whole", "a1")["Adaptation"]["reason"] == "training has seen the site"
    assert cohort.record("whole", "a1")["Details"]["gain"] == 1
    record = cohort.record("whole", "x1")
    assert record["Adaptation"]["scope"] == "scan"
    assert record["Adaptation"]["reason"] == "the site of the scan is unknown"
    assert any("site is unknown" in warning for warning in record["Warnings"])


def test_a_changed_scan_is_adapted_to_again_and_all_scans_of_the_site_follow(cohort, job, brains):
    before = cohort.record("out", "b4")["Adapt"]
    path = cohort.raw.path("b3")
    content = path.read_bytes()
    data, affine = load(path)
    try:
        cohort.raw.scan("b3", (data * 1.5).astype(np.float32), affine)
        ran = cohort.participant("out", "b4", more=["--dry-run"])
        assert "would first adapt tiny-A to site B (T1w), on at most 2 of its scans" in ran.out
        assert "planned" in ran.line("sub-b4_T1w")
        assert cohort.log() == []
        ran = cohort.participant("out", "b4")
        assert cohort.log() == ["adapt " + " ".join(FIRST)]
        assert ": harmonized" in ran.line("sub-b4_T1w")
        assert cohort.record("out", "b4")["Adapt"] != before
        assert len(cohort.stored("out")) == 1
    finally:
        path.write_bytes(content)
    cohort.participant("out", "b4")
    assert cohort.record("out", "b4")["Adapt"] == before
    cohort.log()


def test_a_damaged_adaptation_is_made_again(cohort, job):
    before = cohort.record("out", "b4")["Adapt"]
    weights = cohort.stored("out")[0].with_name("weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4])
    ran = cohort.participant("out", "b4")
    assert "it is made again" in ran.err
    assert cohort.log() == ["adapt " + " ".join(FIRST)]
    assert "skipped" in ran.line("sub-b4_T1w")
    assert cohort.record("out", "b4")["Adapt"] == before


def test_dry_run_says_what_would_be_adapted_to(cohort):
    options = ["--participant-label", "a1", "b1", "x1", "--dry-run"]
    ran = cohort.run("participant", "planned", "--model", cohort.model, *options)
    assert ran.code == 0, ran.err
    told = [line for line in ran.out.splitlines() if "would first adapt" in line]
    assert told == ["would first adapt tiny-A to site B (T1w), on at most 4 of its scans"]
    assert cohort.log() == []
    assert not (cohort.folder / "planned").exists()


def test_adapt_scan_and_none_and_number_of_scans(cohort, job):
    cohort.participant("out", "b4", more=["--adapt", "none", "--desc", "plain"], count=())
    assert cohort.log() == []
    record = cohort.record("out", "b4", "plain")
    assert (record["Adapt"], record["Details"]["gain"]) == ("none", 1)
    cohort.participant("out", "b4", "a1", more=["--adapt", "scan", "--desc", "own"], count=())
    assert cohort.log() == ["adapt sub-a1_T1w", "adapt sub-b4_T1w"]
    record = cohort.record("out", "b4", "own")
    assert record["Adaptation"] | {"scope": "scan", "steps": 7} == record["Adaptation"]
    assert not any("unknown" in warning for warning in record["Warnings"])
    cohort.participant("out", "b4", more=["--desc", "one"], count=["--adapt-scans", "1"])
    assert cohort.log() == ["adapt sub-b1_T1w"]
    assert len(cohort.stored("out")) == 2


def segmentation(path, sign):
    """A network that is surer of bright voxels than of dark ones (sign 1), or the other way."""
    torch = pytest.importorskip("torch")
    network = torch.nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([3.0 * sign, 0.0]).reshape(2, 1, 1, 1))
        network.bias.copy_(torch.tensor([4.0, 0.0]))
    torch.jit.save(torch.jit.script(network), path)
    return path


def test_a_segmentation_network_bounds_the_adaptation(cohort, job):
    """The site's gain makes brains darker: one network gets surer by it, the other less sure."""
    plain = cohort.record("out", "b4")["Details"]["gain"]
    assert plain < 0.99
    gains, stored = {}, set(cohort.stored("out"))
    for desc, sign in (("glad", -1), ("sorry", 1)):
        path = segmentation(cohort.folder / f"{desc}.pt", sign)
        more = ["--desc", desc, "--adapt-segmentation", path]
        cohort.participant("out", "b4", more=more)
        assert cohort.log() == ["adapt " + " ".join(FIRST)]
        record = cohort.record("out", "b4", desc)
        found = record["Adaptation"]
        assert found["segmentation"] == f"{desc}.pt"
        assert found["segmentation_sha256"] == sha256(path)[:12]
        assert 0 < found["entropy_after"] <= found["entropy_before"] < 1
        assert (found["entropy_after"] < found["entropy_before"]) == (desc == "glad")
        (made,) = set(cohort.stored("out")) - stored
        stored.add(made)
        adaptation = load_adaptation(made.parent)
        assert adaptation.facts["settings"]["Segmentation"] == sha256(path)[:12]
        assert record["Adapt"] == f"site {adaptation.hash}"
        gains[desc] = record["Details"]["gain"]
        ran = cohort.participant("out", "b4", more=more)
        assert "skipped: done by an earlier run" in ran.line("sub-b4_T1w")
        assert cohort.log() == []
    assert gains == {"glad": plain, "sorry": 1}


def test_another_network_under_the_same_label_is_refused(cohort, job):
    path = segmentation(cohort.folder / "other.pt", 1)
    which = ["--model", cohort.model, "--participant-label", "b4"]
    ran = cohort.run("participant", "out", *which, "--adapt-segmentation", path)
    assert ran.code == 64
    assert "not --adapt site --adapt-segmentation (sha256 " in ran.err


def test_a_segmentation_network_bounds_the_adaptation_to_a_scan(cohort, job):
    """Also where the site of a scan is unknown."""
    path = segmentation(cohort.folder / "scan.pt", 1)
    more = ["--desc", "known", "--adapt-segmentation", path]
    cohort.participant("out", "x1", more=more)
    record = cohort.record("out", "x1", "known")
    assert record["Adapt"] == f"scan segmentation {sha256(path)[:12]}"
    assert record["Adaptation"]["scope"] == "scan"
    assert record["Adaptation"]["entropy_after"] <= record["Adaptation"]["entropy_before"]
    assert cohort.log() == ["adapt sub-x1_T1w"]


def test_a_segmentation_network_that_cannot_be_used(cohort):
    """Refused before a scan is touched or a folder made, in a line that names file and cure."""
    path = cohort.folder / "broken.pt"
    path.write_text("no network")
    options = ["--model", cohort.model, "--adapt-segmentation", path]
    ran = cohort.run("participant", "broken", *options)
    assert ran.code == 64
    assert f"{path}: no TorchScript network can be read from it; give a TorchScript" in ran.err
    ran = cohort.run("participant", "broken", *options[:-1], path.with_name("none.pt"))
    assert ran.code == 66
    assert "none.pt: the segmentation network cannot be read" in ran.err
    ran = cohort.run("participant", "broken", "--method", "nyul", "--reference", "A", *options[2:])
    assert ran.code == 64
    assert "the method nyul does not adapt to sites" in ran.err
    assert cohort.log() == []
    assert not list((cohort.folder / "broken").rglob("*.nii.gz"))
    assert not (cohort.folder / "broken" / "models").exists()


def test_one_label_one_way_to_adapt(cohort, job):
    options = ["--model", cohort.model, "--participant-label", "b4", "--adapt", "none"]
    ran = cohort.run("participant", "out", *options)
    assert ran.code == 64
    told = "holds scans with --adapt site --adapt-scans 2 under desc-harmonized, not --adapt none"
    assert told in ran.err


def test_another_count_of_scans_needs_another_label(cohort, job):
    options = ["--model", cohort.model, "--participant-label", "b4", "--adapt-scans", "3"]
    ran = cohort.run("participant", "out", *options)
    assert ran.code == 64
    assert "under desc-harmonized, not --adapt site --adapt-scans 3; choose" in ran.err


def test_adaptations_are_no_bundles(cohort, job):
    options = ["--method", "tiny", "--participant-label", "b4"]
    ran = cohort.run("participant", "out", *options)
    assert ran.code == 64
    assert "no model for tiny ships with the package" in ran.err


def test_a_site_without_a_usable_scan(cohort, brains, tmp_path):
    """Its scans are judged as they are, and here refused; the other sites go on."""
    data, affine = brains.brain("B", 1)
    made = DataSet(tmp_path / "raw")
    made.scan("c1", np.full_like(data, 3), affine)
    made.scan("a1", *brains.brain("A", 0))
    made.site("c1", "C")
    made.site("a1", "A")
    for path in made.root.rglob("*_T1w.nii.gz"):
        give_transform(tmp_path / "theirs", path)
    options = ["--model", cohort.model, *quick(tmp_path / "work", tmp_path / "theirs")]
    ran = call(made.root, tmp_path / "out", "participant", *options)
    assert ran.code == 65
    assert "no adaptation to site C (T1w): none of the scans that were tried can be" in ran.err
    assert ": harmonized" in ran.line("sub-a1_T1w")
    assert "refused" in (tmp_path / "out" / "sub-c1.html").read_text()


ALL = [*FIRST, "sub-b4_T1w"]


def test_a_site_that_the_method_refuses_is_not_tried_again(cohort, monkeypatch):
    """Every job of an array would preprocess and refuse the same scans."""
    monkeypatch.setenv("TINY_REFUSES", " ".join(ALL))
    ran = cohort.participant("refusing", "b1")
    assert "all lie turned; its scans are harmonized by the model as it is" in ran.err
    assert cohort.log() == ["adapt " + " ".join(FIRST), "adapt sub-b4_T1w"]
    monkeypatch.delenv("TINY_REFUSES")
    again = cohort.participant("refusing", "b4")
    assert cohort.log() == []
    assert ": harmonized" in again.line("sub-b4_T1w")
    for sub in ("b1", "b4"):
        record = cohort.record("refusing", sub)
        assert record["Adapt"] == "none"
        assert "none of the scans of the site" in record["Adaptation"]["reason"]


def test_where_the_first_scans_are_refused_the_next_ones_are_taken(cohort, monkeypatch):
    monkeypatch.setenv("TINY_REFUSES", " ".join(FIRST))
    cohort.participant("next", "b1")
    assert cohort.log() == ["adapt " + " ".join(FIRST), "adapt sub-b4_T1w"]
    record = cohort.record("next", "b1")
    assert record["Adapt"].startswith("site ")
    assert record["Adaptation"]["scans"] == ["sub-b4/anat/sub-b4_T1w.nii.gz"]


def test_a_refused_site_is_tried_again_when_it_has_more_scans(cohort, brains, monkeypatch):
    monkeypatch.setenv("TINY_REFUSES", " ".join(ALL))
    cohort.participant("more", "b1")
    cohort.log()
    sites = cohort.raw.root / "participants.tsv"
    before = sites.read_text()
    path = cohort.raw.scan("b9", *brains.brain("B", 9))
    cohort.raw.site("b9", "B")
    give_transform(cohort.folder / "theirs", path)
    try:
        cohort.participant("more", "b4")
    finally:
        shutil.rmtree(cohort.raw.root / "sub-b9")
        sites.write_text(before)
    assert cohort.log() == ["adapt " + " ".join(FIRST), "adapt sub-b4_T1w sub-b9_T1w"]
    assert cohort.record("more", "b4")["Adapt"].startswith("site ")


@pytest.fixture
def crash(monkeypatch):
    """Preprocessing of the named scan fails for no fault of the scan."""

    def crashing(stem):
        def run(node, cwd, plain=StoreVolume._run):
            if Path(node.inputs.out_stem).name == stem:
                raise RuntimeError("the worker is gone")
            plain(node, cwd)

        monkeypatch.setattr(StoreVolume, "_run", run)

    return crashing


@pytest.mark.parametrize("labels", [["b4"], ["b1", "b4"]], ids="-".join)
def test_a_crash_does_not_decide_an_adaptation_for_good(
    cohort, tmp_path, crash, monkeypatch, labels
):
    """The run that met it goes on without the scan and says so; the next one adapts again."""
    options = ["--model", cohort.model, *quick(tmp_path / "work", cohort.folder / "theirs"), *TWO]

    def participant(*labels):
        return call(cohort.raw.root, tmp_path / "out", "participant", *options,
                    "--participant-label", *labels)  # fmt: skip

    crash("sub-b1_T1w")
    first = participant(*labels)
    assert first.code == 1
    assert "failed" in first.line("sub-b1_T1w")
    assert "its site is adapted to without it: RuntimeError: the worker is gone" in first.line(
        "sub-b1_T1w"
    )
    assert ": harmonized" in first.line("sub-b4_T1w")
    assert cohort.log() == ["adapt sub-b3_T1w sub-b4_T1w"]
    monkeypatch.undo()
    second = participant(*labels)
    assert second.code == 0, second.out + second.err
    assert cohort.log() == ["adapt " + " ".join(FIRST)]
    assert ": harmonized" in second.line("sub-b4_T1w")
    again = participant("b4")
    assert cohort.log() == []
    assert "skipped" in again.line("sub-b4_T1w")


def test_stop_on_first_crash_ends_before_any_adaptation(cohort, tmp_path, crash):
    """Sites that were not adapted to are told, not looked for."""
    crash("sub-b1_T1w")
    ran = call(
        cohort.raw.root, tmp_path / "out", "participant", "--model", cohort.model, *TWO,
        *quick(tmp_path / "work", cohort.folder / "theirs"), "--stop-on-first-crash",
        "--participant-label", "b4",
    )  # fmt: skip
    assert ran.code == 1
    assert "no adaptation to site B (T1w): not run" in ran.line("sub-b4_T1w")
    assert cohort.log() == []
    assert not list((tmp_path / "out").glob("models/adapted/*/*/adaptation.json"))


def test_stop_on_first_crash_with_a_site_that_was_not_reached(
    cohort, brains, tmp_path, monkeypatch
):
    """The adaptation to B crashes; that to C never runs."""
    made = DataSet(tmp_path / "raw")
    for number, sub in enumerate(("b1", "c1")):
        path = made.scan(sub, *brains.brain("B", number))
        made.site(sub, sub[0].upper())
        give_transform(tmp_path / "theirs", path)

    def spoiled(*_args, **_more):
        raise RuntimeError("no more memory")

    monkeypatch.setattr(AdaptToSite, "_run", spoiled)
    options = [*quick(tmp_path / "work", tmp_path / "theirs"), "--stop-on-first-crash"]
    ran = call(made.root, tmp_path / "out", "participant", "--model", cohort.model, *options)
    assert ran.code == 1, ran.out + ran.err
    lines = [ran.line(f"sub-{sub}_T1w") for sub in ("b1", "c1")]
    assert sum("no more memory" in line for line in lines) == 1
    assert sum("not run" in line for line in lines) == 1


def test_one_adaptation_for_all_gpus_and_another_for_the_cpu(tmp_path):
    target = Target(
        bundle=tmp_path, method="tiny", name="m", hash="0" * 64, why="", reference="A", title="",
        citations=(), contract=Contract(("T1w",)), output_scale={}, reference_quantiles={},
    )  # fmt: skip
    place = SimpleNamespace(out_dir=tmp_path)
    job = SimpleNamespace(place=place, prep=SimpleNamespace(fingerprint={}))
    folders = [
        Adapting(replace(target, device=device), job, lambda *_: []).folder(("B", "T1w"))
        for device in ("cuda:0", "cuda:3", "cpu")
    ]
    assert folders[0] == folders[1] != folders[2]


def test_two_sites_in_a_pool_of_workers(cohort, brains, tmp_path):
    made = DataSet(tmp_path / "raw")
    for sub, site in (("c1", "C"), ("d1", "D/1")):
        made.scan(sub, *brains.brain("B", 7))
        made.site(sub, site)
    for path in made.root.rglob("*_T1w.nii.gz"):
        give_transform(tmp_path / "theirs", path)
    options = [*quick(tmp_path / "work", tmp_path / "theirs"), "--nprocs", "2"]
    # a process of its own: workers see the environment in which this one's first pool started
    run = start(cohort, made.root, tmp_path / "out", *options)
    told = run.communicate(timeout=200)[0]
    assert run.returncode == 0, told
    assert sorted(cohort.log()) == ["adapt sub-c1_T1w", "adapt sub-d1_T1w"]
    names = [p.parent.name.rpartition("-")[0] for p in cohort.stored(tmp_path / "out")]
    assert names == ["C_T1w", "site_T1w"]
    sites = [load_adaptation(p.parent).facts["site"] for p in cohort.stored(tmp_path / "out")]
    assert sites == ["C", "D/1"]


def start(cohort, raw, out, *options):
    """The command in a process of its own, which is not waited for."""
    argv = [raw, out, "participant", "--model", cohort.model, *options]
    return subprocess.Popen(
        [sys.executable, "-m", "bids_harmony", *map(str, argv)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(cohort.folder / "site")},
    )  # fmt: skip


def test_two_jobs_adapt_once(cohort):
    runs = [
        start(
            cohort, cohort.raw.root, cohort.folder / "shared",
            *quick(cohort.folder / f"work{number}", cohort.folder / "theirs"),
            "--participant-label", sub, *TWO,
        )
        for number, sub in enumerate(("b3", "b4"))
    ]  # fmt: skip
    told = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    assert cohort.log() == ["adapt " + " ".join(FIRST)]
    assert cohort.record("shared", "b3")["Adapt"] == cohort.record("shared", "b4")["Adapt"]
