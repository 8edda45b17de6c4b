"""Do lesions survive? White-matter hyperintensities of the phantom, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import nibabel as nb

from benchmarks.goals import Goal
from benchmarks.harness import Case, Cohort, Column, Prepared, Table, read
from benchmarks.scoring import ratio
from benchmarks.tables.by_example import FAR, NEAR, ByExample, way
from benchmarks.tables.travelling import RESOLUTION, truth_file
from benchmarks.trials import scans_of
from benchmarks.view import View
from bids_harmony.metrics.lesions import lesion_contrast_and_volume
from bids_harmony.phantom.dataset import write_phantom
from bids_harmony.phantom.sites import REFERENCE

_PEOPLE, _FIRST = 4, 41


class Lesions(Table):
    """Phantom people with lesions at two sites, harmonized to the reference domain."""

    name: ClassVar[str] = "lesions"
    title: ClassVar[str] = "Lesions (phantom)"
    about: ClassVar[str] = (
        f"T1w of {_PEOPLE} simulated people with white-matter hyperintensities at {RESOLUTION:g} "
        f"mm, at {NEAR} and {FAR}, harmonized to {REFERENCE} with the models of "
        f"`{ByExample.name}`, which have seen no lesion. Contrast: median of the lesions minus "
        "median of the brain around them, over the difference of the brain's 95th and 5th "
        "percentiles; volume: what looks like lesion in and up to 2 mm around the true lesions. "
        "Both are compared with the same person's truth in the reference contrast (1: the same)."
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("contrast_to_truth", "contrast / truth's", "", 2, "one"),
        Column("contrast_to_input", "contrast / input's", "", 2, "one"),
        Column("volume_to_truth", "volume / truth's", "", 2, "one"),
        Column("volume_to_input", "volume / input's", "", 2, "one"),
        Column("contrast", "contrast", "", 3, shown=False),
        Column("volume", "volume", "mL", 2, shown=False),
        Column("off", "contrast off the truth's", "%", 1, "lower"),
    )
    trials: ClassVar[tuple[str, ...]] = ByExample.trials
    judge: ClassVar[str] = "off"
    goals: ClassVar[tuple[Goal, ...]] = (
        Goal("contrast at most 10 % off the truth's", "off", 10.0, floor=False),
    )
    models_of: ClassVar[str | None] = ByExample.name

    def prepare(self, data: Path, folder: Path) -> Cohort:
        """Simulate."""
        root = folder / "bids"
        if not (root / "participants.tsv").is_file():
            write_phantom(root, subjects=_PEOPLE, first=_FIRST, sites=(NEAR, FAR),
                          resolution=RESOLUTION, lesions=True)  # fmt: skip
        people = [f"{k:02d}" for k in range(_FIRST, _FIRST + _PEOPLE)]
        cases = [
            Case(way(s.site, REFERENCE), s.stem, s.subject, (s,), {}, REFERENCE)
            for s in scans_of(root, people)
        ]
        return Cohort(root, REFERENCE, (), tuple(sorted(cases, key=lambda c: c.condition)))

    def score(self, case: Case, result: View, prep: Prepared) -> dict[str, float]:
        """Lesions of the result against those of truth and input."""
        root, (scan,) = prep.cohort.bids_dir, case.scans
        marked, affine = read(truth_file(root, scan, "label-L_mask"))
        mask = read(truth_file(root, scan, "desc-brain_mask"))[0] > 0
        truth = read(truth_file(root, scan, f"desc-truth{REFERENCE}_T1w"))[0]
        spacing = [float(z) for z in nb.affines.voxel_sizes(affine)]
        found = lesion_contrast_and_volume(
            (result(scan), prep.scaled(scan), truth), marked > 0, mask & prep.mask(scan), spacing
        )
        (contrast, volume), (first, size), (wanted, true_size) = found
        return {
            "contrast": contrast,
            "volume": volume,
            "contrast_to_truth": ratio(contrast, wanted),
            "contrast_to_input": ratio(contrast, first),
            "volume_to_truth": ratio(volume, true_size),
            "volume_to_input": ratio(volume, size),
            "off": 100 * abs(ratio(contrast, wanted) - 1),
        }
