"""Tables 1 and 3 of BlindHarmony: simulated domains, transformed back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import nibabel as nb
import numpy as np
from numpy.typing import NDArray

from benchmarks.data import copy_participant, need, write_description, write_participants
from benchmarks.goals import Goal
from benchmarks.harness import Case, Cohort, Column, Prepared, Table
from benchmarks.scoring import anatomy, jumps, similarity, whole_field
from benchmarks.trials import Trial, scans_of
from benchmarks.view import View
from bids_harmony.bids.write import atomic_write_text, save_nifti

SITE = "novosibirsk"
TRAINING = tuple(f"nov{k}" for k in range(52, 61))
TESTED = ("nov61", "nov62", "nov63")
#: Of the training, who are at the learned comparators' disposal as they are and transformed.
TRAVELLERS = TRAINING[:6]
#: Of the brain; what becomes 1. The maximum is a vessel three times as bright as white matter.
TOP_PERCENT = 99.9
IDENTITY = "untouched"

Transformation = Callable[[NDArray[Any]], NDArray[Any]]


#: Comparators that learn one transformation, as in the paper, and are tried on all.
TRIALS = tuple(
    Trial(f"{method}-{way}", method, ("--preset", "cpu"), neural=True, sites=(SITE, way),
          travellers=True)
    for method in ("unet", "cyclegan") for way in ("exp", "log", "gamma07")
)  # fmt: skip


def transformations() -> dict[str, Transformation]:
    """Maps of [0, 1] onto itself, increasing and defined above 1 too (BlindHarmony, 4.3)."""
    return {
        "exp": lambda x: np.expm1(x) / np.expm1(1.0),
        "log": lambda x: np.log1p(x) / np.log(2.0),
        "gamma07": lambda x: x**0.7,
        "gamma15": lambda x: x**1.5,
    }


def transform(path: Path, change: Transformation, target: Path) -> None:
    """Write a skull-stripped scan after `change`, in its old unit, zeros kept."""
    image = nb.load(path)
    data = np.asarray(image.dataobj, dtype=np.float64)  # type: ignore[attr-defined]
    top = np.percentile(data[data > 0], TOP_PERCENT)
    changed = change(np.maximum(data, 0) / top) * top
    save_nifti(changed.astype(np.float32), image.affine, target)  # type: ignore[attr-defined]


class BlindHarmony(Table):
    """Exponential, logarithm and gamma of real scans of the reference domain."""

    name: ClassVar[str] = "blindharmony-1-3"
    title: ClassVar[str] = "Simulated domains (BlindHarmony, tables 1 and 3)"
    about: ClassVar[str] = (
        "Real, skull-stripped T1w scans of one scanner (OpenNeuro ds002748): trained on 9 "
        f"({TRAINING[0]}..{TRAINING[-1]}), tested on 3 others ({', '.join(TESTED)}), each as it "
        "is and after exp (e^x-1)/(e-1), log ln(1+x)/ln 2, and gamma .7 and 1.5. x is the scan "
        f"over the brain's {TOP_PERCENT}th percentile (by the maximum, a bright vessel, the brain "
        "would end at .37, where exp and log are nearly straight). A transformed scan is a "
        "participant of its own at a site of its own and goes through the whole pipeline, N4 "
        "included. Truth: the untouched scan after N4. Both are on the common scale, the result "
        "by the reference domain's map. Brain: in the mask, in three dimensions. Field: mean "
        "over axial slices in the middle 60 mm, 173 x 211 mm, zero background included, in the "
        "manner of the paper, whose figures (OASIS-3, other scans, 1.2 mm, slices scaled one by "
        "one) stand beside; at gamma 1.5 its better one (beta1 500; with 1000 it is 25.8 dB). "
        "Slice jumps: mean absolute difference of neighbouring slices' means, the largest ratio "
        "of the three axes. The paired U-Net and CycleGAN learn one transformation back, "
        f"from {len(TRAVELLERS)} training subjects as they are and transformed (`unet-exp`: from "
        "exp), and are tried on all."
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("psnr", "PSNR, brain", "dB"),
        Column("ssim", "SSIM, brain", digits=3),
        Column("field_psnr", "PSNR, field", "dB"),
        Column("field_ssim", "SSIM, field", digits=3),
        Column("slice_to_truth", "slice jumps / truth's", digits=2, better="one"),
        Column("rank", "rank agreement", digits=4),
        Column("edges", "edge correlation", digits=4, shown=False),
        Column("slice_x", "slice jumps x", digits=4, better="lower", shown=False),
        Column("slice_y", "slice jumps y", digits=4, better="lower", shown=False),
        Column("slice_z", "slice jumps z", digits=4, better="lower", shown=False),
        Column("slice_to_input", "slice jumps / input's", better="lower"),
    )
    trials: ClassVar[tuple[str, ...]] = (
        "none", "histogram-matching", "ssimh", "nyul", "harmonizing-flows", "blindharmony",
        *(trial.label for trial in TRIALS),
    )  # fmt: skip
    controls: ClassVar[tuple[str, ...]] = (IDENTITY,)
    goals: ClassVar[tuple[Goal, ...]] = (
        Goal("PSNR, field, above the paper's BlindHarmony", "field_psnr", paper="blindharmony"),
        Goal("SSIM, field, above the paper's BlindHarmony", "field_ssim", paper="blindharmony"),
        Goal("PSNR, brain, above histogram matching", "psnr", above="histogram-matching"),
        Goal("slice jumps not above the input's", "slice_to_input", 1.0, floor=False),
    )
    paper: ClassVar[Mapping[tuple[str, str], Mapping[str, float]]] = {
        (trial, condition): {"field_psnr": psnr, "field_ssim": ssim}
        for trial, condition, psnr, ssim in (
            ("none", "exp", 22.6, 0.952),
            ("none", "log", 21.4, 0.958),
            ("none", "gamma07", 21.6, 0.955),
            ("none", "gamma15", 20.6, 0.833),
            ("blindharmony", "exp", 29.7, 0.985),
            ("blindharmony", "log", 28.7, 0.979),
            ("blindharmony", "gamma07", 27.5, 0.971),
            ("blindharmony", "gamma15", 26.8, 0.967),
            ("histogram-matching", "exp", 26.5, 0.961),
            ("histogram-matching", "log", 26.5, 0.961),
            ("histogram-matching", "gamma07", 26.5, 0.961),
            ("histogram-matching", "gamma15", 26.5, 0.961),
            ("ssimh", "exp", 26.1, 0.971),
            ("ssimh", "log", 25.8, 0.972),
            ("ssimh", "gamma07", 26.2, 0.945),
            ("ssimh", "gamma15", 25.8, 0.968),
            ("unet-exp", "exp", 65.6, 0.999),
            ("unet-exp", "log", 15.9, 0.885),
            ("unet-exp", "gamma07", 15.9, 0.879),
            ("unet-log", "exp", 16.8, 0.803),
            ("unet-log", "log", 56.5, 0.999),
            ("unet-log", "gamma07", 38.0, 0.997),
            ("unet-gamma07", "exp", 16.3, 0.766),
            ("unet-gamma07", "log", 39.2, 0.998),
            ("unet-gamma07", "gamma07", 55.1, 0.999),
            ("cyclegan-exp", "exp", 32.6, 0.993),
            ("cyclegan-exp", "log", 23.0, 0.951),
            ("cyclegan-exp", "gamma07", 22.3, 0.948),
            ("cyclegan-log", "exp", 22.8, 0.943),
            ("cyclegan-log", "log", 35.5, 0.996),
            ("cyclegan-log", "gamma07", 34.5, 0.995),
            ("cyclegan-gamma07", "exp", 22.1, 0.932),
            ("cyclegan-gamma07", "log", 35.6, 0.996),
            ("cyclegan-gamma07", "gamma07", 35.6, 0.996),
        )
    }

    def prepare(self, data: Path, folder: Path) -> Cohort:
        """Link the scans and write the transformed ones."""
        root = folder / "bids"
        sites = dict.fromkeys((*TRAINING, *TESTED), SITE)
        changed = {f"{p}{c}": (p, c) for c in transformations() for p in TESTED}
        if not (root / "participants.tsv").is_file():
            write_description(root, self.title)
            for label in sites:
                copy_participant(need(data / f"sub-{label}"), root)
            for label, (person, condition) in changed.items():
                source = root / f"sub-{person}" / "anat" / f"sub-{person}_T1w.nii.gz"
                target = root / f"sub-{label}" / "anat" / f"sub-{label}_T1w.nii.gz"
                transform(source, transformations()[condition], target)
            write_participants(root, sites | {k: c for k, (_, c) in changed.items()})
        travellers = tuple(f"{person}ways" for person in TRAVELLERS)
        for person, label in zip(TRAVELLERS, travellers, strict=True):
            _let_travel(root, person, label)
        found = {s.subject: s for s in scans_of(root, [*TESTED, *changed])}
        pairs = {**{p: (p, IDENTITY) for p in TESTED}, **changed}
        cases = [
            Case(c, p, p, (found[label],), {"truth": found[p]}) for label, (p, c) in pairs.items()
        ]
        return Cohort(root, SITE, TRAINING, tuple(cases), travellers)

    def score(self, case: Case, result: View, prep: Prepared) -> dict[str, float]:
        """Result against the untouched scan."""
        (scan,) = case.scans
        truth_scan = case.facts["truth"]
        mask, truth = prep.mask(truth_scan), prep.scaled(truth_scan)
        image, before = result(scan), prep.scaled(scan)
        affine = prep.corrected(truth_scan)[1]
        return {
            **similarity(truth, image, mask),
            **whole_field(truth, image, mask, affine),
            **jumps(before, image, truth, mask),
            **anatomy(before, image, mask),
        }


def _let_travel(root: Path, person: str, label: str) -> None:
    """A person's scan as it is and after every transformation, as sessions of a participant."""
    home = root / f"sub-{label}"
    sessions = home / f"sub-{label}_sessions.tsv"
    if sessions.is_file():
        return
    source = root / f"sub-{person}" / "anat" / f"sub-{person}_T1w.nii.gz"
    ways = {SITE: source, **dict.fromkeys(transformations())}
    for session, known in ways.items():
        target = home / f"ses-{session}" / "anat" / f"sub-{label}_ses-{session}_T1w.nii.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        if known is None:
            transform(source, transformations()[session], target)
        elif not target.exists():
            target.symlink_to(known.resolve())
    lines = ["session_id\tsite", *(f"ses-{name}\t{name}" for name in ways)]
    atomic_write_text(sessions, "\n".join(lines) + "\n")
