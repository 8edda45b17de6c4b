"""Random slices of people scanned in two contrasts or more in one session.

CALAMITI learns from pairs: the same slice in two contrasts, and for each contrast another slice
of the same volume, which tells the contrast but not the anatomy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bids_harmony.training.degrade import TOP, apply_tones, increasing_map
from bids_harmony.training.slices import on_canvas

_Pick = Callable[[int], int]
_LEVELS, _TRIM = 2, 0.3  # of a tone: `increasing_map`
_LEAST_AREA = 0.25  # brain in a slice, of the most that a slice across the same axis has


@dataclass(frozen=True)
class Session:
    """One person's scans of one session and site, on one grid.

    Attributes
    ----------
    site
        Label.
    images
        By modality its images, each (X, Y, Z), float32, 0 outside the mask.
    mask
        Brain of all of them, (X, Y, Z), bool, not empty.
    names
        Of the images, by modality, in the same order.
    subject, session
        Labels.
    """

    site: str
    images: Mapping[str, Sequence[Tensor]]
    mask: Tensor
    names: Mapping[str, Sequence[str]]
    subject: str = ""
    session: str = ""


class PairBatch(NamedTuple):
    """Slices to learn from; B pairs on a square canvas.

    Attributes
    ----------
    images
        The same slice in two contrasts, (B, 2, H, W): what is to be drawn.
    seen
        What the anatomy is taken from: the same, in another tone if there are tones.
    others
        What theta is taken from, of the same two volumes, (B, 2, H, W).
    mask
        Brain, (B, 1, H, W), float32.
    crossed
        Whether a contrast is drawn from the other contrast's anatomy, (B, 2), bool.
    first_site
        Whether the pair comes from the site that the discriminator knows, (B,), float32.
    judging
        Whether this step is the discriminator's, bool scalar.
    """

    images: Tensor
    seen: Tensor
    others: Tensor
    mask: Tensor
    crossed: Tensor
    first_site: Tensor
    judging: Tensor


def full_slices(mask: Tensor, axis: int) -> list[int]:
    """Slices across `axis` with a quarter or more of the brain that the fullest of them has."""
    area = mask.movedim(axis, 0).flatten(1).sum(1)
    return [int(i) for i in torch.nonzero(area >= max(_LEAST_AREA * float(area.max()), 1))[:, 0]]


def random_tones(count: int, generator: torch.Generator) -> Tensor:
    """Knots of intensity maps on 0..1.25, (count, 5): random increasing ones, or the identity."""
    drawn = [increasing_map(_LEVELS, _TRIM, generator) for _ in range(count)]
    same = torch.rand((count, 1), generator=generator) < 0.5
    return TOP * torch.where(same, torch.linspace(0, 1, 2**_LEVELS + 1), torch.stack(drawn))


def toned(images: Tensor, tones: Tensor) -> Tensor:
    """Slices (B, 2, H, W), each mapped by its tone (2 B, K); 0 stays 0, above 1.25 goes on."""
    flat = images.flatten(0, 1)
    return apply_tones(flat, tones).unflatten(0, images.shape[:2])


class PairDrawer:
    """Draws batches of pairs; sites equally often, the discriminator's in half of its steps.

    Parameters
    ----------
    sessions
        With two contrasts or more each.
    side
        Height and width of the canvas.
    count
        Pairs of a batch.
    first
        Site that the discriminator knows; None: there is no discriminator.
    same_slice
        Take theta from the slice that is drawn, as Dewey et al. (2020) do.
    tones
        Give each volume a random increasing tone in half of the draws, and the slice that its
        anatomy is taken from another one. Where real sites differ, both anatomy and theta tell the
        site; a tone is told by theta alone.
    """

    def __init__(
        self,
        sessions: Sequence[Session],
        *,
        side: int,
        count: int,
        first: str | None,
        same_slice: bool = False,
        tones: bool = False,
    ) -> None:
        self._side, self._count, self._first, self._same = side, count, first, same_slice
        self._tones = tones
        self._by_site: dict[str, list[int]] = {}
        for index, session in enumerate(sessions):
            self._by_site.setdefault(session.site, []).append(index)
        self._sessions = sessions
        self._slices = [[full_slices(s.mask, axis) for axis in range(3)] for s in sessions]

    def __call__(self, generator: torch.Generator) -> PairBatch:
        """A batch; all randomness comes from the generator."""

        def pick(high: int) -> int:
            return int(torch.randint(high, (), generator=generator))

        judging = self._first is not None and pick(2) == 1
        rows, known = [], []
        for _ in range(self._count):
            site = self._site(pick, judging)
            known.append(float(site == self._first))
            index = self._by_site[site][pick(len(self._by_site[site]))]
            rows.append(self._pair(index, pick))
        images, others, mask = (torch.stack(part) for part in zip(*rows, strict=True))
        crossed = torch.rand((self._count, 2), generator=generator) < 0.5
        seen = images
        if self._tones:
            seen = toned(images, random_tones(2 * self._count, generator))
            tones = random_tones(2 * self._count, generator)
            images, others = toned(images, tones), toned(others, tones)
        facts = torch.tensor(known), torch.tensor(judging)
        return PairBatch(images, seen, others, mask, crossed, *facts)

    def _site(self, pick: _Pick, judging: bool) -> str:
        sites = sorted(self._by_site)
        if judging and self._first in sites and len(sites) > 1:
            if pick(2):
                return str(self._first)
            sites.remove(str(self._first))
        return sites[pick(len(sites))]

    def _pair(self, index: int, pick: _Pick) -> tuple[Tensor, Tensor, Tensor]:
        """A slice of two contrasts, the slices for theta, and the mask, each (C, side, side)."""
        session, axis = self._sessions[index], pick(3)
        usable = self._slices[index][axis]
        place = pick(len(usable))
        other = place if self._same else (place + 1 + pick(max(len(usable) - 1, 1))) % len(usable)
        contrasts = sorted(session.images)
        one = pick(len(contrasts))
        two = (one + 1 + pick(len(contrasts) - 1)) % len(contrasts)
        chosen = []
        for contrast in (one, two):
            images = session.images[contrasts[contrast]]
            chosen.append(images[pick(len(images))].movedim(axis, 0))
        inside = session.mask.movedim(axis, 0)[usable[place]][None].float()
        parts = (
            torch.stack([image[usable[place]] for image in chosen]),
            torch.stack([image[usable[other]] for image in chosen]),
            inside,
        )
        mirrored = axis != 0 and pick(2) == 1  # left and right are alike
        canvas = [on_canvas(p.flip(1) if mirrored else p, self._side, self._side) for p in parts]
        return canvas[0], canvas[1], canvas[2]
