"""Seconds and memory that the methods by example need for a scan of 1 mm.

    python -m benchmarks.example_seconds [--models M ...] [--repeats R] [--work DIR]

after ``python -m benchmarks.run by-example``, whose models it uses. A simulated scan of 1 mm is
preprocessed once; what is timed is the whole command that then harmonizes it, report included.
Baseline in the same run: histogram matching of the same scan.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.data import need
from benchmarks.page import write_plain_page
from benchmarks.tables.by_example import FAR
from benchmarks.trials import letters
from bids_harmony.errors import HarmonyError
from bids_harmony.phantom.dataset import write_phantom

ROOT = Path(__file__).parent.parent
MODELS = ("histogram-matching", "hail-to-mprage3-by-one", "calamiti")
GOALS = (30, 4)  # seconds, GiB
_PERSON = 61


def run(folder: Path, threads: int, *arguments: str) -> tuple[float, float]:
    """Run the command on the scan; wall seconds, and the largest process in GiB.

    Raises
    ------
    HarmonyError
        If it failed.
    """
    command = [
        sys.executable, "-m", "bids_harmony", str(folder / "bids"), str(folder / "out"),
        "participant", "--skip-bids-validation", "--nprocs", str(threads),
        "--work-dir", str(folder / "nipype"), *arguments,
    ]  # fmt: skip
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        text = process.stdout.read().decode() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise HarmonyError(f"participant left with {process.returncode}: {text.strip()}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def measure(folder: Path, model: Path, threads: int, repeats: int) -> tuple[float, float]:
    """Median wall seconds, and most memory in GiB, of harmonizing the scan anew."""
    desc = f"{letters(model.name)}{int(time.time())}"
    found = [
        run(folder, threads, "--model", str(model), "--desc", f"{desc}x{k}")
        for k in range(repeats)
    ]
    return statistics.median(s for s, _ in found), max(gib for _, gib in found)


def main() -> None:
    """Simulate, preprocess, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "benchmarks")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    work = options.work.absolute()
    models = need(work / "by-example" / "out" / "models")
    folder = work / "example-seconds"
    if not (folder / "bids").is_dir():
        shutil.rmtree(folder / "draft", ignore_errors=True)
        write_phantom(folder / "draft", subjects=1, first=_PERSON, sites=(FAR,))
        (folder / "draft").rename(folder / "bids")
    before, _ = run(folder, options.threads, "--level", "minimal")
    lines = [f"- threads: {options.threads}, median of {options.repeats}", ""]
    base = 0.0
    for name in options.models:
        seconds, memory = measure(folder, need(models / name), options.threads, options.repeats)
        base = base or seconds
        lines.append(
            f"- {name}: {seconds:.1f} s, {seconds / base:.1f} times {options.models[0]}; "
            f"largest process {memory:.2f} GiB"
        )
    lines += [
        "",
        f"Preprocessing before that took {before:.0f} s, if it was not there yet. Goals: "
        f"{GOALS[0]} s and {GOALS[1]} GiB.",
    ]
    write_plain_page(
        options.out / "example-seconds.md",
        "Seconds of the methods by example",
        "The whole command for one preprocessed phantom scan of 1 mm, start of the program and "
        "report included, with models of `by-example` (preset cpu, 2 mm).",
        "python -m benchmarks.example_seconds",
        lines,
    )


if __name__ == "__main__":
    main()
