"""What depends on intensity alone comes to another grid as a curve, without blur."""

import json

import numpy as np
import pytest
from scipy import ndimage

from bids_harmony.errors import ScanError
from bids_harmony.imaging.change import extend_change
from bids_harmony.imaging.tone import ToneCurve, carried, fit_tone, to_zero

STEP = 2.03
OFFSET = np.array([0.4, 0.3, 0.6])
COARSE = (29, 33, 26)


class Phantom:
    """Three tissues with sharp borders and noise, on a raw grid and on one twice as coarse."""

    def __init__(self):
        rng = np.random.default_rng(1)
        shape = (60, 68, 54)
        self.place = np.stack(
            np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
        ).astype(np.float32)
        self.mask = (self.place**2).sum(0) < 0.7
        tissue = ndimage.gaussian_filter(rng.normal(size=shape), 2)
        tissue /= tissue.std()
        data = np.select([tissue > 0.5, tissue > -0.7], [1.0, 0.7], 0.3)
        data = ndimage.gaussian_filter(data, 0.5) + rng.normal(0, 0.03, shape)
        self.raw = np.where(self.mask, np.maximum(data, 0.02), 0).astype(np.float32)
        self.coarse_mask = self.down(self.mask.astype(np.float32), order=0) > 0.5
        self.coarse = np.where(self.coarse_mask, self.down(self.raw), 0).astype(np.float32)
        self.coarse_place = np.stack([self.down(axis) for axis in self.place])
        self.inner = ndimage.binary_erosion(self.mask, iterations=3)

    def down(self, image, order=1):
        return ndimage.affine_transform(
            image, np.diag([STEP] * 3), OFFSET, output_shape=COARSE, order=order
        )

    def up(self, image):
        return ndimage.affine_transform(
            image, np.diag([1 / STEP] * 3), -OFFSET / STEP,
            output_shape=self.raw.shape, order=1, mode="nearest",
        )  # fmt: skip

    def errors(self, method):
        """Root mean square error on the raw grid, with the tone curve and without."""
        truth = method(self.raw, self.place)
        after = np.where(self.coarse_mask, method(self.coarse, self.coarse_place), 0)
        curve = fit_tone(self.coarse, after, self.coarse_mask)
        rest = self.up(extend_change(after - curve(self.coarse), self.coarse_mask, 4))
        new = self.raw + carried(self.raw, rest, curve)
        old = self.raw + self.up(extend_change(after - self.coarse, self.coarse_mask, 4))
        return tuple(
            float(np.sqrt(np.mean((image - truth)[self.inner] ** 2))) for image in (new, old)
        )


@pytest.fixture(scope="module")
def phantom():
    return Phantom()


def field(place):
    return 0.15 * np.sin(2 * place[0] + 1) + 0.1 * place[1]


TONES = {
    "gain": lambda x, _: 1.3 * x,
    "gamma up": lambda x, _: x**1.4,
    "gamma down": lambda x, _: x**0.7,
    "s-shape": lambda x, _: x + 0.08 * np.sin(2 * np.pi * x),
}


@pytest.mark.parametrize("name", TONES)
def test_an_increasing_map_is_not_blurred(phantom, name):
    new, old = phantom.errors(TONES[name])
    assert new < (2e-3 if name == "s-shape" else 2e-4)
    assert old > 0.01


def test_smooth_field_comes_back_as_well_as_before(phantom):
    new, old = phantom.errors(lambda x, place: x + field(place))
    assert new < 2e-3
    new, old = phantom.errors(lambda x, _: x + 0.2)
    assert new < 1e-5 > old


def test_both_at_once(phantom):
    new, old = phantom.errors(lambda x, place: x**0.7 + field(place))
    assert new < 2e-3
    assert old > 0.01
    new, old = phantom.errors(lambda x, place: x * (1 + field(place)))
    assert new < 0.7 * old


def test_a_falling_map_is_carried_in_full(phantom):
    """The curve is flat then, and the rest holds everything."""
    after = np.where(phantom.coarse_mask, 1.3 - phantom.coarse, 0)
    curve = fit_tone(phantom.coarse, after, phantom.coarse_mask)
    assert curve.y[-1] - curve.y[0] < 1e-6
    whole = phantom.coarse + carried(phantom.coarse, after - curve(phantom.coarse), curve)
    np.testing.assert_allclose(whole[phantom.coarse_mask], after[phantom.coarse_mask], atol=1e-6)
    new, old = phantom.errors(lambda x, _: 1.3 - x)
    assert new < 0.6 * old


def test_identity_and_ends(phantom):
    curve = fit_tone(phantom.coarse, phantom.coarse, phantom.coarse_mask)
    values = np.linspace(-0.1, 3, 50)
    np.testing.assert_allclose(curve(values), values, atol=1e-5)
    again = ToneCurve.from_dict(json.loads(json.dumps(curve.to_dict())))
    assert again == curve
    assert np.all(np.diff(fit_tone(*squared(phantom))(values)) >= 0)


def squared(phantom):
    return phantom.coarse, np.where(phantom.coarse_mask, phantom.coarse**2, 0), phantom.coarse_mask


def test_few_voxels_and_few_levels():
    mask = np.ones((3, 3, 3), bool)
    before = np.arange(27, dtype=np.float32).reshape(3, 3, 3) / 26
    curve = fit_tone(before, 2 * before, mask)
    np.testing.assert_allclose(curve(before), 2 * before, atol=1e-3)
    levels = np.zeros((20, 20, 20), np.float32)
    levels[10, 10, 10] = 1
    curve = fit_tone(levels, 0.5 * levels + 0.1, np.ones(levels.shape, bool))
    np.testing.assert_allclose(curve(levels), 0.5 * levels + 0.1, atol=1e-3)
    lone = np.zeros((5, 5, 5), bool)
    lone[0, 0, 0] = lone[4, 4, 4] = True
    values = np.random.default_rng(0).uniform(0.1, 1, lone.shape)
    curve = fit_tone(values, 0.5 * values + 0.3, lone)  # nothing to compare: a constant is added
    step = float(np.mean((0.5 * values + 0.3 - values)[lone]))
    np.testing.assert_allclose(curve(values[lone]), values[lone] + step, atol=1e-3)


def test_noise_that_a_method_removes_is_not_tone():
    """Less of the contrast is taken for noise than by a regression voxel by voxel."""
    rng = np.random.default_rng(0)
    shape = (48, 48, 48)
    tissue = ndimage.gaussian_filter(rng.normal(size=shape), 4)
    clean = np.where(tissue > 0, 0.9, 0.4)
    before = (clean + rng.normal(0, 0.08, shape)).astype(np.float32)
    after = ndimage.gaussian_filter(before, 0.8)
    curve = fit_tone(before, after, np.ones(shape, bool))
    lag = [np.diff(image[:, :, ::2], axis=2).ravel() for image in (before, after)]
    plain = float(lag[0] @ lag[1] / (lag[0] @ lag[0]))
    slope = float(curve(np.array(0.9)) - curve(np.array(0.4))) / 0.5
    assert slope > 0.7 > plain + 0.1


def test_below_its_dark_end_a_curve_goes_straight_to_zero():
    curve = ToneCurve((0.2, 0.5, 1.0), (0.1, 0.6, 0.9), 3.0, 0.7)  # 0 at .17 by its own slope
    for start in (0.2, 0.3):
        straight = to_zero(curve, start)
        level = curve(np.array([start]))[0]
        dark, rest = np.linspace(0, start, 9), np.linspace(start, 2, 99)
        assert straight(dark) == pytest.approx(level * dark / start, abs=1e-6)
        assert straight(rest) == pytest.approx(curve(rest), abs=1e-6)
    negative = ToneCurve((-0.2, 0.5), (0.1, 0.6), 0.7, 0.7)
    assert to_zero(negative, -0.2) == negative


def test_errors(phantom):
    after = phantom.coarse.copy()
    after[14, 16, 13] = np.nan
    with pytest.raises(ScanError, match="NaN"):
        fit_tone(phantom.coarse, after, phantom.coarse_mask)
    with pytest.raises(ScanError, match="shape"):
        fit_tone(phantom.coarse, after[1:], phantom.coarse_mask)
    with pytest.raises(ScanError, match="mask is empty"):
        fit_tone(phantom.coarse, after, np.zeros_like(phantom.coarse_mask))
