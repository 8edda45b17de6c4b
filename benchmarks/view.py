"""What a trial made of a table's scans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bids_harmony.bids.scan import Scan

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class View:
    """Scans of a trial on their raw grids.

    Attributes
    ----------
    image
        On the common intensity scale (brain about 0..1).
    dseg
        Tissue labels that came with the harmonization.
    bundle
        Model that made them; None for untouched scans.
    options
        Values of the method's own options that they were made with.
    """

    image: Callable[[Scan], FloatArray]
    dseg: Callable[[Scan], FloatArray] | None = None
    bundle: Path | None = None
    options: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, scan: Scan) -> FloatArray:
        """Harmonized, or untouched, scan."""
        return self.image(scan)
