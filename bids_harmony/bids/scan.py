"""One raw scan and what the data set says about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

UNKNOWN_SITE = "n/a"
MODALITIES = ("T1w", "T2w", "FLAIR")


@dataclass(frozen=True)
class Scan:
    """A raw scan, the unit of work: scans are never averaged or mixed.

    Attributes
    ----------
    path
        Absolute path as the user sees it; symbolic links are not resolved.
    entities
        BIDS entities in file-name order without suffix and extension, short keys:
        ``{"sub": "01", "ses": "1", "acq": "x", "run": "1"}``.
    suffix
        Modality: ``T1w``, ``T2w`` or ``FLAIR``.
    metadata
        Sidecar content after BIDS inheritance.
    site, site_source
        Site label (``n/a`` when nothing tells it) and where it was found, in words.
    anchor
        Scan of the session that this one is registered to, and with it to the template; None when
        it is registered to the template itself. See `with_anchors`.
    """

    path: Path
    entities: Mapping[str, str]
    suffix: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    site: str = UNKNOWN_SITE
    site_source: str = "nothing tells the site"
    anchor: Scan | None = None

    @property
    def subject(self) -> str:
        """Participant label without ``sub-``."""
        return self.entities["sub"]

    @property
    def session(self) -> str | None:
        """Session label without ``ses-``, or None."""
        return self.entities.get("ses")

    @property
    def stem(self) -> str:
        """File name without extension, e.g. ``sub-01_ses-1_acq-x_T1w``."""
        return "_".join([*(f"{k}-{v}" for k, v in self.entities.items()), self.suffix])

    @property
    def folder(self) -> str:
        """Folder below the data set root, e.g. ``sub-01/ses-1/anat``."""
        session = f"/ses-{self.session}" if self.session else ""
        return f"sub-{self.subject}{session}/anat"


@dataclass(frozen=True)
class ScanProblem:
    """A scan that cannot be used, found before any voxel is read."""

    path: Path
    subject: str
    message: str

    @property
    def stem(self) -> str:
        """File name without extension."""
        return self.path.name.split(".")[0]


def first_of_session(scan: Scan, modality: str, pool: Iterable[Scan]) -> Scan | None:
    """First scan (by path) of a modality in the session of a scan, if its site is not another."""
    fitting = [
        other
        for other in pool
        if other.suffix == modality
        and (other.subject, other.session) == (scan.subject, scan.session)
        and (other.site == scan.site or UNKNOWN_SITE in (other.site, scan.site))
    ]
    return min(fitting, key=lambda other: other.path, default=None)


def with_anchors(scans: Sequence[Scan]) -> list[Scan]:
    """Each scan with its anchor: the session's T1w, or its T2w for a FLAIR without T1w.

    The scans of a session then lie on each other in the template space better than if each went
    there by itself. An anchor has none itself.

    Parameters
    ----------
    scans
        Of one participant, in any order, which is kept.
    """
    free: list[Scan] = []
    anchors: dict[Path, Scan | None] = {}
    for modality in MODALITIES:
        mine = [scan for scan in scans if scan.suffix == modality]
        for scan in mine:
            found = (first_of_session(scan, m, free) for m in MODALITIES if m != modality)
            anchors[scan.path] = next((anchor for anchor in found if anchor), None)
        free += [scan for scan in mine if anchors[scan.path] is None]
    return [replace(scan, anchor=anchors[scan.path]) for scan in scans]
