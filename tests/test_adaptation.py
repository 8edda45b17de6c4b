"""Adaptations on disk: whole or not at all, read back exactly, damage is named."""

import json

import numpy as np
import pytest

from bids_harmony.errors import HarmonyError, MissingInputError, OutputError, UsageError
from bids_harmony.methods.adaptation import load_adaptation, save_adaptation
from bids_harmony.methods.base import Adaptation
from bids_harmony.methods.bundle import is_bundle

FACTS = {"site": "B", "modality": "T1w", "model": "ab12", "scans": [{"name": "sub-1_T1w"}]}


def learned(value=1.5):
    arrays = {"a/shift": np.array([value, 2.0], np.float32), "n": np.arange(3)}
    return Adaptation(arrays, {"bpd_before": 3.0, "bpd_after": 2.5, "steps": 4})


@pytest.fixture
def folder(tmp_path):
    return save_adaptation(tmp_path / "models" / "adapted" / "B_T1w", learned(), facts=FACTS)


def test_round_trip(folder):
    found = load_adaptation(folder)
    assert found.facts == FACTS
    assert found.adaptation.details == learned().details
    for key, value in learned().arrays.items():
        np.testing.assert_array_equal(found.adaptation.arrays[key], value)
        assert found.adaptation.arrays[key].dtype == value.dtype
    assert sorted(p.name for p in folder.iterdir()) == ["adaptation.json", "weights.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert not is_bundle(folder)
    assert not is_bundle(folder.parent)


def test_equal_input_equal_hash(folder, tmp_path):
    twin = save_adaptation(tmp_path / "twin", learned(), facts=dict(reversed(FACTS.items())))
    assert load_adaptation(twin).hash == load_adaptation(folder).hash
    other = save_adaptation(tmp_path / "other", learned(1.6), facts=FACTS)
    assert load_adaptation(other).hash != load_adaptation(folder).hash
    other = save_adaptation(tmp_path / "other", learned(), facts={**FACTS, "site": "C"})
    assert load_adaptation(other).hash != load_adaptation(folder).hash


def test_replaced_only_where_it_is_ours(folder, tmp_path):
    save_adaptation(folder, learned(9), facts=FACTS)
    assert load_adaptation(folder).adaptation.arrays["a/shift"][0] == 9
    (folder / "weights.safetensors").unlink()  # damaged: still ours
    save_adaptation(folder, learned(8), facts=FACTS)
    assert load_adaptation(folder).adaptation.arrays["a/shift"][0] == 8
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "scan.nii.gz").write_text("x")
    with pytest.raises(OutputError, match="not a stored adaptation"):
        save_adaptation(precious, learned(), facts=FACTS)
    assert (precious / "scan.nii.gz").read_text() == "x"


def test_failed_write_leaves_the_old_one(folder, monkeypatch):
    before = load_adaptation(folder).hash
    monkeypatch.setattr(
        "pathlib.Path.write_bytes", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OutputError, match="disk full"):
        save_adaptation(folder, learned(9), facts=FACTS)
    monkeypatch.undo()
    assert load_adaptation(folder).hash == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_what_cannot_be_stored(tmp_path):
    with pytest.raises(HarmonyError, match="not JSON"):
        save_adaptation(tmp_path / "a", Adaptation({}, {"bpd": float("nan")}), facts=FACTS)
    with pytest.raises(HarmonyError, match="x of the adaptation is not finite"):
        save_adaptation(tmp_path / "a", Adaptation({"x": np.array([np.inf])}, {}), facts=FACTS)
    assert not (tmp_path / "a").exists()


def flip(folder):
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def edit(folder, **changes):
    path = folder / "adaptation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "bit flip": (flip, "damaged"),
    "cut": (lambda f: (f / "weights.safetensors").write_bytes(b"1234567"), "damaged"),
    "json": (lambda f: (f / "adaptation.json").write_text("{"), "damaged"),
    "list": (lambda f: (f / "adaptation.json").write_text("[]"), "damaged"),
    "keys": (lambda f: (f / "adaptation.json").write_text("{}"), "damaged"),
    "schema": (lambda f: edit(f, schema_version=9), "schema 9, .* reads 1"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(folder, name):
    spoil, message = DAMAGE[name]
    spoil(folder)
    with pytest.raises(UsageError, match=message) as caught:
        load_adaptation(folder)
    assert str(folder) in str(caught.value)


def test_missing(folder):
    (folder / "weights.safetensors").unlink()
    with pytest.raises(MissingInputError, match=r"weights\.safetensors"):
        load_adaptation(folder)
