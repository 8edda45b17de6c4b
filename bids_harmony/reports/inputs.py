"""Everything a report says about one scan, as plain values and arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bids_harmony.errors import ScanError

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]

GoodDirection = Literal["lower", "higher", "none"]
Status = Literal["harmonized", "refused", "failed"]


@dataclass(frozen=True)
class Step:
    """One step of the scan's path.

    Attributes
    ----------
    name
        Step, e.g. ``brain mask``.
    action
        What was done, in words.
    tool
        With what (program and version, or method).
    seconds
        Duration; None when nothing was computed.
    source
        ``computed``, ``reused: fmriprep``, ...
    """

    name: str
    action: str
    tool: str = ""
    seconds: float | None = None
    source: str = "computed"


@dataclass(frozen=True)
class Metric:
    """One number before and after harmonization.

    Attributes
    ----------
    name, unit, meaning
        Words for the table; `meaning` is one short sentence.
    before, after
        Values; None or non-finite when not defined.
    good
        Direction that is an improvement: ``lower``, ``higher``, or ``none`` when the number only
        describes.
    """

    name: str
    before: float | None
    after: float | None
    unit: str = ""
    meaning: str = ""
    good: GoodDirection = "none"


@dataclass(frozen=True)
class Registration:
    """The scan on the template's grid.

    Attributes
    ----------
    template, scan
        Shape (X, Y, Z), the same grid, any intensity units (each has its own grey window).
    affine
        Shape (4, 4), voxels to mm (RAS+).
    template_mask
        Brain mask of the template, shape (X, Y, Z); without it the outline is found by Otsu's
        threshold.
    name
        Template name, e.g. ``MNI152NLin2009aSym``.
    """

    template: FloatArray
    scan: FloatArray
    affine: FloatArray
    template_mask: BoolArray | None = None
    name: str = ""

    def __post_init__(self) -> None:
        """Refuse volumes that do not share one grid."""
        volumes: dict[str, NDArray[Any]] = {"template": self.template, "scan": self.scan}
        if self.template_mask is not None:
            volumes["template_mask"] = self.template_mask
        _check_grid(f"registration to {self.name}", volumes, self.affine)


@dataclass(frozen=True)
class Histogram:
    """In-brain intensities on the common scale.

    Attributes
    ----------
    before, after
        1-D: all in-brain values, or their quantiles at evenly spaced probabilities.
    reference
        1-D: quantiles of the reference domain at evenly spaced probabilities; None when the model
        keeps none.
    """

    before: FloatArray
    after: FloatArray
    reference: FloatArray | None = None

    def __post_init__(self) -> None:
        """Refuse empty or non-finite samples."""
        for name in ("before", "after", "reference"):
            values = getattr(self, name)
            if values is None:
                continue
            if np.ndim(values) != 1 or np.size(values) < 2 or not np.isfinite(values).all():
                raise ScanError(
                    f"report: histogram {name} must be a 1-D array of at least two finite values"
                )


@dataclass(frozen=True)
class ScanReport:
    """One harmonized scan.

    Attributes
    ----------
    stem
        Input file name without extension.
    desc
        Value of the ``desc`` entity of the harmonized scan, e.g. ``harmonizedNyul``.
    modality
        ``T1w``, ``T2w`` or ``FLAIR``.
    input_name
        Path of the raw scan relative to the data set.
    method, method_title
        Name and human title of the method.
    model_name, model_hash
        Bundle and its checksum.
    reference
        Reference domain, in words (site and modality).
    site, site_source
        Site of the scan and where it was found.
    affine
        Shape (4, 4), voxels to mm (RAS+), of `before`, `after`, `mask`, `bias`; any orientation.
    before, after
        Shape (X, Y, Z), on one common intensity scale (`units`).
    mask
        Brain mask, shape (X, Y, Z).
    units
        Name of the common intensity scale, shown at every colour bar.
    window
        Grey window (black, white) common to before and after; None: `figures.common_window`.
    bias
        Multiplicative bias field that was divided out, shape (X, Y, Z), > 0 in the mask.
    tissues
        Tissue of each voxel (0 background, 1 CSF, 2 grey matter, 3 white matter), shape
        (X, Y, Z), from methods that segment; None for others.
    tissue_volumes
        mL of each tissue, by name.
    registration, histogram
        Material of these two figures; None leaves the figure out and says so.
    methods
        Boilerplate: paragraphs apart by blank lines, ``# heading`` and ``- item`` lines.

    Raises
    ------
    ScanError
        If shapes differ, the mask is empty or a value is not finite.
    """

    stem: str
    desc: str
    modality: str
    input_name: str
    method: str
    method_title: str
    model_name: str
    model_hash: str
    reference: str
    site: str
    site_source: str
    affine: FloatArray
    before: FloatArray
    after: FloatArray
    mask: BoolArray
    units: str = "scaled intensity"
    window: tuple[float, float] | None = None
    bias: FloatArray | None = None
    tissues: NDArray[np.uint8] | None = None
    tissue_volumes: Mapping[str, float] = field(default_factory=dict)
    registration: Registration | None = None
    histogram: Histogram | None = None
    steps: tuple[Step, ...] = ()
    metrics: tuple[Metric, ...] = ()
    warnings: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    methods: str = ""
    citations: tuple[str, ...] = ()
    sidecar: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn truthfully."""
        volumes: dict[str, NDArray[Any]] = {
            "before": self.before,
            "after": self.after,
            "mask": self.mask,
        }
        if self.bias is not None:
            volumes["bias"] = self.bias
        if self.tissues is not None:
            volumes["tissues"] = self.tissues
        _check_grid(self.stem, volumes, self.affine)
        if not np.any(self.mask):
            raise ScanError(f"{self.stem}: the brain mask is empty, no report can be drawn")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ScanError(f"{self.stem}: grey window {self.window} has no width")


def _check_grid(name: str, volumes: Mapping[str, NDArray[Any]], affine: FloatArray) -> None:
    """Raise ScanError unless volumes are 3-D, finite, of one shape, and the affine is usable."""
    shapes = {key: np.shape(value) for key, value in volumes.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 3:
        raise ScanError(f"{name}: report volumes must be 3-D and share one grid, got {shapes}")
    for key, value in volumes.items():
        if not np.isfinite(value).all():
            raise ScanError(f"{name}: {key} has values that are not finite")
    if np.shape(affine) != (4, 4) or not np.isfinite(affine).all():
        raise ScanError(f"{name}: the affine must be 4 x 4 and finite")
    if np.linalg.matrix_rank(np.asarray(affine)[:3, :3]) < 3:
        raise ScanError(f"{name}: the affine is singular")
