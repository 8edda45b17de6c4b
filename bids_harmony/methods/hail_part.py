"""What HAIL learned of one modality, and what it does with a scan of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bids_harmony.errors import ScanError
from bids_harmony.imaging.guided import bounded_change
from bids_harmony.methods.base import Training, Volume
from bids_harmony.methods.hail_training import (
    Preset,
    Scan,
    scans_of,
    train_phases,
)
from bids_harmony.methods.hail_volumes import Brain, draw_brain, redrawing_error
from bids_harmony.methods.held_out import held_out_subjects
from bids_harmony.methods.likeness import Likeness, Range, rank_cells
from bids_harmony.methods.tone import load_arrays, state_arrays
from bids_harmony.methods.training_files import (
    brains_png,
    curves_csv,
    run_facts,
    site_facts,
    training_png,
)
from bids_harmony.networks.hail import QUANTILES, HailNetwork
from bids_harmony.training.plan import Trained

LOG = logging.getLogger("bids_harmony")
_PAIRS_SCORED = 6
_LEAST_ERROR = (0.1, 0.4)  # of a redrawing above the held-out scans': doubtful, impossible


@dataclass(frozen=True)
class Drawing:
    """A scan, what the network drew of it, and what was made of that; (X, Y, Z) each.

    Attributes
    ----------
    drawn, redrawn
        In the wanted style, and in the scan's own.
    data
        The harmonized scan.
    at_bound
        Share of the brain's voxels whose change was cut at `MOST_CHANGE`.
    """

    drawn: Tensor
    redrawn: Tensor
    data: NDArray[np.float32]
    at_bound: float


@dataclass(frozen=True)
class Part:
    """Network, limits and wanted appearance of one modality.

    Attributes
    ----------
    network
        In eval mode.
    window, radius, noise
        As in the preset it was trained with.
    likeness
        Where the brighter tissue lies in the training brains.
    redrawing
        Expected values of `redrawing_error`.
    scores
        Held-out scores and facts of the training.
    wanted
        Mean style of the examples, (S,), None before there are any.
    examples
        Their names.
    """

    network: HailNetwork
    window: int
    radius: int
    noise: float
    likeness: Likeness
    redrawing: Range
    scores: Mapping[str, Any]
    wanted: Tensor | None = None
    examples: tuple[str, ...] = ()

    def to(self, device: str) -> None:
        """Move the network."""
        self.network.to(device)

    def draw(self, brain: Brain, own: Tensor, wanted: Tensor) -> Drawing:
        """Harmonize a brain whose style is `own` towards the style `wanted`, (S,)."""
        drawn, redrawn = draw_brain(self.network, brain, own, wanted, self.window)
        data, at_bound = changed(brain, drawn - redrawn, self.radius, self.noise)
        return Drawing(drawn, redrawn, data, at_bound)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Weights, likeness and wanted style."""
        found = {**self.likeness.arrays(), **state_arrays(self.network, "network")}
        if self.wanted is not None:
            found["wanted"] = self.wanted.numpy()
        return found

    def params(self) -> dict[str, Any]:
        """JSON-serialisable form of the rest."""
        return {
            "network": self.network.config(),
            "window": self.window,
            "radius": self.radius,
            "noise": self.noise,
            "redrawing": asdict(self.redrawing),
            "scores": dict(self.scores),
            "examples": list(self.examples),
        }

    @classmethod
    def from_state(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Part:
        """Rebuild from `arrays` and `params`; ScanError if they do not fit together."""
        network = HailNetwork.from_config(params["network"])
        load_arrays(network, arrays, "network")
        network.requires_grad_(False)
        torch.nn.Module.to(network, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        wanted = arrays.get("wanted")
        if wanted is not None and wanted.shape != (network.style_size,):
            raise ScanError("the stored appearance is not one of this hail network")
        return cls(
            network,
            int(params["window"]),
            int(params["radius"]),
            float(params["noise"]),
            Likeness.from_arrays(arrays),
            Range(**params["redrawing"]),
            params["scores"],
            None if wanted is None else torch.from_numpy(np.array(wanted, dtype=np.float32)),
            tuple(params["examples"]),
        )


def changed(
    brain: Brain, change: Tensor, radius: int, noise: float
) -> tuple[NDArray[np.float32], float]:
    """A brain with a drawn change, carried over so that its anatomy stays.

    In each neighbourhood the change is taken for a straight line of the scan's own intensity
    (`bounded_change`). It is the difference of two pictures that one decoder drew, so their blur
    is not taken for a change, and equal styles leave the scan exactly as it is.

    Returns
    -------
    data
        float32, >= 0, 0 outside the mask.
    at_bound
        Share of the brain's voxels whose change was cut at `MOST_CHANGE`.
    """
    scan, inside = brain[0].numpy(), brain[1].numpy()
    found, at_bound = bounded_change(scan, change.numpy(), inside, radius=radius, noise=noise)
    return np.where(inside, np.maximum(scan + found, 0), 0).astype(np.float32), at_bound


def distance(first: Tensor, second: Tensor) -> float:
    """Mean distance of the quantiles of two styles (S,), in units of the intensity scale."""
    return float((first[-QUANTILES:] - second[-QUANTILES:]).abs().mean())


def fit_part(
    volumes: Sequence[Volume], preset: Preset, seed: int, training: Training
) -> tuple[Part, dict[str, bytes]]:
    """Train everything for one modality.

    Returns
    -------
    part, files
        What was learned, without an appearance; training curves and pictures.

    Raises
    ------
    ScanError
        If a brain is unusable, or scans of fewer than two sites are left to learn from.
    """
    scans = scans_of(volumes)
    apart = held_out_subjects([(scan.site, scan.subject) for scan in scans])
    known = [scan for scan in scans if scan.subject not in apart]
    held_out = [scan for scan in scans if scan.subject in apart]
    network, styles, runs = train_phases(known, held_out, preset, seed, training)
    cells = {scan.volume: rank_cells(*scan.brain, scan.spacing)[0] for scan in scans}
    alike = Likeness.of(*([cells[scan.volume] for scan in group] for group in (known, held_out)))
    redrawing = _error_range(network, preset.window, held_out, known, styles)
    part = Part(network, preset.window, preset.radius, preset.noise, alike, redrawing, {})
    pairs = _scored_pairs(held_out, known)
    drawings = [
        part.draw(scan.brain, styles[scan.volume], styles[example.volume])
        for scan, example in pairs
    ]
    scores = {**_pair_scores(pairs, drawings, styles), **_facts(scans, apart, part, runs)}
    network.cpu()
    files = {
        "curves.csv": curves_csv(runs),
        "training.png": training_png(runs),
        "transfer.png": _picture(*pairs[0], drawings[0]),
    }
    return replace(part, scores=scores), files


def _scored_pairs(held_out: Sequence[Scan], known: Sequence[Scan]) -> list[tuple[Scan, Scan]]:
    """Held-out scans, each with the first training scan of every other site; a few of them."""
    found = []
    for scan in held_out:
        firsts: dict[str, Scan] = {}
        for other in known:
            if other.site != scan.site:
                firsts.setdefault(other.site, other)
        found += [(scan, firsts[site]) for site in sorted(firsts)]
    step = max(len(found) // _PAIRS_SCORED, 1)
    return found[::step][:_PAIRS_SCORED]


def _error_range(
    network: HailNetwork,
    window: int,
    held_out: Sequence[Scan],
    known: Sequence[Scan],
    styles: Mapping[str, Tensor],
) -> Range:
    """Of the redrawing error; of the training scans, as many as are held out."""
    groups = []
    for group in (held_out, known[:: max(len(known) // len(held_out), 1)]):
        errors = []
        for scan in group:
            own = styles[scan.volume]
            _, redrawn = draw_brain(network, scan.brain, own, own, window)
            errors.append(redrawing_error(scan.brain[0], redrawn, scan.brain[1]))
        groups.append(errors)
    return Range.of(groups[0], groups[1], _LEAST_ERROR)


def _pair_scores(
    pairs: Sequence[tuple[Scan, Scan]], drawings: Sequence[Drawing], styles: Mapping[str, Tensor]
) -> dict[str, Any]:
    """How near held-out scans come to one scan of another site."""
    rows = []
    for (scan, example), drawing in zip(pairs, drawings, strict=True):
        goal = styles[example.volume]
        before = distance(styles[scan.volume], goal)
        after = distance(intensities(drawing.data, scan.brain[1]), goal)
        rows.append((before, after))
        LOG.info("hail: %s towards %s: intensity distance %.4f, then %.4f",
                 scan.volume, example.volume, before, after)  # fmt: skip
    return {
        "held_out_distance_before": [round(before, 4) for before, _ in rows],
        "held_out_distance_after": [round(after, 4) for _, after in rows],
        "held_out_distance_left": round(
            sum(after for _, after in rows) / max(sum(before for before, _ in rows), 1e-6), 4
        ),
    }


def intensities(data: NDArray[np.float32], mask: Tensor) -> Tensor:
    """Quantiles of a brain, (17,), as at the end of a style."""
    at = (np.arange(QUANTILES) + 0.5) / QUANTILES
    return torch.from_numpy(np.quantile(data[mask.numpy()], at)).float()


def _facts(
    scans: Sequence[Scan],
    apart: set[str],
    part: Part,
    runs: Mapping[str, Trained],
) -> dict[str, Any]:
    """What the bundle says of a training; no times, so that equal trainings give equal bundles."""
    return {
        **site_facts(scans, [scan for scan in scans if scan.subject in apart]),
        "held_out_redrawing_error": round(part.redrawing.mean, 4),
        "held_out_unlikeness": round(part.likeness.unlikeness.mean, 4),
        **{name: run_facts(run) for name, run in runs.items()},
    }


def _picture(scan: Scan, example: Scan, drawing: Drawing) -> bytes:
    return brains_png({
        f"held-out scan of {scan.site}": scan.brain[0].numpy(),
        f"as the decoder draws it for {example.site}": drawing.drawn.numpy(),
        "harmonized": drawing.data,
        f"example of {example.site}": example.brain[0].numpy(),
    })  # fmt: skip
