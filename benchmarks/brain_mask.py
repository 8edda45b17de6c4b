"""Compare our brain masks with labels made by another tool.

usage: brain_mask.py BIDS_DIR [--labels derivatives/dlmuse] [--participants LABEL ...]

Prints, per T1w scan with a ``dseg``, the Dice overlap of the brain mask with the labels (all above
zero, closed by 2 voxels, cavities filled), the share of labels missed, the share of the mask
outside them, the time and the peak memory of a fresh process with one thread.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage


def mask_of(path: str) -> tuple[Any, list[str], float, float, float]:
    """Brain mask, its warnings, wall seconds, CPU seconds and peak megabytes."""
    from bids_harmony.interfaces.ants import BrainMask

    began, used = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        done = BrainMask(in_file=path, modality="T1w").run(cwd=folder).outputs
        mask = np.asarray(nib.load(done.out_file).dataobj) > 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wall, cpu = time.perf_counter() - began, time.process_time() - used
    return mask, list(done.warnings), wall, cpu, peak


def filled(labels: Any) -> Any:
    """Labels above zero, closed by 2 voxels, cavities filled."""
    closed = ndimage.binary_closing(np.pad(labels > 0, 4), iterations=2)
    return ndimage.binary_fill_holes(closed)[4:-4, 4:-4, 4:-4]


def main() -> None:
    """Read the arguments, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bids_dir", type=Path)
    parser.add_argument("--labels", default="derivatives/dlmuse")
    parser.add_argument("--participants", nargs="*")
    options = parser.parse_args()
    scores = []
    print("participant   Dice  missed  extra   wall s  CPU s  peak MB  warnings")
    for labels in sorted((options.bids_dir / options.labels).glob("sub-*/anat/*_dseg.nii.gz")):
        name = labels.name.split("_")[0]
        if options.participants and name.removeprefix("sub-") not in options.participants:
            continue
        scan = options.bids_dir / name / "anat" / f"{name}_T1w.nii.gz"
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            mask, warnings, wall, cpu, peak = pool.submit(mask_of, str(scan)).result()
        truth = filled(np.asarray(nib.load(labels).dataobj))
        dice = 2 * (mask & truth).sum() / (mask.sum() + truth.sum())
        missed, extra = (truth & ~mask).sum() / truth.sum(), (mask & ~truth).sum() / mask.sum()
        scores.append(dice)
        print(
            f"{name:12} {dice:6.3f} {missed:6.3f} {extra:6.3f} {wall:8.1f} {cpu:6.1f} "
            f"{peak:8.0f}  {'; '.join(warnings)}",
            flush=True,
        )
    if not scores:
        raise SystemExit(f"{options.bids_dir}: no labels under {options.labels}")
    print(f"median {np.median(scores):.3f}  min {min(scores):.3f}  scans {len(scores)}")


if __name__ == "__main__":
    main()
