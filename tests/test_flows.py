"""The contract of every normalizing flow."""

from __future__ import annotations

import copy
import json
import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("nflows")

from bids_harmony.networks.affine_flow import AffineFlow  # noqa: E402
from bids_harmony.networks.dequantize import VariationalNoise  # noqa: E402
from bids_harmony.networks.flow import Flow, build_flow  # noqa: E402
from bids_harmony.networks.spline_flow import SplineFlow  # noqa: E402

SPLINE = {"kind": "spline", "levels": 2, "steps": 2, "hidden": 8, "blocks": 1}
AFFINE = {"kind": "affine", "couplings": 2, "widths": [4, 6]}
FLOWS = {
    "spline": SPLINE,
    "spline-plain": {**SPLINE, "batch_norm": False, "channels": 2, "bins": 5},
    "affine": {**AFFINE, "noise_couplings": 2},
    "affine-split": {**AFFINE, "split": True, "noise_couplings": 0},
    "affine-blocked": {**AFFINE, "split": True, "blocked": True, "noise_couplings": 2},
    "affine-two": {**AFFINE, "blocked": True, "channels": 2, "noise_couplings": 0},
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=FLOWS)
def config(request):
    return FLOWS[request.param]


def images(flow: Flow, count=3, size=(8, 12), seed=0):
    """Brains of a kind: noise inside a disc, exactly zero outside; and their masks."""
    generator = torch.Generator().manual_seed(seed)
    like = next(flow.parameters())
    x = torch.rand(count, flow.channels, *size, generator=generator, dtype=torch.float64)
    rows = torch.linspace(-1, 1, size[0]).view(-1, 1)
    disc = (rows.square() + torch.linspace(-1, 1, size[1]).square() < 0.8).to(like.dtype)
    return (x * disc).to(like.dtype), disc.expand(count, 1, *size).contiguous()


def used(config, dtype=torch.float64, spread=0.1) -> Flow:
    """A flow that has seen data and whose weights are no longer the first ones, in eval mode."""
    torch.manual_seed(3)
    flow = build_flow(config).to(dtype)
    x, _ = images(flow, 8)
    with torch.no_grad():
        flow(x)
        for parameter in flow.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, dtype=torch.float64).to(dtype))
        for _ in range(3):
            flow(x + 0.1)
    return flow.eval()


def test_log_density_is_that_of_the_jacobian(config):
    flow = used(config).requires_grad_(False)
    x, _ = images(flow, 1, (8, 8))

    def latents(flat):
        return torch.cat([z.flatten() for z in flow(flat.view(x.shape)).latents])

    jacobian = torch.autograd.functional.jacobian(latents, x.flatten())
    sign, log_det = torch.linalg.slogdet(jacobian)
    z = latents(x.flatten())
    expected = -0.5 * (z @ z) - 0.5 * len(z) * math.log(2 * math.pi) + log_det
    assert sign != 0
    assert len(z) == x.numel()
    assert flow.log_prob(x).item() == pytest.approx(expected.item(), abs=1e-9)


def test_inverse_undoes_the_flow(config):
    flow = used(config)
    x, _ = images(flow)
    with torch.no_grad():
        assert (flow.inverse(flow(x).latents) - x).abs().max() < 1e-10
    # A latent drawn anywhere, also in the tails, comes back as well.
    generator = torch.Generator().manual_seed(1)
    latents = [
        3 * torch.randn(2, *shape, dtype=torch.float64, generator=generator)
        for shape in flow.latent_shapes(8, 12)
    ]
    with torch.no_grad():
        back = flow(flow.inverse(latents)).latents
    for a, b in zip(latents, back, strict=True):
        assert (a - b).abs().max() < 1e-7


def test_latents_have_the_shapes_that_are_announced(config):
    flow = used(config)
    x, _ = images(flow)
    shapes = [tuple(z.shape[1:]) for z in flow(x).latents]
    assert shapes == flow.latent_shapes(8, 12)
    assert sum(math.prod(shape) for shape in shapes) == x[0].numel()


def test_bits_of_the_whole_image_are_those_of_the_density(config):
    flow = used(config)
    x, mask = images(flow)
    expected = -flow.log_prob(x) / (math.log(2) * x[0].numel()) + math.log2(256)
    torch.testing.assert_close(flow.bits_per_dim(x), expected, rtol=1e-12, atol=1e-12)
    everywhere = flow.bits_per_dim(x, torch.ones_like(mask))
    torch.testing.assert_close(everywhere, expected, rtol=1e-12, atol=1e-12)


def test_bits_of_two_regions_add_up(config):
    flow = used(config)
    x, mask = images(flow)
    inside, outside = mask.sum((1, 2, 3)), (1 - mask).sum((1, 2, 3))
    both = flow.bits_per_dim(x, mask) * inside + flow.bits_per_dim(x, 1 - mask) * outside
    torch.testing.assert_close(both / (inside + outside), flow.bits_per_dim(x))


def test_each_place_counts_where_it_is(config):
    """With a mask of one coarse cell, the bits are the sum of the maps over that cell."""
    flow = used(config)
    x, _ = images(flow, 1)
    mask = torch.zeros(1, 1, 8, 12, dtype=torch.float64)
    mask[..., 4:8, 8:12] = 1
    total = 0.0
    for density in flow(x).densities:
        cell = 4 * density.shape[-2] // 8
        total += density[..., cell : 2 * cell, 2 * cell : 3 * cell].sum().item()
    expected = -total / (math.log(2) * 16 * flow.channels) + 8
    assert flow.bits_per_dim(x, mask).item() == pytest.approx(expected, abs=1e-10)


def test_samples_are_finite_and_repeatable(config):
    flow = used(config, torch.float32)

    def draw(seed, temperature=1.0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            return flow.sample(3, 8, 12, temperature=temperature, generator=generator)

    assert draw(0).shape == (3, flow.channels, 8, 12)
    assert draw(0).isfinite().all()
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    cold = draw(0, 0.0)
    assert torch.equal(cold[0], cold[1])


def test_gradients_reach_every_parameter(config):
    flow = used(config)
    x, _ = images(flow)
    flow.bits_bound(x, generator=torch.Generator().manual_seed(0)).mean().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-9, name


def test_gradients_are_those_of_small_differences(config):
    flow = used(config)
    x, mask = images(flow, 1)
    x.requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).double()
    (gradient,) = torch.autograd.grad(flow.bits_per_dim(x, mask).sum(), x)
    with torch.no_grad():
        up, down = (flow.bits_per_dim(x + s * direction, mask).item() for s in (1e-6, -1e-6))
    expected = (gradient * direction).sum().item()
    assert (up - down) / 2e-6 == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_saved_and_rebuilt_gives_the_same_numbers(config):
    flow = used(config, torch.float32)
    x, mask = images(flow)
    other = build_flow(json.loads(json.dumps(flow.config())))
    other.load_state_dict(flow.state_dict())
    other.eval()
    assert other.config() == flow.config()
    assert torch.equal(flow.bits_per_dim(x, mask), other.bits_per_dim(x, mask))
    assert torch.equal(copy.deepcopy(flow).log_prob(x), flow.log_prob(x))


def test_all_zero_slices_stay_finite(config):
    flow = build_flow(config).train()
    x = torch.zeros(4, flow.channels, 8, 12)
    for _ in range(2):
        flow.zero_grad()
        flow.log_prob(x).mean().backward()
        for name, parameter in flow.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
    flow.eval()
    with torch.no_grad():
        latents = flow(x).latents
        assert all(z.isfinite().all() for z in latents)
        assert flow.bits_per_dim(x).isfinite().all()
        assert flow.inverse(latents).abs().max() < 1e-4


def test_single_precision_follows_double(config):
    flow = used(config)
    x, mask = images(flow, size=(16, 24))
    single = copy.deepcopy(flow).float()
    with torch.no_grad():
        exact = flow.bits_per_dim(x, mask)
        near = single.bits_per_dim(x.float(), mask.float())
        back = single.inverse(single(x.float()).latents)
    assert near.dtype == torch.float32
    assert (near - exact).abs().max() < 1e-4
    assert (back - x).abs().max() < 1e-3


def test_autocast_keeps_the_map_in_single_precision(config):
    flow = used(config, torch.float32)
    x, mask = images(flow)
    plain = flow.bits_per_dim(x, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bits = flow.bits_per_dim(x, mask)
        bits.mean().backward()
        with torch.no_grad():
            latents = flow(x).latents
            back = flow.inverse(latents)
    assert all(z.dtype == torch.float32 for z in latents)
    assert (bits - plain).abs().max() < 0.2
    # Both directions see the same networks, so that even rough ones are undone.
    assert (back - x).abs().max() < 0.05
    assert all(p.grad is None or p.grad.isfinite().all() for p in flow.parameters())


def test_wrong_shapes_are_refused(config):
    flow = used(config, torch.float32)
    good, mask = images(flow)
    for x in (good[..., :-2], good[..., :-1, :], good[:, :0], good[0]):
        with pytest.raises(ValueError, match=r"expected|multiple"):
            flow(x)
    with pytest.raises(ValueError, match="multiple"):
        flow.sample(1, 8, 10)
    with pytest.raises(ValueError, match="does not fit"):
        flow.bits_per_dim(good, mask[..., 4:])
    with pytest.raises(ValueError, match="empty"):
        flow.bits_per_dim(good, 0 * mask)
    with pytest.raises(ValueError, match="latents"):
        flow.inverse([z[..., 1:] for z in flow(good).latents[:-1]] + [good])


def test_the_same_seed_gives_the_same_training(config):
    def train():
        torch.manual_seed(0)
        flow = build_flow(config)
        x, _ = images(flow)
        optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            flow.bits_bound(x, generator=generator).mean().backward()
            optimizer.step()
        return flow.eval().bits_per_dim(x)

    first = train()
    assert first.isfinite().all()
    assert torch.equal(first, train())


def test_training_lowers_the_bits(config):
    torch.manual_seed(0)
    flow = build_flow(config)
    x, _ = images(flow, 8)
    x = 0.3 * x + 0.3
    optimizer = torch.optim.Adam(flow.parameters(), 3e-3)
    bits = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = flow.bits_bound(x, generator=torch.Generator().manual_seed(1)).mean()
        loss.backward()
        optimizer.step()
        bits.append(loss.item())
    assert bits[-1] < bits[0] - 0.3


def test_what_eval_keeps_follows_the_weights(config):
    flow = used(config, torch.float32)
    x, _ = images(flow)

    def fresh():
        other = build_flow(flow.config())
        other.load_state_dict(flow.state_dict())
        return other.eval().log_prob(x)

    with torch.inference_mode():
        flow.log_prob(x)
    flow.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    flow.log_prob(leaf).sum().backward()
    assert leaf.grad is not None
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(1.05)
    assert torch.equal(flow.log_prob(x), fresh())
    state = flow.state_dict()
    flow.load_state_dict({k: 1.1 * v if v.is_floating_point() else v for k, v in state.items()})
    assert torch.equal(flow.log_prob(x), fresh())
    assert flow.double().log_prob(x.double()).dtype == torch.float64


def test_frozen_weights_give_the_same_image_gradient(config):
    flow = used(config)
    x, mask = images(flow)
    gradients = []
    for wanted in (True, False):
        flow.requires_grad_(wanted)
        leaf = x.clone().requires_grad_()
        flow.bits_per_dim(leaf, mask).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_bound_counts_the_noise():
    flow = used(FLOWS["affine"])
    x, mask = images(flow)
    with torch.no_grad():
        bound = flow.bits_bound(x, mask, generator=torch.Generator().manual_seed(2))
        rounded = torch.round(x * 256) / 256
        noise, log_noise = flow.noise(rounded, torch.Generator().manual_seed(2))
        plain = flow.bits_per_dim(rounded + noise / 256, mask)
    counted = (log_noise * mask).sum((1, 2, 3)) / (math.log(2) * mask.sum((1, 2, 3)))
    assert noise.abs().max() < 0.5
    torch.testing.assert_close(bound, plain + counted)


def test_variational_noise_has_the_density_it_says():
    torch.manual_seed(1)
    layer = VariationalNoise(1, 3, (4, 6)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.rand(1, 1, 4, 6, dtype=torch.float64)
    z = torch.randn(1, 1, 4, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda flat: layer.shape(flat.view(z.shape), x)[0].flatten(), z.flatten()
    )
    _, log_det = layer.shape(z, x)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    assert log_det.sum().item() == pytest.approx(expected.item(), abs=1e-9)


def test_sizes_of_the_papers():
    spline = sum(p.numel() for p in SplineFlow().parameters())
    affine = sum(p.numel() for p in AffineFlow().parameters())
    assert spline == pytest.approx(14_486_534, rel=0.01)
    assert affine == pytest.approx(4_023_176, rel=0.02)


@pytest.mark.parametrize("wrong", [{"kind": "none"}, {}, {"kind": "spline", "bins": 1}])
def test_unknown_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=r"kind|positive"):
        build_flow(wrong)
