"""Simulated heads: invertible, of the asked volumes, ageing, repeatable; geometry of a scan."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from bids_harmony.phantom.acquisition import (
    acquire,
    bias_field,
    head_pose,
    resample,
    scan_grid,
    transmit_field,
)
from bids_harmony.phantom.anatomy import LATTICE, build_anatomy, solve
from bids_harmony.phantom.person import expected_shares, make_person
from bids_harmony.phantom.signal import TISSUES
from bids_harmony.phantom.sites import all_sites
from bids_harmony.phantom.warp import exponential, jacobian_determinant, smooth_noise, upsample


@pytest.fixture(scope="module")
def people():
    return [make_person(3, k, lesions=1.0) for k in (1, 2)]


@pytest.fixture(scope="module")
def heads(people):
    return [build_anatomy(person, 2.0) for person in people]


def test_warps_are_invertible(heads):
    for head in heads:
        jacobian = jacobian_determinant(head.displacement, LATTICE)
        assert jacobian.min() > 0
        assert jacobian.std() > 0.05


def test_exponential_of_a_constant_velocity_is_a_translation():
    velocity = np.zeros((3, 12, 12, 12), dtype=np.float32)
    velocity[1] = 5.0
    np.testing.assert_allclose(exponential(velocity, 4.0), velocity, atol=1e-4)


def test_exponential_of_the_negative_velocity_is_the_inverse():
    rng = np.random.default_rng(0)
    velocity = np.stack([2.5 * smooth_noise((24, 24, 24), 4.0, rng) for _ in range(3)])
    forward, backward = exponential(velocity, 4.0), exponential(-velocity, 4.0)
    index = np.indices(velocity.shape[1:]) + forward / 4.0
    back = np.stack([ndimage.map_coordinates(b, index, order=1) for b in backward])
    inner = (slice(None), *[slice(4, -4)] * 3)
    assert np.abs(forward + back)[inner].max() < 0.25
    assert np.abs(forward)[inner].max() > 4


def test_jacobian_of_a_known_scaling():
    x, y, z = np.meshgrid(*[4.0 * np.arange(6)] * 3, indexing="ij")
    displacement = np.stack([0.1 * x, -0.2 * y, 0.0 * z])
    np.testing.assert_allclose(jacobian_determinant(displacement, 4.0), 1.1 * 0.8, rtol=1e-6)


def test_upsampling_agrees_with_scipy():
    rng = np.random.default_rng(1)
    field = rng.normal(size=(5, 6, 7)).astype(np.float32)
    shape = (15, 19, 23)
    index = np.indices(shape) / 4.0
    expected = ndimage.map_coordinates(field, index, order=1, mode="nearest")
    np.testing.assert_allclose(upsample(field, 4, shape), expected, atol=1e-5)


def test_fractions_are_fractions(heads):
    for head in heads:
        assert np.isfinite(head.fractions).all()
        assert head.fractions.min() >= -1e-6
        assert head.fractions.sum(axis=0).max() < 1 + 1e-5
        assert head.brain.max() <= 1
        inside = head.fractions[[TISSUES.index(n) for n in ("CSF", "GM", "WM", "lesion")]].sum(0)
        np.testing.assert_allclose(inside[head.brain == 1], 1, atol=1e-5)
        edges = [np.take(head.brain, [0, -1], axis=axis).max() for axis in (0, 1, 2)]
        assert max(edges) == 0


def test_volumes_are_those_of_the_person(people, heads):
    for person, head in zip(people, heads, strict=True):
        total = head.brain.sum()
        assert total * 8 / 1000 == pytest.approx(person.icv, rel=0.03)
        gm, wm, lesion = (
            float((head.fractions[TISSUES.index(n)] * (head.brain > 0)).sum() / total)
            for n in ("GM", "WM", "lesion")
        )
        assert gm == pytest.approx(person.gm, abs=0.01)
        assert wm + lesion == pytest.approx(person.wm, abs=0.01)
        assert lesion * total * 8 / 1000 == pytest.approx(person.lesions, rel=0.1, abs=0.2)


def _largest_inner_fluid(head):
    """Volume of the largest fluid space that is deep in the upper brain, mL: the ventricles."""
    coordinates = [s + 2 * np.arange(n) for s, n in zip(head.start, head.brain.shape, strict=True)]
    x, y, z = np.meshgrid(*coordinates, indexing="ij")
    box = (abs(x) < 45) & (y > -62) & (y < 36) & (z > -12) & (z < 40)
    parts, count = ndimage.label((head.fractions[0] > 0.5) & box)
    sizes = ndimage.sum(head.fractions[0], parts, range(1, count + 1))
    return float(np.max(sizes)) * 8 / 1000


def test_ventricles_follow_the_person(people, heads):
    wanted = np.array([p.ventricles * p.icv for p in people])
    found = np.array([_largest_inner_fluid(head) for head in heads])
    print(wanted, found)
    assert np.argsort(found).tolist() == np.argsort(wanted).tolist()
    np.testing.assert_allclose(found, wanted, rtol=0.35)


def test_brain_shrinks_with_age_as_published():
    people = [make_person(0, k) for k in range(1, 121)]
    age = np.array([p.age for p in people])
    assert age.min() < 24
    assert age.max() > 80
    for name, sign in (("gm", -1), ("csf", 1), ("ventricles", 1)):
        values = np.array([getattr(p, name) for p in people])
        assert sign * np.corrcoef(age, values)[0, 1] > 0.6
    brain = {a: sum(expected_shares(a)[:2]) for a in (20, 85)}
    assert brain[20] == pytest.approx(0.86, abs=0.01)
    assert brain[85] == pytest.approx(0.74, abs=0.02)
    assert 2 < expected_shares(85)[2] / expected_shares(20)[2] < 4
    assert expected_shares(42)[1] > max(expected_shares(20)[1], expected_shares(85)[1])


def test_lesions_grow_with_age_and_are_optional():
    people = [make_person(0, k, lesions=1.0) for k in range(1, 80)]
    age, volume = (np.array([getattr(p, n) for p in people]) for n in ("age", "lesions"))
    assert np.corrcoef(age, np.log(volume))[0, 1] > 0.7
    assert make_person(0, 1).lesions == 0
    some = [make_person(0, k, lesions=0.5).lesions > 0 for k in range(1, 80)]
    assert 20 < sum(some) < 60


def test_same_person_same_voxels(people, heads):
    again = build_anatomy(make_person(3, 2, lesions=1.0), 2.0)
    np.testing.assert_array_equal(again.fractions, heads[1].fractions)
    other = make_person(4, 2, lesions=1.0)
    assert other != people[1]


def test_bisection_finds_the_threshold():
    assert solve(lambda t: 10 - 3 * t, 4.0, 0.0, 10.0) == pytest.approx(2.0, abs=1e-2)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "ASR", "LAS"])
def test_scan_grid_has_the_orientation_and_voxels_asked(codes):
    site = all_sites()["thick15"]
    protocol = site.protocols["T1w"].__class__("spgr", 0.02, 0.005, 20, (1, 1, 4), codes, 30)
    shape, affine = scan_grid(site, protocol, np.array([1.0, 1.5, 4.0]))
    assert nib.aff2axcodes(affine) == tuple(codes)
    np.testing.assert_allclose(nib.affines.voxel_sizes(affine), [1.0, 1.5, 4.0])
    assert nib.affines.obliquity(affine).max() > np.deg2rad(5)
    centre = affine @ [*((np.array(shape) - 1) / 2), 1]
    np.testing.assert_allclose(centre[:3], [0, -8, -6], atol=1e-9)


def test_resampling_puts_every_voxel_where_the_affine_says():
    # The mean of a linear map over a voxel is its value at the centre of the voxel
    site = all_sites()["thick15"]
    _, affine = scan_grid(site, site.protocols["T1w"], np.array([3.0, 3.0, 6.0]))
    affine = head_pose(np.random.default_rng(5)) @ affine
    shape = (12, 14, 9)
    affine[:3, 3] = [60, 60, 60] - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    x, y, z = np.indices((120, 120, 120), dtype=np.float32)
    values = 0.5 * x - 0.3 * y + 0.2 * z
    world = affine[:3, :3] @ np.indices(shape).reshape(3, -1) + affine[:3, 3:]
    expected = (np.array([0.5, -0.3, 0.2]) @ world).reshape(shape)
    found = resample(values, affine, shape, (3, 3, 6))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_resampling_keeps_partial_volume():
    values = np.zeros((40, 40, 40), dtype=np.float32)
    values[:, :, 20] = 1
    affine = np.diag([1, 1, 4, 1.0])
    affine[2, 3] = 1.5
    found = resample(values, affine, (40, 40, 9), (1, 1, 4))
    np.testing.assert_allclose(found[20, 20], [0, 0, 0, 0, 0, 0.25, 0, 0, 0], atol=1e-6)


def test_fields_are_smooth_and_of_the_asked_strength():
    field = bias_field((40, 50, 30), 0.2, np.random.default_rng(0))
    assert np.log(field).std() == pytest.approx(0.2, rel=1e-3)
    assert np.log(field).mean() == pytest.approx(0, abs=1e-4)
    assert np.abs(np.diff(np.log(field), axis=1)).max() < 0.15
    b1 = transmit_field((41, 41, 41), np.diag([4, 4, 4, 1.0]), 0.15)
    assert b1[20, 20, 20] == pytest.approx(1.15)
    assert b1.min() > 0.5
    assert b1[20, 20, 0] < 1


def test_noise_is_rician_and_of_the_stated_snr(people, heads):
    site = all_sites()["biased3"]
    scan = acquire(heads[0], people[0], site, "T1w", {}, 3.0)
    air = np.asarray(scan.image)[scan.fractions.sum(0) == 0]
    # Rayleigh distribution: mean over standard deviation is 1.913
    assert air.mean() / air.std() == pytest.approx(1.913, rel=0.03)
    gain = air.mean() / 1.2533 * site.protocols["T1w"].snr
    wm = (scan.fractions[TISSUES.index("WM")] > 0.98) & (scan.brain > 0.99)
    level = np.median((scan.image / scan.bias)[wm])
    assert level == pytest.approx(gain, rel=0.25)


@pytest.mark.parametrize("modality", ["T1w", "T2w", "FLAIR"])
def test_twelve_bit_scanners_clip_no_brain(people, heads, modality):
    scan = acquire(heads[1], people[1], all_sites()["spgr3"], modality, {}, 3.0)
    assert scan.image.max() <= 4095
    assert (scan.image[scan.brain > 0.5] == 4095).mean() < 0.001
