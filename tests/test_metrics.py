"""Metrics against values computed another way."""

import numpy as np
import pytest
from scipy import ndimage, stats
from skimage.metrics import structural_similarity

from bids_harmony.errors import ScanError
from bids_harmony.metrics.similarity import (
    edge_correlation,
    jsd,
    ncc,
    psnr,
    rank_agreement,
    ssim,
    wasserstein,
)

METRICS = (psnr, ssim, ncc, rank_agreement, edge_correlation, jsd, wasserstein)


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    shape = (24, 26, 22)
    mask = np.zeros(shape, bool)
    mask[5:19, 5:21, 5:17] = True
    a = ndimage.gaussian_filter(rng.normal(size=shape), 1.5)
    a = 0.5 + 0.2 * a / a.std()
    b = a + rng.normal(0, 0.05, shape)
    return a.astype(np.float32), b.astype(np.float32), mask


def test_psnr(pair):
    a, b, mask = pair
    mse = np.mean((a[mask].astype(float) - b[mask]) ** 2)
    assert psnr(a, b, mask) == pytest.approx(-10 * np.log10(mse), rel=1e-6)
    assert psnr(a, b, mask, data_range=2) == pytest.approx(10 * np.log10(4 / mse), rel=1e-6)
    assert psnr(a, a, mask) == float("inf")


def test_ssim_against_its_formula_and_the_whole_image(pair):
    a, b, mask = pair
    x, y = np.where(mask, a, 0).astype(float), np.where(mask, b, 0).astype(float)

    def g(image):
        return ndimage.gaussian_filter(image, 1.5, truncate=3.5)

    mx, my = g(x), g(y)
    vx, vy, cov = g(x * x) - mx**2, g(y * y) - my**2, g(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    formula = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(a, b, mask) == pytest.approx(formula[mask].mean(), abs=1e-4)
    _, full = structural_similarity(
        x, y, data_range=1, gaussian_weights=True, use_sample_covariance=False, full=True
    )
    assert ssim(a, b, mask) == pytest.approx(full[mask].mean(), abs=1e-4)
    assert ssim(a, a, mask) == pytest.approx(1)


def test_ssim_needs_room(pair):
    a, b, _ = pair
    small = np.zeros((8, 8, 8), bool)
    small[3:5, 3:5, 3:5] = True
    with pytest.raises(ScanError, match="SSIM window"):
        ssim(a[:8, :8, :8], b[:8, :8, :8], small)


def test_correlations(pair):
    a, b, mask = pair
    assert ncc(a, b, mask) == pytest.approx(np.corrcoef(a[mask], b[mask])[0, 1], rel=1e-6)
    rho = stats.spearmanr(a[mask], b[mask]).statistic
    assert rank_agreement(a, b, mask) == pytest.approx(rho, rel=1e-9)
    assert rank_agreement(a, a**3, mask) == pytest.approx(1)
    assert rank_agreement(a, -a, mask) == pytest.approx(-1)
    assert ncc(a, 3 * a + 2, mask) == pytest.approx(1)
    assert np.isnan(ncc(a, np.ones_like(a), mask))


def test_edge_correlation(pair):
    a, b, mask = pair
    core = np.zeros_like(mask)
    core[6:18, 6:20, 6:16] = True  # the mask, one voxel smaller
    magnitudes = []
    for image in (a.astype(float), b.astype(float)):
        parts = [(np.roll(image, -1, axis) - np.roll(image, 1, axis)) / 2 for axis in range(3)]
        magnitudes.append(np.sqrt(sum(part**2 for part in parts))[core])
    expected = np.corrcoef(*magnitudes)[0, 1]
    assert edge_correlation(a, b, mask) == pytest.approx(expected, rel=1e-4)
    assert edge_correlation(a, 2 * a + 1, mask) == pytest.approx(1, abs=1e-5)
    stripped = np.where(mask, a, 0)
    assert edge_correlation(a, stripped, mask) == pytest.approx(1, abs=1e-6)
    assert edge_correlation(a, np.roll(a, 3, 0), mask) < 0.5
    thin = np.zeros_like(mask)
    thin[10] = True
    assert np.isnan(edge_correlation(a, b, thin))


def test_jsd(pair):
    a, b, mask = pair
    low, high = min(a[mask].min(), b[mask].min()), max(a[mask].max(), b[mask].max())
    p, q = (np.histogram(x[mask], 64, (low, high))[0] / mask.sum() for x in (a, b))
    m = (p + q) / 2
    expected = (stats.entropy(p, m, base=2) + stats.entropy(q, m, base=2)) / 2
    assert jsd(a, b, mask, bins=64) == pytest.approx(expected, rel=1e-6)
    assert jsd(a, a, mask) == 0
    assert jsd(a, a + 100, mask) == pytest.approx(1)  # no overlap: one bit
    assert jsd(np.ones_like(a), np.ones_like(a), mask) == 0


def test_wasserstein(pair):
    a, b, mask = pair
    expected = stats.wasserstein_distance(a[mask], b[mask])
    assert wasserstein(a, b, mask, quantiles=None) == pytest.approx(expected, rel=1e-9)
    assert wasserstein(a, b, mask) == pytest.approx(expected, rel=0.02)
    assert wasserstein(a, a + 0.25, mask) == pytest.approx(0.25, rel=1e-5)


def test_two_people(pair):
    a, _, mask = pair
    other = np.roll(mask, 2, 0)
    shifted = np.roll(a, 2, 0)
    assert wasserstein(a, shifted, mask, second_mask=other) == pytest.approx(0, abs=1e-9)
    assert jsd(a, shifted, mask, second_mask=other) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_only_the_brain_counts_and_errors(pair, metric):
    a, b, mask = pair
    spoiled = np.where(mask, b, -1e6).astype(np.float32)
    assert metric(a, b, mask) == pytest.approx(metric(a, spoiled, mask), rel=1e-6)
    assert isinstance(metric(a, b, mask), float)
    with pytest.raises(ScanError, match="mask is empty"):
        metric(a, b, np.zeros_like(mask))
    with pytest.raises(ScanError, match="differ in shape"):
        metric(a, b[1:], mask)
    broken = b.copy()
    broken[10, 10, 10] = np.nan
    with pytest.raises(ScanError, match="NaN"):
        metric(a, broken, mask)
