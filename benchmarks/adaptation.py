"""What brings the gain of Harmonizing Flows, and PSNR against the number of adaptation steps.

    python -m benchmarks.adaptation [--work DIR] [--out DIR]

after ``python -m benchmarks.run travelling``, whose scans, truth and model it uses (phantom). Each
site is adapted to on its test scans, which is what a user's cohort would give; the truth is used
for the scores alone. A site that is not in the table, `noisy`, has the scans of one of the others
with much more noise than any that the harmonizer was taught on. Scores are taken on the model's
grid, of the slices that the flow sees. Writes ``adaptation.md``, ``.csv`` and ``.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.data import need, volume_of
from benchmarks.harness import Case, Prepared, Settings
from benchmarks.page import write_plain_page
from benchmarks.tables.travelling import Travelling
from bids_harmony.bids.write import atomic_write_text
from bids_harmony.errors import ScanError
from bids_harmony.methods.base import Volume
from bids_harmony.methods.bundle import load_bundle
from bids_harmony.methods.flow_training import Part
from bids_harmony.methods.guided_adaptation import AdaptationPlan, adapt_harmonizer
from bids_harmony.methods.harmonizing_flows import HarmonizingFlows, apply_harmonizer
from bids_harmony.methods.volume_grid import on_model_grid
from bids_harmony.metrics.similarity import psnr
from bids_harmony.networks.harmonizer import HarmonizerUNet

ROOT = Path(__file__).parent.parent
NOISY, NOISE = "mprage15", 0.15  # of the common scale; the harmonizer is taught up to .09
#: To the last step, whatever the edges and the score say.
FREE = AdaptationPlan(least_edges=-1.0, patience=1000, every=10)
PLANS = {
    "as shipped": AdaptationPlan(),
    "no stop rule": replace(FREE, stop_at_normal=False),
    "no anatomy terms": replace(FREE, edges=0.0, tie=0.0),
    "neither": replace(FREE, stop_at_normal=False, edges=0.0, tie=0.0),
    "neither, 6 x rate": replace(FREE, stop_at_normal=False, edges=0.0, tie=0.0, rate=3e-4),
    "no flow": replace(FREE, guided=False, stop_at_normal=False),
}


class Site:
    """The test scans of one site, with their truth, on the model's grid."""

    def __init__(
        self,
        table: Travelling,
        cases: Sequence[Case],
        prep: Prepared,
        method: HarmonizingFlows,
        noise: float,
    ) -> None:
        draw = np.random.default_rng(0)
        volumes, truths = [], []
        for case in cases:
            (scan,) = case.scans
            mask, affine = prep.mask(scan), prep.corrected(scan)[1]
            volume = volume_of(scan, prep.scaled(scan), mask, affine, "T1w")
            truth, brain, _ = table.truth_of(case, prep)
            volumes.append(_with_noise(volume, noise, draw))
            truths.append(replace(volume, data=np.where(mask & brain, truth, 0)))
        self.part, self.brains = method.adaptation_inputs(volumes)
        if len(self.brains) != len(volumes):
            raise ScanError(f"{cases[0].condition}: the model refuses a scan of this site")
        self._axis, size = method.axis, self.part.resolution
        self._inputs = [torch.from_numpy(on_model_grid(v, size).data) for v in volumes]
        self._truths = [on_model_grid(v, size).data for v in truths]

    def psnr(self, images: Sequence[Tensor]) -> float:
        """Mean over scans of the PSNR in the true brain, dB."""
        return float(np.mean([
            psnr(truth, image.numpy(), truth > 0)
            for image, truth in zip(images, self._truths, strict=True)
        ]))  # fmt: skip

    def stages(self) -> dict[str, float]:
        """PSNR of the input, after the tone curve, and after the network, dB."""
        return {
            "input": self.psnr(self._inputs),
            "tone curve": self.psnr([image for image, _ in self.brains]),
            "and harmonizer": self.after(self.part.harmonizer),
        }

    def after(self, harmonizer: HarmonizerUNet | None) -> float:
        """PSNR after the network, dB."""
        assert harmonizer is not None
        return self.psnr([
            apply_harmonizer(harmonizer, image, (self._axis,)).clamp(min=0) * mask
            for image, mask in self.brains
        ])  # fmt: skip


def _with_noise(volume: Volume, deviation: float, draw: np.random.Generator) -> Volume:
    """Rician noise of this standard deviation in the brain."""
    if not deviation:
        return volume
    real, imaginary = deviation * draw.standard_normal((2, *volume.data.shape))
    data = np.hypot(volume.data + real, imaginary)
    return replace(volume, data=np.where(volume.mask, data, 0).astype(np.float32))


def adapted(
    part: Part, site: Site, plan: AdaptationPlan, axis: int
) -> tuple[dict[int, float], float, Mapping[str, Any]]:
    """PSNR at each look, PSNR of the state that is kept, and what the adaptation tells."""
    states: list[dict[str, Tensor]] = []
    harmonizer = deepcopy(part.harmonizer)
    assert harmonizer is not None
    details = adapt_harmonizer(
        harmonizer,
        part.flow,
        site.brains,
        goal=part.goal,
        axis=axis,
        plan=plan,
        seed=0,
        states=states,
    )
    found = {}
    for look, state in zip(details["history"], states, strict=True):
        harmonizer.load_state_dict(state)
        found[int(look["step"])] = site.after(harmonizer)
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
    falls: dict[str, str] = {}
    sites = [(name, name, 0.0) for name in table.sites] + [("noisy", NOISY, NOISE)]
    figure = Figure(figsize=(4 * len(sites), 3.2), layout="constrained")
    axes = figure.subplots(1, len(sites))
    for axis, (name, origin, noise) in zip(axes, sites, strict=True):
        cases = [c for c in prep.cohort.cases if c.condition == origin]
        site = Site(table, cases, prep, method, noise)
        cells = site.stages()
        for variant, plan in PLANS.items():
            curve, kept, details = adapted(site.part, site, plan, method.axis)
            cells[variant] = kept
            falls.setdefault(name, _fall(curve))  # of the first: as shipped
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
    _write(options.out, rows, lines, falls, figure)


def _fall(curve: Mapping[int, float]) -> str:
    """Whether PSNR falls with the number of steps, in words."""
    if len(curve) == 1:
        return "no step was taken"
    first, *rest = curve.values()
    return f"{max(curve)} steps, {min(rest) - first:+.2f} to {max(rest) - first:+.2f} dB"


def _write(
    out: Path,
    rows: Sequence[str],
    lines: Sequence[tuple[str, dict[str, float]]],
    falls: Mapping[str, str],
    figure: Figure,
) -> None:
    headings = list(lines[0][1])
    about = (
        "Phantom, scans and model of the table `travelling`; mean PSNR in dB over the test "
        f"subjects, on the model's grid, after one pass of the network. `noisy`: {NOISY} with "
        f"noise of {100 * NOISE:.0f} % of the scale, more than the network was taught on. *last*: "
        "the state after the last step, whether kept or not; the other columns are the states "
        "that the adaptation keeps. No variant but the first ends where edges move or the score "
        f"stands still; those without a stop rule take all {FREE.steps} steps. The method "
        "averages three passes, finds a second tone curve and gives back a scan's detail, which "
        "these figures leave out."
    )
    body = [
        f"| site | {' | '.join(headings)} |",
        "|" + "---|" * (len(headings) + 1),
        *(f"| {name} | {' | '.join(f'{cells[h]:.2f}' for h in headings)} |"
          for name, cells in lines),
        "",
        "Goal: with more adaptation steps PSNR must not fall. As shipped, against no step:",
        "",
        *(f"- {name}: {words}" for name, words in falls.items()),
        "",
        "![PSNR against adaptation steps](adaptation.png)",
    ]  # fmt: skip
    write_plain_page(
        out / "adaptation.md", "What brings the gain of Harmonizing Flows", about,
        "python -m benchmarks.adaptation", body,
    )  # fmt: skip
    atomic_write_text(out / "adaptation.csv", "\n".join(rows) + "\n")
    figure.savefig(out / "adaptation.png", dpi=80)


if __name__ == "__main__":
    main()
