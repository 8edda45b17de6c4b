"""Adapt a trained method to the sites that its training has not seen, once per site."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nipype.pipeline.engine import Node, Workflow

from bids_harmony.bids.scan import Scan
from bids_harmony.config import ADAPT_SCANS, ADAPTED
from bids_harmony.errors import ExitCode, MissingInputError, NothingSelectedError, UsageError
from bids_harmony.interfaces.files import sha256
from bids_harmony.interfaces.harmonize import AdaptToSite
from bids_harmony.methods.adaptation import (
    StoredAdaptation,
    load_adaptation,
    save_adaptation,
)
from bids_harmony.methods.base import Adaptation
from bids_harmony.workflows.cohort import Outcome, gigabytes
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
) -> tuple[dict[Key, AdaptTo], dict[Key, Outcome]]:
    """Adapt to each site that was not adapted to before; concurrent jobs wait for one another.

    Parameters
    ----------
    keys
        From `sites_to_adapt_to`.
    on_site
        Called with each site that is adapted to now.

    Returns
    -------
    made, failed
        Adaptations, and for the other sites an outcome with the reason, whose stem is the site.
    """
    made = {key: found for key in keys if (found := stored_for(key, adapting))}
    lacking = [key for key in keys if key not in made]
    failed: dict[Key, Outcome] = {}
    with ExitStack() as locks:
        for key in lacking:  # sorted, so that no two jobs wait for each other
            folder = adapting.folder(key)
            locks.enter_context(one_at_a_time(folder.parent, folder.name))
        made |= {key: found for key in lacking if (found := stored_for(key, adapting))}
        todo = [key for key in lacking if key not in made]
        for key in todo:
            on_site(key)
        tried = _adapted(todo, adapting, failed) if todo else {}
        for key in (key for key in todo if key not in failed):
            if tried[key]:
                folder = adapting.folder(key)
                made[key] = _adapt_to(folder, load_adaptation(folder))
            else:
                made[key] = AdaptTo("none", _REFUSED)
    return made, failed


def _adapted(
    todo: Sequence[Key], adapting: Adapting, failed: dict[Key, Outcome]
) -> dict[Key, list[tuple[Scan, Path]]]:
    """Adapt to sites; where the method refuses all scans that were tried, to the next ones.

    Returns
    -------
    Scans of each site that were tried: none where none could be preprocessed, which is not
    remembered because they may be mended. Other failures than refusals are added to `failed`.
    """
    pools = _candidates(todo, adapting)
    counts = {key: len(pool) for key, pool in pools.items()}
    tried: dict[Key, list[tuple[Scan, Path]]] = {key: [] for key in todo}
    left = list(todo)
    while left:
        volumes = _volumes(left, pools, adapting)
        failures = _run(volumes, adapting)
        refused = [k for k, outcome in failures.items() if outcome.exit_code == ExitCode.DATA]
        failed |= {key: found for key, found in failures.items() if key not in refused}
        for key in left:
            tried[key] += volumes[key]
        left = [key for key in refused if pools[key]]
        for key in (key for key in refused if key not in left):
            text = failures[key].message
            LOG.warning("%s; its scans are harmonized by the model as it is", text)
            if tried[key]:
                facts = {**_facts(key, tried[key], adapting), "candidates": counts[key]}
                refusal = Adaptation({}, {"refused": text})
                save_adaptation(adapting.folder(key), refusal, facts=facts)
    return tried


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
    try:
        tried = facts.get("candidates", _TRIES * adapting.count)
        if tried < _TRIES * adapting.count and tried < len(_candidates([key], adapting)[key]):
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
    given = find_given(scan, job.folders, job.prep, job.place.out_dir)
    return {
        "name": scan.stem,
        "subject": scan.subject,
        "file": scan.path.relative_to(job.place.bids_dir).as_posix(),
        "sha256": sha256(scan.path),
        "given": given_files(given, job.place.out_dir),
    }


def _volumes(
    keys: Sequence[Key], pools: Mapping[Key, list[Scan]], adapting: Adapting
) -> dict[Key, list[tuple[Scan, Path]]]:
    """The next scans of each site that can be preprocessed, on the model's grid; empties pools."""
    used: dict[Key, list[tuple[Scan, Path]]] = {key: [] for key in keys}
    target, job = adapting.target, adapting.job
    while batch := [
        (key, scan) for key in keys for scan in pools[key][: adapting.count - len(used[key])]
    ]:
        stems, _ = store_volumes(
            [scan for _, scan in batch], target.contract, target.grid_file, job, _warn
        )
        by_name = {stem.name: stem for stem in stems}
        for key, scan in batch:
            pools[key].remove(scan)
            if scan.stem in by_name:
                used[key].append((scan, by_name[scan.stem]))
    return used


def _candidates(keys: Sequence[Key], adapting: Adapting) -> dict[Key, list[Scan]]:
    """Scans of each site in the whole data set that are tried at most, in this order.

    Not only those asked for: jobs of one participant each must adapt to the same scans.
    """
    modalities = sorted({modality for _, modality in keys})
    found = [scan for modality in modalities for scan in adapting.find(None, modality)]
    found.sort(key=lambda scan: (scan.subject, scan.path))
    return {
        key: [s for s in found if (s.site, s.suffix) == key][: _TRIES * adapting.count]
        for key in keys
    }


def _warn(outcome: Outcome) -> None:
    if outcome.status != "preprocessed":
        LOG.warning("left out: %s: %s", outcome.stem, outcome.message)


def _run(
    volumes: Mapping[Key, Sequence[tuple[Scan, Path]]], adapting: Adapting
) -> dict[Key, Outcome]:
    """One node per site; what went wrong, by site."""
    target, job = adapting.target, adapting.job
    failed: dict[Key, Outcome] = {}
    words = [target.hash, str(job.place.out_dir), sorted(volumes), adapting.settings]
    label = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:10]
    graph = Workflow(name=f"bids_harmony_adapt_{label}_wf")
    keys: dict[str, Key] = {}
    for number, (key, pairs) in enumerate(sorted(volumes.items()), start=1):
        site, modality = key
        if not pairs:
            text = f"none of the scans of site {site} ({modality}) that were tried can be used"
            text += " to adapt to it"
            failed[key] = Outcome(site, "", "refused", text, ExitCode.DATA)
            continue
        part = Workflow(name=f"site_{number}_wf")
        part.add_nodes([_node(key, pairs, adapting)])
        graph.add_nodes([part])
        keys[part.name] = key
    if not keys:
        return failed
    failures = run_graph(graph, job.engine, n_scans=len(keys), on_node=lambda *_: None)
    if job.clean and not failures:
        shutil.rmtree(job.engine.work_dir / graph.name, ignore_errors=True)
    for failure in failures:
        names = failure.node.split(".")[1:2]
        for key in [keys[n] for n in names if n in keys] or list(keys.values()):
            text = f"no adaptation to site {key[0]} ({key[1]}): {failure.message}"
            failed[key] = Outcome(
                key[0],
                "",
                "refused" if failure.exit_code == ExitCode.DATA else "failed",
                text,
                failure.exit_code,
                traceback=failure.traceback,
            )
    return failed


def _facts(key: Key, pairs: Sequence[tuple[Scan, Path]], adapting: Adapting) -> dict[str, Any]:
    """What is kept beside an adaptation: what it was made of, and with what."""
    target = adapting.target
    return {
        "model": target.hash,
        "model_name": target.name,
        "site": key[0],
        "modality": key[1],
        "settings": adapting.settings,
        "device": target.device_kind,
        "scans": [_facts_of(scan, adapting.job) for scan, _ in pairs],
    }


def _node(key: Key, pairs: Sequence[tuple[Scan, Path]], adapting: Adapting) -> Node:
    target, job = adapting.target, adapting.job
    return Node(
        AdaptToSite(
            **model_inputs(target, job.prep),
            stems=[str(stem) for _, stem in pairs],
            folder=str(adapting.folder(key)),
            facts=_facts(key, pairs, adapting),
        ),
        name="adapt",
        n_procs=job.prep.threads,
        mem_gb=gigabytes(pairs[0][0].path) + target.memory_gb,
    )
