"""Who is held out of a training on several sites."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bids_harmony.errors import ScanError

_SHARE = 0.2


def held_out(people: Iterable[tuple[str, str]]) -> set[str]:
    """Subjects to hold out, from the (site, subject) of every scan.

    Of each site one subject in five, the last in alphabetical order; at least one overall, if a
    site has two. A subject scanned at several sites is held out at all of them, and no site is
    emptied.
    """
    at: dict[str, set[str]] = {}
    for site, subject in people:
        at.setdefault(site, set()).add(subject)
    apart: set[str] = set()

    def spare(subject: str) -> bool:
        """Whether every site keeps a subject without this one."""
        return all(s - apart - {subject} for s in at.values() if subject in s)

    def hold_out(site: str, count: int) -> None:
        for subject in sorted(at[site] - apart, reverse=True):
            if count > 0 and spare(subject):
                apart.add(subject)
                count -= 1

    for site in sorted(at):
        hold_out(site, round(_SHARE * len(at[site])) - len(at[site] & apart))
    if not apart:
        hold_out(max(sorted(at), key=lambda s: len(at[s])), 1)
    return apart


def some_held_out(people: Iterable[tuple[str, str]]) -> set[str]:
    """As `held_out`, which must find somebody.

    Raises
    ------
    ScanError
        If nobody can be held out.
    """
    apart = held_out(people)
    if not apart:
        raise ScanError(
            "two subjects or more are needed at one of the sites, since one is held out; give "
            "scans of more subjects"
        )
    return apart


def held_out_subjects(people: Sequence[tuple[str, str]]) -> set[str]:
    """As `some_held_out`, from two sites or more.

    Raises
    ------
    ScanError
        If there are fewer than two sites, or nobody can be held out.
    """
    sites = sorted({site for site, _ in people})
    if len(sites) < 2:
        raise ScanError(
            f"scans of two sites or more are needed, and all are of {', '.join(sites)}; give "
            "scans of another site, or use a method that is trained on one"
        )
    return some_held_out(people)
