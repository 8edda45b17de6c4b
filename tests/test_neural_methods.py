"""Neural methods from the command line: two sites, two modalities, the path to the raw grid."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import DataSet, call, give_transform, quick

from bids_harmony.interfaces.files import load, load_mask
from bids_harmony.methods.bundle import load_bundle

pytest.importorskip("torch")
pytest.importorskip("lightning")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, brains):
    """Three people at each of two sites, T1w and T2w; skull-stripped."""
    folder = tmp_path_factory.mktemp("pairs")
    made = DataSet(folder / "raw")
    for number, site in enumerate("AAABBB", start=1):
        data, affine = brains.brain(site, number, move=False)
        brain = data > 0
        dark = np.where(brain, 1.3 * np.percentile(data[brain], 99) - data, 0).clip(min=0)
        made.scan(f"0{number}", data, affine)
        made.scan(f"0{number}", np.where(brain, dark + 1, 0).astype(np.float32), affine,
                  suffix="T2w")  # fmt: skip
        made.site(f"0{number}", site)
    for path in made.root.rglob("*_T1w.nii.gz"):
        give_transform(folder / "theirs", path)
    return made, folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["harmonizing-flows", "blindharmony", "hail", "calamiti"])
def test_train_and_harmonize(cohort, method):
    made, folder = cohort
    out = folder / f"out-{method}"
    options = quick(folder / "work", folder / "theirs")
    train = ["train", "--method", method, "--reference", "A", "--max-time", "2"]
    ran = call(made.root, out, *train, *options)
    assert ran.code == 0, ran.out + ran.err
    bundle = load_bundle(out / "models" / f"{method}-A")
    count = 6 if bundle.method.by_example else 3  # of both sites, or of the reference
    assert bundle.meta["training_scans"] == {"T1w": count, "T2w": count}
    ran = call(made.root, out, "participant", "--method", method, "--reference", "A",
               "--participant-label", "04", *options)  # fmt: skip
    assert ran.code == 0, ran.out + ran.err
    assert ran.out.count(": harmonized") == 2
    anat = out / "sub-04" / "anat"
    for modality in ("T1w", "T2w"):
        data, affine = load(anat / f"sub-04_desc-harmonized_{modality}.nii.gz")
        raw, raw_affine = load(made.path("04", modality))
        assert data.shape == raw.shape
        np.testing.assert_allclose(affine, raw_affine, atol=1e-4)
        assert np.isfinite(data).all()
        assert data.min() == 0
        assert not data[raw == 0].any()
        inside = (raw > 0) & load_mask(next(anat.glob("sub-04*desc-brain_mask.nii.gz")))
        ranks = [np.argsort(np.argsort(v[inside])) for v in (data, raw)]
        assert np.corrcoef(*ranks)[0, 1] > 0.9, "anatomy of the scan"
        sidecar = anat / f"sub-04_desc-harmonized_{modality}.json"
        assert json.loads(sidecar.read_text())["Harmonization"]["Reference"] == "A"
    assert (out / "sub-04.html").is_file()
