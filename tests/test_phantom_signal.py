"""Signal equations against a step-by-step simulation of the magnetisation."""

from __future__ import annotations

import numpy as np
import pytest

from bids_harmony.errors import UsageError
from bids_harmony.phantom.signal import (
    TISSUES,
    Tissue,
    mprage,
    spgr,
    tissue_table,
    tse,
    vary_tissues,
)
from bids_harmony.phantom.sites import REFERENCE, all_sites, get_sites


class Spin:
    """One spin packet on resonance: a vector that pulses rotate and time relaxes."""

    def __init__(self, tissue: Tissue, t2: float):
        self.m = np.array([0.0, 0.0, tissue.pd])
        self.tissue, self.t2 = tissue, t2

    def rotate_x(self, angle):
        c, s = np.cos(angle), np.sin(angle)
        self.m = np.array([[1, 0, 0], [0, c, s], [0, -s, c]]) @ self.m

    def rotate_y(self, angle):
        c, s = np.cos(angle), np.sin(angle)
        self.m = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]]) @ self.m

    def wait(self, seconds):
        e1, e2 = np.exp(-seconds / self.tissue.t1), np.exp(-seconds / self.t2)
        self.m = self.m * [e2, e2, e1] + [0, 0, self.tissue.pd * (1 - e1)]

    def spoil(self):
        self.m[:2] = 0


def simulate_spgr(tissue, tr, te, flip):
    spin = Spin(tissue, tissue.t2star)
    for _ in range(3000):
        spin.rotate_x(flip)
        spin.wait(te)
        signal = spin.m[1]
        spin.wait(tr - te)
        spin.spoil()
    return signal


def simulate_mprage(tissue, tr, te, ti, flip, spacing, n, inversion):
    spin = Spin(tissue, tissue.t2star)
    signal = None
    for _ in range(40):
        spin.m = np.array([0, 0, -inversion * spin.m[2]])
        spin.wait(ti - (n // 2) * spacing)
        for pulse in range(n):
            spin.rotate_x(flip)
            spin.wait(te)
            if pulse == n // 2:
                signal = spin.m[1]
            spin.wait(spacing - te)
            spin.spoil()
        spin.wait(tr - ti - (n - n // 2) * spacing)
    return signal


def simulate_tse(tissue, tr, te, train, spacing, ti=None, inversion=0.96):
    spin = Spin(tissue, tissue.t2)
    signal = None
    for _ in range(8):
        if ti is not None:
            spin.m = np.array([0, 0, -inversion * spin.m[2]])
            spin.wait(ti)
        spin.rotate_x(np.pi / 2)
        for echo in range(1, round(train / spacing) + 1):
            spin.wait(spacing / 2)
            spin.rotate_y(np.pi)
            spin.wait(spacing / 2)
            if echo == round(te / spacing):
                signal = spin.m[1]
        spin.spoil()
        spin.wait(tr - train - (ti or 0))
    return signal


@pytest.mark.parametrize("field", [1.5, 3.0])
@pytest.mark.parametrize("name", ["CSF", "GM", "WM", "fat"])
def test_spgr_is_the_steady_state_of_the_simulated_spin(field, name):
    tissue = tissue_table(field)[name]
    for flip in (0.1, 0.5, 1.3):
        expected = simulate_spgr(tissue, 0.02, 0.005, flip)
        assert spgr(tissue, tr=0.02, te=0.005, flip=flip) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("field", [1.5, 3.0])
@pytest.mark.parametrize("name", ["CSF", "GM", "WM", "fat"])
def test_mprage_is_the_steady_state_of_the_simulated_spin(field, name):
    tissue = tissue_table(field)[name]
    timing = {"tr": 2.3, "te": 0.003, "ti": 0.9}
    for flip in (0.08, 0.2):
        expected = simulate_mprage(
            tissue, flip=flip, spacing=0.0071, n=177, inversion=0.96, **timing
        )
        found = mprage(tissue, flip=flip, echo_spacing=0.0071, n_readouts=177, **timing)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("ti", [None, 2.5])
@pytest.mark.parametrize("name", ["GM", "WM", "CSF", "lesion"])
def test_turbo_spin_echo_is_close_to_the_simulated_train(ti, name):
    # The equation lets the train end with no longitudinal magnetisation; perfect pulses come close
    tissue = tissue_table(3.0)[name]
    expected = simulate_tse(tissue, 9.0, 0.12, 0.2, 0.01, ti)
    found = tse(tissue, tr=9.0, te=0.12, train=0.2, ti=ti)
    assert found == pytest.approx(expected, rel=0.02, abs=0.003)


def test_spgr_peaks_at_the_ernst_angle():
    tissue = tissue_table(3.0)["WM"]
    angles = np.linspace(0.01, 1.5, 5000)
    best = angles[np.argmax(spgr(tissue, tr=0.01, te=0.004, flip=angles))]
    assert best == pytest.approx(np.arccos(np.exp(-0.01 / tissue.t1)), abs=1e-3)


def test_timing_that_does_not_fit_is_refused():
    tissue = tissue_table(3.0)["WM"]
    with pytest.raises(ValueError, match="do not fit"):
        mprage(tissue, tr=1.0, te=0.003, ti=0.9, flip=0.1, echo_spacing=0.007, n_readouts=176)
    with pytest.raises(ValueError, match="do not fit"):
        tse(tissue, tr=1.0, te=0.1, train=1.2)
    with pytest.raises(ValueError, match=r"7.0 T"):
        tissue_table(7.0)


def test_relaxation_depends_on_field_as_published():
    low, high = tissue_table(1.5), tissue_table(3.0)
    assert set(low) == set(high) == set(TISSUES)
    for name in ("GM", "WM", "lesion", "fat", "muscle"):
        assert low[name].t1 < high[name].t1
        assert low[name].t2star > high[name].t2star
    for table in (low, high):
        assert table["WM"].t1 < table["GM"].t1 < table["CSF"].t1
        for tissue in table.values():
            assert tissue.t2star <= tissue.t2 < tissue.t1
            assert 0 < tissue.pd <= 1


def test_people_differ_in_t1_only_where_told():
    varied = vary_tissues(tissue_table(3.0), {"GM": 1.05})
    assert varied["GM"].t1 == pytest.approx(1.05 * 1.33)
    assert varied["WM"] == tissue_table(3.0)["WM"]


@pytest.mark.parametrize("site", list(all_sites().values()), ids=lambda s: s.name)
def test_every_site_has_the_contrast_of_its_modality(site):
    table = tissue_table(site.field_strength)

    def order(modality):
        protocol = site.protocols[modality]
        return {n: abs(float(protocol.signal(table[n], np.ones(())))) for n in TISSUES}

    t1w, t2w, flair = order("T1w"), order("T2w"), order("FLAIR")
    assert t1w["CSF"] < t1w["GM"] < t1w["WM"] < t1w["fat"]
    assert t2w["WM"] < t2w["GM"] < t2w["CSF"]
    assert flair["CSF"] < 0.5 * flair["WM"] < flair["GM"] < flair["lesion"]
    assert t1w["bone"] < 0.01 * t1w["WM"]


def test_sites_are_told_apart_by_their_sidecars():
    sites = all_sites()
    assert next(iter(sites)) == REFERENCE
    assert len(sites) >= 6
    scanners = {(s.manufacturer, s.model, s.field_strength) for s in sites.values()}
    assert len(scanners) == len(sites)
    contrasts = set()
    for site in sites.values():
        table = tissue_table(site.field_strength)
        gm, wm = (float(site.protocols["T1w"].signal(table[t], np.ones(()))) for t in ("GM", "WM"))
        contrasts.add(round(gm / wm, 2))
    assert len(contrasts) >= 4


@pytest.mark.parametrize(
    ("names", "message"),
    [(("mprage3", "nowhere"), "nowhere"), (("spgr3", "spgr3"), "twice"), ((), "no site")],
)
def test_impossible_sites_are_refused(names, message):
    with pytest.raises(UsageError, match=message):
        get_sites(names)
