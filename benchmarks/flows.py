"""SplineFlow against the same flow made of nflows' own modules, with the same weights.

    python -m benchmarks.flows [--sizes cpu paper] [--batch 16] [--image 96 112] [--repeats 5]

Median wall time of the log-density, of the inverse and of the gradient of a training step (both
flows take turns), their ratio, the largest difference of the results, and the memory that the
graph of a training step keeps. Threads: OMP_NUM_THREADS. Writes ``flow-speed.md``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nflows import transforms
from nflows.nn.nets import ConvResidualNet
from torch import Tensor, nn

from benchmarks.page import write_plain_page
from bids_harmony.networks.affine_flow import AffineFlow
from bids_harmony.networks.flow import HALF_LOG_TWO_PI, Flow
from bids_harmony.networks.spline_flow import SplineFlow

ROOT = Path(__file__).parent.parent
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


def row(what: str, outcome: tuple[float, float, Tensor, Tensor], relative: bool) -> str:
    """Times, ratio and largest difference (as a share of the largest value, or absolute)."""
    ours, theirs, a, b = outcome
    difference = (a - b).abs().max() / (b.abs().max() if relative else 1)
    return f"| {what} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.2f} | {difference:.0e} |"


def compare(name: str, x: Tensor, repeats: int) -> list[str]:
    """The three races for one size of the spline flow, as lines of the page."""
    flow = used(SPLINE[name], x)
    twin = Twin(flow, *x.shape[-2:])
    count = sum(p.numel() for p in flow.parameters())
    copies = [copy.deepcopy(flow), copy.deepcopy(twin)]
    memory = [kept_mebibytes(lambda f=f: f.log_prob(x)) for f in copies]
    step = race(lambda: gradient(copies[0], x), lambda: gradient(copies[1], x), repeats)
    flow.eval(), twin.eval()
    with torch.no_grad():
        latents = flow(x).latents
        flat = torch.cat([z.flatten(1) for z in latents], dim=1)
        forward = race(lambda: flow.log_prob(x), lambda: twin.log_prob(x), repeats)
        back = race(lambda: flow.inverse(latents), lambda: twin.inverse(flat), repeats)
    error, theirs = ((image - x).abs().max() for image in back[2:])
    return [
        f"## Spline flow, preset {name}",
        "",
        f"{count} parameters. Kept for the backward pass: {memory[0]:.0f} MiB, nflows "
        f"{memory[1]:.0f} MiB. Largest error of the inverse: {error:.0e}, nflows {theirs:.0e}.",
        "",
        "| what | ours (s) | nflows (s) | ratio | largest difference |",
        "|---|---|---|---|---|",
        row("log-density", forward, relative=True),
        row("inverse", back, relative=False),
        row("training step", step, relative=True),
        "",
    ]


def time_affine(name: str, x: Tensor, repeats: int) -> list[str]:
    """The affine flow alone, which has no counterpart in nflows, as lines of the page."""
    flow = used(AFFINE[name], x, AffineFlow)
    count = sum(p.numel() for p in flow.parameters())
    memory = kept_mebibytes(lambda: flow.log_prob(x))
    latents = flow.eval()(x).latents
    runs = {
        "log-density": torch.no_grad()(lambda: flow.log_prob(x)),
        "inverse": torch.no_grad()(lambda: flow.inverse(latents)),
        "training step": lambda: gradient(flow, x),
    }
    words = []
    for what, run in runs.items():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        words.append(f"{what} {statistics.median(times):.3f} s")
    return [
        f"Affine flow, preset {name} ({count} parameters): {', '.join(words)}; kept for the "
        f"backward pass: {memory:.0f} MiB.",
        "",
    ]


def main() -> None:
    """Run the benchmark and write its page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SPLINE), default=list(SPLINE))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image", type=int, nargs=2, default=(96, 112))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.triangular_solve")
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(options.batch, 1, *options.image, generator=generator)
    lines = [f"- threads: {torch.get_num_threads()}, medians of {options.repeats}", ""]
    for name in options.sizes:
        lines += [*compare(name, x, options.repeats), *time_affine(name, x, options.repeats)]
    write_plain_page(
        options.out / "flow-speed.md",
        "Speed of the flows",
        f"{options.batch} random images of {options.image[0]} x {options.image[1]}; the spline "
        "flow against the same flow made of nflows' own modules with the same weights, in turns "
        "in one process. Goal: twice as fast, equal to 1e-4. (nflows' log-determinants of its 1x1 "
        "convolutions are found anew at every call; ours are kept.)",
        f"python -m benchmarks.flows --sizes {' '.join(options.sizes)}",
        lines,
    )


if __name__ == "__main__":
    main()
