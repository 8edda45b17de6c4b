"""Splines, ActNorm and 1x1 convolutions of the spline flow, against those of nflows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("nflows")

from nflows.transforms.splines import (  # noqa: E402
    unconstrained_rational_quadratic_spline as reference_spline,
)

from bids_harmony.networks.layers import ActNorm, PointwiseConvolution, joined  # noqa: E402
from bids_harmony.networks.spline import rational_quadratic, running_sum  # noqa: E402
from bids_harmony.networks.spline_flow import SplineFlow  # noqa: E402

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "flows.py"
pytestmark = pytest.mark.filterwarnings("ignore:torch.triangular_solve")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def benchmark_module():
    if not BENCHMARK.exists():
        pytest.skip("benchmarks are not part of an installed package")
    spec = importlib.util.spec_from_file_location("benchmark_flows", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(bins=8, spread=1.0, count=400, bound=3.0):
    """Inputs inside, outside and on the bounds, and parameters."""
    generator = torch.Generator().manual_seed(bins)
    x = 2 * torch.randn(2, count, dtype=torch.float64, generator=generator)
    x[0, :3] = torch.tensor([-bound, 0.0, bound], dtype=torch.float64)
    parameters = torch.randn(2, 3 * bins - 1, count, dtype=torch.float64, generator=generator)
    return x, spread * parameters


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("bins", [2, 8])
def test_spline_is_that_of_nflows(bins, inverse):
    x, parameters = drawn(bins)
    widths, heights, slopes = parameters.transpose(1, 2).split((bins, bins, bins - 1), dim=-1)
    expected = reference_spline(x, widths, heights, slopes, inverse=inverse, tail_bound=3.0)
    got = rational_quadratic(x, parameters, 3.0, inverse=inverse)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("bins", [2, 5])
def test_spline_gradients(bins, inverse):
    x, parameters = drawn(bins, count=12)
    x[0, :3] += torch.tensor([-0.1, 0.1, 0.1])  # kinks of the second derivative
    inputs = (x.requires_grad_(), parameters.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda a, b: rational_quadratic(a, b, 3.0, inverse=inverse), inputs
    )


def test_spline_rises_and_its_slope_is_the_derivative():
    x = torch.linspace(-4, 4, 4001, dtype=torch.float64).unsqueeze(0)
    parameters = drawn(8, spread=2.0)[1][:1, :, :1].expand(1, 23, 4001)
    y, log_slope = rational_quadratic(x, parameters, 3.0)
    assert (y.diff() > 0).all()
    outside = x.abs() > 3
    assert torch.equal(y[outside], x[outside])
    assert (log_slope[outside] == 0).all()
    slope = (y[:, 2:] - y[:, :-2]) / (x[:, 2:] - x[:, :-2])
    away = (slope - log_slope.exp()[:, 1:-1]).abs().sort().values[0, :-100]
    assert away.max() < 1e-2
    back, minus = rational_quadratic(y, parameters, 3.0, inverse=True)
    assert (back - x).abs().max() < 1e-9
    assert (minus + log_slope).abs().max() < 1e-6


@pytest.mark.parametrize("spread", [10.0, 100.0, 1000.0])
def test_extreme_splines_stay_finite_in_single_precision(spread):
    x, parameters = (value.float() for value in drawn(8, spread))
    x, parameters = x.requires_grad_(), parameters.requires_grad_()
    for inverse in (False, True):
        y, log_slope = rational_quadratic(x, parameters, 3.0, inverse=inverse)
        (y.sum() + log_slope.sum()).backward()
        assert y.isfinite().all()
        assert log_slope.isfinite().all()
        assert y[x.abs() <= 3].abs().max() <= 3 + 1e-5
    assert x.grad.isfinite().all()
    assert parameters.grad.isfinite().all()


def test_running_sum():
    x = torch.rand(2, 3, 5, 7)
    torch.testing.assert_close(running_sum(x), x.cumsum(-2))


def test_first_batch_sets_actnorm():
    layer = ActNorm(3)
    x = torch.randn(3, 4, 5, 6) * torch.tensor([2.0, 0.5, 0.0]).view(3, 1, 1, 1) + 1
    layer.initialize(x)
    matrix, bias = layer.matrix_bias()
    y = (matrix @ x.flatten(1)) + bias.unsqueeze(-1)
    assert y.mean(dim=1).abs().max() < 1e-5
    torch.testing.assert_close(y.std(dim=1, correction=0), torch.tensor([1.0, 1.0, 0.0]))
    expected, _ = layer(x.transpose(0, 1))
    torch.testing.assert_close(y.view(x.shape), expected.transpose(0, 1))


def test_pointwise_convolution_is_that_of_nflows():
    torch.manual_seed(0)
    layer = PointwiseConvolution(8).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    expected, log_det = layer(x)
    matrix, bias = layer.matrix_bias()
    got = torch.einsum("ij,bjhw->bihw", matrix, x) + bias.view(-1, 1, 1)
    torch.testing.assert_close(got, expected)
    assert log_det[0].item() == pytest.approx(12 * torch.linalg.slogdet(matrix)[1].item())
    whole, shift = joined(layer.matrix_bias(), layer.inverse_matrix_bias())
    torch.testing.assert_close(whole, torch.eye(8, dtype=torch.float64))
    assert shift.abs().max() < 1e-12


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_whole_flow_is_that_of_nflows(benchmark_module, training, batch_norm):
    settings = {"levels": 3, "steps": 2, "hidden": 12, "blocks": 2, "batch_norm": batch_norm}
    x = torch.rand(4, 1, 32, 24, generator=torch.Generator().manual_seed(0))
    flow = benchmark_module.used(settings, x).train(training)
    twin = benchmark_module.Twin(flow, 32, 24).train(training)
    expected = twin.log_prob(x)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=1e-5, atol=1e-2)
    gradients = [benchmark_module.gradient(f, x) for f in (flow, twin)]
    largest = gradients[1].abs().max()
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * largest
    flow.eval(), twin.eval()
    with torch.no_grad():
        latents = flow(x).latents
        flat = torch.cat([z.flatten(1) for z in latents], dim=1)
        theirs, _ = twin.transform(x)
        assert (flat - theirs).abs().max() < 1e-4
        drawn_latents = [torch.randn_like(z) for z in latents]
        flat = torch.cat([z.flatten(1) for z in drawn_latents], dim=1)
        assert (flow.inverse(drawn_latents) - twin.inverse(flat)).abs().max() < 1e-4


def test_batch_norm_statistics_are_those_of_nflows(benchmark_module):
    settings = {"levels": 1, "steps": 1, "hidden": 8, "blocks": 1}
    x = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    flow = benchmark_module.used(settings, x)
    twin = benchmark_module.Twin(flow, 16, 16)
    flow.log_prob(x), twin.log_prob(x)
    ours = [b for name, b in flow.named_buffers() if "running" in name]
    theirs = [b for name, b in twin.named_buffers() if "running" in name]
    assert len(ours) == 4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_defaults_are_blindharmonys():
    config = SplineFlow().config()
    assert (config["levels"], config["steps"], config["hidden"]) == (4, 7, 96)
    assert (config["blocks"], config["bins"], config["tail_bound"]) == (3, 8, 3.0)
