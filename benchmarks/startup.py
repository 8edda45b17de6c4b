"""How long it takes to find the scans of one participant in a large data set.

Makes a skeleton data set (2 sessions x T1w and T2w, each with a sidecar) in a temporary folder,
times `find_scans` for one participant and for all, and compares both with pybids' own layout:

    python benchmarks/startup.py [--participants 10000] [--baseline-participants 1000]

Times are those of the calls alone: imports are done before and told apart. The first call for one
participant comes right after the skeleton is written, so the disk cache is warm; a network file
system with a cold cache is slower in proportion to the files read, which are counted too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODALITIES = ("T1w", "T2w")
SESSIONS = ("1", "2")


def main() -> int:
    """Run the benchmark; exit status 1 when finding one participant takes 2 s or more."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--participants", type=int, default=10_000)
    parser.add_argument(
        "--baseline-participants",
        type=int,
        default=1_000,
        help="size of the data set that pybids indexes as a whole (minutes at 10000)",
    )
    options = parser.parse_args()
    imports = timed(load)[0]
    print(f"imports of find_scans: {imports:.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "large"
        made = timed(lambda: skeleton(large, options.participants))[0]
        print(f"skeleton of {options.participants} participants written in {made:.0f} s")
        one = report_one(large, options.participants)
        every = timed(lambda: find(large, None))
        print(f"find_scans, all {options.participants}: {every[0]:.2f} s, {every[1]} scans")
        report_baseline(Path(folder) / "small", large, options.baseline_participants, one)
    return int(one >= 2)


def load() -> None:
    """Import what finding scans needs, pybids not among it."""
    from bids_harmony.bids import find  # noqa: F401

    if "bids" in sys.modules:
        raise RuntimeError("finding scans must not import pybids")


def report_one(root: Path, participants: int) -> float:
    """Time one participant: the first call, and the median of ten."""
    label = f"{participants // 2:05d}"
    first, scans = timed(lambda: find(root, [label]))
    again = sorted(timed(lambda: find(root, [label]))[0] for _ in range(10))[5]
    print(f"find_scans, 1 of {participants}: first {first:.3f} s, median {again:.4f} s")
    if scans != len(SESSIONS) * len(MODALITIES):
        raise RuntimeError(f"{scans} scans were found")
    return first


def report_baseline(small: Path, large: Path, participants: int, one: float) -> None:
    """Time pybids: one participant by ignoring the others, and a whole smaller data set."""
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    label = "00005"

    def ignoring_others() -> int:
        import re

        pattern = re.compile(rf"^/sub-(?!{label}(/|$))")
        indexer = BIDSLayoutIndexer(validate=False, ignore=[pattern])
        return len(BIDSLayout(large, validate=False, indexer=indexer).get(suffix=MODALITIES))

    seconds, count = timed(ignoring_others)
    print(f"pybids, 1 of the large set, others ignored: {seconds:.2f} s, {count} files")
    print(f"  ratio to find_scans: {seconds / one:.0f}")
    skeleton(small, participants)
    ours = timed(lambda: find(small, None))[0]
    for metadata in (False, True):
        indexer = BIDSLayoutIndexer(validate=False, index_metadata=metadata)
        seconds = timed(lambda i=indexer: len(BIDSLayout(small, validate=False, indexer=i).files))[
            0
        ]
        kind = "with metadata" if metadata else "without metadata"
        print(f"pybids, all of {participants}, {kind}: {seconds:.2f} s")
        print(f"  ratio to find_scans with metadata ({ours:.2f} s): {seconds / ours:.1f}")


def find(root: Path, participants: list[str] | None) -> int:
    """Number of scans that `find_scans` gives."""
    from bids_harmony.bids.find import find_scans

    scans, problems = find_scans(
        root,
        participants=participants,
        sessions=None,
        modalities=MODALITIES,
        filters=None,
        site_from=None,
    )
    if problems:
        raise RuntimeError(problems[0].message)
    if any(scan.metadata != {"EchoTime": 0.003, "Manufacturer": "A"} for scan in scans):
        raise RuntimeError("a sidecar was not read")
    return len(scans)


def skeleton(root: Path, participants: int) -> None:
    """Write the data set; images and sidecars are hard links to one small file each."""
    root.mkdir(parents=True)
    description = {"Name": "skeleton", "BIDSVersion": "1.10.0"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    contents = {".nii.gz": root / "image", ".json": root / "sidecar"}
    contents[".nii.gz"].write_bytes(b"\x1f\x8b" + bytes(100))
    contents[".json"].write_text('{"EchoTime": 0.003, "Manufacturer": "A"}')
    labels = [f"{number:05d}" for number in range(participants)]
    (root / "participants.tsv").write_text(
        "participant_id\tsite\n" + "".join(f"sub-{n}\tS{int(n) % 5}\n" for n in labels)
    )
    for label in labels:
        for session in SESSIONS:
            folder = root / f"sub-{label}/ses-{session}/anat"
            folder.mkdir(parents=True)
            for modality in MODALITIES:
                for extension, content in contents.items():
                    name = f"sub-{label}_ses-{session}_{modality}{extension}"
                    os.link(content, folder / name)
    for content in contents.values():
        content.unlink()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    sys.exit(main())
