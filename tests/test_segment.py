"""Atropos on a ball of three tissues and on a simulated brain."""

import numpy as np
import pytest
from scipy import ndimage

from bids_harmony.errors import ScanError
from bids_harmony.imaging.tissues import dice
from bids_harmony.interfaces.ants import ants_session
from bids_harmony.interfaces.segment import atropos


@pytest.fixture(scope="module")
def ants(tmp_path_factory):
    with ants_session(1, 1, tmp_path_factory.mktemp("ants")) as module:
        yield module


@pytest.fixture(scope="module")
def shells():
    """Fluid around grey matter around white matter, with noise; an oblique affine."""
    radius = np.linalg.norm(np.indices((36, 36, 36)) - 17.5, axis=0)
    truth = np.select([radius < 9, radius < 13, radius < 16], [3, 2, 1], 0).astype(np.uint8)
    level = np.array([0.0, 150.0, 500.0, 800.0])[truth]
    data = ndimage.gaussian_filter(level, 0.4) + np.random.default_rng(0).normal(
        0, 20, level.shape
    )
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, :3] = affine[:3, :3] @ np.array([[0.8, 0.6, 0], [-0.6, 0.8, 0], [0, 0, 1]])
    return np.maximum(data, 0).astype(np.float32), affine, truth


def test_three_tissues(ants, shells):
    data, affine, truth = shells
    labels = atropos(ants, data, affine, truth > 0)
    assert labels.dtype == np.uint8
    assert not labels[truth == 0].any()
    assert min(dice(labels, truth, (1, 2, 3)).values()) > 0.9
    again = atropos(ants, data, affine, truth > 0)
    np.testing.assert_array_equal(labels, again)
    linear = atropos(ants, 0.37 * data + 5, affine, truth > 0)
    assert np.mean(linear != labels) < 1e-3


def test_classes_rise_with_intensity(ants, shells):
    data, affine, truth = shells
    labels = atropos(ants, data.max() - data, affine, truth > 0)
    turned = np.array([0, 3, 2, 1])[truth]
    assert min(dice(labels, turned, (1, 2, 3)).values()) > 0.9


def test_refusals(ants, shells):
    data, affine, truth = shells
    with pytest.raises(ScanError, match="too small"):
        atropos(ants, data, affine, np.zeros_like(truth))
    with pytest.raises(ScanError, match="too small"):
        atropos(ants, data, affine, truth[1:])
    with pytest.raises(ScanError, match="constant"):
        atropos(ants, np.ones_like(data), affine, truth > 0)
    broken = data.copy()
    broken[17, 17, 17] = np.nan
    with pytest.raises(ScanError, match="NaN"):
        atropos(ants, broken, affine, truth > 0)
