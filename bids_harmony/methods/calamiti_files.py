"""Table and picture of the contrasts, theta, that a training found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from bids_harmony.methods.training_files import figure_of, png_of

_MARKERS = "os^DvP*X"
_LEAST_CLUSTER = 3
_CONTOUR = 2.0  # standard deviations


@dataclass(frozen=True)
class ThetaRow:
    """Theta of one scan, and which scan it is."""

    name: str
    site: str
    subject: str
    session: str
    modality: str
    theta1: float
    theta2: float


def theta_tsv(rows: Sequence[ThetaRow]) -> bytes:
    """Tab-separated, one scan a line, with a head; ``n/a`` for empty labels."""
    lines = ["\t".join(f.name for f in fields(ThetaRow))]
    for row in rows:
        values = astuple(row)
        lines.append(
            "\t".join([*(v or "n/a" for v in values[:5]), *(f"{v:.6f}" for v in values[5:])])
        )
    return ("\n".join(lines) + "\n").encode()


def contour(points: NDArray[np.float64], count: int = 60) -> NDArray[np.float64]:
    """Ellipse at two standard deviations of some points (N, 2), as (count, 2)."""
    values, vectors = np.linalg.eigh(np.cov(points.T))
    angle = np.linspace(0, 2 * np.pi, count)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    ellipse: NDArray[np.float64] = circle * (_CONTOUR * np.sqrt(np.maximum(values, 0)))
    return points.mean(0) + ellipse @ vectors.T


def theta_png(rows: Sequence[ThetaRow]) -> bytes:
    """Scatter of theta: a colour for each site with its contour, a marker for each modality.

    As the paper's figure 3; contours need three scans.
    """
    sites, modalities = (
        sorted({r.site for r in rows}), sorted({r.modality for r in rows})
    )  # fmt: skip
    figure = figure_of(6, 4.5)
    axis = figure.subplots()
    for index, site in enumerate(sites):
        for kind, modality in enumerate(modalities):
            points = np.array([
                (r.theta1, r.theta2) for r in rows if (r.site, r.modality) == (site, modality)
            ])  # fmt: skip
            if not len(points):
                continue
            colour = f"C{index % 10}"
            marker = _MARKERS[kind % len(_MARKERS)]
            axis.scatter(
                points[:, 0],
                points[:, 1],
                color=colour,
                marker=marker,
                s=16,
                label=f"{site} {modality}",
            )
            if len(points) >= _LEAST_CLUSTER:
                axis.plot(*contour(points).T, color=colour, linewidth=1)
    axis.set(xlabel="theta 1", ylabel="theta 2")
    axis.legend(fontsize=7)
    return png_of(figure)
