"""Several processes on one OUT_DIR, and a run that is killed: nothing is ever half written."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from conftest import call, quick, snapshot

from bids_harmony.interfaces.files import load


def start(*argv) -> subprocess.Popen:
    """The command in a process group of its own."""
    command = [sys.executable, "-m", "bids_harmony", *map(str, argv)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def check_files(out: Path) -> None:
    """Every file can be read to its end."""
    for path in (p for p in out.rglob("*") if p.is_file()):
        if path.name.endswith(".nii.gz"):
            assert np.isfinite(load(path)[0]).all(), path
        elif path.suffix == ".json":
            assert isinstance(json.loads(path.read_text()), dict), path
        elif path.suffix == ".tsv":
            rows = list(csv.reader(path.read_text().splitlines(), delimiter="\t"))
            assert len({len(row) for row in rows}) == 1, path
        elif path.suffix == ".html" and path.parent == out:
            text = path.read_text()
            HTMLParser().feed(text)
            assert text.rstrip().endswith("</html>"), path


def test_eight_runs_share_an_output_folder(tiny, transforms, tmp_path):
    """Four participants, each twice, all of whom find that the reference must be fitted first."""
    out = tmp_path / "out"
    runs = []
    for number in range(8):
        label = f"0{number % 4 + 1}"
        options = ["--reference", "A", "--participant-label", label]
        options += quick(tmp_path / f"work{number}", transforms)
        runs.append(start(tiny.root, out, "participant", *options))
    told = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * 8, told
    check_files(out)
    assert len(list(out.glob("sub-0?.html"))) == 4
    assert len(list(out.glob("sub-*/anat/*_desc-harmonized_T1w.nii.gz"))) == 4
    assert not list(out.rglob("*.tmp"))
    assert sum("fitting nyul on A first" in text for text in told) == 1
    hashes = {
        json.loads(p.read_text())["Harmonization"]["ModelHash"]
        for p in out.glob("sub-*/anat/*_desc-harmonized_T1w.json")
    }
    assert len(hashes) == 1
    table = (out / "descriptions.tsv").read_text().splitlines()
    assert len(table) == len(set(table))


def test_a_killed_run_resumes(tiny, bundle, transforms, tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    argv = [tiny.root, out, "participant", "--model", bundle, *quick(work, transforms)]
    run = start(*argv)
    first = out / "sub-01" / "figures" / "sub-01_desc-harmonized_T1w.html"
    deadline = time.monotonic() + 200
    while not first.is_file() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    told = run.communicate()[0]
    assert run.returncode == -signal.SIGKILL, told
    check_files(out)
    again = call(*argv)
    assert again.code == 0, again.out + again.err
    assert "skipped: done by an earlier run" in again.line("sub-01_T1w")
    assert ": harmonized" in again.line("sub-04_T1w")
    check_files(out)
    whole = tmp_path / "whole"
    argv[1] = whole
    argv[argv.index(str(work))] = str(tmp_path / "work2")
    assert call(*argv, "--participant-label", "04").code == 0
    for name, (digest, _) in snapshot(whole / "sub-04" / "anat").items():
        assert snapshot(out / "sub-04" / "anat")[name][0] == digest, name
