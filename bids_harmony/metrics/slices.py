"""Metrics of a volume slice by slice: agreement over whole slices, and jumps between them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from bids_harmony.errors import ScanError
from bids_harmony.metrics.similarity import Image, Mask

FloatArray = NDArray[np.float64]
_SSIM_WINDOW = 11


def slice_consistency(image: Image, mask: Mask, axis: int, *, least: float = 0.1) -> float:
    """Mean absolute difference of neighbouring slices' in-mask means, in intensity units.

    A method that works slice by slice and lets them jump has a larger value than its input.

    Parameters
    ----------
    image, mask
        Scan and brain mask, shape (X, Y, Z).
    axis
        Array axis along which slices are neighbours.
    least
        Slices with a smaller share of the largest slice's brain voxels are left out: the mean of
        a few voxels at the brain's tip says nothing.

    Returns
    -------
    Value >= 0; NaN if no two neighbouring slices are left.

    Raises
    ------
    ScanError
        If the shapes differ, the mask is empty or a brain voxel is not finite.
    """
    inside, others = _checked(mask, image), tuple(k for k in range(3) if k != axis)
    count = inside.sum(axis=others)
    total = np.where(inside, image, 0).sum(axis=others, dtype=np.float64)
    kept = count >= max(1, least * count.max())
    means = np.divide(total, count, out=np.full(count.shape, np.nan), where=kept)
    steps = np.abs(np.diff(means))
    steps = steps[np.isfinite(steps)]
    return float(steps.mean()) if steps.size else float("nan")


def field_psnr(
    reference: Image,
    image: Image,
    mask: Mask,
    *,
    axis: int = 2,
    field: tuple[int, int] | None = None,
    count: int | None = None,
    data_range: float = 1.0,
) -> float:
    """Peak signal-to-noise ratio in dB over whole slices, averaged over slices.

    Brains are skull-stripped (0 outside the mask) and the zero background counts, as in the
    tables of BlindHarmony; its share, and so the value, depends on `field`. It is higher than the
    ratio within the brain, by ``-10 log10(brain's share of the field)`` for one slice.

    Parameters
    ----------
    reference, image, mask
        On one grid, shape (X, Y, Z).
    axis
        Array axis across slices.
    field
        Width and height, in voxels, of the window around the brain's centre; None: the slice.
    count
        How many slices around the brain's centre of mass; None: all that have brain.
    data_range
        Peak, in the images' units.

    Returns
    -------
    Mean over slices that differ; infinity if none does.

    Raises
    ------
    ScanError
        If the shapes differ, the mask is empty or a brain voxel is not finite.
    """
    values = [
        peak_signal_noise_ratio(a, b, data_range=data_range)
        for a, b in _slices(reference, image, mask, axis, field, count)
        if not np.array_equal(a, b)
    ]
    return float(np.mean(values)) if values else float("inf")


def field_ssim(
    reference: Image,
    image: Image,
    mask: Mask,
    *,
    axis: int = 2,
    field: tuple[int, int] | None = None,
    count: int | None = None,
    data_range: float = 1.0,
) -> float:
    """Structural similarity, -1..1, of whole slices in two dimensions, averaged over slices.

    Gaussian window (SD 1.5 voxels, 11 wide), as in Wang et al. (2004). Background and parameters
    as in `field_psnr`: the equal background has similarity 1 and raises the mean.

    Raises
    ------
    ScanError
        As `field_psnr`, or if a slice is narrower than the window.
    """
    pairs = _slices(reference, image, mask, axis, field, count)
    if min(pairs[0][0].shape) < _SSIM_WINDOW:
        raise ScanError(f"slices of {pairs[0][0].shape} voxels are narrower than the SSIM window")
    # its own mean leaves out a border of 5 voxels: the map is averaged here
    values = [
        structural_similarity(
            a,
            b,
            data_range=data_range,
            gaussian_weights=True,
            use_sample_covariance=False,
            full=True,
        )[1].mean()
        for a, b in pairs
    ]
    return float(np.mean(values))


def _checked(mask: Mask, *images: Image) -> Mask:
    inside = np.asarray(mask, dtype=bool)
    for image in images:
        if image.shape != inside.shape:
            raise ScanError(f"image {image.shape} and mask {inside.shape} differ in shape")
        if not np.isfinite(image[inside]).all():
            raise ScanError("NaN or infinite values inside the brain; repair the image")
    if not inside.any():
        raise ScanError("the brain mask is empty; check the mask or give another one")
    return inside


def _slices(
    reference: Image,
    image: Image,
    mask: Mask,
    axis: int,
    field: tuple[int, int] | None,
    count: int | None,
) -> list[tuple[FloatArray, FloatArray]]:
    """Pairs of skull-stripped slices, each cut or padded with zeros to the field."""
    inside = np.moveaxis(_checked(mask, reference, image), axis, 0)
    pair = [
        np.where(inside, np.moveaxis(np.asarray(x, dtype=np.float64), axis, 0), 0)
        for x in (reference, image)
    ]
    seen = np.flatnonzero(inside.any(axis=(1, 2)))
    if count is not None:
        middle = ndimage.center_of_mass(inside)[0]
        seen = np.sort(seen[np.argsort(np.abs(seen - middle), kind="stable")[:count]])
    if field is not None:
        (box,) = ndimage.find_objects(inside.any(axis=0).astype(np.uint8))
        pair = [_window(x, box, field) for x in pair]
    return [(pair[0][k], pair[1][k]) for k in seen]


def _window(stack: FloatArray, box: tuple[slice, slice], field: tuple[int, int]) -> FloatArray:
    """Cut a stack of slices to a field around the centre of a box; zeros beyond the stack."""
    starts = [(s.start + s.stop - wide) // 2 for s, wide in zip(box, field, strict=True)]
    around = [
        (max(0, -start), max(0, start + wide - size))
        for start, wide, size in zip(starts, field, stack.shape[1:], strict=True)
    ]
    padded = np.pad(stack, [(0, 0), *around])
    cuts = [
        slice(start + before, start + before + wide)
        for start, wide, (before, _) in zip(starts, field, around, strict=True)
    ]
    return np.asarray(padded[:, cuts[0], cuts[1]])
