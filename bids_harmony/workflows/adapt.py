"""Adapt a trained method to the sites that its training has not seen, once per site."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from nipype.pipeline.engine import Node, Workflow

from bids_harmony.bids.scan import Scan
from bids_harmony.config import ADAPT_SCANS, ADAPTED, PROGRESS
from bids_harmony.errors import ExitCode, MissingInputError, NothingSelectedError, UsageError
from bids_harmony.interfaces.files import sha256
from bids_harmony.interfaces.harmonize import AdaptToSite
from bids_harmony.methods.adaptation import (
    StoredAdaptation,
    load_adaptation,
    save_adaptation,
)
from bids_harmony.methods.base import Adaptation
from bids_harmony.workflows.cohort import NOT_RUN, Outcome, gigabytes, short_label
from bids_harmony.workflows.engine import run_graph
from bids_harmony.workflows.lock import one_at_a_time
from bids_harmony.workflows.reuse import find_given
from bids_harmony.workflows.scan import model_inputs
from bids_harmony.workflows.settings import AdaptTo, Job, Target, given_files
from bids_harmony.workflows.volumes import store_volumes, volume_key

LOG = logging.getLogger("bids_harmony")
#: Unusable scans are passed over until this many times as many were tried.
_TRIES = 3
_REFUSED = "none of the scans of the site that were tried can be used"

Key = tuple[str, str]  # site, modality


@dataclass(frozen=True)
class Adapting:
    """How sites are adapted to.

    Attributes
    ----------
    target, job
        The trained method, and what the scans of the run have in common.
    find
        Finds all scans of some participants (None: of the whole data set) and a modality,
        whatever was asked for in this run.
    count
        Number of scans to adapt to.
    """

    target: Target
    job: Job
    find: Callable[[Sequence[str] | None, str], list[Scan]]
    count: int = ADAPT_SCANS

    @property
    def settings(self) -> dict[str, Any]:
        """What decides an adaptation, besides model, site and scans."""
        by = self.target.segmentation
        return {
            **volume_key(self.job.prep, self.target.contract),
            "Scans": self.count,
            **({"Segmentation": by.sha256} if by else {}),
        }

    def folder(self, key: Key) -> Path:
        """Where the adaptation to a site is kept; other settings have another folder."""
        site, modality = key
        words = json.dumps([site, self.settings, self.target.device_kind], sort_keys=True)
        label = site if re.fullmatch(r"[A-Za-z0-9_-]{1,40}", site) else "site"
        name = f"{label}_{modality}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
        model = f"{self.target.name}-{self.target.hash[:12]}"
        return self.job.place.out_dir / "models" / ADAPTED / model / name


@dataclass
class _Site:
    """A site that is being adapted to.

    Attributes
    ----------
    key
        Site and modality.
    pool
        Scans that were not tried yet.
    candidates
        How many there were at first.
    volumes
        Scans of this round, and where their volumes are stored.
    tried
        Those of all rounds.
    crashed
        Scans whose preprocessing neither succeeded nor refused them.
    """

    key: Key
    pool: list[Scan]
    candidates: int
    volumes: list[tuple[Scan, Path]] = field(default_factory=list)
    tried: list[tuple[Scan, Path]] = field(default_factory=list)
    crashed: list[Outcome] = field(default_factory=list)


def sites_to_adapt_to(scans: Sequence[Scan], target: Target) -> list[Key]:
    """Site and modality of the scans that need the adaptation to their site, sorted."""
    needed = {(s.site, s.suffix) for s in scans}
    return sorted(key for key in needed if target.adapt_to(*key).scope == "site")


def stored_for(key: Key, adapting: Adapting) -> AdaptTo | None:
    """The adaptation that an earlier run or another job made, if its scans are still the same."""
    folder = adapting.folder(key)
    try:
        found = load_adaptation(folder)
    except MissingInputError:
        return None
    except UsageError as error:
        LOG.warning("%s; it is made again", error)
        return None
    return _adapt_to(folder, found) if _is_current(key, found.facts, adapting) else None


def adapt_to_sites(
    keys: Sequence[Key], adapting: Adapting, on_site: Callable[[Key], None]
) -> tuple[dict[Key, AdaptTo], dict[Key, Outcome], list[Outcome]]:
    """Adapt to each site that was not adapted to before; concurrent jobs wait for one another.

    Parameters
    ----------
    keys
        From `sites_to_adapt_to`.
    on_site
        Called with each site that is adapted to now.

    Returns
    -------
    made, failed, crashed
        Adaptations; for the other sites an outcome with the reason, whose stem is the site; and
        scans whose preprocessing crashed. Their site was adapted to without them, which holds
        for this run only.
    """
    made = {key: found for key in keys if (found := stored_for(key, adapting))}
    lacking = [key for key in keys if key not in made]
    failed: dict[Key, Outcome] = {}
    sites: list[_Site] = []
    with ExitStack() as locks:
        for key in lacking:  # sorted, so that no two jobs wait for each other
            folder = adapting.folder(key)
            locks.enter_context(one_at_a_time(folder.parent, folder.name))
        made |= {key: found for key in lacking if (found := stored_for(key, adapting))}
        if todo := [key for key in lacking if key not in made]:
            for key in todo:
                on_site(key)
            sites = _candidates(todo, adapting)
            failed = _adapt(sites, adapting)
        for site in (site for site in sites if site.key not in failed):
            if site.tried:
                folder = adapting.folder(site.key)
                made[site.key] = _adapt_to(folder, load_adaptation(folder))
            else:
                made[site.key] = AdaptTo("none", _REFUSED)
    return made, failed, [outcome for site in sites for outcome in site.crashed]


def _adapt(sites: Sequence[_Site], adapting: Adapting) -> dict[Key, Outcome]:
    """Adapt to sites; where the method refuses all scans that were tried, to the next ones.

    Nothing is kept of a site of which no scan could be preprocessed: they may be mended.

    Returns
    -------
    Other failures than refusals.
    """
    failed: dict[Key, Outcome] = {}
    left = list(sites)
    while left:
        _preprocess(left, adapting)
        if adapting.job.engine.stop_on_first_crash and any(site.crashed for site in left):
            return failed | {site.key: _failed(site.key, NOT_RUN) for site in left}
        failures = _run(left, adapting)
        for site in left:
            site.tried += site.volumes
        refusals = {k for k, outcome in failures.items() if outcome.exit_code == ExitCode.DATA}
        failed |= {k: outcome for k, outcome in failures.items() if k not in refusals}
        refused = [site for site in left if site.key in refusals]
        left = [site for site in refused if site.pool]
        for site in (site for site in refused if not site.pool):
            text = failures[site.key].message
            LOG.warning("%s; its scans are harmonized by the model as it is", text)
            if site.tried:
                facts = {**_facts(site, site.tried, adapting), "candidates": site.candidates}
                refusal = Adaptation({}, {"refused": text})
                save_adaptation(adapting.folder(site.key), refusal, facts=facts)
    return failed


def _adapt_to(folder: Path, found: StoredAdaptation) -> AdaptTo:
    if "refused" in found.adaptation.details:
        return AdaptTo("none", _REFUSED)
    return AdaptTo("site", "training has not seen the site", str(folder), found.hash)


def _is_current(key: Key, facts: Mapping[str, Any], adapting: Adapting) -> bool:
    """Whether model, settings and scans are those that the adaptation was made with."""
    site, modality = key
    said = [facts.get(key) for key in ("model", "site", "settings", "device")]
    if said != [adapting.target.hash, site, adapting.settings, adapting.target.device_kind]:
        return False
    subjects = sorted({scan["subject"] for scan in facts["scans"]})
    if facts.get("crashed"):
        return False
    try:
        tried = facts.get("candidates", _TRIES * adapting.count)
        if tried < _TRIES * adapting.count and tried < _candidates([key], adapting)[0].candidates:
            return False  # a refused site has more scans now, which may be better
        there = {s.stem: s for s in adapting.find(subjects, modality) if s.site == site}
        return all(
            scan["name"] in there and _facts_of(there[scan["name"]], adapting.job) == scan
            for scan in facts["scans"]
        )
    except (NothingSelectedError, UsageError, OSError):
        return False  # a participant is gone, or a file cannot be read


def _facts_of(scan: Scan, job: Job) -> dict[str, Any]:
    """What tells whether a scan is still the one that was adapted to."""
    given = find_given(scan, job)
    return {
        "name": scan.stem,
        "subject": scan.subject,
        "file": scan.path.relative_to(job.place.bids_dir).as_posix(),
        "sha256": sha256(scan.path),
        "given": given_files(given, job.place.out_dir),
        **({"registered_to": given.registered_to} if given.registered_to else {}),
    }


def _preprocess(sites: Sequence[_Site], adapting: Adapting) -> None:
    """Put the next scans of each site that can be used on the model's grid."""
    target, job = adapting.target, adapting.job
    for site in sites:
        site.volumes = []
    while batch := [
        (site, scan) for site in sites for scan in site.pool[: adapting.count - len(site.volumes)]
    ]:
        stems, outcomes = store_volumes(
            [scan for _, scan in batch], target.contract, target.grid_file, job, _tell
        )
        by_name = {stem.name: stem for stem in stems}
        crashed = {o.stem: o for o in outcomes if o.exit_code not in (ExitCode.OK, ExitCode.DATA)}
        for site, scan in batch:
            site.pool.remove(scan)
            if scan.stem in by_name:
                site.volumes.append((scan, by_name[scan.stem]))
            elif scan.stem in crashed:
                site.crashed.append(crashed[scan.stem])
        if crashed and job.engine.stop_on_first_crash:
            return


def _candidates(keys: Sequence[Key], adapting: Adapting) -> list[_Site]:
    """Sites with the scans in the whole data set that are tried at most, in this order.

    Not only those asked for: jobs of one participant each must adapt to the same scans.
    """
    modalities = sorted({modality for _, modality in keys})
    found = [scan for modality in modalities for scan in adapting.find(None, modality)]
    found.sort(key=lambda scan: (scan.subject, scan.path))
    sites = []
    for key in keys:
        pool = [s for s in found if (s.site, s.suffix) == key][: _TRIES * adapting.count]
        sites.append(_Site(key, pool, len(pool)))
    return sites


def _tell(outcome: Outcome) -> None:
    if outcome.status == "preprocessed":
        LOG.log(PROGRESS, "%s: preprocessed, to adapt to its site", outcome.stem)
    else:
        LOG.warning("left out: %s: %s", outcome.stem, outcome.message)


def _run(sites: Sequence[_Site], adapting: Adapting) -> dict[Key, Outcome]:
    """One node per site; what went wrong, by site."""
    target, job = adapting.target, adapting.job
    failed: dict[Key, Outcome] = {}
    words = [target.hash, str(job.place.out_dir), [s.key for s in sites], adapting.settings]
    label = short_label(words)
    graph = Workflow(name=f"bids_harmony_adapt_{label}_wf")
    keys: dict[str, Key] = {}
    for number, site in enumerate(sites, start=1):
        if not site.volumes:
            text = "none of the scans that were tried can be used to adapt to it"
            failed[site.key] = _failed(site.key, text, ExitCode.DATA)
            continue
        part = Workflow(name=f"site_{number}_wf")
        part.add_nodes([_node(site, adapting)])
        graph.add_nodes([part])
        keys[part.name] = site.key
    if not keys:
        return failed
    begin, ended = monotonic(), set()

    def on_node(fullname: str, status: str) -> None:
        if status == "end":
            key = keys[fullname.split(".")[1]]
            ended.add(key)
            LOG.log(PROGRESS, "adapted to site %s (%s) after %.0f s", *key, monotonic() - begin)

    failures = run_graph(graph, job.engine, n_scans=len(keys), on_node=on_node)
    if job.clean and not failures:
        shutil.rmtree(job.engine.work_dir / graph.name, ignore_errors=True)
    for failure in failures:
        names = failure.node.split(".")[1:2]
        for key in [keys[n] for n in names if n in keys] or list(keys.values()):
            failed[key] = _failed(key, failure.message, failure.exit_code, failure.traceback)
    lost = [key for key in keys.values() if key not in ended and key not in failed]
    return failed | {key: _failed(key, NOT_RUN) for key in lost}


def _failed(key: Key, why: str, code: ExitCode = ExitCode.FAILURE, traceback: str = "") -> Outcome:
    site, modality = key
    return Outcome(
        site,
        "",
        "refused" if code == ExitCode.DATA else "failed",
        f"no adaptation to site {site} ({modality}): {why}",
        code,
        traceback=traceback,
    )


def _facts(site: _Site, pairs: Sequence[tuple[Scan, Path]], adapting: Adapting) -> dict[str, Any]:
    """What is kept beside an adaptation: what it was made of, and with what."""
    target = adapting.target
    name, modality = site.key
    return {
        "model": target.hash,
        "model_name": target.name,
        "site": name,
        "modality": modality,
        "settings": adapting.settings,
        "device": target.device_kind,
        "scans": [_facts_of(scan, adapting.job) for scan, _ in pairs],
        **({"crashed": [outcome.stem for outcome in site.crashed]} if site.crashed else {}),
    }


def _node(site: _Site, adapting: Adapting) -> Node:
    target, job = adapting.target, adapting.job
    return Node(
        AdaptToSite(
            **model_inputs(target, job.prep),
            stems=[str(stem) for _, stem in site.volumes],
            folder=str(adapting.folder(site.key)),
            facts=_facts(site, site.volumes, adapting),
        ),
        name="adapt",
        n_procs=job.prep.threads,
        mem_gb=gigabytes(site.volumes[0][0].path) + target.memory_gb,
    )
