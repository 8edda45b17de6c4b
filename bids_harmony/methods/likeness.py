"""Whether a scan is a brain like those of the training: coarse likeness, and expected ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from bids_harmony.errors import ScanError
from bids_harmony.imaging.layout import Coarse, Layout, side_words
from bids_harmony.imaging.quantiles import Float64Array

_LEAST_SHARE = 0.5  # of a cell that must be brain for its brightness to count
#: Above the training brains' mean by so many of their deviations a scan is flagged, or refused.
_TIMES = (4.0, 8.0)
_UNLIKE = (0.2, 0.5)  # but at least by so much


@dataclass(frozen=True)
class Range:
    """Which values of a measure are to be expected; larger ones are doubtful, then impossible."""

    mean: float
    flag: float
    refuse: float

    @classmethod
    def of(
        cls, held_out: Sequence[float], trained: Sequence[float], least: tuple[float, float]
    ) -> Range:
        """Around the mean of held-out scans, by the deviation of all.

        Parameters
        ----------
        held_out, trained
            Values of scans of both kinds.
        least
            How far above the mean `flag` and `refuse` lie at least.
        """
        mean, spread = float(np.mean(held_out)), float(np.std([*held_out, *trained]))
        flag, refuse = (mean + max(t * spread, low) for t, low in zip(_TIMES, least, strict=True))
        return cls(mean, flag, refuse)


def rank_cells(
    image: Tensor, mask: Tensor, spacing: Sequence[float]
) -> tuple[Float64Array, Coarse]:
    """Where the brighter half of a brain lies, coarsely: `Coarse.cells` of its ranks (0..1).

    Ranks, since sites differ in contrast but seldom in what is brighter than what.
    """
    inside = mask.numpy()
    ranks = np.zeros(inside.shape, dtype=np.float32)
    values = image.numpy()[inside]
    ranks[inside] = (stats.rankdata(values) / values.size).astype(np.float32)
    coarse = Coarse(ranks, inside, spacing)
    return coarse.cells(), coarse


def likeness(cells: Float64Array, mean: NDArray[Any]) -> float:
    """Pearson's r, -1..1, of two brains' `rank_cells` where both are mostly brain.

    -1 if they hardly overlap.
    """
    both = (cells[0] > _LEAST_SHARE) & (mean[0] > _LEAST_SHARE)
    if both.sum() < 8:
        return -1.0
    a, b = cells[1][both] / cells[0][both], mean[1][both] / mean[0][both]
    if np.ptp(a) < 1e-9 or np.ptp(b) < 1e-9:
        return -1.0
    return float(np.corrcoef(a, b)[0, 1])


@dataclass(frozen=True)
class Likeness:
    """Where bright and dark tissue lie in the training brains of one modality.

    Attributes
    ----------
    layout
        Of their `rank_cells`.
    unlikeness
        Expected values of 1 - `likeness` to it.
    """

    layout: Layout
    unlikeness: Range

    @classmethod
    def of(cls, known: Sequence[Float64Array], held_out: Sequence[Float64Array]) -> Likeness:
        """From the `rank_cells` of training and held-out brains."""
        layout = Layout.of(known)
        groups = [[1 - likeness(c, layout.mean) for c in group] for group in (held_out, known)]
        return cls(layout, Range.of(groups[0], groups[1], _UNLIKE))

    def admit(
        self, image: Tensor, mask: Tensor, spacing: Sequence[float], *, name: str, modality: str
    ) -> tuple[float, list[str]]:
        """How unlike the training's a brain (R, A, S) is, and a sentence if that is doubtful.

        Raises
        ------
        ScanError
            If the brain lies turned, or is none of the modality.
        """
        cells, coarse = rank_cells(image, mask, spacing)
        axes, _ = self.layout.turned(coarse)
        if axes != "RAS":
            raise ScanError(
                f"{name}: the brain lies turned: what the header calls right, anterior, superior "
                f"seems to be {side_words(axes)}; correct the header's orientation"
            )
        found, known = 1 - likeness(cells, self.layout.mean), self.unlikeness
        if not found <= known.refuse:
            raise ScanError(
                f"{name}: bright and dark tissue lie elsewhere than in {modality} brains "
                f"(unlikeness {found:.2f}, refused above {known.refuse:.2f}); check modality, "
                "mask and header"
            )
        if found <= known.flag:
            return found, []
        return found, [
            "Bright and dark tissue lie elsewhere than in the training scans (unlikeness "
            f"{found:.2f}, held-out scans have {known.mean:.2f}). Look at the result before you "
            "use it."
        ]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Inverse of `from_arrays`."""
        known = self.unlikeness
        return {
            **self.layout.arrays(),
            "unlikeness": np.array([known.mean, known.flag, known.refuse]),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Likeness:
        """From `arrays`."""
        mean, flag, refuse = (float(v) for v in arrays["unlikeness"])
        return cls(Layout.from_arrays(arrays), Range(mean, flag, refuse))
