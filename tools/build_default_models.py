"""Fit the models that ship with the package on openly licensed scans.

    python tools/build_default_models.py BIDS_DIR WORK_DIR

T1w: the twelve skull-stripped scans of the site novosibirsk (OpenNeuro ds002748, CC0).
T2w and FLAIR: both sessions of sub-ljub12 of the site ljubljana (open_ms_data, Lesjak 2017,
CC BY 4.0): one patient with multiple sclerosis, hence a weak reference that says so.
Bundles hold quantiles and other statistics, no scan. SSIMH is fitted on T1w alone, because its
reference is an image per slice.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from bids_harmony.bids.find import find_scans
from bids_harmony.bids.write import save_nifti
from bids_harmony.config import DEFAULT_SEED, DEFAULT_TEMPLATE
from bids_harmony.imaging.templates import template_image
from bids_harmony.methods.base import NATIVE_GRID
from bids_harmony.methods.bundle import load_bundle, save_bundle
from bids_harmony.methods.registry import available, load
from bids_harmony.resources import detect
from bids_harmony.workflows.engine import Engine
from bids_harmony.workflows.settings import Job, Place, Preprocessing
from bids_harmony.workflows.train import Fit, fit_reference

SITES = {"T1w": "novosibirsk", "T2w": "ljubljana", "FLAIR": "ljubljana"}
LICENCE = {
    "T1w": "statistics of OpenNeuro ds002748 (CC0)",
    "T2w": "statistics of open_ms_data, Lesjak 2017 (CC BY 4.0)",
    "FLAIR": "statistics of open_ms_data, Lesjak 2017 (CC BY 4.0)",
}
TARGET = Path(__file__).parent.parent / "bids_harmony" / "data" / "models"


def main() -> int:
    """Fit every method that ships with a default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bids_dir", type=Path)
    parser.add_argument("work_dir", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    for method in ("nyul", "histogram-matching", "zscore", "wm-peak", "ssimh"):
        modalities = ("T1w",) if method == "ssimh" else tuple(SITES)
        print(build(method, modalities, args.bids_dir.absolute(), args.work_dir.absolute()))
    return 0


def template(work_dir: Path, resolution: float) -> Path:
    """Default template at a voxel size, in the work folder."""
    path = work_dir / f"tpl-{DEFAULT_TEMPLATE}_{resolution:g}mm.nii"
    if not path.is_file():
        image = template_image(DEFAULT_TEMPLATE, resolution)
        save_nifti(image.get_fdata(dtype="float32"), image.affine, path)
    return path


def build(method: str, modalities: tuple[str, ...], bids_dir: Path, work_dir: Path) -> Path:
    """Fit one method and copy its bundle into the package."""
    found, problems = find_scans(
        bids_dir,
        participants=None,
        sessions=None,
        modalities=modalities,
        filters=None,
        site_from=None,
    )
    for problem in problems:
        print("left out:", problem.message, file=sys.stderr)
    scans = [s for s in found if s.site == SITES[s.suffix]]
    contract = load(method).contract_for(modalities)
    name = f"{method}-default"
    native = contract.grid == NATIVE_GRID
    job = Job(
        prep=Preprocessing(
            template=DEFAULT_TEMPLATE, template_file=template(work_dir, 2), seed=DEFAULT_SEED
        ),
        place=Place(bids_dir, work_dir / "out", work_dir, "harmonized"),
        folders={},
        engine=Engine(resources=detect(), work_dir=work_dir, seed=DEFAULT_SEED),
        clean=True,
    )
    grid = None if native else template(work_dir, float(contract.resolution or 1))
    folder, outcomes = fit_reference(scans, Fit(method, name, "default", grid), job, print)
    if any(o.status != "preprocessed" for o in outcomes):
        raise SystemExit(f"{method}: a training scan was refused")
    bundle = load_bundle(folder)
    words = ", ".join(f"{SITES[m]} ({m})" for m in modalities)
    meta = {
        **bundle.meta,
        "reference": f"the shipped default: {words}",
        "licence": {m: LICENCE[m] for m in modalities},
        "title": available()[method].title,
    }
    return save_bundle(TARGET / name, bundle.method, meta=meta)


if __name__ == "__main__":
    sys.exit(main())
