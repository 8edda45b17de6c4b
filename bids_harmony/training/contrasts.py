"""Random slices of people scanned in two contrasts or more in one session.

CALAMITI learns from pairs: the same slice in two contrasts, and for each contrast another slice
of the same volume, which tells the contrast but not the anatomy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bids_harmony.training.degrade import uniform
from bids_harmony.training.slices import on_canvas

_Pick = Callable[[int], int]
_MOST = math.log(2)  # of a tone's exponent, as logarithm, up or down
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
    classes
        Of the voxels (`joint_classes`), (B, H, W), uint8; 0 where none is known.
    """

    images: Tensor
    seen: Tensor
    others: Tensor
    mask: Tensor
    crossed: Tensor
    first_site: Tensor
    judging: Tensor
    classes: Tensor


def full_slices(mask: Tensor, axis: int) -> list[int]:
    """Slices across `axis` with a quarter or more of the brain that the fullest of them has."""
    area = mask.movedim(axis, 0).flatten(1).sum(1)
    return [int(i) for i in torch.nonzero(area >= max(_LEAST_AREA * float(area.max()), 1))[:, 0]]


def random_tones(count: int, generator: torch.Generator) -> Tensor:
    """Exponents of power laws, (count,): 0.5 to 2 in half of the draws, otherwise 1."""
    drawn = uniform(-_MOST, _MOST, generator, (count,)).exp()
    return torch.where(uniform(0, 1, generator, (count,)) < 0.5, 1.0, drawn)


def toned(images: Tensor, exponents: Tensor) -> Tensor:
    """Slices (B, 2, H, W), each to the power of its own exponent (2 B,); above 1 its tangent."""
    power = exponents.view(-1, 2, 1, 1)
    low = images.clamp(0, 1) ** power
    return torch.where(images > 1, 1 + power * (images - 1), low)


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
        Give each volume a random tone (`random_tones`), and the slice that its anatomy is taken
        from another one. Where real sites differ, both anatomy and theta tell the site; a tone is
        told by theta alone.
    classes
        Of the voxels of each session (`joint_classes`); None: none is known.
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
        classes: Sequence[Tensor] | None = None,
    ) -> None:
        self._side, self._count, self._first, self._same = side, count, first, same_slice
        self._tones = tones
        self._by_site: dict[str, list[int]] = {}
        for index, session in enumerate(sessions):
            self._by_site.setdefault(session.site, []).append(index)
        self._sessions = sessions
        none = torch.zeros((), dtype=torch.uint8)  # takes no memory
        self._classes = classes or [none.expand(s.mask.shape) for s in sessions]
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
        images, others, mask, classes = (torch.stack(part) for part in zip(*rows, strict=True))
        crossed = torch.rand((self._count, 2), generator=generator) < 0.5
        seen = images
        if self._tones:
            seen = toned(images, random_tones(2 * self._count, generator))
            tones = random_tones(2 * self._count, generator)
            images, others = toned(images, tones), toned(others, tones)
        facts = torch.tensor(known), torch.tensor(judging)
        return PairBatch(images, seen, others, mask, crossed, *facts, classes[:, 0])

    def _site(self, pick: _Pick, judging: bool) -> str:
        sites = sorted(self._by_site)
        if judging and self._first in sites and len(sites) > 1:
            if pick(2):
                return str(self._first)
            sites.remove(str(self._first))
        return sites[pick(len(sites))]

    def _pair(self, index: int, pick: _Pick) -> tuple[Tensor, ...]:
        """A slice of two contrasts, those for theta, mask and classes, (C, side, side) each."""
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
            self._classes[index].movedim(axis, 0)[usable[place]][None],
        )
        mirrored = axis != 0 and pick(2) == 1  # left and right are alike
        return tuple(
            on_canvas(p.flip(1) if mirrored else p, self._side, self._side) for p in parts
        )
