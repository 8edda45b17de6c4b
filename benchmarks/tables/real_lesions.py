"""Do lesions survive on a real scan? One patient with multiple sclerosis, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import nibabel as nb
import numpy as np
from nibabel.processing import resample_from_to
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import median_abs_deviation

from benchmarks.data import copy_participant, need, write_description, write_participants
from benchmarks.harness import Case, Cohort, Column, Prepared, Table
from benchmarks.scoring import ratio, segmented
from benchmarks.tables.real_sites import HOME, TRIALS, RealSites
from benchmarks.trials import scans_of
from benchmarks.view import View
from bids_harmony.bids.scan import Scan
from bids_harmony.imaging.tissues import TISSUES
from bids_harmony.metrics.lesions import lesion_contrast_and_volume

_PERSON, _SITE = "ljub12", "ljubljana"
_CLOSED_MM, _DEPTH_MM, _SMOOTH_MM = 6.0, 2.0, 12.0
_BRIGHT = 4.0  # deviations above white matter
_LEAST_ML = 0.01


class RealLesions(Table):
    """Both sessions of the patient, harmonized to one of the real sites."""

    name: ClassVar[str] = "real-lesions"
    title: ClassVar[str] = "Lesions (a real patient)"
    about: ClassVar[str] = (
        f"T1w (3 mm slices, two sessions) of one patient with multiple sclerosis of {_SITE}, a "
        f"site that no training has seen, harmonized to {HOME} with the models of "
        f"`{RealSites.name}`. There is no mask of the lesions by hand and no truth in the other "
        "scanner's contrast: lesions are what is brighter than its surroundings in the FLAIR of "
        f"the session ({_BRIGHT:g} robust deviations; white matter of the T1w by Atropos, closed "
        f"by {_CLOSED_MM:g} mm, and {_DEPTH_MM:g} mm deep), so that most lesions below the cortex "
        "are missed. In the first session's T1w the largest are bright, as with a contrast agent. "
        "Contrast and volume as in `lesions`, compared with the input's (1: the same)."
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("contrast_before", "contrast of the input", "", 3, shown=False),
        Column("contrast", "contrast", "", 3, shown=False),
        Column("contrast_to_input", "contrast / input's", "", 2, "one"),
        Column("volume_to_input", "volume / input's", "", 2, "one"),
        Column("marked", "marked in FLAIR", "mL", 2, shown=False),
    )
    trials: ClassVar[tuple[str, ...]] = (
        "none", "histogram-matching", *(trial.label for trial in TRIALS),
    )  # fmt: skip
    judge: ClassVar[str] = ""  # without a truth the input would be best
    models_of: ClassVar[str | None] = RealSites.name

    def prepare(self, data: Path, folder: Path) -> Cohort:
        """Link the patient."""
        root = folder / "bids"
        if not (root / "participants.tsv").is_file():
            write_description(root, self.title)
            copy_participant(need(data / f"sub-{_PERSON}"), root)
            write_participants(root, {_PERSON: _SITE})
        cases = [
            Case(f"{_SITE} to {HOME}", s.stem, s.subject, (s,), {}, HOME)
            for s in scans_of(root, [_PERSON])
        ]
        return Cohort(root, HOME, (), tuple(cases))

    def score(self, case: Case, result: View, prep: Prepared) -> dict[str, float]:
        """Lesions of the result against those of the input."""
        (scan,) = case.scans
        image, affine = prep.corrected(scan)
        mask = prep.mask(scan)
        spacing = [float(z) for z in nb.affines.voxel_sizes(affine)]
        white = segmented({"image": image}, affine, mask, prep.labels)["image"] == TISSUES["WM"]
        marked = bright_in_white_matter(_flair(scan, mask.shape, affine), white, mask, spacing)
        (before, size), (after, left) = lesion_contrast_and_volume(
            (prep.scaled(scan), result(scan)), marked, mask, spacing
        )
        return {
            "contrast_before": before,
            "contrast": after,
            "contrast_to_input": ratio(after, before),
            "volume_to_input": ratio(left, size),
            "marked": float(marked.sum() * np.prod(spacing) / 1000),
        }


def _flair(scan: Scan, shape: Sequence[int], affine: NDArray[Any]) -> NDArray[np.float32]:
    """FLAIR of a scan's session on the scan's grid."""
    path = need(Path(str(scan.path).replace(f"_{scan.suffix}.", "_FLAIR.")))
    found = resample_from_to(nb.load(path), (tuple(shape), affine), order=1)
    return np.asarray(found.dataobj, dtype=np.float32)


def bright_in_white_matter(
    flair: NDArray[Any],
    white: NDArray[np.bool_],
    mask: NDArray[np.bool_],
    spacing: Sequence[float],
) -> NDArray[np.bool_]:
    """What is much brighter in FLAIR than the white matter around it.

    Parameters
    ----------
    flair
        Shape (X, Y, Z), any scale; a smooth bias field does no harm.
    white, mask
        White matter, holes where its lesions are, and brain.
    spacing
        Voxel size in mm.
    """

    def depth(inside: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Distance to the nearest voxel that is not inside, mm."""
        return np.asarray(ndimage.distance_transform_edt(inside, sampling=tuple(spacing)))

    closed = depth(depth(~white) <= _CLOSED_MM) > _CLOSED_MM
    deep = depth(mask & closed) > _DEPTH_MM
    wide = [_SMOOTH_MM / z for z in spacing]
    weight = ndimage.gaussian_filter(white.astype(float), wide)
    usual = ndimage.gaussian_filter(flair * white, wide) / np.maximum(weight, 1e-3)
    relative = flair / np.maximum(usual, np.finfo(np.float32).tiny)
    values = relative[white]
    spread = float(median_abs_deviation(values, scale="normal"))
    limit = float(np.median(values)) + _BRIGHT * spread
    parts, count = ndimage.label((relative > limit) & deep)
    sizes = ndimage.sum_labels(np.ones(parts.shape), parts, np.arange(count + 1))
    large = sizes * float(np.prod(spacing)) / 1000 >= _LEAST_ML
    large[0] = False
    return np.asarray(large[parts])
