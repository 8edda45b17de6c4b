"""Test-time adaptation of a harmonizer by the reference domain's flow, bounded on every side.

Plain likelihood destroys images: a flow likes dark, flat ones best. Hence the goal is the
likelihood that held-out reference brains have, not the largest one; what lies below it has no
gradient. Edges must stay where the pre-trained harmonizer left them, the weights near where they
were, and of all states looked at the best is kept, the pre-trained one among them. A network of
the user's task may judge too: states that make it less sure are not kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bids_harmony.errors import UsageError
from bids_harmony.methods.flow_optimization import gradient_magnitude, masked_ncc
from bids_harmony.methods.likelihood import slices_of, usable_slices
from bids_harmony.networks.flow import Flow
from bids_harmony.networks.harmonizer import HarmonizerUNet
from bids_harmony.training.slices import on_canvas

#: Of harmonized slices and their masks, (N, 1, H, W) both: 0 (sure) to 1.
Entropy = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class AdaptationPlan:
    """Length and bounds of an adaptation.

    Attributes
    ----------
    steps, every
        Most steps, and steps between two looks at the check slices.
    rate
        Learning rate of Adam.
    batch, checks
        Slices of a step, and of a look.
    edges
        Weight of the edges' loss, 1 minus their correlation.
    tie
        Weight of the squared distance of the weights from the pre-trained ones.
    least_edges
        Below this correlation of edges a state is not kept.
    gain
        Least fall in bits for a state to be kept instead of an earlier one.
    patience
        Looks without a better state, or with a larger entropy, before it stops.
    guided
        Whether the flow takes part; without it only for comparison.
    stop_at_normal
        Whether bits below the held-out reference brains' have no gradient, and end it.
    entropy_slack
        So much may the entropy of a state be above that of the one kept before, but never above
        the pre-trained one's.
    """

    steps: int = 30
    every: int = 5
    rate: float = 5e-5
    batch: int = 8
    checks: int = 12
    edges: float = 2.0
    tie: float = 10.0
    least_edges: float = 0.985
    gain: float = 0.005
    patience: int = 3
    guided: bool = True
    stop_at_normal: bool = True
    entropy_slack: float = 0.001


def adapt_harmonizer(
    harmonizer: HarmonizerUNet,
    flow: Flow,
    brains: Sequence[tuple[Tensor, Tensor]],
    *,
    goal: float,
    axis: int,
    plan: AdaptationPlan,
    seed: int,
    states: list[dict[str, Tensor]] | None = None,
    entropy: Entropy | None = None,
) -> dict[str, Any]:
    """Adapt in place to tone-mapped brains of one site; it ends in the best state.

    Parameters
    ----------
    harmonizer
        Pre-trained; on the flow's device.
    flow
        Frozen, in eval mode.
    brains
        Tone-mapped image and brain mask, (X, Y, Z) each.
    goal
        Bits per dimension of held-out reference brains, from `goal_of`.
    axis
        Across which the slices lie.
    plan
        Length and bounds.
    seed
        Of the choice of slices.
    states
        Gets a copy of the weights at every look, for curves against the number of steps.
    entropy
        Of a task's network on harmonized slices; states at which it rose are not kept.

    Returns
    -------
    details
        ``bpd_before``, ``bpd_after``, ``bpd_goal``, ``steps``, ``kept_step``,
        ``rejected_steps``, ``stop_reason`` and ``history`` (step, bits, edge correlation). With
        `entropy` also ``entropy_before``, ``entropy_after``, and ``entropy`` in the history.

    Raises
    ------
    UsageError
        If the entropy of the pre-trained state is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(harmonizer.parameters()).device
    slabs = _Slabs(brains, harmonizer, flow, axis, device)
    checks = slabs.draw(plan.checks, generator)
    anchor = deepcopy(harmonizer).requires_grad_(False)
    run = _Run(harmonizer, anchor, flow, goal, plan, entropy)
    run.look(0, checks, states)
    reason = run.reason()
    optimizer = torch.optim.Adam(harmonizer.parameters(), plan.rate, betas=(0.9, 0.99))
    step = rejected = 0
    while reason is None and step < plan.steps:
        loss = run.loss(slabs.draw(plan.batch, generator))
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(harmonizer.parameters(), 1.0)
        step += 1
        if torch.isfinite(loss) and torch.isfinite(norm):
            optimizer.step()
        else:
            rejected += 1
        if step % plan.every == 0:
            run.look(step, checks, states)
            reason = run.reason()
    harmonizer.load_state_dict(run.best)
    harmonizer.eval()
    details = {"steps": step, "rejected_steps": rejected, "stop_reason": reason or "all steps"}
    return {**run.before_and_after(), **details}


def goal_of(
    harmonizer: HarmonizerUNet,
    flow: Flow,
    brains: Sequence[tuple[Tensor, Tensor]],
    *,
    axis: int,
    batch: int = 8,
) -> float:
    """Bits per dimension at which an adaptation ends, told as the adaptation tells its own.

    Parameters
    ----------
    harmonizer
        Pre-trained.
    flow
        In eval mode, on the same device.
    brains
        Tone-mapped held-out brains of the reference domain: image and brain mask, (X, Y, Z).
    axis
        Across which the slices lie.

    Returns
    -------
    Mean over all usable slices of the harmonized brains.
    """
    slabs = _Slabs(brains, harmonizer, flow, axis, next(harmonizer.parameters()).device)
    bits = []
    with torch.no_grad():
        for images, masks in slabs.all(batch):
            bits.append(flow.bits_per_dim(harmonizer(images).clamp(min=0) * masks, masks))
    return float(torch.cat(bits).mean())


class _Slabs:
    """Slices of some brains with their neighbours, drawn at random."""

    def __init__(
        self,
        brains: Sequence[tuple[Tensor, Tensor]],
        harmonizer: HarmonizerUNet,
        flow: Flow,
        axis: int,
        device: torch.device,
    ) -> None:
        divisor = max(harmonizer.divisor, flow.divisor)
        reach = harmonizer.slices // 2
        images, masks = [], []
        sides = [n for i, _ in brains for a, n in enumerate(i.shape) if a != axis]
        side = -(-max(sides) // divisor) * divisor
        for image, mask in brains:
            stack, inside = (slices_of(v.float(), axis, 1)[:, 0] for v in (image, mask))
            padded = functional.pad(stack, (0, 0, 0, 0, reach, reach))
            for index in usable_slices(mask, axis):
                slab = padded[index : index + harmonizer.slices]
                images.append(on_canvas(slab, side, side))
                masks.append(on_canvas(inside[index : index + 1], side, side))
        self._images, self._masks, self._device = images, masks, device

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Different slices, (count, slices, H, W), and their masks (count, 1, H, W)."""
        return self._stacked(torch.randperm(len(self._images), generator=generator)[:count])

    def all(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every slice, in batches."""
        for chosen in torch.arange(len(self._images)).split(batch):
            yield self._stacked(chosen)

    def _stacked(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        images = torch.stack([self._images[i] for i in chosen])
        masks = torch.stack([self._masks[i] for i in chosen])
        return images.to(self._device), masks.to(self._device)


class _Run:
    """The state of one adaptation."""

    def __init__(
        self,
        harmonizer: HarmonizerUNet,
        anchor: HarmonizerUNet,
        flow: Flow,
        goal: float,
        plan: AdaptationPlan,
        entropy: Entropy | None,
    ) -> None:
        self._harmonizer, self._anchor, self._flow = harmonizer, anchor, flow
        self._goal, self._plan, self._entropy = goal, plan, entropy
        self.history: list[dict[str, float | None]] = []
        self.best = {k: v.detach().clone() for k, v in harmonizer.state_dict().items()}
        self.kept, self._bits, self._since = 0, float("inf"), 0
        self._edges, self._entropies, self._rose = 1.0, (math.inf, math.inf), 0

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Bits above the goal, edges that moved, weights that moved."""
        images, masks = batch
        plan = self._plan
        out = self._harmonizer(images).clamp(min=0) * masks
        with torch.no_grad():
            before = self._anchor(images).clamp(min=0) * masks
        total = plan.edges * (1 - edge_correlation(out, before, masks))
        if plan.guided:
            bits = self._flow.bits_per_dim(out, masks).mean()
            above = bits - self._goal
            total = total + (above.clamp(min=0) if plan.stop_at_normal else above)
        moved = [
            (new - old).square().sum()
            for new, old in zip(
                self._harmonizer.parameters(), self._anchor.parameters(), strict=True
            )
        ]
        return total + plan.tie * torch.stack(moved).sum()

    def look(
        self, step: int, checks: tuple[Tensor, Tensor], states: list[dict[str, Tensor]] | None
    ) -> None:
        """Note bits and edges of the check slices; keep the state if it is the best so far."""
        images, masks = checks
        with torch.no_grad():
            out = self._harmonizer(images).clamp(min=0) * masks
            before = self._anchor(images).clamp(min=0) * masks
            bits = float(self._flow.bits_per_dim(out, masks).mean())
            edges = float(edge_correlation(out, before, masks))
        self._edges = edges if math.isfinite(edges) else 0.0
        self.history.append({
            "step": step, "bits": _rounded(bits, 4), "edges": _rounded(edges, 5),
        })  # fmt: skip
        found = self._judged(out, masks)
        state = {k: v.detach().clone() for k, v in self._harmonizer.state_dict().items()}
        if states is not None:
            states.append(state)
        goal = self._goal if self._plan.stop_at_normal else -float("inf")
        better = max(bits, goal) < max(self._bits, goal) - self._plan.gain
        better = better and self._edges >= self._plan.least_edges and not self._rose
        if step == 0 or better:
            self.best, self.kept, self._bits, self._since = state, step, bits, 0
            self._entropies = (found if step == 0 else self._entropies[0], found)
        else:
            self._since += 1

    def _judged(self, out: Tensor, masks: Tensor) -> float:
        """Entropy of the check slices; notes it, and at how many looks in a row it rose."""
        if self._entropy is None:
            return 0.0
        noted = _rounded(self._entropy(out, masks), 6)
        self.history[-1]["entropy"] = noted
        if noted is None and len(self.history) == 1:
            raise UsageError(
                "the segmentation network gives scores that are not finite on the site's slices; "
                "check it on them, or leave --adapt-segmentation out"
            )
        first, kept = self._entropies
        most = min(first, kept + self._plan.entropy_slack)
        self._rose = 0 if noted is not None and noted <= most else self._rose + 1
        return math.inf if noted is None else noted

    def before_and_after(self) -> dict[str, Any]:
        """What the looks found, for the details."""
        first, kept = self.history[0], next(h for h in self.history if h["step"] == self.kept)
        measured = {"bpd": "bits"} | ({"entropy": "entropy"} if self._entropy else {})
        found: dict[str, Any] = {}
        for name, key in measured.items():
            found |= {f"{name}_before": first[key], f"{name}_after": kept[key]}
        goal = round(self._goal, 4)
        return found | {"bpd_goal": goal, "kept_step": self.kept, "history": self.history}

    def reason(self) -> str | None:
        """Why to stop now, or None."""
        if self._plan.stop_at_normal and self._bits <= self._goal:
            return "as likely as held-out reference brains"
        if self._edges < self._plan.least_edges:
            return "edges moved"
        if self._rose >= self._plan.patience:
            return "entropy of the segmentation rose"
        if self._since >= self._plan.patience:
            return "no longer improves"
        return None


def _rounded(value: float, digits: int) -> float | None:
    """None for what is not finite: JSON has no such numbers."""
    return round(value, digits) if math.isfinite(value) else None


def edge_correlation(first: Tensor, second: Tensor, masks: Tensor) -> Tensor:
    """Mean over slices of Pearson's r of the gradient magnitudes inside the eroded masks."""
    inside = -functional.max_pool2d(-masks, 3, 1, 1)
    return masked_ncc(gradient_magnitude(first), gradient_magnitude(second), inside).mean()
