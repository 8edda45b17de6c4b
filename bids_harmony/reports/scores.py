"""Did harmonization help, and did the anatomy stay? The rows and warnings of one scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bids_harmony.imaging.quantiles import mid_quantiles
from bids_harmony.metrics.lesions import lesion_contrast_and_volume
from bids_harmony.metrics.similarity import edge_correlation, jsd, rank_agreement, wasserstein
from bids_harmony.reports.inputs import Metric

_SAMPLES = 50_000
_LEAST_RANK, _LEAST_EDGES, _MONOTONE = 0.95, 0.9, 0.9999
_TOLERANCE = 1e-3  # Wasserstein distance, scaled intensity
_LESION_LOSS = 0.2  # of contrast or volume


def score_change(
    before: NDArray[Any],
    after: NDArray[Any],
    mask: NDArray[np.bool_],
    reference: Sequence[float] | None,
) -> tuple[list[Metric], list[str]]:
    """Distances to the reference domain's histogram, and agreement of anatomy.

    Parameters
    ----------
    before, after
        Scaled input and harmonized scan, shape (X, Y, Z).
    mask
        Brain mask, same shape.
    reference
        In-brain quantiles of the reference domain at evenly spaced mid-probabilities; None or
        empty when the bundle keeps none.

    Returns
    -------
    metrics, warnings
        Rows for the report and sentences for the user.
    """
    rows: list[Metric] = []
    warnings: list[str] = []
    if reference is not None and len(reference):
        rows += _distances(before, after, mask, np.asarray(reference, dtype=np.float64))
        if rows[0].after > rows[0].before + _TOLERANCE:  # type: ignore[operator]
            warnings.append(
                "the brain's histogram is farther from the reference domain's than before: "
                "harmonization did not help this scan"
            )
    rank = rank_agreement(before, after, mask)
    edges = edge_correlation(before, after, mask)
    rows += [
        Metric("rank agreement", None, rank, "", "1: the order of intensities is kept", "higher"),
        Metric("edge correlation", None, edges, "", "1: edges stay where they are", "higher"),
    ]
    # a monotone map changes the strength of edges, but cannot move them
    if not rank >= _LEAST_RANK or (not edges >= _LEAST_EDGES and rank < _MONOTONE):
        warnings.append(
            f"the anatomy may have changed (rank agreement {rank:.3f}, edge correlation "
            f"{edges:.3f}); look at the difference map"
        )
    return rows, warnings


def score_lesions(
    before: NDArray[Any],
    after: NDArray[Any],
    mask: NDArray[np.bool_],
    lesions: NDArray[np.bool_],
    spacing: Sequence[float],
) -> tuple[list[Metric], list[str]]:
    """Did marked lesions survive?

    Parameters
    ----------
    before, after, mask
        As for `score_change`.
    lesions
        Marked lesions, same shape.
    spacing
        Voxel size in mm.

    Returns
    -------
    metrics, warnings
        Rows for the report, none without a lesion in the brain, and sentences for the user.
    """
    if not (lesions & mask).any():
        return [], ["the lesion mask marks nothing in the brain; check that it is of this scan"]
    found = lesion_contrast_and_volume((before, after), lesions, mask, spacing)
    contrasts, volumes = zip(*found, strict=True)
    rows = [
        Metric("lesion contrast", contrasts[0], contrasts[1], "of the brain's range",
               "lesions minus what lies around them; it should stay"),
        Metric("lesion volume", volumes[0], volumes[1], "ml",
               "what looks like lesion in and next to marked lesions; it should stay"),
    ]  # fmt: skip
    warnings = [
        f"lesions may have been changed: their {name} was {values[0]:.3g} {unit} and is "
        f"{values[1]:.3g}; look at them before you measure lesions"
        for name, values, unit in (
            ("contrast", contrasts, "of the brain's range"), ("volume", volumes, "ml"),
        )
        if not abs(values[1] - values[0]) <= _LESION_LOSS * abs(values[0])
    ]  # fmt: skip
    return rows, warnings


def _distances(
    before: NDArray[Any],
    after: NDArray[Any],
    mask: NDArray[np.bool_],
    reference: NDArray[np.float64],
) -> list[Metric]:
    probability = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
    known = (np.arange(reference.size) + 0.5) / reference.size
    # not np.quantile, which takes seconds for a third as many quantiles as values
    brains = [mid_quantiles(image[mask], probability) for image in (before, after)]
    samples = [
        values.reshape(-1, 1, 1) for values in (*brains, np.interp(probability, known, reference))
    ]
    everywhere = np.ones(samples[0].shape, dtype=bool)
    meaning = "0: the brain's histogram is the reference domain's"
    return [
        Metric(name, score(samples[0]), score(samples[1]), unit, meaning, "lower")
        for name, unit, score in (
            (
                "Wasserstein distance to the reference",
                "scaled intensity",
                lambda image: wasserstein(image, samples[2], everywhere),
            ),
            (
                "Jensen-Shannon divergence from the reference",
                "bit",
                lambda image: jsd(image, samples[2], everywhere),
            ),
        )
    ]
