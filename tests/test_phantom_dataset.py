"""The data set that the phantom writes: valid BIDS, repeatable, and true to its own truth."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_harmony.cli.phantom import SITES, main
from bids_harmony.errors import UsageError
from bids_harmony.phantom.acquisition import voxel_size
from bids_harmony.phantom.dataset import sites_of, write_phantom
from bids_harmony.phantom.person import make_person
from bids_harmony.phantom.signal import tissue_table
from bids_harmony.phantom.sites import ADULTS, INFANTS, all_sites, get_sites

OPTIONS = {"sites": ("mprage3", "spgr15"), "resolution": 4.0, "lesions": True, "seed": 7}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two subjects, two sites, two modalities, written by the command."""
    folder = tmp_path_factory.mktemp("phantom") / "bids"
    arguments = ["--sites", *OPTIONS["sites"], "--modality", "T1w", "FLAIR", "--lesions"]
    arguments += ["--subjects", "2", "--resolution", "4", "--random-seed", "7"]
    assert main([str(folder), *arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """Subjects 2 and 3 at one site, written by the function in two processes."""
    folder = tmp_path_factory.mktemp("phantom") / "part"
    options = {**OPTIONS, "sites": ("spgr15",)}
    return write_phantom(folder, subjects=2, first=2, workers=2, modalities=("T1w",), **options)


def load(root: Path, name: str, truth: bool = True):
    subject, session = name.split("_")[:2]
    base = root / "derivatives" / "phantom" if truth else root
    return nib.load(base / subject / session / "anat" / f"{name}.nii.gz")


def test_same_seed_same_files_whatever_else_is_written(dataset, part):
    common = [
        path.relative_to(part)
        for path in sorted(part.rglob("sub-02_ses-spgr15*"))
        if path.is_file()
    ]
    assert len(common) >= 20
    for path in common:
        assert (part / path).read_bytes() == (dataset / path).read_bytes(), path


def test_tables_tell_age_sex_and_site(dataset):
    rows = [line.split("\t") for line in (dataset / "participants.tsv").read_text().splitlines()]
    assert rows[0] == ["participant_id", "age", "sex"]
    person = make_person(7, 2, lesions=1.0)
    assert rows[2] == ["sub-02", str(person.age), person.sex]
    sessions = (dataset / "sub-01" / "sub-01_sessions.tsv").read_text()
    assert sessions == "session_id\tsite\nses-mprage3\tmprage3\nses-spgr15\tspgr15\n"


def test_sidecar_tells_the_protocol(dataset):
    path = dataset / "sub-01/ses-mprage3/anat/sub-01_ses-mprage3_T1w.json"
    fields = json.loads(path.read_text())
    site = all_sites()["mprage3"]
    assert fields["Manufacturer"] == site.manufacturer
    assert fields["ManufacturersModelName"] == site.model
    assert fields["MagneticFieldStrength"] == 3.0
    assert fields["InversionTime"] == site.protocols["T1w"].ti
    assert {"EchoTime", "RepetitionTime", "FlipAngle"} <= set(fields)


@pytest.mark.parametrize("site", ["mprage3", "spgr15"])
def test_scan_is_truth_times_bias_and_gain_plus_noise(dataset, site):
    stem = f"sub-01_ses-{site}"
    scan = load(dataset, f"{stem}_T1w", truth=False)
    truth, bias = (load(dataset, f"{stem}_desc-{d}_T1w") for d in (f"truth{site}", "bias"))
    mask = np.asarray(load(dataset, f"{stem}_desc-brain_mask").dataobj) > 0
    for image in (truth, bias):
        np.testing.assert_array_equal(image.affine, scan.affine)
        assert image.shape == scan.shape
    ideal = truth.get_fdata()[mask]
    bright = ideal > np.median(ideal)
    ratio = (scan.get_fdata() / bias.get_fdata())[mask][bright] / ideal[bright]
    # Left over: noise, the transmit field and (8 bit) rounding
    assert ratio.std() / ratio.mean() < 0.12
    assert np.corrcoef(scan.get_fdata()[mask] / bias.get_fdata()[mask], ideal)[0, 1] > 0.95


def test_truth_at_the_reference_is_the_mixture_of_its_signals(dataset):
    stem, site = "sub-02_ses-spgr15", all_sites()["mprage3"]
    names = {"CSF": "CSF", "GM": "GM", "WM": "WM", "lesion": "L"}
    shares = {
        n: load(dataset, f"{stem}_label-{label}_probseg").get_fdata() for n, label in names.items()
    }
    truth = load(dataset, f"{stem}_desc-truthmprage3_T1w").get_fdata()
    table, scale = tissue_table(3.0), make_person(7, 2).t1_scale
    protocol = site.protocols["T1w"]
    unit = float(protocol.signal(table["WM"], np.ones(())))
    mixture = 0
    for name, share in shares.items():
        old = table[name]
        tissue = old.__class__(old.t1 * scale.get(name, 1), old.t2, old.t2star, old.pd)
        mixture = mixture + share * float(protocol.signal(tissue, np.ones(()))) / unit
    inside = sum(shares.values()) > 0.999
    assert inside.sum() > 5000
    np.testing.assert_allclose(truth[inside], site.gain * np.abs(mixture[inside]), rtol=0.25)
    error = truth[inside] / (site.gain * np.abs(mixture[inside])) - 1
    # Left over: T1 differs between regions by a few per cent
    assert np.abs(np.median(error)) < 0.02
    assert error.std() < 0.06


def test_labels_and_mask_follow_the_fractions(dataset):
    stem = "sub-02_ses-mprage3"
    labels = np.asarray(load(dataset, f"{stem}_dseg").dataobj)
    mask = np.asarray(load(dataset, f"{stem}_desc-brain_mask").dataobj)
    np.testing.assert_array_equal(labels > 0, mask > 0)
    stack = np.stack(
        [load(dataset, f"{stem}_label-{n}_probseg").get_fdata() for n in ("CSF", "GM", "WM", "L")]
    )
    np.testing.assert_array_equal(labels[mask > 0], np.argmax(stack, 0)[mask > 0] + 1)
    voxel = np.prod(nib.affines.voxel_sizes(load(dataset, f"{stem}_dseg").affine))
    person = make_person(7, 2, lesions=1.0)
    assert mask.sum() * voxel / 1000 == pytest.approx(person.icv, rel=0.04)


def test_sites_store_and_orient_differently(dataset):
    first, second = (load(dataset, f"sub-01_ses-{s}_T1w", False) for s in ("mprage3", "spgr15"))
    assert nib.aff2axcodes(first.affine) == ("P", "I", "R")
    assert nib.aff2axcodes(second.affine) == ("L", "P", "S")
    assert first.get_data_dtype() == np.int16
    assert second.get_data_dtype() == np.uint8
    assert second.dataobj.slope != 1
    assert np.asarray(second.dataobj.get_unscaled()).max() == 255
    np.testing.assert_allclose(nib.affines.voxel_sizes(second.affine), [4, 4, 6])
    for image in (first, second):
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
        assert np.isfinite(image.get_fdata()).all()


def test_subjects_that_do_not_travel_have_one_site_in_turn():
    sites = get_sites(("mprage3", "spgr3", "spgr15"))
    counts = [len(sites_of(k, sites, 2)) for k in range(1, 6)]
    assert counts == [3, 3, 1, 1, 1]
    assert {sites_of(k, sites, 0)[0].name for k in (1, 2, 3)} == {s.name for s in sites}
    assert sites_of(9, sites, None) == sites


def test_resolution_keeps_the_ratio_of_the_edges_but_makes_no_slice_thicker():
    protocol = all_sites()["thick15"].protocols["T1w"]
    voxel, scale = voxel_size(protocol, 1.8)
    np.testing.assert_allclose(voxel, [1.8, 1.8, 4.5])
    assert scale == pytest.approx(2)
    np.testing.assert_allclose(voxel_size(all_sites()["spgr15"].protocols["T1w"], 2)[0], [2, 2, 3])
    np.testing.assert_allclose(voxel_size(protocol, 0.8)[0], [0.8, 0.8, 4.0])
    np.testing.assert_array_equal(voxel_size(protocol, None)[0], protocol.voxel)


@pytest.mark.parametrize("where", [".", "derivatives/phantom"])
def test_validator_passes(dataset, where):
    program = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))
    program = program or shutil.which("bids-validator-deno")
    if program is None:
        pytest.skip("bids-validator-deno is not installed")
    done = subprocess.run(
        [program, str(dataset / where), "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    errors = [i for i in issues if i.get("severity") == "error"]
    assert errors == []
    assert done.returncode == 0


def test_folder_that_is_not_empty_is_left_alone(tmp_path, capsys):
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    assert main([str(tmp_path)]) == 64
    assert "not empty: name a new folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sites", "nowhere"], "unknown site 'nowhere'"),
        (["--sites", "spgr3", "spgr3"], "twice"),
        (["--subjects", "0"], "at least 1"),
        (["--resolution", "0.1"], "between 0.8 and 8"),
        (["--travelling", "9"], "between 0 and the number of subjects"),
        (["--lesions", "3"], "between 0 and 1"),
        (["--modality", "PDw"], "PDw"),
        (["--subjects", "many"], "many"),
        (["--modality", "T1w", "T1w"], "once"),
    ],
)
def test_impossible_requests_exit_64_and_write_nothing(tmp_path, capsys, arguments, message):
    target = tmp_path / "new"
    assert main([str(target), *arguments]) == 64
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_a_file_in_the_way_is_refused(tmp_path):
    target = tmp_path / "file"
    target.write_text("")
    with pytest.raises(UsageError, match="is a file"):
        write_phantom(target, subjects=1)


def test_command_line_knows_all_sites():
    assert tuple(all_sites()) == (*SITES, INFANTS)
    assert SITES == ADULTS, "infants are simulated only if they are named"


def test_infants_have_grey_and_white_matter_alike(tmp_path):
    write_phantom(tmp_path / "bids", subjects=1, sites=("mprage3", "infant3"), resolution=3.0)
    ratio = {}
    for site in ("mprage3", "infant3"):
        stem = f"sub-01_ses-{site}"
        image = load(tmp_path / "bids", f"{stem}_desc-truth{site}_T1w").get_fdata()
        grey, white = (
            image[load(tmp_path / "bids", f"{stem}_label-{t}_probseg").get_fdata() > 0.99]
            for t in ("GM", "WM")
        )
        ratio[site] = np.median(white) / np.median(grey)
    assert ratio["mprage3"] > 1.3
    assert 0.95 < ratio["infant3"] < 1.2


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_imports_nothing_heavy(option):
    code = (
        "import sys\n"
        "from bids_harmony.cli.phantom import main\n"
        f"try:\n    main(['{option}'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'numpy', 'scipy', 'nibabel', 'nilearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "bids_harmony-phantom" in done.stdout
