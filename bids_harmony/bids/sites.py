"""Which site a scan comes from, and where that is written.

The first source that gives a label wins:

1. ``--site-from``: a column name (looked for in scans.tsv, sessions.tsv, participants.tsv),
   ``sidecar:KEY[,KEY]``, or a TSV file with ``participant_id``, optionally ``session_id``, and
   ``site``;
2. the column ``site`` (or ``scanner``) of scans.tsv, sessions.tsv, participants.tsv, in this
   order;
3. the sidecar: Manufacturer, ManufacturersModelName, MagneticFieldStrength and StationName (or
   InstitutionName);
4. ``n/a``.

Empty cells and ``n/a`` are passed over. Labels stay text: site ``01`` is not site ``1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bids_harmony.bids.scan import UNKNOWN_SITE, Scan
from bids_harmony.errors import DatasetError, MissingInputError, ScanError, UsageError

SITE_COLUMNS = ("site", "scanner")
IDENTITY_KEYS = ("Manufacturer", "ManufacturersModelName", "StationName", "InstitutionName")
NOTHING = "nothing tells the site"


class SiteFinder:
    """Find the site of scans of one data set; every table is read once.

    Parameters
    ----------
    bids_dir
        Root of the raw data set.
    site_from
        Value of ``--site-from`` or None.

    Raises
    ------
    MissingInputError
        If `site_from` is a TSV file that does not exist.
    UsageError
        If that file lacks a needed column, or ``sidecar:`` names no key.
    """

    def __init__(self, bids_dir: Path, site_from: str | None = None) -> None:
        self._root = bids_dir
        self._kept: dict[Path, Table] = {}
        self._keys: tuple[str, ...] = ()
        self._column: str | None = None
        self._table: Path | None = None
        self._column_seen = False
        self._columns_there: set[str] = set()
        if site_from is not None:
            self._read_option(site_from.strip())

    def _read_option(self, option: str) -> None:
        if option.startswith("sidecar:"):
            self._keys = tuple(k.strip() for k in option[8:].split(",") if k.strip())
            if not self._keys:
                raise UsageError("--site-from sidecar: names no key, e.g. sidecar:StationName")
        elif option.endswith(".tsv") or "/" in option:
            self._table = Path(option)
            if not self._table.is_file():
                raise MissingInputError(f"--site-from: the table {option} does not exist")
            columns = self._open(self._table, "participant_id").columns
            if "participant_id" not in columns or _pick(columns, SITE_COLUMNS) is None:
                raise UsageError(
                    f"--site-from: {option} needs the columns participant_id and site"
                )
        elif option:
            self._column = option
        else:
            raise UsageError("--site-from is empty; give a column, sidecar:KEY or a TSV file")

    def site(self, scan: Scan) -> tuple[str, str]:
        """Site label of a scan (``n/a`` when nothing tells it) and where it was found.

        Raises
        ------
        ScanError
            If a table gives the scan two sites.
        """
        if self._table is not None:
            found = self._from_participants(self._table, scan, SITE_COLUMNS)
            if found:
                return found[0], f"{found[1]} (--site-from)"
        if self._keys:
            label = sidecar_label(scan.metadata, self._keys)
            if label:
                return label, f"sidecar {', '.join(self._keys)} (--site-from)"
        if self._column is not None:
            found = self._from_tables(scan, (self._column,))
            if found:
                return found[0], f"{found[1]} (--site-from)"
        found = self._from_tables(scan, SITE_COLUMNS)
        if found:
            return found
        label = scanner_label(scan.metadata)
        return (label, "sidecar scanner description") if label else (UNKNOWN_SITE, NOTHING)

    def check_used(self) -> None:
        """Refuse a ``--site-from`` column that no table has.

        Raises
        ------
        UsageError
            Naming the columns that are there.
        """
        if self._column is not None and not self._column_seen:
            there = ", ".join(sorted(self._columns_there)) or "no column at all"
            raise UsageError(
                f"--site-from {self._column}: no participants.tsv, sessions.tsv or scans.tsv of "
                f"the selected participants has this column; there is {there}"
            )

    def _from_tables(self, scan: Scan, names: tuple[str, ...]) -> tuple[str, str] | None:
        prefix = f"sub-{scan.subject}"
        top = self._root / prefix
        if scan.session is not None:
            folder, stem = top / f"ses-{scan.session}", f"{prefix}_ses-{scan.session}"
        else:
            folder, stem = top, prefix
        file = scan.path.relative_to(folder).as_posix()
        lookups = [(folder / f"{stem}_scans.tsv", "filename", file)]
        if scan.session is not None:
            lookups.append((top / f"{prefix}_sessions.tsv", "session_id", scan.session))
        for path, key, wanted in lookups:
            table = self._open(path, key)
            self._note_columns(table)
            found = _single(path, table, table.rows(wanted), names, scan)
            if found:
                return found
        return self._from_participants(self._root / "participants.tsv", scan, names)

    def _from_participants(
        self, path: Path, scan: Scan, names: tuple[str, ...]
    ) -> tuple[str, str] | None:
        table = self._open(path, "participant_id")
        self._note_columns(table)
        rows = table.rows(scan.subject)
        if "session_id" in table.columns and rows:
            exact = [r for r in rows if _bare(r["session_id"]) == (scan.session or "")]
            rows = exact or [r for r in rows if not _bare(r["session_id"])]
        return _single(path, table, rows, names, scan)

    def _note_columns(self, table: Table) -> None:
        self._columns_there.update(table.columns)
        if self._column is not None and _pick(table.columns, (self._column,)) is not None:
            self._column_seen = True

    def _open(self, path: Path, key: str) -> Table:
        if path not in self._kept:
            self._kept[path] = Table.read(path, key)
        return self._kept[path]


class Table:
    """A TSV file as rows by the bare label (no ``sub-``/``ses-``) in one of its columns."""

    def __init__(self, columns: tuple[str, ...], lines: dict[str, list[str]]) -> None:
        self.columns = columns
        self._lines = lines

    def rows(self, label: str) -> list[dict[str, str]]:
        """Rows of one label; lines are split only now, so that long tables stay cheap."""
        empty = dict.fromkeys(self.columns, "")
        return [
            empty | dict(zip(self.columns, line.split("\t"), strict=False))
            for line in self._lines.get(_bare(label), [])
        ]

    @classmethod
    def read(cls, path: Path, key: str) -> Table:
        """Read `path`; a missing file is an empty table.

        Raises
        ------
        DatasetError
            If it cannot be read as a table.
        """
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            if path.is_symlink():
                raise DatasetError(
                    f"{path}: content not present: run `datalad get {path}`"
                ) from None
            return cls((), {})
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{path} cannot be read ({error}); repair the table") from error
        columns = tuple(c.strip() for c in lines[0].split("\t")) if lines else ()
        by_label: dict[str, list[str]] = {}
        if key not in columns:
            return cls(columns, by_label)
        place = columns.index(key)
        for line in lines[1:]:
            cells = line.split("\t", place + 1)
            if len(cells) > place:
                by_label.setdefault(_bare(cells[place]), []).append(line)
        return cls(columns, by_label)


def sidecar_label(metadata: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """Join the values of some sidecar keys; None when none is there."""
    parts = [_text(key, metadata.get(key)) for key in keys]
    return " ".join(part for part in parts if part) or None


def scanner_label(metadata: Mapping[str, Any]) -> str | None:
    """Describe the scanner; None when only the field strength, or nothing, is known."""
    station = "StationName" if _text("", metadata.get("StationName")) else "InstitutionName"
    if not any(_text("", metadata.get(key)) for key in IDENTITY_KEYS):
        return None
    return sidecar_label(
        metadata, ("Manufacturer", "ManufacturersModelName", "MagneticFieldStrength", station)
    )


def _text(key: str, value: Any) -> str:
    if value is None or isinstance(value, Mapping | list):
        return ""
    if key == "MagneticFieldStrength" and isinstance(value, int | float):
        return f"{value:g}T"
    text = " ".join(str(value).split())
    return "" if text.lower() == "n/a" else text


def _bare(label: str) -> str:
    """Label without entity prefix; file names are left as they are; empty for ``n/a``."""
    text = label.strip()
    if text.lower() == "n/a":
        return ""
    if "/" in text:
        return text
    return text.removeprefix("sub-").removeprefix("ses-")


def _pick(columns: tuple[str, ...], names: tuple[str, ...]) -> str | None:
    """First of `names` among the columns, whatever the case."""
    for name in names:
        for column in columns:
            if column.lower() == name.lower():
                return column
    return None


def _single(
    path: Path, table: Table, rows: list[dict[str, str]], names: tuple[str, ...], scan: Scan
) -> tuple[str, str] | None:
    """First site of some rows, and where it stands."""
    for name in names:
        column = _pick(table.columns, (name,))
        if column is None:
            continue
        labels = dict.fromkeys(_text("", row[column]) for row in rows)
        found = [label for label in labels if label]
        if len(found) > 1:
            raise ScanError(
                f"{path}: {scan.stem} has several values of '{column}' ({', '.join(found)}); keep "
                "one row each, or give --site-from a table with session_id"
            )
        if found:
            return found[0], f"{path.name} column {column}"
    return None
