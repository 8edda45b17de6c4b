"""Finding scans: what is read, what is refused and what is told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_harmony.bids import find
from bids_harmony.bids.entities import grammar, split_name
from bids_harmony.bids.filters import passes, read_filter_file, read_labels
from bids_harmony.bids.find import check_dataset, find_scans
from bids_harmony.errors import (
    DatasetError,
    ExitCode,
    MissingInputError,
    NothingSelectedError,
    UsageError,
)

ALL = ("T1w", "T2w", "FLAIR")


def touch(path: Path, content: bytes | str = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def dataset(root: Path, *files: str, **extra) -> Path:
    description = {"Name": "test", "BIDSVersion": "1.10.0", **extra}
    touch(root / "dataset_description.json", json.dumps(description))
    for name in files:
        touch(root / name)
    return root


def look(root: Path, **options):
    settings = {
        "participants": None,
        "sessions": None,
        "modalities": ALL,
        "filters": None,
        "site_from": None,
    }
    return find_scans(root, **(settings | options))


def stems(found) -> list[str]:
    return [scan.stem for scan in found]


def test_sessions_and_no_sessions(tmp_path):
    root = dataset(
        tmp_path,
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii",
        "sub-02/ses-b/anat/sub-02_ses-b_T2w.nii.gz",
        "sub-03/anat/sub-03_FLAIR.nii.gz",
        "sub-03/ses-a/anat/sub-03_ses-a_T1w.nii.gz",
    )
    scans, problems = look(root)
    assert problems == []
    assert stems(scans) == [
        "sub-01_T1w",
        "sub-02_ses-a_T1w",
        "sub-02_ses-b_T2w",
        "sub-03_FLAIR",
        "sub-03_ses-a_T1w",
    ]
    assert [scan.folder for scan in scans][:2] == ["sub-01/anat", "sub-02/ses-a/anat"]
    assert scans[0].path == root / "sub-01/anat/sub-01_T1w.nii.gz"
    only, _ = look(root, sessions=["ses-a"])
    assert stems(only) == ["sub-02_ses-a_T1w", "sub-03_ses-a_T1w"]
    t1, _ = look(root, modalities=("T1w",), participants=["sub-02", "01"])
    assert stems(t1) == ["sub-01_T1w", "sub-02_ses-a_T1w"]


def test_variants_are_scans_of_their_own(tmp_path):
    names = ["T1w", "run-1_T1w", "run-2_T1w", "acq-x_T1w", "ce-gd_T1w", "rec-norm_T1w"]
    root = dataset(tmp_path, *(f"sub-01/anat/sub-01_{name}.nii.gz" for name in names))
    scans, problems = look(root)
    assert sorted(stems(scans)) == sorted(f"sub-01_{name}" for name in names)
    assert problems == []


def test_other_images_are_left_alone(tmp_path):
    root = dataset(
        tmp_path,
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_part-mag_T2w.nii.gz",
        "sub-01/anat/sub-01_part-phase_T2w.nii.gz",
        "sub-01/anat/sub-01_T1map.nii.gz",
        "sub-01/anat/sub-01_mod-T1w_defacemask.nii.gz",
        "sub-01/anat/sub-01_T1w.json",
        "sub-01/anat/.sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_T1w.nii.gz.part",
        "sub-01/func/sub-01_task-rest_bold.nii.gz",
        "sourcedata/sub-09/anat/sub-09_T1w.nii.gz",
        "derivatives/x/sub-09/anat/sub-09_T1w.nii.gz",
        ".git/sub-09/anat/sub-09_T1w.nii.gz",
    )
    (root / "sub-01/anat/sub-01_T1w.json").write_text("{}")
    scans, problems = look(root)
    assert sorted(stems(scans)) == ["sub-01_T1w", "sub-01_part-mag_T2w"]
    assert problems == []


def test_only_the_trees_asked_for_are_read(tmp_path, monkeypatch):
    root = dataset(tmp_path, *(f"sub-{i:02}/anat/sub-{i:02}_T1w.nii.gz" for i in range(9)))
    touch(root / "sourcedata/sub-00/x")
    seen: list[str] = []
    real_scandir, real_listdir = os.scandir, os.listdir
    monkeypatch.setattr(os, "scandir", lambda p: (seen.append(str(p)), real_scandir(p))[1])
    monkeypatch.setattr(os, "listdir", lambda p: (seen.append(str(p)), real_listdir(p))[1])
    scans, _ = look(root, participants=["03"])
    assert stems(scans) == ["sub-03_T1w"]
    below = {p for p in seen if p != str(root)}
    assert below
    assert all(p.startswith(str(root / "sub-03")) for p in below)


def test_unknown_participant(tmp_path):
    root = dataset(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz")
    with pytest.raises(UsageError, match=r"sub-99, sub-98 not in .*it has sub-01 \(not mounted"):
        look(root, participants=["99", "01", "sub-98"])


def test_nothing_selected_says_what_was_asked(tmp_path):
    root = dataset(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz")
    with pytest.raises(NothingSelectedError, match=r"modalities FLAIR; participants 01") as info:
        look(root, participants=["01"], modalities=("FLAIR",))
    assert info.value.exit_code == ExitCode.NOTHING_SELECTED == 18
    with pytest.raises(NothingSelectedError, match="sessions zz"):
        look(root, sessions=["zz"])


def test_named_participant_without_scan_is_told(tmp_path):
    root = dataset(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "sub-02/func/sub-02_bold.nii.gz")
    (root / "sub-03").mkdir()
    scans, problems = look(root, participants=["01", "02", "03"])
    assert stems(scans) == ["sub-01_T1w"]
    assert [p.subject for p in problems] == ["02", "03"]
    assert "no T1w/T2w/FLAIR scan is left" in problems[0].message
    assert "datalad get -n" in problems[1].message
    assert look(root)[1] == []


def test_dangling_link_and_pointer_file(tmp_path):
    root = dataset(tmp_path, "sub-03/anat/sub-03_T1w.nii.gz")
    link = root / "sub-01/anat/sub-01_T1w.nii.gz"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../.git/annex/objects/aa/bb/key.nii.gz")
    pointer = touch(root / "sub-02/anat/sub-02_T1w.nii.gz", "/annex/objects/MD5E-s1--x.nii.gz\n")
    scans, problems = look(root)
    assert stems(scans) == ["sub-03_T1w"]
    for problem, path in zip(problems, (link, pointer), strict=True):
        assert problem.path == path
        assert f"content not present: run `datalad get {path}`" in problem.message


def test_links_are_not_resolved(tmp_path):
    store = dataset(tmp_path / "store", "sub-01/anat/sub-01_T1w.nii.gz")
    touch(tmp_path / "annex/key.nii.gz")
    scan = store / "sub-01/anat/sub-01_T1w.nii.gz"
    scan.unlink()
    scan.symlink_to(tmp_path / "annex/key.nii.gz")
    touch(store / "sub-01/anat/sub-01_T1w.json", '{"EchoTime": 1}')
    (tmp_path / "view").symlink_to(store)
    scans, _ = look(tmp_path / "view")
    assert scans[0].path == tmp_path / "view/sub-01/anat/sub-01_T1w.nii.gz"
    assert scans[0].metadata == {"EchoTime": 1}


def test_twins_are_refused_by_name(tmp_path):
    root = dataset(
        tmp_path,
        "sub-01/anat/sub-01_T1w.nii",
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_T2w.nii",
    )
    scans, problems = look(root)
    assert stems(scans) == ["sub-01_T2w"]
    assert len(problems) == 1
    assert "sub-01_T1w.nii and sub-01_T1w.nii.gz are the same scan" in problems[0].message


def test_unreadable_and_empty_files(tmp_path):
    root = dataset(tmp_path, "sub-03/anat/sub-03_T1w.nii.gz")
    (root / "sub-01/anat/sub-01_T1w.nii.gz").mkdir(parents=True)
    touch(root / "sub-02/anat/sub-02_T1w.nii.gz", b"")
    scans, problems = look(root)
    assert stems(scans) == ["sub-03_T1w"]
    assert "cannot be read (Is a directory)" in problems[0].message
    assert "the file is empty" in problems[1].message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"EchoTime": 1', "broken JSON"),
        ("[1, 2]", "not a JSON object"),
        (b"\xff\xfe\x00", "cannot be read"),
        ("/annex/objects/MD5E-x", "datalad get"),
    ],
)
def test_bad_sidecar_names_the_file(tmp_path, content, told):
    root = dataset(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz")
    path = touch(root / "sub-01/anat/sub-01_T1w.json", content)
    scans, problems = look(root)
    assert stems(scans) == ["sub-02_T1w"]
    assert str(path) in problems[0].message
    assert told in problems[0].message


def test_dangling_sidecar(tmp_path):
    root = dataset(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz")
    (root / "sub-01/anat/sub-01_T1w.json").symlink_to("nowhere.json")
    scans, problems = look(root)
    assert scans == []
    assert "datalad get" in problems[0].message


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("sub-02_T1w", "does not agree with its folder"),
        ("sub-01_ses-1_T1w", "does not agree with its folder"),
        ("sub-01_desc-x_T1w", "'desc-' is not an entity"),
        ("sub-01_run-a_T1w", "'run-a' is not a BIDS label"),
        ("sub-01_acq-a-b_T1w", "'acq-a-b' is not a BIDS label"),
        ("sub-01_mprage_T1w", "not a BIDS name"),
    ],
)
def test_bad_names(tmp_path, name, told):
    root = dataset(tmp_path, f"sub-01/anat/{name}.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz")
    scans, problems = look(root)
    assert stems(scans) == ["sub-01_T2w"]
    assert told in problems[0].message
    assert name in problems[0].message


def test_inheritance(tmp_path):
    root = dataset(tmp_path, "sub-01/ses-1/anat/sub-01_ses-1_acq-a_run-2_T1w.nii.gz")
    touch(root / "T1w.json", '{"A": 0, "B": 0, "C": 0, "D": 0, "E": 0}')
    touch(root / "acq-a_T1w.json", '{"B": 1}')
    touch(root / "acq-b_T1w.json", '{"A": "wrong acq"}')
    touch(root / "T2w.json", '{"A": "wrong suffix"}')
    touch(root / "sub-01/sub-01_T1w.json", '{"C": 2, "D": 2, "E": 2}')
    touch(root / "sub-01/sub-01_ses-2_T1w.json", '{"A": "wrong session"}')
    touch(root / "sub-01/ses-1/sub-01_ses-1_T1w.json", '{"D": 3}')
    own = root / "sub-01/ses-1/anat/sub-01_ses-1_acq-a_run-2_T1w.json"
    touch(own, '{"E": 4}')
    (scan,), problems = look(root)
    assert problems == []
    assert scan.metadata == {"A": 0, "B": 1, "C": 2, "D": 3, "E": 4}


def test_only_sidecars_that_apply_are_opened(tmp_path):
    root = dataset(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz")
    touch(root / "task-rest_bold.json", "broken")
    touch(root / "T2w.json", "broken")
    touch(root / "sub-01/anat/sub-01_run-1_T1w.json", "broken")
    scans, problems = look(root)
    assert stems(scans) == ["sub-01_T1w"]
    assert problems == []


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        ({"acquisition": "a"}, {"acq-a_run-01"}),
        ({"acq": ["a", "b"]}, {"acq-a_run-01", "acq-b"}),
        ({"acquisition": None}, {"", "run-2"}),
        ({"run": "*"}, {"acq-a_run-01", "run-2"}),
        ({"run": 1}, {"acq-a_run-01"}),
        ({"run": [1, 2]}, {"acq-a_run-01", "run-2"}),
        ({"run": None, "acquisition": None}, {""}),
        ({"extension": "nii.gz", "datatype": "anat", "suffix": "T1w", "run": "2"}, {"run-2"}),
        ({"session": None, "acquisition": [None, "b"]}, {"", "acq-b", "run-2"}),
    ],
)
def test_filters(tmp_path, wanted, left):
    names = ["", "acq-a_run-01_", "acq-b_", "run-2_"]
    root = dataset(tmp_path, *(f"sub-01/anat/sub-01_{name}T1w.nii.gz" for name in names))
    touch(root / "sub-01/anat/sub-01_T2w.nii.gz")
    scans, _ = look(root, filters={"t1w": wanted, "bold": {"task": "rest"}})
    expected = {"_".join(filter(None, ["sub-01", name, "T1w"])) for name in left}
    assert set(stems(scans)) == expected | {"sub-01_T2w"}


@pytest.mark.parametrize(
    ("filters", "told"),
    [
        ({"T1": {"run": 1}}, "unknown query 'T1'"),
        ({"T1w": {"aqcuisition": "a"}}, "unknown entity 'aqcuisition'"),
        ({"T1w": "a"}, "must look like"),
        ([], "must look like"),
    ],
)
def test_bad_filters(tmp_path, filters, told):
    path = touch(tmp_path / "filter.json", json.dumps(filters))
    with pytest.raises(UsageError, match=told):
        read_filter_file(path)


def test_filter_file(tmp_path):
    path = touch(tmp_path / "filter.json", '{"T1w": {"run": null}}')
    assert read_filter_file(path) == {"T1w": {"run": None}}
    with pytest.raises(UsageError, match="not valid JSON"):
        read_filter_file(touch(tmp_path / "broken.json", "{"))
    with pytest.raises(MissingInputError, match=r"none\.json"):
        read_filter_file(tmp_path / "none.json")
    parsed = split_name("sub-01_T1w.nii")
    assert parsed is not None
    assert passes(parsed, None)


def test_labels(tmp_path, monkeypatch):
    listing = touch(tmp_path / "subjects.txt", "sub-01\n02\n\n  03 \n01\n")
    assert read_labels([str(listing), "sub-09"], "sub") == ["01", "02", "03", "09"]
    assert read_labels(None, "sub") is None
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / "01", "99")
    assert read_labels(["01"], "sub") == ["01"]
    with pytest.raises(UsageError, match="neither a sub- label"):
        read_labels(["a_b"], "sub")
    with pytest.raises(MissingInputError, match=r"none\.txt"):
        read_labels(["none.txt"], "sub")
    with pytest.raises(UsageError, match="no sub- label"):
        read_labels([str(touch(tmp_path / "empty.txt", "\n"))], "sub")


def test_check_dataset(tmp_path):
    assert check_dataset(dataset(tmp_path / "good")) == []
    with pytest.raises(MissingInputError, match="not mounted"):
        check_dataset(tmp_path / "none")
    with pytest.raises(MissingInputError, match="is not a folder"):
        check_dataset(touch(tmp_path / "file"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(DatasetError, match=r"has no dataset_description\.json.*add one") as info:
        check_dataset(tmp_path / "bare")
    assert info.value.exit_code == 16
    with pytest.raises(DatasetError, match=r"DatasetType is 'derivative'.*--derivatives"):
        check_dataset(dataset(tmp_path / "derived", DatasetType="derivative"))
    with pytest.raises(DatasetError, match="BIDSVersion is missing"):
        check_dataset(dataset(tmp_path / "old", BIDSVersion=""))
    assert "Name is missing" in check_dataset(dataset(tmp_path / "nameless", Name=""))[0]
    for content, told in (("{", "repair it"), ("[]", "not a JSON object")):
        path = dataset(tmp_path / "broken") / "dataset_description.json"
        path.write_text(content)
        with pytest.raises(DatasetError, match=told):
            check_dataset(tmp_path / "broken")
    path.unlink()
    path.symlink_to("gone")
    with pytest.raises(DatasetError, match="datalad get"):
        check_dataset(tmp_path / "broken")


def test_inputs_are_never_touched(tmp_path):
    root = dataset(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "participants.tsv")
    before = sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*"))
    look(root)
    check_dataset(root)
    assert sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*")) == before


def test_grammar_is_that_of_pybids():
    """Every entity of a raw anatomical scan is known to pybids too, under the same long name."""
    from bids.layout import Config

    known = Config.load("bids").entities
    for short in grammar().patterns:
        names = [long for long, key in grammar().long_names.items() if key == short]
        assert any(f"{short}-" in known[name].pattern for name in names if name in known), short


def make_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)), path)
    return path


def test_database_is_built_once_and_used(tmp_path, monkeypatch):
    root = dataset(tmp_path / "raw")
    for name in ("sub-01/anat/sub-01_T1w", "sub-02/ses-1/anat/sub-02_ses-1_run-01_T2w"):
        make_image(root / f"{name}.nii.gz")
    touch(root / "sub-01/anat/sub-01_T1w.json", '{"EchoTime": 2}')
    touch(root / "sub-02/ses-1/sub-02_ses-1_T2w.json", '{"EchoTime": 3}')
    database = tmp_path / "database"
    before = sorted(root.rglob("*"))
    scans, problems = look(root, database=database)
    assert (scans, problems) == look(root)
    assert (database / "layout_index.sqlite").exists()
    assert sorted(root.rglob("*")) == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    # A file added later is not in the database, one removed is told.
    make_image(root / "sub-01/anat/sub-01_T2w.nii.gz")
    (root / "sub-01/anat/sub-01_T1w.nii.gz").unlink()
    monkeypatch.setattr(find, "_subject_files", None)
    scans, problems = look(root, database=database)
    assert stems(scans) == ["sub-02_ses-1_run-01_T2w"]
    assert "--bids-database-dir" in problems[0].message


def test_database_refusals(tmp_path):
    root = dataset(tmp_path / "raw", "sub-01/anat/sub-01_T1w.nii.gz")
    with pytest.raises(UsageError, match="inside the data set"):
        look(root, database=root / "db")
    look(root, database=tmp_path / "db")
    other = dataset(tmp_path / "other", "sub-01/anat/sub-01_T1w.nii.gz")
    with pytest.raises(UsageError, match=f"is of {root}, not of {other}"):
        look(other, database=tmp_path / "db")
    (tmp_path / "db/layout_index.sqlite").write_bytes(b"broken")
    with pytest.raises(DatasetError, match="delete it to rebuild it"):
        look(root, database=tmp_path / "db")
