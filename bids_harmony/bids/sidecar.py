"""Metadata of a scan after the BIDS inheritance principle, with lexical paths only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bids_harmony.bids.entities import split_name
from bids_harmony.bids.scan import Scan
from bids_harmony.errors import ScanError


class SidecarReader:
    """Read sidecars of scans below one data set root; listings and files are read once.

    Parameters
    ----------
    bids_dir
        Root of the raw data set.
    """

    def __init__(self, bids_dir: Path) -> None:
        self._root = bids_dir
        self._listings: dict[Path, list[str]] = {}
        self._inherited: dict[Path, dict[str, Any]] = {}

    def metadata(self, scan: Scan) -> dict[str, Any]:
        """Merge all JSON files that apply to `scan`: the nearer to the scan, the stronger.

        A file applies when it lies in the scan's folder or above it, has the scan's suffix and no
        entity that the scan lacks. Of two in one folder (which BIDS forbids) the one with more
        entities is stronger.

        Raises
        ------
        ScanError
            If a file that applies is missing its content, broken or not a JSON object.
        """
        merged: dict[str, Any] = {}
        for folder in self._folders(scan):
            for name in self._applicable(folder, scan):
                merged.update(self._read(folder / name, own=folder == scan.path.parent))
        return merged

    def forget(self, folder: Path) -> None:
        """Drop what was kept of `folder` and below; keeps memory flat over large data sets."""
        for kept in (self._listings, self._inherited):
            for path in [p for p in kept if p.is_relative_to(folder)]:
                del kept[path]

    def _folders(self, scan: Scan) -> list[Path]:
        folders = [self._root, self._root / f"sub-{scan.subject}"]
        if scan.session is not None:
            folders.append(folders[-1] / f"ses-{scan.session}")
        return [*folders, scan.path.parent]

    def _applicable(self, folder: Path, scan: Scan) -> list[str]:
        if folder not in self._listings:
            with os.scandir(folder) as entries:
                self._listings[folder] = [e.name for e in entries if e.name.endswith(".json")]
        found = []
        for name in self._listings[folder]:
            if not name.endswith(f"{scan.suffix}.json"):
                continue
            parsed = split_name(name)
            if parsed is None or parsed.suffix != scan.suffix:
                continue
            if parsed.entities.items() <= scan.entities.items():
                found.append((len(parsed.entities), name))
        return [name for _, name in sorted(found)]

    def _read(self, path: Path, *, own: bool) -> dict[str, Any]:
        if path in self._inherited:
            return self._inherited[path]
        content = read_sidecar(path)
        if not own:
            self._inherited[path] = content
        return content


def read_sidecar(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises
    ------
    ScanError
        Naming the file and the cure.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ScanError(f"{path}: content not present: run `datalad get {path}`") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ScanError(f"{path}: cannot be read ({error}); check the file") from error
    if text.startswith("/annex/objects/"):
        raise ScanError(f"{path}: content not present: run `datalad get {path}`")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ScanError(f"{path}: broken JSON ({error}); repair the sidecar") from error
    if not isinstance(content, dict):
        raise ScanError(f"{path}: not a JSON object ({{...}}); repair the sidecar")
    return content
