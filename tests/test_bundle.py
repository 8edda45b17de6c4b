"""Bundles: same bytes for same content, read back exactly, damage is named."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

import bids_harmony
from bids_harmony.errors import MissingInputError, OutputError, ScanError, UsageError
from bids_harmony.imaging.scale import IntensityScale
from bids_harmony.methods import registry
from bids_harmony.methods.base import Volume
from bids_harmony.methods.bundle import bundle_method, is_bundle, load_bundle, save_bundle

META = {
    "name": "site A",
    "reference_site": "A",
    "training_sites": ["A"],
    "training_subjects": 2,
    "seed": 42,
    "scores": {"psnr_db": 31.5, "ssim": 0.97},
    "licence": "CC0",
    "output_scale": {"T1w": {"kind": "robust", "low": 0.0, "high": 1250.0}},
}


def volume(seed, modality="T1w"):
    rng = np.random.default_rng(seed)
    mask = np.zeros((20, 22, 12), bool)
    mask[3:17, 3:19, 2:10] = True
    core = np.zeros(mask.shape)
    core[6:14, 6:16, 4:8] = 0.3
    data = np.where(mask, 0.5 + core + rng.normal(0, 0.04, mask.shape), 0)
    return Volume(data.astype(np.float32), mask, modality, name=f"sub-{seed}")


def model(name):
    return registry.load(name).fit([volume(1), volume(2), volume(3, "T2w")], seed=0)


@pytest.fixture
def bundle(tmp_path):
    return save_bundle(tmp_path / "models" / "a", model("nyul"), meta=META)


STATISTICAL = [n for n, card in registry.available().items() if card.kind == "statistical"]


@pytest.mark.parametrize("name", STATISTICAL)
def test_round_trip_gives_identical_output(name, tmp_path):
    method = model(name)
    folder = save_bundle(tmp_path / "b", method, meta=META)
    loaded = load_bundle(folder)
    assert type(loaded.method) is type(method)
    assert loaded.method.contract == method.contract
    assert loaded.meta == META
    scan = replace(volume(9), data=volume(9).data * np.float32(0.8))
    expected = method.harmonize(scan, seed=0)
    assert np.array_equal(loaded.method.harmonize(scan, seed=0).data, expected.data)
    for key, value in method.arrays().items():
        assert np.array_equal(loaded.method.arrays()[key], value)


def test_hash_and_output_scale(bundle):
    loaded = load_bundle(bundle)
    content = (bundle / "model.json").read_bytes() + (bundle / "weights.safetensors").read_bytes()
    assert loaded.hash == hashlib.sha256(content).hexdigest()
    assert loaded.output_scale == {"T1w": IntensityScale("robust", 0.0, 1250.0)}


def test_equal_input_gives_equal_bytes(bundle, tmp_path):
    shuffled = dict(reversed(META.items()))
    twin = save_bundle(tmp_path / "twin", model("nyul"), meta=shuffled)
    for name in ("model.json", "weights.safetensors", "README.md"):
        assert (twin / name).read_bytes() == (bundle / name).read_bytes()
    other = save_bundle(tmp_path / "other", model("nyul"), meta={**META, "seed": 43})
    assert load_bundle(other).hash != load_bundle(bundle).hash


def test_saving_again_replaces_the_whole_bundle(bundle):
    (bundle / "leftover.txt").write_text("old")
    save_bundle(bundle, model("zscore"), meta=META)
    assert load_bundle(bundle).method.name == "zscore"
    assert sorted(p.name for p in bundle.iterdir()) == [
        "README.md",
        "model.json",
        "weights.safetensors",
    ]
    assert [p.name for p in bundle.parent.iterdir()] == [bundle.name]  # no temporary folder


def test_other_folders_are_not_overwritten(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    save_bundle(folder, model("nyul"), meta=META)  # empty: fine
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "scan.nii.gz").write_text("x")
    with pytest.raises(OutputError, match="not a model bundle"):
        save_bundle(precious, model("nyul"), meta=META)
    assert (precious / "scan.nii.gz").read_text() == "x"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(OutputError, match="not a model bundle"):
        save_bundle(file, model("nyul"), meta=META)
    with pytest.raises(OutputError, match="cannot write"):
        save_bundle(file / "below", model("nyul"), meta=META)


def test_failed_write_leaves_the_old_bundle(bundle, monkeypatch):
    before = load_bundle(bundle).hash
    monkeypatch.setattr(
        "pathlib.Path.write_bytes", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OutputError, match="disk full"):
        save_bundle(bundle, model("zscore"), meta=META)
    monkeypatch.undo()
    assert load_bundle(bundle).hash == before
    assert [p.name for p in bundle.parent.iterdir()] == [bundle.name]


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()])
def test_meta_must_be_finite_json(tmp_path, value):
    with pytest.raises(UsageError, match="not JSON"):
        save_bundle(tmp_path / "b", model("nyul"), meta={"value": value})
    assert not (tmp_path / "b").exists()


def test_output_scale_is_checked_when_saved(tmp_path):
    with pytest.raises(ScanError, match="not an intensity scale"):
        save_bundle(tmp_path / "b", model("nyul"), meta={"output_scale": {"T1w": {"low": 0}}})
    with pytest.raises(UsageError, match="a scale per modality"):
        save_bundle(tmp_path / "b", model("nyul"), meta={"output_scale": [1]})


def test_model_card(bundle):
    text = (bundle / "README.md").read_text()
    for part in ("# site A", "`nyul`", "T1w, T2w", "psnr_db 31.5", "CC0", "0 to 1250", "Citation"):
        assert part in text


FILES = {"curves.csv": b"a,b\n", "training.png": b"\x89PNG", "drawing.svg": b"<svg/>"}


def test_further_files_are_written_whole_and_shown(tmp_path):
    folder = save_bundle(tmp_path / "b", model("nyul"), meta=META, files=FILES)
    for name, content in FILES.items():
        assert (folder / name).read_bytes() == content
    card = (folder / "README.md").read_text()
    for line in ("![training.png](training.png)", "![drawing.svg](drawing.svg)"):
        assert line in card
    assert "[curves.csv](curves.csv)" in card
    plain = save_bundle(tmp_path / "plain", model("nyul"), meta=META)
    assert load_bundle(plain).hash == load_bundle(folder).hash  # nothing reads them
    save_bundle(folder, model("nyul"), meta=META)
    assert not (folder / "curves.csv").exists()


@pytest.mark.parametrize(
    "name",
    [
        "model.json", "Model.JSON", "README.md", "weights.safetensors", "a/b.csv", "../b.csv",
        ".hidden.csv", "run.py", "run.csv.py", "x.html", "no_suffix", "", "a b.txt",
    ],
)  # fmt: skip
def test_further_files_have_safe_names(tmp_path, name):
    with pytest.raises(UsageError, match="cannot be a file of a model bundle"):
        save_bundle(tmp_path / "b", model("nyul"), meta=META, files={name: b"x"})
    assert not (tmp_path / "b").exists()


def test_further_files_are_bytes(tmp_path):
    with pytest.raises(UsageError, match="is bytes, not str"):
        save_bundle(tmp_path / "b", model("nyul"), meta=META, files={"a.txt": "x"})


SHIPPED = Path(bids_harmony.__file__).parent / "data" / "models"


@pytest.mark.parametrize("folder", sorted(SHIPPED.iterdir()), ids=lambda folder: folder.name)
def test_shipped_bundles_can_be_loaded(folder):
    assert load_bundle(folder).method.contract.modalities


def test_a_bundle_from_before_a_field_of_the_contract_came(bundle):
    path = bundle / "model.json"
    content = json.loads(path.read_text())
    del content["contract"]["labels"]
    path.write_text(json.dumps(content))
    assert load_bundle(bundle).method.contract.labels is False
    del content["contract"]["grid"]  # its default is not what this one has
    path.write_text(
        json.dumps({**content, "contract": {**content["contract"], "scale": "minmax"}})
    )
    with pytest.raises(UsageError, match="its contract is not the one of the method"):
        load_bundle(bundle)


def test_method_of_a_bundle_without_loading_it(bundle):
    (bundle / "weights.safetensors").write_bytes(b"")
    assert bundle_method(bundle) == "nyul"


def edit(bundle, **changes):
    path = bundle / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reweigh(bundle, arrays, *, forms=True):
    """Replace the weights consistently, so that only their meaning is wrong."""
    data = save(arrays)
    (bundle / "weights.safetensors").write_bytes(data)
    digest = {"file": "weights.safetensors", "sha256": hashlib.sha256(data).hexdigest()}
    named = {k: {"shape": list(v.shape), "dtype": str(v.dtype)} for k, v in arrays.items()}
    edit(bundle, weights=digest, **({"arrays": named} if forms else {}))


def flip(bundle):
    path = bundle / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def not_safetensors(bundle):
    data = b"not weights"
    (bundle / "weights.safetensors").write_bytes(data)
    edit(bundle, weights={"sha256": hashlib.sha256(data).hexdigest()})


NYUL = {"T1w/landmarks": np.arange(11.0), "T2w/landmarks": np.arange(11.0)}
DAMAGE = {
    "bit flip": (flip, "damaged"),
    "truncated json": (lambda b: (b / "model.json").write_text("{"), "not valid JSON"),
    "json list": (lambda b: (b / "model.json").write_text("[]"), "schema None"),
    "schema": (lambda b: edit(b, schema_version=99), r"schema 99, .* reads 1"),
    "method": (lambda b: edit(b, method="hail2"), "'hail2', which is not installed"),
    "key": (lambda b: edit(b, params=3), "params missing or broken"),
    "contract": (lambda b: edit(b, contract={"grid": "moon"}), "contract is not the one"),
    "params": (lambda b: edit(b, params={}), "do not fit the method 'nyul'"),
    "counts": (lambda b: edit(b, params={"reference_volumes": [1]}), "do not fit"),
    "not weights": (not_safetensors, "not a safetensors file"),
    "other arrays": (lambda b: reweigh(b, {"x": np.ones(2)}, forms=False), "name other arrays"),
    "short": (
        lambda b: reweigh(b, {k: v[:5] for k, v in NYUL.items()}),
        "must be 11 increasing landmarks",
    ),
    "falling": (lambda b: reweigh(b, {k: -v for k, v in NYUL.items()}), "increasing landmarks"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(bundle, name):
    spoil, message = DAMAGE[name]
    spoil(bundle)
    with pytest.raises(UsageError, match=message) as caught:
        load_bundle(bundle)
    assert str(bundle) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_control_for_the_damage_cases(bundle):
    """The helpers above write a bundle that loads when nothing is wrong."""
    reweigh(bundle, NYUL)
    assert load_bundle(bundle).method.arrays()["T1w/landmarks"][3] == 3


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
def test_missing_files(bundle, name):
    assert is_bundle(bundle)
    (bundle / name).unlink()
    assert not is_bundle(bundle)
    with pytest.raises(MissingInputError, match=name):
        load_bundle(bundle)
    with pytest.raises(MissingInputError, match="nowhere"):
        load_bundle(bundle.parent / "nowhere")
