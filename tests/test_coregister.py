"""The scans of a session go to the template together: T2w and FLAIR with the T1w."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
from conftest import SPACE, DataSet, call, give_transform, serial
from test_ants import CASES, PSR, SHAPE, SPACING, brain, centred, grid_points, ras_map, turn
from test_ants import write_scan as write_phantom
from test_bids_find import dataset, look, touch

from bids_harmony.bids.scan import Scan, with_anchors
from bids_harmony.interfaces.ants import ants_session
from bids_harmony.interfaces.ants_functions import load, save, write_affine
from bids_harmony.interfaces.coregister import CoRegister, read_affine

MOVE = turn((3, -4, 5), (4, -3, 6))


def scan(name, site="n/a"):
    *pairs, suffix = name.split("_")
    entities = dict(pair.split("-") for pair in pairs)
    return Scan(Path(f"/raw/{name}.nii.gz"), entities, suffix, site=site)


def anchors(*scans):
    return {s.stem: s.anchor.stem if s.anchor else None for s in with_anchors(scans)}


def test_the_first_t1w_of_a_session_is_the_anchor():
    names = ["sub-1_ses-1_run-2_T1w", "sub-1_ses-1_run-1_T1w", "sub-1_ses-1_T2w",
             "sub-1_ses-1_FLAIR", "sub-1_ses-2_T2w", "sub-1_ses-2_FLAIR", "sub-1_ses-3_FLAIR",
             "sub-1_T1w"]  # fmt: skip
    found = anchors(*map(scan, names))
    assert list(found) == names, "in the order given"
    assert found == {
        **dict.fromkeys(names),
        "sub-1_ses-1_T2w": "sub-1_ses-1_run-1_T1w",
        "sub-1_ses-1_FLAIR": "sub-1_ses-1_run-1_T1w",
        "sub-1_ses-2_FLAIR": "sub-1_ses-2_T2w",
    }


def test_an_anchor_is_of_the_same_site_and_has_none_itself():
    one, two, three = scan("sub-1_T1w", "A"), scan("sub-1_T2w", "B"), scan("sub-1_FLAIR", "A")
    assert anchors(one, two, three) == {
        "sub-1_T1w": None, "sub-1_T2w": None, "sub-1_FLAIR": "sub-1_T1w"
    }  # fmt: skip
    # T2w of no known site goes with the T1w; FLAIR, of another site than that, by itself
    found = anchors(one, scan("sub-1_T2w"), scan("sub-1_FLAIR", "B"))
    assert found == {"sub-1_T1w": None, "sub-1_T2w": "sub-1_T1w", "sub-1_FLAIR": None}


def test_an_anchor_is_found_though_it_was_not_asked_for(tmp_path):
    raw = dataset(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz", "sub-1/anat/sub-1_acq-b_T2w.nii.gz")
    (found,), problems = look(raw, modalities=["T2w"])
    assert (found.stem, found.anchor.stem, problems) == ("sub-1_acq-b_T2w", "sub-1_T1w", [])
    (found,), _ = look(raw, modalities=["T2w"], filters={"T1w": {"acquisition": "a"}})
    assert found.anchor is None, "a scan that was filtered away is none"
    touch(raw / "sub-1/anat/sub-1_T1w.json", "{broken")
    (found,), problems = look(raw, modalities=["T2w"])
    assert found.anchor is None
    assert problems == [], "nothing is said of scans that were not asked for"


def test_scans_that_cannot_be_anchors_are_not_read(tmp_path):
    raw = dataset(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz", "sub-1/anat/sub-1_T2w.nii.gz")
    touch(raw / "sub-1/anat/sub-1_T2w.json", "{broken")
    (found,), problems = look(raw, modalities=["T1w"])
    assert (found.stem, problems) == ("sub-1_T1w", [])


def test_a_linear_transform_is_read_as_a_map(tmp_path):
    wanted = turn((20, -30, 40), (50, -60, 70)) @ np.diag([1.2, 0.9, 1.0, 1.0])
    with ants_session(1, 0, tmp_path) as ants:
        path = write_affine(ants, wanted, tmp_path / "x.txt")
        assert np.allclose(read_affine(ants, path), wanted, atol=1e-4)
    assert np.allclose(ras_map(path), wanted, atol=1e-5)


@pytest.fixture
def session(tmp_path):
    """T1w-like phantom, its way to the template, and the same head moved and T2-like."""
    affine = centred(SHAPE, np.eye(3) * SPACING)
    data = brain(grid_points(SHAPE, affine))
    way = turn((-6, 8, 3), (-12, 20, 7))
    with ants_session(1, 0, tmp_path) as ants:
        write_affine(ants, way, tmp_path / "way.txt")
    (tmp_path / "other").mkdir()
    moving, mask = write_phantom(
        tmp_path / "other", MOVE, PSR, (60, 48, 52), CASES["PSR, T2-like"][2]
    )
    return way, {
        "moving": moving,
        "moving_mask": mask,
        "fixed": save(np.maximum(data, 0), affine, tmp_path / "t1.nii.gz"),
        "fixed_mask": save(data > 0.3, affine, tmp_path / "t1_mask.nii.gz"),
        "fixed_transform": str(tmp_path / "way.txt"),
        "fixed_name": "sub-1_T1w",
    }


@pytest.mark.parametrize("sloppy", [False, True])
def test_the_way_leads_through_the_anchor(session, sloppy, tmp_path):
    way, inputs = session
    done = CoRegister(**inputs, sloppy=sloppy).run(cwd=str(tmp_path)).outputs
    error = np.linalg.inv(MOVE @ way) @ ras_map(done.out_transform)
    corners = np.array([[x, y, z, 1] for x in (-60, 60) for y in (-70, 70) for z in (-50, 50)]).T
    assert np.linalg.norm((error @ corners - corners)[:3], axis=0).max() < (2 if sloppy else 0.7)
    assert done.warnings == []


def test_masks_that_do_not_meet_are_told(session, tmp_path):
    _, inputs = session
    mask, affine = load(inputs["moving_mask"])
    mask[:, :, mask.shape[2] // 2 :] = 0
    half = save(mask > 0, affine, tmp_path / "half.nii.gz")
    done = CoRegister(**{**inputs, "moving_mask": half}).run(cwd=str(tmp_path)).outputs
    (told,) = done.warnings
    assert told.startswith("registered to sub-1_T1w, but their brain masks overlap by 0.6")


@pytest.fixture(scope="module")
def person(brains, tmp_path_factory):
    """One person: a T1w, and a T2w and a FLAIR for which the head has moved by `MOVE`."""
    made = DataSet(tmp_path_factory.mktemp("person") / "raw")
    data, affine = brains.brain("A", 3)
    made.scan("01", data, affine)
    for number, modality in enumerate(("T2w", "FLAIR")):
        other = np.where(data > 0, 1.3 * data.max() - (1 - 0.6 * number) * data, 0)
        made.scan("01", other.astype(np.float32), MOVE @ affine, suffix=modality)
    made.site("01", "A")
    return made


def copy_of(person, folder):
    made = DataSet(folder / "raw")
    shutil.copytree(person.root, made.root, dirs_exist_ok=True)
    return made


def minimal(made, folder, *more, bias=False):
    options = [*serial(folder / "work"), *([] if bias else ["--ignore", "bias-field"])]
    return call(made.root, folder / "out", "participant", "--level", "minimal", *options, *more)


def transform(folder, modality):
    anat = folder / "out" / "sub-01" / "anat"
    return anat / f"sub-01_from-{modality}_to-{SPACE}_mode-image_xfm.txt"


def words(folder, modality):
    return json.loads(transform(folder, modality).with_suffix(".json").read_text())


def off(folder, modality, where=MOVE):
    """How far, in mm, points of the T1w are from where they belong in the other scan."""
    found = ras_map(transform(folder, modality)) @ np.linalg.inv(ras_map(transform(folder, "T1w")))
    corners = np.array([[x, y, z, 1] for x in (-60, 60) for y in (-80, 60) for z in (-40, 70)]).T
    return np.linalg.norm((found @ corners - where @ corners)[:3], axis=0).max()


def test_a_session_goes_to_the_template_together(person, tmp_path):
    made = copy_of(person, tmp_path)
    ran = minimal(made, tmp_path, "--modality", "T2w")
    assert ran.code == 0, ran.out + ran.err
    assert "1 scan in" in ran.out, "the T1w was not asked for"
    assert off(tmp_path, "T2w") < 2
    said = words(tmp_path, "T2w")
    assert said["RegisteredTo"].startswith("sub-01_T1w (sha256 ")
    assert [s.rpartition("/")[2] for s in said["Sources"]] == [
        "sub-01_T2w.nii.gz", "sub-01_T1w.nii.gz"
    ]  # fmt: skip
    assert words(tmp_path, "T1w")["RegisteredTo"] == ""

    before = transform(tmp_path, "T1w").stat().st_mtime_ns
    ran = minimal(made, tmp_path)
    assert "skipped" in ran.line("sub-01_T1w"), "done for the T2w"
    assert "skipped" in ran.line("sub-01_T2w")
    assert "sub-01_FLAIR: preprocessed" in ran.line("sub-01_FLAIR")
    assert off(tmp_path, "FLAIR") < 2
    assert transform(tmp_path, "T1w").stat().st_mtime_ns == before

    # all at once gives the same
    other = tmp_path / "at_once"
    ran = minimal(made, other)
    assert ran.code == 0, ran.out + ran.err
    for modality in ("T1w", "T2w", "FLAIR"):
        found = transform(other, modality).read_bytes()
        assert found == transform(tmp_path, modality).read_bytes()

    # with bias fields the T1w is corrected by its own
    other = tmp_path / "corrected"
    ran = minimal(made, other, "--modality", "T2w", bias=True)
    assert ran.code == 0, ran.out + ran.err
    assert off(other, "T2w") < 2


def test_another_t1w_is_another_way(person, tmp_path, brains):
    made = copy_of(person, tmp_path)
    minimal(made, tmp_path)
    old = words(tmp_path, "T2w")["RegisteredTo"]
    data, affine = brains.brain("A", 3)
    made.scan("01", 2 * data, affine)
    ran = minimal(made, tmp_path, "--modality", "T2w")
    assert "sub-01_T2w: preprocessed" in ran.line("sub-01_T2w")
    assert words(tmp_path, "T2w")["RegisteredTo"] != old

    made.path("01").unlink()
    ran = minimal(made, tmp_path)
    assert words(tmp_path, "T2w")["RegisteredTo"] == "", "by itself: the session has no T1w now"
    assert words(tmp_path, "FLAIR")["RegisteredTo"].startswith("sub-01_T2w (sha256 ")
    assert ran.code == 0


def test_a_t1w_that_cannot_be_used_is_told_for_all(person, tmp_path):
    made = copy_of(person, tmp_path)
    made.path("01").write_bytes(b"no image")
    for options in (["--modality", "T2w"], []):
        ran = minimal(made, tmp_path, *options)
        assert ran.code == 65, ran.out + ran.err
        told = ran.line("sub-01_T2w")
        assert "refused: " in told
        assert "sub-01_T2w.nii.gz: registered with sub-01_T1w, of which: " in told
        assert "leave it out with --bids-filter-file" in told
        assert not transform(tmp_path, "T2w").exists()
    filters = made.json("../filters.json", {"T1w": {"acquisition": "none"}})
    ran = minimal(made, tmp_path, "--bids-filter-file", filters, "--modality", "T2w", "FLAIR")
    assert ran.code == 0, ran.out + ran.err
    assert words(tmp_path, "T2w")["RegisteredTo"] == ""


def test_a_crash_of_the_t1w_is_one_of_all(person, tmp_path, monkeypatch):
    from bids_harmony.interfaces.ants import RigidRegistration

    def crash(self, cwd):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(RigidRegistration, "_run", crash)
        ran = minimal(person, tmp_path)
        assert ran.code == 1, ran.out + ran.err
        for modality in ("T2w", "FLAIR"):
            told = ran.line(f"sub-01_{modality}")
            assert "failed: " in told
            assert "registered with sub-01_T1w, of which: " in told
            assert "out of luck" in told
        for more in ([], ["--modality", "T2w"]):
            ran = minimal(person, tmp_path, "--stop-on-first-crash", *more)
            assert ran.code == 1, ran.out + ran.err
            assert "out of luck" in ran.line("sub-01_T2w")
    assert minimal(person, tmp_path).code == 0, "what is left is done"
    assert off(tmp_path, "T2w") < 2


def test_given_transforms_are_taken(person, tmp_path):
    theirs = tmp_path / "theirs"
    give_transform(theirs, person.path("01"))
    given = ["--derivatives", f"theirs={theirs}"]
    assert minimal(person, tmp_path, *given).code == 0
    assert not transform(tmp_path, "T1w").exists(), "it is the user's"
    give_transform(tmp_path / "out", person.path("01"))  # the identity, to compare with
    assert off(tmp_path, "T2w") < 2
    assert "to_template theirs (sha256" in words(tmp_path, "T2w")["RegisteredTo"]

    give_transform(theirs, person.path("01", "T2w"))
    again = tmp_path / "again"
    assert minimal(person, again, *given).code == 0
    assert not transform(again, "T2w").exists(), "its own given transform comes first"

    # through a given warp there is no rigid way
    for path in theirs.rglob("*_xfm.txt"):
        path.rename(path.with_suffix(".h5")) if "from-T1w" in path.name else path.unlink()
    warped = tmp_path / "warped"
    ran = minimal(person, warped, *given, "--modality", "T2w")
    assert ran.code == 0, ran.out + ran.err
    assert words(warped, "T2w")["RegisteredTo"] == ""


def test_what_a_harmonized_t2w_went_with_is_told_and_kept(person, tmp_path, brains):
    made, out = copy_of(person, tmp_path), tmp_path / "out"
    options = [*serial(tmp_path / "work"), "--ignore", "bias-field", "--modality", "T2w"]

    def harmonize():
        ran = call(made.root, out, "participant", "--method", "nyul", *options)
        assert ran.code == 0, ran.out + ran.err
        image = out / "sub-01" / "anat" / "sub-01_desc-harmonized_T2w.json"
        return ran.line("sub-01_T2w"), json.loads(image.read_text())["Harmonization"]

    planned = call(made.root, out, "participant", "--method", "nyul", *options, "--dry-run")
    assert "registered to sub-01_T1w" in planned.line("sub-01_T2w")
    line, record = harmonize()
    assert "harmonized in" in line
    assert record["Registration"].startswith("rigid to sub-01_T1w (sha256 ")
    assert record["Registration"].endswith(f", and with it to {SPACE}")
    assert "sub-01_T1w" not in (out / "sub-01.html").read_text().split("<h2")[1], "not asked for"
    written = {p: p.stat().st_mtime_ns for p in out.rglob("*T1w*") if "anat" in p.parts}
    assert "skipped" in harmonize()[0]

    image = nb.load(made.path("01"))
    nb.Nifti1Image(1.5 * image.get_fdata(), image.affine).to_filename(made.path("01"))
    line, renewed = harmonize()
    assert "harmonized in" in line, "its anchor is another now"
    assert renewed["Registration"] != record["Registration"]
    assert any(p.stat().st_mtime_ns != when for p, when in written.items())


def test_the_mask_that_does_not_fit_is_told_again_by_a_run_that_reuses(person, tmp_path):
    made, theirs = copy_of(person, tmp_path), tmp_path / "theirs" / "sub-01" / "anat"
    theirs.mkdir(parents=True)
    image = nb.load(made.path("01", "T2w"))
    half = image.get_fdata() > 0
    half[:, :, half.shape[2] // 2 :] = False
    there = theirs / "sub-01_desc-brainT2w_mask.nii.gz"
    nb.Nifti1Image(half.astype(np.uint8), image.affine).to_filename(there)
    options = [*serial(tmp_path / "work"), "--ignore", "bias-field", "--modality", "T2w"]
    options += ["--derivatives", f"theirs={tmp_path / 'theirs'}", "--method", "nyul"]
    for desc in ("one", "two"):
        ran = call(made.root, tmp_path / "out", "participant", *options, "--desc", desc)
        assert ran.code == 0, ran.out + ran.err
        sidecar = tmp_path / "out" / "sub-01" / "anat" / f"sub-01_desc-{desc}_T2w.json"
        told = json.loads(sidecar.read_text())["Harmonization"]["Warnings"]
        assert any("their brain masks overlap by 0." in text for text in told)


def test_an_anchor_that_is_gone_is_a_failure(person, tmp_path, monkeypatch):
    """Never an outcome that looks like success."""
    from bids_harmony.workflows import anchors as module

    monkeypatch.setattr(module, "_resolved", lambda scan, job: None)
    ran = minimal(person, tmp_path)
    assert ran.code == 1, ran.out + ran.err
    assert "preprocessed in" in ran.line("sub-01_T1w")
    assert "failed: " in ran.line("sub-01_T2w")
    assert "what was preprocessed of sub-01_T1w was changed; run again" in ran.line("sub-01_T2w")


def test_volumes_to_learn_from_know_their_anchor(person, tmp_path):
    made, work = copy_of(person, tmp_path), tmp_path / "work"
    options = [*serial(work), "--ignore", "bias-field", "--reference", "A", "--method", "nyul"]
    options += ["--modality", "T2w", "--name"]

    def learned(name):
        ran = call(made.root, tmp_path / "out", "train", *options, name)
        assert ran.code == 0, ran.out + ran.err
        (stored,) = work.glob("volumes/*/sub-01_T2w.json")
        return json.loads(stored.read_text())["key"]["RegisteredTo"], stored.stat().st_mtime_ns

    said, when = learned("one")
    assert said.startswith("sub-01_T1w (sha256 ")
    assert learned("two") == (said, when), "stored, and used again"
    image = nb.load(made.path("01"))
    nb.Nifti1Image(1.5 * image.get_fdata(), image.affine).to_filename(made.path("01"))
    assert learned("three")[0] != said
