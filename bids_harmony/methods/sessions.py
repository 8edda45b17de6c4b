"""Scans of one session, brought together."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from bids_harmony.errors import ScanError
from bids_harmony.methods.base import Volume
from bids_harmony.methods.held_out import held_out_subjects

LOG = logging.getLogger("bids_harmony")

#: Site, subject and session.
SessionKey = tuple[str, str, str]


def session_key(site: str, subject: str, session: str, name: str) -> SessionKey:
    """What scans of one session have in common; an unknown subject is one of its own (`name`)."""
    return site, subject or name, session


def by_session(volumes: Sequence[Volume]) -> dict[SessionKey, dict[str, list[int]]]:
    """Indices of the volumes of each session, by modality; sessions and modalities sorted.

    Scans belong together that have their `session_key` in common.
    """
    found: dict[SessionKey, dict[str, list[int]]] = {}
    for index in range(len(volumes)):
        volume = volumes[index]
        key = session_key(volume.site, volume.subject, volume.session, volume.name)
        found.setdefault(key, {}).setdefault(volume.modality, []).append(index)
    return {key: dict(sorted(scans.items())) for key, scans in sorted(found.items())}


def session_of(volume: Volume, modalities: Sequence[str], method: str) -> list[Volume]:
    """A volume and the others of its session, in the order of `modalities`.

    Raises
    ------
    ScanError
        If one is missing.
    """
    there = {**volume.others, volume.modality: volume}
    missing = [m for m in modalities if m not in there]
    if missing:
        raise ScanError(
            f"{volume.name or 'scan'}: the {method} model needs {' and '.join(missing)} of the "
            "same session too"
        )
    return [there[m] for m in modalities]


def whole_sessions(
    method: str, volumes: Sequence[Volume], wanted: frozenset[str] = frozenset()
) -> dict[str, list[int]]:
    """Indices of the volumes of sessions that have every modality, and labels.

    They stand under the names of the modalities, such as ``T1w-T2w``. Other sessions are left
    out, and a session's second scan of a modality is, with a warning in the log. Scans with
    labels come first.

    Parameters
    ----------
    method
        For messages.
    wanted
        Names of the scans of the reference's site, of which one must be among them; empty for
        none.

    Raises
    ------
    ScanError
        If there is one modality only, no such session, none of the reference's, or too few sites
        or subjects have one.
    """
    sessions = by_session(volumes)
    modalities = sorted({m for scans in sessions.values() for m in scans})
    if len(modalities) < 2:
        raise ScanError(
            f"{method} with together=1 needs scans of two modalities or more, and all are "
            f"{' '.join(modalities) or 'missing'}; check --modality"
        )
    chosen: list[int] = []
    people = []
    for (site, subject, label), scans in sessions.items():
        words = f"subject {subject}, session {label or 'without name'}, site {site}"
        first = [
            min(scans[m], key=lambda i: volumes[i].labels is None)
            for m in modalities
            if m in scans
        ]
        if len(first) < len(modalities):
            LOG.warning("left out of the training: %s: not all of %s", words, modalities)
        elif all(volumes[i].labels is None for i in first):
            LOG.warning("left out of the training: %s: no tissue labels", words)
        else:
            for index in sorted({i for indices in scans.values() for i in indices} - {*first}):
                LOG.warning("left out of the training: %s: a second scan", volumes[index].name)
            chosen += first
            people.append((site, subject))
    if not chosen:
        raise ScanError(
            f"{method} with together=1: no session has {' and '.join(modalities)} and tissue "
            "labels; check --modality and --derivatives"
        )
    if wanted and not any(volumes[i].name in wanted for i in chosen):
        raise ScanError(
            f"{method} with together=1: no session of the reference's site has "
            f"{' and '.join(modalities)}; choose another --reference"
        )
    held_out_subjects(people)
    return {"-".join(modalities): chosen}
