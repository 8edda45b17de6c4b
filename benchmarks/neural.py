"""Seconds that the flow methods need for a scan of about 1 mm and for a new site.

    python -m benchmarks.neural [--methods M ...] [--threads N] [--repeats R] [--work DIR]

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
from benchmarks.out_of_domain import METHODS, preprocessed
from benchmarks.page import write_plain_page
from benchmarks.trials import scans_of
from bids_harmony.methods.base import Volume
from bids_harmony.methods.bundle import load_bundle
from bids_harmony.methods.flow_method import FlowMethod
from bids_harmony.methods.guided_adaptation import AdaptationPlan
from bids_harmony.methods.harmonizing_flows import HarmonizingFlows
from bids_harmony.methods.histogram_matching import HistogramMatching

ROOT = Path(__file__).parent.parent
GOALS = (15, 60)  # seconds for a scan, for a site
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


def measure(name: str, method: FlowMethod, volumes: list[Volume], repeats: int) -> list[str]:
    """The figures of one method, in words."""
    one = volumes[0]
    matching = HistogramMatching.fit(volumes, seed=0)
    base = median_seconds(lambda: matching.harmonize(one, seed=0), repeats)
    scan = median_seconds(lambda: method.harmonize(one, seed=0), repeats)
    details = method.adapt(volumes, seed=0).details
    site = median_seconds(lambda: method.adapt(volumes, seed=0), 1)
    alone = median_seconds(lambda: method.adapt([one], seed=0), 1)
    shape = " x ".join(str(n) for n in one.data.shape)
    lines = [
        f"{name}: scan of {shape} voxels {scan:.1f} s, {scan / base:.1f} times histogram matching",
        f"{name}: adaptation to a site of {len(volumes)} scans {site:.1f} s, once "
        f"({details['steps']} steps: {details['stop_reason']})",
    ]
    if isinstance(method, HarmonizingFlows):
        most = AllSteps.from_state(method.arrays(), method.params())
        most.place_on("cpu", torch.get_num_threads())
        longest = median_seconds(lambda: most.adapt(volumes, seed=0), 1)
        lines.append(
            f"{name}: the same with all {most.adaptation_plan.steps} steps {longest:.1f} s"
        )
    for cohort in (10, 1000):
        once, each = scan + site / cohort, scan + alone
        lines.append(
            f"{name}: per scan in a cohort of {cohort} (the sum of the above): {once:.1f} s; "
            f"adapting to every scan {each:.1f} s, {each / once:.1f} times that"
        )
    return lines


def main() -> None:
    """Measure both methods, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "benchmarks")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = need(options.work.absolute() / "blindharmony-1-3")
    volumes = [preprocessed(s, folder / "out") for s in scans_of(folder / "bids", PEOPLE)]
    lines = [f"- threads: {options.threads}, median of {options.repeats} (adaptations: once)"]
    for key in options.methods:
        method = load_bundle(need(folder / "out" / "models" / key)).method
        if isinstance(method, FlowMethod):
            method.place_on("cpu", options.threads)
            lines += [
                "",
                *(f"- {line}" for line in measure(key, method, volumes, options.repeats)),
            ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines += [
        "",
        f"Peak memory of the process: {peak:.2f} GiB. Goals, on two cores: {GOALS[0]} s for a "
        f"scan of about 1 mm, {GOALS[1]} s for a new site.",
    ]
    write_plain_page(
        options.out / "seconds.md",
        "Seconds of the flow methods",
        "The method alone, without preprocessing: real scans (novosibirsk, gamma .7), models of "
        "`blindharmony-1-3`. Histogram matching of the same scan is timed in the same run.",
        f"python -m benchmarks.neural --methods {' '.join(options.methods)}",
        lines,
    )


if __name__ == "__main__":
    main()
