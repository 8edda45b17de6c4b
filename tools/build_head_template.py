"""Build the head template of the brain mask from whole heads in the public domain.

usage: build_head_template.py BIDS_DIR OUT_DIR [--rounds 2]

The sources are the PDDL-licensed T1w scans of sites allegra and forrest. Round 1 cuts the brain
out by thresholds, registers it to the skull-stripped MNI152 template that nilearn ships and
averages the heads, flipped copies included; the next rounds register heads to that average.
Sources are defaced, and all that is farther than 25 mm from the brain is dropped, so the average
shows no face.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nilearn.datasets import load_mni152_template
from scipy import ndimage

from bids_harmony.imaging.mask import block_mean, coarse_affine, fill_holes, largest_component
from bids_harmony.interfaces.ants import ants_session
from bids_harmony.interfaces.ants_functions import load, to_ants
from bids_harmony.interfaces.brain_mask import (
    HEAD,
    HEAD_MASK,
    Head,
    register_head,
    warped_prior,
    working_copy,
)

SOURCES = (*(f"sub-all{k:02d}" for k in range(1, 9)), "sub-frr01")
MARGIN = 25.0
BELOW = 12


def mni_start() -> Head:
    """MNI152 brain at 2 mm, padded below for the neck; its margin is a tiny value, not zero."""
    image = load_mni152_template(resolution=1)
    data = np.asarray(image.dataobj, dtype=np.float32)
    factors = (2, 2, 2)
    pad = ((0, 1), (0, 1), (2 * BELOW, 1))
    affine = coarse_affine(image.affine, factors)
    affine[2, 3] -= 2 * BELOW
    brain = block_mean(np.pad((data > 0.2).astype(np.float32), pad), factors)
    small = block_mean(np.pad(data, pad), factors)
    near = ndimage.binary_dilation(brain > 0.5, iterations=4)
    return Head(np.where(near, np.maximum(small, 1e-3), 0), brain, affine)


def rough_brain(scan: tuple[Any, Any]) -> Any:
    """Scan with all but its brain tissue set to zero (T1w, shading removed, about 2 mm).

    The brain is the largest part that survives an erosion by 4.5 mm, at the lowest threshold that
    gives a brain's volume.
    """
    data, affine = scan
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    level = np.median(data[data > 0.2 * np.percentile(data, 98)])
    for share in (0.5, 0.6, 0.7, 0.8):
        tissue = data > share * level
        depth = ndimage.distance_transform_edt(tissue, sampling=zooms)
        core = largest_component(depth > 4.5)
        near = ndimage.distance_transform_edt(~core, sampling=zooms) < 5.5
        brain = fill_holes(near & tissue)
        if 900 < brain.sum() * np.prod(zooms) / 1000 < 1600:
            return data * brain
    raise SystemExit("no threshold gives a brain of 900 to 1600 ml")


def warp(
    ants: Any, head: Head, scan: tuple[Any, Any], shown: tuple[Any, Any], folder: Path
) -> tuple[Any, Any, Any]:
    """Head and its known part on the template's grid, and the brain probability there.

    ``shown`` is what is registered: the rough brain, or the head itself.
    """
    forward, backward = register_head(ants, head, shown, folder)
    prior = warped_prior(ants, head, scan, backward)
    inside = prior > 0.5
    data = scan[0] / np.median(scan[0][inside])
    grid = to_ants(ants, head.data, head.affine)
    moved = [
        ants.apply_transforms(grid, to_ants(ants, part, scan[1]), forward).numpy()
        for part in (data, (scan[0] > 0).astype(np.float32), prior)
    ]
    return moved[0], moved[1] > 0.99, moved[2]


def average(parts: list[tuple[Any, Any, Any]], affine: Any) -> Head:
    """Symmetric mean of the warped heads where at least a third of them is known."""
    both = [*parts, *(tuple(np.flip(item, 0) for item in part) for part in parts)]
    known = sum(part[1].astype(np.float32) for part in both)
    total = sum(part[0] * part[1] for part in both)
    probability = sum(part[2] for part in both) / len(both)
    mean = np.where(known > len(both) / 3, total / np.maximum(known, 1), 0)
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    distance = ndimage.distance_transform_edt(probability < 0.5, sampling=zooms)
    return Head(np.where(distance < MARGIN, mean, 0), probability, affine)


def store(head: Head, folder: Path) -> None:
    """Write the template as uint8: head scaled to 1..255 where known, probability to 0..255."""
    folder.mkdir(parents=True, exist_ok=True)
    top = np.percentile(head.data[head.data > 0], 99.9)
    data = np.clip(np.round(head.data / top * 255), 0, 255)
    data = np.where(head.data > 0, np.maximum(data, 1), 0)
    probability = np.clip(np.round(head.probability * 255), 0, 255)
    for values, name in ((data, HEAD), (probability, HEAD_MASK)):
        image = nib.Nifti1Image(values.astype(np.uint8), head.affine)
        image.header.set_xyzt_units("mm")
        nib.save(image, folder / name)


def main() -> None:
    """Read the arguments and build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bids_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    head = mni_start()
    with tempfile.TemporaryDirectory() as scratch, ants_session(1, 1, scratch) as ants:
        scans = []
        for name in SOURCES:
            path = options.bids_dir / name / "anat" / f"{name}_T1w.nii.gz"
            scans.append(working_copy(ants, *load(path)))
        for turn in range(options.rounds):
            parts = []
            for name, scan in zip(SOURCES, scans, strict=True):
                shown = scan if turn else (rough_brain(scan), scan[1])
                parts.append(warp(ants, head, scan, shown, Path(scratch)))
                print(f"round {turn + 1}: {name}", flush=True)
            head = average(parts, head.affine)
            store(head, options.out_dir / f"round-{turn + 1}")
    store(head, options.out_dir)


if __name__ == "__main__":
    main()
