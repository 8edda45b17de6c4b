"""Learning the tone of the reference domain, and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bids_harmony.methods.base import Volume
from bids_harmony.methods.reference_brains import ReferenceBrains
from bids_harmony.methods.scan_tone import scan_curve
from bids_harmony.methods.tone import Placed, Tone, core
from bids_harmony.training.tone import mean_quantiles, tone_errors, tone_samples, train_tone

_FOLDS = 4


def fit_tone_model(
    brains: ReferenceBrains,
    held_out: ReferenceBrains,
    *,
    samples: int,
    epochs: int,
    seed: int,
    minutes: float | None,
) -> tuple[Tone, dict[str, float]]:
    """Learn the tone of the reference domain.

    Share and doubt are cross-validated over the subjects of `brains`, and over `held_out`: one
    brain of unusual tissue fractions must not decide them alone. Neither the network nor the mean
    quantiles by which a brain is judged have seen it.

    A network learns on the mapping to the mean quantiles of its own brains. On a mapping to
    other ones it would learn the difference too, and take away what those others add.

    Returns
    -------
    tone, scores
        Held-out error before and after the correction, share and doubt.
    """
    inner, inner_held_out = (
        [(image, core(mask, spacing)) for (image, mask), spacing in part.placed]
        for part in (brains, held_out)
    )
    quantiles = mean_quantiles(inner)
    learned = tone_samples(inner, quantiles, count=samples, seed=seed, minutes=minutes)
    network = train_tone(learned, epochs=epochs, seed=seed)
    rest = None if minutes is None else minutes / 8
    scores = tone_errors(
        network, inner_held_out, quantiles, count=samples // 8, seed=seed + 1, minutes=rest
    )
    judges = [(Tone(quantiles, network), held_out, list(range(len(held_out.brains))))]
    names = sorted(set(brains.subjects))
    folds = min(_FOLDS, len(names))
    for fold in range(folds if folds > 1 else 0):
        apart = [k for k, name in enumerate(brains.subjects) if names.index(name) % folds == fold]
        others = [brain for k, brain in enumerate(inner) if k not in apart]
        theirs = learned.without(apart).towards(quantiles, mean_quantiles(others))
        judge = Tone(
            mean_quantiles([*others, *inner_held_out]),
            train_tone(theirs, epochs=epochs, seed=seed),
        )
        judges.append((judge, brains, apart))
    tone = Tone(mean_quantiles([*inner, *inner_held_out]), network)
    share = _share([(judge, part.placed[k]) for judge, part, which in judges for k in which])
    changes = [
        _change(replace(judge, share=share), part.volumes[k], part.resolution)
        for judge, part, which in judges
        for k in which
    ]
    doubt = float(np.sqrt(np.mean(np.square(changes))))
    return replace(tone, doubt=doubt, share=share), {**scores, "share": share, "doubt": doubt}


def _share(pairs: Sequence[tuple[Tone, Placed]]) -> float:
    """Share of the correction that brings brains nearest to themselves, by least squares.

    Each brain goes with a tone that was not learned from it. All brain voxels count: the curve is
    found in the brain's core, but applied to its cortex too.
    """
    asked = given = 0.0
    for tone, ((image, mask), spacing) in pairs:
        own = image[mask].numpy()
        plain = tone.matching(image[core(mask, spacing)])(own)
        moved = tone.curve(image, mask, spacing, whole=True)(own) - plain
        asked += float(np.mean((own - plain) * moved))
        given += float(np.mean(moved**2))
    return float(np.clip(asked / max(given, 1e-12), 0, 1))


def _change(tone: Tone, volume: Volume, resolution: float) -> float:
    """Root mean square of what the curve changes in a brain, on the scan's own voxels."""
    values = volume.data[np.asarray(volume.mask, dtype=bool)]
    _, curve = scan_curve(tone, volume, resolution)
    return float(np.sqrt(np.mean((curve(values) - values) ** 2)))
