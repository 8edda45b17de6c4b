"""Scans as CALAMITI learns from them: sessions with two contrasts, split by subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from bids_harmony.errors import ScanError
from bids_harmony.imaging.quantiles import brain_values
from bids_harmony.methods.base import Volume
from bids_harmony.methods.held_out import held_out
from bids_harmony.methods.likelihood import usable_slices
from bids_harmony.methods.sessions import by_session
from bids_harmony.methods.volume_grid import on_model_grid
from bids_harmony.training.contrasts import Session

_LEAST_OVERLAP = 0.5  # of a session's brain masks


@dataclass(frozen=True)
class Cohort:
    """Paired sessions of all sites.

    Attributes
    ----------
    learn, held_out
        No subject is in both; neither is empty.
    left_out
        Why the other sessions take no part, a sentence each.
    """

    learn: tuple[Session, ...]
    held_out: tuple[Session, ...]
    left_out: tuple[str, ...]

    @property
    def modalities(self) -> tuple[str, ...]:
        """Of the sessions to learn from, in alphabetical order."""
        return tuple(sorted({m for s in self.learn for m in s.images}))

    @property
    def first_site(self) -> str | None:
        """Site with the most scans to learn from; None if there is one site only."""
        scans: dict[str, int] = {}
        for session in self.learn:
            count = sum(len(images) for images in session.images.values())
            scans[session.site] = scans.get(session.site, 0) + count
        return max(sorted(scans), key=lambda s: scans[s]) if len(scans) > 1 else None


def cohort_of(volumes: Sequence[Volume], resolution: float) -> Cohort:
    """Sessions with two contrasts or more; one subject in five of each site is held out.

    Raises
    ------
    ScanError
        If a scan cannot be used, no session is paired, or nobody can be held out.
    """
    sessions, left_out = paired_sessions(volumes, resolution)
    learn, held_out = split_sessions(sessions)
    return Cohort(tuple(learn), tuple(held_out), tuple(left_out))


def paired_sessions(
    volumes: Sequence[Volume], resolution: float
) -> tuple[list[Session], list[str]]:
    """Sessions with two modalities or more, and why the others are left out.

    The brain of a session (`session_key`) is what all of its masks have in common.

    Raises
    ------
    ScanError
        If a scan cannot be used, or no session is paired.
    """
    found: list[Session] = []
    left_out: list[str] = []
    for (site, subject, label), by_modality in by_session(volumes).items():
        scans = [volumes[i] for indices in by_modality.values() for i in indices]
        words = f"{', '.join(v.name or 'scan' for v in scans)} (site {site})"
        if len(by_modality) < 2:
            left_out.append(f"{words}: no scan of another modality in the session")
            continue
        session = _session(scans, resolution, words)
        if session is None:
            left_out.append(f"{words}: the brain masks have less than half in common")
        else:
            found.append(replace(session, site=site, subject=subject, session=label))
    if not found:
        raise ScanError(
            "CALAMITI learns from sessions with two modalities, such as T1w and T2w of one "
            "subject, session and site, and there is none; give scans of a second modality too "
            "(--modality), or use a method that needs one only"
        )
    return found, left_out


def _session(scans: Sequence[Volume], resolution: float, words: str) -> Session | None:
    """Scans on the model's grid; None if their masks do not fit together."""
    if len({(v.data.shape, v.axes, v.spacing) for v in scans}) > 1:
        raise ScanError(f"{words}: the scans of a session must be on one grid")
    for scan in scans:
        brain_values(scan.data, np.asarray(scan.mask, dtype=bool), scan.name or "scan")
    masks = [np.asarray(v.mask, dtype=bool) for v in scans]
    common = np.logical_and.reduce(masks)
    if common.sum() < _LEAST_OVERLAP * max(int(mask.sum()) for mask in masks):
        return None
    images: dict[str, list[torch.Tensor]] = {}
    names: dict[str, list[str]] = {}
    mask = torch.zeros(0)
    for scan in scans:
        grid = on_model_grid(replace(scan, mask=common), resolution)
        mask = torch.from_numpy(grid.mask)
        images.setdefault(scan.modality, []).append(torch.from_numpy(grid.data))
        names.setdefault(scan.modality, []).append(scan.name)
    if any(len(usable_slices(mask, axis)) < 2 for axis in range(3)):
        raise ScanError(f"{words}: too little brain to learn from; check the brain masks")
    return Session("", images, mask, names)


def split_sessions(sessions: Sequence[Session]) -> tuple[list[Session], list[Session]]:
    """Sessions to learn from, and those of the subjects that are held out (`held_out`).

    Raises
    ------
    ScanError
        If nobody can be held out.
    """
    apart = held_out((session.site, session.subject) for session in sessions)
    if not apart:
        raise ScanError(
            "two subjects or more with two modalities each are needed at one of the sites, since "
            "one is held out; give more scans, or use a statistical method"
        )
    learn = [s for s in sessions if s.subject not in apart]
    return learn, [s for s in sessions if s.subject in apart]
