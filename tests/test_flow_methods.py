"""The contract of neural methods, for Harmonizing Flows and BlindHarmony with tiny trainings."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")

from bids_harmony.errors import ScanError, UsageError  # noqa: E402
from bids_harmony.imaging.tone import ToneCurve, composed  # noqa: E402
from bids_harmony.methods import registry  # noqa: E402
from bids_harmony.methods.base import Adaptation, NeuralMethod, Training  # noqa: E402
from bids_harmony.methods.bundle import load_bundle, save_bundle  # noqa: E402
from bids_harmony.methods.flow_optimization import Weights  # noqa: E402
from bids_harmony.methods.lazy_volumes import Chosen  # noqa: E402
from bids_harmony.methods.likelihood import Normal  # noqa: E402
from bids_harmony.methods.reference_brains import layout_of, split_by_subject  # noqa: E402
from bids_harmony.training.plan import Plan  # noqa: E402
from tests import flow_brains  # noqa: E402

NAMES = ["harmonizing-flows", "blindharmony"]
FLOWS = {
    "harmonizing-flows": {
        "widths": (6,), "blocked": True, "split": True, "noise_couplings": 0,
    },
    "blindharmony": {"levels": 1, "steps": 2, "hidden": 4, "blocks": 1},
}  # fmt: skip


SHAPE = (32, 40, 32)


def brain(seed=0, **look):
    return flow_brains.brain(seed, shape=SHAPE, **look)


def tiny(name):
    """The method with a preset of seconds."""
    kind = registry.load(name)
    preset = kind.presets_by_name["cpu"]
    plan = Plan(8, 2e-3, every=4, half=False)
    small = replace(preset, batch=4, tone_samples=24, tone_epochs=2, flow=FLOWS[name],
                    flow_plan=plan)  # fmt: skip
    if preset.harmonizer_plan is not None:
        shape = {"slices": 3, "widths": (4, 8), "activation": "leaky-relu"}
        small = replace(small, harmonizer=shape, harmonizer_plan=plan)
    members = {"presets_by_name": {"cpu": small}, "__module__": __name__}
    if name == "harmonizing-flows":
        members["adaptation_plan"] = replace(
            kind.adaptation_plan, steps=4, every=2, rate=1e-3, batch=2, checks=4, tie=0.0,
            edges=0.0, gain=1e-6, least_edges=0.5,
        )  # fmt: skip
    else:
        members["__init__"] = short
    return type(kind.__name__, (kind,), members)


def short(self, parts, preset):
    """Two iterations instead of ten."""
    type(self).__mro__[1].__init__(self, parts, preset)
    self._weights = {modality: Weights(iterations=2) for modality in parts}


REFERENCE = [brain(seed) for seed in (1, 2, 3, 4)]
KINDS = {name: tiny(name) for name in NAMES}


def train(name, volumes=REFERENCE, seed=0, **training):
    return KINDS[name].fit(volumes, seed=seed, training=Training("cpu", **training))


def tolerant(method):
    """The method that refuses nothing and trusts its curve: it learned for seconds only."""
    made = type(method).from_state(method.arrays(), method.params())
    for part in made._parts.values():
        part.normal = part.smooth = Normal(1e3, 0.0)
        part.tone = replace(part.tone, doubt=0.0)
    if method.name == "blindharmony":
        made._weights = {modality: Weights(iterations=2) for modality in made._parts}
    return made


@pytest.fixture(scope="module", params=NAMES)
def method(request):
    torch.set_num_threads(1)
    return train(request.param)


@pytest.fixture(scope="module")
def model(method):
    return tolerant(method)


@pytest.fixture
def scan():
    return brain(9, gamma=0.8, noise=0.04)


def turned(volume, codes):
    way = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt(("R", "A", "S")), nib.orientations.axcodes2ornt(codes)
    )
    data, mask = (
        np.ascontiguousarray(nib.orientations.apply_orientation(v, way))
        for v in (volume.data, volume.mask)
    )
    return replace(volume, data=data, mask=mask, axes=codes), way


# --- harmonize


def heavy_below(volume):
    """The brain without its lower corners: upside down is another brain."""
    mask = volume.mask.copy()
    mask[:, : SHAPE[1] // 2, : SHAPE[2] // 3] = False
    return replace(volume, mask=mask, data=np.where(mask, volume.data, 0))


def test_a_brain_that_lies_turned_is_refused(model, scan):
    """In its own orientation the same brain is taken, however its array is stored."""
    cut = [heavy_below(v) for v in (*REFERENCE, scan)]
    made = tolerant(model)
    (part,) = made._parts.values()
    groups = split_by_subject(cut[:-1], part.resolution)
    toned = [brain for group in groups for brain in group.toned(part.tone)]
    part.layout = layout_of(toned, [size for group in groups for size in group.spacings])
    stored, _ = turned(cut[-1], ("L", "S", "P"))
    for right in (cut[-1], stored):
        assert made.harmonize(right, seed=0).data.max() > 0
    wrong = replace(cut[-1], data=cut[-1].data[:, :, ::-1], mask=cut[-1].mask[:, :, ::-1])
    with pytest.raises(ScanError, match=r"lies turned: .* right, anterior, inferior .* correct"):
        made.harmonize(wrong, seed=0)


def test_output_contract(model, scan):
    data, mask = scan.data.copy(), scan.mask.copy()
    result = model.harmonize(scan, seed=3)
    assert np.array_equal(scan.data, data)
    assert np.array_equal(scan.mask, mask)
    assert result.data.dtype == np.float32
    assert result.data.shape == SHAPE
    assert np.isfinite(result.data).all()
    assert result.data.min() >= 0
    assert not result.data[~mask].any()
    assert np.abs(result.data - data).max() > 0.01
    json.dumps([result.details, result.warnings], allow_nan=False)
    bits = result.details["bits_per_dimension"]
    assert {"input", "tone", "output", "held_out_reference"} <= set(bits)


def test_same_seed_same_voxels(model, scan):
    one = model.harmonize(scan, seed=3)
    torch.rand(7)
    two = model.harmonize(scan, seed=3)
    assert np.array_equal(one.data, two.data)
    assert one.details == two.details


def test_what_lies_outside_the_mask_has_no_say(model, scan):
    spoiled = replace(scan, data=np.where(scan.mask, scan.data, np.nan).astype(np.float32))
    assert np.array_equal(
        model.harmonize(scan, seed=0).data, model.harmonize(spoiled, seed=0).data
    )


def test_tone_of_the_reference_domain_is_reached(model, scan):
    """A gamma of 0.8 is undone, whatever the networks add after seconds of training."""
    result = model.harmonize(scan, seed=0).data[scan.mask]
    values = np.concatenate([v.data[v.mask] for v in REFERENCE])
    at = np.linspace(0.1, 0.9, 9)
    before = np.abs(np.quantile(scan.data[scan.mask], at) - np.quantile(values, at)).mean()
    after = np.abs(np.quantile(result, at) - np.quantile(values, at)).mean()
    assert after < 0.7 * before


@pytest.mark.parametrize("codes", [("L", "P", "S"), ("P", "I", "R"), ("S", "R", "A")], ids="".join)
def test_other_orientations_give_the_same_result_turned(model, scan, codes):
    other, way = turned(scan, codes)
    expected = nib.orientations.apply_orientation(model.harmonize(scan, seed=0).data, way)
    assert np.allclose(model.harmonize(other, seed=0).data, expected, atol=1e-5)


def test_finer_voxels_keep_their_own_detail(model, scan):
    """1 mm: the tone curve acts on the scan's voxels, only what the networks add is coarse."""
    fine = replace(
        scan,
        data=np.kron(scan.data, np.ones((2, 2, 2), np.float32)),
        mask=np.kron(scan.mask, np.ones((2, 2, 2), bool)),
        spacing=(1.0, 1.0, 1.0),
    )
    rng = np.random.default_rng(0)
    pattern = 0.05 * rng.standard_normal(fine.data.shape).astype(np.float32)
    detailed = replace(fine, data=np.where(fine.mask, np.abs(fine.data + pattern), 0))
    result = model.harmonize(detailed, seed=0).data
    assert result.shape == fine.data.shape
    inner = fine.mask & (detailed.data > 0.3)
    moved = result - model.harmonize(fine, seed=0).data
    assert np.corrcoef(moved[inner], pattern[inner])[0, 1] > 0.6


# --- refusals


def test_unknown_modality(model):
    with pytest.raises(ScanError, match=r"sub-05_T2w.*trained on T1w only"):
        model.harmonize(brain(5, modality="T2w"), seed=0)


def test_brains_that_cannot_be_used_are_named(model, scan):
    nothing = np.zeros_like(scan.mask)
    bad = np.where(scan.mask, np.float32(np.nan), 0)
    for volume, words in (
        (replace(scan, data=scan.mask.astype(np.float32)), "all brain voxels have the value 1"),
        (replace(scan, mask=nothing), "brain mask is empty"),
        (replace(scan, data=bad), "NaN or infinite"),
        (replace(scan, mask=scan.mask[1:]), "differ in shape"),
    ):
        with pytest.raises(ScanError, match=f"sub-09_T1w: .*{words}"):
            model.harmonize(volume, seed=0)


def test_a_brain_too_small_for_the_flow_is_refused(model, scan):
    speck = np.zeros_like(scan.mask)
    speck[18:22, 22:26, 18:22] = True
    with pytest.raises(ScanError, match="sub-09_T1w"):
        model.harmonize(replace(scan, mask=speck, data=scan.data * speck), seed=0)


def test_unlikely_scans_are_flagged_and_very_unlikely_ones_refused(model, scan):
    bits = model.harmonize(scan, seed=0).details["bits_per_dimension"]
    part = model._parts["T1w"]
    kept = part.normal, part.smooth
    try:
        assert not model.harmonize(scan, seed=0).warnings
        part.normal = Normal(bits["output"] - 0.6, 0.0)  # flagged above .35
        warnings = model.harmonize(scan, seed=0).warnings
        assert any("unlike the reference domain" in sentence for sentence in warnings)
        part.smooth = Normal(bits["smoothed"] - 1.0, 0.0)  # refused above .8
        with pytest.raises(ScanError, match=r"sub-09_T1w: .*bits per dimension.*T1w brain"):
            model.harmonize(scan, seed=0)
    finally:
        part.normal, part.smooth = kept


def test_networks_that_make_it_worse_are_left_out(model, scan, monkeypatch):
    """A result far less likely than the curve's: only the curve is applied, and it is told."""
    seen = []

    def spoil(part, case, seed):
        seen.append(case.start)
        return case.start + 0.1 * case.mask

    def bits(part, image, case):
        return 2.0 if torch.equal(image, case.image) or torch.equal(image, case.start) else 2.5

    part = model._parts["T1w"]
    monkeypatch.setattr(model, "_refine", spoil)
    monkeypatch.setattr(model, "_bits", bits)
    for normal, kept in ((Normal(2.0, 0.0), False), (Normal(2.3, 0.0), True)):
        monkeypatch.setattr(part, "normal", normal)
        result = model.harmonize(scan, seed=0)
        told = [text for text in result.warnings if "only the curve" in text]
        assert len(told) == (0 if kept else 1)
        curve = part.tone.curve(
            torch.from_numpy(scan.data), torch.from_numpy(scan.mask), scan.spacing
        )
        expected = np.maximum(curve(scan.data), 0) + (0.1 if kept else 0)
        assert result.data[scan.mask] == pytest.approx(expected[scan.mask], abs=1e-5)
        assert result.details["bits_per_dimension"]["output"] == (2.5 if kept else 2.0)
        assert result.details["networks_applied"] is kept


def test_a_spoiled_harmonizer_leaves_the_first_curve(model, scan, monkeypatch):
    """What the second curve found on its output does not stay behind."""
    if model.name != "harmonizing-flows":
        pytest.skip("has a harmonizer")
    made = type(model).from_state(model.arrays(), model.params())
    part = made._parts["T1w"]
    part.smooth, part.normal = Normal(1e3, 0.0), Normal(1.0, 0.0)
    with torch.no_grad():
        part.harmonizer.bias.weight.normal_(0, 3, generator=torch.Generator().manual_seed(0))
        part.harmonizer.bias.bias.fill_(0.2)
    case = made._case(part, scan)

    def bits(_part, image, _case):
        return 2.0 if torch.equal(image, case.start) else 3.0

    monkeypatch.setattr(made, "_bits", bits)
    result = made.harmonize(scan, seed=0)
    assert any("only the curve" in text for text in result.warnings)
    expected = np.maximum(case.curve(scan.data), 0)
    assert result.data[scan.mask] == pytest.approx(expected[scan.mask], abs=1e-5)
    found = result.details["bits_per_dimension"]
    assert found["output"] == found["tone"] == 2.0
    assert any("Still unlike" in text for text in result.warnings)


@pytest.mark.parametrize("second", [0.0, 0.1])
def test_what_the_networks_change_is_bounded(second, model, scan, monkeypatch):
    """Apart from the curve, also from a second one that was found on the way."""

    def refine(part, case, seed):
        raised = ToneCurve((0.0, 1.0), (second, 1 + second), 1.0, 1.0)
        case.curve = composed(case.curve, raised)
        case.start = (case.start + second) * case.mask
        return case.start - sign * 5 * case.mask

    monkeypatch.setattr(model, "_refine", refine)
    monkeypatch.setattr(model, "_bits", lambda part, image, case: 1.0)
    part = model._parts["T1w"]
    curve = part.tone.curve(torch.from_numpy(scan.data), torch.from_numpy(scan.mask), scan.spacing)
    for sign in (-1, 1):
        moved = model.harmonize(scan, seed=0).data - np.maximum(curve(scan.data), 0) - second
        bright = scan.mask & (scan.data > 0.6)
        assert -sign * moved[bright] == pytest.approx(0.3, abs=1e-3)


# --- fit


@pytest.mark.parametrize("name", NAMES)
def test_unknown_preset(name):
    with pytest.raises(UsageError, match="no preset 'huge'; choose from cpu"):
        KINDS[name].fit(REFERENCE, seed=0, training=Training("huge"))


@pytest.mark.parametrize("name", NAMES)
def test_training_scans_that_cannot_be_used(name):
    two_of_one = [brain(1), replace(brain(2), subject="01")]
    with pytest.raises(ScanError, match="two subjects"):
        train(name, two_of_one)
    flat = replace(brain(2), data=brain(2).mask.astype(np.float32))
    with pytest.raises(ScanError, match=r"sub-02_T1w: all brain voxels"):
        train(name, [brain(1), flat])
    empty = replace(brain(2), mask=np.zeros(SHAPE, bool))
    with pytest.raises(ScanError, match=r"sub-02_T1w: the brain mask is empty"):
        train(name, [brain(1), empty])


def test_a_modality_of_one_subject_is_left_out_before_anything_is_trained(caplog):
    """It must not throw away hours of training of the other modality."""
    volumes = [brain(9, modality="T2w"), *REFERENCE]
    with caplog.at_level("WARNING", logger="bids_harmony"):
        made = train(NAMES[0], volumes)
    assert made.contract.modalities == ("T1w",)
    assert "there is one with T2w" in caplog.text
    alone = train(NAMES[0])
    assert all(np.array_equal(value, alone.arrays()[key]) for key, value in made.arrays().items())


def test_chosen_volumes_are_read_one_by_one():
    class Counting(list):
        seen = 0

        def __getitem__(self, index):
            Counting.seen += 1
            return super().__getitem__(index)

    chosen = Chosen(Counting("abcdef"), (1, 3, 5))
    assert (len(chosen), Counting.seen) == (3, 0)
    assert list(chosen) == ["b", "d", "f"]
    assert list(chosen[1:]) == ["d", "f"]
    with pytest.raises(IndexError):
        chosen[3]


@pytest.mark.parametrize("name", NAMES)
def test_tiny_masks_end_the_training_instead_of_hanging_it(name):
    small = np.zeros(SHAPE, bool)
    small[13:19, 17:23, 13:19] = True
    volumes = [replace(v, mask=small, data=v.data * small) for v in REFERENCE[:2]]
    with pytest.raises(ScanError, match="sub-01_T1w: too little brain"):
        train(name, volumes)


def test_no_subject_is_both_learned_from_and_held_out():
    volumes = [replace(brain(s), data=np.where(brain(s).mask, s + 1.0 * brain(s).data, 0),
                       subject=f"{s // 2:02d}") for s in range(2, 14)]  # fmt: skip
    groups = split_by_subject(volumes, 2.0)
    subjects = [[int(float(i[m].min())) // 2 for i, m in group.brains] for group in groups]
    assert set(subjects[0]) == {1, 2, 3, 4, 5}
    assert subjects[1] == [6, 6]
    assert [[int(label) for label in group.subjects] for group in groups] == subjects


def test_training_tells_what_it_did(method):
    scores = method.scores()["T1w"]
    json.dumps([scores, method.params()], allow_nan=False)
    assert len(scores["held_out_bits_per_dimension"]) == 1
    assert len(scores["training_bits_per_dimension"]) == 3
    assert scores["flow"]["steps"] + scores["flow"]["rejected_steps"] == 8
    files = method.files()
    assert set(files) == {"T1w_curves.csv", "T1w_training.png", "T1w_samples.png"}
    lines = files["T1w_curves.csv"].decode().splitlines()
    assert lines[0] == "network,step,loss,held_out"
    networks = [n for n in ("harmonizer", "flow") if n in scores]
    assert len(lines) == 1 + 2 * len(networks)
    assert files["T1w_training.png"].startswith(b"\x89PNG")


def test_same_seed_same_model_another_seed_another(method, tmp_path):
    """Also with checkpoints, and when it is finished and started again."""
    again = train(method.name, folder=tmp_path)
    for key, value in method.arrays().items():
        assert np.array_equal(value, again.arrays()[key]), key
    third = train(method.name, folder=tmp_path)
    for key, value in method.arrays().items():
        assert np.array_equal(value, third.arrays()[key]), key
    other = train(method.name, seed=1).arrays()
    assert any(not np.array_equal(v, other[k]) for k, v in method.arrays().items())
    assert sorted(p.name for p in (tmp_path / "T1w").iterdir()) == sorted(
        n for n in ("flow", "harmonizer") if n in method.scores()["T1w"]
    )


def test_a_killed_training_goes_on(method, tmp_path, monkeypatch):
    name = method.name
    from bids_harmony.training.loop import TrainingModule

    taken = []
    step = TrainingModule.training_step

    def killed(self, batch, index):
        if len(taken) == 6:  # between two looks at the held-out score
            raise KeyboardInterrupt
        taken.append(index)
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(name, folder=tmp_path)
    resumed = train(name, folder=tmp_path)
    for key, value in method.arrays().items():
        assert np.array_equal(value, resumed.arrays()[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_the_time_limit_is_shared_out(name):
    """20 % tone, then 40 % each, or 80 % where there is a flow only."""
    kind = tiny(name)
    preset = kind.presets_by_name["cpu"]
    long = Plan(10**6, 1e-3, every=5, patience=10**6, half=False)
    more = {"harmonizer_plan": long} if preset.harmonizer_plan else {}
    kind.presets_by_name = {
        "cpu": replace(preset, flow_plan=long, tone_samples=10**6, tone_epochs=1, **more)
    }
    given = {}
    from bids_harmony.methods import flow_training

    real = flow_training.train_network

    def noted(network, **options):
        given[options["name"]] = 60 * options["plan"].minutes
        return real(network, **options)

    flow_training.train_network = noted
    try:
        model = kind.fit(REFERENCE, seed=0, training=Training("cpu", max_minutes=2 / 60))
    finally:
        flow_training.train_network = real
    assert given == pytest.approx({"harmonizer": 0.8, "flow": 0.8} if more else {"flow": 1.6})
    for network in given:
        assert model.scores()["T1w"][network]["stop_reason"] == "time limit"


# --- state


def test_a_bundle_gives_the_same_voxels(method, scan, tmp_path):
    registered = registry.load(method.name)
    real = registered(method._parts, method._preset)
    folder = save_bundle(tmp_path / "bundle", real, meta={}, files=method.files())
    loaded = load_bundle(folder).method
    assert isinstance(loaded, NeuralMethod)
    assert loaded.contract == method.contract
    expected = tolerant(real).harmonize(scan, seed=1)
    found = tolerant(loaded).harmonize(scan, seed=1)
    assert np.array_equal(expected.data, found.data)
    assert expected.details == found.details
    assert loaded.params() == json.loads(json.dumps(real.params()))


def test_state_of_another_network_is_refused(method):
    arrays = method.arrays()
    arrays.pop(next(key for key in arrays if "/flow/" in key))
    with pytest.raises(ScanError, match="not those of the flow network"):
        type(method).from_state(arrays, method.params())


def test_several_modalities_in_one_model(method):
    volumes = [*REFERENCE[:2], *[brain(s, modality="FLAIR") for s in (1, 2)]]
    trained = train(method.name, volumes)
    assert {name.split("_")[0] for name in trained.files()} == {"FLAIR", "T1w"}
    both = tolerant(trained)
    assert both.contract.modalities == ("FLAIR", "T1w")
    for modality in ("FLAIR", "T1w"):
        scan = brain(7, modality=modality)
        result = both.harmonize(scan, seed=0).data[scan.mask]
        mean = np.mean([v.data[v.mask].mean() for v in volumes if v.modality == modality])
        assert result.mean() == pytest.approx(mean, abs=0.08)


def test_contract_and_card_agree(method):
    card = registry.available()[method.name]
    assert card.adapts == method.adapts
    assert tuple(card.presets) == tuple(registry.load(method.name).presets_by_name)
    assert method.contract.grid == card.grid
    assert method.contract.masked


# --- adaptation


@pytest.fixture(scope="module")
def site():
    return [brain(s, gamma=0.8, noise=0.05) for s in (11, 12)]


def test_adapting_leaves_the_method_as_it_is(method, site):
    # A goal out of reach, so that the harmonizer has something to learn.
    model = tolerant(method)
    model._parts["T1w"].goal = -50.0
    before = model.arrays()
    adaptation = model.adapt(site, seed=0)
    json.dumps(dict(adaptation.details), allow_nan=False)
    assert {"bpd_before", "bpd_after", "steps", "stop_reason", "modality"} <= set(
        adaptation.details
    )
    assert adaptation.details["left_out"] == []
    for key, value in model.arrays().items():
        assert np.array_equal(value, before[key])
    adapted = model.adapted(adaptation)
    for key, value in model.arrays().items():
        assert np.array_equal(value, before[key])
    changed = {k for k, v in adapted.arrays().items() if not np.array_equal(v, before[k])}
    assert changed <= {f"T1w/{key}" for key in adaptation.arrays}
    for key, value in adaptation.arrays.items():
        assert np.array_equal(adapted.arrays()[f"T1w/{key}"], value)
    if method.name == "harmonizing-flows":
        assert adaptation.details["kept_step"] > 0
        assert changed
    else:
        assert adapted._weights["T1w"].beta1 == adaptation.details["beta1"]
        assert not adaptation.arrays


def test_an_adaptation_stored_and_loaded_gives_the_same_voxels(method, site, scan):
    model = tolerant(method)
    model._parts["T1w"].goal = -50.0  # out of reach, so that there is something to adapt
    adaptation = model.adapt(site, seed=0)
    stored = Adaptation(
        {k: np.array(v) for k, v in adaptation.arrays.items()},
        json.loads(json.dumps(dict(adaptation.details))),
    )
    expected = model.adapted(adaptation).harmonize(scan, seed=0)
    found = model.adapted(stored).harmonize(scan, seed=0)
    assert np.array_equal(expected.data, found.data)
    if model.name == "harmonizing-flows":
        assert adaptation.details["kept_step"] > 0
        assert not np.array_equal(expected.data, model.harmonize(scan, seed=0).data)
    again = model.adapt(site, seed=0)
    assert again.details == adaptation.details


def test_scans_that_cannot_be_used_are_left_out_of_an_adaptation(model, site):
    flat = replace(site[0], data=site[0].mask.astype(np.float32), name="sub-13_T1w")
    adaptation = model.adapt([flat, site[1]], seed=0)
    assert [text.split(":")[0] for text in adaptation.details["left_out"]] == ["sub-13_T1w"]
    assert adaptation.details["bpd_before"] == model.adapt([site[1]], seed=0).details["bpd_before"]
    with pytest.raises(ScanError, match=r"no scan can be adapted to: sub-13_T1w"):
        model.adapt([flat], seed=0)


def test_a_scan_that_would_be_refused_is_not_adapted_to(method, site):
    model = tolerant(method)
    model._parts["T1w"].smooth = Normal(-50.0, 0.0)
    with pytest.raises(ScanError, match="no scan can be adapted to"):
        model.adapt(site, seed=0)


def test_adapting_needs_one_known_modality(model, site):
    with pytest.raises(ScanError, match="one modality"):
        model.adapt([site[0], brain(5, modality="T2w")], seed=0)
    with pytest.raises(ScanError, match="T1w only"):
        model.adapt([brain(5, modality="T2w")], seed=0)


def test_adaptations_that_do_not_fit_are_refused(model):
    with pytest.raises(ScanError, match="not trained on T2w"):
        model.adapted(Adaptation({}, {"modality": "T2w", "beta1": 500.0}))
    details = {"modality": "T1w", "beta1": -3.0}
    with pytest.raises(ScanError):
        model.adapted(Adaptation({"harmonizer/x": np.zeros(3)}, details))


def test_adaptations_to_two_modalities_add_up(method):
    if method.name != "blindharmony":
        pytest.skip("has one beta1 for each modality")
    volumes = [*REFERENCE[:2], *[brain(s, modality="FLAIR") for s in (1, 2)]]
    both = train(method.name, volumes)
    for modality, beta1 in (("T1w", 250.0), ("FLAIR", 2000.0)):
        both = both.adapted(Adaptation({}, {"modality": modality, "beta1": beta1}))
    assert {k: w.beta1 for k, w in both._weights.items()} == {"FLAIR": 2000.0, "T1w": 250.0}
