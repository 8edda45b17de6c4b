"""CALAMITI and its forerunner as methods, with trainings of seconds on synthetic brains."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")

from bids_harmony.errors import ScanError, UsageError  # noqa: E402
from bids_harmony.methods import (  # noqa: E402
    calamiti,
    calamiti_case,
    calamiti_fusion,
    calamiti_training,
    registry,
)
from bids_harmony.methods.base import Training  # noqa: E402
from bids_harmony.methods.bundle import load_bundle, save_bundle  # noqa: E402
from bids_harmony.methods.volume_grid import on_model_grid  # noqa: E402
from bids_harmony.training.plan import Trained  # noqa: E402
from tests.contrast_brains import TISSUES, anatomy, cohort, scan  # noqa: E402
from tests.tiny_calamiti import tiny  # noqa: E402

SHAPE = (24, 28, 24)
VOLUMES = cohort({"a": (1, 2), "b": (4, 5)}, shape=SHAPE)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tolerant(method):
    """The method that refuses nothing: it learned for seconds only."""
    made = type(method).from_state(method.arrays(), method.params())
    known = {m: replace(k, error=1e3) for m, k in made._learned.known.items()}
    known = {
        m: replace(k, thetas=np.concatenate([v.thetas for v in known.values()]))
        for m, k in known.items()
    }
    made._learned = replace(made._learned, known=known)
    return made


def examples(site, modality=None):
    return [v for v in VOLUMES if v.site == site and modality in (None, v.modality)]


@pytest.fixture(scope="module")
def method():
    torch.set_num_threads(1)
    return tiny("calamiti").fit(VOLUMES, seed=0, training=Training("cpu"))


@pytest.fixture(scope="module")
def model(method):
    """For the look of site b."""
    return tolerant(method).towards(examples("b"), seed=0)


@pytest.fixture(scope="module")
def taught():
    """Trained long enough to know the sites' contrasts, for the look of site b; minutes."""
    torch.set_num_threads(1)
    kind = tiny("calamiti", steps=1440, beta_base=8, decoder_base=8, decay=2e-3)
    preset = kind.presets_by_name["cpu"]
    plan = replace(preset.plan, rate=2e-3, every=150)
    kind.presets_by_name = {"cpu": replace(preset, batch=4, plan=plan, start=300)}
    volumes = cohort({"a": range(1, 6), "b": range(11, 16)}, shape=SHAPE)
    method = kind.fit(volumes, seed=0, training=Training("cpu"))
    return method.towards([v for v in volumes if v.site == "b"], seed=0)


SCAN = scan(9, "a", shape=SHAPE)


# --- harmonize


def test_output_contract(model):
    data, mask = SCAN.data.copy(), SCAN.mask.copy()
    result = model.harmonize(SCAN, seed=3)
    assert np.array_equal(SCAN.data, data)
    assert np.array_equal(SCAN.mask, mask)
    assert result.data.dtype == np.float32
    assert result.data.shape == SHAPE
    assert np.isfinite(result.data).all()
    assert result.data.min() >= 0
    assert not result.data[~mask].any()
    assert np.abs(result.data - data).max() > 1e-4
    json.dumps([result.details, result.warnings], allow_nan=False)
    assert result.details["examples"] == [v.name for v in examples("b", "T1w")]
    again = model.harmonize(SCAN, seed=4)
    assert np.array_equal(again.data, result.data)


def test_what_lies_outside_the_mask_has_no_say(model):
    spoiled = replace(SCAN, data=np.where(SCAN.mask, SCAN.data, np.nan).astype(np.float32))
    expected = model.harmonize(SCAN, seed=0).data
    assert np.array_equal(model.harmonize(spoiled, seed=0).data, expected)


def test_a_scan_that_looks_as_wanted_is_left_alone(model):
    """Its own theta is the wanted one: no change, however badly the decoder draws."""
    own = model.towards([SCAN], seed=0)
    assert own.harmonize(SCAN, seed=0).data == pytest.approx(SCAN.data, abs=1e-6)


def test_another_orientation_gives_the_same_result_turned(model):
    def turn(values):
        return np.ascontiguousarray(np.transpose(values, (2, 0, 1))[:, ::-1])

    other = replace(SCAN, data=turn(SCAN.data), mask=turn(SCAN.mask), axes=("S", "L", "A"))
    expected = turn(model.harmonize(SCAN, seed=0).data)
    assert model.harmonize(other, seed=0).data == pytest.approx(expected, abs=1e-5)


def test_the_change_is_bounded_and_told(model, monkeypatch):
    def drawn(networks, image, mask, thetas, side):
        stack = torch.stack([image * mask] * 3)
        return torch.stack([stack, (stack + 5) * mask])

    monkeypatch.setattr(calamiti_case, "draw_brain", drawn)
    result = model.harmonize(SCAN, seed=0)
    change = (result.data - SCAN.data)[SCAN.mask]
    assert change.max() == pytest.approx(0.5, abs=1e-4)
    assert result.details["share_at_bound"] == pytest.approx(1.0, abs=0.01)
    assert any("was cut at 0.5 of the intensity scale" in text for text in result.warnings)


def ideal_decoder(monkeypatch, modality, lesion_like=None):
    """Draws the true anatomy without noise, a little blurred; a lesion as some other tissue."""
    labels, mask = anatomy(9, SHAPE, LESION if lesion_like is not None else None)
    labels = np.where(labels == 3, 0 if lesion_like is None else lesion_like, labels)

    def drawn(networks, image, inside, thetas, side):
        whole = []
        for site in "ab":
            tissue = np.array(TISSUES[site, modality])[labels]
            blurred = ndimage.gaussian_filter(tissue, 0.9).astype(np.float32)
            volume = replace(SCAN, data=np.where(mask, blurred, 0), mask=mask)
            whole.append(torch.from_numpy(on_model_grid(volume, 2.0).data))
        return torch.stack([torch.stack([w * inside] * 3) for w in whole])

    monkeypatch.setattr(calamiti_case, "draw_brain", drawn)
    monkeypatch.setattr(calamiti_case, "fused", lambda fusion, drawn, mask: drawn[0])


LESION = ((12, 18, 15), 2)


def lesion_contrast(data):
    """Of the lesion against the white matter around it."""
    labels, _ = anatomy(9, SHAPE, LESION)
    inside = labels == 3
    near = ndimage.binary_dilation(inside, iterations=3) & (labels == 2)
    near &= ~ndimage.binary_dilation(inside)
    return float(data[inside].mean() - data[near].mean())


@pytest.mark.parametrize("modality", ["T1w", "T2w"])
def test_what_a_good_decoder_draws_reaches_the_scan(model, monkeypatch, modality):
    """A person scanned at both sites: after harmonization the scans differ by less than half."""
    ideal_decoder(monkeypatch, modality)
    seen, truth = (scan(9, site, modality, shape=SHAPE) for site in "ab")
    result = model.harmonize(seen, seed=0).data
    before, after = (np.abs(v - truth.data)[truth.mask].mean() for v in (seen.data, result))
    assert after < 0.5 * before


@pytest.mark.parametrize("modality", ["T1w", "T2w"])
@pytest.mark.parametrize("drawn_as", [0, 1, 2])
def test_a_small_lesion_keeps_its_sign_and_half_of_its_contrast(
    model, monkeypatch, modality, drawn_as
):
    """Whatever tissue the networks, which never saw one, take it for; bright in T2w."""
    ideal_decoder(monkeypatch, modality, lesion_like=drawn_as)
    seen = scan(9, "a", modality, shape=SHAPE, lesion=LESION)
    before = lesion_contrast(seen.data)
    assert abs(before) > 0.2
    assert lesion_contrast(model.harmonize(seen, seed=0).data) / before > 0.5


@pytest.mark.slow
def test_a_training_of_minutes_learns_the_contrasts_of_sites(taught):
    """Two-site persons differ less, a lesion stays, noise is refused; no networks are stubbed."""
    for modality, least in (("T1w", 0.7), ("T2w", 0.7)):
        seen, truth = (scan(9, site, modality, shape=SHAPE) for site in "ab")
        result = taught.harmonize(seen, seed=0)
        before, after = (
            np.abs(v - truth.data)[truth.mask].mean() for v in (seen.data, result.data)
        )
        print(modality, before, after, result.details, result.warnings)
        assert after < least * before
        seen = scan(9, "a", modality, shape=SHAPE, lesion=LESION)
        before, after = (
            lesion_contrast(v) for v in (seen.data, taught.harmonize(seen, seed=0).data)
        )
        print("lesion", before, after)
        assert after / before > 0.5
    values = np.random.default_rng(0).uniform(0, 1, SHAPE).astype(np.float32)
    noise = replace(SCAN, data=values * SCAN.mask, name="x")
    with pytest.raises(ScanError, match=r"x: .*(cannot draw|contrast is that)"):
        print(taught.harmonize(noise, seed=0).details)
    swapped = replace(scan(9, "a", "T2w", shape=SHAPE), modality="T1w", name="x")
    with pytest.raises(ScanError, match=r"x: its contrast is that of T2w scans"):
        taught.harmonize(swapped, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.75, 1.3])
def test_a_tone_that_no_site_has_is_undone(taught, gamma):
    original = scan(21, "b", shape=SHAPE)
    seen = replace(original, data=original.data.clip(0) ** gamma)
    result = taught.harmonize(seen, seed=0).data
    before, after = (np.abs(v - original.data)[original.mask].mean() for v in (seen.data, result))
    print(gamma, before, after)
    assert after < 0.8 * before


# --- refusals


def test_a_model_without_examples_or_of_another_modality_refuses(method):
    with pytest.raises(ScanError, match=r"sub-09_a_T1w: .* no example .*--reference"):
        method.harmonize(SCAN, seed=0)
    with pytest.raises(ScanError, match=r"x: .*trained on T1w, T2w only"):
        method.towards([replace(SCAN, modality="FLAIR", name="x")], seed=0)
    with pytest.raises(ScanError, match=r"no example can be used: no scan was given"):
        method.towards([], seed=0)
    one = tolerant(method).towards(examples("b", "T2w"), seed=0)
    assert one.contract.modalities == ("T2w",)
    with pytest.raises(ScanError, match="no example of how T1w scans"):
        one.harmonize(SCAN, seed=0)


def test_unusable_brains_are_named(model):
    nothing = np.zeros_like(SCAN.mask)
    for volume, words in (
        (replace(SCAN, data=SCAN.mask.astype(np.float32)), "all brain voxels"),
        (replace(SCAN, mask=nothing), "brain mask is empty"),
        (replace(SCAN, mask=SCAN.mask[1:]), "differ in shape"),
        (replace(SCAN, data=np.where(SCAN.mask, np.float32(np.nan), 0)), "NaN"),
    ):
        with pytest.raises(ScanError, match=f"sub-09_a_T1w: .*{words}"):
            model.harmonize(volume, seed=0)


# --- fit


def test_training_sets_that_cannot_be_used():
    kind = tiny("calamiti")
    with pytest.raises(UsageError, match="no preset 'huge'; choose from cpu"):
        kind.fit(VOLUMES, seed=0, training=Training("huge"))
    with pytest.raises(ScanError, match=r"sessions with two modalities.*second modality"):
        kind.fit([v for v in VOLUMES if v.modality == "T1w"], seed=0)
    with pytest.raises(ScanError, match="two subjects or more"):
        kind.fit([v for v in VOLUMES if v.subject == "01"], seed=0)


def test_training_tells_what_it_did(method):
    scores = method.scores()
    json.dumps([scores, method.params()], allow_nan=False)
    assert scores["discriminator"] == "knows site b"  # one of two subjects of site a is held out
    assert (scores["sessions"], scores["held_out_sessions"]) == (3, 1)
    assert scores["networks"]["networks"]["steps"] == 8
    assert int(method._learned.networks.steps) in (4, 8)  # of the best of two looks
    files = method.files()
    assert set(files) == {"curves.csv", "training.png", "theta.tsv", "theta.png"}
    assert files["theta.png"].startswith(b"\x89PNG")
    rows = [line.split("\t") for line in files["theta.tsv"].decode().splitlines()]
    assert sorted(row[0] for row in rows[1:]) == sorted(v.name for v in VOLUMES)
    for row in rows[1:4]:
        volume = next(v for v in VOLUMES if v.name == row[0])
        assert row[1:5] == [volume.site, volume.subject, "n/a", volume.modality]
        assert [float(v) for v in row[5:]] == pytest.approx(method.theta_of(volume), abs=1e-4)


def test_the_forerunner_has_no_discriminator():
    made = tiny("dewey2020", steps=2).fit(examples("a"), seed=0)
    assert made.scores()["discriminator"] == "none: this method has no discriminator"
    assert made._learned.networks.discriminator is None
    assert made.contract.resolution == 2.0


def test_theta_of_the_forerunner_comes_from_the_slice_itself_and_has_no_tones(monkeypatch):
    """Seen where the batches are made."""
    for name, same, tones in (("dewey2020", True, False), ("calamiti", False, True)):
        asked = []
        made = calamiti_training.PairDrawer.__init__

        def note(self, sessions, *, asked=asked, made=made, **options):
            asked.append((options.get("same_slice", False), options.get("tones", False)))
            made(self, sessions, **options)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(calamiti_training.PairDrawer, "__init__", note)
            with pytest.raises(KeyboardInterrupt):
                tiny(name).fit(VOLUMES, seed=0)
        assert asked == [(same, tones)]


def test_scans_without_a_partner_and_a_single_site_are_told(caplog):
    volumes = [*examples("a"), scan(7, "a", shape=SHAPE)]
    with caplog.at_level("INFO", logger="bids_harmony"):
        made = tiny("calamiti", steps=2).fit(volumes, seed=0)
    scores = made.scores()
    assert scores["discriminator"].startswith("left out: it needs the paired scans of two sites")
    assert made._learned.networks.discriminator is None
    assert len(scores["left_out"]) == 1
    assert "sub-07_a_T1w" in scores["left_out"][0]
    assert "sub-07_a_T1w" in caplog.text


def test_the_voxel_median_is_taken_where_the_network_is_worse(monkeypatch, method):
    run = Trained((), 4, 0, 9.0, "all steps")
    monkeypatch.setattr(calamiti_fusion, "train_network", lambda *args, **kwargs: run)
    cohort_ = calamiti.cohort_of(VOLUMES, 2.0)
    preset = type(method).presets_by_name["cpu"]
    networks = method._learned.networks
    fusion, _, scores = calamiti_fusion.train_fusion(
        networks, cohort_, method._learned.side, preset, 0, Training("cpu")
    )
    assert fusion is None
    assert scores["used"] == "voxel median"
    monkeypatch.setattr(
        calamiti_fusion, "train_network", lambda *args, **kwargs: replace(run, best=0.0)
    )
    fusion, _, scores = calamiti_fusion.train_fusion(
        networks, cohort_, method._learned.side, preset, 0, Training("cpu")
    )
    assert fusion is not None
    assert scores["used"] == "network"


# --- examples, adaptation, bundle


def test_theta_as_numbers_is_that_of_examples_with_these_numbers(method, model):
    one, two = (float(v) for v in model.arrays()["T1w/wanted"])
    made = tolerant(method).at_theta({"T1w": (one, two)})
    assert made.contract.modalities == ("T1w",)
    expected = model.harmonize(SCAN, seed=0)
    found = made.harmonize(SCAN, seed=0)
    assert np.array_equal(found.data, expected.data)
    assert found.details["theta_wanted"] == expected.details["theta_wanted"]
    again = type(made).from_state(made.arrays(), json.loads(json.dumps(made.params())))
    assert np.array_equal(again.harmonize(SCAN, seed=0).data, found.data)


@pytest.mark.parametrize(
    ("theta", "words"),
    [
        ({"FLAIR": (0.0, 0.0)}, "was trained on T1w, T2w only"),
        ({"T1w": (0.0,)}, "give two numbers near those of the training scans"),
        ({"T1w": (1e3, 0.0)}, "give two numbers near those of the training scans"),
    ],
)
def test_theta_that_the_networks_do_not_know(method, theta, words):
    with pytest.raises(UsageError, match=words):
        method.at_theta(theta)


def test_the_wanted_theta_is_the_mean_of_the_examples(model):
    for modality in ("T1w", "T2w"):
        thetas = [model.theta_of(v) for v in examples("b", modality)]
        assert model.arrays()[f"{modality}/wanted"] == pytest.approx(np.mean(thetas, axis=0))
    assert model.contract.grid == "MNI152NLin2009aSym"
    assert model.contract.resolution == 2.0


def test_presets_have_their_grids():
    kind = registry.load("calamiti")
    assert kind.contract_for(["T1w"]).resolution == 2.0
    assert kind.contract_for_preset(["T1w"], "paper").resolution == 1.0
    networks = kind.presets_by_name["paper"].networks
    assert (networks["beta_base"], networks["decoder_base"], networks["levels"]) == (8, 16, 4)


def test_adaptation_changes_the_last_layers_of_the_encoders_alone(model):
    before = {k: v.copy() for k, v in model.arrays().items()}
    new = cohort({"b": (20, 21)}, shape=SHAPE)
    new = [replace(v, site="c") for v in new]
    adapted = model.fine_tuned(new, seed=0)
    assert all(np.array_equal(v, before[k]) for k, v in model.arrays().items())
    parameters = {f"networks/{k}" for k, _ in model._learned.networks.named_parameters()}
    after = adapted.arrays()
    changed = {k for k in parameters if not np.array_equal(after[k], before[k])}
    last = ("networks/beta.up.1.", "networks/beta.head.", "networks/theta.head.")
    assert changed == {k for k in parameters if k.startswith(last)} - still(changed, parameters)
    judge = [k for k in before if "discriminator" in k]
    assert all(np.array_equal(after[k], before[k]) for k in judge)  # buffers too
    assert np.array_equal(after["T1w/wanted"], before["T1w/wanted"])
    assert len(after["T1w/thetas"]) == len(before["T1w/thetas"]) + 2
    scores = adapted.scores()["adaptation"]
    assert scores["sites"] == ["c"]
    assert scores["best_held_out"] < scores["best_held_out_before"]
    with pytest.raises(ScanError, match="adapted to site c: give another reference"):
        adapted.towards(new, seed=0)
    with pytest.raises(ScanError, match="adapted once, to scans of one site"):
        adapted.fine_tuned(new, seed=0)
    again = type(model).from_state(adapted.arrays(), adapted.params())
    warned = [" ".join(m.harmonize(SCAN, seed=0).warnings) for m in (again, model)]
    assert "adapted to site c" in warned[0]
    assert "adapted" not in warned[1]
    with pytest.raises(ScanError, match="two modalities"):
        model.fine_tuned([v for v in new if v.modality == "T1w"], seed=0)


def still(changed, parameters):
    """Biases before an instance norm, which have no effect and hence no gradient."""
    return {
        k for k in parameters - changed if k.endswith(("beta.up.1.0.bias", "beta.up.1.3.bias"))
    }


def test_bundle_round_trip(model, tmp_path, monkeypatch):
    kind = registry.load(model.name)
    monkeypatch.setattr(kind, "presets_by_name", type(model).presets_by_name)
    made = kind.from_state(model.arrays(), model.params())
    save_bundle(tmp_path / "m", made, meta={}, files={"theta.tsv": b"name\n"})
    loaded = load_bundle(tmp_path / "m").method
    assert np.array_equal(loaded.harmonize(SCAN, seed=0).data, model.harmonize(SCAN, seed=0).data)
    assert loaded.harmonize(SCAN, seed=0).details == model.harmonize(SCAN, seed=0).details
    assert loaded.scores() == model.scores()
    spoiled = {k: v for k, v in model.arrays().items() if not k.startswith("networks/theta")}
    with pytest.raises(ScanError, match="not those of the networks network"):
        kind.from_state(spoiled, model.params())
