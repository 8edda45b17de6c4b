"""The tone curve: joint histogram, quantile mapping, correction network, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bids_harmony.errors import ScanError  # noqa: E402
from bids_harmony.imaging.quantiles import mid_quantiles  # noqa: E402
from bids_harmony.imaging.tone import ToneCurve, composed  # noqa: E402
from bids_harmony.methods import tone_fitting  # noqa: E402
from bids_harmony.methods.reference_brains import ReferenceBrains  # noqa: E402
from bids_harmony.methods.scan_tone import toned_scan  # noqa: E402
from bids_harmony.methods.tone import Tone, core, load_arrays, mapped  # noqa: E402
from bids_harmony.methods.tone_fitting import fit_tone_model  # noqa: E402
from bids_harmony.networks.tone import (  # noqa: E402
    FEATURES,
    KNOTS,
    TOP,
    ToneNetwork,
    joint_histogram,
)
from bids_harmony.training.tone import (  # noqa: E402
    Quantiles,
    foreign_part,
    mean_quantiles,
    probabilities,
    tone_samples,
)
from tests.flow_brains import brain  # noqa: E402

MM = (2.0, 2.0, 2.0)
EDGES = (0.012, 0.02, 0.032, 0.05, 0.08, 0.12)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tensors(volume):
    return torch.from_numpy(volume.data), torch.from_numpy(volume.mask)


def reference(volumes, subjects=None):
    """Reference brains of these subjects, each of its own unless told."""
    labels = subjects or [f"{k}" for k in range(len(volumes))]
    named = [replace(v, subject=s) for v, s in zip(volumes, labels, strict=True)]
    return ReferenceBrains.of(named, 2.0)


def fine_brain(seed):
    """A brain of 1 mm, with noise of its own in every voxel."""
    coarse = brain(seed, noise=0.0)
    data, mask = (np.kron(v, np.ones((2, 2, 2), v.dtype)) for v in (coarse.data, coarse.mask))
    noise = np.random.default_rng(seed).normal(0, 0.06, data.shape)
    noisy = np.where(mask, np.maximum(data + noise, 0), 0).astype(np.float32)
    return replace(coarse, data=noisy, mask=mask.astype(bool), spacing=(1.0, 1.0, 1.0))


def identity_tone(volume):
    """A tone whose network corrects nothing."""
    image, mask = tensors(volume)
    return Tone(mean_quantiles([(image, core(mask, MM))]), ToneNetwork().eval())


# --- joint histogram


def plain_histogram(image, mask):
    """Voxel by voxel, in double precision."""
    padded, inside = np.pad(image.astype(float), 1), np.pad(mask, 1)
    counts = np.zeros((KNOTS, len(EDGES) + 1))
    for x, y, z in np.argwhere(inside):
        near = np.s_[x - 1 : x + 2, y - 1 : y + 2, z - 1 : z + 2]
        if inside[near].sum() / 27 <= 0.6:
            continue
        values = padded[near][inside[near]]
        place = np.clip(values.mean() * (KNOTS - 1) / TOP, 0, KNOTS - 1 - 1e-3)
        row = np.searchsorted(EDGES, values.std())
        low = int(place)
        counts[low, row] += 1 - (place - low)
        counts[low + 1, row] += place - low
    return np.sqrt(counts / counts.sum()).ravel()


def test_joint_histogram_against_plain_arithmetic():
    volume = brain(1, shape=(20, 22, 18), noise=0.05)
    found = joint_histogram(*tensors(volume)).numpy()
    expected = plain_histogram(volume.data, volume.mask)
    assert found.shape == (FEATURES,)
    # A voxel at the edge of a bin may fall to the other side in single precision.
    assert found == pytest.approx(expected, abs=2e-2)
    assert np.abs(found - expected).mean() < 1e-4
    assert (found**2).sum() == pytest.approx(1, abs=1e-5)


def test_joint_histogram_of_a_flat_brain():
    """Mean 0.55 lies half way between knots 11 and 12, deviation 0 in the first row."""
    image = torch.full((9, 9, 9), 0.55)
    found = joint_histogram(image, torch.ones(9, 9, 9, dtype=torch.bool)).view(KNOTS, -1).square()
    assert found[11, 0] == pytest.approx(0.5, abs=1e-3)
    assert found[12, 0] == pytest.approx(0.5, abs=1e-3)
    assert found.sum() == pytest.approx(1, abs=1e-5)


def test_what_lies_outside_the_mask_has_no_say():
    volume = brain(1, shape=(20, 22, 18))
    image, mask = tensors(volume)
    spoiled = torch.where(mask, image, torch.tensor(9.0))
    assert joint_histogram(image, mask) == pytest.approx(joint_histogram(spoiled, mask), abs=1e-6)


def test_a_brain_too_thin_to_count_has_no_features():
    mask = torch.zeros(9, 9, 9, dtype=torch.bool)
    mask[4] = True
    assert not joint_histogram(mask.float(), mask).any()


# --- quantile mapping


def test_mean_quantiles_are_numpys():
    volumes = [brain(1), brain(2, gamma=1.3)]
    found = mean_quantiles([tensors(v) for v in volumes]).values.numpy()
    at = probabilities(256).double().numpy()
    each = [np.quantile(v.data[v.mask].astype(float), at) for v in volumes]
    assert found == pytest.approx(np.mean(each, axis=0), abs=2e-3)


def test_probabilities_are_even_and_leave_the_extremes_out():
    at = probabilities(256).numpy()
    assert np.diff(at) == pytest.approx(1 / 256, abs=1e-6)
    assert at + at[::-1] == pytest.approx(1, abs=1e-6)


def test_quantile_mapping_is_interpolation_between_quantiles():
    reference, scan = brain(1), brain(2, gamma=0.6)
    quantiles = mean_quantiles([tensors(reference)])
    image, mask = tensors(scan)
    own = quantiles.map_of(image[mask])
    values = image[mask].double().numpy()
    mapped = quantiles.apply(image[mask], own).numpy()
    at = probabilities(256).double().numpy()
    x, y = (
        mid_quantiles(values, at),
        mid_quantiles(reference.data[reference.mask].astype(float), at),
    )
    inner = (values > x[0]) & (values < x[-1])
    assert mapped[inner] == pytest.approx(np.interp(values[inner], x, y), abs=8e-3)
    # Beyond the ends it goes on, and never below 0.
    beyond = quantiles.apply(own[-1:] + (own[-1] - own[-2]), own)
    assert float(beyond) == pytest.approx(2 * y[-1] - quantiles.values[-2].item(), abs=1e-3)
    assert mapped.min() >= 0


def test_mapping_to_ones_own_quantiles_changes_nothing():
    image, mask = tensors(brain(1))
    quantiles = mean_quantiles([(image, mask)])
    mapped = quantiles.apply(image[mask], quantiles.map_of(image[mask]))
    inner = (image[mask] > quantiles.values[0]) & (image[mask] < quantiles.values[-1])
    assert mapped[inner] == pytest.approx(image[mask][inner], abs=1e-3)


# --- curve


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_the_curve_undoes_an_increasing_map(gamma):
    """The truth is the reference brain itself."""
    reference = brain(1)
    scan = replace(reference, data=2.5 * reference.data**gamma)
    curve = identity_tone(reference).curve(*tensors(scan), MM)
    error = (curve(scan.data) - reference.data)[scan.mask]
    assert np.abs(error).max() < 0.05
    assert np.sqrt((error**2).mean()) < 0.004


def test_the_curve_never_falls():
    reference = brain(1)
    tone = identity_tone(reference)
    torch.manual_seed(0)
    with torch.no_grad():  # a network that corrects to and fro
        tone.network.layers[-1].bias.copy_(0.3 * torch.randn(KNOTS))
    curve = tone.curve(*tensors(brain(2, gamma=0.7)), MM)
    values = np.linspace(-0.5, 3, 5000)
    assert (np.diff(curve(values)) >= 0).all()
    assert (np.diff(curve.x) > 0).all()
    assert min(curve.y) >= 0
    assert min(curve.start_slope, curve.end_slope) >= 0


def test_the_networks_correction_is_added_at_the_references_intensities():
    reference = brain(1)
    tone = identity_tone(reference)
    with torch.no_grad():
        tone.network.layers[-1].bias.copy_(torch.linspace(0, 0.11, KNOTS))  # + 10 %
    curve = tone.curve(*tensors(reference), MM)
    values = reference.data[reference.mask]
    inner = (values > np.quantile(values, 0.02)) & (values < np.quantile(values, 0.98))
    assert curve(values)[inner] == pytest.approx(1.1 * values[inner], abs=3e-3)


@pytest.mark.parametrize("levels", [8, 20, 60])
def test_coarse_integers_share_the_middle_of_their_ranks(levels):
    """Ties must not all fall to the lower end of their share, nor make a cliff of an end."""
    reference = brain(1)
    scan = replace(reference, data=np.round(reference.data * levels).astype(np.float32))
    curve = identity_tone(reference).curve(*tensors(scan), MM)
    mapped = curve(scan.data)[scan.mask]
    assert mapped.mean() == pytest.approx(reference.data[scan.mask].mean(), abs=0.15 / levels)
    beyond = curve(np.array([scan.data.max() + 1]))
    assert beyond[0] < mapped.max() + 4 / levels


def test_what_is_darker_than_the_core_keeps_its_order_and_no_signal_stays_none():
    """Fluid and dura at the rim, darker than the ventricles, in a scan of little contrast."""
    reference = brain(1)
    curve = identity_tone(reference).curve(
        *tensors(replace(reference, data=(0.3 + 0.7 * reference.data) * reference.mask)), MM
    )
    rim = np.linspace(0, curve.x[0], 50)
    assert rim[-1] > 0.3
    assert curve(rim) == pytest.approx(rim * curve.y[0] / curve.x[0], abs=1e-6)
    assert (np.diff(curve(rim)) > 0).all()
    # of a scan whose dark values are negative, zero is nothing special
    shifted = (reference.data - 0.5)[reference.mask]
    curve = identity_tone(reference).matching(torch.from_numpy(shifted))
    gain = (curve.y[-1] - curve.y[0]) / (curve.x[-1] - curve.x[0])
    assert curve.x[0] < 0
    assert 0.5 * gain <= curve.start_slope <= 2 * gain


def test_a_saturated_scan_has_no_steep_end():
    """A tenth of the voxels at the top value: one step above it is not the end of the world."""
    reference = brain(1)
    top = np.quantile(reference.data[reference.mask], 0.9)
    scan = replace(reference, data=np.minimum(reference.data, top))
    curve = identity_tone(reference).curve(*tensors(scan), MM)
    assert curve(np.array([top + 0.01]))[0] < curve(np.array([top]))[0] + 0.1


def test_the_curve_goes_as_far_as_it_can_be_trusted():
    """With d the change asked for: nothing at doubt d, all of it at d / 2."""
    reference = brain(1)
    tone = identity_tone(reference)
    scan = replace(reference, data=reference.data + np.float32(0.1) * reference.mask)
    full = tone.curve(*tensors(scan), MM)
    asked = np.sqrt(np.mean((np.array(full.y) - full.x) ** 2))
    assert asked == pytest.approx(0.1, abs=2e-3)
    for doubt, share in ((0.05, 1.0), (0.07, 0.68), (0.1, 0.0), (1.0, 0.0)):
        curve = replace(tone, doubt=doubt).curve(*tensors(scan), MM)
        values = np.array([0.4, 0.7, 0.95])
        assert curve(values) == pytest.approx(values + share * (full(values) - values), abs=3e-3)


def test_doubt_is_what_happens_to_held_out_reference_brains():
    brains, held_out = [tensors(brain(s)) for s in (1, 2)], tensors(brain(3, gamma=1.2))
    tone, scores = fit_tone_model(
        reference([brain(1), brain(2)], "11"),
        reference([brain(3, gamma=1.2)]),
        samples=8,
        epochs=1,
        seed=0,
        minutes=None,
    )
    values = held_out[0][held_out[1]].numpy()
    without = mean_quantiles([(image, core(mask, MM)) for image, mask in brains])
    moved = replace(tone, quantiles=without, doubt=0.0).curve(*held_out, MM)(values) - values
    assert tone.doubt == scores["doubt"] == pytest.approx(np.sqrt((moved**2).mean()), rel=1e-4)
    assert tone.doubt > 0.01


def test_doubt_is_cross_validated_over_subjects(monkeypatch):
    """Each brain is judged by a network that has seen no scan of its subject."""
    brains = [brain(s) for s in (1, 2, 3, 4, 5)]
    seen = []
    real = tone_fitting.train_tone

    def train(samples, **more):
        seen.append(sorted(set(samples.brains.tolist())))
        return real(samples, **more)

    monkeypatch.setattr(tone_fitting, "train_tone", train)
    changes = iter([0.5, 0.1, 0.1, 0.2, 0.1, 0.3])
    monkeypatch.setattr(tone_fitting, "_change", lambda tone, scan, resolution: next(changes))
    tone, _ = fit_tone_model(
        reference(brains, "abacd"), reference(brains[:1]), samples=10, epochs=1, seed=0,
        minutes=None,
    )  # fmt: skip
    assert seen == [[0, 1, 2, 3, 4], [1, 3, 4], [0, 2, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3]]
    wanted = np.sqrt(np.mean(np.square([0.5, 0.1, 0.1, 0.2, 0.1, 0.3])))
    assert tone.doubt == pytest.approx(wanted)


def test_doubt_of_smaller_voxels_is_of_the_scan_itself():
    """At 1 mm quantiles are matched twice; a brain of the reference must stay as it is there too.

    Noise that averaging takes away makes both ways of finding the curve differ.
    """
    fine = [fine_brain(s) for s in (1, 2, 3, 4)]
    tone, _ = fit_tone_model(
        reference(fine[:3]), reference(fine[3:]), samples=8, epochs=1, seed=0, minutes=None
    )
    whole = replace(tone, doubt=0.0)
    changes = []
    for scan in fine:
        own = scan.data[scan.mask]
        asked = toned_scan(whole, scan, 2.0).curve(own) - own
        left = toned_scan(tone, scan, 2.0).curve(own) - own
        changes.append([np.sqrt(np.mean(v**2)) for v in (asked, left)])
    asked, left = np.mean(changes, axis=0)
    assert asked > 0.005
    assert left < 0.5 * asked
    assert tone.doubt > 0.8 * asked


def test_a_constant_brain_is_refused():
    volume = brain(1)
    tone = identity_tone(volume)
    flat = torch.where(torch.from_numpy(volume.mask), 0.5, 0.0)
    for spot in (0.5, 0.9):
        flat[20, 24, 20] = spot
        with pytest.raises(ScanError, match="one value"):
            tone.curve(flat, torch.from_numpy(volume.mask), MM)


# --- training


def test_foreign_part_without_change_wants_no_correction():
    """Whatever is drawn, the correction leads from the mapping to the truth, knot by knot."""
    image, mask = tensors(brain(1))
    quantiles = mean_quantiles([(image, mask)])
    sizes = []
    for seed in range(12):
        features, wanted, weight = foreign_part(
            image, mask, quantiles, torch.Generator().manual_seed(seed)
        )
        again = foreign_part(image, mask, quantiles, torch.Generator().manual_seed(seed))
        assert torch.equal(features, again[0])
        assert torch.equal(wanted, again[1])
        assert features.shape == (FEATURES,)
        assert torch.isfinite(wanted).all()
        assert (weight >= 0).all()
        assert float(weight.sum()) == pytest.approx(1, abs=1e-5)
        sizes.append(float((weight * wanted.square()).sum().sqrt()))
    assert 0.002 < np.median(sizes) < 0.2


def test_samples_of_one_mapping_serve_for_another_near_it():
    """Wanted corrections as if drawn anew on other mean quantiles."""
    brains = [tensors(brain(s)) for s in (1, 2)]
    old = mean_quantiles(brains)
    new = Quantiles(old.values + 0.03 * torch.sin(3 * old.values))
    first, anew = (tone_samples(brains, q, count=12, seed=0) for q in (old, new))
    moved = first.towards(old, new)

    def apart(samples):
        return float((anew.weights * (samples.targets - anew.targets).abs()).sum(1).mean())

    assert apart(moved) < 0.25 * apart(first)
    assert torch.equal(moved.features, first.features)


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    return fit_tone_model(
        reference([brain(s) for s in (1, 2, 3)]),
        reference([brain(4)]),
        samples=360,
        epochs=200,
        seed=0,
        minutes=None,
    )


def test_training_lowers_the_held_out_error(trained):
    _, scores = trained
    assert scores["after"] < 0.85 * scores["before"]


def test_more_fluid_than_the_reference_is_corrected(trained):
    """Larger ventricles, the same scanner: plain quantile mapping moves white matter."""
    tone, _ = trained
    scan = brain(9, ventricle=0.3)
    plain = Tone(tone.quantiles, ToneNetwork().eval())
    errors = [
        np.abs(t.curve(*tensors(scan), MM)(scan.data) - scan.data)[scan.mask].mean()
        for t in (plain, tone)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_time_limit_leaves_one_sample_of_each_brain(monkeypatch):
    brains, held_out = reference([brain(s) for s in (1, 2, 3)]), reference([brain(4)])
    seen = []
    real = tone_fitting.train_tone

    def train(samples, **more):
        seen.append(samples.brains.tolist())
        return real(samples, **more)

    monkeypatch.setattr(tone_fitting, "train_tone", train)
    tone, scores = fit_tone_model(
        brains,
        held_out,
        samples=10_000,
        epochs=1,
        seed=0,
        minutes=1e-6,
    )
    assert seen == [[0, 1, 2], [1, 2], [0, 2], [0, 1]]
    assert scores["after"] > 0
    assert torch.isfinite(tone.network.spread).all()


def test_the_seed_alone_decides():
    brains = reference([brain(1), brain(2)])
    found = []
    for before, seed in ((1, 0), (2, 0), (2, 5)):
        torch.manual_seed(before)
        tone, _ = fit_tone_model(
            brains,
            brains,
            samples=8,
            epochs=2,
            seed=seed,
            minutes=None,
        )
        found.append(tone.network.layers[0].weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_state_comes_back(trained):
    tone, _ = trained
    arrays = tone.arrays()
    again = Tone.from_arrays(arrays)
    scan = tensors(brain(7, gamma=0.8))
    assert again.curve(*scan, MM) == tone.curve(*scan, MM)
    assert not again.network.training
    del arrays["tone/layers.0.weight"]
    with pytest.raises(ScanError, match="not those of the tone network"):
        load_arrays(ToneNetwork(), arrays, "tone")


def test_quantiles_need_no_particular_scale():
    """Values of hundreds, as of a scan that was not scaled, keep the map increasing."""
    values = torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 500
    quantiles = Quantiles(torch.linspace(0, 1, 256))
    own = quantiles.map_of(values)
    assert (own.diff() > 0).all()
    assert torch.isfinite(quantiles.apply(values, own)).all()


def test_the_core_leaves_out_the_rim_where_enough_is_left():
    cube = torch.zeros(20, 20, 20, dtype=torch.bool)
    cube[2:18, 2:18, 2:18] = True
    expected = torch.zeros_like(cube)
    for shift in np.ndindex(5, 5, 5):  # two steps along the axes from a voxel of the rim
        if sum(abs(s - 2) for s in shift) <= 2:
            expected |= torch.roll(~cube, tuple(s - 2 for s in shift), (0, 1, 2))
    assert torch.equal(core(cube, MM), ~expected)
    thick = torch.zeros_like(cube)
    thick[4:16, 4:16, 3:17] = True  # one slice of 5 mm, two voxels in plane
    assert torch.equal(core(cube, (2.0, 2.0, 5.0)), thick)
    thin = torch.zeros_like(cube)
    thin[2:18, 2:18, 8:12] = True
    assert torch.equal(core(thin, MM), thin)


def test_composed_curves_are_one_after_the_other():
    first = ToneCurve((0.1, 0.4, 0.9), (0.0, 0.5, 1.0), 1.2, 0.7)
    second = ToneCurve((0.0, 0.3, 1.0), (0.1, 0.3, 1.1), 0.5, 2.0)
    both = composed(first, second)
    inner, outer = np.linspace(0.1, 0.9, 777), np.array([-0.2, 0.0, 1.1, 1.5])
    assert both(inner) == pytest.approx(second(first(inner)), abs=5e-4)
    assert both(outer) == pytest.approx(second(first(outer)), abs=5e-4)
    assert (np.diff(both(np.linspace(-1, 2, 999))) > 0).all()


def test_mapped_is_a_brain():
    volume = brain(1)
    image, mask = tensors(volume)
    curve = ToneCurve((0.0, 1.0), (-0.5, 0.5), 1.0, 1.0)
    found = mapped(curve, image, mask).numpy()
    expected = np.where(volume.mask, np.maximum(volume.data - 0.5, 0), 0)
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, abs=1e-6)
