"""BlindHarmony's optimization: each term against numpy, and an objective that never rises."""

from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bids_harmony.methods.blindharmony import consistent  # noqa: E402
from bids_harmony.methods.flow_optimization import (  # noqa: E402
    Weights,
    distance,
    flat_places,
    gradient_magnitude,
    masked_ncc,
    optimize_slices,
)
from bids_harmony.methods.likelihood import slices_of  # noqa: E402
from bids_harmony.networks.spline_flow import SplineFlow  # noqa: E402
from tests.flow_brains import brain  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def stack():
    """Ten slices of a brain and their masks."""
    volume = brain(1)
    images = slices_of(torch.from_numpy(volume.data), 2, 8)[10:30:2]
    return images, slices_of(torch.from_numpy(volume.mask).float(), 2, 8)[10:30:2]


@pytest.fixture(scope="module")
def flow(stack):
    """A small flow whose weights are no longer the first ones."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = SplineFlow(levels=2, steps=2, hidden=8, blocks=1)
    with torch.no_grad():
        made(stack[0])
        for parameter in made.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    made.eval().requires_grad_(False)
    return made


def objective(flow, image, source, masks, weights):
    """Eq. 11 with plain numpy for all but the latents."""
    with torch.no_grad():
        latents = flow(image).latents
    prior = sum(z.double().square().flatten(1).sum(1).numpy() for z in latents)
    found = []
    for a, b, m in zip(image, source, masks, strict=True):
        inside = m[0].numpy() > 0
        a, b = a[0].double().numpy(), b[0].double().numpy()
        ncc = np.corrcoef(a[inside], b[inside])[0, 1]
        limit = np.quantile(plain_gradient(b)[inside], 0.3)
        flat = inside & (plain_gradient(b) <= limit + 1e-7) & (b > 0.05)
        found.append(weights.beta1 * (1 - ncc) + weights.beta2 * plain_gradient(a)[flat].sum())
    return np.array(found) + weights.alpha * prior


def plain_gradient(image):
    padded = np.pad(image, 1)
    down = np.zeros_like(image)
    right = np.zeros_like(image)
    down[1:-1] = (padded[2:, 1:-1] - padded[:-2, 1:-1])[1:-1] / 2
    right[:, 1:-1] = (padded[1:-1, 2:] - padded[1:-1, :-2])[:, 1:-1] / 2
    return np.sqrt(down**2 + right**2 + 1e-10)


# --- terms


def test_ncc_is_numpys_correlation_inside_the_mask(stack):
    images, masks = stack
    other = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) + images
    found = masked_ncc(images, other, masks).numpy()
    for i, value in enumerate(found):
        inside = masks[i, 0].numpy() > 0
        expected = np.corrcoef(images[i, 0].numpy()[inside], other[i, 0].numpy()[inside])[0, 1]
        assert value == pytest.approx(expected, abs=1e-5)
    assert masked_ncc(images, 0.3 * images + 0.2, masks) == pytest.approx(1, abs=1e-5)
    assert masked_ncc(images, -images, masks) == pytest.approx(-1, abs=1e-5)


def test_gradient_magnitude_is_of_central_differences(stack):
    image = stack[0][4, 0].double().numpy()
    found = gradient_magnitude(stack[0][4:5].double())[0, 0].numpy()
    assert found == pytest.approx(plain_gradient(image), abs=1e-10)
    ramp = torch.arange(12.0).view(1, 1, 1, 12).expand(1, 1, 12, 12)
    assert gradient_magnitude(0.1 * ramp)[0, 0, 3:9, 3:9] == pytest.approx(0.1, abs=1e-6)


def test_flat_places_are_the_smoothest_part_of_the_brain():
    axis = torch.linspace(0.2, 1, 20)
    source = torch.zeros(2, 1, 20, 20)
    source[0, 0] = axis.square()[None, :]  # smoothest on the left
    source[1, 0, :, 10:] = 0.5
    masks = torch.zeros_like(source)
    masks[:, :, 2:18, 2:18] = 1
    flat = flat_places(source, masks)
    assert set(flat.unique().tolist()) <= {0.0, 1.0}
    assert not flat[masks == 0].any()
    columns = flat[0, 0].sum(0)
    assert (columns[2:6] == 16).all()
    assert not columns[8:].any()
    share = float(flat[0].sum() / masks[0].sum())
    assert share == pytest.approx(0.3, abs=0.07)
    assert not flat[1, 0, :, :9].any()  # dark places are background, not flat tissue


def test_flat_places_of_a_slice_without_brain():
    assert not flat_places(torch.rand(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)).any()


def test_distance_is_eq_3(stack):
    images, masks = stack
    weights = Weights(beta1=700.0, beta2=0.3)
    flat = flat_places(images, masks)
    other = images.square() * masks
    found = distance(other, images, masks, flat, weights)
    ncc = masked_ncc(other, images, masks)
    rough = (flat * gradient_magnitude(other)).sum((1, 2, 3))
    assert torch.allclose(found, 700 * (1 - ncc) + 0.3 * rough)
    assert distance(images, images, masks, 0 * flat, weights) == pytest.approx(0, abs=1e-2)


# --- optimization


@pytest.mark.parametrize("weights", [Weights(), Weights(0.01, 250.0, 0.1, 4)], ids=str)
def test_the_objective_never_rises(stack, flow, weights):
    images, masks = stack
    values = [objective(flow, images, images, masks, weights)]
    accepted = []
    for iterations in (1, 2, 4):
        plan = Weights(weights.alpha, weights.beta1, weights.beta2, iterations)
        done = optimize_slices(flow, images, masks, plan)
        values.append(objective(flow, done.images, images, masks, weights))
        accepted.append(done.accepted)
    tolerance = 1e-4 * np.abs(values[0]) + 5e-4  # the method computes in single precision
    for before, after in pairwise(values):
        assert (after <= before + tolerance).all()
    assert (values[-1] < values[0] - tolerance).any()
    assert 0 < accepted[0] <= len(images)
    assert accepted == sorted(accepted)


def test_steps_are_counted_for_every_slice(stack, flow):
    images, masks = stack
    done = optimize_slices(flow, images, masks, Weights(iterations=3))
    assert done.accepted <= 3 * len(images)
    assert done.rejected <= len(images)  # a slice that cannot be lowered has arrived
    none = optimize_slices(flow, images, masks, Weights(iterations=0))
    assert (none.accepted, none.rejected, none.steps) == (0, 0, 0)
    assert torch.equal(none.images, images * masks)
    assert done.steps <= 3
    assert done.steps <= done.accepted <= done.steps * len(images)


def test_a_flow_that_pulls_nowhere_has_arrived_before_all_steps(stack, flow):
    """The source is the optimum: alpha and the gradients' weight are 0."""
    images, masks = stack
    done = optimize_slices(flow, images, masks, Weights(0.0, 250.0, 0.0, 5))
    assert done.steps < 5


def test_result_is_a_brain_like_its_source(stack, flow):
    images, masks = stack
    kept = images.clone()
    done = optimize_slices(flow, images, masks, Weights())
    assert torch.equal(images, kept)
    assert done.images.shape == images.shape
    assert torch.isfinite(done.images).all()
    assert done.images.min() >= 0
    assert not done.images[masks == 0].any()
    assert not torch.equal(done.images, images)
    assert masked_ncc(done.images, images, masks).min() > 0.9


def test_slices_do_not_depend_on_each_other(stack, flow):
    """Ten slices are two chunks; one alone gives the same."""
    images, masks = stack
    whole = optimize_slices(flow, images, masks, Weights(iterations=2)).images
    alone = optimize_slices(flow, images[9:], masks[9:], Weights(iterations=2)).images
    assert torch.allclose(whole[9:], alone, atol=1e-4)


def test_a_larger_beta1_keeps_the_result_nearer_to_the_source(stack, flow):
    images, masks = stack
    likeness = [
        float(
            masked_ncc(
                optimize_slices(flow, images, masks, Weights(0.01, beta1, 0.0, 8)).images,
                images,
                masks,
            ).mean()
        )
        for beta1 in (1.0, 5000.0)
    ]
    assert likeness[1] > likeness[0]


def test_a_constant_slice_and_an_empty_one_stay_finite(stack, flow):
    images, masks = stack[0][:3].clone(), stack[1][:3].clone()
    images[1] = 0.5 * masks[1]
    masks[2], images[2] = 0, 0
    done = optimize_slices(flow, images, masks, Weights(iterations=3))
    assert torch.isfinite(done.images).all()
    assert not done.images[2].any()


def test_a_flow_that_breaks_down_changes_nothing(stack):
    class Broken(torch.nn.Module):
        def forward(self, x):
            return type("Encoding", (), {"latents": [x * torch.nan]})

        def inverse(self, latents):
            return latents[0]

    images, masks = stack
    done = optimize_slices(Broken(), images, masks, Weights(iterations=2))
    assert torch.equal(done.images, images * masks)
    assert done.accepted == 0


# --- from slices to a volume


@pytest.fixture(scope="module")
def volume():
    return torch.from_numpy(brain(1).mask)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slice_means_are_made_smooth(volume, axis):
    rng = np.random.default_rng(0)
    jumps = torch.from_numpy(rng.normal(0, 0.1, volume.shape[axis])).float()
    shape = [1, 1, 1]
    shape[axis] = -1
    detail = torch.from_numpy(rng.normal(0, 0.01, volume.shape)).float()
    change = (jumps.reshape(shape) + detail) * volume
    out = consistent(change, volume, axis)

    def means(image):
        sums = (image * volume).movedim(axis, 0).flatten(1).sum(1)
        count = volume.movedim(axis, 0).flatten(1).sum(1)
        return (sums / count.clamp(min=1))[count > 200].numpy()

    assert np.abs(np.diff(means(out))).max() < 0.2 * np.abs(np.diff(means(change))).max()
    assert not out[~volume].any()
    # What differs within a slice is left as it is, and the whole volume's mean nearly so.
    moved = (out - change).movedim(axis, 0)
    inside = volume.movedim(axis, 0)
    spread = [float(m[i].std()) for m, i in zip(moved, inside, strict=True) if i.sum() > 1]
    assert max(spread) < 1e-6
    assert float(out[volume].mean()) == pytest.approx(float(change[volume].mean()), abs=0.005)


def test_a_change_that_is_the_same_in_all_slices_stays(volume):
    change = 0.2 * volume.float()
    assert torch.allclose(consistent(change, volume, 2), change, atol=1e-6)
    assert not consistent(torch.zeros_like(change), volume, 2).any()
