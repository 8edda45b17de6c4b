"""The change comes to the raw grid without halo, seam or lost zero."""

import nibabel as nb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from bids_harmony.errors import ScanError
from bids_harmony.imaging.change import (
    apply_change,
    blur_to,
    brain_curve,
    distributed_change,
    extend_change,
)
from bids_harmony.imaging.tone import ToneCurve
from bids_harmony.interfaces.image import CarryChange, Change


def head_phantom(shape=(56, 64, 52), noise=0.01):
    """Scaled whole-head image (brain 0.25..1, CSF rim, dark skull, scalp, air) and brain mask."""
    rng = np.random.default_rng(7)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    mask = radius < 0.66
    texture = ndimage.gaussian_filter(rng.normal(size=shape), 2)
    tissue = np.clip(0.7 + 0.25 * texture / texture.std(), 0.25, 1.0)
    data = np.select(
        [mask, radius < 0.70, radius < 0.78, radius < 0.9], [tissue, 0.3, 0.05, 0.95], 0.0
    )
    data = ndimage.gaussian_filter(data, 0.5) * (radius < 0.92)
    data = np.maximum(data + rng.normal(0, noise, shape) * (data > 0), 0)
    return data.astype(np.float32), mask


def carried(data, mask, harmonize, **kwargs):
    """Harmonize the skull-stripped image, then carry the change as the workflow does."""
    stripped = np.where(mask, data, 0)
    after = np.where(mask, harmonize(data), 0).astype(np.float32)
    change = extend_change(after - stripped, mask, 4)
    curve = brain_curve(stripped, after, mask)
    return apply_change(data, change, mask, curve, True, **kwargs)


MAPS = {
    "identity": lambda x: x,
    "gain": lambda x: 1.3 * x,
    "gamma up": lambda x: np.power(x, 1.4, dtype=np.float32),
    "gamma down": lambda x: np.power(x, 0.7, dtype=np.float32),
    "s-shape": lambda x: x + 0.08 * np.sin(2 * np.pi * x),
}


@pytest.mark.parametrize("name", MAPS)
def test_global_map_is_reproduced_in_the_whole_head(name):
    data, mask = head_phantom()
    truth = MAPS[name](data)
    result = carried(data, mask, MAPS[name])
    assert np.abs(result - truth)[mask].max() < 1e-6
    # Inside the range of brain intensities within 2 % of the scale everywhere in the head.
    known = ~mask & (data > np.percentile(data[mask], 0.5))
    assert known.sum() > 5000
    assert np.abs(result - truth)[known].max() < 0.02
    assert np.abs(result - truth)[known].mean() < 0.006
    # Dark voxels (skull, air): a straight line to zero stands in for the unknown part of the map.
    dark = ~mask & (data > 0) & ~known
    assert np.abs(result - truth)[dark].max() < 0.06


@pytest.mark.parametrize("name", MAPS)
def test_no_seam_at_the_brain_edge(name):
    data, mask = head_phantom()
    error = np.abs(carried(data, mask, MAPS[name]) - MAPS[name](data))
    edge = ndimage.binary_dilation(mask, iterations=2) & ~mask & (data > 0.25)
    assert edge.sum() > 500
    assert error[edge].max() < 0.015


def varying_gain(shape):
    x = np.linspace(-1, 1, shape[0])[:, None, None]
    return (1 + 0.25 * x) * np.ones(shape)


def test_change_that_varies_in_space_leaves_no_step():
    data, mask = head_phantom(noise=0)
    gain = varying_gain(data.shape)
    result = carried(data, mask, lambda x: x * gain)
    rim = ndimage.binary_dilation(mask) & ~mask & (data > 0.2)
    relative = (result / np.maximum(data, 1e-6))[rim] / gain[rim] - 1
    assert np.abs(relative).mean() < 0.03
    # The global curve alone would be off by about the gain's spread at the rim.
    curve = brain_curve(np.where(mask, data, 0), np.where(mask, data * gain, 0), mask)
    alone = (curve(data) / np.maximum(data, 1e-6))[rim] / gain[rim] - 1
    assert np.abs(relative).mean() < 0.4 * np.abs(alone).mean()


def test_dark_voxels_beside_the_brain_stay_dark():
    data, mask = head_phantom(noise=0)
    data = data.copy()
    gap = ndimage.binary_dilation(mask, iterations=2) & ~mask
    data[gap] = 0.01
    result = carried(data, mask, lambda x: x + 0.2)
    assert result[gap].max() < 0.03


def test_zero_background_and_head_off():
    data, mask = head_phantom()
    data[20:24, 30:34, 20:24] = 0  # a hole inside the brain
    result = carried(data, mask, lambda x: 1.2 * x + 0.1)
    assert np.all(result[(data == 0) & ~mask] == 0)
    assert np.all(result[20:24, 30:34, 20:24] == np.float32(0.1))
    change = np.where(mask, 0.2 * data + 0.1, 0)
    stripped = apply_change(data, change, mask, None, False)
    assert np.all(stripped[~mask] == 0)
    assert np.allclose(stripped[mask], 1.2 * data[mask] + 0.1, atol=1e-6)


def test_zero_mask_given_by_the_caller():
    data, mask = head_phantom()
    raw_zero = data == 0
    shifted = data + 0.1  # a scale whose low limit is not 0
    result = carried(shifted, mask, lambda x: 1.1 * x, zero=raw_zero)
    assert np.all(result[raw_zero & ~mask] == 0)


def test_negative_results_are_clipped_and_finite():
    data, mask = head_phantom()
    result = apply_change(
        data, np.full_like(data, -0.8), mask, ToneCurve((0, 1), (0, 1), 0, 1), True
    )
    assert result.dtype == np.float32
    assert np.isfinite(result).all()
    assert result.min() == 0


def test_extension_takes_the_nearest_brain_voxel():
    mask = np.zeros((9, 9, 9), bool)
    mask[3:6, 3:6, 3:6] = True
    change = np.full(mask.shape, np.nan)
    change[mask] = np.arange(27)
    extended = extend_change(change, mask, 2)
    assert np.array_equal(extended[mask], change[mask])
    assert extended[1, 4, 4] == change[3, 4, 4]
    assert extended[4, 4, 7] == change[4, 4, 5]
    assert extended[0, 4, 4] == 0  # three voxels away
    assert extended[1, 1, 4] == 0  # sqrt(8) voxels away
    full = extend_change(change, mask, 100)
    assert full[0, 0, 0] == change[3, 3, 3]


def test_extension_saves_the_edge_from_interpolation():
    _, mask = head_phantom()
    change = np.where(mask, 0.2, 0).astype(np.float32)
    moved = {}
    for name, image in (("cut", change), ("extended", extend_change(change, mask, 3))):
        moved[name] = ndimage.shift(image, (0.5, 0.5, 0.5), order=1)
    edge = mask & ~ndimage.binary_erosion(mask)
    assert moved["cut"][edge].min() < 0.15
    assert moved["extended"][edge] == pytest.approx(0.2, abs=1e-6)


def test_curve_of_a_known_map_and_its_end():
    rng = np.random.default_rng(0)
    before = rng.uniform(0.2, 1, (20, 20, 20))
    mask = np.ones(before.shape, bool)
    curve = brain_curve(before, 0.5 * before, mask)
    values = np.array([-1, 0, 0.1, 0.5, 1, 3])
    assert curve(values) == pytest.approx([0, 0, 0.05, 0.25, 0.5, 1.5], rel=1e-3)
    # A map that saturates must not flatten the bright scalp to nothing: slope >= half the gain.
    flat = brain_curve(before, np.minimum(before, 0.6), mask)
    assert flat.end_slope == pytest.approx(0.5 * flat.y[-1] / flat.x[-1])
    steep = brain_curve(before, np.where(before > 0.97, 10 * before, before), mask)
    assert steep.end_slope <= 2 * steep.y[-1] / steep.x[-1] + 1e-12


@given(
    before=hnp.arrays(np.float32, (4, 4, 4), elements=st.floats(0, 2, width=32)),
    after=hnp.arrays(np.float32, (4, 4, 4), elements=st.floats(0, 2, width=32)),
)
def test_curve_is_monotone_through_zero(before, after):
    before[0, 0, :2], after[0, 0, :2] = (0.125, 2), (0.125, 2)
    curve = brain_curve(before, after, np.ones(before.shape, bool))
    mapped = curve(np.linspace(0, 5, 400))
    assert mapped[0] == 0
    assert np.all(np.diff(mapped) >= -1e-6)
    assert np.isfinite(mapped).all()


def test_a_distribution_is_given_to_the_brain_alone():
    data, mask = head_phantom()
    change = np.where(mask, 0.1 * ndimage.gaussian_filter(data, 3), 7).astype(np.float32)
    wanted = np.linspace(0.2, 0.9, 101)
    found = distributed_change(data, change, mask, wanted)
    assert np.array_equal(found[~mask], change[~mask])
    raw = data.astype(np.float64)
    after, before = (raw + found)[mask], (raw + change)[mask]
    levels = np.linspace(0, 1, 21)
    assert np.quantile(after, levels) == pytest.approx(0.2 + 0.7 * levels, abs=1e-3)
    assert np.all(np.diff(after[before.argsort()]) >= -1e-6), "order is kept"
    with pytest.raises(ScanError, match="empty"):
        distributed_change(data, change, np.zeros_like(mask), wanted)
    change[mask] = np.nan
    with pytest.raises(ScanError, match="change holds NaN"):
        distributed_change(data, change, mask, wanted)


def test_finer_voxels_keep_their_noise():
    """Three tissues; on the grid nearly without noise, on the raw grid with much of it."""
    rng = np.random.default_rng(4)
    tissue = np.digitize(np.arange(48), (12, 30))[:, None, None] * np.ones((48, 40, 40), int)
    mask = np.ones(tissue.shape, dtype=bool)
    mask[:, 0] = False
    clean = np.array([0.3, 0.6, 0.9])[tissue]
    noise = rng.normal(0, 0.12, tissue.shape)
    scaled = (0.8 * clean + 0.1 + noise).astype(np.float32)
    blur = blur_to((1.0, 1.0, 1.0), 4.0)
    assert blur == pytest.approx([np.sqrt(15) / 2.3548] * 3, abs=1e-4)
    assert blur_to((2.0, 3.0, 1.0), 2.0)[:2] == (0, 0)
    smooth = ndimage.gaussian_filter(noise, blur)
    quantiles = np.quantile((clean + smooth)[mask], np.linspace(0, 1, 1001))
    none = np.zeros_like(scaled)
    found = scaled + distributed_change(scaled, none, mask, quantiles, blur)
    inner = mask & (ndimage.maximum_filter(tissue, 9) == ndimage.minimum_filter(tissue, 9))
    for number, mean in enumerate((0.3, 0.6, 0.9)):
        assert found[inner & (tissue == number)].mean() == pytest.approx(mean, abs=0.02)
    squeezed = scaled + distributed_change(scaled, none, mask, quantiles)
    assert squeezed[inner & (tissue == 0)].mean() > 0.33, "what the blur is for"


@pytest.mark.parametrize("keep", [True, False])
def test_nodes_keep_a_distribution_where_it_is_asked_for(tmp_path, keep):
    data, mask = head_phantom()
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    drawn = np.where(mask, ndimage.gaussian_filter(data, 1) ** 2, 0).astype(np.float32)

    def file(name, values):
        nb.Nifti1Image(values, affine).to_filename(tmp_path / name)
        return str(tmp_path / name)

    stripped, brain = file("in.nii", data * mask), file("mask.nii", mask.astype(np.uint8))
    made = Change(
        before_file=stripped, after_file=file("drawn.nii", drawn), mask_file=brain,
        resampled=True, keep_distribution=keep,
    ).run(cwd=tmp_path).outputs  # fmt: skip
    assert len(made.distribution) == (1001 if keep else 0)
    assert made.spacing == 2
    rest = nb.load(made.out_file).get_fdata(dtype=np.float32)
    blurred = file("rest.nii", ndimage.gaussian_filter(rest, 1.5))  # as interpolation blurs it
    scan = file("scan.nii", data)
    done = CarryChange(
        conformed_file=scan, scaled_file=scan, change_file=blurred, tone=made.tone,
        distribution=made.distribution, distribution_mm=made.spacing, mask_file=brain,
        output_scale={"kind": "robust", "low": 0.0, "high": 500.0},
    ).run(cwd=tmp_path).outputs  # fmt: skip
    found = nb.load(done.scaled_file).get_fdata()[mask]
    levels = np.linspace(0, 1, 101)
    apart = np.abs(np.quantile(found, levels) - np.quantile(drawn[mask], levels)).max()
    assert apart < 1e-3 if keep else apart > 0.02
    assert np.allclose(nb.load(done.out_file).get_fdata()[mask], 500 * found, rtol=1e-4)


def test_errors():
    data, mask = head_phantom()
    with pytest.raises(ScanError, match="mask is empty"):
        extend_change(data, np.zeros_like(mask), 3)
    with pytest.raises(ScanError, match="differ in shape"):
        apply_change(data, data[1:], mask, None, False)
    broken = data.copy()
    broken[28, 32, 26] = np.nan
    with pytest.raises(ScanError, match="NaN"):
        apply_change(broken, data, mask, None, False)
    with pytest.raises(ScanError, match="NaN"):
        extend_change(broken, mask, 3)
    with pytest.raises(ScanError, match="no positive voxel"):
        brain_curve(data - 10, data, mask)
    with pytest.raises(ValueError, match="curve"):
        apply_change(data, data, mask, None, True)
    with pytest.raises(ValueError, match="5 knots"):
        brain_curve(data, data, mask, knots=3)
