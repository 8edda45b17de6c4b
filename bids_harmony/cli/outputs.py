"""Files of a run that belong to no single scan: root files, logs, pages."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bids_harmony._version import __version__
from bids_harmony.bids.dataset import container_info, write_dataset
from bids_harmony.bids.scan import Scan, ScanProblem
from bids_harmony.bids.write import atomic_write_text, output_error, write_json
from bids_harmony.config import Config
from bids_harmony.errors import OutputError, UsageError
from bids_harmony.interfaces.report import UNDRAWN
from bids_harmony.reports.boilerplate import citation_markdown
from bids_harmony.reports.page import render_failure, render_page
from bids_harmony.workflows.cohort import Outcome
from bids_harmony.workflows.settings import Preprocessing, Target

LOG = logging.getLogger("bids_harmony")


def prepare_out_dir(out_dir: Path) -> None:
    """Make the output folder and see that it can be written.

    Raises
    ------
    OutputError
        If it cannot.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(out_dir, error) from error
    if not os.access(out_dir, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to {out_dir}; make it writable or name another folder")


def claim_desc(out_dir: Path, desc: str, target: Target, *, write: bool = True) -> None:
    """Keep one label for one model: two models under one ``desc-`` could not be told apart.

    Without `write` the label is only checked.

    Raises
    ------
    UsageError
        If another model has written under this label before.
    """
    path = out_dir / "logs" / f"desc-{desc}.json"
    mine: dict[str, Any] = {
        "Method": target.method,
        "ModelName": target.name,
        "ModelHash": target.hash,
    }
    mine |= {"Adapt": target.adapt_words} if target.adapt else {}
    mine |= {"MethodOptions": dict(target.options)} if target.options else {}
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        if write:
            write_json(path, mine)
        return
    if before != mine and before.get("ModelHash") == target.hash:
        theirs, ours = _settings_words(before, mine), _settings_words(mine, before)
        raise UsageError(
            f"{out_dir} holds scans with {theirs} under desc-{desc}, not {ours}; choose another "
            "--desc or another OUT_DIR"
        )
    if before != mine:
        raise UsageError(
            f"{out_dir} holds scans of model {before.get('ModelName')} "
            f"({before.get('Method')}) under desc-{desc}, not of {target.name}; "
            "choose another --desc or another OUT_DIR"
        )


def _settings_words(claim: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Options of a claim that are not those of another, as the command line says them."""
    words = []
    if claim.get("Adapt") != other.get("Adapt"):
        words.append(f"--adapt {claim.get('Adapt')}")
    if claim.get("MethodOptions") != other.get("MethodOptions"):
        options = claim.get("MethodOptions", {}).items()
        words.append(f"--method-option {' '.join(f'{k}={v:g}' for k, v in options)}")
    return " ".join(words)


def write_root(config: Config, descriptions: Mapping[str, str]) -> None:
    """dataset_description.json, .bidsignore, README, descriptions.tsv."""
    write_dataset(
        config.out_dir,
        config.bids_dir,
        version=__version__,
        desc_descriptions=descriptions,
        container=container_info(os.environ),
    )


def write_logs(
    config: Config,
    run_uuid: str,
    outcomes: Sequence[Outcome] | None,
    prep: Preprocessing | None = None,
    target: Target | None = None,
) -> None:
    """Settings of the run, methods text and, at its end, outcomes and tracebacks."""
    logs = config.out_dir / "logs"
    if outcomes is None or not outcomes:
        atomic_write_text(logs / f"{run_uuid}.toml", config.to_toml())
    if prep is not None and target is not None:
        text = target.text(prep)
        name = "CITATION.md" if config.desc == "harmonized" else f"CITATION_desc-{config.desc}.md"
        atomic_write_text(logs / name, citation_markdown(text, target.citations))
    for outcome in outcomes or ():
        if outcome.status == "failed" and outcome.traceback:
            path = logs / f"crash-{run_uuid}-{outcome.stem}.txt"
            atomic_write_text(path, f"{outcome.message}\n\n{outcome.traceback}\n")


def _figures(out_dir: Path, subject: str) -> Path:
    return out_dir / f"sub-{subject}" / "figures"


class Pages:
    """Writes each participant's page as soon as the last of its scans has an outcome.

    A page has the sections of all of its scans, those of earlier runs too.

    One that cannot be written is tried again by `finish`: the run goes on.

    Parameters
    ----------
    config, prep, target
        Of the run.
    scans, problems
        Of the run.
    """

    def __init__(
        self,
        config: Config,
        prep: Preprocessing,
        target: Target,
        scans: Sequence[Scan],
        problems: Sequence[ScanProblem],
    ) -> None:
        self._config, self._prep, self._target = config, prep, target
        self._scans = {scan.stem: scan for scan in scans}
        expected = [(scan.subject, scan.stem) for scan in scans]
        expected += [(problem.subject, problem.stem) for problem in problems]
        self._left: dict[str, Counter[str]] = {subject: Counter() for subject, _ in expected}
        for subject, stem in expected:
            self._left[subject][stem] += 1
        self._due = set(self._left)
        self._again: list[Outcome] = []

    @property
    def subjects(self) -> list[str]:
        """All who get a page."""
        return sorted(self._left)

    def __call__(self, outcome: Outcome) -> None:
        """Take an outcome; also of a scan that an adaptation needed and the run does not."""
        left = self._left.get(outcome.subject, Counter())
        left[outcome.stem] -= 1
        try:
            self._write_failure(outcome)
            if max(left.values()) <= 0 and outcome.subject in self._due:
                self.write(outcome.subject)
        except (OSError, OutputError) as error:
            self._again.append(outcome)
            LOG.warning(
                "sub-%s: its page waits for the end of the run: %s", outcome.subject, error
            )

    def finish(self) -> None:
        """Write the pages that are left, also of participants whose scans were not all tried.

        Raises
        ------
        OutputError
            If one cannot be written.
        """
        for outcome in self._again:
            self._write_failure(outcome)
        for subject in sorted(self._due):
            self.write(subject)

    def _write_failure(self, outcome: Outcome) -> None:
        """Section of a scan that came to nothing; remove that of an earlier run otherwise."""
        config = self._config
        name = f"{outcome.stem}_desc-{config.desc}.failed.html"
        path = _figures(config.out_dir, outcome.subject) / name
        if outcome.status not in ("refused", "failed"):
            path.unlink(missing_ok=True)
            return
        scan = self._scans.get(outcome.stem)
        html = render_failure(
            outcome.stem,
            outcome.message,
            outcome.traceback[-3000:] if outcome.status == "failed" else "",
            status=outcome.status,
            desc=config.desc,
            method=self._target.title,
            site=scan.site if scan else "n/a",
        )
        atomic_write_text(path, html)

    def write(self, subject: str) -> None:
        """Write one page from the sections that are there.

        Raises
        ------
        OutputError
            If a section is damaged, or the page cannot be written.
        """
        parts = sorted(_figures(self._config.out_dir, subject).glob("*.html"))
        if not parts:
            LOG.warning("sub-%s: nothing to report, no scan of it was harmonized here", subject)
            self._due.discard(subject)
            return
        fragments = [p.read_text() for p in parts]
        for path, fragment in zip(parts, fragments, strict=True):
            if UNDRAWN in fragment:
                LOG.warning("%s: %s", path.stem, UNDRAWN)
        page = render_page(
            subject,
            fragments,
            version=__version__,
            command_line=shlex.join(["bids_harmony", *sys.argv[1:]]),
            methods=self._target.text(self._prep),
            citations=self._target.citations,
            dataset=self._config.bids_dir.name,
        )
        atomic_write_text(self._config.out_dir / f"sub-{subject}.html", page)
        self._due.discard(subject)
