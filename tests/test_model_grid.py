"""A scan on the model's grid and back: orientation, spacing, position, means."""

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from bids_harmony.errors import ScanError
from bids_harmony.imaging.model_grid import to_model_grid

CODES = [
    tuple(side[way] for side, way in zip(order, ways, strict=True))
    for order in permutations(("LR", "PA", "IS"))
    for ways in product((0, 1), repeat=3)
]


def turned(image, codes):
    """A RAS array as a scan whose axes run so, by nibabel's own orientation code."""
    start = nib.orientations.axcodes2ornt(("R", "A", "S"))
    way = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(codes))
    return np.ascontiguousarray(nib.orientations.apply_orientation(image, way))


def spacing_of(codes, ras):
    """Spacing in the scan's order."""
    where = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}
    return tuple(ras[where[c]] for c in codes)


def ball(shape, radius=0.8, centre=0.0):
    axes = [np.linspace(-1, 1, n) for n in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return np.sqrt((x - centre) ** 2 + y**2 + z**2) < radius


@pytest.fixture
def phantom():
    """RAS array, every axis of another length, with one bright corner at right-anterior-top."""
    rng = np.random.default_rng(0)
    mask = ball((20, 26, 18))
    image = np.where(mask, rng.uniform(0.2, 0.8, mask.shape), 0).astype(np.float32)
    image[13:15, 17:19, 12:14] = 5.0
    return image, mask


@pytest.mark.parametrize("codes", CODES, ids="".join)
def test_every_orientation_comes_out_in_the_same_order(codes, phantom):
    image, mask = phantom
    straight = to_model_grid(image, mask, (2.0, 2.1, 2.2), ("R", "A", "S"), 2.0)
    data, inside = turned(image, codes), turned(mask, codes)
    grid = to_model_grid(data, inside, spacing_of(codes, (2.0, 2.1, 2.2)), codes, 2.0)
    assert np.array_equal(grid.data, straight.data)
    assert np.array_equal(grid.mask, straight.mask)
    place = np.array(np.unravel_index(grid.data.argmax(), grid.data.shape)) / grid.data.shape
    assert (place > 0.5).all()
    assert min(*grid.data.strides, *grid.mask.strides) > 0
    back = grid.to_scan(grid.data)
    assert back.dtype == np.float32
    assert np.array_equal(back, np.where(inside, data, 0))


def test_there_are_48_orientations():
    assert len(set(CODES)) == 48


@pytest.mark.parametrize("codes", [("R", "A", "S"), ("P", "I", "R"), ("L", "S", "A")])
def test_fine_voxels_of_one_axis_are_averaged_whichever_it_is(codes):
    """0.7 mm along the anterior axis only, in whatever place it is stored."""
    mask = ball((24, 60, 24))
    rng = np.random.default_rng(1)
    image = np.where(mask, ndimage.gaussian_filter(rng.normal(size=mask.shape), 2), 0)
    ras = (2.0, 0.7, 2.4)
    straight = to_model_grid(image, mask, ras, ("R", "A", "S"), 2.0)
    grid = to_model_grid(
        turned(image, codes), turned(mask, codes), spacing_of(codes, ras), codes, 2.0
    )
    assert straight.data.shape[0] == grid.box[0].stop - grid.box[0].start
    length = straight.box[1].stop - straight.box[1].start
    assert grid.data.shape[1] == round(length * 0.35)
    assert np.allclose(grid.data, straight.data, atol=1e-6)


def test_voxels_of_the_models_size_are_untouched(phantom):
    image, mask = phantom
    grid = to_model_grid(image + 3, mask, (2.0, 2.0, 2.0), ("R", "A", "S"), 2.0)
    assert np.array_equal(grid.data[grid.mask], (image + 3)[mask])
    assert not grid.data[~grid.mask].any()
    assert grid.mask.sum() == mask.sum()
    assert np.array_equal(grid.to_scan(grid.data)[mask], (image + 3)[mask])


@pytest.mark.parametrize("spacing", [1.51, 1.8, 3.0, 6.0])
def test_large_voxels_are_kept(spacing, phantom):
    image, mask = phantom
    grid = to_model_grid(image, mask, (spacing,) * 3, ("R", "A", "S"), 2.0)
    assert np.array_equal(grid.data[grid.mask], image[mask])


def test_thick_slices_are_kept_and_the_plane_is_averaged():
    mask = ball((96, 96, 20))
    image = np.where(mask, 0.5, 0).astype(np.float32)
    grid = to_model_grid(image, mask, (1.0, 1.0, 5.0), ("R", "A", "S"), 2.0)
    length = [s.stop - s.start for s in grid.box]
    assert grid.data.shape == (round(length[0] / 2), round(length[1] / 2), length[2])
    assert grid.data.shape[2] == 20


def test_the_mean_is_kept_from_1_to_2_mm():
    """Also at the rim: averaging is inside the mask, so a flat brain stays flat."""
    mask = ball((90, 100, 80))
    rng = np.random.default_rng(2)
    flat = to_model_grid(np.full(mask.shape, 0.7), mask, (1.0,) * 3, ("R", "A", "S"), 2.0)
    assert flat.data[flat.mask] == pytest.approx(0.7, abs=1e-5)
    assert flat.mask.sum() * 8 == pytest.approx(mask.sum(), rel=0.02)
    noise = 0.6 + 0.2 * rng.standard_normal(mask.shape)
    grid = to_model_grid(noise, mask, (1.0,) * 3, ("R", "A", "S"), 2.0)
    assert grid.data[grid.mask].mean() == pytest.approx(noise[mask].mean(), abs=2e-3)
    # Eight voxels are averaged, and a little of the next ones.
    assert 0.2 / 8 < grid.data[grid.mask].std() < 0.2 / np.sqrt(8)


def test_a_smooth_field_comes_back():
    """1 mm -> 2 mm -> 1 mm, inside the brain and away from its rim."""
    mask = ball((90, 100, 80), 0.85)
    rng = np.random.default_rng(3)
    field = ndimage.gaussian_filter(rng.normal(size=mask.shape), 8)
    field /= field.std()
    grid = to_model_grid(field, mask, (1.0,) * 3, ("R", "A", "S"), 2.0)
    deep = ndimage.binary_erosion(mask, iterations=4)
    error = (grid.to_scan(grid.data) - field)[deep]
    assert np.abs(error).max() < 0.1
    assert error.std() < 0.02
    assert abs(error.mean()) < 1e-3


@pytest.mark.parametrize("codes", [("R", "A", "S"), ("L", "P", "S"), ("A", "S", "L")], ids="".join)
@pytest.mark.parametrize("ras", [(1.0, 1.0, 1.0), (0.8, 1.25, 3.0)], ids=str)
def test_a_blob_comes_back_to_its_place(codes, ras):
    """Centre of mass in voxels of the scan; half a voxel of shift would be seen."""
    shape = (81, 92, 73)
    centre = np.array([33.3, 50.7, 40.2])
    width = 6 / np.array(ras)
    grids = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    square = sum(((g - c) / w) ** 2 for g, c, w in zip(grids, centre, width, strict=True))
    blob, mask = turned(np.exp(-square / 2), codes), np.ones(shape, bool)
    mask[:2] = mask[-3:] = False
    mask = turned(mask, codes)
    grid = to_model_grid(blob, mask, spacing_of(codes, ras), codes, 2.0)
    back = np.where(mask, grid.to_scan(grid.data), 0)
    expected = ndimage.center_of_mass(np.where(mask, blob, 0))
    assert ndimage.center_of_mass(back) == pytest.approx(expected, abs=0.02)
    assert 0.92 < back.max() < 1.001  # a blob of 6 mm (SD) is blurred a little


def test_box_and_what_lies_outside_the_mask():
    mask = np.zeros((40, 44, 48), bool)
    mask[10:30, 0:20, 15:48] = True
    image = np.full(mask.shape, np.nan)
    image[mask] = 1.0
    grid = to_model_grid(image, mask, (2.0,) * 3, ("R", "A", "S"), 2.0)
    assert grid.box == (slice(8, 32), slice(0, 22), slice(13, 48))
    assert grid.full_shape == mask.shape
    assert np.isfinite(grid.data).all()
    back = grid.to_scan(np.ones(grid.data.shape))
    assert np.array_equal(back[grid.box], np.ones(grid.data.shape, np.float32))
    assert back.sum() == grid.data.size


def test_inputs_stay_as_they_are(phantom):
    image, mask = phantom
    before = image.copy(), mask.copy()
    for spacing in (1.0, 2.0):
        grid = to_model_grid(image, mask, (spacing,) * 3, ("R", "A", "S"), 2.0)
        grid.data[:] = 7
        grid.mask[:] = True
        assert np.array_equal(image, before[0])
        assert np.array_equal(mask, before[1])


def test_no_brain_is_an_error():
    image = np.ones((20, 20, 20))
    with pytest.raises(ScanError, match="mask is empty"):
        to_model_grid(image, image > 1, (1.0,) * 3, ("R", "A", "S"), 2.0)
    speck = np.zeros(image.shape, bool)
    speck[10, 10, 10] = True
    with pytest.raises(ScanError, match="no brain is left at 2 mm"):
        to_model_grid(image, speck, (0.5,) * 3, ("R", "A", "S"), 2.0)


@pytest.mark.parametrize("codes", [("R", "A", "S"), ("P", "S", "L")], ids="".join)
def test_a_constant_change_is_constant_up_to_the_brains_edge(codes, phantom):
    image, mask = (turned(v, codes) for v in phantom)
    grid = to_model_grid(image, mask, (1.0,) * 3, codes, 2.0)
    raised = grid.add_change(image, mask, np.where(grid.mask, 0.25, 0).astype(np.float32))
    np.testing.assert_allclose(raised[mask], image[mask] + 0.25, atol=1e-6)
    lowered = grid.add_change(image, mask, np.where(grid.mask, -9, 0).astype(np.float32))
    assert not raised[~mask].any()
    assert not lowered.any()
    same = grid.add_change(image, mask, np.zeros_like(grid.data))
    assert np.array_equal(same, np.where(mask, image, 0))
