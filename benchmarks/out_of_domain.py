"""Which scans a flow method takes, flags or refuses, by bits per dimension.

    python -m benchmarks.out_of_domain [--methods ...] [--data DIR] [--work DIR] [--out DIR]

after ``python -m benchmarks.run blindharmony-1-3``, whose models (novosibirsk, T1w) it uses. Real
T1w scans of other scanners should pass; other contrasts given as T1w, a brain upside down, with
axes exchanged, an inverted contrast, a simulated CT and noise should not. Writes
``out-of-domain.md``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from benchmarks.data import volume_of
from benchmarks.harness import read
from benchmarks.page import write_plain_page
from bids_harmony.bids.find import find_scans
from bids_harmony.bids.names import derivative_path
from bids_harmony.bids.scan import Scan
from bids_harmony.errors import ScanError
from bids_harmony.imaging.conform import conform
from bids_harmony.imaging.scale import fit_scale
from bids_harmony.interfaces.ants_functions import divide_by_bias
from bids_harmony.methods.base import Volume
from bids_harmony.methods.bundle import load_bundle
from bids_harmony.methods.flow_method import FlowMethod

ROOT = Path(__file__).parent.parent
PEOPLE = ("nov61", "nov63", "frr01", "eli01", "sky01", "all01", "trv01", "ljub12")
METHODS = ("harmonizing-flows", "blindharmony")


def preprocessed(scan: Scan, out_dir: Path) -> Volume:
    """A preprocessed scan, given as T1w whatever it is."""
    raw = conform(scan.path)
    mask = read(derivative_path(out_dir, scan, desc="brain", suffix="mask"))[0] > 0
    field = read(derivative_path(out_dir, scan, desc="n4", suffix="biasfield"))[0]
    data = divide_by_bias(raw.data, raw.affine, field)
    scaled = fit_scale(data, mask, "robust", name=scan.stem).apply(data)
    return volume_of(scan, scaled, mask, raw.affine, "T1w")


def impostors(brain: Volume) -> Iterator[tuple[str, Volume]]:
    """What should not pass, made from a scan of the reference domain."""
    draw = np.random.default_rng(0)

    def filled(values: np.ndarray) -> Volume:
        data = np.where(brain.mask, np.clip(values, 0, None), 0).astype(np.float32)
        return replace(brain, data=data)

    up = brain.axes.index("S") if "S" in brain.axes else brain.axes.index("I")
    front = brain.axes.index("A") if "A" in brain.axes else brain.axes.index("P")
    for name, axes in (("upside down (mirrored)", (up,)), ("upside down (turned)", (up, front))):
        turned = [np.ascontiguousarray(np.flip(v, axes)) for v in (brain.data, brain.mask)]
        yield name, replace(brain, data=turned[0], mask=turned[1])
    exchanged = [np.ascontiguousarray(np.swapaxes(v, up, front)) for v in (brain.data, brain.mask)]
    yield "axes exchanged", replace(brain, data=exchanged[0], mask=exchanged[1])
    yield "inverted contrast", filled(1.1 - brain.data)
    white = draw.standard_normal(brain.data.shape)
    yield "white noise", filled(0.5 + 0.2 * white)
    yield "smooth noise", filled(0.5 + 4 * ndimage.gaussian_filter(white, 2.5))
    grey = np.where(brain.data < 0.35, 0.15, np.where(brain.data < 0.6, 0.55, 0.5))
    yield "CT (simulated)", filled(grey + 0.04 * white)


def verdict(method: FlowMethod, volume: Volume) -> tuple[float, float, str]:
    """Bits of the input and as it is judged, and what the method does with the scan."""
    try:
        done = method.harmonize(volume, seed=0)
    except ScanError as error:
        before, after = method.bits_of(volume)
        known = {"bits per dimension": "refused", "lies turned": "refused (turned)"}
        word = next((w for part, w in known.items() if part in str(error)), str(error))
        return before, after, word
    bits = done.details["bits_per_dimension"]
    word = "flagged" if any("unlike" in w for w in done.warnings) else "taken"
    return bits.get("input", float("inf")), bits["smoothed"], word


def main() -> None:
    """Compute, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "openmulti")
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "benchmarks")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    models = options.work.absolute() / "blindharmony-1-3" / "out" / "models"
    folder = options.work.absolute() / "out-of-domain"
    subprocess.run(
        [sys.executable, "-m", "bids_harmony", str(options.data), str(folder / "out"),
         "participant", "--level", "minimal", "--skip-bids-validation", "--nprocs", "1",
         "--work-dir", str(folder / "work"), "--participant-label", *PEOPLE],
        check=True,
    )  # fmt: skip
    scans, _ = find_scans(
        options.data, participants=list(PEOPLE), sessions=None,
        modalities=("T1w", "T2w", "FLAIR"), filters={}, site_from=None,
    )  # fmt: skip
    volumes = [(f"{s.site}: {s.stem}", preprocessed(s, folder / "out")) for s in scans]
    reference = next(v for name, v in volumes if "nov61" in name)
    volumes += [(f"{name} (nov61)", v) for name, v in impostors(reference)]
    found = {}
    for key in options.methods:
        method = load_bundle(models / key).method
        if not isinstance(method, FlowMethod):
            raise ScanError(f"{models / key}: not a flow method")
        method.place_on("cpu", 1)
        for name, volume in volumes:
            found[name, key] = verdict(method, volume)
            print(key, name, found[name, key], flush=True)
    heads = " | ".join(f"{k}: input | {k}: judged | {k}" for k in options.methods)
    lines = [f"| scan | {heads} |", "|" + "---|" * (1 + 3 * len(options.methods))]
    for name, _ in volumes:
        cells = []
        for key in options.methods:
            before, after, word = found[name, key]
            cells.append(f"{before:.2f} | {after:.2f} | {word}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    write_plain_page(
        options.out / "out-of-domain.md",
        "Out of the reference domain",
        "Bits per dimension under each method's flow (reference domain: nine novosibirsk "
        "scans), of the preprocessed input and after tone curve and blur, and what became of it. "
        "Real scans; the last rows are made of one of them. T2w and FLAIR are given as T1w.",
        f"python -m benchmarks.out_of_domain --methods {' '.join(options.methods)}",
        lines,
    )


if __name__ == "__main__":
    main()
