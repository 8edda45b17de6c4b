"""What deepNormalize learned of one modality, or of several together, and what it does with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bids_harmony.errors import ScanError
from bids_harmony.imaging.quantiles import Float64Array, distributed
from bids_harmony.imaging.tissue_mixture import mixture_quantiles
from bids_harmony.imaging.tissues import TISSUES, dice
from bids_harmony.methods.base import Training
from bids_harmony.methods.deepnormalize_training import (
    Preset,
    box_of,
    discriminator_scores,
    split,
    train_normalizer,
)
from bids_harmony.methods.likeness import Likeness, rank_cells
from bids_harmony.methods.tone import arrays_below, load_arrays, state_arrays
from bids_harmony.methods.training_files import (
    brains_png,
    curves_csv,
    run_facts,
    site_facts,
    training_png,
)
from bids_harmony.networks.deepnormalize import CLASSES, NormalizerNetworks
from bids_harmony.training.common_appearance import CommonAppearance
from bids_harmony.training.normalizer_losses import divergence, histograms
from bids_harmony.training.tissue_cubes import LabelledBrain

_AT_ONCE = 4
#: A tissue's share is odd beyond so many deviations of the training's, at least beyond so much.
_ODD, _LEAST_ODD = 4.0, 0.05


@dataclass(frozen=True)
class Part:
    """Networks and limits of modalities that are normalized together.

    Attributes
    ----------
    networks
        In eval mode.
    modalities
        In the order of the networks' channels.
    likeness
        Where bright and dark tissue lie in training brains, for each modality.
    shares
        Mean and deviation of each tissue's share of a training brain, (3, 2).
    scores
        Held-out scores and facts of the training.
    appearance
        Quantiles of brain without a label and of each tissue in the common appearance,
        (modalities, 4, 257); None if there is none to come to.
    """

    networks: NormalizerNetworks
    modalities: tuple[str, ...]
    likeness: tuple[Likeness, ...]
    shares: NDArray[np.float64]
    scores: Mapping[str, Any]
    appearance: NDArray[np.float32] | None = None

    def to(self, device: str) -> None:
        """Move the networks."""
        self.networks.to(device)

    def odd_shares(self, tissues: NDArray[np.float32], mask: NDArray[np.bool_]) -> list[str]:
        """Sentences on tissues (3, X, Y, Z) with another share of the brain than in training."""
        found = tissues[:, mask].mean(axis=1)
        limits = np.maximum(_ODD * self.shares[:, 1], _LEAST_ODD)
        return [
            f"{name} is {share:.0%} of the brain as segmented; in training scans {mean:.0%}. "
            "Look at the segmentation before you use it or the scan."
            for name, share, (mean, _), limit in zip(
                TISSUES, found, self.shares, limits, strict=True
            )
            if abs(share - mean) > limit
        ]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Weights, likeness, shares and appearance."""
        alike = {
            f"{m}/{key}": value
            for m, known in zip(self.modalities, self.likeness, strict=True)
            for key, value in known.arrays().items()
        }
        return {
            **alike,
            **state_arrays(self.networks, "networks"),
            "shares": self.shares,
            **({} if self.appearance is None else {"appearance": self.appearance}),
        }

    def params(self) -> dict[str, Any]:
        """JSON-serialisable form of the rest."""
        return {
            "networks": self.networks.config(),
            "modalities": list(self.modalities),
            "scores": dict(self.scores),
        }

    @classmethod
    def from_state(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Part:
        """Rebuild from `arrays` and `params`; ScanError if they do not fit together."""
        networks = NormalizerNetworks.from_config(params["networks"])
        load_arrays(networks, arrays, "networks")
        networks.requires_grad_(False)
        torch.nn.Module.to(networks, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        modalities = tuple(str(m) for m in params["modalities"])
        appearance = arrays.get("appearance")
        if appearance is not None and appearance.shape[:2] != (len(modalities), CLASSES):
            raise ScanError(
                f"the appearance has shape {appearance.shape}, not {CLASSES} classes for each of "
                f"{len(modalities)} modalities; train the model again"
            )
        return cls(
            networks,
            modalities,
            tuple(Likeness.from_arrays(arrays_below(arrays, m)) for m in modalities),
            np.array(arrays["shares"], dtype=np.float64),
            params["scores"],
            None if appearance is None else np.array(appearance, dtype=np.float32),
        )


@torch.no_grad()
def normalized_brain(
    networks: NormalizerNetworks, images: Tensor, mask: Tensor, stride: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A whole brain in overlapping cubes whose results are averaged (paper, 2.3).

    What was drawn near the edge of a cube counts less (Gaussian weights): it lacks surroundings.

    Parameters
    ----------
    networks
        On any device.
    images, mask
        Shape (C, X, Y, Z) and (X, Y, Z), on the CPU; the mask is not empty.
    stride
        From cube to cube, in voxels, up to the cubes' edge.

    Returns
    -------
    normalized, tissues
        Shape (C, X, Y, Z), and probabilities of CSF, grey and white matter (3, X, Y, Z); both 0
        outside the mask.
    """
    from monai.inferers import sliding_window_inference  # takes longer to import than torch

    device = next(networks.parameters()).device
    box = (slice(None), *box_of(mask))
    inside = mask[None].float()

    def both(cubes: Tensor) -> tuple[Tensor, Tensor]:
        drawn = networks.normalize(cubes[:, :-1], cubes[:, -1:])
        return drawn, networks.segment(drawn).exp()[:, 1:]

    found = sliding_window_inference(
        torch.cat((images, inside))[box][None],
        (networks.side,) * 3,
        _AT_ONCE,
        both,
        overlap=1 - stride / networks.side,
        mode="gaussian",
        sw_device=device,
        device="cpu",
    )
    whole = []
    for part in found:
        full = torch.zeros(part.shape[1], *mask.shape)
        full[box] = torch.as_tensor(part)[0].cpu()
        whole.append((full * inside).numpy())
    return whole[0], whole[1]


def wanted_quantiles(
    tissues: NDArray[np.float32],
    mask: NDArray[np.bool_],
    appearance: NDArray[np.float32] | None,
) -> tuple[list[Float64Array], str]:
    """How a brain's intensities shall be distributed, given its own shares of the classes.

    Parameters
    ----------
    tissues, mask
        As `normalized_brain` has them, (3, X, Y, Z) and (X, Y, Z).
    appearance
        As in `Part`.

    Returns
    -------
    quantiles, reason
        Of each modality; none without an appearance, or, for a reason, if more than a twentieth
        of the brain is of classes that it does not know.
    """
    if appearance is None:
        return [], ""
    shares = tissues[:, mask].mean(axis=1)
    whole = [max(1 - float(shares.sum()), 0.0), *shares]
    try:
        return [mixture_quantiles(tables, whole) for tables in appearance], ""
    except ScanError as error:
        return [], str(error)


def matched(
    normalized: NDArray[np.float32], mask: NDArray[np.bool_], wanted: Sequence[Float64Array]
) -> NDArray[np.float32]:
    """A normalized brain (C, X, Y, Z) with the intensities of `wanted_quantiles`, if any.

    Sites that the generator leaves a little apart are brought together by an increasing map of
    the whole brain. No step of the paper.
    """
    if not wanted:
        return normalized
    result = normalized.copy()
    for image, quantiles in zip(result, wanted, strict=True):
        image[mask] = distributed(image[mask], quantiles)
    return result


def fit_part(
    brains: Sequence[LabelledBrain],
    modalities: tuple[str, ...],
    preset: Preset,
    strength: float,
    seed: int,
    training: Training,
    *,
    generator: bool = True,
) -> tuple[Part, dict[str, bytes]]:
    """Train everything for some modalities, the channels of every brain.

    Returns
    -------
    part, files
        What was learned; training curves and pictures.

    Raises
    ------
    ScanError
        If too few sites or subjects are left.
    """
    learn, apart = split(brains)
    appearance = CommonAppearance.of(learn) if strength > 0 else None
    networks, run = train_normalizer(
        learn, apart, preset, strength, seed, training, appearance=appearance, generator=generator
    )
    spacing = (preset.resolution,) * 3
    alike = tuple(
        Likeness.of(
            *([rank_cells(b.images[k], b.mask, spacing)[0] for b in group]
              for group in (learn, apart))
        )
        for k in range(len(modalities))
    )  # fmt: skip
    shares = np.array(
        [[float((b.labels[b.mask] == k).float().mean()) for k in TISSUES.values()] for b in learn]
    )
    tables = appearance.quantiles.numpy() if appearance else None
    results = {b.name: _result(networks, b, preset.side // 2, tables) for b in apart}
    scores = {
        **site_facts(learn, apart),
        **run_facts(run),
        **_held_out_scores(apart, results),
        **_judged(networks, learn, apart, seed),
        **({"appearance_of": appearance.site} if appearance else {}),
    }
    networks.cpu()
    normal = np.stack((shares.mean(0), shares.std(0)), axis=1)
    part = Part(networks, modalities, alike, normal, scores, tables)
    files = {
        "curves.csv": curves_csv({"normalizer": run}),
        "training.png": training_png({"normalizer": run}),
        "normalized.png": _picture(apart, results),
    }
    return part, files


def _result(
    networks: NormalizerNetworks,
    brain: LabelledBrain,
    stride: int,
    appearance: NDArray[np.float32] | None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A brain as a scan's harmonization gives it, and its tissues."""
    drawn, tissues = normalized_brain(networks, brain.images, brain.mask, stride)
    mask = brain.mask.numpy()
    wanted, _ = wanted_quantiles(tissues, mask, appearance)
    return matched(drawn, mask, wanted), tissues


def _judged(
    networks: NormalizerNetworks,
    learn: Sequence[LabelledBrain],
    apart: Sequence[LabelledBrain],
    seed: int,
) -> dict[str, Any]:
    """What the discriminator takes cubes of both groups for; nothing without one."""
    if networks.discriminator is None:
        return {}
    sites = sorted({brain.site for brain in learn})
    groups = {"training": learn, "held_out": apart}
    return {
        "discriminator": {
            name: discriminator_scores(networks, group, sites, seed)
            for name, group in groups.items()
        }
    }


def _held_out_scores(
    brains: Sequence[LabelledBrain],
    results: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
) -> dict[str, Any]:
    """Dice of each tissue, and how far the sites' intensities differ before and after."""
    rows = []
    for brain in brains:
        tissues = results[brain.name][1]
        rest = 1 - tissues.sum(axis=0, keepdims=True)
        labels = np.concatenate((rest, tissues)).argmax(axis=0) * brain.mask.numpy()
        rows.append(dice(brain.labels.numpy(), labels, TISSUES.values()))
    sites = sorted({brain.site for brain in brains})
    counts = {"before": torch.zeros(()), "after": torch.zeros(())}
    for brain in brains:
        site, inside = torch.tensor([sites.index(brain.site)]), brain.mask[None, None].float()
        after = torch.from_numpy(results[brain.name][0])
        for when, image in (("before", brain.images), ("after", after)):
            counts[when] = counts[when] + histograms(image[None], inside, site, len(sites))
    return {
        "held_out_dice": {
            name: round(float(np.nanmean([row[number] for row in rows])), 4)
            for name, number in TISSUES.items()
        },
        "held_out_divergence_of_sites_bits": {
            when: round(divergence(found), 5) for when, found in counts.items()
        },
    }


def _picture(
    brains: Sequence[LabelledBrain],
    results: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
) -> bytes:
    """The first held-out brain of each site, before and after, and its tissues."""
    rows: dict[str, NDArray[np.float32]] = {}
    for site in sorted({brain.site for brain in brains}):
        brain = next(b for b in brains if b.site == site)
        image, tissues = results[brain.name]
        rows[f"held-out scan of {site}"] = brain.images[0].numpy()
        rows[f"{site}, normalized"] = image[0]
        rows[f"{site}, tissues"] = np.tensordot((0.33, 0.66, 1.0), tissues, 1).astype(np.float32)
    return brains_png(rows)
