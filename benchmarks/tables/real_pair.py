"""One person on two scanners: are the scans more alike once both are harmonized?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import copy_participant, need, write_description, write_participants
from benchmarks.harness import Case, Cohort, Column, Prepared, Table
from benchmarks.scoring import similarity
from benchmarks.tables.blindharmony import SITE, BlindHarmony
from benchmarks.trials import scans_of
from benchmarks.view import View
from bids_harmony.bids.scan import Scan
from bids_harmony.imaging.mask import block_mean
from bids_harmony.interfaces.ants import ants_session
from bids_harmony.interfaces.ants_functions import register_rigid, to_ants
from bids_harmony.metrics.similarity import jsd, ncc, wasserstein

PERSON, FIRST, SECOND = "trv01", "unknown3t", "prismafit"


class RealPair(Table):
    """Two sessions of one person, one of them with thick slices."""

    name: ClassVar[str] = "real-pair"
    title: ClassVar[str] = "One person on two scanners"
    about: ClassVar[str] = (
        "T1w of one person (by image evidence) on two scanners: 1 mm, skull-stripped, and two-"
        "dimensional FLASH with 4.8 mm slices. Both go through the pipeline to a third scanner, "
        f"with the models of `{BlindHarmony.name}`; the results are compared with each other. The "
        "1 mm scan is registered rigidly to the other and averaged over its slices, since fine "
        "detail cannot be compared with thick slices. Scores are in the common brain mask, both "
        "on the common scale. One pair: no interval, and no claim beyond it. The nearest figures "
        "of the papers are those of BlindHarmony's table 2 (source 19.4 to 24.1 dB, other "
        "scanners and people)."
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("psnr", "PSNR", "dB"),
        Column("ssim", "SSIM", "", 3),
        Column("ncc", "NCC", "", 3),
        Column("wasserstein", "Wasserstein distance", "", 4, "lower"),
        Column("jsd", "JSD", "bit", 4, "lower"),
    )
    trials: ClassVar[tuple[str, ...]] = (
        "none", "histogram-matching", "ssimh", "nyul", "harmonizing-flows", "blindharmony",
    )  # fmt: skip
    paper: ClassVar[Mapping[tuple[str, str], Mapping[str, float]]] = {}
    models_of: ClassVar[str | None] = BlindHarmony.name

    def prepare(self, data: Path, folder: Path) -> Cohort:
        """Link the pair."""
        root = folder / "bids"
        if not (root / "participants.tsv").is_file():
            write_description(root, self.title)
            copy_participant(need(data / f"sub-{PERSON}"), root)
            write_participants(root, {PERSON: "n/a"})
        scans = {s.site: s for s in scans_of(root, [PERSON])}
        case = Case("pair", f"sub-{PERSON}", PERSON, (scans[FIRST], scans[SECOND]))
        return Cohort(root, SITE, (), (case,))

    def score(self, case: Case, result: View, prep: Prepared) -> dict[str, float]:
        """Both results, the fine one on the coarse one's grid."""
        fine, thick = case.scans
        transform = self._transform(fine, thick, prep)
        inside = prep.mask(thick) & (
            self._moved(prep.mask(fine).astype(np.float32), fine, thick, prep, transform) > 0.99
        )
        other = self._moved(
            np.where(prep.mask(fine), result(fine), 0), fine, thick, prep, transform
        )
        image = np.where(inside, result(thick), 0).astype(np.float32)
        other = np.where(inside, other, 0).astype(np.float32)
        return {
            **similarity(other, image, inside),
            "ncc": ncc(other, image, inside),
            "wasserstein": wasserstein(other, image, inside),
            "jsd": jsd(other, image, inside),
        }

    def _transform(self, fine: Scan, thick: Scan, prep: Prepared) -> Path:
        """Rigid transform that carries the fine scan onto the thick one, found once."""
        path = prep.folder / "pair.txt"
        if not path.is_file():
            scratch = prep.folder / "registration"
            scratch.mkdir(exist_ok=True)
            data, affine = prep.corrected(thick)
            with ants_session(1, 1, scratch) as ants:
                fixed = (np.where(prep.mask(thick), data, 0), affine)
                found = register_rigid(
                    ants, fixed, prep.corrected(fine), "Rigid", scratch, prep.mask(fine)
                )
                ants.write_transform(found, str(path))
        return path

    def _moved(
        self, data: NDArray[Any], fine: Scan, thick: Scan, prep: Prepared, transform: Path
    ) -> NDArray[np.float32]:
        """An image of the fine scan on the thick one's grid, averaged over the slice."""
        target, affine = prep.corrected(thick)
        zooms = np.linalg.norm(affine[:3, :3], axis=0)
        factors = tuple(int(max(1, round(z / zooms.min()))) for z in zooms)
        grid = affine.copy()
        grid[:3, :3] = affine[:3, :3] / np.array(factors)
        grid[:3, 3] -= affine[:3, :3] @ ((np.array(factors) - 1) / (2 * np.array(factors)))
        shape = tuple(n * f for n, f in zip(target.shape, factors, strict=True))
        own = prep.corrected(fine)[1]
        with ants_session(1, 1, prep.folder) as ants:
            moved = ants.apply_transforms(
                to_ants(ants, np.zeros(shape, np.float32), grid),
                to_ants(ants, data, own),
                [str(transform)],
                whichtoinvert=[False],
            ).numpy()
        return block_mean(moved, factors)  # type: ignore[arg-type]
