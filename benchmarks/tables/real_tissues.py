"""Tables 3 and 5 of deepNormalize on real scanners, with the labels that there are."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import copy_participant, need, write_description, write_participants
from benchmarks.goals import Goal
from benchmarks.harness import Case, Cohort, Prepared, read
from benchmarks.scoring import segmented
from benchmarks.tables.tissues import (
    ALIKE,
    METHODS,
    PAPER_TWO,
    UNBIASED,
    Tissues,
    as_good_as,
    drawn,
)
from benchmarks.trials import Trial, scans_of
from bids_harmony.bids.scan import Scan
from bids_harmony.bids.tissue_labels import find_tissue_labels
from bids_harmony.bids.write import save_nifti, write_json, write_tsv
from bids_harmony.errors import MissingInputError, ScanError
from bids_harmony.imaging.conform import conform
from bids_harmony.imaging.tissues import TISSUES
from bids_harmony.interfaces.ants import ants_session
from bids_harmony.interfaces.ants_functions import divide_by_bias, fit_bias
from bids_harmony.interfaces.tissues import labels_of, tissue_shares

LABELLED, OTHER = "ixihh", "novosibirsk"
PEOPLE: Mapping[str, tuple[str, ...]] = {
    LABELLED: tuple(f"ixi0{k}" for k in (12, 13, 14, 15, 33, 34, 39, 48, 49, 51)),
    OTHER: tuple(f"nov{k}" for k in range(54, 64)),
}
TESTED = 3  # of each
BOTH = f"{LABELLED} and {OTHER}"
_ATROPOS = "atropos"

_TRAINED = tuple(
    Trial(f"{method}-real", method, ("--preset", "cpu"), neural=True) for method in METHODS
)
TRIALS = (*_TRAINED, drawn(_TRAINED[-1]))


class RealTissues(Tissues):
    """Adults of two scanners: one cohort has labels of its own, the other's are Atropos'."""

    name: ClassVar[str] = "real-tissues"
    title: ClassVar[str] = "Segmentation across sites (real scans)"
    about: ClassVar[str] = (
        f"T1w of two scanners (openly licensed): {LABELLED} (2 mm, with DLMUSE labels) and "
        f"{OTHER} (.87 mm, labels by Atropos of the scan after N4, 3 classes: no truth, and its "
        "cerebrospinal fluid reaches into the sulci, where DLMUSE has none). Trained on "
        f"{len(PEOPLE[OTHER]) - TESTED} people of each, tested on {TESTED} others of each. A row "
        "is a pair of people, one of each site (intervals: over pairs). Dice and mean Hausdorff "
        "distance (MHD) are means over both scans, against each site's own labels; the "
        "Jensen-Shannon divergence (JSD, bits) is between two people, so that some of it is "
        "anatomy. JSD within tissues, `-drawn`, bias and discriminator as in `tissues`. The "
        "paper's data are other scans, with labels by hand."
    )
    trials: ClassVar[tuple[str, ...]] = ("none", *(trial.label for trial in TRIALS))
    goals: ClassVar[tuple[Goal, ...]] = (
        ALIKE,
        as_good_as("preprocessor-real", BOTH),
        UNBIASED,
    )
    paper: ClassVar[Mapping[tuple[str, str], Mapping[str, float]]] = {
        (f"{method}-real", BOTH): found for method, found in PAPER_TWO.items()
    }

    def arguments(self, cohort: Cohort) -> tuple[str, ...]:
        """Both sites' labels."""
        folders = _label_folders(cohort.bids_dir)
        return (*self.options, "--derivatives", *(f"{k}={v}" for k, v in folders.items()))

    def prepare(self, data: Path, folder: Path) -> Cohort:
        """Link the participants, and segment those that have no labels."""
        root = folder / "bids"
        sites = {person: site for site, people in PEOPLE.items() for person in people}
        if not (root / "participants.tsv").is_file():
            write_description(root, self.title)
            for person in sites:
                copy_participant(need(data / f"sub-{person}"), root)
            link = root / "derivatives" / "dlmuse"
            link.parent.mkdir(exist_ok=True)
            if not link.exists():
                link.symlink_to(need(data / "derivatives" / "dlmuse").absolute())
            write_participants(root, sites)
        _segment(scans_of(root, PEOPLE[OTHER]), folder)
        tested = [people[-TESTED:] for people in PEOPLE.values()]
        scans = {s.subject: s for s in scans_of(root, [p for group in tested for p in group])}
        cases = [
            Case(BOTH, f"sub-{a} and sub-{b}", a, (scans[a], scans[b]))
            for a, b in zip(*tested, strict=True)
        ]
        training = [p for people in PEOPLE.values() for p in people[:-TESTED]]
        return Cohort(root, LABELLED, tuple(training), tuple(cases))

    def _brain_of(self, scan: Scan, prep: Prepared) -> NDArray[np.bool_]:
        return prep.mask(scan)

    def _labels_of(self, scan: Scan, prep: Prepared) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        found, notes = find_tissue_labels(scan, _label_folders(prep.cohort.bids_dir))
        if found is None:
            raise MissingInputError(f"{scan.path}: {'; '.join(notes)}")
        labels, affine = read(found.files["dseg"])
        if not np.allclose(affine, conform(scan.path).affine, atol=1e-3):
            raise ScanError(f"{found.files['dseg']}: is not on the grid of {scan.path}")
        return labels_of(tissue_shares({"dseg": labels}, found.mapping)), affine


def _label_folders(root: Path) -> dict[str, Path]:
    """Derivatives with labels, by name."""
    return {name: root / "derivatives" / name for name in ("dlmuse", _ATROPOS)}


def _segment(scans: list[Scan], folder: Path) -> None:
    """Labels of skull-stripped scans by Atropos, after N4, as derivatives of the data set."""
    root = folder / "bids" / "derivatives" / _ATROPOS
    write_json(
        root / "dataset_description.json",
        {
            "Name": "Tissues by Atropos",
            "BIDSVersion": "1.10.0",
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "antspyx"}],
        },
    )
    write_tsv(root / "dseg.tsv", [{"index": k, "name": tissue} for tissue, k in TISSUES.items()])
    for scan in scans:
        target = root / f"sub-{scan.subject}" / "anat" / f"sub-{scan.subject}_dseg.nii.gz"
        if target.is_file():
            continue
        raw = conform(scan.path)
        mask = raw.data > 0
        with tempfile.TemporaryDirectory() as temporary, ants_session(1, 1, temporary) as ants:
            field = fit_bias(ants, raw.data, raw.affine, mask)
        image = divide_by_bias(raw.data, raw.affine, field)
        labels = segmented({"image": image}, raw.affine, mask, folder / "labels")["image"]
        target.parent.mkdir(parents=True, exist_ok=True)
        save_nifti(labels, raw.affine, target, dtype=np.uint8)
