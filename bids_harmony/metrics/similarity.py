"""How alike two images are inside the brain, and whether the anatomy was kept.

All take images on one grid, shape (X, Y, Z), and a brain mask of the same shape; only voxels
inside the mask count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats
from scipy.spatial.distance import jensenshannon
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from bids_harmony.errors import ScanError

Image = NDArray[Any]
Mask = NDArray[np.bool_]


def psnr(reference: Image, image: Image, mask: Mask, *, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB; infinity for equal images.

    Parameters
    ----------
    reference, image, mask
        See module.
    data_range
        Peak, in the images' units; 1 on the contract's intensity scale.

    Raises
    ------
    ScanError
        If the shapes differ, the mask is empty or a brain voxel is not finite. So do all others.
    """
    a, b = _pair(reference, image, mask)
    if np.array_equal(a, b):
        return float("inf")
    return float(peak_signal_noise_ratio(a, b, data_range=data_range))


def ssim(reference: Image, image: Image, mask: Mask, *, data_range: float = 1.0) -> float:
    """Structural similarity, -1..1, averaged over the mask.

    Three-dimensional, Gaussian window (SD 1.5 voxels, 11 wide) as in Wang et al. (2004). Voxels
    outside the mask are set to 0 in both images first. The grid must be 11 voxels wide or more
    once cut to the brain's bounding box with a margin of 5 voxels.
    """
    _pair(reference, image, mask)
    mask = np.asarray(mask, dtype=bool)
    (found,) = ndimage.find_objects(mask.astype(np.uint8))
    box = tuple(
        slice(max(s.start - 5, 0), min(s.stop + 5, n))
        for s, n in zip(found, mask.shape, strict=True)
    )
    inside = mask[box]
    if min(inside.shape) < 11:
        raise ScanError(f"the brain's box {inside.shape} is smaller than the SSIM window (11)")
    _, values = structural_similarity(
        np.where(inside, reference[box], 0).astype(np.float32),
        np.where(inside, image[box], 0).astype(np.float32),
        data_range=data_range,
        gaussian_weights=True,
        use_sample_covariance=False,
        full=True,
    )
    return float(values[inside].mean())


def ncc(first: Image, second: Image, mask: Mask) -> float:
    """Normalised cross-correlation (Pearson's r), -1..1; NaN if either brain is constant."""
    return _correlation(*_pair(first, second, mask))


def rank_agreement(first: Image, second: Image, mask: Mask) -> float:
    """Spearman's rank correlation, -1..1: 1 when the order of intensities is kept.

    NaN if either brain is constant.
    """
    a, b = _pair(first, second, mask)
    return _correlation(stats.rankdata(a), stats.rankdata(b))


def edge_correlation(first: Image, second: Image, mask: Mask) -> float:
    """Pearson's r of the gradient magnitudes, -1..1: 1 when edges stay where they are.

    Central differences per voxel, over mask voxels whose six neighbours are inside too, so that
    the mask's own edge has no say. NaN if there is none such or either magnitude is constant.
    """
    _pair(first, second, mask)
    cross = ndimage.generate_binary_structure(3, 1)
    core = ndimage.binary_erosion(mask, cross)
    if not core.any():
        return float("nan")
    return _correlation(_gradient(first)[core], _gradient(second)[core])


def jsd(
    first: Image, second: Image, mask: Mask, *, second_mask: Mask | None = None, bins: int = 256
) -> float:
    """Jensen-Shannon divergence of the two brains' histograms in bits, 0..1.

    Common bins from the smaller minimum to the larger maximum. The brains may be of different
    people: give `second_mask` then.
    """
    a, b = _values(first, mask), _values(second, mask if second_mask is None else second_mask)
    low, high = min(a.min(), b.min()), max(a.max(), b.max())
    if low == high:
        return 0.0
    p, _ = np.histogram(a, bins=bins, range=(low, high))
    q, _ = np.histogram(b, bins=bins, range=(low, high))
    return float(jensenshannon(p, q, base=2) ** 2)


def wasserstein(
    first: Image,
    second: Image,
    mask: Mask,
    *,
    second_mask: Mask | None = None,
    quantiles: int | None = 2001,
) -> float:
    """Wasserstein-1 (earth mover's) distance of the two intensity distributions, >= 0.

    In the images' intensity units.

    Parameters
    ----------
    first, second, mask
        See module.
    second_mask
        Brain mask of `second` when it is another person's.
    quantiles
        Replace each brain by this many equally likely quantiles (mid-points), which is much
        faster than all voxels; None takes every voxel.
    """
    a, b = _values(first, mask), _values(second, mask if second_mask is None else second_mask)
    if quantiles is not None:
        probability = (np.arange(quantiles) + 0.5) / quantiles
        return float(np.mean(np.abs(np.quantile(a, probability) - np.quantile(b, probability))))
    return float(stats.wasserstein_distance(a, b))


def _values(image: Image, mask: Mask) -> NDArray[np.float64]:
    if image.shape != mask.shape:
        raise ScanError(f"image {image.shape} and mask {mask.shape} differ in shape")
    values = np.asarray(image[np.asarray(mask, dtype=bool)], dtype=np.float64)
    if values.size == 0:
        raise ScanError("the brain mask is empty; check the mask or give another one")
    if not np.isfinite(values).all():
        raise ScanError("NaN or infinite values inside the brain; repair the image")
    return values


def _pair(first: Image, second: Image, mask: Mask) -> tuple[NDArray[np.float64], ...]:
    return _values(first, mask), _values(second, mask)


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(stats.pearsonr(a, b).statistic)


def _gradient(image: Image) -> NDArray[np.float32]:
    squares = np.zeros(image.shape, dtype=np.float32)
    for axis in range(3):
        squares += np.gradient(image.astype(np.float32), axis=axis) ** 2
    return np.sqrt(squares)
