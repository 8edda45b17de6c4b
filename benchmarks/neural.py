"""Seconds that the flow methods need for a scan of about 1 mm and for a new site.

    python -m benchmarks.neural [--threads N] [--repeats R] [--work DIR]

after ``python -m benchmarks.run blindharmony-1-3``, whose models and preprocessed scans
(novosibirsk, .87 x .87 x 1 mm) it uses. Baselines in the same run: histogram matching of the same
scan, and adapting to every scan instead of once to its site.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch

from benchmarks.data import need
from benchmarks.harness import scans_of
from benchmarks.out_of_domain import preprocessed
from bids_harmony.methods.base import Volume
from bids_harmony.methods.bundle import load_bundle
from bids_harmony.methods.flow_method import FlowMethod
from bids_harmony.methods.guided_adaptation import AdaptationPlan
from bids_harmony.methods.harmonizing_flows import HarmonizingFlows
from bids_harmony.methods.histogram_matching import HistogramMatching

ROOT = Path(__file__).parent.parent
PEOPLE = ("nov61gamma07", "nov62gamma07", "nov63gamma07")  # one contrast: what a site is


class AllSteps(HarmonizingFlows):
    """Adapts for as long as an adaptation can last."""

    adaptation_plan: ClassVar[AdaptationPlan] = replace(
        HarmonizingFlows.adaptation_plan, stop_at_normal=False, patience=1000, least_edges=-1.0
    )


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time; the first call is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(name: str, method: FlowMethod, volumes: list[Volume], repeats: int) -> None:
    """Print the figures of one method."""
    one = volumes[0]
    matching = HistogramMatching.fit(volumes, seed=0)
    base = median_seconds(lambda: matching.harmonize(one, seed=0), repeats)
    scan = median_seconds(lambda: method.harmonize(one, seed=0), repeats)
    details = method.adapt(volumes, seed=0).details
    site = median_seconds(lambda: method.adapt(volumes, seed=0), 1)
    alone = median_seconds(lambda: method.adapt([one], seed=0), 1)
    shape = " x ".join(str(n) for n in one.data.shape)
    print(
        f"{name}: scan of {shape} voxels {scan:.2f} s, {scan / base:.1f} times histogram matching"
    )
    print(
        f"{name}: adaptation to a site of {len(volumes)} scans {site:.1f} s, once "
        f"({details['steps']} steps: {details['stop_reason']})"
    )
    if isinstance(method, HarmonizingFlows):
        most = AllSteps.from_state(method.arrays(), method.params())
        most.place_on("cpu", torch.get_num_threads())
        longest = median_seconds(lambda: most.adapt(volumes, seed=0), 1)
        print(f"{name}: the same with all {most.adaptation_plan.steps} steps {longest:.1f} s")
    for cohort in (10, 1000):
        once, each = scan + site / cohort, scan + alone
        print(
            f"{name}: per scan in a cohort of {cohort}: {once:.2f} s; adapting to every scan "
            f"{each:.2f} s, {each / once:.1f} times that"
        )


def main() -> None:
    """Measure both methods."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "benchmarks")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = need(options.work.absolute() / "blindharmony-1-3")
    volumes = [preprocessed(s, folder / "out") for s in scans_of(folder / "bids", PEOPLE)]
    for key in ("harmonizing-flows", "blindharmony"):
        method = load_bundle(need(folder / "out" / "models" / key)).method
        if isinstance(method, FlowMethod):
            method.place_on("cpu", options.threads)
            measure(key, method, volumes, options.repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process {peak:.2f} GiB, {options.threads} threads")


if __name__ == "__main__":
    main()
