"""CycleGAN (Zhu et al. 2017) between two sites: a comparator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bids_harmony.errors import ScanError
from bids_harmony.methods.base import Training
from bids_harmony.methods.held_out import some_held_out
from bids_harmony.methods.learnable import Known
from bids_harmony.methods.slice_translation import (
    Preset,
    SliceTranslation,
    TranslationPart,
    canvas_of,
    likeness_of,
    split_brains,
)
from bids_harmony.methods.training_files import curves_csv, run_facts, site_facts, training_png
from bids_harmony.networks.translation import CycleNetworks, SliceTranslator
from bids_harmony.training.fit import train_network
from bids_harmony.training.plan import Adversary, Plan
from bids_harmony.training.slice_losses import masked_l1
from bids_harmony.training.translation import (
    SiteBrain,
    UnpairedSlices,
    cycle_judge_loss,
    cycle_loss,
    fixed_slices,
    intensity_distance,
    joined,
)

_CHECKS = 8

_CPU = Preset(2.0, 16, 3, 2, Plan(1600, 5e-4, every=100, patience=16), judge_rate=8e-4)
_PAPER = Preset(1.0, 64, 3, 4, Plan(60_000, 2e-4, every=1000, patience=60), judge_rate=2e-4)


class CycleGan(SliceTranslation[SliceTranslator]):
    """Learns from scans of two sites, of which one is the reference; nobody needs to travel.

    Kept is the translator towards the reference. The translators' changes are added to the
    slices, patches count by their share of brain, and the weights of cycle and identity losses
    are a tenth of the paper's.
    """

    name: ClassVar[str] = "cyclegan"
    presets_by_name: ClassVar[Mapping[str, Preset]] = {"cpu": _CPU, "paper": _PAPER}
    network_kind: ClassVar[type[Any]] = SliceTranslator

    @classmethod
    def _check_people(cls, people: Sequence[Known]) -> None:
        others = sorted({person.site for person in people if not person.wanted})
        if len(others) != 1 or not any(person.wanted for person in people):
            raise ScanError(
                "cyclegan learns one pair of sites: the reference and one other, and the other "
                f"scans are of {', '.join(others) or 'no other site'}; choose participants of "
                "two sites with --participant-label"
            )
        some_held_out(person.whose for person in people)

    @classmethod
    def _fit_part(
        cls, brains: Sequence[SiteBrain], preset: Preset, seed: int, training: Training
    ) -> tuple[TranslationPart, dict[str, bytes]]:
        learn, apart = split_brains(brains)
        torch.manual_seed(seed)
        networks = CycleNetworks(preset.base, preset.levels)
        side = canvas_of(brains, networks.to_reference.divisor)

        def drawer(group: Sequence[SiteBrain]) -> UnpairedSlices:
            sides = [[b for b in group if b.wanted is k] for k in (False, True)]
            # where all held-out people are of one site, the other is that of the training
            known = [s or [b for b in learn if b.wanted is k] for k, s in enumerate(sides)]
            return UnpairedSlices(known[0], known[1], side=side, count=preset.batch)

        run = train_network(
            networks,
            name="cyclegan",
            draw=drawer(learn),
            loss=lambda batch, generator: cycle_loss(networks, batch),
            held_out=_held_out(networks, drawer(apart), seed),
            plan=preset.plan.with_limit(training.minutes(1.0)),
            seed=seed,
            device=training.device,
            folder=training.below("cyclegan"),
            adversary=Adversary(
                networks.judges, lambda batch, generator: cycle_judge_loss(networks, batch), 1,
                preset.judge_rate,
            ),
        )  # fmt: skip
        network = networks.to_reference.requires_grad_(False)
        alike = likeness_of(learn, apart, preset.resolution)
        part = TranslationPart(
            network, side, alike, {**site_facts(learn, apart), **run_facts(run)}
        )
        return part, {
            "curves.csv": curves_csv({"cyclegan": run}),
            "training.png": training_png({"cyclegan": run}),
        }

    def _draw(self, part: TranslationPart, seen: Tensor, brain: Tensor) -> Tensor:
        out: Tensor = part.network(seen, brain)
        return out


def _held_out(networks: CycleNetworks, drawer: UnpairedSlices, seed: int) -> Any:
    """There and back again on fixed slices, and how far intensities are from the reference's."""
    batches = fixed_slices(drawer, _CHECKS, seed)
    whole = joined(batches)

    def score() -> float:
        device = next(networks.parameters()).device
        errors, drawn = [], []
        for batch in batches:
            x, mask, *_ = (part.to(device) for part in batch)
            there = networks.to_reference(x, mask)
            errors.append(masked_l1(networks.to_other(there, mask), x, mask))
            drawn.append(there)
        far = intensity_distance(
            torch.cat(drawn), whole.input_mask, whole.wanted, whole.wanted_mask
        )
        return float(torch.stack(errors).mean()) + far

    return score
