"""Training of neural methods from the command: presets, time, resuming, what the bundle holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel as nb
import pytest
import tiny_neural
from conftest import call, quick

from bids_harmony.methods.bundle import load_bundle


@pytest.fixture(scope="module", autouse=True)
def plugin(tmp_path_factory):
    """The plug-in, seen by this process only."""
    root = str(tiny_neural.install(tmp_path_factory.mktemp("site")))
    sys.path.insert(0, root)
    yield root
    sys.path.remove(root)
    for name in [name for name in sys.modules if name.startswith("tiny_plugin")]:
        del sys.modules[name]


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Lines that the plug-in wrote since the last call."""
    path = tmp_path / "tiny.log"
    path.touch()
    monkeypatch.setenv("TINY_LOG", str(path))

    def lines():
        found = path.read_text().splitlines()
        path.write_text("")
        return found

    return lines


@pytest.fixture(scope="module")
def works(tmp_path_factory, tiny, transforms):
    """Work folder with stored volumes, shared by the tests."""
    folder = tmp_path_factory.mktemp("works")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_LOG", str(folder / "log"))
        assert train(tiny, transforms, folder, folder / "out").code == 0
    return folder


def train(tiny, transforms, work, out, *options):
    argv = ["--method", "tiny", "--reference", "A", *quick(work, transforms), *options]
    return call(tiny.root, out, "train", *argv)


STEPS = [f"step {n}" for n in range(1, 6)]


def test_bundle_of_a_neural_method(tiny, transforms, works, tmp_path, log):
    ran = train(tiny, transforms, works, tmp_path / "out", "--max-time", "7", "--nprocs", "2")
    assert ran.code == 0, ran.out + ran.err
    assert log() == ["fit cpu 7 cpu 2", *STEPS]
    folder = tmp_path / "out" / "models" / "tiny-A"
    assert (folder / "curves.csv").read_bytes() == b"step,loss\n1,0.5\n"
    assert (folder / "training.png").read_bytes() == tiny_neural.PNG
    card = (folder / "README.md").read_text()
    assert "![training.png](training.png)" in card
    assert "[curves.csv](curves.csv)" in card
    assert "psnr_db 31.25" in card
    bundle = load_bundle(folder)
    assert bundle.meta["scores"]["psnr_db"] == 31.25
    assert bundle.meta["training"] == {
        "preset": "cpu", "device": "cpu", "options": {"pull": 0.9}
    }  # fmt: skip
    assert bundle.method.contract.resolution == 4
    assert not list((works / "training").glob("tiny-*")), "checkpoints of a finished training"


def test_paper_preset_has_its_own_grid(tiny, transforms, works, tmp_path, log):
    options = ["--preset", "paper", "--no-clean-workdir", "--name", "big"]
    ran = train(tiny, transforms, works, tmp_path / "out", *options)
    assert ran.code == 0, ran.out + ran.err
    assert log() == ["fit paper None cpu 1", *(f"step {n}" for n in range(1, 9))]
    bundle = load_bundle(tmp_path / "out" / "models" / "big")
    assert bundle.method.contract.resolution == 5
    assert bundle.meta["training"]["preset"] == "paper"
    (kept,) = (works / "training").glob("tiny-*")
    assert json.loads((kept / "state.json").read_text())[0] == 8


def test_killed_training_resumes_and_a_changed_one_starts_anew(
    tiny, transforms, works, tmp_path, log, monkeypatch
):
    monkeypatch.setenv("TINY_STOP", "3")
    ran = train(tiny, transforms, works, tmp_path / "out")
    assert (ran.code, "the same command resumes" in ran.err) == (130, True)
    assert log()[1:] == STEPS[:3]
    assert not list((tmp_path / "out").rglob("model.json"))
    monkeypatch.delenv("TINY_STOP")
    ran = train(tiny, transforms, works, tmp_path / "out", "--random-seed", "5", "--name", "five")
    assert ran.code == 0, ran.out + ran.err
    assert log()[1:] == STEPS
    ran = train(tiny, transforms, works, tmp_path / "out")
    assert ran.code == 0, ran.out + ran.err
    assert log()[1:] == STEPS[3:]
    whole = train(tiny, transforms, works, tmp_path / "other")
    assert whole.code == 0
    assert log()[1:] == STEPS
    hashes = [load_bundle(tmp_path / o / "models" / "tiny-A").hash for o in ("out", "other")]
    assert hashes[0] == hashes[1]


def test_memory_that_runs_out_is_told_in_one_line(
    tiny, transforms, works, tmp_path, log, monkeypatch
):
    monkeypatch.setenv("TINY_ERROR", "CUDA out of memory. Tried to allocate 20 GiB")
    ran = train(tiny, transforms, works, tmp_path / "out")
    assert ran.code == 1
    assert "training tiny with the preset cpu ran out of memory on cpu; take a smaller" in ran.err
    monkeypatch.setenv("TINY_ERROR", "some bug")
    with pytest.raises(RuntimeError, match="some bug"):
        train(tiny, transforms, works, tmp_path / "out")


def test_options_of_a_method(tiny, transforms, works, tmp_path, log):
    out = tmp_path / "out"
    ran = train(tiny, transforms, works, out, "--method-option", "pull=.5")
    assert ran.code == 0, ran.out + ran.err
    assert load_bundle(out / "models" / "tiny-A").meta["training"]["options"] == {"pull": 0.5}
    usual = load_bundle(works / "out" / "models" / "tiny-A")
    assert usual.meta["training"]["options"] == {"pull": 0.9}
    half = load_bundle(out / "models" / "tiny-A").method.mean
    assert half / usual.method.mean == pytest.approx((1 - 0.5**5) / (1 - 0.1**5))
    harmonize = ["--model", "tiny-A", "--adapt", "none", "--participant-label", "01"]
    harmonize += quick(works, transforms)
    means = []
    half_boost = ["--method-option", "boost=.5"]
    for options, desc in (([], "harmonized"), ([*half_boost, "--desc", "half"], "half")):
        ran = call(tiny.root, out, "participant", *harmonize, *options)
        assert ran.code == 0, ran.out + ran.err
        (path,) = out.glob(f"sub-01/**/*_desc-{desc}_T1w.nii.gz")
        means.append(nb.load(path).get_fdata().mean())
        made = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
        assert made["Harmonization"]["MethodOptions"] == {"boost": 0.5 if options else 1.0}
    assert means[1] < 0.6 * means[0]
    ran = call(tiny.root, out, "participant", *harmonize, *half_boost)
    assert ran.code == 64
    assert "with --method-option boost=1 under desc-harmonized, not --method-option boost=0.5" in (
        ran.err
    )


def test_dry_run_says_how_it_would_train(tiny, transforms, works, tmp_path, log):
    ran = train(tiny, transforms, works, tmp_path / "out", "--dry-run", "--preset", "paper")
    assert ran.code == 0, ran.err
    assert "would fit tiny on A with the preset paper on cpu" in ran.out
    assert log() == []


@pytest.mark.parametrize(
    ("level", "options", "told"),
    [
        ("train", ["--method", "nyul", "--preset", "paper"], "nyul is fitted in one step"),
        ("train", ["--max-time", "3"], "are for neural methods; nyul is fitted in one step"),
        ("train", ["--method", "tiny", "--preset", "huge"], "invalid choice: 'huge'"),
        ("train", ["--method", "tiny", "--max-time", "0"], "invalid _positive value"),
        ("train", ["--method", "tiny", "--name", "adapted"], "where adaptations to sites are"),
        ("train", ["--method", "tiny", "--adapt", "site"], "are for participant"),
        ("train", ["--method", "nyul", "--method-option", "a=1"], "nyul has no options"),
        ("train", ["--method", "tiny", "--method-option", "a=1"], "tiny has pull, boost"),
        ("train", ["--method", "tiny", "--method-option", "boost=1"], "boost is for participant"),
        ("train", ["--method", "tiny", "--method-option", "pull=2"], "number from 0 to 1"),
        ("train", ["--method", "tiny", "--method-option", "pull"], "number from 0 to 1"),
        ("train", ["--method", "tiny", "--method-option", "pull=1", "pull=0"], "pull once"),
        ("train", ["--model", "tiny-A", "--method-option", "pull=1"], "leave out --preset"),
        ("train", ["--method", "tiny", "--adapt-scans", "2"], "are for participant"),
        ("participant", ["--method", "tiny", "--preset", "cpu"], "are for train"),
        ("participant", ["--method", "tiny", "--max-time", "3"], "are for train"),
        ("participant", ["--method", "nyul", "--adapt", "scan"], "nyul does not adapt to sites"),
        ("participant", ["--method", "nyul", "--adapt-scans", "1"], "nyul does not adapt"),
        ("participant", ["--method", "tiny", "--adapt", "no"], "invalid choice: 'no'"),
        ("train", ["--method", "tiny", "--adapt-segmentation", "x.pt"], "are for participant"),
        ("participant", ["--method", "nyul", "--adapt-segmentation", "x.pt"], "does not adapt"),
        (
            "participant",
            ["--method", "blindharmony", "--adapt-segmentation", "x.pt"],
            "blindharmony takes no segmentation",
        ),
        (
            "participant",
            ["--method", "tiny", "--adapt", "none", "--adapt-segmentation", "x.pt"],
            "is for --adapt site or scan, not --adapt none",
        ),
        (
            "participant",
            ["--method", "tiny", "--adapt", "none", "--adapt-scans", "2"],
            "is for --adapt site, not --adapt none",
        ),
    ],
)
def test_options_that_make_no_sense(tiny, tmp_path, log, level, options, told):
    argv = ["--reference", "A", "-w", str(tmp_path / "work"), *options]
    ran = call(tiny.root, tmp_path / "out", level, *argv)
    assert ran.code == 64, ran.out + ran.err
    if "_positive" not in told:
        assert told in ran.err
    assert not log()
    assert not list((tmp_path / "out").rglob("model.json"))


@pytest.mark.parametrize("option", [["--adapt", "site"], ["--adapt-segmentation", "x.pt"]])
def test_minimal_level_adapts_nothing(tiny, tmp_path, option):
    argv = ["--level", "minimal", *option, "-w", str(tmp_path / "work")]
    ran = call(tiny.root, tmp_path / "out", "participant", *argv)
    assert (ran.code, "--level minimal harmonizes nothing" in ran.err) == (64, True)


@pytest.fixture
def needy(plugin):
    """The plug-in's card names a module that is not installed."""
    card = Path(plugin) / "tiny_plugin" / "tiny.toml"
    text = card.read_text()
    more = '["no_such_torch"]\ninstall = "tiny[neural]"'
    card.write_text(text.replace('["numpy"]', more))
    yield
    card.write_text(text)


CURE = "needs no_such_torch, not installed here: pip install 'tiny[neural]'"


def test_a_missing_library_is_told_at_the_start(tiny, transforms, works, tmp_path, log, request):
    out = tmp_path / "out"
    assert train(tiny, transforms, works, out).code == 0
    log()
    request.getfixturevalue("needy")
    work = tmp_path / "work"
    rest = quick(work, transforms)
    for argv in (
        ["train", "--method", "tiny", "--reference", "B", *rest],
        ["train", "--method", "tiny", "--reference", "B", "--dry-run", *rest],
        ["participant", "--method", "tiny", "--reference", "B", *rest],
        ["participant", "--model", "tiny-A", *rest],
    ):
        ran = call(tiny.root, out, *argv)
        assert ran.code == 64
        (line,) = [text for text in ran.err.splitlines() if "error" in text]
        assert CURE in line
        assert "Traceback" not in ran.err + ran.out
    assert not list(work.glob("bids_harmony_*"))
    # another method is not disturbed by a bundle that it does not need
    ran = call(tiny.root, out, "participant", "--method", "nyul", "--dry-run", *rest)
    assert ran.code == 0, ran.err


def test_reference_of_a_participant_run_is_trained_first(tiny, transforms, works, tmp_path, log):
    argv = ["--method", "tiny", "--reference", "A", *quick(works, transforms)]
    argv += ["--participant-label", "01", "--nprocs", "2"]
    ran = call(tiny.root, tmp_path / "out", "participant", *argv)
    assert ran.code == 0, ran.out + ran.err
    assert "fitting tiny on A first" in ran.out
    assert log() == ["fit cpu None cpu 2", *STEPS]
    anat = tmp_path / "out" / "sub-01" / "anat"
    record = json.loads((anat / "sub-01_desc-harmonized_T1w.json").read_text())["Harmonization"]
    assert record["Details"] == {"gain": 1.0, "device": "cpu", "threads": 1}
    assert record["Adaptation"] == {"scope": "none", "reason": "training has seen the site"}
