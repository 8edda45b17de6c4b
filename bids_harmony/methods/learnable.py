"""Which modalities can be learned, told before any of them is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bids_harmony.errors import ScanError
from bids_harmony.methods.base import Volume

LOG = logging.getLogger("bids_harmony")


class Known(NamedTuple):
    """Whose a training scan is; `wanted` tells scans of the reference's site."""

    site: str
    subject: str
    wanted: bool

    @property
    def whose(self) -> tuple[str, str]:
        """Site and subject."""
        return self.site, self.subject


def learnable(
    method: str,
    volumes: Sequence[Volume],
    wanted: frozenset[str],
    check: Callable[[Sequence[Known]], object],
) -> dict[str, list[int]]:
    """Indices of the volumes of each modality that can be learned.

    Others are left out, with a warning in the log: a training of hours must not end with a
    modality of which there is too little.

    Parameters
    ----------
    method
        For messages.
    wanted
        Names of the scans of the reference's site.
    check
        Raises ScanError for people of whom nothing can be learned.

    Raises
    ------
    ScanError
        If no modality is left.
    """
    groups: dict[str, list[int]] = {}
    people: dict[str, list[Known]] = {}
    for index in range(len(volumes)):
        volume = volumes[index]
        groups.setdefault(volume.modality, []).append(index)
        known = Known(volume.site, volume.subject or volume.name, volume.name in wanted)
        people.setdefault(volume.modality, []).append(known)
    left_out: dict[str, str] = {}
    for modality, of in people.items():
        try:
            if wanted and not any(person.wanted for person in of):
                raise ScanError("no scan is of the reference's site")
            check(of)
        except ScanError as error:
            left_out[modality] = f"{modality}: {error}"
    if left_out.keys() == groups.keys():
        raise ScanError(
            "; ".join(left_out[m] for m in sorted(left_out)) or f"{method}: no scan was given"
        )
    for reason in left_out.values():
        LOG.warning("left out of the training: %s", reason)
    return {m: groups[m] for m in sorted(groups) if m not in left_out}
