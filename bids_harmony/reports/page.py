"""One HTML file per participant, put together from one fragment per scan.

Fragments are self-contained sections. Each carries its own row of the summary table in ``data-*``
attributes, so that the page can be rebuilt at any time from the fragments that lie on disk, by
whichever job ends last.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import jinja2
from markupsafe import Markup, escape

from bids_harmony.errors import OutputError
from bids_harmony.reports import figures as fig
from bids_harmony.reports import geometry as geo
from bids_harmony.reports.inputs import Metric, ScanReport, Status

LOG_LINES = 60


@dataclass(frozen=True)
class SummaryRow:
    """One row of the table at the top of the page."""

    anchor: str
    stem: str
    desc: str
    status: str
    method: str
    site: str
    warnings: int
    errors: int
    worse: int


@dataclass(frozen=True)
class Picture:
    """An embedded picture: data URI, alternative text, title, caption."""

    uri: str
    alt: str
    title: str
    caption: str


def render_fragment(report: ScanReport) -> str:
    """HTML section of one harmonized scan, pictures embedded.

    Returns
    -------
    str
        ``<section>...</section>``; the same text for the same input.
    """
    scene = fig.make_scene(report)
    verdicts = [verdict(metric) for metric in report.metrics]
    pairs = zip(report.metrics, verdicts, strict=True)
    return (
        _environment()
        .get_template("scan.html.jinja")
        .render(
            r=report,
            anchor=anchor(report.stem, report.desc),
            pictures=_pictures(report, scene),
            obliquity=geo.obliquity_degrees(report.affine),
            verdicts=verdicts,
            worse=[metric.name for metric, word in pairs if word == "worse"],
            sidecar=json.dumps(
                report.sidecar, indent=2, sort_keys=True, default=str, ensure_ascii=False
            ),
        )
    )


def render_failure(
    stem: str,
    message: str,
    log_excerpt: str = "",
    *,
    status: Status = "failed",
    desc: str = "",
    input_name: str = "",
    method: str = "",
    site: str = "n/a",
) -> str:
    """HTML section of a scan that was refused (before any voxel was read) or failed (on the way).

    Parameters
    ----------
    stem
        Input file name without extension.
    message
        What is wrong and the cure, one line.
    log_excerpt
        Text of the log; its last 60 lines are shown.
    """
    return (
        _environment()
        .get_template("failure.html.jinja")
        .render(
            stem=stem,
            anchor=anchor(stem, desc),
            message=message,
            log="\n".join(log_excerpt.splitlines()[-LOG_LINES:]),
            status=status,
            desc=desc,
            input_name=input_name,
            method=method,
            site=site,
        )
    )


def render_page(
    subject: str,
    fragments: Sequence[str],
    *,
    version: str,
    command_line: str = "",
    errors: Sequence[str] = (),
    methods: str = "",
    citations: Sequence[str] = (),
    generated: str = "",
    dataset: str = "",
) -> str:
    """Page of one participant.

    Parameters
    ----------
    subject
        Label without ``sub-``.
    fragments
        From `render_fragment` and `render_failure`; shown in the order of their scans' names.
    version
        Of this package.
    command_line
        How the run was started.
    errors
        Errors of the run that belong to no single scan.
    methods, citations
        Boilerplate for a paper and its references.
    generated
        Free words for the foot, e.g. a date; nothing is added by itself: pages are reproducible.
    dataset
        Name of the data set.

    Raises
    ------
    OutputError
        If a fragment is damaged, i.e. not a whole section of this module.
    """
    found = sorted(
        ((summary_row(text), text) for text in fragments), key=lambda pair: pair[0].anchor
    )
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            subject=subject,
            rows=[row for row, _ in found],
            sections=[Markup(text) for _, text in found],
            version=version,
            command_line=command_line,
            errors=list(errors),
            methods=methods,
            citations=list(citations),
            generated=generated,
            dataset=dataset,
        )
    )


def anchor(stem: str, desc: str = "") -> str:
    """Identifier of a scan's section, distinct for distinct stem and desc."""
    name = f"{stem}_desc-{desc}" if desc else stem
    safe = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    if safe == name:
        return f"scan-{safe}"
    return f"scan-{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class _SectionReader(HTMLParser):
    """Takes the attributes of the first section."""

    def __init__(self) -> None:
        super().__init__()
        self.attributes: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the attributes of the first ``<section>``."""
        if tag == "section" and not self.attributes:
            self.attributes = {key: value or "" for key, value in attrs}


def summary_row(fragment: str) -> SummaryRow:
    """Row of the summary table that a fragment carries.

    Raises
    ------
    OutputError
        If the fragment is cut short or not a scan's section.
    """
    reader = _SectionReader()
    reader.feed(fragment[: fragment.find(">", fragment.find("<section")) + 1])
    try:
        if not fragment.rstrip().endswith("</section>"):
            raise KeyError("</section>")
        got = reader.attributes
        return SummaryRow(
            got["id"],
            got["data-stem"],
            got.get("data-desc", ""),  # fragments of older versions do not say
            got["data-status"],
            got["data-method"],
            got["data-site"],
            int(got["data-warnings"]),
            int(got["data-errors"]),
            int(got["data-worse"]),
        )
    except (KeyError, ValueError) as error:
        start = fragment[:60].replace("\n", " ")
        raise OutputError(
            f"report fragment starting {start!r} is damaged (no {error}); delete it and run again"
        ) from error


def verdict(metric: Metric) -> str:
    """``better``, ``worse``, ``unchanged`` (to 4 digits), ``n/a``; empty without direction."""
    before, after = metric.before, metric.after
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return "n/a"
    if metric.good == "none":
        return ""
    if number(before) == number(after):
        return "unchanged"
    return "better" if (after < before) == (metric.good == "lower") else "worse"


def number(value: float | None) -> str:
    """Four significant digits; ``n/a`` for None and non-finite values."""
    if value is None or not math.isfinite(value):
        return "n/a"
    return f"{value:.4g}"


def paragraphs(text: str) -> Markup:
    """Boilerplate as HTML; all but its structure is escaped.

    ``# heading`` and ``- item`` lines; paragraphs apart by blank lines.
    """
    parts: list[Markup] = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        while lines and lines[0].startswith("#"):
            parts.append(Markup("<h4>{}</h4>").format(lines.pop(0).lstrip("# ")))
        if lines and all(line.startswith("- ") for line in lines):
            items = Markup("").join(Markup("<li>{}</li>").format(linked(x[2:])) for x in lines)
            parts.append(Markup("<ul>{}</ul>").format(items))
        elif lines:
            parts.append(Markup("<p>{}</p>").format(linked(" ".join(lines))))
    return Markup("\n").join(parts)


def linked(text: str) -> Markup:
    """Escaped text in which DOI addresses can be clicked (nothing is loaded from them)."""
    pattern = r"(https://doi\.org/[A-Za-z0-9./()_:;<>-]*[A-Za-z0-9/])"
    pieces = re.split(pattern, text)
    return Markup("").join(
        Markup('<a href="{0}" rel="noreferrer">{0}</a>').format(piece) if i % 2 else escape(piece)
        for i, piece in enumerate(pieces)
    )


def _pictures(report: ScanReport, scene: fig.Scene) -> dict[str, Picture]:
    """All pictures of a scan with alternative texts and captions."""
    share = [
        f"{100 * fig.saturated_share(volume.data, scene.mask, scene.window):.1f} %"
        for volume in (scene.before, scene.after)
    ]
    slices = _slices(report)
    pictures = {
        "before": _jpeg(
            fig.draw_before(scene),
            f"{slices} before harmonization",
            "Before",
            f"Brain voxels brighter than white: {share[0]}.",
        ),
        "after": _jpeg(
            fig.draw_after(scene),
            f"{slices} after harmonization, same slices and grey scale",
            "After",
            f"Brain voxels brighter than white: {share[1]}.",
        ),
        "difference": _jpeg(
            fig.draw_difference(scene),
            f"{slices}: change of intensity, red where brighter and blue where darker",
            "After minus before",
            _difference_caption(report, scene),
        ),
        "mask": _jpeg(
            fig.draw_mask(scene),
            f"{slices} with the outline of the brain mask",
            "Brain mask",
            "Outlined on the scan, in a grey scale of its own.",
        ),
    }
    return pictures | _optional_pictures(report, scene)


def _slices(report: ScanReport) -> str:
    return f"Axial, coronal and sagittal slices of {report.stem}"


def _optional_pictures(report: ScanReport, scene: fig.Scene) -> dict[str, Picture]:
    """Pictures whose material may be missing."""
    pictures = {}
    if report.bias is not None:
        pictures["bias"] = _jpeg(
            fig.draw_bias(scene),
            f"Bias field of {report.stem} within the brain mask",
            "Bias field",
            "Multiplicative field that was divided out; 1 means no correction.",
        )
    if report.tissues is not None:
        sizes = [f"{name} {number(v)} mL" for name, v in report.tissue_volumes.items()]
        pictures["tissues"] = _jpeg(
            fig.draw_tissues(scene),
            f"{_slices(report)} after harmonization with outlines of the tissues",
            "Tissues",
            "Segmentation that came with the harmonization: fluid blue, grey matter green, white "
            f"matter orange. Volumes: {', '.join(sizes) or 'not known'}.",
        )
    if report.registration is not None:
        template, scan = fig.draw_registration(report.registration)
        name = report.registration.name or "template"
        line = "Outline: the template's brain, the same in both pictures."
        pictures["template"] = _jpeg(
            template, f"Template {name} with its brain outline", f"Template {name}", line
        )
        pictures["registered"] = _jpeg(
            scan,
            f"{report.stem} on the template grid with the template's brain outline",
            "Scan on the template's grid",
            line,
        )
    if report.histogram is not None:
        pictures["histogram"] = Picture(
            _uri("png", fig.draw_histogram(report.histogram, report.units)),
            "Densities of brain intensities before, after and in the reference domain",
            "Densities",
            "Dashed: before. Solid: after. Filled: reference domain.",
        )
    return pictures


def _difference_caption(report: ScanReport, scene: fig.Scene) -> str:
    """What the difference picture shows, and how large the change is."""
    limit = fig.difference_limit(scene)
    if limit == 0:
        return "Nothing changed: after equals before in every voxel."
    return (
        f"In {report.units}: red is brighter, blue is darker, white is "
        f"unchanged. The scale ends at ±{number(limit)}, the 99th percentile of the absolute "
        "change in the brain; larger changes saturate."
    )


def _jpeg(data: bytes, alt: str, title: str, caption: str) -> Picture:
    return Picture(_uri("jpeg", data), alt, title, caption)


def _uri(kind: str, data: bytes) -> str:
    """Data URI of an encoded picture."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _environment() -> jinja2.Environment:
    """Jinja2 environment: everything escaped, missing names are errors."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bids_harmony", "data/reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {"number": number, "paragraphs": paragraphs, "linked": linked}
    environment.filters.update(filters)
    return environment
