"""Style transfer with a StarGAN v2 for all sites (Liu et al. 2021): a comparator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bids_harmony.methods.base import Harmonized, Training, Volume
from bids_harmony.methods.by_style import ByStyle
from bids_harmony.methods.hail_volumes import brain_of
from bids_harmony.methods.held_out import held_out_subjects
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
from bids_harmony.networks.translation import StyleNetworks
from bids_harmony.training.contrasts import full_slices
from bids_harmony.training.fit import train_network
from bids_harmony.training.plan import Adversary, Plan
from bids_harmony.training.slice_losses import masked_l1
from bids_harmony.training.slices import canvas_size, on_canvas
from bids_harmony.training.translation import (
    SiteBrain,
    UnpairedSlices,
    fixed_slices,
    intensity_distance,
    joined,
    style_judge_loss,
    style_loss,
)

_CHECKS = 16
_SLICES = 12  # across each axis, of which the style is the mean

_CPU = Preset(2.0, 16, 2, 3, Plan(2400, 5e-4, every=150, patience=16), judge_rate=1e-3)
_PAPER = Preset(1.0, 48, 3, 8, Plan(60_000, 1e-4, every=1000, patience=60), judge_rate=1e-4)


class StyleGan(ByStyle[TranslationPart], SliceTranslation[StyleNetworks]):
    """One network for all sites; the wanted style comes from reference images.

    Departures from the paper: it needs no site labels, here the discriminator has an answer for
    each training site, as in StarGAN v2 (one for all takes an unchanged slice for a good one); the
    mapping network, which makes up styles from noise, is left out; a slice in its own style shall
    be the slice; spectral norm instead of a gradient penalty.
    """

    name: ClassVar[str] = "stylegan"
    presets_by_name: ClassVar[Mapping[str, Preset]] = {"cpu": _CPU, "paper": _PAPER}
    network_kind: ClassVar[type[Any]] = StyleNetworks

    @classmethod
    def _check_people(cls, people: Sequence[Known]) -> None:
        held_out_subjects([person.whose for person in people])

    @classmethod
    def _fit_part(
        cls, brains: Sequence[SiteBrain], preset: Preset, seed: int, training: Training
    ) -> tuple[TranslationPart, dict[str, bytes]]:
        learn, apart = split_brains(brains)
        torch.manual_seed(seed)
        sites = len({brain.site for brain in learn})
        networks = StyleNetworks(preset.base, preset.levels, sites)
        side = canvas_of(brains, networks.divisor)
        run = train_network(
            networks,
            name="stylegan",
            draw=UnpairedSlices(learn, learn, side=side, count=preset.batch),
            loss=lambda batch, generator: style_loss(networks, batch),
            held_out=_held_out(
                networks, UnpairedSlices(apart, learn, side=side, count=preset.batch), seed
            ),
            plan=preset.plan.with_limit(training.minutes(1.0)),
            seed=seed,
            device=training.device,
            folder=training.below("stylegan"),
            adversary=Adversary(
                networks.judge, lambda batch, generator: style_judge_loss(networks, batch), 1,
                preset.judge_rate,
            ),
        )  # fmt: skip
        networks.requires_grad_(False)
        alike = likeness_of(learn, apart, preset.resolution)
        part = TranslationPart(
            networks, side, alike, {**site_facts(learn, apart), **run_facts(run)}
        )
        return part, {
            "curves.csv": curves_csv({"stylegan": run}),
            "training.png": training_png({"stylegan": run}),
        }

    def _style(self, part: TranslationPart, volume: Volume) -> Tensor:
        image, mask = brain_of(volume)
        part.likeness.admit(
            image, mask, volume.spacing, name=volume.name, modality=volume.modality
        )
        return style_of(part.network, image, mask, part.side)

    def harmonize(self, volume: Volume, *, seed: int) -> Harmonized:
        """Draw `volume` in the style of the examples.

        Raises
        ------
        ScanError
            As the others; or if there is no example of the modality.
        """
        self._wanted(volume)
        return super().harmonize(volume, seed=seed)

    def _draw(self, part: TranslationPart, seen: Tensor, brain: Tensor) -> Tensor:
        assert part.wanted is not None
        style = part.wanted.to(seen.device).expand(len(seen), -1)
        out: Tensor = part.network.draw(seen, style, brain)
        return out


@torch.no_grad()
def style_of(networks: StyleNetworks, image: Tensor, mask: Tensor, side: int) -> Tensor:
    """Mean style (16,) of evenly spaced slices of a brain (X, Y, Z) across all three axes."""
    device = next(networks.parameters()).device
    side = canvas_size([tuple(image.shape), (side,) * 3], (0, 1, 2), networks.divisor)
    found = []
    for axis in range(3):
        usable = full_slices(mask, axis)
        step = max(len(usable) // _SLICES, 1)
        stack = image.movedim(axis, 0)[usable[::step]][:, None]
        found.append(networks.encoder(on_canvas(stack, side, side).to(device)).cpu())
    return torch.cat(found).mean(0)


def _held_out(networks: StyleNetworks, drawer: UnpairedSlices, seed: int) -> Any:
    """Own style drawn again on fixed slices, and intensities against those of each wanted site."""
    batches = fixed_slices(drawer, _CHECKS, seed)
    whole = joined(batches)

    def score() -> float:
        device = next(networks.parameters()).device
        errors, drawn = [], []
        for batch in batches:
            x, mask, y, *_ = (part.to(device) for part in batch)
            drawn.append(networks.draw(x, networks.encoder(y), mask))
            same = networks.draw(x, networks.encoder(x), mask)
            errors.append(masked_l1(same, x, mask))
        made, far = torch.cat(drawn).cpu(), []
        for site in whole.wanted_site.unique():
            of = whole.wanted_site == site
            far.append(
                intensity_distance(
                    made[of], whole.input_mask[of], whole.wanted[of], whole.wanted_mask[of]
                )
            )
        return float(torch.stack(errors).mean()) + sum(far) / len(far)

    return score
