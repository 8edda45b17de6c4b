"""The command's options, exit codes and modes; no scan is harmonized here."""

from __future__ import annotations

import json

import pytest
from conftest import DataSet, call, quick, serial, snapshot

from bids_harmony.cli.parser import build_parser, parse_args


def test_unknown_level(tiny, tmp_path):
    ran = call(tiny.root, tmp_path / "out", "group", *serial(tmp_path / "work"))
    assert ran.code == 17
    assert "unknown analysis level 'group'; choose train or participant" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--no-such-option"], "unrecognized arguments"),
        (["--participant", "01"], "unrecognized arguments"),
        (["--nprocs", "0"], "not a positive number"),
        (["--nprocs", "many"], "invalid"),
        (["--method", "magic"], "invalid choice"),
        (["--skull-strip", "yes"], "invalid choice"),
        (["--desc", "a_b"], "only letters, digits and +"),
        (["--desc", "é"], "only letters, digits and +"),
        (["--name", "x"], "--name is for train"),
        (["--model", "nyul-A", "--reference", "A"], "give --model or --reference"),
        (["--level", "minimal", "--method", "nyul"], "--level minimal harmonizes nothing"),
        (["--level", "minimal", "--reports-only"], "--level minimal writes no report"),
        (["--participant-label", "01", "99"], "sub-99 not in"),
        (["--output-spaces", "native:res-2"], "write native or TEMPLATE[:res-N]"),
        (["--output-spaces", "MNI152NLin2009aSym:res-99"], "N mm from 1 to 8"),
        (["--output-spaces", "Nowhere"], "template Nowhere is not here"),
        (["--mem", "lots"], "write for example 16G"),
        (["--nprocs", "1", "--omp-nthreads", "4"], "lower it or raise --nprocs"),
        (["--device", "tpu"], "is none of auto, cpu"),
        (["--device", "cuda"], "the method runs on the CPU only"),
        (["--site-from", "scanner_id"], "has this column; there is participant_id, site"),
        (["--model", "nyul-A", "--method", "zscore"], "holds nyul"),
    ],
)
def test_usage_errors(tiny, bundle, tmp_path, options, told):
    out = tmp_path / "out"
    if "--model" not in options and "minimal" not in options:
        options = [*options, "--model", str(bundle)]
    options = [str(bundle) if o == "nyul-A" else o for o in options]
    ran = call(tiny.root, out, "participant", "-w", tmp_path / "work", *options)
    assert ran.code == 64, ran.out + ran.err
    assert told in ran.err
    assert "Traceback" not in ran.err
    assert not list(out.rglob("*.nii.gz"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "train needs --reference SITE"),
        (["--reference", "A", "--model", "x", "--preset", "cpu"], "leave out --preset"),
        (["--reference", "A", "--name", "../x"], "--name '../x'"),
        (["--reference", "A", "--reports-only"], "are for participant"),
        (["--reference", "A", "--level", "minimal"], "are for participant"),
    ],
)
def test_usage_errors_of_train(tiny, tmp_path, options, told):
    ran = call(tiny.root, tmp_path / "out", "train", "-w", tmp_path / "work", *options)
    assert ran.code == 64
    assert told in ran.err


def test_missing_folders(tiny, tmp_path):
    out, work = tmp_path / "out", ["-w", tmp_path / "work"]
    for level in (["participant"], ["train", "--reference", "A"]):
        ran = call(tmp_path / "none", out, *level, *work)
        assert (ran.code, "none does not exist; is it mounted?" in ran.err) == (66, True)
    ran = call(tiny.root, out, "participant", *work, "--derivatives", tmp_path / "gone")
    assert (ran.code, "gone does not exist" in ran.err) == (66, True)
    ran = call(tiny.root, out, "participant", *work, "--model", "absent")
    assert (ran.code, "--model absent: no bundle in" in ran.err) == (66, True)
    ran = call(tiny.root, out, "participant", *work, "--config-file", tmp_path / "no.toml")
    assert (ran.code, "no.toml does not exist" in ran.err) == (66, True)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "has no dataset_description.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "is not a JSON object"),
        ('{"Name": "x"}', "BIDSVersion is missing"),
        ('{"Name": "x", "BIDSVersion": "1.10.0", "DatasetType": "derivative"}', "--derivatives"),
    ],
)
def test_data_set_without_a_usable_description(tmp_path, content, told):
    root = tmp_path / "raw"
    (root / "sub-01").mkdir(parents=True)
    if content is not None:
        (root / "dataset_description.json").write_text(content)
    ran = call(root, tmp_path / "out", "participant", *serial(tmp_path / "work"))
    assert ran.code == 16
    assert told in ran.err
    assert str(root) in ran.err
    assert not (tmp_path / "out").exists()


def test_work_and_output_folders_that_would_hurt_the_data(tiny, tmp_path):
    before = tiny.snapshot()
    ran = call(tiny.root, tiny.root, "participant", *serial(tmp_path / "work"))
    assert (ran.code, "which is only read" in ran.err) == (64, True)
    link = tmp_path / "link"
    link.symlink_to(tiny.root)
    ran = call(tiny.root, link, "participant", *serial(tmp_path / "work"))
    assert (ran.code, "is the raw data set" in ran.err) == (64, True)
    ran = call(tiny.root, tiny.root / "sub-01", "participant", *serial(tmp_path / "work"))
    assert (ran.code, "only" in ran.err, "may be written" in ran.err) == (64, True, True)
    inside = tiny.root / "derivatives" / "bids_harmony"
    options = [*serial(tmp_path / "work"), "--dry-run", "--level", "minimal"]
    assert call(tiny.root, inside, "participant", *options).code == 0
    for work in (tiny.root, tiny.root / "work"):
        ran = call(tiny.root, tmp_path / "out", "participant", *serial(work))
        assert (ran.code, "lies inside the data set" in ran.err) == (64, True)
    ran = call(tiny.root, tmp_path / "out", "participant", *serial(tmp_path / "out"))
    assert (ran.code, "name another with -w" in ran.err) == (64, True)
    assert tiny.snapshot() == before


@pytest.mark.parametrize(
    "options",
    [
        ["--session-label", "7"],
        ["--modality", "FLAIR"],
        ["--bids-filter-file", "FILTER"],
    ],
)
def test_nothing_selected(tiny, tmp_path, options):
    filters = tmp_path / "filter.json"
    filters.write_text(json.dumps({"t1w": {"acquisition": "no"}}))
    options = [str(filters) if o == "FILTER" else o for o in options]
    options = [*options, "--level", "minimal", *serial(tmp_path / "work")]
    ran = call(tiny.root, tmp_path / "out", "participant", *options)
    assert ran.code == 18, ran.err
    assert "no scan selected" in ran.err


def test_reference_that_is_no_site(tiny, tmp_path):
    options = ["--reference", "C", *serial(tmp_path / "work")]
    ran = call(tiny.root, tmp_path / "out", "train", *options)
    assert ran.code == 18
    assert "its sites are A, B" in ran.err


@pytest.mark.parametrize("content", ["{", "[1]", '{"t1w": 3}', '{"t1w": {"colour": "red"}}'])
def test_filters_that_make_no_sense(tiny, tmp_path, content):
    path = tmp_path / "filter.json"
    path.write_text(content)
    options = ["--bids-filter-file", path, "--level", "minimal", *serial(tmp_path / "work")]
    ran = call(tiny.root, tmp_path / "out", "participant", *options)
    assert ran.code == 64, ran.err
    assert "filter" in ran.err


def test_selection(tmp_path, brains):
    made = DataSet(tmp_path / "raw")
    data, affine = brains.brain("A", 1)
    for ses in ("1", "2"):
        made.scan("01", data, affine, ses=ses)
        made.scan("01", data, affine, ses=ses, suffix="FLAIR")
    made.scan("02", data, affine)
    labels = tmp_path / "labels.txt"
    labels.write_text("sub-01\n02\n")
    rest = ["participant", "--dry-run", "--level", "minimal", *serial(tmp_path / "work")]

    def planned(*options):
        ran = call(made.root, tmp_path / "out", *rest, *options)
        assert ran.code == 0, ran.err
        return [text.split("] ")[1].split(":")[0] for text in ran.out.splitlines()[:-1]]

    ones = [f"sub-01_ses-{s}_{m}" for s in "12" for m in ("FLAIR", "T1w")]
    assert planned() == [*ones, "sub-02_T1w"]
    assert planned("--participant-label", labels) == [*ones, "sub-02_T1w"]
    assert planned("--participant_label", "sub-02") == ["sub-02_T1w"]
    assert planned("--session-label", "ses-2") == ones[2:]
    assert planned("--session-id", "2", "--modality", "T1w") == [ones[3]]
    filters = tmp_path / "filter.json"
    filters.write_text(json.dumps({"t1w": {"session": "1"}, "flair": {"session": None}}))
    assert planned("--bids-filter-file", filters) == [ones[1]]
    filters.write_text(json.dumps({"t1w": {"session": "*"}}))
    assert planned("--bids_filter_file", filters) == ones


def test_every_option_has_both_spellings(tmp_path):
    for action in build_parser()._actions:
        names = [n for n in action.option_strings if n.startswith("--")]
        for name in (n for n in names if "-" in n[2:] and not n.startswith("--no-")):
            assert "--" + name[2:].replace("-", "_") in names
    argv = [str(tmp_path / "a"), str(tmp_path / "b"), "participant"]
    both = [
        parse_args([*argv, "--output_spaces", "native", "--random_seed", "3", "--skull_strip",
                    "skip", "--omp_nthreads", "1", "--stop_on_first_crash"]),
        parse_args([*argv, "--output-spaces", "native", "--random-seed", "3", "--skull-strip",
                    "skip", "--omp-nthreads", "1", "--stop-on-first-crash"]),
    ]  # fmt: skip
    assert both[0] == both[1]
    assert both[0].random_seed == 3


@pytest.mark.parametrize("option", ["--help", "--version", "--bids-exec-spec"])
def test_options_that_only_print(option):
    ran = call(option)
    assert ran.code == 0
    assert "bids_harmony" in ran.out


def test_dry_run_writes_nothing(tiny, bundle, transforms, tmp_path):
    before = tiny.snapshot()
    out, work = tmp_path / "out", tmp_path / "work"
    options = [*quick(work, transforms), "--dry-run"]
    spaces = ["--output-spaces", "native", "MNI152NLin2009aSym:res-4"]
    ran = call(tiny.root, out, "participant", "--model", bundle, *options, *spaces)
    assert ran.code == 0, ran.err
    assert ran.line("sub-03_T1w").endswith(
        "planned: site B (participants.tsv column site), brain mask to be found"
    )
    assert "model: nyul-A" in ran.out
    assert "4 scans in 0 s: 4 planned" in ran.out
    ran = call(tiny.root, out, "participant", "--reference", "A", *options)
    assert "would first fit nyul on 2 scan(s) of A" in ran.out
    assert "4 planned" in ran.out
    ran = call(tiny.root, out, "train", "--reference", "A", *options)
    assert (ran.code, "would fit nyul on A" in ran.out, "2 planned" in ran.out) == (0, True, True)
    assert not out.exists()
    assert not work.exists()
    assert tiny.snapshot() == before


def test_dry_run_keeps_an_output_folder_as_it_is(tiny, bundle, tmp_path):
    (tmp_path / "out").mkdir()
    options = ["--model", bundle, "--dry-run", *serial(tmp_path / "work")]
    assert call(tiny.root, tmp_path / "out", "participant", *options).code == 0
    assert snapshot(tmp_path / "out") == {}
    assert list((tmp_path / "out").iterdir()) == []


def test_boilerplate_only(tiny, bundle, tmp_path):
    out = tmp_path / "out"
    options = ["--model", bundle, "--boilerplate-only", *serial(tmp_path / "work")]
    ran = call(tiny.root, out, "participant", *options)
    assert ran.code == 0
    assert "Nyul" in (out / "logs" / "CITATION.md").read_text()
    assert not list(out.rglob("*.nii*"))
    assert not list(out.glob("*.html"))
