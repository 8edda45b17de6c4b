"""The few values that the graphs are built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from bids_harmony._version import __version__
from bids_harmony.bids.derivatives import Precomputed
from bids_harmony.bids.scan import UNKNOWN_SITE, Scan
from bids_harmony.config import ADAPT_SCANS
from bids_harmony.imaging.templates import OutputSpace
from bids_harmony.interfaces.files import sha256
from bids_harmony.methods.base import NATIVE_GRID, Contract
from bids_harmony.reports.boilerplate import methods_text
from bids_harmony.workflows.engine import Engine

EARLIER_RUN = "earlier run of bids_harmony"


@dataclass(frozen=True)
class Preprocessing:
    """How scans are made comparable before any method sees them.

    Attributes
    ----------
    template, template_file
        Name, and its brain at 2 mm, for registration and report.
    skull_strip
        ``auto``, ``skip`` or ``force``.
    bias_field
        Correct it with N4.
    sloppy
        Coarse registration, for tests.
    threads, seed
        Per process, and of every random draw.
    """

    template: str
    template_file: Path
    skull_strip: str = "auto"
    bias_field: bool = True
    sloppy: bool = False
    threads: int = 1
    seed: int = 0

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the voxels; derivatives with another fingerprint are not reused."""
        return {
            "Version": __version__,
            "Antspyx": version("antspyx"),
            "Template": self.template,
            "SkullStrip": self.skull_strip,
            "BiasField": "N4" if self.bias_field else "not corrected (--ignore bias-field)",
            "Sloppy": self.sloppy,
            "Threads": self.threads,
            "Seed": self.seed,
        }


@dataclass(frozen=True)
class SegmentationFile:
    """A segmentation network whose entropy bounds adaptations.

    Attributes
    ----------
    path
        Absolute.
    sha256
        First 12 hexadecimal digits.
    """

    path: Path
    sha256: str


@dataclass(frozen=True)
class AdaptTo:
    """What a trained method is adapted to before it harmonizes a scan.

    Attributes
    ----------
    scope
        ``site``: the adaptation in `folder`; ``scan``: the scan itself; ``none``.
    why
        In words; empty for methods that do not adapt.
    folder, hash
        Stored adaptation of the site and its checksum; empty before it was made.
    by
        Checksum of the segmentation network that bounds the adaptation to a scan, if any; that
        to a site has its own.
    """

    scope: Literal["none", "site", "scan"] = "none"
    why: str = ""
    folder: str = ""
    hash: str = ""
    by: str = ""

    @property
    def key(self) -> str:
        """What decides the voxels."""
        by = f"segmentation {self.by}" if self.by else ""
        return " ".join(word for word in (self.scope, self.hash, by) if word)


@dataclass(frozen=True)
class Anchor:
    """The scan of the session that a scan is registered to, preprocessed.

    Attributes
    ----------
    name
        Stem of the scan.
    path
        The raw scan.
    mask
        Its brain mask, on its grid.
    to_template
        Its way to the template, linear.
    gigabytes
        Memory that one step on it needs.
    bias_field
        On the coarse grid; None when bias fields are not corrected.
    """

    name: str
    path: Path
    mask: Path
    to_template: Path
    gigabytes: float
    bias_field: Path | None = None


@dataclass(frozen=True)
class Other:
    """A scan of another modality of the same session, with which a scan is harmonized.

    Attributes
    ----------
    scan
        The raw scan.
    made_of
        What decides its voxels on the model's grid, in words.
    stem
        Path without extension of its stored volume; None before it was made.
    """

    scan: Scan
    made_of: str
    stem: Path | None = None


@dataclass(frozen=True)
class Target:
    """The fitted method and the reference domain it leads to.

    Attributes
    ----------
    method, title, citations
        From the method's card.
    bundle, name, hash
        Folder of the model bundle, its name and checksum.
    why
        Why this bundle was chosen, in words.
    reference
        Reference domain, in words.
    contract
        What the method wants to be given.
    grid_file
        Template image on the contract's grid; None on the native grid.
    output_scale, reference_quantiles
        Per modality: scale of the reference domain (as a dict), and its in-brain quantiles.
    device
        Where the method runs.
    memory_gb
        Memory that the method needs beside the scan.
    training_sites
        Sites that training has seen.
    adapt
        ``site``, ``scan`` or ``none`` as asked for; empty for methods that do not adapt.
    adapt_scans
        How many scans of a site are adapted to.
    adaptations
        Stored adaptation by (site, modality).
    segmentation
        Network that bounds adaptations, if any.
    options
        Values of the method's own options for harmonizing a scan.
    segments
        Whether the method gives tissues too.
    others
        By stem of a scan, and modality: with what it is harmonized, if the contract asks for it.
    """

    method: str
    title: str
    citations: tuple[str, ...]
    bundle: Path
    name: str
    hash: str
    why: str
    reference: str
    contract: Contract
    output_scale: Mapping[str, Any]
    reference_quantiles: Mapping[str, list[float]]
    grid_file: Path | None = None
    device: str = "cpu"
    memory_gb: float = 0.0
    training_sites: tuple[str, ...] = ()
    adapt: str = ""
    adapt_scans: int = ADAPT_SCANS
    adaptations: Mapping[tuple[str, str], AdaptTo] = field(default_factory=dict)
    segmentation: SegmentationFile | None = None
    options: Mapping[str, float] = field(default_factory=dict)
    segments: bool = False
    others: Mapping[str, Mapping[str, Other]] = field(default_factory=dict)

    @property
    def device_kind(self) -> str:
        """``cpu`` or ``cuda``: which of several equal GPUs it is changes no voxel."""
        return self.device.partition(":")[0]

    @property
    def adapt_words(self) -> str:
        """How it adapts, as the command line says it."""
        words = [self.adapt]
        if self.adapt == "site" and self.adapt_scans != ADAPT_SCANS:
            words.append(f"--adapt-scans {self.adapt_scans}")
        if self.segmentation is not None:
            words.append(f"--adapt-segmentation (sha256 {self.segmentation.sha256})")
        return " ".join(words)

    def adapt_to(self, site: str, modality: str) -> AdaptTo:
        """What the method is adapted to for the scans of a site."""
        if not self.adapt:
            return AdaptTo()
        if self.adapt == "none":
            return AdaptTo("none", "asked for with --adapt none")
        by = self.segmentation.sha256 if self.segmentation else ""
        if self.adapt == "scan":
            return AdaptTo("scan", "asked for with --adapt scan", by=by)
        if site == UNKNOWN_SITE:
            return AdaptTo("scan", "the site of the scan is unknown", by=by)
        if site in self.training_sites:
            return AdaptTo("none", "training has seen the site")
        made = AdaptTo("site", "training has not seen the site")
        return self.adaptations.get((site, modality), made)

    def text(self, prep: Preprocessing) -> str:
        """Methods text for a paper."""
        return methods_text(prep.fingerprint, self.title, self.reference, self.adapt)

    @property
    def native_grid(self) -> bool:
        """Whether the method works on the scan's own voxels."""
        return self.contract.grid == NATIVE_GRID


@dataclass(frozen=True)
class Place:
    """Where things are read and written.

    Attributes
    ----------
    desc
        Label of the harmonized scans.
    spaces
        Output spaces; ``native`` is one of them or not.
    space_files
        Template image of each space that is not native, by (name, res).
    """

    bids_dir: Path
    out_dir: Path
    work_dir: Path
    desc: str
    spaces: tuple[OutputSpace, ...] = (OutputSpace("native"),)
    space_files: Mapping[tuple[str, str], Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What the scans of a run have in common.

    Attributes
    ----------
    prep, place
        How they are preprocessed, and where things lie.
    folders
        Derivatives that the user named.
    engine
        What runs the graphs.
    clean
        Remove work files as soon as they are not needed.
    """

    prep: Preprocessing
    place: Place
    folders: Mapping[str, Path]
    engine: Engine
    clean: bool


def scan_settings(
    scan: Scan, prep: Preprocessing, target: Target, place: Place, given: Precomputed
) -> dict[str, Any]:
    """What decides a harmonized scan's voxels; it opens the sidecar's record."""
    adapt = target.adapt_to(scan.site, scan.suffix)
    together = {m: other.made_of for m, other in target.others.get(scan.stem, {}).items()}
    theirs = given.to_template and given.sources.get("to_template") != EARLIER_RUN
    return {
        **prep.fingerprint,
        "Method": target.method,
        "ModelName": target.name,
        "ModelHash": target.hash,
        "ModelChoice": target.why,
        "Reference": target.reference,
        "Device": target.device_kind,
        **({"Adapt": adapt.key} if target.adapt else {}),
        **({"MethodOptions": dict(target.options)} if target.options else {}),
        **({"Together": together} if together else {}),
        "Site": scan.site,
        "SiteSource": scan.site_source,
        "GivenMask": "" if own_mask(given, place.out_dir) else _named(given, "mask", given.mask),
        **({"Lesions": _named(given, "lesions", given.lesions)} if given.lesions else {}),
        "Registration": _named(given, "to_template", given.to_template)
        if theirs
        else registration_words(given, prep.template),
        "OutputSpaces": [f"{s.name}:res-{s.res}" if s.res else s.name for s in place.spaces],
    }


def registration_words(given: Precomputed, template: str) -> str:
    """How a scan goes to the template when no transform of the user's takes it there."""
    if given.registered_to:
        return f"rigid to {given.registered_to}, and with it to {template}"
    return f"rigid to {template}"


def own_mask(given: Precomputed, out_dir: Path) -> bool:
    """Whether the mask, if any, is an earlier run's and not the user's."""
    return given.mask is None or out_dir in given.mask.parents


def given_files(given: Precomputed, out_dir: Path) -> dict[str, str]:
    """The user's own mask and transform, with checksums; empty when there are none."""
    theirs = {}
    if not own_mask(given, out_dir):
        theirs["mask"] = _named(given, "mask", given.mask)
    if given.to_template and out_dir not in given.to_template.parents:
        theirs["to_template"] = _named(given, "to_template", given.to_template)
    return theirs


def _named(given: Precomputed, kind: str, path: Path | None) -> str:
    """Source and checksum of a given file: a mask that was mended is another mask."""
    return f"{given.sources.get(kind, '')} (sha256 {sha256(path)[:12]})" if path else ""
