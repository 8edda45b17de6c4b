"""One contract for every method, and each statistical method against independent arithmetic."""

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import fft, ndimage, stats
from skimage.exposure import match_histograms

from bids_harmony.errors import ScanError
from bids_harmony.imaging.quantiles import distributed, mid_quantiles
from bids_harmony.imaging.scale import fit_scale
from bids_harmony.methods import registry
from bids_harmony.methods.base import Volume
from bids_harmony.methods.nyul import PERCENTILES, Nyul
from bids_harmony.methods.ssimh import Ssimh
from bids_harmony.methods.wm_peak import WhiteMatterPeak, find_peak
from bids_harmony.methods.zscore import ZScore
from bids_harmony.metrics.similarity import edge_correlation, rank_agreement, wasserstein

METHODS = [n for n, card in registry.available().items() if card.kind == "statistical"]
MONOTONE = [name for name in METHODS if registry.available()[name].monotone]
SHAPE = (44, 50, 40)
TISSUES = {"T1w": (0.25, 0.6, 0.88), "T2w": (1.0, 0.55, 0.4), "FLAIR": (0.15, 0.75, 0.6)}


def brain(seed=0, modality="T1w", gain=1.0, gamma=1.0, noise=0.02, bias=0.0, atrophy=0.0):
    """Brain of white core, folded grey shell, fluid rim and ventricle, on a 3 mm grid."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    wobble = ndimage.gaussian_filter(rng.normal(size=SHAPE), 3)
    radius = np.sqrt(x**2 + y**2 + z**2) + 0.05 * wobble / wobble.std()
    mask = np.sqrt(x**2 + y**2 + z**2) < 0.85
    fluid, grey, white = TISSUES[modality]
    data = np.select(
        [radius < 0.15 + atrophy, radius < 0.58, radius < 0.76 - atrophy],
        [fluid, white, grey],
        fluid,
    )
    data = ndimage.gaussian_filter(data, 0.6) ** gamma * gain * (1 + bias * x)
    data = np.abs(data + rng.normal(0, noise, SHAPE))
    return Volume(
        np.where(mask, data, 0).astype(np.float32), mask, modality, (3.0,) * 3, "a", f"sub-{seed}"
    )


def fitted(name, volumes=None):
    return registry.load(name).fit(volumes or [brain(1), brain(2)], seed=0)


@pytest.mark.parametrize("name", METHODS)
def test_output_contract(name):
    scan = brain(5, gain=0.7, gamma=1.3)
    data, mask = scan.data.copy(), scan.mask.copy()
    model = fitted(name)
    result = model.harmonize(scan, seed=3)
    assert np.array_equal(scan.data, data)
    assert np.array_equal(scan.mask, mask)
    assert result.data.dtype == np.float32
    assert result.data.shape == SHAPE
    assert np.isfinite(result.data).all()
    assert result.data.min() >= 0
    assert np.all(result.data[~mask] == 0)
    assert not np.array_equal(result.data, data)
    again = model.harmonize(scan, seed=3)
    assert np.array_equal(result.data, again.data)
    assert result.details == again.details


@pytest.mark.parametrize("name", METHODS)
def test_what_lies_outside_the_mask_has_no_say(name):
    scan = brain(5)
    spoiled = replace(scan, data=np.where(scan.mask, scan.data, 17).astype(np.float32))
    model = fitted(name)
    assert np.array_equal(
        model.harmonize(scan, seed=0).data, model.harmonize(spoiled, seed=0).data
    )
    other = registry.load(name).fit([spoiled], seed=0).arrays()
    for key, value in fitted(name, [scan]).arrays().items():
        assert np.array_equal(value, other[key])


@pytest.mark.parametrize("name", METHODS)
def test_harmonized_is_nearer_to_the_reference_domain(name):
    """The same brain at the reference site is the truth (travelling subject)."""
    truth, scan = brain(5), brain(5, gain=0.75)
    result = fitted(name, [brain(s) for s in (1, 2, 3)]).harmonize(scan, seed=0)
    before = np.abs(scan.data - truth.data)[truth.mask].mean()
    after = np.abs(result.data - truth.data)[truth.mask].mean()
    assert after < 0.5 * before


@pytest.mark.parametrize("name", METHODS)
def test_one_reference_volume_comes_back(name):
    scan = brain(1)
    result = fitted(name, [scan]).harmonize(scan, seed=0)
    assert np.abs(result.data - scan.data).max() < 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_state_rebuilds_the_method(name):
    model = fitted(name, [brain(1), brain(2, "T2w"), brain(3, "FLAIR")])
    assert set(model.contract.modalities) == {"T1w", "T2w", "FLAIR"}
    twin = registry.load(name).from_state(model.arrays(), model.params())
    assert twin.contract == model.contract
    for modality in ("T1w", "T2w", "FLAIR"):
        scan = brain(5, modality, gain=0.8)
        expected = model.harmonize(scan, seed=0).data
        assert np.array_equal(twin.harmonize(scan, seed=0).data, expected)


@pytest.mark.parametrize("name", METHODS)
def test_modalities_do_not_mix(name):
    alone = fitted(name, [brain(1)]).harmonize(brain(5), seed=0).data
    both = fitted(name, [brain(1), brain(2, "T2w")]).harmonize(brain(5), seed=0).data
    assert np.array_equal(alone, both)


@pytest.mark.parametrize("name", METHODS)
def test_contract_for_matches_the_card(name):
    card = registry.available()[name]
    contract = registry.load(name).contract_for(["T1w", "T2w"])
    assert contract.modalities == ("T1w", "T2w")
    assert contract.grid == card.grid
    assert (contract.resolution is None) == (card.grid == "native")
    assert contract == fitted(name, [brain(1), brain(2, "T2w")]).contract


@pytest.mark.parametrize("name", MONOTONE)
def test_rank_order_is_kept(name):
    scan = brain(5, gain=0.7, gamma=1.4)
    result = fitted(name).harmonize(scan, seed=0).data[scan.mask]
    order = np.argsort(scan.data[scan.mask], kind="stable")
    assert np.all(np.diff(result[order]) >= 0)


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(MONOTONE)))
def test_methods_not_called_monotone_are_not(name):
    """A card that says less than the truth would switch off a check for nothing."""
    scan = brain(5, bias=0.3)
    result = fitted(name).harmonize(scan, seed=0).data[scan.mask]
    order = np.argsort(scan.data[scan.mask], kind="stable")
    assert np.any(np.diff(result[order]) < 0)


@pytest.mark.parametrize("name", METHODS)
def test_errors_name_the_scan_and_the_cure(name):
    model, scan = fitted(name), brain(5)
    with pytest.raises(ScanError, match=r"sub-5: .* fitted on T1w only; train it on T2w"):
        model.harmonize(replace(scan, modality="T2w"), seed=0)
    spoiled = {
        "mask is empty": replace(scan, mask=np.zeros_like(scan.mask)),
        "all brain voxels have the value 0.5": replace(scan, data=np.full_like(scan.data, 0.5)),
        "NaN or infinite": replace(scan, data=np.where(scan.data > 0.8, np.nan, scan.data)),
        "differ in shape": replace(scan, mask=scan.mask[1:]),
    }
    for message, volume in spoiled.items():
        with pytest.raises(ScanError, match=f"sub-5: .*{message}"):
            model.harmonize(volume, seed=0)
        with pytest.raises(ScanError, match=f"sub-5: .*{message}"):
            registry.load(name).fit([scan, volume], seed=0)
    with pytest.raises(ScanError, match="no reference volume"):
        registry.load(name).fit([], seed=0)


@pytest.mark.parametrize("name", METHODS)
def test_impossible_states_are_refused(name):
    model = fitted(name)
    arrays, params = model.arrays(), model.params()
    (key,) = arrays
    cls = registry.load(name)
    for wrong in (
        {},
        {**arrays, "T2w/other": np.zeros(3)},
        {key: np.full_like(arrays[key], np.nan)},
        {key: arrays[key][..., None]},
        {key: -np.abs(arrays[key])[::-1] * 0},
    ):
        with pytest.raises(ScanError):
            cls.from_state(wrong, params)


# --- histogram matching


def test_histogram_matching_agrees_with_scikit_image():
    scan, reference = brain(5, gain=0.7, gamma=1.4), brain(1)
    result = fitted("histogram-matching", [reference]).harmonize(scan, seed=0).data[scan.mask]
    expected = match_histograms(scan.data[scan.mask], reference.data[reference.mask])
    assert np.abs(result - expected).mean() < 1e-4
    assert np.quantile(np.abs(result - expected), 0.999) < 5e-3


def test_mean_quantiles_of_several_volumes():
    volumes = [brain(1), brain(2, gain=1.2)]
    scan = brain(5)
    result = fitted("histogram-matching", volumes).harmonize(scan, seed=0).data[scan.mask]
    for p in (0.05, 0.3, 0.5, 0.8, 0.99):
        mean = np.mean([np.quantile(v.data[v.mask], p) for v in volumes])
        assert np.quantile(result, p) == pytest.approx(mean, abs=2e-3)


def test_eight_bit_images_leave_no_bands():
    """An 8-bit reference leaves no steps in a continuous scan, and levels stay evenly apart."""
    fine = brain(1)
    coarse = replace(fine, data=np.round(fine.data * 100).astype(np.float32) / 100)
    result = fitted("histogram-matching", [coarse]).harmonize(brain(5), seed=0)
    assert np.unique(result.data).size > 0.9 * np.unique(brain(5).data).size
    mapped = fitted("histogram-matching", [fine]).harmonize(coarse, seed=0).data
    assert np.abs(mapped - fine.data)[fine.mask].max() < 0.02
    assert np.abs(mapped - coarse.data)[fine.mask].mean() < 0.001


def test_few_levels_are_reported():
    scan = brain(5)
    coarse = replace(scan, data=np.round(scan.data * 20).astype(np.float32) / 20)
    result = fitted("histogram-matching").harmonize(coarse, seed=0)
    assert any("distinct intensities" in sentence for sentence in result.warnings)


@settings(max_examples=60, deadline=None)
@given(
    source=hnp.arrays(np.float32, (4, 4, 4), elements=st.floats(0, 1, width=16)),
    target=hnp.arrays(np.float32, (4, 4, 4), elements=st.floats(0, 1, width=16)),
    name=st.sampled_from(["histogram-matching", "nyul", "zscore"]),
)
def test_maps_are_monotone_for_any_intensities(source, target, name):
    mask = np.ones(source.shape, bool)
    source[0, 0, :2], target[0, 0, :2] = (0, 1), (0, 1)
    model = registry.load(name).fit([Volume(target, mask, "T1w")], seed=0)
    result = model.harmonize(Volume(source, mask, "T1w"), seed=0).data
    order = np.argsort(source, axis=None, kind="stable")
    assert np.all(np.diff(result.ravel()[order]) >= 0)
    assert np.isfinite(result).all()
    for level in np.unique(source)[:5]:
        assert np.unique(result[source == level]).size == 1


def test_distributed_values_have_the_quantiles_and_keep_their_order():
    rng = np.random.default_rng(3)
    values, wanted = rng.gamma(2.0, size=5000), np.sort(rng.normal(0.5, 0.1, 4001))
    found = distributed(values, wanted)
    assert np.array_equal(found.argsort(), values.argsort())
    levels = np.linspace(0.02, 0.98, 49)
    reached, asked = np.quantile(found, levels), np.quantile(wanted, levels)
    np.testing.assert_allclose(reached, asked, atol=1e-3)
    assert wanted[0] <= found.min() <= found.max() <= wanted[-1]
    ties = distributed(np.array([1.0, 1.0, 2.0, 2.0]), np.array([0.0, 10.0]))
    assert ties.tolist() == [2.5, 2.5, 7.5, 7.5]


def test_mid_quantiles_equal_hazens():
    values = np.random.default_rng(0).normal(size=1000)
    p = np.linspace(0.01, 0.99, 57)
    assert mid_quantiles(values, p) == pytest.approx(np.quantile(values, p, method="hazen"))


# --- z-score, Nyul


def test_zscore_agrees_with_scipy():
    scan, volumes = brain(5, gain=0.7), [brain(1), brain(2)]
    values = [v.data[v.mask].astype(float) for v in volumes]
    mean, sd = np.mean([v.mean() for v in values]), np.mean([v.std() for v in values])
    expected = np.maximum(stats.zscore(scan.data[scan.mask].astype(float)) * sd + mean, 0)
    result = fitted("zscore", volumes).harmonize(scan, seed=0)
    assert result.data[scan.mask] == pytest.approx(expected, abs=1e-6)


def test_zscore_reports_clipped_voxels():
    flat = brain(1, noise=0.0)
    wide = replace(flat, data=np.where(flat.mask, flat.data * 3, 0).astype(np.float32))
    low = replace(flat, data=np.where(flat.mask, flat.data**6, 0).astype(np.float32))
    model = ZScore.fit([low], seed=0)
    result = model.harmonize(wide, seed=0)
    expected = model.arrays()["T1w/moments"]
    assert result.details["clipped_fraction"] > 0.01
    assert expected[0] == pytest.approx(low.data[low.mask].mean(), rel=1e-5)
    assert any("set to 0" in sentence for sentence in result.warnings)


def test_nyul_moves_landmarks_to_the_standard_scale():
    volumes = [brain(1), brain(2, gain=1.3, gamma=0.9)]
    found = np.array([np.percentile(v.data[v.mask].astype(float), PERCENTILES) for v in volumes])
    low, high = found[:, 0].mean(), found[:, -1].mean()
    rescaled = [np.interp(row, (row[0], row[-1]), (low, high)) for row in found]
    model = Nyul.fit(volumes, seed=0)
    assert model.arrays()["T1w/landmarks"] == pytest.approx(np.mean(rescaled, axis=0), abs=1e-4)
    scan = brain(5, gain=0.6, gamma=1.3)
    result = model.harmonize(scan, seed=0).data[scan.mask]
    standard = model.arrays()["T1w/landmarks"]
    assert np.percentile(result, PERCENTILES) == pytest.approx(standard, abs=2e-3)
    # Beyond percentile 99 the last segment goes on.
    own = np.percentile(scan.data[scan.mask].astype(float), PERCENTILES)
    slope = (standard[-1] - standard[-2]) / (own[-1] - own[-2])
    top = standard[-1] + slope * (scan.data[scan.mask].max() - own[-1])
    assert result.max() == pytest.approx(top, rel=2e-3)


def test_nyul_merges_tied_landmarks():
    scan = brain(5)
    coarse = replace(scan, data=np.where(scan.mask, np.round(scan.data * 3) / 3, 0))
    result = fitted("nyul").harmonize(coarse, seed=0)
    assert any("landmarks differ" in sentence for sentence in result.warnings)
    tied = Nyul.fit([coarse], seed=0).arrays()["T1w/landmarks"]
    assert np.all(np.diff(tied) > 0)


# --- white-matter peak


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"noise": 0.06}, {"bias": 0.08}, {"atrophy": 0.12}, {"noise": 0.05, "atrophy": 0.08}],
    ids=str,
)
@pytest.mark.parametrize("gain", [0.5, 1.0, 300.0])
def test_white_matter_peak_is_found(kwargs, gain):
    scan = brain(3, **kwargs)
    scan = replace(scan, data=scan.data * np.float32(gain))
    assert find_peak(scan) == pytest.approx(0.88 * gain, rel=0.02)


@pytest.mark.parametrize(("modality", "peak"), [("T2w", 0.4), ("FLAIR", 0.6)])
def test_main_tissue_peak_of_the_other_modalities(modality, peak):
    assert find_peak(brain(3, modality)) == pytest.approx(peak, rel=0.03)
    assert find_peak(brain(3, modality, atrophy=0.1)) == pytest.approx(peak, rel=0.03)


def test_wm_peak_is_one_factor():
    scan, model = brain(5, gain=0.4), WhiteMatterPeak.fit([brain(1), brain(2), brain(3)], seed=0)
    result = model.harmonize(scan, seed=0)
    ratio = result.data[scan.mask] / scan.data[scan.mask]
    assert ratio == pytest.approx(result.details["factor"], rel=1e-5)
    assert result.details["factor"] == pytest.approx(2.5, rel=0.03)
    assert any("unusual factor" in sentence for sentence in result.warnings)


def test_broad_peak_is_reported():
    model = fitted("wm-peak")
    even, uneven = (model.harmonize(brain(5, bias=bias), seed=0) for bias in (0.0, 0.45))
    assert not even.warnings
    # White matter is 0.88 with Gaussian scatter here: half width 2.355 SD, widened by the density.
    assert 0.04 < even.details["relative_width"] < 0.15
    assert uneven.details["relative_width"] > 0.35
    assert any("bias correction" in sentence for sentence in uneven.warnings)


# --- SSIMH


def test_ssimh_equals_a_plain_swap_where_the_mask_fills_the_slice():
    rng = np.random.default_rng(0)
    mask = np.ones((16, 20, 5), bool)
    scan, *references = (
        Volume(rng.uniform(0.5, 1, mask.shape).astype(np.float32), mask, "T1w") for _ in range(3)
    )
    result = Ssimh.fit(references, seed=0).harmonize(scan, seed=0).data
    for z in range(5):
        spectrum = fft.dctn(scan.data[..., z].astype(float), norm="ortho")
        low = [fft.dctn(r.data[..., z].astype(float), norm="ortho")[:3, :3] for r in references]
        spectrum[:3, :3] = np.mean(low, axis=0)
        expected = np.maximum(fft.idctn(spectrum, norm="ortho"), 0)
        assert result[..., z] == pytest.approx(expected, abs=1e-5)


def test_ssimh_with_equal_masks_is_a_masked_plain_swap():
    scan, reference = brain(5, gain=0.7), brain(1)
    result = Ssimh.fit([reference], seed=0).harmonize(scan, seed=0).data
    z = SHAPE[2] // 2
    spectrum = fft.dctn(scan.data[..., z].astype(float), norm="ortho")
    spectrum[:3, :3] = fft.dctn(reference.data[..., z].astype(float), norm="ortho")[:3, :3]
    expected = np.where(scan.mask[..., z], np.maximum(fft.idctn(spectrum, norm="ortho"), 0), 0)
    assert result[..., z] == pytest.approx(expected, abs=1e-5)


def test_ssimh_does_not_darken_a_larger_brain():
    """A small and a large brain of one intensity: the swap must not read size as brightness."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    noise = np.random.default_rng(0).normal(0, 0.02, SHAPE)
    small, large = (
        Volume(np.where(radius < r, 0.7 + noise, 0).astype(np.float32), radius < r, "T1w")
        for r in (0.75, 0.85)
    )
    result = Ssimh.fit([small], seed=0).harmonize(large, seed=0)
    centre = SHAPE[2] // 2
    inside = large.mask[..., centre]
    assert result.data[..., centre][inside].mean() == pytest.approx(0.7, rel=0.01)
    # The plain swap is off by a tenth, so the case can fail.
    plain, other = (
        fft.dctn(v.data[..., centre].astype(float), norm="ortho") for v in (large, small)
    )
    plain[:3, :3] = other[:3, :3]
    assert fft.idctn(plain, norm="ortho")[inside].mean() < 0.65
    assert result.details["slices_left"] > 0  # the large brain's top slices have no reference
    top = np.flatnonzero(large.mask.any(axis=(0, 1)))[-1]
    assert np.array_equal(result.data[..., top], large.data[..., top])


def test_ssimh_needs_its_own_grid():
    model, scan = fitted("ssimh"), brain(5)
    cut = replace(scan, data=scan.data[:-1], mask=scan.mask[:-1])
    with pytest.raises(ScanError, match="resample to the model's grid"):
        model.harmonize(cut, seed=0)
    with pytest.raises(ScanError, match="resample to the model's grid"):
        Ssimh.fit([scan, cut], seed=0)


# --- real scans

OPENMULTI = Path(__file__).parents[2] / "shared" / "data" / "openmulti"


def real_scan(name):
    """A skull-stripped T1w scan of the cohort, every second voxel."""
    path = OPENMULTI / f"sub-{name}" / "anat" / f"sub-{name}_T1w.nii.gz"
    if not path.exists():
        pytest.skip(f"no real scans at {OPENMULTI}")
    image = nib.load(path)
    data = np.asarray(image.dataobj, dtype=np.float32)[::2, ::2, ::2]
    mask = ndimage.binary_fill_holes(data > 0)
    spacing = tuple(2 * float(size) for size in image.header.get_zooms()[:3])
    scale = fit_scale(data, mask, "robust")
    return Volume(scale.apply(data), mask, "T1w", spacing, "novosibirsk", name)


@pytest.mark.real
@pytest.mark.parametrize("name", [n for n in MONOTONE if n != "wm-peak"])
def test_known_change_of_a_real_scan_is_undone(name):
    truth = real_scan("nov54")
    scan = replace(truth, data=(0.8 * truth.data**1.15).astype(np.float32))
    model = fitted(name, [real_scan("nov52"), real_scan("nov53")])
    mask = truth.mask
    result = model.harmonize(scan, seed=0).data
    alone = model.harmonize(truth, seed=0).data
    # What was done to the scan must not matter any more (z-score undoes gains only).
    limit = {"histogram-matching": 1e-3, "nyul": 0.01, "zscore": 0.03}[name]
    assert np.abs(result - alone)[mask].mean() < limit
    before = wasserstein(
        scan.data, real_scan("nov52").data, mask, second_mask=real_scan("nov52").mask
    )
    after = wasserstein(result, real_scan("nov52").data, mask, second_mask=real_scan("nov52").mask)
    assert after < 0.5 * before
    assert rank_agreement(scan.data, result, mask) > 0.9999
    assert edge_correlation(scan.data, result, mask) > 0.9


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ixi012", "ixi034"])
def test_white_matter_peak_against_labels(name):
    """Raw head after N4: the peak is the mode of the labelled white matter, one voxel eroded."""
    labels = OPENMULTI / "derivatives" / "dlmuse" / f"sub-{name}" / "anat"
    path = OPENMULTI / f"sub-{name}" / "anat" / f"sub-{name}_T1w.nii.gz"
    if not path.exists():
        pytest.skip(f"no real scans at {OPENMULTI}")
    ants = pytest.importorskip("ants")
    image = nib.load(path)
    spacing = tuple(float(size) for size in image.header.get_zooms()[:3])
    found = np.asarray(nib.load(labels / f"sub-{name}_dseg.nii.gz").dataobj)
    mask = ndimage.binary_fill_holes(ndimage.binary_closing(found > 0, iterations=2))
    corrected = ants.n4_bias_field_correction(
        ants.from_numpy(image.get_fdata(dtype=np.float32), spacing=spacing),
        mask=ants.from_numpy(mask.astype(np.float32), spacing=spacing),
        shrink_factor=3,
        convergence={"iters": [30, 30, 30], "tol": 1e-7},
    ).numpy()
    data = fit_scale(corrected, mask, "robust").apply(corrected)
    white = ndimage.binary_erosion((found >= 81) & (found <= 95))
    counts, edges = np.histogram(data[white], 512, (0, 1.5))
    mode = edges[ndimage.gaussian_filter1d(counts.astype(float), 10).argmax()]
    assert find_peak(Volume(data, mask, "T1w", spacing)) == pytest.approx(mode, rel=0.02)
    noise = np.random.default_rng(0).normal(0, 0.07, (2, *data.shape))
    noisy = np.hypot(data + noise[0], noise[1])
    noisy = Volume(noisy.astype(np.float32), mask, "T1w", spacing)
    assert find_peak(noisy) == pytest.approx(mode, rel=0.03)
