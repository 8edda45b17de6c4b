"""Draw the README's picture from the outputs of `make demo` (phantom data).

python tools/readme_picture.py DEMO_DIR [OUT.png]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from nibabel.processing import resample_from_to

SITES = ("mprage3", "spgr15", "biased3")
SUBJECT = "sub-01"
GRID = ((96, 116, 96), np.array([[2.0, 0, 0, -96], [0, 2, 0, -126], [0, 0, 2, -82], [0, 0, 0, 1]]))


def upright(path: Path, order: int = 1) -> Any:
    """A scan's voxels on one upright 2 mm grid."""
    return np.asanyarray(resample_from_to(nb.load(path), GRID, order=order).dataobj)


def main(demo: Path, out: Path) -> None:
    """Two rows, before and after, one column per site."""
    figure = Figure(figsize=(9, 6.6), facecolor="black", layout="constrained")
    axes = figure.subplots(2, len(SITES))
    white = None
    for column, site in enumerate(SITES):
        anat = Path(SUBJECT) / f"ses-{site}" / "anat"
        stem = f"{SUBJECT}_ses-{site}"
        mask = upright(demo / "out" / anat / f"{stem}_desc-brain_mask.nii.gz", 0) > 0
        level = int(np.median(np.nonzero(mask)[2])) + 4
        before = upright(demo / "raw" / anat / f"{stem}_T1w.nii.gz")
        after = upright(demo / "out" / anat / f"{stem}_desc-harmonized_T1w.nii.gz")
        white = white or np.percentile(after[mask], 99.5)
        for axis, image, top in (
            (axes[0, column], before, np.percentile(before[mask], 99.5)),
            (axes[1, column], after, white),
        ):
            axis.imshow(image[:, :, level].T, cmap="gray", vmin=0, vmax=top, origin="lower")
            axis.set_axis_off()
        axes[0, column].set_title(f"{site}: as acquired", color="white")
        axes[1, column].set_title("harmonized to mprage3", color="white")
    FigureCanvasAgg(figure).print_png(str(out), metadata={"Software": None})


if __name__ == "__main__":
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("docs/before_after.png")
    main(Path(sys.argv[1]), target)
