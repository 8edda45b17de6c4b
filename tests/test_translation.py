"""Learned comparators: alignment of pairs, slices, losses, and the three methods."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")

import contrast_brains  # noqa: E402

from bids_harmony.errors import ScanError, UsageError  # noqa: E402
from bids_harmony.imaging.align import find_rigid, moved, mutual_information  # noqa: E402
from bids_harmony.methods import stylegan  # noqa: E402
from bids_harmony.methods.base import Training  # noqa: E402
from bids_harmony.methods.bundle import load_bundle, save_bundle  # noqa: E402
from bids_harmony.methods.cyclegan import CycleGan  # noqa: E402
from bids_harmony.methods.slice_translation import drawn_across, site_brains  # noqa: E402
from bids_harmony.methods.stylegan import StyleGan, style_of  # noqa: E402
from bids_harmony.methods.unet import PairedUNet, in_place, travelling_pairs  # noqa: E402
from bids_harmony.networks.translation import (  # noqa: E402
    CycleNetworks,
    SliceTranslator,
    StyleNetworks,
)
from bids_harmony.training import translation  # noqa: E402
from bids_harmony.training.plan import Plan  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


SITES = {"a": (1, 2, 3), "b": (4, 5, 6)}
VOLUMES = contrast_brains.cohort(SITES, ("T1w",))
AT_A = frozenset(v.name for v in VOLUMES if v.site == "a")
SITE_0 = torch.zeros(2, dtype=torch.long)
TRAVELLERS = contrast_brains.cohort({"a": (1, 2, 3), "b": (1, 2, 3)}, ("T1w",))


def wanted(volumes, site="a"):
    return Training(wanted=frozenset(v.name for v in volumes if v.site == site))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_mutual_information_of_what_is_known():
    values = np.repeat(np.arange(4.0), 500)
    assert mutual_information(values, values) == pytest.approx(2)
    assert mutual_information(values, 3 - values) == pytest.approx(2)
    rng = np.random.default_rng(0)
    assert mutual_information(values, rng.permutation(values)) < 0.02


def test_a_motion_is_found_in_another_contrast():
    first = contrast_brains.scan(1, "a", "T1w", noise=0.003)
    second = contrast_brains.scan(1, "a", "T2w", noise=0.003)
    motion = np.array([2.0, -1.5, 3.0, 1.2, -2.0, 0.8])
    away = moved(second.data, first.mask, motion, first.spacing)
    found, before, after = find_rigid(first.data, away, first.mask, first.spacing)
    assert after > before
    back = moved(away, first.mask, found, first.spacing)
    inside = ndimage.binary_erosion(first.mask, iterations=4)
    error = np.abs(back - second.data)[inside].mean()
    assert error < 0.4 * np.abs(away - second.data)[inside].mean()
    still, *_ = find_rigid(first.data, second.data, first.mask, first.spacing)
    assert np.abs(still).max() < 0.6


def test_moved_is_the_stated_rigid_motion():
    """A linear image moved by a shift and a turn has known values."""
    mask = np.ones((21, 21, 21), bool)
    places = np.moveaxis(np.indices(mask.shape), 0, -1).astype(float)
    image = places @ [1.0, 2.0, -1.0]
    size = (2.0, 1.0, 4.0)
    shifted = moved(image, mask, np.array([0, 0, 0, 2.0, 1.0, -4.0]), size)
    expected = image + 1 * 1.0 + 1 * 2.0 + 1 * 1.0
    np.testing.assert_allclose(shifted[2:-2, 2:-2, 2:-2], expected[2:-2, 2:-2, 2:-2], atol=1e-3)
    turned = moved(image, mask, np.array([0, 0, 90.0, 0, 0, 0]), (1.0, 1.0, 1.0))
    away = places - 10
    expected = (np.stack((-away[..., 1], away[..., 0], away[..., 2]), -1) + 10) @ [1, 2, -1]
    np.testing.assert_allclose(turned[3:-3, 3:-3, 3:-3], expected[3:-3, 3:-3, 3:-3], atol=1e-3)


def test_pairs_are_travelling_subjects_in_one_place():
    brains = site_brains(TRAVELLERS, wanted(TRAVELLERS).wanted)
    pairs = travelling_pairs(brains, 2.0)
    assert [(a.subject, a.site, b.subject, b.site) for a, b in pairs] == [
        (k, "b", k, "a") for k in ("01", "02", "03")
    ]
    other, theirs = pairs[0]
    shifted = replace(
        theirs,
        image=torch.roll(theirs.image, 2, dims=0),
        mask=torch.roll(theirs.mask, 2, dims=0),
    )
    back = in_place(other, shifted, 2.0)
    inside = (other.mask & theirs.mask & back.mask).numpy()
    error = np.abs((back.image - theirs.image).numpy())[inside].mean()
    assert error < 0.3 * np.abs((shifted.image - theirs.image).numpy())[inside].mean()
    assert travelling_pairs(site_brains(VOLUMES, AT_A), 2.0) == []


def test_slices_of_pairs_show_one_place():
    brains = site_brains(TRAVELLERS, wanted(TRAVELLERS).wanted)
    pairs = [(b, a) for a, b in zip(brains[:3], brains[3:], strict=True)]
    draw = translation.PairedSlices(pairs, side=40, count=8)
    batch = draw(generator())
    assert torch.equal(batch.input_mask, batch.wanted_mask)
    inside = batch.input_mask > 0
    r = np.corrcoef(batch.input[inside], batch.wanted[inside])[0, 1]
    assert r > 0.9
    again = draw(generator())
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


def test_slices_of_two_groups():
    brains = site_brains(VOLUMES, AT_A)
    draw = translation.UnpairedSlices(
        [b for b in brains if not b.wanted], [b for b in brains if b.wanted], side=40, count=64
    )
    batch = draw(generator())
    means = [float(x[m > 0].mean()) for x, m in (batch[:2], batch[2:4])]
    truth = [np.mean([v.data[v.mask].mean() for v in VOLUMES if v.site == s]) for s in "ba"]
    assert means == pytest.approx(truth, abs=0.06)
    assert not batch.input[batch.input_mask == 0].any()


def flat_brains(**levels):
    """A brain of one grey value for each site, in the order of their names."""
    first = site_brains(VOLUMES, AT_A)[0]
    return [
        replace(first, image=level * first.mask, site=site, name=site, subject=site)
        for site, level in levels.items()
    ]


def test_slices_tell_the_wanted_site():
    brains = flat_brains(a=0.3, b=0.7)
    batch = translation.UnpairedSlices(brains, brains, side=40, count=64)(generator())
    assert set(batch.wanted_site.tolist()) == {0, 1}
    level = torch.tensor([0.3, 0.7])[batch.wanted_site][:, None, None, None]
    assert torch.equal(batch.wanted, level * batch.wanted_mask)


def test_held_out_score_of_styles_is_by_site():
    """Of two sites .4 apart an unchanged slice is .2 away on average, not 0 as both together."""
    brains = flat_brains(a=0.3, b=0.7)
    nets = StyleNetworks(4, 2, 2)
    nets.draw = lambda x, style, mask: x
    drawer = translation.UnpairedSlices(brains, brains, side=40, count=16)
    score = stylegan._held_out(nets, drawer, seed=0)
    assert score() == pytest.approx(0.2, abs=0.06)


def test_paired_loss_is_l1_and_edges():
    net = SliceTranslator(4, 2)
    x, y, m = (torch.rand(2, 1, 16, 16) for _ in range(3))
    m = (m > 0.3).float()
    x, y = x * m, y * m
    l1 = ((x - y).abs() * m).sum() / m.sum()
    rest, edges = x - y, 0
    for _ in range(3):
        edges = edges + rest.diff(dim=-1).abs().mean() + rest.diff(dim=-2).abs().mean()
        rest = torch.nn.functional.avg_pool2d(rest, 2)
    found = translation.paired_loss(net, translation.SlicePair(x, m, y, m, SITE_0))
    assert found.item() == pytest.approx(float(l1 + 0.5 * edges), abs=1e-6)


def test_patches_count_by_their_share_of_brain():
    values = torch.tensor([[[[1.0, 10.0], [100.0, 1000.0]]]])
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4, :4] = 1  # the first patch whole, half of the one below
    mask[..., 4:, :2] = 1
    assert float(translation.patch_mean(values, mask)) == pytest.approx((1 + 50) / 1.5)
    assert float(translation.patch_mean(values, 0 * mask)) == 0


def test_cycle_losses_of_networks_that_do_nothing():
    nets = CycleNetworks(4, 2).eval()
    x, y = torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32)
    ones = torch.ones_like(x)
    batch = translation.SlicePair(x, ones, y, ones, SITE_0)
    of_y, of_x = nets.judges
    fooled = (of_y(x) - 1).square().mean() + (of_x(y) - 1).square().mean()
    assert translation.cycle_loss(nets, batch).item() == pytest.approx(fooled.item(), rel=1e-4)
    judged = 0.5 * (
        (of_y(y) - 1).square().mean() + (of_x(x) - 1).square().mean()
        + of_y(x).square().mean() + of_x(y).square().mean()
    )  # fmt: skip
    found = translation.cycle_judge_loss(nets, batch)
    assert found.item() == pytest.approx(judged.item(), rel=1e-4)
    found.backward()
    assert all(p.grad is None for p in nets.to_reference.parameters())


def test_cycle_losses_of_translators_that_add_a_number():
    """Each loss in its own mask and with its own weight."""
    nets = CycleNetworks(4, 2).eval()
    add, back = 0.2, 0.05
    with torch.no_grad():
        nets.to_reference.unet.head.bias.fill_(add)
        nets.to_other.unet.head.bias.fill_(-back)
    x_mask, y_mask = torch.zeros(2, 1, 32, 32), torch.zeros(2, 1, 32, 32)
    x_mask[..., :20, :12], y_mask[..., 8:, 10:] = 1, 1
    x, y = torch.rand_like(x_mask) * x_mask, torch.rand_like(y_mask) * y_mask
    batch = translation.SlicePair(x, x_mask, y, y_mask, SITE_0)
    to_y, to_x = (x + add) * x_mask, (y - back) * y_mask
    of_y, of_x = nets.judges
    mean = translation.patch_mean
    fooled = mean((of_y(to_y) - 1) ** 2, x_mask) + mean((of_x(to_x) - 1) ** 2, y_mask)
    there_and_back, own = 2 * (add - back), add + back
    expected = fooled.item() + 1.0 * there_and_back + 0.5 * own
    assert translation.cycle_loss(nets, batch).item() == pytest.approx(expected, rel=1e-4)
    judged = mean((of_y(y) - 1) ** 2, y_mask) + mean((of_x(x) - 1) ** 2, x_mask)
    judged = judged + mean(of_y(to_y) ** 2, x_mask) + mean(of_x(to_x) ** 2, y_mask)
    found = translation.cycle_judge_loss(nets, batch).item()
    assert found == pytest.approx(0.5 * judged.item(), rel=1e-4)


def test_style_losses_ask_for_the_wanted_site():
    """Each slice is judged as one of the wanted site, by its share of brain."""
    nets = StyleNetworks(4, 2, 3).eval()
    x, y = torch.rand(3, 1, 32, 32), torch.rand(3, 1, 32, 32)
    x_mask, y_mask = torch.ones_like(x), torch.ones_like(y)
    x_mask[..., 16:, :], y_mask[..., :8] = 0, 0
    x, y = x * x_mask, y * y_mask
    batch = translation.SlicePair(x, x_mask, y, y_mask, torch.tensor([2, 0, 1]))
    own, style = nets.encoder(x), nets.encoder(y)
    drawn = nets.draw(x, style, x_mask)
    softplus, mean = torch.nn.functional.softplus, translation.patch_mean
    of_y, of_drawn = (
        torch.stack([nets.judge(k)[row, site] for row, site in enumerate((2, 0, 1))])[:, None]
        for k in (y, drawn)
    )
    judged = mean(softplus(-of_y), y_mask) + mean(softplus(of_drawn), x_mask)
    found = translation.style_judge_loss(nets, batch)
    assert found.item() == pytest.approx(judged.item(), rel=1e-4)
    found.backward()
    moved_ones = {name.split(".")[0] for name, p in nets.named_parameters() if p.grad is not None}
    assert moved_ones == {"judge"}

    def apart(a, b):
        return (a - b).abs().sum() / x_mask.sum()

    cycle = apart(nets.draw(drawn, own, x_mask), x) + apart(nets.draw(x, own, x_mask), x)
    diverse = apart(drawn, nets.draw(x, style[[2, 0, 1]], x_mask))
    told = (nets.encoder(drawn) - style).abs().mean()
    expected = mean(softplus(-of_drawn), x_mask) + told + cycle - 0.2 * diverse
    assert translation.style_loss(nets, batch).item() == pytest.approx(expected.item(), rel=1e-4)


def test_networks_of_before_sites_were_told_apart():
    config = StyleNetworks(4, 2).config()
    del config["sites"]
    assert StyleNetworks.from_config(config).sites == 1


def test_drawings_stay_inside_the_mask():
    nets = StyleNetworks(4, 2)
    x, ones = torch.rand(2, 1, 32, 32), torch.ones(2, 1, 32, 32)
    style = nets.encoder(x)
    assert not torch.equal(nets.draw(x, style, ones), x)
    assert not nets.draw(x, style, 0 * ones).any()


def test_intensity_distance_against_numpy():
    a, b = torch.rand(2, 1, 30, 30), 0.5 * torch.rand(2, 1, 30, 30)
    mask = torch.rand(2, 1, 30, 30).gt(0.2).float()
    at = (np.arange(17) + 0.5) / 17
    inside = mask.numpy() > 0
    expected = np.abs(np.quantile(a.numpy()[inside], at) - np.quantile(b.numpy()[inside], at))
    found = translation.intensity_distance(a, mask, b, mask)
    assert found == pytest.approx(expected.mean(), abs=1e-5)


def test_a_brain_is_drawn_across_three_axes():
    volume = VOLUMES[0]
    image, mask = torch.from_numpy(volume.data), torch.from_numpy(volume.mask)
    found = drawn_across(image, mask, 48, "cpu", lambda seen, brain: 2 * seen * brain)
    np.testing.assert_allclose(found, 2 * volume.data * volume.mask, atol=1e-6)


def quick(kind, monkeypatch):
    preset = replace(
        kind.presets_by_name["cpu"], base=4, levels=2, batch=2,
        plan=Plan(12, 2e-3, every=6, half=False),
    )  # fmt: skip
    monkeypatch.setattr(kind, "presets_by_name", {"cpu": preset})


@pytest.mark.parametrize("kind", [PairedUNet, CycleGan, StyleGan])
def test_methods(kind, monkeypatch, tmp_path):
    quick(kind, monkeypatch)
    volumes = TRAVELLERS if kind is PairedUNet else VOLUMES
    model = kind.fit(volumes, seed=0, training=wanted(volumes))
    scan = contrast_brains.scan(20, "b")
    if kind.by_example:
        with pytest.raises(ScanError, match="was not shown how T1w scans should look"):
            model.harmonize(scan, seed=0)
        model = model.towards([v for v in volumes if v.site == "a"], seed=0)
    done = model.harmonize(scan, seed=0)
    assert done.data.shape == scan.data.shape
    assert done.data.min() >= 0
    assert not done.data[~scan.mask].any()
    save_bundle(tmp_path / "model", model, meta={"name": "x", "reference": "a"})
    again = load_bundle(tmp_path / "model").method.harmonize(scan, seed=1)
    assert np.array_equal(again.data, done.data)
    twin = kind.fit(volumes, seed=0, training=wanted(volumes))
    assert all(np.array_equal(twin.arrays()[k], v) for k, v in model.arrays().items()
               if k != "T1w/wanted")  # fmt: skip
    assert model.scores()["T1w"]["steps"] == 12
    with pytest.raises(ScanError, match="trained on T1w only"):
        model.harmonize(replace(scan, modality="T2w"), seed=0)
    other = replace(contrast_brains.scan(20, "b", "T2w"), modality="T1w")
    with pytest.raises(ScanError, match="elsewhere than in T1w brains"):
        model.harmonize(other, seed=0)
    with pytest.raises(UsageError, match="no preset 'huge'"):
        kind.fit(volumes, seed=0, training=Training("huge"))


def test_what_cannot_be_learned_from():
    told = "T1w: unet learns from travelling subjects, and nobody of the training scans"
    with pytest.raises(ScanError, match=told):
        PairedUNet.fit(VOLUMES, seed=0, training=wanted(VOLUMES))
    one = [v for v in TRAVELLERS if v.subject == "01"]
    with pytest.raises(ScanError, match="there is only 01; give scans of two travelling"):
        PairedUNet.fit(one, seed=0, training=wanted(one))
    three = [*VOLUMES, replace(VOLUMES[0], site="c", name="c", subject="09")]
    with pytest.raises(ScanError, match=r"one pair of sites.* are of b, c; choose participants"):
        CycleGan.fit(three, seed=0, training=wanted(three))
    with pytest.raises(ScanError, match="and all are of a"):
        StyleGan.fit(VOLUMES[:3], seed=0, training=wanted(VOLUMES))


def test_a_brighter_brain_has_another_style():
    nets = StyleNetworks(4, 2).eval()
    image, mask = torch.from_numpy(VOLUMES[0].data), torch.from_numpy(VOLUMES[0].mask)
    style = style_of(nets, image, mask, 40)
    assert style.shape == (16,)
    brighter = style_of(nets, 1.5 * image, mask, 40)
    assert float((style - brighter).abs().max()) > 0


@pytest.mark.slow
def test_a_paired_unet_learns_a_contrast(monkeypatch):
    preset = replace(
        PairedUNet.presets_by_name["cpu"], base=8, levels=2,
        plan=Plan(400, 2e-3, every=100, half=False),
    )  # fmt: skip
    monkeypatch.setattr(PairedUNet, "presets_by_name", {"cpu": preset})
    people = contrast_brains.cohort({"a": range(1, 7), "b": range(1, 7)}, ("T1w",))
    model = PairedUNet.fit(people, seed=0, training=wanted(people))
    before, truth = contrast_brains.scan(20, "b"), contrast_brains.scan(20, "a")
    after = model.harmonize(before, seed=0).data
    inside = before.mask
    error = [np.abs(x - truth.data)[inside].mean() for x in (before.data, after)]
    assert error[1] < 0.5 * error[0]
