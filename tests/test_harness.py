"""The benchmark harness: rows, intervals, pages, data sets, and a table from end to end."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import nibabel as nb
import numpy as np
import pytest
from conftest import IDENTITY, Brains, DataSet
from scipy import stats

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def _importable():
    """Benchmarks are run from the root of the repository and belong to no package."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def module(name: str):
    return importlib.import_module(f"benchmarks.{name}")


def make_row(method, condition, scan, person, **scores):
    facts = dict.fromkeys(module("rows").FACTS, "") | {"model": f"hash-{method}", "seed": 0}
    return module("rows").Row(method, condition, scan, person, "ok", scores, facts)


def make_case(condition, name):
    return module("harness").Case(condition, name, name, ())


def test_rows_are_kept_and_replaced(tmp_path):
    rows = module("rows").Rows(tmp_path / "rows.csv", ["psnr", "ssim"])
    case = make_case("exp", "01")
    assert not rows.has("hm", case, "hash-hm")
    rows.add(make_row("hm", "exp", "01", "01", psnr=20.25, ssim=float("nan")))
    rows.add(make_row("nyul", "exp", "01", "01", psnr=float("inf"), ssim=0.5))
    again = module("rows").Rows(tmp_path / "rows.csv", ["psnr", "ssim"])
    assert again.has("hm", case, "hash-hm")
    assert not again.has("hm", case, "another")
    assert not again.has("hm", make_case("log", "01"), "hash-hm")
    assert again.rows[0].scores["psnr"] == 20.25
    assert np.isnan(again.rows[0].scores["ssim"])
    assert again.rows[1].scores["psnr"] == float("inf")
    again.add(make_row("hm", "exp", "01", "01", psnr=21.0, ssim=0.1))
    assert [r.scores["psnr"] for r in again.rows if r.method == "hm"] == [21.0]
    wider = module("rows").Rows(tmp_path / "rows.csv", ["psnr", "ssim", "jsd"])
    assert not wider.has("hm", case, "hash-hm")  # a new column is computed
    again.drop({"hm"})
    left = module("rows").Rows(tmp_path / "rows.csv", ["psnr", "ssim"])
    assert [r.method for r in left.rows] == ["nyul"]


def test_interval_against_scipy():
    values = [20.0, 22.0, 21.0, 27.0, 24.5]
    rows = [make_row("hm", "exp", f"{k}", f"{k}", psnr=v) for k, v in enumerate(values)]
    found = module("rows").mean_interval(rows, "psnr")
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method="percentile", random_state=1
    ).confidence_interval
    assert found.value == pytest.approx(np.mean(values))
    assert found.count == 5
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.25)
    assert found == module("rows").mean_interval(rows[::-1], "psnr")


def test_interval_counts_people():
    rows = [make_row("hm", c, f"{c}{p}", p, psnr=v)
            for c, p, v in (("a", "1", 10), ("b", "1", 20), ("a", "2", 30), ("b", "3", float("nan")))]  # fmt: skip  # noqa: E501
    found = module("rows").mean_interval(rows, "psnr")
    assert (found.value, found.count) == (22.5, 2)  # 15 and 30
    assert (found.low, found.high) == (15, 30)
    assert np.isnan(module("rows").mean_interval(rows[:2], "psnr").low)
    assert module("rows").mean_interval(rows[3:], "psnr") is None


def test_scans_below_their_input():
    rows = [
        make_row("none", "exp", "01", "01", psnr=20.0),
        make_row("none", "exp", "02", "02", psnr=20.0),
        make_row("hm", "exp", "01", "01", psnr=19.5),
        make_row("hm", "exp", "02", "02", psnr=25.0),
    ]
    ((row, gain),) = module("rows").below_input(rows, "psnr", "higher")
    assert (row.scan, gain) == ("01", -0.5)
    ((row, gain),) = module("rows").below_input(rows, "psnr", "lower")
    assert (row.scan, gain) == ("02", -5)
    truth = [make_row("none", "as it is", "03", "03", psnr=float("inf")),
             make_row("hm", "as it is", "03", "03", psnr=40.0)]  # fmt: skip
    assert module("rows").below_input(truth, "psnr", "higher") == []


def test_page():
    table = module("tables").TABLES["blindharmony-1-3"]
    rows = [
        make_row(m, c, p, p, psnr=v, ssim=0.9, field_psnr=v + 1, field_ssim=0.95)
        for m, v in (("none", 20.0), ("histogram-matching", 25.0), ("ssimh", 19.0))
        for c in ("exp", "log")
        for p in ("nov61", "nov62")
    ]
    lost = make_row("nyul", "exp", "nov61", "nov61")
    rows.append(module("rows").Row(*[*list(vars(lost).values())[:4], "no output", {}, lost.facts]))
    text = module("page").render(table, rows, "python -m benchmarks.run blindharmony-1-3")
    lines = text.splitlines()
    start = lines.index("## exp")
    (matched,) = [x for x in lines[start : start + 8] if x.startswith("| histogram-matching")]
    cells = [c.strip() for c in matched.strip("|").split("|")]
    assert cells[1] == "**25.00** [25.00, 25.00]"
    assert cells[-2:] == ["26.50", "0.961"]
    assert "4 of 8 scans:" in text
    assert "- ssimh, exp, nov61: -1.00 dB" in lines
    assert "- nyul, exp, nov61: no output" in lines
    assert "- harmonizing-flows" not in text
    start = lines.index("## Goals")
    goals = {x.split("|")[1].strip(): x.split("|")[2:-1] for x in lines[start + 4 : start + 9]}
    assert lines[start + 4].split("|")[2:-1] == [" histogram-matching ", " ssimh "]
    above = [c.strip() for c in goals["PSNR, brain, above histogram matching"]]
    assert above == ["", "missed: exp (-6), log (-6)"]
    paper = [c.strip() for c in goals["PSNR, field, above the paper's BlindHarmony"]]
    assert paper == ["missed: exp (-3.7), log (-2.7)", "missed: exp (-9.7), log (-8.7)"]
    assert [x for x in lines if x.startswith("| no scan is made worse")] == [
        "| no scan is made worse | met | missed: 4 of 4 scans |"
    ]
    assert "python -m benchmarks.run" in text


def test_transformations(tmp_path):
    tables = module("tables.blindharmony")
    x = np.linspace(0, 1.5, 301)
    for name, change in tables.transformations().items():
        y = change(x)
        assert y[0] == 0
        assert change(np.array(1.0)) == pytest.approx(1), name
        assert (np.diff(y) > 0).all()
    assert tables.transformations()["exp"](0.5) == pytest.approx((np.e**0.5 - 1) / (np.e - 1))
    assert tables.transformations()["log"](0.5) == pytest.approx(np.log(1.5) / np.log(2))
    data = np.random.default_rng(0).uniform(100, 1000, (20, 20, 20)).astype(np.float32)
    data[:4] = 0
    source, target = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"
    nb.Nifti1Image(data, np.diag([1, 2, 3, 1.0])).to_filename(source)
    tables.transform(source, np.sqrt, target)
    top = np.percentile(data[data > 0], 99.9)
    found = nb.load(target)
    np.testing.assert_allclose(found.get_fdata(), np.sqrt(data * top), rtol=1e-5)
    np.testing.assert_array_equal(found.affine, np.diag([1, 2, 3, 1.0]))


def test_a_comparator_learns_one_transformation_back(tmp_path):
    table, trials = module("tables.blindharmony"), module("trials")
    rng = np.random.default_rng(0)
    for label in (*table.TRAINING, *table.TESTED):
        path = tmp_path / "data" / f"sub-{label}" / "anat" / f"sub-{label}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        data = rng.uniform(100, 1000, (20, 20, 20)).astype(np.float32)
        nb.Nifti1Image(data, np.eye(4)).to_filename(path)
    cohort = table.BlindHarmony().prepare(tmp_path / "data", tmp_path / "work")
    (trial,) = (t for t in table.TRIALS if t.label == "unet-exp")
    scans = trials.training_scans(trial, cohort)
    assert len(scans) == 2 * len(table.TRAVELLERS)
    assert trials.only_these(scans) == [
        "--participant-label", *cohort.travellers, "--session-label", "exp", "novosibirsk",
    ]  # fmt: skip
    mixed = trials.only_these([*scans, *cohort.cases[0].scans])
    assert "--session-label" not in mixed, "it would leave out scans without a session"
    assert not {s.subject for s in scans} & {s.subject for c in cohort.cases for s in c.scans}
    of = {s.site: nb.load(s.path).get_fdata() for s in scans if s.subject == "nov52ways"}
    top = np.percentile(of["novosibirsk"], 99.9)
    np.testing.assert_allclose(of["exp"] / top, np.expm1(of["novosibirsk"] / top) / np.expm1(1))


def test_cut_keeps_voxels_in_place(tmp_path):
    data, affine = Brains().brain("A", 3)
    wide = np.pad(data, ((20, 5), (30, 2), (12, 14)))
    shifted = affine.copy()
    shifted[:3, 3] -= affine[:3, :3] @ [20, 30, 12]
    source, target = tmp_path / "in.nii.gz", tmp_path / "out.nii.gz"
    nb.Nifti1Image(wide, shifted).to_filename(source)
    assert module("data").cut(source, target)
    found = nb.load(target)
    assert found.shape < wide.shape
    places = []
    for values, grid in ((wide, shifted), (found.get_fdata(), found.affine)):
        index = np.argwhere(values > 0)
        places.append((values[values > 0].sum(), nb.affines.apply_affine(grid, index)))
    assert places[0][0] == pytest.approx(places[1][0])
    np.testing.assert_allclose(places[0][1], places[1][1], atol=1e-4)


def test_scores_of_whole_slices_know_the_axes():
    scoring = module("scoring")
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.2, 1, (40, 44, 36)).astype(np.float32)
    image = truth + rng.normal(0, 0.1, truth.shape).astype(np.float32)
    mask = np.zeros(truth.shape, bool)
    mask[5:35, 4:40, 6:30] = True
    affine = np.diag([4.0, 4.0, 4.0, 1])
    upright = scoring.whole_field(truth, image, mask, affine)
    turned = [np.flip(np.transpose(x, (2, 0, 1)), 0) for x in (truth, image, mask)]
    grid = affine[:, [2, 0, 1, 3]].copy()
    grid[:, 0] *= -1
    assert scoring.whole_field(*turned, grid) == pytest.approx(upright, rel=1e-6)


class Runs:
    """A table of a tiny data set; how often it was scored."""

    def __init__(self, root: Path, harness):
        brains, data = Brains(), DataSet(root)
        for site, labels in (("A", ("01", "02", "03")), ("B", ("04",))):
            for k, label in enumerate(labels):
                data.scan(label, *brains.brain(site, int(label) + k))
                data.site(label, site)
        self.scored: list[str] = []
        outer = self

        class Tiny(harness.Table):
            name = "tiny"
            title = "Tiny"
            about = "Two sites."
            columns = (harness.Column("psnr", "PSNR", "dB"),)
            trials = ("none", "nyul")
            options = ("--sloppy",)

            def prepare(self, data, folder):
                (scan,) = module("trials").scans_of(root, ["04"])
                case = harness.Case("B", "04", "04", (scan,))
                return harness.Cohort(root, "A", ("01", "02", "03"), (case,))

            def score(self, case, result, prep):
                (scan,) = case.scans
                outer.scored.append(scan.stem)
                image, mask = result(scan), prep.mask(scan)
                return {"psnr": float(np.median(image[mask]))}

        self.table = Tiny()


@pytest.mark.slow
def test_a_table_from_end_to_end(tmp_path):
    harness, tables = module("harness"), module("tables")
    runs = Runs(tmp_path / "raw", harness)
    settings = harness.Settings(tmp_path / "work")
    trials = [tables.TRIALS["none"], tables.TRIALS["nyul"]]
    rows = harness.run_table(runs.table, trials, tmp_path, settings)
    assert [(r.method, r.status) for r in rows.rows] == [("none", "ok"), ("nyul", "ok")]
    assert len(runs.scored) == 2
    out = tmp_path / "work" / "tiny" / "out"
    (image,) = out.glob("sub-04/anat/*_desc-nyul*_T1w.nii.gz")
    model = json.loads((out / "models" / "nyul" / "model.json").read_text())
    assert model["meta"]["training_subjects"] == ["01", "02", "03"]
    scale = model["meta"]["output_scale"]["T1w"]
    mask = nb.load(out / "sub-04" / "anat" / "sub-04_desc-brain_mask.nii.gz").get_fdata() > 0
    expected = np.median(nb.load(image).get_fdata()[mask]) / scale["high"]
    assert rows.rows[1].scores["psnr"] == pytest.approx(expected, rel=1e-4)
    assert float(rows.rows[1].facts["seconds"]) > 0

    rows = harness.run_table(runs.table, trials, tmp_path, settings)
    assert len(runs.scored) == 2  # nothing is computed again
    harness.forget(runs.table, ["nyul"], settings.work)
    assert not image.exists()
    rows = harness.run_table(runs.table, trials, tmp_path, settings)
    assert len(runs.scored) == 3
    assert rows.rows[1].scores["psnr"] == pytest.approx(expected, rel=1e-4)


def test_a_method_that_is_not_installed(tmp_path):
    harness = module("harness")
    table = module("tables").TABLES["real-pair"]
    with pytest.raises(harness.UsageError, match="nosuch is not installed"):
        harness.run_table(
            table, [module("trials").Trial("x", "nosuch")], tmp_path, harness.Settings(tmp_path)
        )


def test_missing_data_are_named(tmp_path):
    errors = importlib.import_module("bids_harmony.errors")
    table = module("tables").TABLES["blindharmony-1-3"]
    with pytest.raises(errors.MissingInputError, match="sub-nov52 does not exist"):
        table.prepare(tmp_path / "nowhere", tmp_path / "work")


def test_the_fine_scan_is_averaged_over_thick_slices(tmp_path):
    """A linear image keeps its values at the centres of the thick voxels, whatever the grids."""
    slope = np.array([1.0, -2.0, 0.5])

    def ramp(shape, affine):
        places = nb.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
        return (100 + places @ slope).astype(np.float32)

    turn = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]])
    thick = np.eye(4)
    thick[:3, :3] = turn @ np.diag([1.0, 1.25, 5.0])
    thick[:3, 3] = (-9, -9, -12)
    fine = np.diag([-1.0, 1.0, 1.0, 1.0])
    fine[:3, 3] = (30, -30, -30)
    shapes = {"fine": (60, 60, 60), "thick": (16, 12, 5)}

    class Prep:
        folder = tmp_path

        def corrected(self, scan):
            grid = {"fine": fine, "thick": thick}[scan]
            return ramp(shapes[scan], grid), grid

    (tmp_path / "identity.txt").write_text(IDENTITY)
    pair = module("tables.real_pair").RealPair()
    found = pair._moved(
        ramp(shapes["fine"], fine), "fine", "thick", Prep(), tmp_path / "identity.txt"
    )
    np.testing.assert_allclose(found, ramp(shapes["thick"], thick), atol=1e-3)


def test_scans_become_volumes_in_one_place(tmp_path):
    """Also for the commands that are no table, whose modules must at least load."""
    from benchmarks import adaptation, neural, out_of_domain
    from benchmarks.data import volume_of
    from bids_harmony.bids.scan import Scan

    assert out_of_domain.volume_of is adaptation.volume_of is volume_of
    assert neural.preprocessed is out_of_domain.preprocessed
    scan = Scan(tmp_path / "sub-01_T1w.nii.gz", {"sub": "01"}, "T1w", site="A")
    mask = np.zeros((4, 5, 6), bool)
    mask[1:3] = True
    affine = np.diag([-2.0, 1.0, 3.0, 1.0])
    made = volume_of(scan, np.full(mask.shape, 0.5), mask, affine, "T1w")
    assert (made.spacing, made.axes, made.site) == ((2.0, 1.0, 3.0), ("L", "A", "S"), "A")
    assert np.array_equal(made.data, 0.5 * mask)


def test_divergence_and_slope():
    scoring = module("scoring")
    rng = np.random.default_rng(2)
    images = [rng.normal(m, 1, (8, 9, 10)).astype(np.float32) for m in (0, 0.5, 3)]
    masks = [rng.random((8, 9, 10)) < 0.7 for _ in images]
    jsd = importlib.import_module("bids_harmony.metrics.similarity").jsd
    expected = jsd(images[0], images[2], masks[0], second_mask=masks[2])
    found = scoring.divergence_of_sites([images[0], images[2]], [masks[0], masks[2]])
    assert found == pytest.approx(expected, abs=1e-9)
    assert scoring.divergence_of_sites([images[0]] * 3, [masks[0]] * 3) == pytest.approx(0)
    apart = [np.full((2, 2, 2), k, np.float32) for k in range(3)]
    whole = [np.ones((2, 2, 2), bool)] * 3
    assert scoring.divergence_of_sites(apart, whole) == pytest.approx(np.log2(3))
    labels = [rng.integers(0, 3, (8, 9, 10)) for _ in range(2)]  # CSF and grey matter alone
    within = [
        scoring.divergence_of_sites(images[:2], [known == k for known in labels]) for k in (1, 2)
    ]
    assert scoring.divergence_within_tissues(images[:2], labels) == pytest.approx(np.mean(within))
    assert np.isnan(scoring.divergence_within_tissues(images[:2], [labels[0] * 0] * 2))
    ramp = np.broadcast_to(np.arange(9.0)[None, :, None], (8, 9, 10)).astype(np.float32)
    assert scoring.slope_correlation(3 - ramp, masks[0]) == pytest.approx(-1)
    assert abs(scoring.slope_correlation(images[0], masks[0])) < 0.2


def test_methods_that_need_several_sites_are_trained_on_all_of_a_trial():
    trials, tables = module("trials"), module("tables")
    trial = tables.TRIALS["deepnormalize-two"]
    assert trial.of_several_sites
    assert trial.sites == ("mprage3", "infant3")
    assert not tables.TRIALS["histogram-matching"].of_several_sites
    assert not trials.Trial("none", None).of_several_sites


def test_bright_spots_of_white_matter_are_marked():
    """Spots of white matter are found, under a bias field too; those of the cortex are not."""
    spacing = (1.0, 1.0, 3.0)
    places = np.stack(np.meshgrid(*(np.arange(n) * z for n, z in zip((80, 80, 26), spacing,
                                                                     strict=True)),
                                  indexing="ij"))  # fmt: skip
    away = np.linalg.norm(places - 39, axis=0)
    mask, whole = away < 38, away < 30

    def spot(x, radius):
        return np.linalg.norm(places - np.array([x, 39, 39])[:, None, None, None], axis=0) < radius

    lesion, small, cortical, shallow = spot(39, 4), spot(55, 0.9), spot(74, 3), spot(67, 2)
    rng = np.random.default_rng(0)
    flair = np.where(whole, 1.0, 1.3) + 0.03 * rng.standard_normal(mask.shape)
    flair[lesion | small | cortical | shallow & whole] = 1.6
    flair *= 1 + 0.6 * (places[1] - 39) / 39
    found = module("tables.real_lesions").bright_in_white_matter(
        flair * mask, whole & ~(lesion | small | shallow), mask, spacing
    )
    assert np.count_nonzero(found & lesion) >= 0.9 * np.count_nonzero(lesion)
    assert not (found & ~lesion).any()


def test_labels_are_kept_for_the_same_voxels_alone(tmp_path):
    rng = np.random.default_rng(0)
    away = np.linalg.norm(np.indices((20, 20, 20)) - 9.5, axis=0)
    mask = away < 9
    image = np.where(mask, 1 - away / 12, 0) + 0.01 * rng.standard_normal(mask.shape) * mask
    segmented = module("scoring").segmented
    first = segmented({"image": image, "again": image}, np.eye(4), mask, tmp_path)
    kept = list(tmp_path.iterdir())
    assert len(kept) == 1
    assert set(np.unique(first["image"])) == {0, 1, 2, 3}
    kept[0].write_bytes(b"broken")  # so it must be read
    with pytest.raises(nb.filebasedimages.ImageFileError):
        segmented({"image": image}, np.eye(4), mask, tmp_path)
    segmented({"image": image * 2}, np.eye(4), mask, tmp_path)
    segmented({"image": image * 2}, np.diag((2, 2, 2, 1)), mask, tmp_path)
    segmented({"image": image * 2}, np.eye(4), away < 8, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_trial_with_networks_of_another_is_not_trained(tmp_path):
    table = module("tables.tissues")
    own, taken = (
        t for t in table.TRIALS if t.label in ("deepnormalize-two", "deepnormalize-two-drawn")
    )
    assert taken.participant == ("--method-option", "match=0")
    assert taken.options == {"match": 0, "stride": 16}
    assert own.options == {"match": 1, "stride": 16}
    assert (taken.networks_of, taken.conditions) == (own.label, own.conditions)
    harness = module("harness")
    cohort = harness.Cohort(tmp_path, table.REFERENCE, (), ())
    prep = harness.Prepared(cohort, tmp_path, harness.Settings(tmp_path))
    errors = importlib.import_module("bids_harmony.errors")
    with pytest.raises(errors.MissingInputError, match="try deepnormalize-two first"):
        module("trials").model_for(table.Tissues(), taken, table.REFERENCE, prep)
    there = prep.model("deepnormalize-two")
    there.mkdir(parents=True)
    (there / "model.json").write_text("{}")
    (there / "weights.safetensors").write_bytes(b"")
    assert module("trials").model_for(table.Tissues(), taken, table.REFERENCE, prep) == there


def test_real_tissues_compares_with_each_sites_own_labels(monkeypatch, tmp_path):
    """A site without labels is segmented; DLMUSE's numbers become tissues."""
    table = module("tables.real_tissues")
    people = {site: some[:2] for site, some in table.PEOPLE.items()}
    monkeypatch.setattr(table, "PEOPLE", people)
    monkeypatch.setattr(table, "TESTED", 1)
    away = np.linalg.norm(np.indices((40, 40, 40)) - 19.5, axis=0)
    tissues = np.select([away < 8, away < 13, away < 17], [3, 2, 1], 0)
    image = np.array([0, 300, 600, 900])[tissues] * (1 + 0.004 * np.arange(40))
    affine = np.diag((2, 2, 2, 1.0))
    data = tmp_path / "data"

    def write(values, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        nb.Nifti1Image(values, affine).to_filename(path)

    for person in [p for some in people.values() for p in some]:
        name = f"sub-{person}/anat/sub-{person}"
        write(image.astype(np.float32), data / f"{name}_T1w.nii.gz")
    labels = data / "derivatives" / "dlmuse"
    muse = np.array([0, 51, 59, 81], np.uint8)[tissues]  # ventricle, thalamus, frontal lobe
    for person in people[table.LABELLED]:
        write(muse, labels / f"sub-{person}/anat/sub-{person}_dseg.nii.gz")
    (labels / "dataset_description.json").write_text(
        json.dumps(
            {
                "Name": "DLMUSE",
                "BIDSVersion": "1.9.0",
                "DatasetType": "derivative",
                "GeneratedBy": [{"Name": "DLMUSE"}],
            }
        )
    )
    cohort = table.RealTissues().prepare(data, tmp_path / "work")
    (case,) = cohort.cases
    assert [scan.site for scan in case.scans] == [table.LABELLED, table.OTHER]
    assert not {scan.subject for scan in case.scans} & set(cohort.training)
    harness = module("harness")
    prep = harness.Prepared(cohort, tmp_path / "work", harness.Settings(tmp_path))
    for scan in case.scans:
        found, placed = table.RealTissues()._labels_of(scan, prep)
        inside = tissues > 0
        assert np.mean(found[inside] == tissues[inside]) > 0.97, scan.site
        assert not found[~inside].any()
        np.testing.assert_array_equal(placed, affine)
