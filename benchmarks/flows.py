"""SplineFlow against the same flow made of nflows' own modules, with the same weights.

    python benchmarks/flows.py [--sizes cpu paper] [--batch 16] [--image 96 112] [--repeats 5]

Prints the median wall time of the log-density, of the inverse and of the gradient of a training
step (both flows take turns), their ratio, the largest difference of the results, parameters, and
the memory that the graph of a training step keeps. Threads: OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from nflows import transforms
from nflows.nn.nets import ConvResidualNet
from torch import Tensor, nn

from bids_harmony.networks.affine_flow import AffineFlow
from bids_harmony.networks.flow import HALF_LOG_TWO_PI, Flow
from bids_harmony.networks.spline_flow import SplineFlow

SPLINE: dict[str, dict[str, Any]] = {
    "cpu": {"levels": 3, "steps": 4, "hidden": 16, "blocks": 1},
    "paper": {},
}
AFFINE: dict[str, dict[str, Any]] = {
    "cpu": {"widths": (16,), "blocked": True, "split": True, "noise_couplings": 0},
    "paper": {},
}


class Twin(nn.Module):
    """The flow of nflows' modules with the settings and weights of a `SplineFlow`."""

    def __init__(self, flow: SplineFlow, height: int, width: int) -> None:
        super().__init__()
        config = flow.config()
        levels = config["levels"]
        self.transform = transforms.MultiscaleCompositeTransform(levels)
        for number, level in enumerate(flow.levels):
            channels = config["channels"] * 2 ** (number + 2)
            parts = [transforms.SqueezeTransform()]
            for step in level.steps:
                parts += twin_step(step, channels, config)
            shape = (channels, height >> (number + 1), width >> (number + 1))
            self.transform.add_transform(transforms.CompositeTransform(parts), shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of each image in nats."""
        latents, log_det = self.transform(x)
        return (-0.5 * latents.square() - HALF_LOG_TWO_PI).sum(dim=1) + log_det

    def inverse(self, latents: Tensor) -> Tensor:
        """The image whose flattened latents these are."""
        return self.transform.inverse(latents)[0]


def twin_step(step: Any, channels: int, config: dict[str, Any]) -> list[nn.Module]:
    """nflows' modules of one step, with copies of its weights."""

    def network(inputs: int, outputs: int) -> ConvResidualNet:
        return ConvResidualNet(
            inputs,
            outputs,
            config["hidden"],
            num_blocks=config["blocks"],
            use_batch_norm=config["batch_norm"],
        )

    coupling = transforms.PiecewiseRationalQuadraticCouplingTransform(
        torch.arange(channels) < channels // 2,
        network,
        num_bins=config["bins"],
        tails="linear",
        tail_bound=config["tail_bound"],
    )
    parts = [
        transforms.ActNorm(channels),
        transforms.OneByOneConvolution(channels),
        coupling,
        transforms.OneByOneConvolution(channels),
    ]
    copies = (parts[0], parts[1], coupling.transform_net, parts[3])
    originals = (step.act_norm, step.mix_in, step.conditioner, step.mix_out)
    for part, original in zip(copies, originals, strict=True):
        part.load_state_dict(original.state_dict())
    return parts


def used(settings: dict[str, Any], x: Tensor, kind: type[Flow] = SplineFlow) -> Any:
    """A flow whose ActNorms have seen `x` and whose weights are no longer the first ones."""
    torch.manual_seed(0)
    flow = kind(**settings)
    with torch.no_grad():
        flow(x)
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        flow(x)
    return flow


def gradient(flow: Flow | Twin, x: Tensor) -> Tensor:
    """One training step without the optimizer; the gradients in one row."""
    flow.zero_grad()
    flow.log_prob(x).mean().neg().backward()
    return torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None])


def kept_mebibytes(run: Callable[[], Tensor]) -> float:
    """Memory that autograd keeps for the backward pass of `run`."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values()) / 2**20


def race(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor], repeats: int
) -> tuple[float, float, Tensor, Tensor]:
    """Median seconds of both, taking turns after one warm-up, and both last results."""
    results = [ours(), theirs()]
    times: list[list[float]] = [[], []]
    for _ in range(repeats):
        for i, run in enumerate((ours, theirs)):
            start = time.perf_counter()
            results[i] = run()
            times[i].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1]), results[0], results[1]


def report(what: str, outcome: tuple[float, float, Tensor, Tensor], relative: bool) -> None:
    """One line: times, ratio, largest difference (as a share of the largest value)."""
    ours, theirs, a, b = outcome
    difference = (a - b).abs().max() / (b.abs().max() if relative else 1)
    kind = "relative" if relative else "absolute"
    print(
        f"  {what:14s} {ours:8.3f} s  nflows {theirs:8.3f} s  ratio {theirs / ours:5.2f}"
        f"  largest {kind} difference {difference:.1e}"
    )


def compare(name: str, x: Tensor, repeats: int) -> None:
    """The three races for one size of the spline flow."""
    flow = used(SPLINE[name], x)
    twin = Twin(flow, *x.shape[-2:])
    count = sum(p.numel() for p in flow.parameters())
    print(f"SplineFlow {name}: {flow.config()}, {count} parameters")
    copies = [copy.deepcopy(flow), copy.deepcopy(twin)]
    memory = [kept_mebibytes(lambda f=f: f.log_prob(x)) for f in copies]
    print(f"  kept for the backward pass: {memory[0]:.0f} MiB, nflows {memory[1]:.0f} MiB")
    step = race(lambda: gradient(copies[0], x), lambda: gradient(copies[1], x), repeats)
    flow.eval(), twin.eval()
    with torch.no_grad():
        latents = flow(x).latents
        flat = torch.cat([z.flatten(1) for z in latents], dim=1)
        report(
            "log-density", race(lambda: flow.log_prob(x), lambda: twin.log_prob(x), repeats), True
        )
        back = race(lambda: flow.inverse(latents), lambda: twin.inverse(flat), repeats)
        report("inverse", back, False)
    report("training step", step, True)
    error, theirs = ((image - x).abs().max() for image in back[2:])
    print(f"  round trip: largest error {error:.1e}, nflows {theirs:.1e}")


def time_affine(name: str, x: Tensor, repeats: int) -> None:
    """The affine flow alone: it has no counterpart in nflows."""
    flow = used(AFFINE[name], x, AffineFlow)
    count = sum(p.numel() for p in flow.parameters())
    print(f"AffineFlow {name}: {flow.config()}, {count} parameters")
    print(f"  kept for the backward pass: {kept_mebibytes(lambda: flow.log_prob(x)):.0f} MiB")
    latents = flow.eval()(x).latents
    runs = {
        "log-density": torch.no_grad()(lambda: flow.log_prob(x)),
        "inverse": torch.no_grad()(lambda: flow.inverse(latents)),
        "training step": lambda: gradient(flow, x),
    }
    for what, run in runs.items():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        print(f"  {what:14s} {statistics.median(times):8.3f} s")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SPLINE), default=list(SPLINE))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image", type=int, nargs=2, default=(96, 112))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.triangular_solve")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {vars(options)}")
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(options.batch, 1, *options.image, generator=generator)
    for name in options.sizes:
        compare(name, x, options.repeats)
        time_affine(name, x, options.repeats)


if __name__ == "__main__":
    main()
