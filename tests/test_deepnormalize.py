"""deepNormalize: losses, cubes, networks, whole brains, labels from derivatives, its outputs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise

import nibabel as nb
import numpy as np
import pytest
from conftest import DataSet, call, give_transform, quick
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")
pytest.importorskip("monai")

import contrast_brains  # noqa: E402
from contrast_brains import labelled  # noqa: E402

from bids_harmony.errors import ScanError, UsageError  # noqa: E402
from bids_harmony.imaging import tissue_mixture  # noqa: E402
from bids_harmony.imaging.tissue_mixture import mixture_quantiles  # noqa: E402
from bids_harmony.imaging.tissues import TISSUES  # noqa: E402
from bids_harmony.interfaces.files import load  # noqa: E402
from bids_harmony.interfaces.tissues import labels_of, tissue_shares  # noqa: E402
from bids_harmony.methods.base import Training  # noqa: E402
from bids_harmony.methods.bundle import load_bundle, save_bundle  # noqa: E402
from bids_harmony.methods.deepnormalize import (  # noqa: E402
    DeepNormalize,
    PreProcessor,
    Standardization,
)
from bids_harmony.methods.deepnormalize_part import (  # noqa: E402
    matched,
    normalized_brain,
    wanted_quantiles,
)
from bids_harmony.methods.deepnormalize_training import (  # noqa: E402
    box_of,
    discriminator_scores,
    labelled_brain,
    split,
    stacked,
)
from bids_harmony.networks.deepnormalize import (  # noqa: E402
    BRIGHTEST,
    DomainDiscriminator,
    NormalizerNetworks,
)
from bids_harmony.networks.unet3d import UNet3d  # noqa: E402
from bids_harmony.training.common_appearance import (  # noqa: E402
    CommonAppearance,
    separation,
    tissue_distance,
)
from bids_harmony.training.normalizer_losses import (  # noqa: E402
    WEIGHTS,
    deception,
    difference_of_biased,
    discriminator_loss,
    divergence,
    histograms,
    normalizer_loss,
    segmentation_loss,
)
from bids_harmony.training.plan import Plan  # noqa: E402
from bids_harmony.training.tissue_cubes import (  # noqa: E402
    LabelledBrain,
    TissueDrawer,
    bias_field,
    cut_cube,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


VOLUMES = [labelled(seed, "a") for seed in (1, 2, 3)] + [labelled(seed, "b") for seed in (4, 5, 6)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_segmentation_loss_is_the_weighted_dice_of_each_class():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 4, 5, 6, 7))
    share = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    labels = rng.integers(0, 4, (2, 5, 6, 7))
    expected = 0.0
    for number, weight in enumerate((0.22, 0.30, 0.20, 0.28)):  # background, CSF, GM, WM
        truth = labels == number
        shared, total = (share[:, number] * truth).sum(), share[:, number].sum() + truth.sum()
        expected += weight * (1 + 2 * shared) / (1 + total)
    found = segmentation_loss(torch.from_numpy(np.log(share)).float(), torch.from_numpy(labels))
    assert float(found) == pytest.approx(1 - expected, abs=1e-5)
    assert WEIGHTS == (0.22, 0.30, 0.20, 0.28)
    perfect = torch.full((1, 4, 2, 2, 2), -30.0)
    perfect[:, 3] = 0
    whole = torch.full((1, 2, 2, 2), 3)
    assert float(segmentation_loss(perfect, whole)) == pytest.approx(0, abs=1e-6)
    wrong = 0.20 * 8 / 9 + 0.28 * 8 / 9  # grey and white matter; nothing is wrong with the others
    assert float(segmentation_loss(perfect, whole - 1)) == pytest.approx(wrong, abs=1e-5)


def test_deception_is_least_where_cubes_are_taken_for_any_site_s():
    even = torch.log(torch.tensor([[1 / 3, 1 / 3, 1 / 3, 1e-9]]))
    assert float(deception(even)) == pytest.approx(0, abs=1e-6)
    own_site = torch.log(torch.tensor([[0.98, 0.01, 0.01, 1e-9]]))  # what the identity gives
    assert float(deception(own_site)) == pytest.approx(0, abs=1e-6)
    seen_through = torch.log(torch.tensor([[0.1, 0.1, 0.1, 0.7]]))
    assert float(deception(seen_through)) == pytest.approx(-np.log(0.3), abs=1e-5)


def brain_of(site, means, spread=0.05, shape=(12, 12, 12), channels=1, seed=0):
    """A third of the box is each tissue; of each channel the same intensities, drawn anew."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([1, 2, 3], shape[0] // 3)[:, None, None] * np.ones(shape, dtype=int)
    noise = rng.normal(0, spread, (channels, *shape))
    images = np.array([0, *means])[labels] + noise
    mask = torch.ones(shape, dtype=torch.bool)
    return LabelledBrain(
        torch.from_numpy(images.astype(np.float32)), mask,
        torch.from_numpy(labels.astype(np.uint8)), site, f"sub-{seed}", f"scan-{seed}",
    )  # fmt: skip


def test_separation_is_the_smaller_d_prime():
    brain = brain_of("a", (0.3, 0.5, 0.8), spread=0.04)
    values = [brain.images[0][brain.labels == k].numpy() for k in (1, 2, 3)]
    primes = [
        abs(a.mean() - b.mean()) / np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
        for a, b in pairwise(values)
    ]
    assert separation(brain) == pytest.approx(min(primes), rel=1e-5)
    twice = replace(brain, images=torch.cat((brain.images, brain.images)))
    assert separation(twice) == pytest.approx(min(primes) * np.sqrt(2), rel=1e-5)
    bright = replace(brain, images=torch.where(brain.images > 0.85, 50.0, brain.images))
    cut = replace(brain, images=torch.where(brain.images > 0.85, BRIGHTEST, brain.images))
    assert separation(bright) == pytest.approx(separation(cut), rel=1e-5)
    grey_alone = replace(brain, labels=torch.where(brain.labels == 2, 2, 0))
    assert separation(grey_alone) == 0
    with pytest.raises(ScanError, match="no training scan has labels of neighbouring tissues"):
        CommonAppearance.of([grey_alone])


def test_common_appearance_is_that_of_the_best_separated_site():
    isointense = [brain_of("a", (0.5, 0.75, 0.85), seed=k) for k in (1, 2)]
    adult = [brain_of("z", (0.3, 0.6, 0.9), seed=k) for k in (3, 4)]
    found = CommonAppearance.of([*isointense, *adult])
    assert found.site == "z"
    assert found.quantiles.shape == (1, 4, 257)
    assert bool(found.quantiles[:, 0].isnan().all()), "no brain without a label"
    expected = np.mean(
        [
            [np.quantile(b.images[0][b.labels == k], np.linspace(0, 1, 257)) for k in (1, 2, 3)]
            for b in adult
        ],
        axis=0,
    )
    np.testing.assert_allclose(found.quantiles[0, 1:], expected, atol=1e-5)
    few = [replace(b, labels=torch.where(b.labels == 1, 0, b.labels)) for b in adult]
    unlabelled = CommonAppearance.of(few).quantiles[0]
    np.testing.assert_allclose(unlabelled[0], found.quantiles[0, 1], atol=1e-5)
    assert bool(unlabelled[1].isnan().all())


def test_tissue_distance_against_scipy():
    wanted_brain, other = brain_of("z", (0.3, 0.6, 0.9), seed=1), brain_of("a", (0.5, 0.7, 0.8))
    wanted = CommonAppearance.of([wanted_brain])
    expected = np.mean(
        [
            wasserstein_distance(
                wanted_brain.images[0][wanted_brain.labels == k], b.images[0][b.labels == k]
            )
            for b in (wanted_brain, other) for k in (1, 2, 3)
        ]
    )  # fmt: skip
    drawn = torch.stack((wanted_brain.images, other.images)).requires_grad_()
    labels = torch.stack((wanted_brain.labels, other.labels)).long()
    found = tissue_distance(drawn, labels, torch.tensor([0, 1]), wanted)
    assert found.item() == pytest.approx(expected, rel=0.02)
    found.backward()
    assert float((drawn.grad[1] != 0).float().mean()) > 0.99  # every voxel is told where to go
    step = (drawn - 100 * drawn.grad).detach()
    assert float(tissue_distance(step, labels, torch.tensor([0, 1]), wanted)) < found.item()
    # the first cube alone has nothing to change; a tissue of few voxels does not count
    alone = tissue_distance(drawn[:1], labels[:1], torch.tensor([0]), wanted)
    assert alone.item() == pytest.approx(0, abs=2e-3)  # 257 quantiles of 576 voxels
    few = torch.where(torch.arange(12)[:, None, None] < 1, labels, 0)  # 144 voxels of CSF
    assert tissue_distance(drawn, few, torch.tensor([0, 1]), wanted).item() == 0


def test_mixture_quantiles_are_those_of_the_pooled_voxels():
    rng = np.random.default_rng(2)
    samples = [rng.normal(mean, 0.05, n) for mean, n in ((0.3, 2000), (0.6, 5000), (0.9, 3000))]
    tables = np.array([np.quantile(v, np.linspace(0, 1, 257)) for v in samples])
    found = mixture_quantiles(tables, [0.2, 0.5, 0.3])
    levels = np.linspace(0, 1, 1001)
    inner = (levels > 0.01) & (levels < 0.99)
    pooled = np.quantile(np.concatenate(samples), levels)
    gaps = np.abs(found - pooled)[inner]
    assert gaps.mean() < 1e-3
    assert np.all(np.diff(found) >= 0)
    unknown = tables.copy()
    unknown[0] = np.nan
    alone = mixture_quantiles(unknown, [0.01, 5e-4, 0.9895])
    np.testing.assert_allclose(
        np.interp(np.linspace(0, 1, 257), levels, alone), tables[2], atol=2e-3
    )
    with pytest.raises(ScanError, match="of 20% of the brain no intensities are known"):
        mixture_quantiles(unknown, [1, 2, 2])
    with pytest.raises(ScanError, match="of 100% of the brain"):
        mixture_quantiles(tables, [0, 0, 0])


def drawn_brain(means, cuts, seed):
    """A person's brain at a site: classes 0 (no label) to 3 in slabs, mask, shares of tissues."""
    mask = np.ones((20, 20, 20), dtype=bool)
    mask[0, 0] = False
    classes = np.digitize(np.arange(20), cuts)[:, None, None] * np.ones(mask.shape, int)
    tissues = np.stack([classes == k for k in (1, 2, 3)]).astype(np.float32) * mask
    noise = np.random.default_rng(seed).normal(0, 0.02, mask.shape)
    image = (np.array(means)[classes] + noise).astype(np.float32)[None] * mask
    return classes, mask, tissues, image


def test_matching_gives_sites_one_distribution_and_people_their_own_shares():
    means = (0.2, 0.4, 0.6, 0.9)
    classes, mask, _, image = drawn_brain(means, (2, 6, 13), 1)
    known = LabelledBrain(
        torch.from_numpy(image), torch.from_numpy(mask),
        torch.from_numpy(classes.astype(np.uint8)), "z", "01", "scan",
    )  # fmt: skip
    tables = CommonAppearance.of([known]).quantiles.numpy()

    def result(seen, cuts, seed):
        classes, mask, tissues, image = drawn_brain(seen, cuts, seed)
        wanted, reason = wanted_quantiles(tissues, mask, tables)
        assert reason == ""
        return classes, image, matched(image, mask, wanted)

    classes, drawn, one = result((0.1, 0.35, 0.55, 0.8), (2, 6, 13), 1)
    _, other, two = result((0.15, 0.25, 0.7, 0.85), (2, 6, 13), 2)
    apart = wasserstein_distance(drawn[0][mask], other[0][mask])
    assert wasserstein_distance(one[0][mask], two[0][mask]) < 0.02 * apart
    for k, mean in enumerate(means):  # brain without a label comes to its own intensities too
        assert one[0][mask & (classes == k)].mean() == pytest.approx(mean, abs=0.01)
    assert np.array_equal(one[0][mask].argsort(), drawn[0][mask].argsort())
    assert not one[:, ~mask].any()
    more, _, third = result((0.1, 0.35, 0.55, 0.8), (4, 11, 16), 3)  # a person with more fluid
    for k, mean in enumerate(means):
        assert third[0][mask & (more == k)].mean() == pytest.approx(mean, abs=0.01)


def test_a_brain_of_which_the_appearance_knows_too_little_stays_as_drawn():
    _, mask, tissues, image = drawn_brain((0.2, 0.4, 0.6, 0.9), (2, 6, 13), 1)
    tables = np.linspace(0, 1, 257, dtype=np.float32)[None, None].repeat(4, axis=1)
    assert len(wanted_quantiles(tissues, mask, tables)[0]) == 1
    tables[:, 0] = np.nan
    wanted, reason = wanted_quantiles(tissues, mask, tables)
    assert (wanted, reason) == ([], "of 10% of the brain no intensities are known")
    assert wanted_quantiles(tissues, mask, None) == ([], "")
    assert np.array_equal(matched(image, mask, wanted), image)


def networks(channels=1, sites=2, **kwargs):
    torch.manual_seed(0)
    return NormalizerNetworks(channels, sites, (4, 8), side=16, **kwargs)


def drawer(brains=None, **kwargs):
    brains = brains or [labelled_brain([v]) for v in VOLUMES]
    return TissueDrawer(brains, ("a", "b"), side=16, count=6, **kwargs)


def test_discriminator_learns_sites_and_what_was_generated():
    nets, batch = networks().eval(), drawer()(generator())
    drawn = nets.normalize(batch.shown, batch.mask)
    real, made = nets.discriminator(batch.clean), nets.discriminator(drawn)
    expected = -real[range(6), batch.sites].mean() - made[:, 2].mean()
    found = discriminator_loss(nets, batch)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    nets.zero_grad()
    discriminator_loss(nets, batch).backward()
    moved = [name for name, p in nets.named_parameters() if p.grad is not None]
    assert moved
    assert all(name.startswith("discriminator.") for name in moved)
    with pytest.raises(ValueError, match="no discriminator"):
        discriminator_loss(networks(discriminator=False), batch)


def test_what_a_discriminator_says_is_counted():
    class Always(torch.nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number = number

        def forward(self, cubes):
            return torch.eye(3)[torch.full((len(cubes),), self.number)]

    brains = [labelled_brain([v]) for v in VOLUMES]
    nets = networks().eval()
    nets.discriminator = Always(2)
    found = discriminator_scores(nets, brains, ("a", "b"), 0)
    assert found["accuracy"] == 0.5
    assert found["normalized_taken_for"] == {"a": 0, "b": 0, "normalized": 1}
    either = []
    for number, site in enumerate("ab"):
        nets.discriminator = Always(number)
        found = discriminator_scores(nets, brains, ("a", "b"), 0)
        assert found["normalized_taken_for"][site] == 1
        either.append(found["accuracy"])
    assert sum(either) == pytest.approx(0.5, abs=1e-3)  # of each real cube one of them is right
    assert discriminator_scores(networks(discriminator=False), brains, ("a", "b"), 0) == {}


def test_lambda_weighs_what_is_unlike():
    nets, batch = networks().eval(), drawer()(generator())
    appearance = CommonAppearance.of([labelled_brain([v]) for v in VOLUMES])
    drawn = nets.normalize(batch.shown, batch.mask)
    alone = segmentation_loss(nets.segment(drawn), batch.labels)
    clean = [k for k in range(6) if torch.equal(batch.shown[k], batch.clean[k])]
    assert 0 < len(clean) < 6
    far = tissue_distance(drawn[clean], batch.labels[clean], batch.sites[clean], appearance)
    assert far > 0
    without = nets.normalize(batch.clean, batch.mask)
    biased = [k for k in range(6) if k not in clean]
    inside = batch.mask[biased] > 0
    bias = (drawn - without)[biased][inside].abs().mean()
    assert bias > 0
    unlike = 0.1 * deception(nets.discriminator(drawn)) + 0.4 * far + 0.15 * bias
    for strength in (0.0, 0.1, 5.0):
        found = normalizer_loss(nets, batch, strength, appearance).item()
        assert found == pytest.approx((alone + strength * unlike).item(), abs=1e-5)
    plain = networks(discriminator=False).eval()
    plain.load_state_dict(
        {k: v for k, v in nets.state_dict().items() if not k.startswith("discriminator")}
    )
    found = normalizer_loss(plain, batch, 1.5, None).item()
    assert found == pytest.approx(alone.item(), abs=1e-6)


def test_difference_of_biased_cubes():
    rng = torch.Generator().manual_seed(0)
    drawn, wanted = (torch.rand(3, 2, 4, 4, 4, generator=rng) for _ in range(2))
    mask = (torch.rand(3, 1, 4, 4, 4, generator=rng) > 0.4).float()
    inside = mask.expand_as(drawn) > 0
    expected = (drawn - wanted)[inside].abs().mean()
    assert float(difference_of_biased(drawn, wanted, mask)) == pytest.approx(expected.item())
    assert float(difference_of_biased(drawn[:0], wanted[:0], mask[:0])) == 0


def test_a_field_changes_nothing_where_the_generator_undoes_it():
    """In training too, where batch norm sees the batch: equal cubes come out equal."""
    nets, batch = networks().train(), drawer(biased=False)(generator())
    appearance = CommonAppearance.of([labelled_brain([v]) for v in VOLUMES])
    nets.discriminator.eval()  # its dropout is drawn anew
    torch.nn.init.normal_(nets.generator.head.weight, generator=torch.Generator().manual_seed(1))
    field = batch._replace(shown=batch.shown.clone())
    field.shown[0, 0, 0, 0, 0] += 1e-6  # counts as a cube with a field, of no size
    loss = normalizer_loss(nets, field, 1.0, appearance).item()
    drawn = nets.normalize(field.shown, field.mask)
    far = tissue_distance(drawn[1:], field.labels[1:], field.sites[1:], appearance)
    rest = segmentation_loss(nets.segment(drawn), field.labels)
    rest = rest + 0.1 * deception(nets.discriminator(drawn)) + 0.4 * far
    assert loss == pytest.approx(rest.item(), abs=1e-4)


def test_divergence_against_scipy():
    rng = np.random.default_rng(1)
    p, q = rng.random(64), rng.random(64) ** 3
    found = divergence(torch.from_numpy(np.stack((p, 7 * q))))
    assert found == pytest.approx(jensenshannon(p, q, base=2) ** 2, abs=1e-9)
    apart = torch.eye(3, 64)
    assert divergence(apart) == pytest.approx(np.log2(3), abs=1e-9)
    assert divergence(torch.stack((apart[0], torch.zeros(64)))) == 0
    images, mask = torch.rand(4, 1, 5, 5, 5), torch.ones(4, 1, 5, 5, 5)
    mask[:, :, 0] = 0
    counts = histograms(images, mask, torch.tensor([0, 0, 1, 0]), 2)
    assert counts.sum(1).tolist() == [300, 100]
    expected, _ = np.histogram(images[2, 0, 1:].numpy(), 64, (0, BRIGHTEST))
    assert counts[1].tolist() == expected.tolist()


def test_bias_field_is_equation_7():
    found = bias_field(200, 0.6)
    np.testing.assert_allclose(found, np.arange(200) / 200 * 0.6 + 0.4, rtol=1e-6)
    assert bool((bias_field(50, 0.0) == 1).all())


def test_cubes_are_drawn_evenly_on_tissue_and_half_of_them_shaded():
    draw = drawer()
    batches = [draw(generator(seed)) for seed in range(60)]
    sites = torch.cat([b.sites for b in batches]).float()
    assert float(sites.mean()) == pytest.approx(0.5, abs=0.08)
    shaded = torch.cat([(b.shown != b.clean).flatten(1).any(1) for b in batches]).float()
    assert float(shaded.mean()) == pytest.approx(0.5, abs=0.08)
    for batch in batches[:10]:
        centred = (batch.labels[:, 8, 8, 8] > 0) | (batch.labels[:, 7, 8, 8] > 0)  # 7: mirrored
        assert bool(centred.all())
        assert bool((batch.shown <= batch.clean + 1e-6).all()), "the field only darkens"
        inside = batch.clean[:, 0][batch.labels == 3]
        assert float(inside.mean()) > float(batch.clean[:, 0][batch.labels == 1].mean()) + 0.2
        assert not batch.clean[batch.mask == 0].any()
    again = draw(generator(3))
    assert all(torch.equal(a, b) for a, b in zip(again, batches[3], strict=True))
    clean = drawer(biased=False)(generator(0))
    assert torch.equal(clean.shown, clean.clean)


def test_a_cube_at_the_edge_is_filled_with_nothing():
    image = torch.arange(1, 25, dtype=torch.float32).view(1, 2, 3, 4)
    cube = cut_cube(image, (0, 2, 3), 4)
    assert cube.shape == (1, 4, 4, 4)
    assert float(cube[0, 2, 2, 2]) == float(image[0, 0, 2, 3])
    assert float(cube.sum()) == float(image[0, :, 0:, 1:].sum())


def test_untrained_networks_leave_a_brain_as_it_is_without_seams():
    nets = networks().eval()
    images, mask = stacked([VOLUMES[0]])
    for stride in (16, 8, 5):
        found, tissues = normalized_brain(nets, images, mask, stride)
        inside = mask.numpy()
        wanted = np.clip(images[0].numpy(), 0.005, BRIGHTEST - 0.005)
        np.testing.assert_allclose(found[0][inside], wanted[inside], atol=1e-4)
        assert not found[0][~inside].any()
        assert tissues.shape == (3, *mask.shape)
        assert not tissues[:, ~inside].any()
        assert tissues.min() >= 0
        assert tissues.sum(0).max() <= 1 + 1e-5


def test_networks_know_their_sizes():
    nets = networks(channels=2, sites=3)
    again = NormalizerNetworks.from_config(json.loads(json.dumps(nets.config())))
    again.load_state_dict(nets.state_dict())
    with pytest.raises(ValueError, match="multiple of 2"):
        nets.generator(torch.zeros(1, 2, 15, 16, 16))
    with pytest.raises(ValueError, match="two levels"):
        UNet3d(1, 1, (8,))
    with pytest.raises(ValueError, match="cannot be halved four times"):
        DomainDiscriminator(1, 2, 24)
    found = nets.discriminator(torch.rand(2, 2, 16, 16, 16)).exp()
    assert found.shape == (2, 4)
    assert found.sum(1).tolist() == pytest.approx([1, 1], abs=1e-5)


def test_scans_that_cannot_be_learned_from():
    plain = contrast_brains.scan(1)
    with pytest.raises(ScanError, match=r"sub-01_a_T1w: it has no tissue labels"):
        labelled_brain([plain])
    few = replace(plain, labels=np.zeros(plain.mask.shape, np.uint8))
    with pytest.raises(ScanError, match="less than half of the brain mask has a tissue label"):
        labelled_brain([few])
    brains = [labelled_brain([v]) for v in VOLUMES]
    with pytest.raises(ScanError, match="two sites or more are needed, and all are of a"):
        split(brains[:3])
    with pytest.raises(ScanError, match="two subjects or more are needed"):
        split([brains[0], brains[3]])
    learn, apart = split(brains)
    assert {b.subject for b in learn} == {"01", "02", "04", "05"}
    assert {b.subject for b in apart} == {"03", "06"}
    box = box_of(torch.from_numpy(VOLUMES[0].mask))
    assert brains[0].mask.shape == tuple(s.stop - s.start for s in box)
    assert int(brains[0].labels.gt(0).sum()) == int((VOLUMES[0].labels > 0).sum())


SMALL = replace(
    DeepNormalize.presets_by_name["cpu"],
    widths=(4, 8),
    side=16,
    batch=4,
    plan=Plan(8, 2e-3, every=4, half=False),
)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(DeepNormalize, "presets_by_name", {"cpu": SMALL})


@pytest.fixture(scope="module")
def fitted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepNormalize, "presets_by_name", {"cpu": SMALL})
        yield DeepNormalize.fit(VOLUMES, seed=0)


def test_a_model_gives_a_brain_and_its_tissues(fitted, tmp_path, small):
    scan = contrast_brains.scan(20, "b")
    done = fitted.harmonize(scan, seed=0)
    assert done.data.shape == scan.data.shape
    assert 0 <= done.data.min() <= done.data.max() <= BRIGHTEST
    assert not done.data[~scan.mask].any()
    assert done.tissues.shape == (3, *scan.data.shape)
    shares = done.tissues[:, scan.mask].mean(axis=1)
    told = done.details["tissue_shares"]
    assert [told[k] for k in TISSUES] == pytest.approx(shares, abs=1e-4)
    save_bundle(tmp_path / "model", fitted, meta={"name": "x", "reference": "a"})
    again = load_bundle(tmp_path / "model").method.harmonize(scan, seed=1)
    assert np.array_equal(again.data, done.data)
    assert np.array_equal(again.tissues, done.tissues)
    scores = fitted.scores()["T1w"]
    assert set(scores["held_out_dice"]) == set(TISSUES)
    assert set(scores["discriminator"]) == {"training", "held_out"}
    assert scores["sites"] == {"a": 2, "b": 2}
    learn, _ = split([labelled_brain([v]) for v in VOLUMES])
    best = CommonAppearance.of(learn).site
    assert scores["appearance_of"] == done.details["appearance_of"] == best
    assert fitted.files()["T1w_normalized.png"].startswith(b"\x89PNG")
    assert fitted.contract.labels


def test_the_stride_is_an_option(fitted):
    scan = contrast_brains.scan(20, "b")
    made = DeepNormalize.from_state(fitted.arrays(), fitted.params())
    made.take_options({"stride": 16.0})
    coarse = made.harmonize(scan, seed=0)
    made.take_options({"stride": 4.0})
    fine = made.harmonize(scan, seed=0)
    assert (coarse.details["stride_voxels"], fine.details["stride_voxels"]) == (16, 4)
    assert not np.array_equal(coarse.data, fine.data)
    made.take_options({"stride": 32.0})
    assert made.harmonize(scan, seed=0).details["stride_voxels"] == 16, "no gaps between cubes"


def test_matching_is_an_option_and_older_bundles_go_without(fitted):
    scan = contrast_brains.scan(20, "b")
    arrays = dict(fitted.arrays())
    untrained = DeepNormalize.from_state(arrays, fitted.params()).harmonize(scan, seed=0)
    told = [w for w in untrained.warnings if w.startswith("The brain is as drawn")]
    assert re.search(r"of \d\d% of the brain no intensities are known", *told)
    assert "changed_by_matching" not in untrained.details
    (key,) = (k for k in arrays if k.endswith("appearance"))
    arrays[key] = arrays[key].copy()
    arrays[key][:, 0] = arrays[key][:, 1]  # so much of it is taken for no tissue
    made = DeepNormalize.from_state(arrays, fitted.params())
    done = made.harmonize(scan, seed=0)
    assert not [w for w in done.warnings if w.startswith("The brain is as drawn")]
    made.take_options({"match": 0.0})
    drawn = made.harmonize(scan, seed=0)
    images, mask = stacked([scan])
    part = made._parts["T1w"]
    expected, tissues = normalized_brain(part.networks, images, mask, 16)
    assert np.array_equal(drawn.data, expected[0])
    assert np.array_equal(drawn.tissues, tissues)
    assert np.array_equal(done.tissues, tissues)
    by = np.abs(done.data - drawn.data)[scan.mask].mean()
    assert done.details["changed_by_matching"] == pytest.approx(by, abs=1e-4)
    assert by > 0
    assert "changed_by_matching" not in drawn.details
    assert (done.keep_distribution, drawn.keep_distribution) == (True, False)
    with pytest.raises(ScanError, match="not 4 classes for each of 1 modalities"):
        DeepNormalize.from_state({**arrays, key: arrays[key][:, 1:]}, fitted.params())
    older = {k: v for k, v in arrays.items() if k != key}
    again = DeepNormalize.from_state(older, fitted.params()).harmonize(scan, seed=0)
    assert np.array_equal(again.data, drawn.data)


def test_what_cannot_be_is_refused(fitted, small):
    scan = contrast_brains.scan(20, "b")
    with pytest.raises(ScanError, match="trained on T1w only; train it on T2w too"):
        fitted.harmonize(replace(scan, modality="T2w"), seed=0)
    with pytest.raises(ScanError, match="mask is empty"):
        fitted.harmonize(replace(scan, mask=np.zeros_like(scan.mask)), seed=0)
    other = replace(contrast_brains.scan(20, "b", "T2w"), modality="T1w")
    with pytest.raises(ScanError, match="elsewhere than in T1w brains"):
        fitted.harmonize(other, seed=0)
    with pytest.raises(UsageError, match="no preset 'huge'"):
        DeepNormalize.fit(VOLUMES, seed=0, training=Training("huge"))
    with pytest.raises(ScanError, match="no scan was given"):
        DeepNormalize.fit([], seed=0)


def test_a_modality_of_too_few_sites_is_left_out_before_any_training(small, caplog):
    more = [labelled(seed, "b", "T2w") for seed in (4, 5)]
    made = DeepNormalize.fit(VOLUMES + more, seed=0)
    assert made.contract.modalities == ("T1w",)
    assert "left out of the training: T2w: scans of two sites or more" in caplog.text
    both = more + [labelled(seed, "a", "T2w") for seed in (1, 2)]
    at_a = frozenset(v.name for v in VOLUMES if v.site == "a")
    shown = Training(wanted=at_a)
    made = DeepNormalize.fit(VOLUMES + both, seed=0, training=shown)
    assert made.contract.modalities == ("T1w",)
    assert "T2w: no scan is of the reference's site" in caplog.text


def test_shares_of_tissue_that_are_odd_are_told(fitted):
    part = fitted._parts["T1w"]
    mask = VOLUMES[0].mask
    usual = np.zeros((3, *mask.shape), np.float32)
    usual[:, mask] = part.shares[:, :1]
    assert part.odd_shares(usual, mask) == []
    odd = usual.copy()
    odd[2, mask] += 0.3
    (told,) = part.odd_shares(odd, mask)
    assert told.startswith("WM is ")


def test_the_pre_processor_has_no_discriminator(small):
    made = PreProcessor.fit(VOLUMES, seed=0)
    assert made._parts["T1w"].networks.discriminator is None
    assert not [name for name in made.arrays() if "discriminator" in name]
    none = DeepNormalize.fit(VOLUMES, seed=0, training=Training(options={"lambda": 0.0}))
    assert none._parts["T1w"].networks.discriminator is None
    scan = contrast_brains.scan(20, "a")
    assert np.array_equal(made.harmonize(scan, seed=0).data, none.harmonize(scan, seed=0).data)


def test_standardization_has_a_segmenter_alone(small):
    made = Standardization.fit(VOLUMES, seed=0)
    networks = made._parts["T1w"].networks
    assert networks.generator is networks.discriminator is None
    scan = contrast_brains.scan(20, "b")
    inside = scan.mask
    done = made.harmonize(scan, seed=0)
    values = scan.data[inside].astype(float)
    wanted = np.clip(0.6 + 0.2 * (values - values.mean()) / values.std(), 0, BRIGHTEST)
    np.testing.assert_allclose(done.data[inside], wanted, atol=1e-4)
    twice = replace(scan, data=(2 * scan.data).astype(np.float32))
    np.testing.assert_allclose(made.harmonize(twice, seed=0).tissues, done.tissues, atol=1e-4)
    again = Standardization.from_state(made.arrays(), json.loads(json.dumps(made.params())))
    assert np.array_equal(again.harmonize(scan, seed=0).tissues, done.tissues)


@pytest.mark.slow
def test_training_makes_sites_alike_and_finds_tissues(monkeypatch):
    longer = replace(SMALL, widths=(8, 16), plan=Plan(900, 4e-3, every=100, half=False))
    monkeypatch.setattr(
        DeepNormalize, "presets_by_name", {"cpu": replace(longer, judge_rate=4e-4)}
    )
    more = [labelled(seed, "ab"[seed % 2]) for seed in range(30, 38)]
    model = DeepNormalize.fit(VOLUMES + more, seed=0)
    scores = model.scores()["T1w"]
    assert min(scores["held_out_dice"].values()) > 0.9
    bits = scores["held_out_divergence_of_sites_bits"]
    assert bits["after"] < 0.65 * bits["before"]  # .54 on one processor, .66 on another
    one, other = (labelled(50, site) for site in "ab")
    white = one.labels == 3
    results = [model.harmonize(scan, seed=0).data[white].mean() for scan in (one, other)]
    before = one.data[white].mean() - other.data[white].mean()
    assert abs(results[0] - results[1]) < 0.4 * before  # .2 and .58


def test_labels_become_shares_and_shares_labels():
    labels = np.array([[0.0, 7.0], [8.0, 9.0]])
    shares = tissue_shares({"dseg": labels}, {7: "WM", 8: "CSF", 9: "GM"})
    assert labels_of(shares).tolist() == [[0, 3], [1, 2]]
    maps = {"CSF": np.array([0.2, 0.6]), "GM": np.array([0.1, 0.2]), "WM": np.array([0.3, 0.0])}
    assert labels_of(tissue_shares(maps, {})).tolist() == [0, 1]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, brains):
    """Two people at each of two sites, skull-stripped, with labels in derivatives."""
    folder = tmp_path_factory.mktemp("labelled")
    made = DataSet(folder / "raw")
    theirs = folder / "theirs"
    for number, site in enumerate("AABBB", start=1):
        label = f"0{number}"
        data, affine = brains.brain(site, number, move=False)
        path = made.scan(label, data, affine)
        made.site(label, site)
        give_transform(theirs, path)
        if number < 5:
            cuts = np.quantile(data[data > 0], (0.2, 0.6))
            labels = np.where(data > 0, 1 + (data[..., None] > cuts).sum(-1), 0)
            there = theirs / f"sub-{label}" / "anat" / f"sub-{label}_dseg.nii.gz"
            nb.Nifti1Image(labels.astype(np.uint8), affine).to_filename(there)
    (theirs / "dseg.tsv").write_text("index\tname\n1\tCSF\n2\tgrey matter\n3\twhite matter\n")
    return made, folder


def test_from_labels_in_derivatives_to_tissues_in_derivatives(cohort, small, brains, monkeypatch):
    # so short a training finds no tissue in much of the brain
    monkeypatch.setattr(tissue_mixture, "_LEAST_KNOWN", 0.1)
    made, folder = cohort
    out = folder / "out"
    options = quick(folder / "work", folder / "theirs")
    ran = call(made.root, out, "train", "--method", "deepnormalize", "--reference", "A", *options)
    assert ran.code == 65, ran.out + ran.err
    assert "no tissue labels to learn from: theirs: nothing for sub-05_T1w" in ran.line(
        "sub-05_T1w"
    )
    bundle = load_bundle(out / "models" / "deepnormalize-A")
    assert bundle.meta["training_sites"] == ["A", "B"]
    assert bundle.meta["training_scans"] == {"T1w": 4}
    assert bundle.meta["training"]["options"] == {"lambda": 1.5, "together": 0}
    assert bundle.meta["common"] == "common appearance of A, B, units of A"
    scan = ["participant", "--participant-label", "05", *options]
    ran = call(made.root, out, *scan)
    assert ran.code == 0, ran.out + ran.err
    anat = out / "sub-05" / "anat"
    raw, affine = load(made.path("05"))
    image, found_affine = load(anat / "sub-05_desc-harmonized_T1w.nii.gz")
    assert image.shape == raw.shape
    labels, _ = load(anat / "sub-05_desc-deepnormalize_dseg.nii.gz")
    maps = [load(anat / f"sub-05_label-{t}_desc-deepnormalize_probseg.nii.gz")[0] for t in TISSUES]
    np.testing.assert_allclose(found_affine, affine, atol=1e-4)
    assert labels.shape == raw.shape
    assert set(np.unique(labels)) <= {0, 1, 2, 3}
    assert not labels[raw == 0].any()
    rest = np.clip(1 - np.sum(maps, axis=0), 0, 1)
    brain = raw > 0
    assert np.array_equal(np.stack([rest, *maps]).argmax(0)[brain], labels[brain])
    sidecar = json.loads((anat / "sub-05_desc-deepnormalize_dseg.json").read_text())
    assert sidecar["Harmonization"]["ModelHash"] == bundle.hash
    assert (out / "desc-deepnormalize_dseg.tsv").read_text().splitlines()[3] == (
        "2\tgrey matter\tGM"
    )
    report = (out / "sub-05.html").read_text()
    assert "Segmentation that came with the harmonization" in report
    record = json.loads((anat / "sub-05_desc-harmonized_T1w.json").read_text())["Harmonization"]
    assert record["MethodOptions"] == {"match": 1, "stride": 16}
    facts = record["Details"]
    assert facts["keep_distribution"]
    assert "change carried to the raw grid, the brain&#39;s histogram kept" in report
    tables = bundle.method._parts["T1w"].appearance[0]
    shares = [facts["tissue_shares"][t] for t in TISSUES]
    wanted = tissue_mixture.mixture_quantiles(tables, [1 - sum(shares), *shares])
    scaled = bundle.output_scale["T1w"].apply(image)[brain]
    levels = np.linspace(0.05, 0.95, 19)
    asked = np.interp(levels, np.linspace(0, 1, 1001), wanted)
    assert np.quantile(scaled, levels) == pytest.approx(asked, abs=0.01)
    other = call(made.root, out, *scan, "--method-option", "stride=8")
    assert other.code == 64
    assert "holds scans with --method-option match=1 stride=16 under desc-harmonized" in other.err
    assert record["Reference"] == "common appearance of A, B, units of A"
    assert (
        call(made.root, out, *scan).line("sub-05_T1w").endswith("skipped: done by an earlier run")
    )
    (anat / "sub-05_desc-deepnormalize_dseg.nii.gz").unlink()
    assert "harmonized" in call(made.root, out, *scan).line("sub-05_T1w")
    assert (anat / "sub-05_desc-deepnormalize_dseg.nii.gz").is_file()
