"""How far the intensities moved from the input towards the wanted ones."""

from __future__ import annotations

from bids_harmony.metrics.similarity import Image, Mask, wasserstein


def normalized_wasserstein(
    image: Image,
    prediction: Image,
    target: Image,
    mask: Mask,
    *,
    target_mask: Mask | None = None,
    quantiles: int | None = 2001,
) -> tuple[float, float]:
    """Normalised Wasserstein distances nWD(i, p) and nWD(t, p) in per cent.

    ``nWD(i, p) = 100 WD(i, p) / WD(i, t)`` says how far the prediction moved away from the input,
    ``nWD(t, p) = 100 WD(t, p) / WD(i, t)`` how far it still is from the target. WD is the
    Wasserstein-1 distance of the in-brain intensity distributions. A perfect prediction has 100
    and 0, an untouched input 0 and 100. Source: HAIL, equation 1. There the target is one scan of
    the reference domain, of another person, and the images are scaled to their minimum and
    maximum.

    Parameters
    ----------
    image, prediction
        Input and harmonized scan on one grid and one intensity scale, shape (X, Y, Z).
    target
        What is wanted, on the same intensity scale.
    mask
        Brain mask of `image` and `prediction`.
    target_mask
        Brain mask of `target` when it is another person's or on another grid.
    quantiles
        As in `wasserstein`; None takes every voxel.

    Returns
    -------
    moved, left
        nWD(i, p) and nWD(t, p), >= 0; NaN if input and target have one distribution, so that
        there is nothing to normalise by.

    Raises
    ------
    ScanError
        As `wasserstein`.
    """
    gap = wasserstein(image, target, mask, second_mask=target_mask, quantiles=quantiles)
    moved = wasserstein(image, prediction, mask, quantiles=quantiles)
    left = wasserstein(prediction, target, mask, second_mask=target_mask, quantiles=quantiles)
    if gap == 0:
        return float("nan"), float("nan")
    return 100 * moved / gap, 100 * left / gap
