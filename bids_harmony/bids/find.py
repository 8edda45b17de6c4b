"""Find the raw scans of the participants asked for, and nothing else.

Only the subject trees asked for are read: the time does not grow with the size of the data set.
Folders such as ``sourcedata``, ``derivatives`` and ``code`` are never entered, and symbolic links
are never resolved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bids_harmony.bids.database import files_in_database
from bids_harmony.bids.entities import IMAGE_EXTENSIONS, name_fault, split_name
from bids_harmony.bids.filters import Filters, check_filters, passes, read_labels
from bids_harmony.bids.scan import MODALITIES, Scan, ScanProblem, with_anchors
from bids_harmony.bids.sidecar import SidecarReader
from bids_harmony.bids.sites import SiteFinder
from bids_harmony.errors import (
    DatasetError,
    MissingInputError,
    NothingSelectedError,
    ScanError,
    UsageError,
)

FEW = 20


def check_dataset(bids_dir: Path) -> list[str]:
    """Check what makes a folder a raw BIDS data set.

    Returns
    -------
    warnings
        Sentences about what is missing but not needed.

    Raises
    ------
    MissingInputError
        If the folder does not exist.
    DatasetError
        If ``dataset_description.json`` is missing, broken, without BIDSVersion, or that of
        derivatives.
    """
    if not bids_dir.is_dir():
        what = "is not a folder" if bids_dir.exists() else "does not exist (not mounted?)"
        raise MissingInputError(f"the BIDS folder {bids_dir} {what}")
    path = bids_dir / "dataset_description.json"
    description = read_description(bids_dir)
    kind = str(description.get("DatasetType", "raw"))
    if kind == "derivative":
        raise DatasetError(
            f"{path}: DatasetType is 'derivative'; give the raw data set, and this one with "
            "--derivatives"
        )
    if kind not in ("raw", "study"):
        raise DatasetError(f"{path}: DatasetType '{kind}' is not raw")
    if not description.get("BIDSVersion"):
        raise DatasetError(f'{path}: BIDSVersion is missing; add e.g. "BIDSVersion": "1.10.0"')
    return [] if description.get("Name") else [f"{path}: Name is missing; BIDS requires it"]


def read_description(bids_dir: Path) -> dict[str, Any]:
    """Content of ``dataset_description.json``.

    Raises
    ------
    DatasetError
        If it is missing or broken.
    """
    path = bids_dir / "dataset_description.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        if path.is_symlink():
            raise DatasetError(f"{path}: content not present: run `datalad get {path}`") from error
        raise DatasetError(
            f"{bids_dir} has no dataset_description.json; is this the root of a BIDS data set? "
            'If so, add one with {"Name": "...", "BIDSVersion": "1.10.0"}'
        ) from error
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as JSON ({error}); repair it") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path} is not a JSON object ({{...}}); repair it")
    return content


def find_scans(
    bids_dir: Path,
    *,
    participants: Sequence[str] | None,
    sessions: Sequence[str] | None,
    modalities: Sequence[str],
    filters: Filters | None,
    site_from: str | None,
    database: Path | None = None,
) -> tuple[list[Scan], list[ScanProblem]]:
    """Find the scans of the participants asked for, with their metadata and sites.

    Parameters
    ----------
    bids_dir
        Root of the raw data set.
    participants, sessions
        Labels with or without ``sub-``/``ses-``, or text files with one per line; None takes all.
        With `sessions`, scans without a session are left out.
    modalities
        Suffixes, e.g. ``("T1w", "FLAIR")``.
    filters
        Content of a ``--bids-filter-file``.
    site_from
        Where the site stands; see `bids_harmony.bids.sites`.
    database
        Folder of a pybids database to use, created when it is not there; None reads the folders.

    Returns
    -------
    scans, problems
        Both sorted by participant and path. A scan with a problem is not among the scans.

    Raises
    ------
    UsageError
        If a participant is not in the data set or a filter is not understood.
    NothingSelectedError
        If there is neither a scan nor a problem.
    """
    root = bids_dir.absolute()
    check_filters(filters or {})
    wanted_sessions = read_labels(sessions, "ses")
    subjects = _subjects(root, read_labels(participants, "sub"))
    sidecars = SidecarReader(root)
    sites = SiteFinder(root, site_from)
    listing = files_in_database(root, database) if database is not None else None
    scans: list[Scan] = []
    problems: list[ScanProblem] = []
    for subject in subjects:
        files = listing.get(subject, []) if listing is not None else _subject_files(root, subject)
        files = [(s, p) for s, p in files if wanted_sessions is None or s in wanted_sessions]
        every, faults = _select(subject, files, _with_earlier(modalities), filters)
        faults = [f for f in faults if _modality(f.path) in modalities]
        asked = any(scan.suffix in modalities for scan in every)
        if not asked and not faults and participants is not None:
            faults = _nothing_left(root, subject, modalities, alone=len(subjects) == 1)
        found, broken = _described(every if asked else [], sidecars, sites)
        scans += [scan for scan in with_anchors(found) if scan.suffix in modalities]
        faults += [f for f in broken if _modality(f.path) in modalities]
        problems += sorted(faults, key=lambda fault: fault.path)
        sidecars.forget(root / f"sub-{subject}")
    sites.check_used()
    if not scans and not problems:
        raise NothingSelectedError(_nothing(root, participants, sessions, modalities, filters))
    return scans, problems


def _with_earlier(modalities: Sequence[str]) -> Sequence[str]:
    """Also the modalities before them: a scan that was not asked for can be the anchor of one."""
    last = max((MODALITIES.index(m) for m in modalities if m in MODALITIES), default=-1)
    return (*MODALITIES[: last + 1], *(m for m in modalities if m not in MODALITIES))


def _described(
    scans: Iterable[Scan], sidecars: SidecarReader, sites: SiteFinder
) -> tuple[list[Scan], list[ScanProblem]]:
    """Scans with their metadata and sites, and those of which a sidecar or table is broken."""
    good, broken = [], []
    for scan in scans:
        try:
            scan = replace(scan, metadata=sidecars.metadata(scan))
            label, source = sites.site(scan)
            good.append(replace(scan, site=label, site_source=source))
        except ScanError as error:
            broken.append(ScanProblem(scan.path, scan.subject, str(error)))
    return good, broken


def _subjects(root: Path, participants: list[str] | None) -> list[str]:
    """Participants to read; all of the data set when none is named."""
    if participants is None:
        return _available(root)
    missing = [label for label in participants if not (root / f"sub-{label}").is_dir()]
    if missing:
        names = ", ".join(f"sub-{label}" for label in missing)
        there = _available(root)
        if not there:
            known = "it has no participants"
        elif len(there) <= FEW:
            known = "it has " + ", ".join(f"sub-{label}" for label in there)
        else:
            known = f"it has {len(there)} others"
        raise UsageError(f"{names} not in {root}: {known} (not mounted? misspelt?)")
    return sorted(participants)


def _available(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(e.name[4:] for e in entries if e.name.startswith("sub-") and e.is_dir())
    except OSError as error:
        raise MissingInputError(f"cannot list {root}: {error.strerror}") from error


def _subject_files(root: Path, subject: str) -> list[tuple[str | None, Path]]:
    """All files in the participant's ``anat`` folders, each with its session."""
    top = root / f"sub-{subject}"
    files: list[tuple[str | None, Path]] = [(None, p) for p in _names(top / "anat")]
    for folder in _names(top):
        if folder.name.startswith("ses-"):
            files += [(folder.name[4:], p) for p in _names(folder / "anat")]
    return files


def _names(folder: Path) -> Iterator[Path]:
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208 (os.listdir is far cheaper than iterdir)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise MissingInputError(f"cannot list {folder}: {error.strerror}") from error
    for name in names:
        yield folder / name


def _select(
    subject: str,
    files: Iterable[tuple[str | None, Path]],
    modalities: Sequence[str],
    filters: Filters | None,
) -> tuple[list[Scan], list[ScanProblem]]:
    """Scans of one participant that are left, and what is wrong with the others."""
    scans: dict[str, Scan] = {}
    problems: list[ScanProblem] = []
    for session, path in files:
        scan, fault = _candidate(subject, session, path, modalities, filters)
        if fault is not None:
            problems.append(ScanProblem(path, subject, f"{path}: {fault}"))
        if scan is None:
            continue
        twin = scans.get(f"{path.parent}/{scan.stem}")
        if twin is not None:
            text = f"{twin.path} and {path.name} are the same scan twice; remove one of them"
            problems.append(ScanProblem(twin.path, subject, text))
        scans[f"{path.parent}/{scan.stem}"] = scan
    bad = {(p.path.parent, split_stem(p.path)) for p in problems}
    good = []
    for scan in scans.values():
        if (scan.path.parent, split_stem(scan.path)) in bad:
            continue
        fault = content_fault(scan.path)
        if fault is None:
            good.append(scan)
        else:
            problems.append(ScanProblem(scan.path, subject, f"{scan.path}: {fault}"))
    return good, problems


def split_stem(path: Path) -> str:
    """File name without its extensions."""
    return path.name.split(".", 1)[0]


def _modality(path: Path) -> str:
    """Suffix of a file's name, be it a BIDS name or not."""
    return split_stem(path).split("_")[-1]


def _candidate(
    subject: str,
    session: str | None,
    path: Path,
    modalities: Sequence[str],
    filters: Filters | None,
) -> tuple[Scan | None, str | None]:
    if not path.name.endswith(IMAGE_EXTENSIONS) or path.name.startswith("."):
        return None, None
    parsed = split_name(path.name)
    if parsed is None:
        # Not key-value pairs: only worth a message when it claims to be one of our modalities.
        ours = _modality(path) in modalities
        return None, ("not a BIDS name; rename the file" if ours else None)
    if parsed.suffix not in modalities or parsed.extension not in IMAGE_EXTENSIONS:
        return None, None
    # Phase, real and imaginary images have no brain contrast to harmonize.
    if parsed.entities.get("part", "mag") != "mag" or not passes(parsed, filters):
        return None, None
    fault = name_fault(parsed, subject, session)
    if fault is not None:
        return None, fault
    return Scan(path, parsed.entities, parsed.suffix), None


def content_fault(path: Path) -> str | None:
    """Say why the content of a file cannot be read; None when its first bytes can."""
    try:
        with path.open("rb") as stream:
            start = stream.read(32)
    except FileNotFoundError:
        if path.is_symlink():
            return f"content not present: run `datalad get {path}`"
        return "no such file; if --bids-database-dir is in use, delete that folder to rebuild it"
    except OSError as error:
        return f"cannot be read ({error.strerror}); check its permissions"
    if not start:
        return "the file is empty; copy or download it again"
    if start.startswith((b"/annex/objects/", b".git/annex", b"../.git/annex")):
        return f"content not present: run `datalad get {path}`"
    return None


def _nothing_left(
    root: Path, subject: str, modalities: Sequence[str], *, alone: bool
) -> list[ScanProblem]:
    """What to tell about a participant who was asked for by name and has no scan."""
    folder = root / f"sub-{subject}"
    if next(_names(folder), None) is None:
        text = f"{folder} is empty; in a DataLad data set run `datalad get -n {folder}`"
        return [ScanProblem(folder, subject, text)]
    if alone:
        return []
    text = f"{folder}: no {'/'.join(modalities)} scan is left by the labels and filters"
    return [ScanProblem(folder, subject, text)]


def _nothing(
    root: Path,
    participants: Sequence[str] | None,
    sessions: Sequence[str] | None,
    modalities: Sequence[str],
    filters: Mapping[str, Any] | None,
) -> str:
    asked = [f"modalities {', '.join(modalities)}"]
    if participants is not None:
        asked.append(f"participants {', '.join(map(str, participants))}")
    if sessions is not None:
        asked.append(f"sessions {', '.join(map(str, sessions))}")
    if filters:
        asked.append("a BIDS filter")
    return f"no scan selected in {root} by {'; '.join(asked)}: loosen them or check the names"
