"""Guided transfer against plain local regressions, and what it must keep."""

import numpy as np
import pytest

from bids_harmony.errors import ScanError
from bids_harmony.imaging.guided import bound_warnings, guided_transfer


@pytest.fixture
def images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    scan, drawn = rng.random((2, 9, 8, 7))
    return scan, drawn, rng.random(scan.shape) < 0.8


def _plain(scan, drawn, mask, radius, noise):
    """Loop over voxels, a regression in each cube by its normal equations."""
    slope, offset = np.zeros(scan.shape), np.zeros(scan.shape)

    def cube(place):
        return tuple(slice(max(i - radius, 0), i + radius + 1) for i in place)

    for place in np.argwhere(mask):
        box = cube(place)
        x, y = scan[box][mask[box]], drawn[box][mask[box]]
        covariance = np.cov(x, y, bias=True) if x.size > 1 else np.zeros((2, 2))
        a = covariance[0, 1] / (covariance[0, 0] + noise**2)
        slope[tuple(place)], offset[tuple(place)] = a, y.mean() - a * x.mean()
    result = np.zeros(scan.shape)
    for place in np.argwhere(mask):
        box, here = cube(place), tuple(place)
        result[here] = slope[box][mask[box]].mean() * scan[here] + offset[box][mask[box]].mean()
    return result


@pytest.mark.parametrize("radius", [1, 2])
def test_it_is_the_mean_of_local_regressions(images, radius) -> None:
    found = guided_transfer(*images, radius=radius, noise=0.05)
    np.testing.assert_allclose(found, _plain(*images, radius, 0.05), atol=1e-6)
    assert not found[~images[2]].any()


def test_a_linear_map_is_taken_over_whole(images) -> None:
    scan, _, mask = images
    found = guided_transfer(scan, 0.9 - 0.5 * scan, mask, radius=2, noise=1e-6)
    np.testing.assert_allclose(found[mask], (0.9 - 0.5 * scan)[mask], atol=1e-5)


def test_what_the_scan_lacks_is_not_drawn_into_it() -> None:
    mask = np.ones((16, 16, 16), dtype=bool)
    drawn = np.full(mask.shape, 0.5)
    drawn[8, 8, 8] = 1.0
    found = guided_transfer(np.full(mask.shape, 0.3), drawn, mask, radius=2, noise=0.01)
    assert found.max() < 0.51
    assert found.min() > 0.499


def test_an_edge_stays_where_it_is_though_the_drawn_image_is_blurred() -> None:
    scan = np.zeros((16, 16, 16))
    scan[8:] = 1
    drawn = np.clip((np.arange(16) - 4) / 8, 0, 1)[:, None, None] * np.ones(scan.shape)
    found = guided_transfer(scan, drawn, np.ones(scan.shape, bool), radius=3, noise=0.01)
    steps = np.abs(np.diff(found.mean((1, 2))))
    assert steps.argmax() == 7
    assert steps[7] > 4 * np.delete(steps, 7).max()


def test_bad_input_is_refused(images) -> None:
    scan, drawn, mask = images
    with pytest.raises(ScanError, match="differ"):
        guided_transfer(scan, drawn[1:], mask, radius=1, noise=0.1)
    drawn[tuple(np.argwhere(mask)[0])] = np.nan
    with pytest.raises(ScanError, match="NaN"):
        guided_transfer(scan, drawn, mask, radius=1, noise=0.1)


def test_a_change_that_was_cut_is_told_where_it_is_more_than_a_hundredth():
    assert bound_warnings(0.01) == []
    (text,) = bound_warnings(0.02)
    assert "2% of the brain was cut at 0.5 of the intensity scale" in text
