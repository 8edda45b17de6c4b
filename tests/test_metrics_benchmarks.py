"""Metrics of the benchmark tables against values computed another way."""

import numpy as np
import pytest
from scipy import ndimage, stats
from scipy.spatial import distance
from scipy.spatial.distance import cdist

from bids_harmony.errors import ScanError
from bids_harmony.imaging.tissues import dice
from bids_harmony.metrics.intensity import normalized_wasserstein
from bids_harmony.metrics.similarity import psnr
from bids_harmony.metrics.slices import field_psnr, field_ssim, slice_consistency
from bids_harmony.metrics.tissue import (
    label_volumes,
    mean_hausdorff,
    relative_volume_difference,
)


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    shape = (30, 34, 28)
    mask = np.zeros(shape, bool)
    mask[6:24, 7:27, 5:21] = True
    a = ndimage.gaussian_filter(rng.normal(size=shape), 1.5)
    a = 0.5 + 0.2 * a / a.std()
    b = np.abs(a) ** 1.2 + rng.normal(0, 0.05, shape)
    return a.astype(np.float32), b.astype(np.float32), mask


def test_normalized_wasserstein(pair):
    a, b, mask = pair
    target = (0.8 * a + 0.3).astype(np.float32)

    def distance_of(x, y):
        return stats.wasserstein_distance(x[mask], y[mask])

    gap = distance_of(a, target)
    moved, left = normalized_wasserstein(a, b, target, mask, quantiles=None)
    assert moved == pytest.approx(100 * distance_of(a, b) / gap, rel=1e-9)
    assert left == pytest.approx(100 * distance_of(b, target) / gap, rel=1e-9)
    assert normalized_wasserstein(a, a, target, mask) == pytest.approx((0, 100))
    assert normalized_wasserstein(a, target, target, mask) == pytest.approx((100, 0))
    half = a + 0.25 * (target - a)
    assert normalized_wasserstein(a, half, target, mask) == pytest.approx((25, 75), rel=1e-3)
    assert np.isnan(normalized_wasserstein(a, b, a, mask)).all()


def test_normalized_wasserstein_of_another_person(pair):
    a, _, mask = pair
    other = np.roll(mask, 3, 1)
    target = np.roll((a + 0.5).astype(np.float32), 3, 1)
    moved, left = normalized_wasserstein(a, a + 0.5, target, mask, target_mask=other)
    assert moved == pytest.approx(100, rel=1e-5)
    assert left == pytest.approx(0, abs=1e-4)


def test_volumes_and_their_difference():
    first = np.repeat([0, 1, 2, 3], [5, 10, 20, 40])
    second = np.repeat([0, 1, 2, 3], [9, 8, 25, 33])
    assert label_volumes(first, (1, 3), voxel=8.0) == {1: 80.0, 3: 320.0}
    found = relative_volume_difference(first, second, (1, 2, 3, 4))
    assert found[1] == pytest.approx(20)
    assert found[2] == pytest.approx(25)
    assert found[3] == pytest.approx(17.5)
    assert np.isnan(found[4])
    coarse = relative_volume_difference(first, second[::5], (3,), ratio=5.0)
    voxels = np.count_nonzero(second[::5] == 3)
    assert coarse[3] == pytest.approx(100 * abs(5 * voxels - 40) / 40)


def test_dice_against_scipy():
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 4, (2, 12, 12, 12))
    found = dice(first, second, (1, 2, 3, 7))
    for label in (1, 2, 3):
        expected = 1 - distance.dice((first == label).ravel(), (second == label).ravel())
        assert found[label] == pytest.approx(expected, rel=1e-12)
    assert np.isnan(found[7])
    assert dice(first, first, (2,)) == {2: 1.0}
    with pytest.raises(ScanError, match="resample"):
        dice(first, second[1:], (1,))


def test_mean_hausdorff_against_all_distances():
    rng = np.random.default_rng(5)
    first, second = (rng.integers(0, 3, (6, 7, 5)) for _ in range(2))
    spacing = (1.0, 2.0, 0.5)
    found = mean_hausdorff(first, second, (1, 2, 7), spacing)
    for label in (1, 2):
        a, b = (np.argwhere(x == label) * spacing for x in (first, second))
        apart = cdist(a, b)
        expected = (apart.min(1).mean() + apart.min(0).mean()) / 2
        assert found[label] == pytest.approx(expected, abs=1e-9)
    assert np.isnan(found[7])
    assert mean_hausdorff(first, first, (1,), spacing) == {1: 0}
    with pytest.raises(ScanError, match="resample one"):
        mean_hausdorff(first, second[1:], (1,), spacing)


def test_slice_consistency_by_hand():
    image = np.zeros((6, 7, 8))
    image[:, :, :] = np.array([9, 1, 2, 4, 3, 3, 7, 9.0])
    mask = np.zeros(image.shape, bool)
    mask[1:5, 1:6, 1:7] = True  # slices 1..6: steps 1, 2, 1, 0, 4
    assert slice_consistency(image, mask, 2) == pytest.approx(8 / 5)
    assert slice_consistency(image, mask, 0) == pytest.approx(0)
    thin = mask.copy()
    thin[:, :, 6] = False
    thin[2, 2, 6] = True  # one voxel of 20: left out
    assert slice_consistency(image, thin, 2) == pytest.approx(4 / 4)
    assert slice_consistency(image, thin, 2, least=0) == pytest.approx(8 / 5)
    alone = np.zeros_like(mask)
    alone[:, :, 3] = True
    assert np.isnan(slice_consistency(image, alone, 2))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_field_scores_against_torchmetrics(pair, axis):
    functional = pytest.importorskip("torchmetrics.functional.image")
    torch = pytest.importorskip("torch")
    a, b, mask = pair
    stripped = [np.moveaxis(np.where(mask, x, 0), axis, 0)[:, None] for x in (a, b)]
    seen = np.moveaxis(mask, axis, 0).any(axis=(1, 2))
    x, y = (torch.from_numpy(s[seen].astype(np.float64)) for s in stripped)
    expected = [
        float(functional.peak_signal_noise_ratio(q[None], p[None], data_range=1.0))
        for p, q in zip(x, y, strict=True)
    ]
    assert field_psnr(a, b, mask, axis=axis) == pytest.approx(np.mean(expected), rel=1e-6)
    # borders are mirrored in two ways
    similarity = functional.structural_similarity_index_measure(
        y, x, data_range=1.0, sigma=1.5, kernel_size=11
    )
    assert field_ssim(a, b, mask, axis=axis) == pytest.approx(float(similarity), abs=2e-3)


def test_field_psnr_and_the_share_of_background():
    mask = np.zeros((20, 20, 5), bool)
    mask[5:15, 4:14, 1:4] = True
    a = np.full(mask.shape, 0.5)
    b = a + 0.1
    inside = psnr(a, b, mask)
    assert field_psnr(a, b, mask) == pytest.approx(inside + 10 * np.log10(4), rel=1e-9)
    assert field_psnr(a, b, mask, field=(10, 10)) == pytest.approx(inside, rel=1e-9)
    wider = field_psnr(a, b, mask, field=(40, 30), count=2)
    assert wider == pytest.approx(inside + 10 * np.log10(12), rel=1e-9)
    assert field_psnr(a, a, mask) == float("inf")
    assert field_ssim(a, a, mask) == pytest.approx(1)


def test_field_takes_the_slices_around_the_centre():
    mask = np.zeros((16, 16, 9), bool)
    mask[3:13, 3:13, 1:8] = True
    a = np.zeros(mask.shape)
    b = np.where(np.arange(9) == 4, 0.1, np.where(np.arange(9) == 1, 10.0, 0.0)) + a
    assert field_psnr(a, b, mask, count=1) == pytest.approx(20 + 10 * np.log10(256 / 100))
    assert field_psnr(a, b, mask) < 10


@pytest.mark.parametrize("metric", [field_psnr, field_ssim])
def test_field_errors(pair, metric):
    a, b, mask = pair
    with pytest.raises(ScanError, match="mask is empty"):
        metric(a, b, np.zeros_like(mask))
    with pytest.raises(ScanError, match="differ in shape"):
        metric(a, b[1:], mask)
    broken = b.copy()
    broken[10, 10, 10] = np.inf
    with pytest.raises(ScanError, match="NaN"):
        metric(a, broken, mask)
    spoiled = np.where(mask, b, np.nan).astype(np.float32)
    assert metric(a, spoiled, mask) == pytest.approx(metric(a, b, mask))
    if metric is field_ssim:
        with pytest.raises(ScanError, match="narrower"):
            metric(a, b, mask, field=(10, 12))
