"""How a training goes: its plan, its adversary, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    Attributes
    ----------
    steps
        Most optimizer steps.
    rate
        Learning rate of Adam after the warm-up; it falls to nearly 0 along half a cosine of the
        steps, or of the time where that is limited and runs out first.
    every
        Steps between two looks at the held-out score.
    patience
        Stop after this many looks without a better score.
    clip
        Largest norm of the gradient.
    minutes
        Time limit, of all sittings of a resumed training together; None for none.
    half
        Use bfloat16 for convolutions where the device is fast at it.
    weight_decay
        Of Adam.
    """

    steps: int
    rate: float
    every: int = 100
    patience: int = 6
    clip: float = 1.0
    minutes: float | None = None
    half: bool = True
    weight_decay: float = 0.0

    def with_limit(self, minutes: float | None) -> Plan:
        """The same plan with a time limit; None leaves its own."""
        return self if minutes is None else replace(self, minutes=minutes)


@dataclass(frozen=True)
class Adversary:
    """A part of the network that is trained against the rest of it, in turns.

    Attributes
    ----------
    part
        Its parameters are moved by `loss` alone, the others by the training's loss alone.
    loss
        Of a batch; the generator is on the network's device.
    steps
        How many it takes before each step of the rest, every one with a batch of its own.
    rate
        Learning rate of its Adam; it falls as the plan's does.
    """

    part: nn.Module
    loss: Callable[[Any, torch.Generator], Tensor]
    steps: int = 1
    rate: float = 1e-4


@dataclass(frozen=True)
class Trained:
    """How a training went.

    Attributes
    ----------
    curve
        One row per look at the held-out score: step, training loss, held-out score.
    steps, rejected
        Steps taken, and steps left out because they were not finite.
    best
        Held-out score of the state that was kept.
    stop_reason
        ``all steps``, ``held-out score no longer improves`` or ``time limit``.
    """

    curve: tuple[dict[str, float], ...]
    steps: int
    rejected: int
    best: float
    stop_reason: str
