"""Intensity scales are exact, invertible and say what is wrong."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bids_harmony.errors import ScanError
from bids_harmony.imaging.scale import IntensityScale, fit_scale, median_scale


def head(seed=0, gain=1000.0):
    rng = np.random.default_rng(seed)
    mask = np.zeros((12, 14, 10), bool)
    mask[3:9, 3:11, 2:8] = True
    data = np.where(mask, rng.uniform(0.2, 1.0, mask.shape), 0) * gain
    data[0, :, :] = 5 * gain  # fat brighter than brain
    return data.astype(np.float32), mask


def test_robust_takes_the_brain_only_and_keeps_zero():
    data, mask = head()
    scale = fit_scale(data, mask, "robust")
    assert scale.low == 0
    assert scale.high == pytest.approx(np.percentile(data[mask].astype(float), 99.5), rel=1e-12)
    scaled = scale.apply(data)
    assert scaled.dtype == np.float32
    assert np.array_equal(scaled == 0, data == 0)
    assert scaled.max() > 4  # nothing is clipped


def test_robust_with_negative_brain_values():
    data, mask = head()
    data[mask] -= 500
    scale = fit_scale(data, mask, "robust")
    low, high = np.percentile(data[mask].astype(float), (0.5, 99.5))
    assert (scale.low, scale.high) == pytest.approx((low, high))
    # A single negative voxel, as spline interpolation leaves it, does not move the zero.
    data, mask = head()
    data[5, 5, 5] = -20
    assert fit_scale(data, mask, "robust").low == 0


def test_minmax_is_that_of_the_skull_stripped_image():
    data, mask = head()
    scale = fit_scale(data, mask, "minmax")
    stripped = scale.apply(np.where(mask, data, 0))
    assert (stripped.min(), stripped.max()) == (0, 1)


@given(
    data=hnp.arrays(
        np.float32,
        st.integers(1, 60),
        elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
    ),
    low=st.floats(-1e5, 1e5),
    span=st.floats(1e-2, 1e6),
)
def test_apply_then_invert_is_the_identity(data, low, span):
    scale = IntensityScale("minmax", low, low + span)
    eps = np.finfo(np.float32).eps
    limit = eps * (np.abs(data.astype(float)) + np.abs(data.astype(float) - low)) + 1e-12
    assert np.all(np.abs(scale.invert(scale.apply(data)).astype(float) - data) <= limit)


@given(
    low=st.floats(-1e5, 1e5), span=st.floats(1e-2, 1e6), kind=st.sampled_from(["robust", "minmax"])
)
def test_dict_round_trip(low, span, kind):
    scale = IntensityScale(kind, low, low + span)
    assert IntensityScale.from_dict(scale.to_dict()) == scale


@pytest.mark.parametrize("kind", ["robust", "minmax"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d, m: m.fill(False), "mask is empty"),
        (lambda d, m: d.fill(7), "all brain voxels have the value 7"),
        (lambda d, m: d.__setitem__((0, 0, 0), np.nan), "NaN or infinite"),
        (lambda d, m: d.__setitem__((5, 5, 5), np.inf), "NaN or infinite"),
    ],
)
def test_unusable_scans(kind, spoil, message):
    data, mask = head()
    spoil(data, mask)
    with pytest.raises(ScanError, match=rf"sub-01_T1w: .*{message}"):
        fit_scale(data, mask, kind, name="sub-01_T1w")


def test_almost_empty_brain_is_an_error():
    data, mask = head()
    data[mask] = 0
    data[5, 5, 5] = 100
    with pytest.raises(ScanError, match="too few bright"):
        fit_scale(data, mask, "robust")


def test_wrong_shape_kind_and_limits():
    data, mask = head()
    with pytest.raises(ScanError, match="differ in shape"):
        fit_scale(data, mask[:-1], "robust")
    with pytest.raises(ScanError, match="unknown intensity scale 'p99'"):
        fit_scale(data, mask, "p99")
    for low, high in ((1.0, 1.0), (2.0, 1.0), (0.0, float("nan")), (float("-inf"), 0.0)):
        with pytest.raises(ScanError, match="finite low < high"):
            IntensityScale("robust", low, high)
    with pytest.raises(ScanError, match="not an intensity scale"):
        IntensityScale.from_dict({"kind": "robust", "low": 0})


def test_median_scale():
    scales = [IntensityScale("robust", 0, high) for high in (900, 5000, 1000)]
    assert median_scale(scales) == IntensityScale("robust", 0, 1000)
    with pytest.raises(ScanError, match="at least one"):
        median_scale([])
    with pytest.raises(ScanError, match="one kind"):
        median_scale([*scales, IntensityScale("minmax", 0, 1)])
