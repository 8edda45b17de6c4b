"""What is simulated of foreign scanners: determinism, range, and each piece against numpy."""

import numpy as np
import pytest
from scipy import ndimage

torch = pytest.importorskip("torch")

from bids_harmony.errors import ScanError  # noqa: E402
from bids_harmony.training.degrade import (  # noqa: E402
    apply_knots,
    degrade_slabs,
    increasing_map,
    smooth_field,
    soften,
    uniform,
)
from bids_harmony.training.slices import canvas_size, draw_slabs, on_canvas  # noqa: E402


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def slabs():
    axes = torch.linspace(-1, 1, 48)
    disc = (axes[:, None] ** 2 + axes[None] ** 2) < 0.7
    mask = disc.expand(24, 3, 48, 48)
    wave = 0.5 + 0.4 * torch.sin(12 * axes)[:, None] * torch.cos(9 * axes)[None]
    return wave.expand(24, 3, 48, 48) * mask, mask


def test_the_generator_alone_decides(slabs):
    torch.manual_seed(1)
    first = degrade_slabs(*slabs, seeded(4))
    torch.manual_seed(2)
    assert torch.equal(first, degrade_slabs(*slabs, seeded(4)))
    assert not torch.equal(first, degrade_slabs(*slabs, seeded(5)))


def test_what_comes_out_is_an_image_of_a_brain(slabs):
    clean, mask = slabs
    kept = clean.clone()
    for seed in range(5):
        out = degrade_slabs(clean, mask, seeded(seed))
        assert out.shape == clean.shape
        assert out.dtype == torch.float32
        assert torch.isfinite(out).all()
        assert out.min() >= 0
        assert not out[~mask].any()
        # Every slab is changed, none beyond recognition.
        change = (out - clean).abs().flatten(1).sum(1) / mask.flatten(1).sum(1)
        assert change.min() > 1e-4
        assert change.max() < 0.25
    assert torch.equal(clean, kept)


def test_what_is_brighter_than_all_knots_stays_brighter():
    """Vessels and bright fluid: a network that sees them cut off would learn to brighten them."""
    clean = torch.full((24, 3, 24, 24), 0.8)
    clean[..., 8:16, 8:16] = 2.0
    mask = torch.ones_like(clean, dtype=torch.bool)
    out = degrade_slabs(clean, mask, seeded(0))
    inner = out[..., 10:14, 10:14].mean((1, 2, 3))
    assert inner.mean() == pytest.approx(2.0, abs=0.05)
    assert inner.min() > 1.7


def test_slabs_are_degraded_each_in_its_own_way(slabs):
    out = degrade_slabs(*slabs, seeded(0))
    spread = (out - slabs[0]).flatten(1).std(1)
    assert spread.max() > 3 * spread.min()


@pytest.mark.parametrize(("levels", "trim"), [(1, 0.35), (4, 0.35), (5, 0.05)])
def test_increasing_map(levels, trim):
    for seed in range(20):
        knots = increasing_map(levels, trim, seeded(seed))
        assert len(knots) == 2**levels + 1
        assert (knots[0], knots[-1]) == (0, 1)
        assert (knots.diff() > 0).all()
        # No interval is split more unevenly than the trim allows.
        pairs = knots.diff().view(-1, 2)
        share = pairs[:, 0] / pairs.sum(1)
        assert (share >= trim - 1e-4).all()
        assert (share <= 1 - trim + 1e-4).all()


def test_apply_knots_is_numpys_interp():
    rng = np.random.default_rng(0)
    values = rng.uniform(-0.4, 1.8, (3, 4, 5, 6))
    values[0, 0, 0, :3] = 0, 1.25, 1.25 / 16 * 7  # ends and a knot
    knots = rng.normal(size=(3, 17))
    found = apply_knots(torch.from_numpy(values), torch.from_numpy(knots), 1.25)
    at = np.linspace(0, 1.25, 17)
    expected = np.stack([np.interp(v, at, k) for v, k in zip(values, knots, strict=True)])
    assert found.numpy() == pytest.approx(expected, abs=1e-12)


def test_soften_is_a_three_point_kernel():
    image = torch.rand((2, 9, 10, 11), generator=seeded())
    deviation = torch.tensor([0.0, 0.6])
    out = soften(image, deviation)
    assert torch.equal(out[0], image[0])
    kernel = np.array([0.18, 0.64, 0.18])
    expected = image[1].numpy()
    for axis in range(3):
        expected = ndimage.convolve1d(expected, kernel, axis, mode="wrap")
    assert out[1].numpy() == pytest.approx(expected, abs=1e-6)
    assert float((torch.tensor([-1.0, 0, 1]).square() * torch.tensor(kernel)).sum()) == (
        pytest.approx(0.6**2)
    )


def test_smooth_field_is_standardised_and_smooth():
    field = smooth_field((40, 44, 36), 4, seeded())
    assert field.shape == (40, 44, 36)
    assert float(field.mean()) == pytest.approx(0, abs=1e-5)
    assert float(field.std()) == pytest.approx(1, abs=1e-4)
    assert max(float(field.diff(dim=a).abs().max()) for a in range(3)) < 0.8


def test_uniform():
    drawn = uniform(-2, 3, seeded(), (10_000,))
    assert float(drawn.min()) == pytest.approx(-2, abs=0.01)
    assert float(drawn.max()) == pytest.approx(3, abs=0.01)
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.05)


# --- slabs


@pytest.fixture(scope="module")
def numbered():
    """A brain in which every voxel's value tells its place."""
    shape = (30, 38, 34)
    image = torch.arange(30 * 38 * 34).float().view(shape) + 1
    axes = [torch.linspace(-1, 1, n) for n in shape]
    mask = sum(a.view([-1 if i == k else 1 for i in range(3)]) ** 2 for k, a in enumerate(axes))
    return image * (mask < 0.9), mask < 0.9


def test_slabs_are_neighbouring_slices_of_the_brain(numbered):
    image, _ = numbered
    images, masks = draw_slabs([numbered], 20, seeded(), side=48, axes=(1,), turned=False)
    assert images.shape == masks.shape == (20, 3, 48, 48)
    assert torch.equal(images > 0, masks)
    places = set()
    for slab in images:
        found = np.unravel_index(slab[slab > 0].long().numpy() - 1, image.shape)
        assert set(np.diff(np.unique(found[1]))) == {1}  # three neighbours
        assert len(np.unique(found[1])) == 3
        places.add(found[1].min())
        z = slab[1].sum(0).nonzero()[:, 0]  # the third axis is never mirrored
        first, last = slab[1][:, z[0]].max(), slab[1][:, z[-1]].max()
        assert int(first - 1) % 34 < int(last - 1) % 34
    assert len(places) > 5


def test_turned_slabs_come_from_all_sides(numbered):
    images, _ = draw_slabs([numbered], 60, seeded(), side=48, thick=1)
    kinds = set()
    for slab in images:
        found = np.unravel_index(slab[slab > 0].long().numpy() - 1, numbered[0].shape)
        kinds.add(tuple(len(np.unique(f)) > 1 for f in found))
    assert kinds == {(False, True, True), (True, False, True), (True, True, False)}


def test_same_generator_same_slabs(numbered):
    one, two = (draw_slabs([numbered], 8, seeded(3), side=48) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


def test_brains_too_small_to_learn_from_are_an_error_and_no_endless_loop():
    image = torch.zeros(40, 40, 40)
    image[18:22, 18:22, 18:22] = 1
    with pytest.raises(ScanError, match="too small"):
        draw_slabs([(image, image > 0)], 4, seeded(), side=48)


def test_canvas():
    assert canvas_size([(30, 38, 34)], (1,), 16) == 48
    assert canvas_size([(30, 38, 34)], (2,), 16) == 48
    assert canvas_size([(30, 38, 32)], (1,), 16) == 32
    assert canvas_size([(30, 38, 34), (65, 4, 4)], (0, 1, 2), 8) == 72
    image = torch.arange(1.0, 13).view(3, 4)
    padded = on_canvas(image, 5, 8)
    assert torch.equal(padded[1:4, 2:6], image)
    assert padded.sum() == image.sum()
    cut = on_canvas(torch.arange(35.0).view(5, 7), 3, 3)
    assert torch.equal(cut, torch.arange(35.0).view(5, 7)[1:4, 2:5])
