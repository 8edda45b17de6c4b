"""Does N4 remove the bias field and keep the contrast? On phantoms, whose field is known.

    python benchmarks/bias_field.py [--subjects N] [--random-seed S]

Per scan, inside the true brain mask: SD of the log ratio of estimated to true bias field (0 is
perfect; "none" is what is left when nothing is corrected), and the GM/WM ratio of medians, whose
true value N4 should keep. Settings are (voxel size in mm, spline distance in mm).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import nibabel as nb
import numpy as np

from bids_harmony.interfaces.ants import ants_session
from bids_harmony.interfaces.ants_functions import divide_by_bias, fit_bias, load
from bids_harmony.phantom.dataset import write_phantom

SITES = ("mprage3", "spgr15", "biased3")
SETTINGS = ((4.0, 150.0), (4.0, 200.0), (6.0, 150.0), (6.0, 200.0), (6.0, 300.0), (8.0, 300.0))
GREY, WHITE = 2, 3


def contrast(image: Any, labels: Any) -> float:
    """Median of grey matter over median of white matter."""
    return float(np.median(image[labels == GREY]) / np.median(image[labels == WHITE]))


def score(ants: Any, scan: Path, truth: Path, setting: tuple[float, float]) -> tuple[float, float]:
    """Residual SD of the log field, and the GM/WM ratio relative to the true one."""
    stem = scan.name.removesuffix("_T1w.nii.gz")
    data, affine = load(scan)
    field, mask, labels = (
        np.asanyarray(nb.load(truth / f"{stem}_{name}.nii.gz").dataobj)
        for name in ("desc-bias_T1w", "desc-brain_mask", "dseg")
    )
    brain = (mask > 0) & (data > 0)
    clean = data / np.maximum(field, 1e-3)
    if setting == (0, 0):
        corrected = data
    else:
        spacing, spline = setting
        found = fit_bias(ants, data, affine, mask > 0, spacing=spacing, spline=spline)
        corrected = divide_by_bias(data, affine, found, spacing=spacing)
    left = np.log(corrected[brain] / clean[brain])
    return float(left.std()), contrast(corrected, labels) / contrast(clean, labels)


def main() -> int:
    """Print one line per setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=3)
    parser.add_argument("--random-seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ants_session(1, 1, folder) as ants:
        root = Path(folder) / "phantom"
        write_phantom(
            root, subjects=args.subjects, sites=SITES, resolution=2.0, seed=args.random_seed
        )
        scans = sorted(root.glob("sub-*/ses-*/anat/*_T1w.nii.gz"))
        print("setting (mm, mm)   median SD of log field   median GM/WM ratio (1 = true)")
        for setting in ((0.0, 0.0), *SETTINGS):
            rows = [
                score(
                    ants, s, root / "derivatives" / "phantom" / s.relative_to(root).parent, setting
                )
                for s in scans
            ]
            name = "none" if setting == (0, 0) else f"{setting[0]:g}, {setting[1]:g}"
            print(
                f"{name:18s} {median(r[0] for r in rows):10.4f} {median(r[1] for r in rows):22.4f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
