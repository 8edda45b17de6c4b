"""HAIL: its arithmetic against plain numpy, brains from windows, and the method's contract."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")

from skimage.metrics import structural_similarity  # noqa: E402

from bids_harmony.errors import ScanError, UsageError  # noqa: E402
from bids_harmony.imaging.guided import MOST_CHANGE, guided_transfer  # noqa: E402
from bids_harmony.imaging.layout import Layout  # noqa: E402
from bids_harmony.methods import registry  # noqa: E402
from bids_harmony.methods.base import Training  # noqa: E402
from bids_harmony.methods.bundle import load_bundle, save_bundle  # noqa: E402
from bids_harmony.methods.hail import Hail  # noqa: E402
from bids_harmony.methods.hail_losses import Weights, transfer, weighted  # noqa: E402
from bids_harmony.methods.hail_part import changed  # noqa: E402
from bids_harmony.methods.hail_training import (  # noqa: E402
    draw_pairs,
    scans_of,
    set_units,
)
from bids_harmony.methods.hail_volumes import (  # noqa: E402
    brain_of,
    draw_brain,
    style_of,
    windows,
)
from bids_harmony.methods.held_out import held_out_subjects  # noqa: E402
from bids_harmony.methods.learnable import learnable  # noqa: E402
from bids_harmony.methods.likeness import Range, rank_cells  # noqa: E402
from bids_harmony.networks.hail import (  # noqa: E402
    QUANTILES,
    HailNetwork,
    moments,
    quantiles_of,
    sums_of,
)
from bids_harmony.training.patches import (  # noqa: E402
    cut_cubes,
    dissimilarity,
    draw_place,
    local_change,
)
from bids_harmony.training.plan import Plan  # noqa: E402
from tests import flow_brains  # noqa: E402

SHAPE = (28, 32, 26)


def brain(seed=0, site="a", **look):
    """Site b shows the same tissues with another contrast."""
    look = {"gamma": 1.7 if site == "b" else 1.0, **look}
    made = flow_brains.brain(seed, shape=SHAPE, **look)
    return replace(made, site=site, session=site, name=f"{made.name}-{site}")


VOLUMES = [
    brain(seed, site) for site, first in (("a", 1), ("b", 11)) for seed in range(first, first + 3)
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_network(widths=(3, 4, 5), seed=0):
    """Untrained, but its decoder listens to styles."""
    torch.manual_seed(seed)
    network = HailNetwork(widths)
    for turn in network.decoder.turn:
        torch.nn.init.normal_(turn.weight, std=0.02)
    return network.eval().requires_grad_(False)


def random_style(network, seed=0):
    drawn = torch.rand(1, network.style_size, generator=generator(seed)) + 0.5
    drawn[:, -QUANTILES:] = drawn[:, -QUANTILES:].sort(dim=1).values
    return drawn


# --- networks


def test_moments_are_weighted_ones_and_add_over_parts():
    tap, weight = torch.rand(2, 3, 4, 4, 6), torch.rand(2, 1, 8, 8, 12)
    coarse = weight.numpy().reshape(2, 4, 2, 4, 2, 6, 2).mean((2, 4, 6))
    mean, deviation = moments(sums_of([torch.rand(2, 1, 8, 8, 12), tap], weight))
    for row in range(2):
        for channel in range(3):
            values = tap[row, channel].numpy()
            expected = np.average(values, weights=coarse[row])
            assert mean[row, 1 + channel] == pytest.approx(expected, abs=1e-5)
            spread = np.sqrt(np.average((values - expected) ** 2, weights=coarse[row]))
            assert deviation[row, 1 + channel] == pytest.approx(spread, abs=1e-4)
    left, right = (weight.clone() for _ in range(2))
    left[..., 6:], right[..., :6] = 0, 0
    parts = [sums_of([tap[:, :1].repeat(1, 1, 2, 2, 2), tap], w) for w in (left, right)]
    whole = sums_of([tap[:, :1].repeat(1, 1, 2, 2, 2), tap], weight)
    for a, b, both in zip(*parts, whole, strict=True):
        torch.testing.assert_close(a + b, both)


def test_adain_gives_the_wanted_mean_and_deviation():
    network = random_network()
    network.usual.fill_(1e-6)
    features, weight = torch.rand(1, 5, 6, 6, 6), (torch.rand(1, 1, 24, 24, 24) < 0.7).float()
    mean, deviation = moments(sums_of([torch.rand(1, 7, 24, 24, 24), torch.rand(1, 0, 12, 12, 12),
                                       features], weight))  # fmt: skip
    own, wanted = random_style(network), random_style(network, 1)
    own[:, 7:12], own[:, 19:24] = mean[:, 7:], deviation[:, 7:]
    wanted[:, 19:24] = deviation[:, 7:] * torch.tensor([0.5, 0.8, 1.0, 2.0, 3.9])
    found = network.adain(features, own, wanted)
    coarse = weight.numpy().reshape(6, 4, 6, 4, 6, 4).mean((1, 3, 5))
    for channel, values in enumerate(found[0].numpy()):
        middle = np.average(values, weights=coarse)
        assert middle == pytest.approx(float(wanted[0, 7 + channel]), abs=1e-4)
        spread = np.sqrt(np.average((values - middle) ** 2, weights=coarse))
        assert spread == pytest.approx(float(wanted[0, 19 + channel]), rel=1e-3)


def test_equal_styles_draw_the_same_picture_twice():
    network, features = random_network(), torch.rand(1, 5, 4, 4, 4)
    style, other = random_style(network), random_style(network, 3)
    drawn, redrawn = network.draw(features, style, style)
    torch.testing.assert_close(drawn, redrawn, atol=1e-5, rtol=1e-5)
    drawn, redrawn = network.draw(features, style, other)
    assert (drawn - redrawn).abs().max() > 1e-3
    assert drawn.shape == (1, 1, 16, 16, 16)


def test_differences_of_styles_are_bounded_and_turn_sign():
    network = random_network()
    a, b = random_style(network), random_style(network, 1)
    torch.testing.assert_close(network.difference(a, b), -network.difference(b, a))
    assert network.difference(a, 1e6 * b).max() == 3
    assert not network.difference(a, a).any()


def test_one_level_is_no_network():
    with pytest.raises(ValueError, match="two levels"):
        HailNetwork([8])
    assert HailNetwork.from_config(random_network().config()).widths == (3, 4, 5)


# --- cubes and losses


def test_cubes_of_a_pair_are_cut_at_one_place():
    index = torch.arange(20 * 24 * 22, dtype=torch.float32).reshape(20, 24, 22)
    mask = torch.zeros(20, 24, 22, dtype=torch.bool)
    mask[4:16, 4:20, 4:18] = True
    images, masks = cut_cubes([(index, mask), (-index, mask)], 8, 5, generator())
    assert images.shape == masks.shape == (2, 5, 8, 8, 8)
    assert torch.equal(images[0], -images[1])
    assert len(images[0].flatten(1).min(dim=1).values.unique()) > 2
    steps = {float(s) for s in (images[0, :, 1:] - images[0, :, :-1]).flatten()}
    assert steps == {-528.0, 528.0}, "the first axis is mirrored at times, the others never"
    assert (images[0, :, :, 1:] - images[0, :, :, :-1] == 22).all()
    for cube, inside in zip(images[0], masks[0], strict=True):
        assert torch.equal(mask.flatten()[cube.flatten().long()], inside.flatten() > 0)


def test_a_place_holds_brain_of_both():
    first, second = torch.zeros(2, 30, 30, 30, dtype=torch.bool)
    first[:16], second[12:] = True, True
    for seed in range(5):
        place = draw_place([first, second], 10, generator(seed))
        assert first[place].float().mean() >= 0.4
        assert second[place].float().mean() >= 0.2
    tiny = torch.zeros(30, 30, 30, dtype=torch.bool)
    tiny[15, 15, 15] = True
    assert tiny[draw_place([tiny], 20, generator(1))].any()


def test_dissimilarity_is_l1_and_ssim():
    a, b = np.random.default_rng(0).random((2, 12, 13, 14)).astype(np.float32)
    _, values = structural_similarity(a, b, win_size=7, data_range=1.0, full=True,
                                      use_sample_covariance=False)  # fmt: skip
    inner = (slice(3, -3),) * 3
    expected = np.abs(a - b).mean() + 1 - values[inner].mean()
    first, second = (torch.from_numpy(v)[None, None] for v in (a, b))
    found = dissimilarity(first, second, torch.ones_like(first))
    assert float(found) == pytest.approx(expected, abs=1e-5)
    mask = (torch.rand(first.shape, generator=generator()) < 0.5).float()
    assert float(dissimilarity(first, first, mask)) == pytest.approx(0, abs=1e-5)
    spoiled = first + 9 * (1 - mask)
    assert torch.equal(dissimilarity(spoiled, second, mask), dissimilarity(first, second, mask))


def test_local_change_is_guided_transfer():
    rng = np.random.default_rng(0)
    scan, change = rng.random((2, 9, 10, 8)).astype(np.float32)
    mask = rng.random(scan.shape) < 0.8
    expected = guided_transfer(scan, change, mask, radius=2, noise=0.05)
    tensors = [torch.from_numpy(v.astype(np.float32))[None, None] for v in (scan, change, mask)]
    found = local_change(*tensors, radius=2, noise=0.05)
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=1e-4)


def batch_of(network):
    scans = scans_of(VOLUMES)
    styles = {scan.volume: style_of(network, scan.brain, 32) for scan in scans}
    set_units(network, list(styles.values()))
    return draw_pairs(scans, scans, styles, tiny_preset(), generator(2))


def test_losses_of_a_scan_towards_itself():
    """Nothing is to be done but to redraw it; then half the pairs mirror the others."""
    network = random_network()
    x, m, t, n, own, wanted = batch_of(network)
    assert torch.equal(x[0], t[1])
    assert torch.equal(m[1], n[0])
    assert torch.equal(own[0], wanted[1])
    found = transfer(network, (x, m, x, m, own, own), radius=1, noise=0.03)
    assert float(found["style"]) < 1e-6
    assert float(found["content"]) < 1e-6
    assert float(found["intensity"]) < 1e-5
    assert float(found["consistency"]) > 0.01
    total = weighted(found, Weights(style=0, content=0, intensity=0, consistency=3))
    assert float(total) == pytest.approx(3 * float(found["consistency"]))


def test_losses_towards_another_scan():
    """Without a change (decoder silent, equal units) the losses are plain differences."""
    network = random_network()
    batch = batch_of(network)
    for weight in network.decoder.last.parameters():
        weight.zero_()
    x, m, t, n, own, wanted = batch
    found = transfer(network, batch, radius=1, noise=0.03)
    far = [
        np.abs(
            np.quantile(x[k][m[k] > 0].numpy(), (np.arange(17) + 0.5) / 17)
            - np.quantile(t[k][n[k] > 0].numpy(), (np.arange(17) + 0.5) / 17)
        ).mean()
        for k in range(len(x))
    ]
    assert float(found["intensity"]) == pytest.approx(np.mean(far), abs=1e-5)
    taps = network.encoder(x.flatten(0, 1)[:, None])
    wide = [v.repeat_interleave(x.shape[1], 0) for v in (own, wanted)]
    goal = network.adain(taps[-1], *wide)
    share = torch.nn.functional.avg_pool3d(m.flatten(0, 1)[:, None], 4)
    error = ((taps[-1] - goal) ** 2 * share).sum() / (5 * share.sum())
    unit = float((network.usual[-5:] ** 2).mean())
    assert float(found["content"]) == pytest.approx(float(error) / unit, rel=1e-4)
    assert float(found["style"]) > 1e-3


# --- whole brains


def test_windows_add_up_and_meet_the_same_cells():
    shape, total = (72, 40, 64), np.zeros((72, 40, 64))
    count = 0
    for place, (u, v, w) in windows(shape, 32, 4):
        assert all(s.start % 4 == 0 and s.stop % 4 == 0 for s in place)
        assert all(s.stop <= n for s, n in zip(place, shape, strict=True))
        total[place] += np.einsum("i,j,k->ijk", u, v, w)
        if place[0].start > 0:
            assert not u[:4].any()
        count += 1
    np.testing.assert_allclose(total, 1, atol=1e-12)
    assert count == 3 * 2 * 3
    ((place, _),) = windows((20, 24, 16), 32, 4)
    assert place == (slice(0, 20), slice(0, 24), slice(0, 16))


def test_windows_are_exact_where_no_border_is_near():
    """A 3 x 3 x 3 convolution sees one voxel around it, and borders weigh nothing."""
    image = torch.rand(1, 1, 48, 20, 20, generator=generator())
    kernel = torch.rand(1, 1, 3, 3, 3, generator=generator(1))
    whole = torch.nn.functional.conv3d(image, kernel, padding=1)[0, 0]
    found = torch.zeros_like(whole)
    for place, weights in windows(image.shape[2:], 32, 2):
        part = torch.nn.functional.conv3d(image[(0, 0, *place)][None, None], kernel, padding=1)
        found[place] += part[0, 0] * torch.from_numpy(np.einsum("i,j,k->ijk", *weights)).float()
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


def test_windows_draw_what_the_whole_brain_gives():
    """Two levels see 10 voxels around, borders of 96 / 8 have no say: it is exact."""
    network = random_network((2, 3))
    image = torch.rand(141, 15, 14, generator=generator())
    mask = torch.ones(image.shape, dtype=torch.bool)
    own = style_of(network, (image, mask), 96)
    torch.testing.assert_close(own, style_of(network, (image, mask), 144), atol=1e-5, rtol=1e-4)
    wanted = random_style(network)[0]
    parts = draw_brain(network, (image, mask), own, wanted, 96)
    whole = draw_brain(network, (image, mask), own, wanted, 144)
    for a, b in zip(parts, whole, strict=True):
        assert a.shape == image.shape
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_constant_region_stays_constant_across_windows():
    network = random_network((2, 3))
    image, mask = torch.full((144, 24, 24), 0.6), torch.ones(144, 24, 24, dtype=torch.bool)
    style = style_of(network, (image, mask), 96)
    drawn, _ = draw_brain(network, (image, mask), style, random_style(network)[0], 96)
    along = drawn[10:-10, 12, 12]
    assert float(along.max() - along.min()) < 1e-5
    assert float(drawn.std()) > 0.01


def test_style_counts_the_brain_only():
    network = random_network()
    image, mask = (torch.from_numpy(v) for v in (VOLUMES[0].data, VOLUMES[0].mask))
    style = style_of(network, (image, mask), 32)
    tap = network.encoder(torch.nn.functional.pad(image, (0, 2))[None, None])[0][0, 1].numpy()
    inside = np.pad(mask.numpy(), ((0, 0), (0, 0), (0, 2)))
    assert float(style[1]) == pytest.approx(tap[inside].mean(), rel=1e-3)
    at = (np.arange(QUANTILES) + 0.5) / QUANTILES
    expected = np.quantile(image.numpy()[mask.numpy()], at)
    np.testing.assert_allclose(style[-QUANTILES:], expected, atol=1e-5)
    assert torch.equal(quantiles_of(image[mask]), style[-QUANTILES:])


def test_the_change_is_bounded_and_keeps_the_background():
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.random((12, 12, 12)), 1).astype(np.float32)
    mask = np.zeros(image.shape, dtype=bool)
    mask[2:-2, 2:-2, 2:-2] = True
    case = torch.from_numpy(image * mask), torch.from_numpy(mask)
    same, share = changed(case, torch.zeros(image.shape), 2, 0.03)
    assert np.array_equal(same, image * mask)
    assert share == 0
    more, share = changed(case, torch.full(image.shape, 0.8), 2, 0.03)
    np.testing.assert_allclose(more[mask], image[mask] + MOST_CHANGE, atol=1e-5)
    assert share == 1
    less, _ = changed(case, torch.full(image.shape, -5.0), 2, 0.03)
    assert less.min() == 0
    assert not more[~mask].any()


# --- training


def test_who_is_held_out():
    people = [("a", f"{k:02d}") for k in range(10)] + [("b", f"{k:02d}") for k in range(20, 24)]
    assert held_out_subjects(people) == {"08", "09", "23"}
    assert held_out_subjects([("a", "1"), ("a", "2"), ("b", "3")]) == {"2"}
    travelling = [(site, str(k)) for site in "ab" for k in range(5)]
    assert held_out_subjects(travelling) == {"4"}
    for few in ([("a", "1"), ("b", "2")], [("a", "1"), ("b", "1")]):
        with pytest.raises(ScanError, match="give scans of more subjects"):
            held_out_subjects(few)


def test_one_site_is_refused():
    with pytest.raises(ScanError, match=r"T1w: scans of two sites .* give scans of another site"):
        Hail.fit(VOLUMES[:3], seed=0)
    small = replace(VOLUMES[3], data=VOLUMES[3].data[:-1], mask=VOLUMES[3].mask[:-1])
    with pytest.raises(ScanError, match="different shapes"):
        scans_of([*VOLUMES[:3], small])


def test_a_modality_of_one_site_is_left_out_before_anything_is_trained(caplog):
    flair = [replace(v, modality="FLAIR") for v in VOLUMES[:3]]
    with caplog.at_level("WARNING", "bids_harmony"):
        found = learnable(
            "hail", [*flair, *VOLUMES], frozenset(),
            lambda people: held_out_subjects([(k.site, k.subject) for k in people]),
        )  # fmt: skip
    assert found == {"T1w": list(range(3, 3 + len(VOLUMES)))}
    assert "left out of the training: FLAIR: scans of two sites" in caplog.text


# --- the method


def tiny_preset(steps=50):
    plan = Plan(steps, 4e-3, every=max(steps // 2, 1), half=False)
    return replace(
        Hail.presets_by_name["cpu"], widths=(6, 12), patch=12, places=2, pairs=2, window=64,
        autoencoder=replace(plan, steps=min(steps, 30)), transfer=plan,
    )  # fmt: skip


def kind(steps=50):
    return type("Hail", (Hail,), {"presets_by_name": {"cpu": tiny_preset(steps)}})


KIND = kind()


@pytest.fixture(scope="module")
def fitted():
    torch.set_num_threads(1)
    return KIND.fit(VOLUMES, seed=0)


def tolerant(method):
    """It learned for seconds only: what it cannot redraw is taken all the same."""
    for name, part in method._parts.items():
        method._parts[name] = replace(part, redrawing=Range(0.0, 1e3, 1e3))
    return method


@pytest.fixture(scope="module")
def model(fitted):
    return tolerant(fitted.towards(VOLUMES[3:5], seed=0))


@pytest.fixture
def scan():
    return brain(9)


def test_card_and_contract(fitted, model):
    card = registry.available()["hail"]
    assert registry.load("hail") is Hail
    assert (card.by_example, card.sites_to_train, card.paired) == (True, 2, False)
    for preset, millimetres in (("cpu", 2.0), ("paper", 1.0)):
        contract = Hail.contract_for_preset(["T1w"], preset)
        assert (contract.grid, contract.resolution) == (card.grid, millimetres)
        assert (contract.scale, contract.masked) == ("robust", True)
    assert Hail.contract_for(["T1w"]) == Hail.contract_for_preset(["T1w"], "cpu")
    assert fitted.contract == model.contract == KIND.contract_for(("T1w",))
    for preset in Hail.presets_by_name.values():
        divisor = 2 ** (len(preset.widths) - 1)
        assert preset.patch % divisor == preset.window % divisor == preset.pairs % 2 == 0


def test_output_contract(model, scan):
    data, mask = scan.data.copy(), scan.mask.copy()
    result = model.harmonize(scan, seed=3)
    assert np.array_equal(scan.data, data)
    assert np.array_equal(scan.mask, mask)
    assert (result.data.dtype, result.data.shape) == (np.float32, SHAPE)
    assert np.isfinite(result.data).all()
    assert result.data.min() >= 0
    assert not result.data[~mask].any()
    json.dumps([result.details, result.warnings], allow_nan=False)
    assert result.details["examples"] == 2
    change = np.abs(result.data - data)[mask].mean()
    assert result.details["mean_absolute_change"] == pytest.approx(change, abs=1e-4)
    torch.rand(7)
    again = model.harmonize(scan, seed=4)
    assert np.array_equal(result.data, again.data)
    assert result.details == again.details


def test_it_goes_towards_the_examples(model, scan):
    """The same brain at the examples' site is the truth."""
    result, truth = model.harmonize(scan, seed=0), brain(9, "b")
    before = np.abs(scan.data - truth.data)[scan.mask].mean()
    after = np.abs(result.data - truth.data)[scan.mask].mean()
    assert after < 0.8 * before
    gone = result.details["intensity_distance_to_examples"]
    assert gone["after"] < 0.8 * gone["before"]


def test_the_scans_own_style_changes_nothing(fitted, scan):
    (part,) = fitted.towards([scan], seed=0)._parts.values()
    drawing = part.draw(tuple(torch.from_numpy(v) for v in (scan.data, scan.mask)),
                        part.wanted, part.wanted)  # fmt: skip
    np.testing.assert_allclose(drawing.data, scan.data, atol=1e-5)


def test_what_lies_outside_the_mask_has_no_say(model, scan):
    spoiled = replace(scan, data=np.where(scan.mask, scan.data, np.nan).astype(np.float32))
    found = [model.harmonize(v, seed=0).data for v in (scan, spoiled)]
    assert np.array_equal(*found)


def test_examples_are_averaged_and_replaced(fitted, scan):
    one, other, both = (
        fitted.towards(v, seed=0) for v in (VOLUMES[3:4], VOLUMES[4:5], VOLUMES[3:5])
    )
    styles = [m._parts["T1w"].wanted for m in (one, other, both)]
    torch.testing.assert_close((styles[0] + styles[1]) / 2, styles[2])
    again = both.towards(VOLUMES[3:4], seed=0)
    assert torch.equal(again._parts["T1w"].wanted, styles[0])
    assert again._parts["T1w"].examples == (VOLUMES[3].name,)
    assert fitted._parts["T1w"].wanted is None, "the trained method itself is not changed"


def test_state_and_bundle_rebuild_the_method(model, scan, tmp_path):
    wanted = model.harmonize(scan, seed=0)
    made = Hail.from_state(model.arrays(), json.loads(json.dumps(model.params())))
    assert np.array_equal(made.harmonize(scan, seed=0).data, wanted.data)
    assert made.params() == model.params()
    save_bundle(tmp_path / "m", model, meta={"name": "m", "seed": 0})
    stored = load_bundle(tmp_path / "m").method
    assert np.array_equal(stored.harmonize(scan, seed=0).data, wanted.data)
    arrays = dict(model.arrays())
    del arrays["T1w/network/decoder.last.bias"]
    with pytest.raises(ScanError, match="not those of the network"):
        Hail.from_state(arrays, model.params())
    with pytest.raises(ScanError, match="appearance"):
        Hail.from_state({**model.arrays(), "T1w/wanted": np.ones(3)}, model.params())


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A training of few steps, and its folder."""
    folder = tmp_path_factory.mktemp("training")
    return kind(2).fit(VOLUMES, seed=1, training=Training(folder=folder)), folder


def test_equal_trainings_are_equal_and_a_finished_one_is_not_repeated(short):
    first, folder = short
    names = {path.parent.name.partition("-")[0] for path in folder.rglob("*.ckpt")}
    assert names == {"autoencoder", "transfer"}
    for training in (Training(folder=folder), Training()):
        other = kind(2).fit(VOLUMES, seed=1, training=training)
        for key, value in first.arrays().items():
            assert np.array_equal(value, other.arrays()[key]), key
        assert other.params() == first.params()


def test_the_encoder_is_frozen_in_the_second_phase(short):
    made, folder = short
    stored = torch.load(folder / "T1w" / "autoencoder" / "last.ckpt", weights_only=True)
    (kept,) = (v["state"] for v in stored["callbacks"].values() if "state" in v)
    changed_in = set()
    for key, value in made.arrays().items():
        if key.startswith("T1w/network/"):
            name = key.removeprefix("T1w/network/")
            if not np.array_equal(value, kept[name].numpy()):
                changed_in.add(name.split(".")[0])
    assert changed_in == {"decoder", "usual"}


def test_files_and_scores(fitted):
    files, scores = fitted.files(), fitted.scores()["T1w"]
    assert set(files) == {"T1w_curves.csv", "T1w_training.png", "T1w_transfer.png"}
    assert files["T1w_transfer.png"].startswith(b"\x89PNG")
    assert files["T1w_curves.csv"].splitlines()[0] == b"network,step,loss,held_out"
    assert scores["sites"] == {"a": 3, "b": 3}
    assert scores["held_out_subjects"] == 2
    left = sum(scores["held_out_distance_after"]) / sum(scores["held_out_distance_before"])
    assert scores["held_out_distance_left"] == pytest.approx(left, abs=0.01)
    assert scores["transfer"]["steps"] == 50
    json.dumps(scores, allow_nan=False)


def test_a_network_that_learned_too_little_says_so(model, scan):
    part = model._parts["T1w"]
    for mean, told in ((0.3, False), (0.9, True)):
        redrawing = replace(part.redrawing, mean=mean, flag=9.0, refuse=9.0)
        made = type(model)({"T1w": replace(part, redrawing=redrawing)}, "cpu")
        warnings = " ".join(made.harmonize(scan, seed=0).warnings)
        assert ("train it for longer" in warnings) == told


def test_what_cannot_be_is_refused(fitted, model, scan):
    with pytest.raises(ScanError, match="not shown how T1w scans should look; give it examples"):
        fitted.harmonize(scan, seed=0)
    flair = replace(scan, modality="FLAIR")
    for use in (lambda: model.harmonize(flair, seed=0), lambda: model.towards([flair], seed=0)):
        with pytest.raises(ScanError, match="trained on T1w only; train it on FLAIR too"):
            use()
    with pytest.raises(ScanError, match="no scan was given"):
        model.towards([], seed=0)
    with pytest.raises(UsageError, match="no preset 'huge'; choose from cpu"):
        KIND.fit(VOLUMES, seed=0, training=Training("huge"))
    with pytest.raises(ScanError, match="two sites"):
        KIND.fit(VOLUMES[:3], seed=0)
    empty = replace(scan, mask=np.zeros_like(scan.mask))
    with pytest.raises(ScanError, match="mask is empty"):
        model.harmonize(empty, seed=0)
    made = fitted.towards([empty, scan], seed=0)
    assert made._parts["T1w"].examples == (scan.name,)
    with pytest.raises(ScanError, match=r"no example can be used: .*mask is empty"):
        fitted.towards([empty], seed=0)


def test_other_contrasts_and_noise_are_refused(model, scan):
    other = replace(flow_brains.brain(9, shape=SHAPE, modality="T2w"), modality="T1w")
    rng = np.random.default_rng(0)
    noise = replace(scan, data=np.where(scan.mask, rng.random(SHAPE), 0).astype(np.float32))
    for wrong in (other, noise):
        with pytest.raises(ScanError, match=r"elsewhere than in T1w brains .* check modality"):
            model.harmonize(wrong, seed=0)


def test_a_scan_that_is_redrawn_badly_is_told_or_refused(model, scan):
    made = Hail.from_state(model.arrays(), model.params())
    part = made._parts["T1w"]
    made._parts["T1w"] = replace(part, redrawing=Range(0.01, 0.02, 1e3))
    assert any("redraws this scan badly" in w for w in made.harmonize(scan, seed=0).warnings)
    made._parts["T1w"] = replace(part, redrawing=Range(0.01, 0.015, 0.02))
    with pytest.raises(ScanError, match=r"cannot redraw it .* use a statistical method"):
        made.harmonize(scan, seed=0)


def heavy_below(volume):
    """The brain without its lower corners: upside down is another brain."""
    mask = volume.mask.copy()
    mask[:, : SHAPE[1] // 2, : SHAPE[2] // 3] = False
    return replace(volume, mask=mask, data=np.where(mask, volume.data, 0))


def test_a_turned_brain_is_refused(model, scan):
    cut = [heavy_below(v) for v in (*VOLUMES, scan)]
    cells = [rank_cells(*brain_of(v), v.spacing)[0] for v in cut[:-1]]
    made = Hail.from_state(model.arrays(), model.params())
    part = made._parts["T1w"]
    alike = replace(part.likeness, layout=Layout.of(cells))
    made._parts["T1w"] = replace(part, likeness=alike)
    assert made.harmonize(cut[-1], seed=0).data.max() > 0
    wrong = replace(cut[-1], data=cut[-1].data[:, :, ::-1], mask=cut[-1].mask[:, :, ::-1])
    with pytest.raises(ScanError, match=r"lies turned: .* inferior; correct the header"):
        made.harmonize(wrong, seed=0)


def test_ranges_widen_with_the_spread():
    narrow = Range.of([0.1, 0.1], [0.1], (0.2, 0.5))
    assert (narrow.flag, narrow.refuse) == (pytest.approx(0.3), pytest.approx(0.6))
    wide = Range.of([0.0, 0.4], [0.2], (0.2, 0.5))
    assert wide.flag == pytest.approx(0.2 + 4 * np.std([0, 0.4, 0.2]))
