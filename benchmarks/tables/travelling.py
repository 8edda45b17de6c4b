"""Simulated travelling subjects: every site harmonized to one, with the truth known."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.goals import Goal
from benchmarks.harness import Case, Cohort, Column, Prepared, Table, read
from benchmarks.scoring import anatomy, distribution, jumps, segmented, similarity, tissues
from benchmarks.trials import scans_of
from benchmarks.view import View
from bids_harmony.bids.scan import Scan
from bids_harmony.bids.write import atomic_write_text
from bids_harmony.phantom.dataset import TRUTH, write_phantom
from bids_harmony.phantom.sites import REFERENCE

RESOLUTION = 2.0


def truth_file(root: Path, scan: Scan, name: str) -> Path:
    """A file of the phantom's truth on the grid of a scan."""
    return root / TRUTH / scan.folder / f"{scan.stem.removesuffix('_T1w')}_{name}.nii.gz"


SCORES = (
    "All brain masks are the pipeline's own; scores are in the phantom's true brain. Truth: "
    "the same subject in the wanted site's contrast without noise, bias and transmit field, "
    "brought to the common scale by the median ratio to the subject's own scan at that site. "
    "nWD as in HAIL (equation 1), but the target is the truth, not another person's scan. "
    "rAVD: tissue volumes (Atropos, 3 classes) of the result against those of the truth; "
    "HAIL compares with the input's (in the CSV: ravd_input). Slice jumps: mean absolute "
    "difference of neighbouring slices' means, the largest ratio of the three axes. The paper's "
    "columns are HAIL's own figures on clinical scans."
)


class Travelling(Table):
    """Phantom scans of four sites and of the reference domain itself."""

    name: ClassVar[str] = "travelling"
    title: ClassVar[str] = "Travelling subjects (phantom)"
    #: Where the test subjects are scanned, besides the reference domain.
    sites: ClassVar[tuple[str, ...]] = ("mprage15", "spgr3", "spgr15", "biased3")
    #: Subjects of the test, and of the training: each of the latter at one site, in turn.
    tested: ClassVar[int] = 4
    trained: ClassVar[int] = 12
    trained_at: ClassVar[tuple[str, ...]] = (REFERENCE,)
    trained_on: ClassVar[tuple[str, ...]] = ("T1w",)
    #: Training subjects who were scanned at two sites, for methods that need such.
    travellers: ClassVar[int] = 0
    travelled_to: ClassVar[tuple[str, ...]] = ()
    tested_on: ClassVar[tuple[str, ...]] = ("T1w",)
    about: ClassVar[str] = (
        f"Digital brain phantom at {RESOLUTION:g} mm: trained on {trained} subjects at the "
        f"reference domain {REFERENCE}, tested on {tested} others who were scanned at all sites; "
        f"{REFERENCE} itself as input shows what noise costs. " + SCORES
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("psnr", "PSNR", "dB"),
        Column("ssim", "SSIM", digits=3),
        Column("nwd_ip", "nWD(i,p)", "%", 1, "hundred"),
        Column("nwd_tp", "nWD(t,p)", "%", 1, "lower"),
        Column("ravd_gm", "rAVD GM", "%", 1, "lower"),
        Column("ravd_wm", "rAVD WM", "%", 1, "lower"),
        Column("ravd_csf", "rAVD CSF", "%", 1, "lower"),
        Column("slice_to_truth", "slice jumps / truth's", "", 2, "one"),
        Column("rank", "rank agreement", "", 4),
        *(Column(f"ravd_input_{t}", f"rAVD {t.upper()} to input", "%", 1, "lower", shown=False)
          for t in ("gm", "wm", "csf")),
        *(Column(f"dice_{t}", f"Dice {t.upper()}", "", 3, shown=False)
          for t in ("gm", "wm", "csf")),
        Column("edges", "edge correlation", "", 4, shown=False),
        *(Column(f"slice_{k}", f"slice jumps {k}", "", 4, "lower", shown=False) for k in "xyz"),
        Column("slice_to_input", "slice jumps / input's", "", 2, "lower"),
    )  # fmt: skip
    trials: ClassVar[tuple[str, ...]] = (
        "none", "histogram-matching", "ssimh", "nyul", "harmonizing-flows", "blindharmony",
    )  # fmt: skip
    controls: ClassVar[tuple[str, ...]] = (REFERENCE,)
    goals: ClassVar[tuple[Goal, ...]] = (
        Goal("PSNR 3 dB above histogram matching", "psnr", 3.0, above="histogram-matching"),
        Goal("rAVD GM at most 3 %", "ravd_gm", 3.0, floor=False),
        Goal("rAVD WM at most 3 %", "ravd_wm", 3.0, floor=False),
        Goal("rAVD CSF at most 3 %", "ravd_csf", 3.0, floor=False),
        Goal("slice jumps not above the input's", "slice_to_input", 1.0, floor=False),
    )
    paper: ClassVar[Mapping[tuple[str, str], Mapping[str, float]]] = {
        ("hail", "mean"): {"nwd_ip": 94.63, "nwd_tp": 11.87, "ravd_input_gm": 7.06,
                           "ravd_input_wm": 13.42}
    }  # fmt: skip

    def prepare(self, data: Path, folder: Path) -> Cohort:
        """Simulate; subjects of training and test are different people."""
        root = folder / "bids"
        if not root.is_dir():
            self._simulate(folder / "draft", root)
        known = self.tested + self.trained
        tested = [f"{k:02d}" for k in range(1, self.tested + 1)]
        training = tuple(f"{k:02d}" for k in range(self.tested + 1, known + 1))
        travellers = tuple(f"{known + k:02d}" for k in range(1, self.travellers + 1))
        if travellers and not (root / f"sub-{travellers[-1]}").is_dir():
            self._let_travel(folder / "draft", root)
        scans = {(s.subject, s.site): s for s in scans_of(root, tested)}
        cases = [
            Case(condition, scans[who, site].stem, who, (scans[who, site],),
                 {"own": scans[who, to]}, to)
            for condition, (site, to) in self.ways().items() for who in tested
        ]  # fmt: skip
        return Cohort(root, REFERENCE, training, tuple(cases), travellers)

    def ways(self) -> dict[str, tuple[str, str]]:
        """By condition: the scan's site, and the site whose appearance it gets."""
        return {site: (site, REFERENCE) for site in (*self.sites, REFERENCE)}

    def score(self, case: Case, result: View, prep: Prepared) -> dict[str, float]:
        """Result against the truth in the true brain."""
        root, (scan,) = prep.cohort.bids_dir, case.scans
        truth, mask, affine = self.truth_of(case, prep)
        known = read(truth_file(root, scan, "dseg"))[0].round().astype(np.uint8)
        image, before = result(scan), prep.scaled(scan)
        labels = segmented(
            {"image": image, "before": before, "truth": truth}, affine, mask, prep.labels
        )
        return {
            **similarity(truth, image, mask),
            **distribution(before, image, truth, mask),
            **tissues(labels, known),
            **jumps(before, image, truth, mask),
            **anatomy(before, image, mask),
        }

    def truth_of(
        self, case: Case, prep: Prepared
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[Any]]:
        """Truth of a case on the common scale, true brain, and affine."""
        root, (scan,) = prep.cohort.bids_dir, case.scans
        mask, affine = self._brain(root, scan)
        truth = self._truth(root, scan, case.to)
        return truth * self._level(case.facts["own"], prep), mask, affine

    def _level(self, own: Scan, prep: Prepared) -> float:
        """Factor from the truth's unit to the common scale, from the own scan at that site."""
        root = prep.cohort.bids_dir
        mask, _ = self._brain(root, own)
        mask &= prep.mask(own)
        truth = self._truth(root, own, own.site)
        return float(np.median(prep.scaled(own)[mask]) / np.median(truth[mask]))

    def _brain(self, root: Path, scan: Scan) -> tuple[NDArray[np.bool_], NDArray[Any]]:
        data, affine = read(truth_file(root, scan, "desc-brain_mask"))
        return data > 0, affine

    def _truth(self, root: Path, scan: Scan, site: str) -> NDArray[np.float32]:
        return read(truth_file(root, scan, f"desc-truth{site}_T1w"))[0]

    def _simulate(self, draft: Path, root: Path) -> None:
        """Test subjects at every site and training subjects, in one data set."""
        shutil.rmtree(draft, ignore_errors=True)
        write_phantom(
            draft / "tested", subjects=self.tested, sites=(*self.sites, REFERENCE),
            modalities=self.tested_on, resolution=RESOLUTION,
            truths=sorted({to for _, to in self.ways().values()} or {REFERENCE}),
        )  # fmt: skip
        write_phantom(
            draft / "trained", subjects=self.trained, first=self.tested + 1,
            sites=self.trained_at, modalities=self.trained_on, travelling=0,
            resolution=RESOLUTION,
        )  # fmt: skip
        _join(draft / "trained", draft / "tested")
        (draft / "tested").rename(root)
        shutil.rmtree(draft)

    def _let_travel(self, draft: Path, root: Path) -> None:
        """Training subjects who were scanned at two sites, added to the data set."""
        shutil.rmtree(draft, ignore_errors=True)
        write_phantom(
            draft, subjects=self.travellers, first=self.tested + self.trained + 1,
            sites=self.travelled_to, modalities=self.trained_on, resolution=RESOLUTION,
        )  # fmt: skip
        _join(draft, root)
        shutil.rmtree(draft)


def _join(more: Path, root: Path) -> None:
    """Move the subjects of one phantom into another."""
    for below in (TRUTH, Path()):  # raw subjects last: then all is there
        name = below / "participants.tsv"
        rows = (root / name).read_text().splitlines()
        rows += [row for row in (more / name).read_text().splitlines() if row not in rows]
        atomic_write_text(root / name, "\n".join(rows) + "\n")
        for path in sorted((more / below).glob("sub-*")):
            path.rename(root / below / path.name)
