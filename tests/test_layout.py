"""Which way up a brain lies: known turns of a brain-like phantom."""

from __future__ import annotations

import nibabel as nb
import numpy as np
import pytest
from scipy import ndimage

from bids_harmony.imaging.layout import Coarse, Layout
from bids_harmony.imaging.templates import template_image

SPACING = (4.0, 4.0, 4.0)


def brain(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The template's brain, stretched, shifted and noisy, on a 4 mm grid."""
    data = template_image("MNI152NLin2009aSym", 4.0).get_fdata(dtype=np.float32)
    rng = np.random.default_rng(seed)
    scale = 1 + 0.05 * rng.standard_normal(3)
    centre = (np.array(data.shape) - 1) / 2
    move = centre - scale * centre + rng.uniform(-1, 1, 3)
    made = ndimage.affine_transform(data / data.max(), np.diag(scale), move, order=1)
    mask = made > 0.25
    made = made * (1 + 0.05 * rng.standard_normal(made.shape))
    return np.where(mask, made, 0).astype(np.float32), mask


@pytest.fixture(scope="module")
def layout() -> Layout:
    return Layout.of([Coarse(*brain(seed), SPACING).cells() for seed in range(4)])


def turned(image: np.ndarray, axes: str) -> np.ndarray:
    """The array whose axes run to these sides, from one whose axes run R, A, S."""
    ornt = nb.orientations.ornt_transform(
        nb.orientations.axcodes2ornt("RAS"), nb.orientations.axcodes2ornt(axes)
    )
    return nb.orientations.apply_orientation(image, ornt)


@pytest.mark.parametrize("seed", [7, 8, 9])
def test_upright_brains_are_upright(layout, seed):
    image, mask = brain(seed)
    assert layout.turned(Coarse(image, mask, SPACING)) == ("RAS", 0.0)
    mirrored = Coarse(image[::-1], mask[::-1], SPACING)
    assert layout.turned(mirrored) == ("RAS", 0.0)


@pytest.mark.parametrize(
    "axes", ["RAI", "RPI", "RPS", "RSA", "ARS", "SRA", "ASR", "SAR", "RIA", "PSR"]
)
def test_turned_brains_are_told(layout, axes):
    image, mask = (turned(v, axes) for v in brain(7))
    found, saved = layout.turned(Coarse(image, mask, SPACING))
    # the array's axes are taken for R, A, S and run to `axes`; L and R are not told apart
    assert found == axes
    assert saved > 0.3


def test_bits_are_scipys(layout):
    from scipy.stats import norm

    own = Coarse(*brain(5), SPACING).cells()
    wanted = -norm(layout.mean, layout.deviation).logpdf(own).mean() / np.log(2)
    assert layout.bits(own) == pytest.approx(wanted, rel=1e-12)


def test_size_and_grid_do_not_matter():
    image, mask = brain(3)
    small = Coarse(image, mask, (3.0, 3.0, 3.0)).cells()
    assert small == pytest.approx(Coarse(image, mask, SPACING).cells(), abs=1e-6)
    fine = (ndimage.zoom(image, 2, order=0), ndimage.zoom(mask, 2, order=0))
    assert Coarse(*fine, (2.0, 2.0, 2.0)).cells() == pytest.approx(small, abs=0.05)


def test_what_cannot_be_told_is_left(layout):
    ball = np.indices((40, 40, 40)) - 19.5
    mask = (ball**2).sum(0) < 15**2
    same = Coarse(mask.astype(np.float32), mask, SPACING)
    assert Layout.of([same.cells()]).turned(same) == ("RAS", 0.0)


def test_arrays_round_trip(layout):
    again = Layout.from_arrays(layout.arrays())
    assert np.array_equal(again.mean, layout.mean)
    assert np.array_equal(again.deviation, layout.deviation)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("degrees", [-35, -20, 20, 35])
def test_a_tilted_head_is_not_turned(layout, axis, degrees):
    """About the R (a nod), A (a roll) and S axis."""
    plane = [(1, 2), (0, 2), (0, 1)][axis]
    image, mask = (
        ndimage.rotate(v.astype(np.float32), degrees, plane, reshape=True, order=1)
        for v in brain(7)
    )
    tilted = Coarse(image, mask > 0.5, SPACING)
    assert layout.turned(tilted) == ("RAS", 0.0)


@pytest.mark.parametrize(
    "kept",
    [
        np.s_[:, 12:26],
        np.s_[:, :, 12:26],
        np.s_[10:20],
        np.s_[:20],
        np.s_[:, :26],
        np.s_[:, :, :18],
    ],
)
def test_part_of_a_brain_is_not_turned(layout, kept):
    """Slabs, one hemisphere, no frontal lobe, no upper half."""
    image, mask = brain(7)
    part = np.zeros_like(mask)
    part[kept] = mask[kept]
    assert layout.turned(Coarse(image * part, part, SPACING)) == ("RAS", 0.0)
