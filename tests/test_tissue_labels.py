"""Tissue labels among derivatives: taken only when the meaning of their numbers is known."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_harmony.bids.entities import split_name
from bids_harmony.bids.names import sidecar_path
from bids_harmony.bids.scan import Scan
from bids_harmony.bids.tissue_labels import TISSUES, find_tissue_labels, read_table
from bids_harmony.bids.write import save_nifti, write_json
from bids_harmony.errors import ScanError

DATA = Path(__file__).parents[2] / "shared" / "data" / "openmulti"
DLMUSE = DATA / "derivatives" / "dlmuse"
needs_data = pytest.mark.skipif(not DLMUSE.is_dir(), reason=f"no real scans at {DATA}")

AFFINE = np.diag([2.0, 2, 2, 1])
LABELS = np.zeros((8, 9, 10), np.uint8)
PHANTOM = (
    "index\tname\tabbreviation\n0\tbackground\tBG\n1\tCSF\tCSF\n2\tgrey matter\tGM\n"
    "3\twhite matter\tWM\n4\twhite matter hyperintensity\tL\n"
)
STANDARD = {1: "GM", 2: "WM", 3: "CSF"}


def raw(tmp_path: Path, name: str = "sub-01_T1w") -> Scan:
    """Write a raw scan and describe it."""
    parsed = split_name(f"{name}.nii.gz")
    assert parsed is not None
    folder = Scan(Path("/x"), parsed.entities, parsed.suffix).folder
    path = tmp_path / "raw" / folder / f"{name}.nii.gz"
    save_nifti(LABELS.astype(np.float32), AFFINE, path)
    return Scan(path, parsed.entities, parsed.suffix)


def put(tmp_path: Path, name: str, *, pipeline="prep", affine=AFFINE, **sidecar) -> Path:
    """Write labels, named by their path below the pipeline's folder."""
    path = tmp_path / pipeline / name
    save_nifti(LABELS, affine, path, dtype=np.uint8)
    if sidecar:
        write_json(sidecar_path(path), sidecar)
    return path


def table(tmp_path: Path, name: str, text: str, pipeline="prep") -> Path:
    path = tmp_path / pipeline / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def made_by(tmp_path: Path, tool: str, pipeline="prep") -> None:
    write_json(
        tmp_path / pipeline / "dataset_description.json",
        {"Name": "x", "BIDSVersion": "1.9.0", "GeneratedBy": [{"Name": "x"}, {"Name": tool}]},
    )


def look(tmp_path: Path, scan: Scan, *pipelines: str):
    return find_tissue_labels(scan, {p: tmp_path / p for p in pipelines or ("prep",)})


def refusal(tmp_path: Path, scan: Scan) -> str:
    """Return the one note of a folder without usable labels."""
    found, notes = look(tmp_path, scan)
    assert found is None
    (note,) = notes
    return note


def test_phantom(tmp_path):
    scan = raw(tmp_path, "sub-01_ses-a_acq-tse_T2w")
    stem = "sub-01/ses-a/anat/sub-01_ses-a_acq-tse"
    source = f"bids:raw:{stem}_T2w.nii.gz"
    path = put(tmp_path, f"{stem}_dseg.nii.gz", pipeline="phantom", Sources=[source])
    for label in ("CSF", "GM", "WM", "L"):
        put(tmp_path, f"{stem}_label-{label}_probseg.nii.gz", pipeline="phantom", Sources=[source])
    table(tmp_path, "dseg.tsv", PHANTOM, pipeline="phantom")
    made_by(tmp_path, "phantom", pipeline="phantom")
    found, notes = look(tmp_path, scan, "phantom")
    assert found is not None
    assert found.files == {"dseg": path}
    assert found.mapping == {1: "CSF", 2: "GM", 3: "WM", 4: "WM"}
    assert found.source == "phantom: dseg, labels of dseg.tsv"
    assert notes == []


@pytest.mark.parametrize("tool", ["fMRIPrep", "sMRIPrep"])
def test_fmriprep_without_a_table(tmp_path, tool):
    scan = raw(tmp_path)
    path = put(tmp_path, "sub-01/anat/sub-01_dseg.nii.gz")
    made_by(tmp_path, tool)
    found, notes = look(tmp_path, scan)
    assert found is not None
    assert found.files == {"dseg": path}
    assert {k: found.mapping[k] for k in STANDARD} == STANDARD
    assert 0 not in found.mapping
    assert found.source == "prep: dseg, BIDS common labels"
    assert notes == []


def test_old_fmriprep_names_itself_otherwise(tmp_path):
    scan = raw(tmp_path)
    put(tmp_path, "sub-01/anat/sub-01_dseg.nii.gz")
    write_json(
        tmp_path / "prep" / "dataset_description.json",
        {"Name": "x", "PipelineDescription": {"Name": "fMRIPrep"}},
    )
    assert look(tmp_path, scan)[0] is not None


def test_a_table_is_stronger_than_the_pipeline(tmp_path):
    scan = raw(tmp_path)
    put(tmp_path, "sub-01/anat/sub-01_dseg.nii.gz")
    table(tmp_path, "dseg.tsv", "index\tname\n1\tCSF\n2\tGray Matter\n3\tWhite Matter\n")
    # This one is of FreeSurfer's files only.
    table(tmp_path, "desc-aseg_dseg.tsv", "index\tname\n2\tLeft-Cerebral-White-Matter\n")
    made_by(tmp_path, "fMRIPrep")
    found, _ = look(tmp_path, scan)
    assert found is not None
    assert found.mapping == {1: "CSF", 2: "GM", 3: "WM"}


@pytest.mark.parametrize("label", ["aseg", "aparcaseg", "wmparc", "synthseg"])
def test_freesurfer_without_a_table(tmp_path, label):
    scan = raw(tmp_path, "sub-01_run-2_T1w")
    path = put(tmp_path, f"sub-01/anat/sub-01_run-2_desc-{label}_dseg.nii.gz")
    found, notes = look(tmp_path, scan)
    assert found is not None
    assert found.files == {"dseg": path}
    assert found.source == f"prep: desc-{label}_dseg, FreeSurfer labels"
    some = {4: "CSF", 24: "CSF", 3: "GM", 47: "GM", 1035: "GM", 2001: "GM", 12175: "GM"}
    some |= {2: "WM", 16: "WM", 77: "WM", 253: "WM", 3002: "WM", 5001: "WM"}
    assert {k: found.mapping[k] for k in some} == some
    assert not {0, 1, 40, 1036, 165} & found.mapping.keys()
    assert notes == []


def test_freesurfer_with_a_table(tmp_path):
    scan = raw(tmp_path)
    put(tmp_path, "sub-01/anat/sub-01_desc-aseg_dseg.nii.gz")
    rows = {0: "Unknown", 2: "Left-Cerebral-White-Matter", 10: "Left-Thalamus-Proper*"}
    rows |= {14: "3rd-Ventricle", 31: "Left-choroid-plexus", 80: "non-WM-hypointensities"}
    rows |= {1030: "ctx-lh-superiortemporal", 3030: "wm-lh-superiortemporal", 118: "Epidermis"}
    text = "index\tname\tcolor\n" + "".join(f"{k}\t{v}\t#000000\n" for k, v in rows.items())
    table(tmp_path, "desc-aseg_dseg.tsv", text)
    table(tmp_path, "dseg.tsv", PHANTOM)
    found, notes = look(tmp_path, scan)
    assert found is not None
    assert found.source == "prep: desc-aseg_dseg, labels of desc-aseg_dseg.tsv"
    assert found.mapping == {
        **{2: "WM", 10: "GM", 14: "CSF", 31: "CSF", 80: "GM", 1030: "GM", 3030: "WM"}
    }
    assert notes == []


@pytest.mark.parametrize("tool", ["DLMUSE", "NiChart_DLMUSE", "MUSE"])
def test_muse(tmp_path, tool):
    scan = raw(tmp_path)
    put(tmp_path, "sub-01/anat/sub-01_dseg.nii.gz")
    made_by(tmp_path, tool)
    found, notes = look(tmp_path, scan)
    assert found is not None
    assert found.source == "prep: dseg, MUSE labels"
    some = {4: "CSF", 51: "CSF", 38: "GM", 59: "GM", 207: "GM", 35: "WM", 88: "WM", 95: "WM"}
    assert {k: found.mapping[k] for k in some} == some
    assert notes == []


@pytest.mark.parametrize("tool", ["nobody knows", "notfmriprep", None])
def test_unknown_numbers_are_refused(tmp_path, tool):
    scan = raw(tmp_path)
    put(tmp_path, "sub-01/anat/sub-01_dseg.nii.gz")
    # Above the data set, so not of it.
    (tmp_path / "dseg.tsv").write_text(PHANTOM)
    if tool is not None:
        made_by(tmp_path, tool)
    note = refusal(tmp_path, scan)
    assert "nothing tells what the numbers of sub-01_dseg.nii.gz mean" in note
    assert f"add {tmp_path / 'prep' / 'dseg.tsv'} with the columns index and name" in note


def test_a_broken_description_tells_nothing(tmp_path):
    scan = raw(tmp_path)
    put(tmp_path, "sub-01/anat/sub-01_dseg.nii.gz")
    for text in ("{", '{"GeneratedBy": "fMRIPrep"}', '{"GeneratedBy": ["fMRIPrep"]}'):
        table(tmp_path, "dataset_description.json", text)
        assert "nothing tells" in refusal(tmp_path, scan)


def test_a_missing_tissue_is_refused(tmp_path):
    scan = raw(tmp_path)
    put(tmp_path, "sub-01/anat/sub-01_dseg.nii.gz")
    table(tmp_path, "dseg.tsv", "index\tname\n1\tgrey matter\n2\twhite matter\n3\tother\n")
    assert "labels of dseg.tsv have no CSF; name its tissues there" in refusal(tmp_path, scan)


def test_labels_without_tissue_are_told(tmp_path):
    scan = raw(tmp_path)
    put(tmp_path, "sub-01/anat/sub-01_dseg.nii.gz")
    table(tmp_path, "dseg.tsv", PHANTOM + "5\tpineal gland\tn/a\n")
    found, (note,) = look(tmp_path, scan)
    assert found is not None
    assert 5 not in found.mapping
    assert "labels of dseg.tsv tell no tissue of 5, taken as background" in note


@pytest.mark.parametrize("kept", ["", "_T1w"])
@pytest.mark.parametrize("extension", [".nii.gz", ".nii"])
def test_probability_maps(tmp_path, kept, extension):
    scan = raw(tmp_path)
    paths = {
        tissue: put(tmp_path, f"sub-01/anat/sub-01{kept}_label-{tissue}_probseg{extension}")
        for tissue in TISSUES
    }
    found, notes = look(tmp_path, scan)
    assert found is not None
    assert found.files == paths
    assert found.mapping == {}
    assert found.source == "prep: label-CSF, label-GM and label-WM probseg"
    assert notes == []


def test_probability_maps_stand_in_for_a_refused_dseg(tmp_path):
    scan = raw(tmp_path)
    put(tmp_path, "sub-01/anat/sub-01_dseg.nii.gz")
    for tissue in TISSUES:
        put(tmp_path, f"sub-01/anat/sub-01_label-{tissue}_probseg.nii.gz")
    found, (note,) = look(tmp_path, scan)
    assert found is not None
    assert set(found.files) == set(TISSUES)
    assert "nothing tells what the numbers" in note


def test_a_missing_map(tmp_path):
    scan = raw(tmp_path)
    put(tmp_path, "sub-01/anat/sub-01_label-GM_probseg.nii.gz")
    assert "there is no label-CSF and no label-WM probseg" in refusal(tmp_path, scan)


@pytest.mark.parametrize(
    "name",
    [
        "sub-01_dseg.nii",
        "sub-01_T1w_dseg.nii.gz",
        "sub-01_desc-brain_dseg.nii.gz",
        "sub-01_T1w_desc-brain_dseg.nii.gz",
    ],
)
def test_names(tmp_path, name):
    scan = raw(tmp_path)
    path = put(tmp_path, f"sub-01/anat/{name}")
    table(tmp_path, "dseg.tsv", PHANTOM)
    found, _ = look(tmp_path, scan)
    assert found is not None
    assert found.files == {"dseg": path}


@pytest.mark.parametrize(
    ("name", "used"),
    [
        ("sub-01/ses-1/anat/sub-01_ses-1_desc-brain_dseg.tsv", True),
        ("sub-01/ses-1/anat/sub-01_ses-1_dseg.tsv", True),
        ("sub-01/ses-1/sub-01_ses-1_dseg.tsv", True),
        ("sub-01/sub-01_dseg.tsv", True),
        ("desc-brain_dseg.tsv", True),
        ("dseg.tsv", False),
        ("seg-other_desc-brain_dseg.tsv", False),
        ("sub-01/sub-02_dseg.tsv", False),
        ("sub-01/sub-01_atlas.tsv", False),
    ],
)
def test_the_nearest_table_wins(tmp_path, name, used):
    scan = raw(tmp_path, "sub-01_ses-1_T1w")
    put(tmp_path, "sub-01/ses-1/anat/sub-01_ses-1_desc-brain_dseg.nii.gz")
    table(tmp_path, "dseg.tsv", PHANTOM)
    near = "index\tname\n1\tWM\n2\tGM\n3\tCSF\n"
    table(tmp_path, name, near if name != "dseg.tsv" else PHANTOM)
    found, _ = look(tmp_path, scan)
    assert found is not None
    assert (found.mapping.get(1) == "WM") == used
    if used:
        assert found.source.endswith(f"labels of {Path(name).name}")


@pytest.mark.parametrize(
    ("row", "tissue"),
    [
        ("1\tx\tCSF\tn/a", "CSF"),
        ("1\tx\tgm\t2", "GM"),
        ("1\tx\tCGM\t", "GM"),
        ("1\tx\tSGM\t", "GM"),
        ("1\tgrey matter\tBG\t1", "BG"),
        ("1\tx\tL\t", "WM"),
        ("1\tx\tXY\t3", "CSF"),
        ("1\tgrey matter\tn/a\t0", "BG"),
        ("1\tx\tn/a\t8", "GM"),
        ("1\tx\tn/a\t10", "WM"),
        ("1\tCerebellum\tCBM\t11", ""),
        ("1\tGrayMatter", "GM"),
        ("1\tDeep Grey-Matter\t\t", "GM"),
        ("1\tfrontal WM\t\t", "WM"),
        ("1\tcerebrospinal fluid\t\t", "CSF"),
        ("1\tthird ventricle\t\t", "CSF"),
        ("1\tLeft-Inf-Lat-Vent\t\t", "CSF"),
        ("1\tWM hyperintensities\t\t", "WM"),
        ("1\tlesions\t\t", "WM"),
        ("1\tleft ventral DC\t\t", "WM"),
        ("1\tRight ACgG  anterior cingulate gyrus\t\t", "GM"),
        ("1\tborder of grey matter and white matter\t\t", ""),
        ("1\tbackground\t\t", "BG"),
        ("1\tpineal gland\t\t", ""),
        ("1.0\tCSF\t\t", "CSF"),
    ],
)
def test_rows_of_a_table(tmp_path, row, tissue):
    path = table(tmp_path, "dseg.tsv", f"index\tname\tabbreviation\tmapping\n0\tGM\n{row}\n")
    assert read_table(path) == {0: "BG", 1: tissue}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index\tlabel\n1\tGM\n", "needs the columns index and name"),
        ("name,index\nGM,1\n", "needs the columns index and name"),
        ("index\tname\none\tGM\n", "index 'one' is no whole number"),
        ("/annex/objects/MD5E-s1", "run `datalad get"),
    ],
)
def test_broken_tables(tmp_path, text, message):
    """A table that cannot be used is not passed over: the pipeline's numbers may be others."""
    scan = raw(tmp_path)
    put(tmp_path, "sub-01/anat/sub-01_dseg.nii.gz")
    made_by(tmp_path, "fMRIPrep")
    path = table(tmp_path, "dseg.tsv", text)
    with pytest.raises(ScanError, match=message):
        read_table(path)
    assert message in refusal(tmp_path, scan)


@pytest.mark.parametrize("name", ["dseg.tsv", "sub-01/anat/sub-01_dseg.tsv"])
def test_the_content_of_a_table_was_dropped(tmp_path, name):
    scan = raw(tmp_path)
    put(tmp_path, "sub-01/anat/sub-01_dseg.nii.gz")
    link = tmp_path / "prep" / name
    link.symlink_to(".git/annex/objects/x")
    assert f"run `datalad get {link}`" in refusal(tmp_path, scan)


@pytest.mark.parametrize("name", ["dseg", "desc-aseg_dseg", "label-WM_probseg"])
def test_the_content_of_an_image_was_dropped(tmp_path, name):
    scan = raw(tmp_path)
    link = tmp_path / f"prep/sub-01/anat/sub-01_{name}.nii.gz"
    link.parent.mkdir(parents=True)
    link.symlink_to(".git/annex/objects/x")
    assert f"run `datalad get {link}`" in refusal(tmp_path, scan)


def test_nothing_there(tmp_path):
    scan = raw(tmp_path)
    assert "which does not exist" in refusal(tmp_path, scan)
    (tmp_path / "prep").mkdir()
    note = refusal(tmp_path, scan)
    assert note.startswith("prep: nothing for sub-01_T1w; looked for sub-01/anat/sub-01_dseg")
    put(tmp_path, "sub-01/ses-2/anat/sub-01_ses-2_dseg.nii.gz")
    put(tmp_path, "sub-01/anat/sub-01_space-MNI_dseg.nii.gz")
    note = refusal(tmp_path, scan)
    assert "there is sub-01/ses-2/anat/sub-01_ses-2_dseg.nii.gz, whose entities" in note
    assert "MNI" not in note


@pytest.mark.parametrize(
    ("sidecar", "reason"),
    [
        ({"Sources": ["bids:raw:sub-01/anat/sub-01_run-2_T1w.nii.gz"]}, "sub-01_run-2_T1w"),
        ({"RawSources": ["x/sub-01_T1w.nii.gz", "x/sub-01_T2w.nii.gz"]}, "this scan alone"),
        ({"Sources": ["bids:raw:sub-01/anat/sub-01_T1w.nii.gz"]}, None),
    ],
)
def test_labels_of_another_scan_are_refused(tmp_path, sidecar, reason):
    scan = raw(tmp_path)
    put(tmp_path, "sub-01/anat/sub-01_dseg.nii.gz", **sidecar)
    made_by(tmp_path, "fMRIPrep")
    if reason is None:
        assert look(tmp_path, scan)[0] is not None
    else:
        assert reason in refusal(tmp_path, scan)


def test_one_map_of_another_scan_is_refused(tmp_path):
    scan = raw(tmp_path)
    for tissue in TISSUES:
        source = "sub-01_acq-b_T1w" if tissue == "WM" else "sub-01_T1w"
        name = f"sub-01/anat/sub-01_label-{tissue}_probseg.nii.gz"
        put(tmp_path, name, Sources=[f"bids:raw:sub-01/anat/{source}.nii.gz"])
    assert "sub-01_label-WM_probseg.nii.gz not used" in refusal(tmp_path, scan)


def test_the_preprocessed_scan_tells_of_an_average(tmp_path):
    """FMRIPrep's dseg has no Sources, but its preprocessed T1w names all scans in it."""
    scan = raw(tmp_path)
    stem = "sub-01/anat/sub-01"
    put(tmp_path, f"{stem}_dseg.nii.gz")
    sources = [f"bids:raw:{stem}{acq}_T1w.nii.gz" for acq in ("", "_acq-b")]
    put(tmp_path, f"{stem}_desc-preproc_T1w.nii.gz", Sources=sources)
    made_by(tmp_path, "fMRIPrep")
    assert "not from this scan alone" in refusal(tmp_path, scan)


@pytest.mark.parametrize("name", ["sub-01_dseg", "sub-01_T2w_dseg"])
def test_labels_of_perhaps_another_scan(tmp_path, name):
    raw(tmp_path)
    scan = raw(tmp_path, "sub-01_T2w")
    path = put(tmp_path, f"sub-01/anat/{name}.nii.gz")
    table(tmp_path, "dseg.tsv", PHANTOM)
    if name == "sub-01_dseg":
        assert "may belong to or be an average with sub-01_T1w" in refusal(tmp_path, scan)
    else:
        found, _ = look(tmp_path, scan)
        assert found is not None
        assert found.files == {"dseg": path}


def test_other_grids(tmp_path):
    scan = raw(tmp_path)
    name = "sub-01/anat/sub-01_dseg.nii.gz"
    table(tmp_path, "dseg.tsv", PHANTOM)
    put(tmp_path, name, affine=np.diag([2.5, 2, 2, 1]))
    found, (note,) = look(tmp_path, scan)
    assert found is not None
    assert "sub-01_dseg.nii.gz has another grid" in note
    away = AFFINE.copy()
    away[0, 3] = 500
    path = put(tmp_path, name, affine=away)
    assert "lies elsewhere than sub-01_T1w, not used" in refusal(tmp_path, scan)
    path.write_bytes(b"broken")
    assert "cannot be read" in refusal(tmp_path, scan)


def test_the_first_folder_wins(tmp_path):
    scan = raw(tmp_path)
    name = "sub-01/anat/sub-01_dseg.nii.gz"
    put(tmp_path, name, pipeline="a")
    second = put(tmp_path, name, pipeline="b")
    put(tmp_path, name, pipeline="c")
    for pipeline in "bc":
        table(tmp_path, "dseg.tsv", PHANTOM, pipeline=pipeline)
    found, (note,) = look(tmp_path, scan, "a", "b", "c")
    assert found is not None
    assert found.files == {"dseg": second}
    assert found.source == "b: dseg, labels of dseg.tsv"
    assert note.startswith("a: nothing tells")


@pytest.mark.real
@needs_data
def test_real_muse_labels():
    """Every number is known, the shares are a brain's, and the tissues have their contrast."""
    for path in sorted(DLMUSE.glob("sub-*/anat/*_dseg.nii.gz")):
        subject = path.name.split("_")[0].removeprefix("sub-")
        image = DATA / f"sub-{subject}/anat/sub-{subject}_T1w.nii.gz"
        found, notes = find_tissue_labels(Scan(image, {"sub": subject}, "T1w"), {"muse": DLMUSE})
        assert found is not None
        assert notes == []
        labels = np.asarray(nib.load(found.files["dseg"]).dataobj).astype(int)
        assert set(np.unique(labels).tolist()) - {0} <= found.mapping.keys()
        intensity = nib.load(image).get_fdata()
        share, level = {}, {}
        for tissue in TISSUES:
            numbers = [index for index, told in found.mapping.items() if told == tissue]
            inside = np.isin(labels, numbers)
            share[tissue] = inside.sum() / (labels > 0).sum()
            level[tissue] = np.median(intensity[inside])
        brain = share["GM"] + share["WM"]
        assert share["GM"] == max(share.values())
        assert 0.25 < share["WM"] / brain < 0.5
        assert 0.03 < share["CSF"] < 0.3
        assert level["CSF"] < 0.7 * level["GM"] < level["GM"] < 0.9 * level["WM"]


def test_a_preprocessed_t2w_does_not_vouch_for_the_labels_of_the_t1w(tmp_path):
    raw(tmp_path)
    t2w = raw(tmp_path, "sub-01_T2w")
    put(tmp_path, "sub-01/anat/sub-01_dseg.nii.gz")
    table(tmp_path, "dseg.tsv", PHANTOM)
    put(tmp_path, "sub-01/anat/sub-01_desc-preproc_T2w.nii.gz",
        RawSources=["bids:raw:sub-01/anat/sub-01_T2w.nii.gz"])  # fmt: skip
    found, notes = find_tissue_labels(t2w, {"prep": tmp_path / "prep"})
    assert found is None
    assert any("may belong to" in note for note in notes)


def test_tables_agree_on_names_they_share():
    tissues: dict[str, set[str]] = {}
    for numbering in ("freesurfer", "muse"):
        text = (files("bids_harmony.data") / "labels" / f"{numbering}.tsv").read_text()
        for line in text.splitlines()[1:]:
            _, name, tissue = line.split("\t")
            letters = "".join(c for c in name.lower() if c.isalnum())
            tissues.setdefault(letters, set()).add(tissue)
    assert {name for name, found in tissues.items() if len(found) > 1} == set()
