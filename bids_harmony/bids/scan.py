"""One raw scan and what the data set says about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    """

    path: Path
    entities: Mapping[str, str]
    suffix: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    site: str = UNKNOWN_SITE
    site_source: str = "nothing tells the site"

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
