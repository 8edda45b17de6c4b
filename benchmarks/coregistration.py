"""Do the scans of a session lie on each other better if one is registered to the other?

usage: coregistration.py BIDS_DIR OUT_DIR [--participants LABEL ...]

Preprocesses a data set (`participant --level minimal`), then registers every T2w and FLAIR that
has an anchor in both ways: to the template by itself, and to its anchor, as the pipeline does.
Prints per scan how far the ways differ in the brain, the Dice overlap of the brain masks of both
scans in the second way, and the seconds of both. Where `derivatives/` holds the true labels of
both (the phantom's), also the distance between the centres of their white matter and its Dice.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bids_harmony.bids.find import find_scans
from bids_harmony.bids.names import derivative_path
from bids_harmony.bids.scan import MODALITIES, Scan
from bids_harmony.errors import ExitCode
from bids_harmony.imaging.conform import conform
from bids_harmony.imaging.templates import template_image
from bids_harmony.interfaces.ants import ants_session
from bids_harmony.interfaces.ants_functions import (
    divide_by_bias,
    load,
    load_mask,
    register_rigid,
    to_ants,
    write_affine,
)
from bids_harmony.interfaces.coregister import mask_overlap, read_affine, register_scans

TEMPLATE = "MNI152NLin2009aSym"
WHITE_MATTER = 3
HEAD = f"{'scan':33} ways differ, mm    masks  WM centres, mm  WM Dice         seconds"


@dataclass(frozen=True)
class Image:
    """A bias-corrected scan with its brain mask and true labels, if there are any."""

    data: Any
    affine: Any
    mask: Any
    labels: Any


def read(scan: Scan, bids_dir: Path, out_dir: Path) -> Image:
    """A scan as the pipeline registers it."""
    made = conform(scan.path)
    field = load(derivative_path(out_dir, scan, desc="n4", suffix="biasfield"))[0]
    mask = derivative_path(out_dir, scan, desc="brain", suffix="mask")
    stem = scan.stem.removesuffix(f"_{scan.suffix}")
    found = sorted((bids_dir / "derivatives").glob(f"*/{scan.folder}/{stem}_dseg.nii.gz"))
    return Image(
        divide_by_bias(made.data.astype(np.float32), made.affine, field),
        made.affine,
        load_mask(mask, made.data, made.affine),
        load(found[0]) if found else None,
    )


def ways(ants: Any, moving: Image, fixed: Image, to_template: Path, folder: Path) -> list[Any]:
    """RAS map from the anchor to the scan and seconds: through the template, and directly."""
    image = template_image(TEMPLATE, 2.0)
    template = image.get_fdata(dtype=np.float32), image.affine
    pair = (moving.data, moving.affine)
    began = time.perf_counter()
    alone = register_rigid(ants, template, pair, "Rigid", folder, moving.mask)
    seconds = time.perf_counter() - began
    ants.write_transform(alone, str(folder / "alone.txt"))
    back = np.linalg.inv(read_affine(ants, to_template))
    found = [(read_affine(ants, folder / "alone.txt") @ back, seconds)]
    began = time.perf_counter()
    path = register_scans(ants, (fixed.data, fixed.affine), pair, fixed.mask, folder)
    return [*found, (read_affine(ants, path), time.perf_counter() - began)]


def white_matter(ants: Any, one: Any, two: Any, way: Any, folder: Path) -> tuple[float, float]:
    """Distance of the centres (mm) and Dice overlap of the white matter of both label images."""
    path = write_affine(ants, way, folder / "way.txt")
    images = [to_ants(ants, *labels) for labels in (one, two)]
    moved = ants.apply_transforms(*images, [path], interpolator="nearestNeighbor").numpy()
    first, second = one[0] == WHITE_MATTER, moved == WHITE_MATTER
    gap = one[1][:3, :3] @ (np.argwhere(first).mean(0) - np.argwhere(second).mean(0))
    return (
        float(np.linalg.norm(gap)),
        float(2 * (first & second).sum() / (first.sum() + second.sum())),
    )


def line(scan: Scan, bids_dir: Path, out_dir: Path) -> list[float]:
    """Measure one scan, print its line and return its figures."""
    anchor = scan.anchor
    assert anchor is not None
    moving, fixed = (read(s, bids_dir, out_dir) for s in (scan, anchor))
    to_template = derivative_path(
        out_dir, anchor, from_=anchor.suffix, to=TEMPLATE, extension=".txt"
    )
    with tempfile.TemporaryDirectory() as name, ants_session(1, 0, name) as ants:
        folder = Path(name)
        (old, old_seconds), (new, new_seconds) = ways(ants, moving, fixed, to_template, folder)
        index = np.argwhere(fixed.mask)[::97]
        points = fixed.affine @ np.c_[index, np.ones(len(index))].T
        differ = np.linalg.norm(((old - new) @ points)[:3], axis=0)
        path = write_affine(ants, new, folder / "new.txt")
        masks = (fixed.mask, fixed.affine), (moving.mask, moving.affine)
        overlap = mask_overlap(ants, *masks, path, folder)
        truth = [float("nan")] * 4
        if moving.labels and fixed.labels:
            scores = [
                white_matter(ants, fixed.labels, moving.labels, w, folder) for w in (old, new)
            ]
            truth = [scores[0][0], scores[1][0], scores[0][1], scores[1][1]]
    figures = [
        float(differ.mean()),
        float(differ.max()),
        overlap,
        *truth,
        old_seconds,
        new_seconds,
    ]
    show(scan.stem, figures)
    return figures


def used(scan: Scan, out_dir: Path) -> bool:
    """Whether a scan has an anchor, and none of both was refused."""
    return scan.anchor is not None and all(
        derivative_path(out_dir, s, desc="brain", suffix="mask").is_file()
        for s in (scan, scan.anchor)
    )


def show(name: str, figures: list[float]) -> None:
    """One line of the table; two figures: by itself -> with the anchor."""
    mean, most, overlap, *truth, old, new = figures
    ways = f"{mean:5.2f} (max {most:5.2f})  {overlap:.3f}"
    centres = f"{truth[0]:5.2f} -> {truth[1]:5.2f}"
    dice = f"{truth[2]:.3f} -> {truth[3]:.3f}"
    print(f"{name:33} {ways}  {centres}  {dice}  {old:4.1f} -> {new:4.1f}", flush=True)


def main() -> None:
    """Read the arguments, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bids_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--participants", nargs="*")
    options = parser.parse_args()
    chosen = ["--participant-label", *options.participants] if options.participants else []
    done = subprocess.run(
        [sys.executable, "-m", "bids_harmony", options.bids_dir, options.out_dir, "participant",
         "--level", "minimal", "--omp-nthreads", "1", "-w", options.out_dir / "work", *chosen],
        check=False,
    )  # fmt: skip
    if done.returncode not in (ExitCode.OK, ExitCode.DATA):
        raise SystemExit(done.returncode)
    scans, _ = find_scans(
        options.bids_dir, participants=options.participants, sessions=None,
        modalities=MODALITIES, filters=None, site_from=None,
    )  # fmt: skip
    print(HEAD)
    rows = [line(s, options.bids_dir, options.out_dir) for s in scans if used(s, options.out_dir)]
    if not rows:
        raise SystemExit(f"{options.bids_dir}: no T2w or FLAIR with a T1w in its session")
    show(f"median of {len(rows)}", list(np.median(rows, axis=0)))
    worst = np.max(np.array(rows)[:, :5], axis=0)
    print(f"farthest: ways differ {worst[1]:.2f}; WM centres {worst[3]:.2f} -> {worst[4]:.2f} mm")


if __name__ == "__main__":
    main()
