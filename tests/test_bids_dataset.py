"""Names and root files of the derivative data set."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bids_harmony.bids import dataset
from bids_harmony.bids.dataset import (
    IGNORED,
    bids_uri,
    container_info,
    dataset_description,
    merge_descriptions,
    raw_link,
    write_dataset,
)
from bids_harmony.bids.names import ENTITY_ORDER, derivative_path, sidecar_path
from bids_harmony.bids.scan import Scan
from bids_harmony.bids.write import save_nifti, write_json
from bids_harmony.errors import OutputError

OUT = Path("/out")
TEMPLATE = "MNI152NLin2009aSym"


def scan(suffix: str = "T1w", **entities) -> Scan:
    entities = {"sub": "01", **entities}
    return Scan(Path("/raw/x.nii.gz"), entities, suffix)


@pytest.fixture
def raw(tmp_path) -> Path:
    root = tmp_path / "project/raw"
    write_json(
        root / "dataset_description.json",
        {"Name": "Study", "BIDSVersion": "1.10.0", "License": "CC0", "DatasetDOI": "doi:10.1/x"},
    )
    return root


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        (scan(), {"desc": "harmonized"}, "sub-01/anat/sub-01_desc-harmonized_T1w.nii.gz"),
        (
            scan(ses="a", acq="x", run="01"),
            {"space": TEMPLATE, "res": "1", "desc": "harmonized"},
            "sub-01/ses-a/anat/sub-01_ses-a_acq-x_run-01_space-MNI152NLin2009aSym_res-1"
            "_desc-harmonized_T1w.nii.gz",
        ),
        (
            scan(part="mag", chunk="2"),
            {"space": TEMPLATE, "desc": "nyul+a"},
            "sub-01/anat/sub-01_part-mag_space-MNI152NLin2009aSym_chunk-2_desc-nyul+a_T1w.nii.gz",
        ),
        (
            scan(),
            {"desc": "brain", "suffix": "mask"},
            "sub-01/anat/sub-01_desc-brain_mask.nii.gz",
        ),
        (
            scan("T2w"),
            {"desc": "brain", "suffix": "mask"},
            "sub-01/anat/sub-01_desc-brainT2w_mask.nii.gz",
        ),
        (
            scan("FLAIR", run="1"),
            {"suffix": "biasfield"},
            "sub-01/anat/sub-01_run-1_desc-FLAIR_biasfield.nii.gz",
        ),
        (
            scan(),
            {"label": "GM", "suffix": "probseg"},
            "sub-01/anat/sub-01_label-GM_probseg.nii.gz",
        ),
        (
            scan("T2w", ses="1"),
            {"from_": "T2w", "to": TEMPLATE, "extension": ".txt"},
            "sub-01/ses-1/anat/sub-01_ses-1_from-T2w_to-MNI152NLin2009aSym_mode-image_xfm.txt",
        ),
        (
            scan(ses="1"),
            {"desc": "harmonized", "extension": ".svg", "folder": "figures"},
            "sub-01/figures/sub-01_ses-1_desc-harmonized_T1w.svg",
        ),
        (
            scan(),
            {"desc": "metrics", "suffix": "T1w", "extension": ".json"},
            "sub-01/anat/sub-01_desc-metrics_T1w.json",
        ),
    ],
)
def test_names(source, options, expected):
    assert derivative_path(OUT, source, **options) == OUT / expected


def test_names_of_scans_never_collide():
    """T1w, T2w and FLAIR with the same entities get different names for every derivative."""
    kinds = [
        {"desc": "harmonized"},
        {"desc": "brain", "suffix": "mask"},
        {"suffix": "biasfield"},
        {"space": TEMPLATE, "desc": "brain", "suffix": "mask"},
    ]
    sources = [scan(s, **e) for s in ("T1w", "T2w", "FLAIR") for e in ({}, {"run": "1"})]
    names = [derivative_path(OUT, source, **kind) for source in sources for kind in kinds]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "looks like raw data"),
        ({"res": "1"}, "looks like raw data"),
        ({"desc": "a-b"}, "only letters, digits and"),
        ({"desc": ""}, "only letters, digits and"),
        ({"space": "MNI_152"}, "only letters, digits and"),
        ({"from_": "T1w"}, "needs both from_ and to"),
        ({"to": "T1w"}, "needs both from_ and to"),
    ],
)
def test_names_that_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        derivative_path(OUT, scan(), **options)


def test_order_of_entities_is_that_of_the_schema():
    from bidsschematools.schema import load_schema

    schema = load_schema()
    order = tuple(schema.objects.entities[name].name for name in schema.rules.entities)
    assert tuple(e for e in ENTITY_ORDER if e not in ("from", "to", "mode")) == order


def test_sidecar_path():
    assert sidecar_path(Path("/a/b_T1w.nii.gz")) == Path("/a/b_T1w.json")


def test_description(raw):
    out = raw.parent / "derivatives/bids_harmony"
    described = dataset_description(out, raw, version="1.2", container={"Type": "docker"})
    assert described["DatasetType"] == "derivative"
    assert described["GeneratedBy"][0]["Name"] == "bids_harmony"
    assert described["GeneratedBy"][0]["Version"] == "1.2"
    assert described["GeneratedBy"][0]["Container"] == {"Type": "docker"}
    assert described["DatasetLinks"] == {"raw": "../../raw"}
    assert described["SourceDatasets"] == [{"DOI": "doi:10.1/x"}]
    assert described["License"] == "CC0"
    assert str(raw) not in json.dumps(described)


def test_raw_data_set_without_description(tmp_path):
    """Validation can be skipped; the derivatives are described all the same."""
    described = dataset_description(tmp_path / "out", tmp_path, version="1", container={})
    assert described["Name"] == "bids_harmony: harmonized brain MRI"
    assert described["SourceDatasets"] == [{"URL": ".."}]
    assert "License" not in described


def test_links_and_uris(raw):
    assert raw_link(raw / "derivatives/bids_harmony", raw) == "../.."
    path = raw / "sub-01/anat/sub-01_T1w.nii.gz"
    assert bids_uri(path, raw) == "bids:raw:sub-01/anat/sub-01_T1w.nii.gz"
    assert bids_uri(path, raw, "") == "bids::sub-01/anat/sub-01_T1w.nii.gz"
    with pytest.raises(ValueError, match="not in the subpath"):
        bids_uri(raw.parent / "x", raw)


def test_container_info(tmp_path):
    none = tmp_path / "none"
    marker = tmp_path / "marker"
    marker.write_text("")
    assert container_info({}, none) == {}
    assert container_info({}, marker) == {"Type": "docker"}
    named = {"BIDS_HARMONY_IMAGE": "lab/bids_harmony:1.0"}
    assert container_info(named, none) == {"Type": "docker", "Tag": "lab/bids_harmony:1.0"}
    apptainer = {"APPTAINER_CONTAINER": "/home/me/secret/harmony.sif"}
    assert container_info(apptainer, marker) == {"Type": "apptainer", "Tag": "harmony.sif"}
    assert container_info(apptainer | named, none)["Tag"] == "lab/bids_harmony:1.0"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_write_dataset_twice_changes_nothing(raw, tmp_path):
    out = tmp_path / "out"
    options = {"version": "1", "desc_descriptions": {"harmonized": "Looks like site A"}}
    write_dataset(out, raw, **options, container={})
    first = {p: p.stat().st_ino for p in out.iterdir()}
    assert {p.name for p in first} == {
        "dataset_description.json",
        ".bidsignore",
        "README.md",
        "descriptions.tsv",
    }
    write_dataset(out, raw, **options, container={})
    assert {p: p.stat().st_ino for p in out.iterdir()} == first


def test_what_users_wrote_is_kept(raw, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README").write_text("mine")
    (out / ".bidsignore").write_text("mine/\n*.html\n")
    write_dataset(out, raw, version="1", desc_descriptions={}, container={})
    assert (out / "README").read_text() == "mine"
    assert not (out / "README.md").exists()
    lines = (out / ".bidsignore").read_text().splitlines()
    assert lines[:2] == ["mine/", "*.html"]
    assert sorted(lines) == sorted({"mine/", *IGNORED})


def test_descriptions_are_merged(tmp_path):
    path = tmp_path / "descriptions.tsv"
    merge_descriptions(path, {"nyul": "old", "brain": "Brain\tmask\n"})
    merge_descriptions(path, {"nyul": 'With "quotes"'})
    merge_descriptions(path, {})
    assert path.read_text() == (
        'desc_id\tdescription\ndesc-brain\tBrain mask\ndesc-nyul\tWith "quotes"\n'
    )
    with pytest.raises(ValueError, match="only letters"):
        merge_descriptions(path, {"a_b": "x"})


def test_descriptions_without_locks(tmp_path, monkeypatch):
    """On a file system without locks a row that another job dropped is written again."""
    path = tmp_path / "descriptions.tsv"
    real, calls = dataset.write_tsv, []

    def no_lock(*_args):
        raise OSError("no locks here")

    def overwritten(*args):
        calls.append(real(*args))
        if len(calls) < 3:
            path.write_text("desc_id\tdescription\ndesc-other\tx\n")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    monkeypatch.setattr(dataset.time, "sleep", lambda _: None)
    monkeypatch.setattr(dataset, "write_tsv", overwritten)
    merge_descriptions(path, {"mine": "y"})
    assert path.read_text() == "desc_id\tdescription\ndesc-mine\ty\ndesc-other\tx\n"
    monkeypatch.setattr(dataset, "write_tsv", lambda *_: None)
    with pytest.raises(OutputError, match="other jobs keep replacing it"):
        merge_descriptions(path, {"never": "z"})


def _job(out: Path, raw: Path, number: int) -> None:
    for _ in range(10):
        descriptions = {"harmonized": "same", f"job{number}": f"of job {number}"}
        write_dataset(out, raw, version="1", desc_descriptions=descriptions, container={})


def test_eight_jobs_at_once(raw, tmp_path):
    out, alone = tmp_path / "out", tmp_path / "alone"
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_job, args=(out, raw, n)) for n in range(8)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0] * 8
    every = {"harmonized": "same"} | {f"job{n}": f"of job {n}" for n in range(8)}
    write_dataset(alone, raw, version="1", desc_descriptions=every, container={})
    assert contents(out) == contents(alone)


def test_output_folder_cannot_be_made(raw, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        write_dataset(tmp_path / "file/out", raw, version="1", desc_descriptions={})


def validator() -> str | None:
    return shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))


def test_the_validator_accepts_it(raw, tmp_path):
    """Every kind of name and root file that this house writes is valid BIDS or ignored."""
    program = validator()
    if program is None:
        pytest.skip("bids-validator-deno is not installed")
    out = tmp_path / "derivatives/bids_harmony"
    descriptions = {"harmonized": "Looks like site A", "brain": "Mask", "brainT2w": "Mask"}
    write_dataset(out, raw, version="1", desc_descriptions=descriptions)
    data = np.ones((8, 9, 10), np.float32)
    for source in (scan(ses="1", run="1"), scan("T2w", ses="1", run="1")):
        reference = {"SpatialReference": bids_uri(raw / "x.nii.gz", raw), "Resolution": {"1": "1"}}
        spaces: tuple[dict, ...] = ({}, {"space": TEMPLATE, "res": "1"})
        for space in spaces:
            path = derivative_path(out, source, desc="harmonized", **space)
            save_nifti(data, np.eye(4), path)
            write_json(sidecar_path(path), {"SkullStripped": False, **reference})
            path = derivative_path(out, source, desc="brain", suffix="mask", **space)
            save_nifti(data, np.eye(4), path, dtype=np.uint8)
            write_json(sidecar_path(path), {"Type": "Brain", **reference})
        save_nifti(data, np.eye(4), derivative_path(out, source, suffix="biasfield"))
        figure = derivative_path(out, source, desc="a", extension=".svg", folder="figures")
        xfm = derivative_path(out, source, from_=source.suffix, to=TEMPLATE, extension=".txt")
        for path in (figure, xfm, out / "logs/run.toml", out / "models/m/model.json"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
    (out / "sub-01.html").write_text("x")
    (out / "group_T1w.tsv").write_text("x\n")
    assert errors_found(program, out) == []
    # The validator does look: a file it must not accept is found.
    (out / "sub-01/ses-1/anat/sub-01_ses-1_foo-x_T1w.nii.gz").write_bytes(b"x")
    assert errors_found(program, out) != []


def errors_found(program: str, folder: Path) -> list[str]:
    command = [program, "--format", "json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    issues = json.loads(done.stdout)["issues"]["issues"]
    return [f"{i['code']} {i.get('location')}" for i in issues if i["severity"] == "error"]
