"""What brings the gain of Harmonizing Flows, and PSNR against the number of adaptation steps.

    python -m benchmarks.adaptation [--work DIR] [--out DIR]

after ``python -m benchmarks.run travelling``, whose scans, truth and model it uses (phantom). The
model is applied to the preprocessed scans on the raw grid, as the participant level does. Each
site is adapted to on its test scans, which is what a user's cohort would give; the truth is used
for the scores alone. Writes ``adaptation.md``, ``.csv`` and ``.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.data import need, volume_of
from benchmarks.harness import Case, Prepared, Settings
from benchmarks.rows import facts
from benchmarks.tables.travelling import SITES, Travelling
from bids_harmony.bids.write import atomic_write_text
from bids_harmony.errors import ScanError
from bids_harmony.methods.base import Adaptation, FloatArray
from bids_harmony.methods.bundle import load_bundle
from bids_harmony.methods.guided_adaptation import AdaptationPlan, adapt_harmonizer
from bids_harmony.methods.harmonizing_flows import HarmonizingFlows
from bids_harmony.methods.tone import state_arrays
from bids_harmony.metrics.similarity import psnr

ROOT = Path(__file__).parent.parent
_FREE = {"least_edges": -1.0, "patience": 1000}
PLANS = {
    "as shipped": AdaptationPlan(),
    "no stop rule": AdaptationPlan(stop_at_normal=False, **_FREE),
    "no anatomy terms": AdaptationPlan(edges=0.0, tie=0.0, **_FREE),
    "neither": AdaptationPlan(stop_at_normal=False, edges=0.0, tie=0.0, rate=3e-4, **_FREE),
    "no flow": AdaptationPlan(guided=False, stop_at_normal=False, **_FREE),
}


class Site:
    """The test scans of one site as volumes, with their truth."""

    def __init__(self, table: Travelling, cases: Sequence[Case], prep: Prepared) -> None:
        self.volumes, self._truth = [], []
        for case in cases:
            (scan,) = case.scans
            affine = prep.corrected(scan)[1]
            mask = prep.mask(scan)
            self.volumes.append(volume_of(scan, prep.scaled(scan), mask, affine, "T1w"))
            self._truth.append(table.truth_of(case, prep)[:2])

    def psnr(self, images: Sequence[FloatArray]) -> float:
        """Mean over scans of the PSNR in the true brain, dB."""
        return float(np.mean([
            psnr(truth, image, brain)
            for image, (truth, brain) in zip(images, self._truth, strict=True)
        ]))  # fmt: skip


def stages(method: HarmonizingFlows, site: Site) -> dict[str, float]:
    """PSNR of the input and after each step of the method, dB."""
    curves, networks = [], []
    for volume in site.volumes:
        curves.append(method.tone_only(volume).data)
        networks.append(method.harmonize(volume, seed=0).data)
    return {
        "input": site.psnr([v.data for v in site.volumes]),
        "tone curve": site.psnr(curves),
        "and harmonizer": site.psnr(networks),
    }


def adapted(
    method: HarmonizingFlows, site: Site, plan: AdaptationPlan
) -> tuple[dict[int, float], float, Mapping[str, Any]]:
    """PSNR at each look, PSNR of the state that is kept, and what the adaptation tells."""
    states: list[dict[str, torch.Tensor]] = []
    part, brains = method.adaptation_inputs(site.volumes)
    trained = deepcopy(part.harmonizer)
    assert trained is not None
    details = adapt_harmonizer(
        trained,
        part.flow,
        brains,
        goal=part.goal,
        axis=method.axis,
        plan=plan,
        seed=0,
        states=states,
    )
    found = {}
    for look, state in zip(details["history"], states, strict=True):
        trained.load_state_dict(state)
        made = method.adapted(Adaptation(state_arrays(trained, "harmonizer"), {"modality": "T1w"}))
        images = [made.harmonize(v, seed=0).data for v in site.volumes]
        found[int(look["step"])] = site.psnr(images)
    return found, found[details["kept_step"]], details


def main() -> None:
    """Compute, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "benchmarks")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Travelling()
    folder = options.work.absolute() / table.name
    prep = Prepared(table.prepare(folder, folder), folder, Settings(options.work))
    method = load_bundle(need(folder / "out" / "models" / "harmonizing-flows")).method
    if not isinstance(method, HarmonizingFlows):
        raise ScanError(f"{folder}: no model of Harmonizing Flows")
    rows, lines = ["site,variant,step,psnr,bits,edges"], []
    figure = Figure(figsize=(4 * len(SITES), 3.2), layout="constrained")
    axes = figure.subplots(1, len(SITES))
    for axis, name in zip(axes, SITES, strict=True):
        site = Site(table, [c for c in prep.cohort.cases if c.condition == name], prep)
        cells = stages(method, site)
        for variant, plan in PLANS.items():
            curve, kept, details = adapted(method, site, plan)
            cells[variant] = kept
            cells[f"{variant}: last"] = list(curve.values())[-1]
            axis.plot(list(curve), list(curve.values()), marker=".", label=variant)
            rows += [
                f"{name},{variant},{h['step']},{curve[int(h['step'])]:.3f},{h['bits']},{h['edges']}"
                for h in details["history"]
            ]
            print(name, variant, details["stop_reason"], curve, flush=True)
        axis.axhline(cells["input"], color="grey", linestyle=":", label="input")
        axis.set(title=name, xlabel="adaptation steps", ylabel="PSNR, dB")
        lines.append((name, cells))
    axes[0].legend(fontsize=7)
    _write(options.out, rows, lines, figure)


def _write(
    out: Path, rows: Sequence[str], lines: Sequence[tuple[str, dict[str, float]]], figure: Figure
) -> None:
    headings = list(lines[0][1])
    text = [
        "# What brings the gain of Harmonizing Flows",
        "",
        "Phantom, scans and model of the table `travelling`; mean PSNR in dB over the test "
        "subjects, on the raw grid. *last*: the state after the last step, whether kept or not; "
        "the other columns are the states that the adaptation keeps.",
        "",
        "- command: `python -m benchmarks.adaptation`",
        *(f"- {key}: {value}" for key, value in facts(0, "cpu").items()),
        "",
        f"| site | {' | '.join(headings)} |",
        "|" + "---|" * (len(headings) + 1),
        *(f"| {name} | {' | '.join(f'{cells[h]:.2f}' for h in headings)} |"
          for name, cells in lines),
        "",
        "![PSNR against adaptation steps](adaptation.png)",
        "",
    ]  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / "adaptation.md", "\n".join(text))
    atomic_write_text(out / "adaptation.csv", "\n".join(rows) + "\n")
    figure.savefig(out / "adaptation.png", dpi=80)
    print("\n".join(text))


if __name__ == "__main__":
    main()
