"""Find a scan's tissue labels in the user's derivatives, and say what their numbers mean.

A number means nothing by itself: 2 is white matter in FreeSurfer and in fMRIPrep, grey matter in
FSL FAST and here. Labels are therefore taken only when a lookup table, the name of the file or
the pipeline that made them tells their numbering, and only under the rules for masks (see
`derivatives`): with exactly the scan's entities, and surely in its space.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from bids_harmony.bids.derivatives import first_file, grid_note, read_quietly, wrong_space
from bids_harmony.bids.entities import IMAGE_EXTENSIONS, split_name
from bids_harmony.bids.names import derivative_path, strip_extension
from bids_harmony.bids.scan import Scan
from bids_harmony.errors import ScanError

#: In the order of the numbers 1, 2, 3 that stand for them everywhere in this package.
TISSUES = ("CSF", "GM", "WM")
BACKGROUND = "BG"
#: desc- labels of a segmentation that has FreeSurfer's numbers.
FREESURFER_LABELS = ("aseg", "aparcaseg", "wmparc", "synthseg")
#: desc- labels that are looked for, in order; None is a segmentation without desc-.
DSEG_LABELS = (None, "brain", *FREESURFER_LABELS)
#: Numbers of the common labels in BIDS Derivatives; 11, the whole cerebellum, is no one tissue.
STANDARD = dict(enumerate(("BG", "GM", "WM", "CSF", "BG", "BG", "BG", "WM", "GM", "GM", "WM")))
_SHORT = {"BG": "BG", "CSF": "CSF", "GM": "GM", "CGM": "GM", "SGM": "GM", "WM": "WM", "L": "WM"}
_WORDS = {
    "CSF": r"\bcsf\b|cerebro ?spinal ?fluid|cerebral ?spinal ?fluid|ventricle",
    "GM": r"\bgm\b|gr[ae]y ?matter",
    "WM": r"\bwm\b|\bwmh\b|white ?matter|lesion|hyperintensit",
    BACKGROUND: r"\bbackground\b",
}
#: Pattern of the name of a pipeline, and the numbering of its dseg.
_PIPELINES = ((r"^[fs]mriprep$", "bids"), (r"muse|nichart", "muse"))
_NUMBERING = {
    "bids": "BIDS common labels",
    "freesurfer": "FreeSurfer labels",
    "muse": "MUSE labels",
}


@dataclass(frozen=True)
class TissueLabels:
    """Tissue labels of one scan.

    Attributes
    ----------
    files
        ``{"dseg": path}``, or probability maps ``{"CSF": path, "GM": path, "WM": path}``; in the
        scan's world space, perhaps on another grid.
    mapping
        Tissue (CSF, GM or WM) of each number of a dseg; every other number is background. Empty
        for probability maps.
    source
        In words: name of the derivative folder, kind of file and table, e.g.
        ``phantom: dseg, labels of dseg.tsv``.
    """

    files: Mapping[str, Path]
    mapping: Mapping[int, str]
    source: str


def find_tissue_labels(
    scan: Scan, folders: Mapping[str, Path]
) -> tuple[TissueLabels | None, list[str]]:
    """Look for tissue labels of `scan`; the first folder that has usable ones wins.

    Parameters
    ----------
    scan
        The raw scan.
    folders
        Derivative data sets by name, in order of preference.

    Returns
    -------
    The labels, or None where nothing is safe to use, and sentences about what was looked for or
    refused and why.
    """
    notes: list[str] = []
    for name, folder in folders.items():
        candidates = [*_dsegs(scan, folder), *_probsegs(scan, folder)]
        if not candidates:
            notes.append(f"{name}: nothing for {scan.stem}; {_looked_for(scan, folder)}")
        for found, label in candidates:
            try:
                told = _check_place(scan, folder, found)
                mapping, kind, more = _meaning(scan, folder, found, label)
            except ScanError as error:
                notes.append(f"{name}: {error}")
                continue
            notes += [f"{name}: {text}" for text in (*told, *more)]
            return TissueLabels(found, mapping, f"{name}: {kind}"), notes
    return None, notes


def read_table(path: Path) -> dict[int, str]:
    """Read a BIDS lookup table of a segmentation.

    Parameters
    ----------
    path
        Table with the columns ``index`` and ``name``, perhaps ``abbreviation`` and ``mapping``
        (number among the common labels of BIDS Derivatives).

    Returns
    -------
    For each number CSF, GM, WM, BG for background, or an empty string where nothing tells the
    tissue: neither the abbreviation, nor the mapping, nor a name that FreeSurfer or MUSE uses,
    nor words in the name.

    Raises
    ------
    ScanError
        If the file cannot be read, lacks a column or has an index that is no whole number.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ScanError(f"{path}: content not present: run `datalad get {path}`") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ScanError(f"{path}: cannot be read ({error}); check the file") from error
    if text.startswith("/annex/objects/"):
        raise ScanError(f"{path}: content not present: run `datalad get {path}`")
    table: dict[int, str] = {}
    rows = _rows(text)
    if rows and not {"index", "name"} <= rows[0].keys():
        raise ScanError(f"{path}: a lookup table needs the columns index and name; add them")
    for row in rows:
        index = _whole(row["index"])
        if index is None:
            raise ScanError(f"{path}: index {row['index']!r} is no whole number; repair the row")
        table[index] = BACKGROUND if index == 0 else _tissue_of(row)
    return table


def _dsegs(scan: Scan, folder: Path) -> Iterator[tuple[dict[str, Path], str | None]]:
    """Existing segmentations with exactly the scan's entities, each with its desc- label."""
    for label in DSEG_LABELS:
        path = first_file(_names(scan, folder, f"_desc-{label}_dseg" if label else "_dseg"))
        if path is not None:
            yield {"dseg": path}, label


def _probsegs(scan: Scan, folder: Path) -> Iterator[tuple[dict[str, Path], None]]:
    """Probability maps, when there is one of each tissue."""
    maps = {tissue: first_file(_map_names(scan, folder, tissue)) for tissue in TISSUES}
    there = {tissue: path for tissue, path in maps.items() if path is not None}
    if len(there) == len(TISSUES):
        yield there, None


def _map_names(scan: Scan, folder: Path, tissue: str) -> Iterable[Path]:
    return _names(scan, folder, f"_label-{tissue}_probseg")


def _names(scan: Scan, folder: Path, ending: str) -> Iterator[Path]:
    """Paths to try; the suffix kept in the name can only mean this scan, so it comes first."""
    for stem in (scan.stem, scan.stem.removesuffix(f"_{scan.suffix}")):
        for extension in IMAGE_EXTENSIONS:
            yield folder / scan.folder / f"{stem}{ending}{extension}"


def _check_place(scan: Scan, folder: Path, found: Mapping[str, Path]) -> list[str]:
    """Refuse files that may not be in the space of the scan; else tell of another grid.

    Raises
    ------
    ScanError
        Why they are refused.
    """
    # The preprocessed scan of the same name tells the raw scans where the labels do not.
    preproc = first_file(
        derivative_path(folder, scan, desc="preproc", extension=extension)
        for extension in IMAGE_EXTENSIONS
    )
    beside = {} if preproc is None else {"preproc": preproc}
    told = []
    for path in found.values():
        fault = wrong_space(scan, folder, {"mask": path, **beside})
        if fault is not None:
            raise ScanError(f"{path.name} not used for {scan.stem}: {fault}")
        note = grid_note(scan, path)
        if note is not None and not note[0]:
            raise ScanError(note[1])
        if note is not None:
            told.append(note[1])
    return told


def _meaning(
    scan: Scan, folder: Path, found: Mapping[str, Path], label: str | None
) -> tuple[dict[int, str], str, list[str]]:
    """Tissue of each number, kind of file and table in words, and what is worth telling.

    Raises
    ------
    ScanError
        If nothing tells the numbering, or a tissue is missing.
    """
    path = found.get("dseg")
    if path is None:
        return {}, "label-CSF, label-GM and label-WM probseg", []
    table = _nearest_table(scan, folder, path, label)
    cure = f"add {folder / 'dseg.tsv'} with the columns index and name (GM, WM, CSF)"
    if table is not None:
        rows, words = read_table(table), f"labels of {table.name}"
    else:
        numbering = "freesurfer" if label in FREESURFER_LABELS else _numbering(folder)
        if numbering is None:
            raise ScanError(f"nothing tells what the numbers of {path.name} mean; {cure}")
        rows, words = _by_number(numbering), _NUMBERING[numbering]
    mapping = {index: tissue for index, tissue in rows.items() if tissue in TISSUES}
    missing = [tissue for tissue in TISSUES if tissue not in mapping.values()]
    if missing:
        cure = "name its tissues there" if table is not None else cure
        raise ScanError(f"{path.name}: {words} have no {' and no '.join(missing)}; {cure}")
    notes = []
    unknown = [str(index) for index, tissue in rows.items() if not tissue]
    # FreeSurfer's own table lists a thousand structures that are not in these files.
    if unknown and label not in FREESURFER_LABELS:
        some = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        notes.append(f"{path.name}: {words} tell no tissue of {some}, taken as background")
    kind = f"desc-{label}_dseg" if label else "dseg"
    return mapping, f"{kind}, {words}", notes


def _nearest_table(scan: Scan, folder: Path, path: Path, label: str | None) -> Path | None:
    """Lookup table after BIDS inheritance: beside the image, else nearest above it."""
    own = path.with_name(f"{strip_extension(path.name)}.tsv")
    if own.is_file() or own.is_symlink():
        return own
    entities = {**scan.entities, **({"desc": label} if label else {})}
    for level in (path.parent, *path.parent.parents):
        fitting = []
        for table in level.glob("*dseg.tsv"):
            parsed = split_name(table.name)
            if parsed is None or parsed.suffix != "dseg":
                continue
            if parsed.entities.items() <= entities.items():
                fitting.append((len(parsed.entities), table))
        if fitting:
            return max(fitting)[1]
        if level == folder:
            break
    return None


def _numbering(folder: Path) -> str | None:
    """Numbering of the pipeline that made a data set; None for one that is not known."""
    description = folder / "dataset_description.json"
    content = read_quietly(description) if description.is_file() else {}
    made = content.get("GeneratedBy", [])
    for entry in [*(made if isinstance(made, list) else []), content.get("PipelineDescription")]:
        name = str(entry.get("Name", "")) if isinstance(entry, dict) else ""
        for pattern, numbering in _PIPELINES:
            if re.search(pattern, name.strip(), flags=re.IGNORECASE):
                return numbering
    return None


def _by_number(numbering: str) -> dict[int, str]:
    if numbering == "bids":
        return STANDARD
    return {index: tissue for index, _, tissue in _shipped(numbering)}


@cache
def _shipped(numbering: str) -> tuple[tuple[int, str, str], ...]:
    """Index, name and tissue of each row of a table in the package."""
    text = (files("bids_harmony.data") / "labels" / f"{numbering}.tsv").read_text(encoding="utf-8")
    return tuple((int(row["index"]), row["name"], row["tissue"]) for row in _rows(text))


@cache
def _known_names() -> dict[str, str]:
    """Tissue of each name in the shipped tables; FreeSurfer's come before MUSE's."""
    return {
        _letters(name): tissue
        for numbering in ("muse", "freesurfer")
        for _, name, tissue in _shipped(numbering)
    }


def _tissue_of(row: Mapping[str, str]) -> str:
    """Tissue that a row of a lookup table tells, or an empty string."""
    short = row.get("abbreviation", "").upper()
    if short in _SHORT:
        return _SHORT[short]
    standard = _whole(row.get("mapping", ""))
    if standard in STANDARD:
        return STANDARD[standard]
    # A known name before its words: FreeSurfer's non-WM-hypointensities are grey matter.
    known = _known_names().get(_letters(row["name"]))
    if known is not None:
        return known
    text = re.sub(r"[^a-z0-9]+", " ", row["name"].lower())
    told = [tissue for tissue, words in _WORDS.items() if re.search(words, text)]
    return told[0] if len(told) == 1 else ""


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _whole(text: str) -> int | None:
    """Whole number written as ``3`` or ``3.0``; None for any other text."""
    match = re.fullmatch(r"(-?\d+)(\.0*)?", text)
    return int(match[1]) if match else None


def _rows(text: str) -> list[dict[str, str]]:
    """Rows of a tab-separated table; a cell that is not there is empty."""
    reader = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE, restval="")
    return [{k.strip(): v.strip() for k, v in row.items() if isinstance(v, str)} for row in reader]


def _looked_for(scan: Scan, folder: Path) -> str:
    stem = scan.stem.removesuffix(f"_{scan.suffix}")
    looked = f"looked for {scan.folder}/{stem}_dseg.nii.gz and the probseg of {', '.join(TISSUES)}"
    if not folder.is_dir():
        return f"{looked} in {folder}, which does not exist"
    endings = [f"_desc-{label}_dseg" if label else "_dseg" for label in DSEG_LABELS]
    endings += [f"_label-{tissue}_probseg" for tissue in TISSUES]
    names = (path for ending in endings for path in _names(scan, folder, ending))
    gone = next((path for path in names if path.is_symlink() and not path.is_file()), None)
    if gone is not None:
        return f"content not present: run `datalad get {gone}`"
    looked += f" in {folder}"
    lacking = [t for t in TISSUES if first_file(_map_names(scan, folder, t)) is None]
    if len(lacking) < len(TISSUES):
        looked += f"; there is no label-{' and no label-'.join(lacking)} probseg"
    near = sorted((folder / f"sub-{scan.subject}").glob("**/*_dseg.nii*"))
    near = [path for path in near if "_space-" not in path.name]
    if near:
        there = ", ".join(path.relative_to(folder).as_posix() for path in near[:3])
        looked += f"; there is {there}, whose entities are not those of the scan"
    return looked
