"""Simulated sites: one scanner and its protocols each, with an invented vendor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bids_harmony.errors import UsageError
from bids_harmony.phantom.signal import Tissue, mprage, spgr, tse

REFERENCE = "mprage3"
#: Sites that scan adults: what is simulated unless sites are named.
ADULTS = (REFERENCE, "mprage15", "spgr3", "spgr15", "thick15", "biased3")
#: Site that scans infants.
INFANTS = "infant3"


@dataclass(frozen=True)
class Protocol:
    """One sequence as a site runs it.

    Attributes
    ----------
    sequence
        ``mprage``, ``spgr``, ``tse`` or ``tirtse``.
    tr, te, ti
        Repetition, echo and inversion time, seconds.
    flip
        Flip angle, degrees.
    voxel
        Voxel size along the three array axes, mm.
    codes
        Orientation of the three array axes, e.g. ``PIR`` for sagittal slices.
    snr
        White-matter signal over the standard deviation of the noise in one channel.
    blur
        Full width at half maximum of the smoothing by the reconstruction, mm, along each axis.
    echo_spacing, n_readouts
        MPRAGE: time between two readout pulses, seconds, and their number per inversion.
    train
        Turbo spin echo: length of the echo train, seconds.
    gain
        Factor on the site's gain: lower where fluid is much brighter than white matter.
    """

    sequence: str
    tr: float
    te: float
    flip: float
    voxel: tuple[float, float, float]
    codes: str
    snr: float
    ti: float | None = None
    blur: tuple[float, float, float] = (0.0, 0.0, 0.0)
    echo_spacing: float = 0.0
    n_readouts: int = 0
    train: float = 0.0
    gain: float = 1.0

    def signal(self, tissue: Tissue, b1: NDArray[np.floating]) -> NDArray[np.floating]:
        """Signed signal of a tissue where the transmit field is ``b1`` times the nominal one."""
        flip = np.deg2rad(self.flip) * np.asarray(b1, dtype=float)
        if self.sequence == "spgr":
            return spgr(tissue, tr=self.tr, te=self.te, flip=flip)
        if self.sequence == "mprage":
            return mprage(
                tissue,
                tr=self.tr,
                te=self.te,
                ti=self.ti or 0.0,
                flip=flip,
                echo_spacing=self.echo_spacing,
                n_readouts=self.n_readouts,
            )
        return tse(tissue, tr=self.tr, te=self.te, train=self.train, b1=b1, ti=self.ti)

    def metadata(self) -> dict[str, Any]:
        """Sidecar fields of the sequence (BIDS names and units)."""
        variants = {"mprage": ["MP", "SP"], "spgr": ["SP"], "tse": ["SK"], "tirtse": ["SK"]}
        scanning = {"mprage": ["GR", "IR"], "spgr": ["GR"], "tse": ["SE"], "tirtse": ["SE", "IR"]}
        fields: dict[str, Any] = {
            "MRAcquisitionType": "3D" if max(self.voxel) < 2 else "2D",
            "ScanningSequence": scanning[self.sequence],
            "SequenceVariant": variants[self.sequence],
            "PulseSequenceType": self.sequence.upper(),
            "RepetitionTime": self.tr,
            "EchoTime": self.te,
            "FlipAngle": self.flip,
        }
        if self.ti is not None:
            fields["InversionTime"] = self.ti
        return fields


@dataclass(frozen=True)
class Site:
    """A scanner: field strength, imperfections, and its protocol for each modality.

    Attributes
    ----------
    name
        Label, letters and digits only: becomes the session label.
    field_strength
        1.5 or 3.0, tesla.
    bias
        Standard deviation of the logarithm of the receive bias field in the head.
    b1_spread
        Transmit field: nominal plus up to this share in the centre, minus it at the rim.
    tilt
        Rotation of the field of view about the left-right axis, degrees.
    dtype
        How voxels are stored: ``int16``, ``uint8`` (with slope) or ``float32``.
    gain
        Stored value of the white matter, roughly; per scan it varies.
    t1_scale
        Factor of T1 per tissue, of whoever is scanned here.
    """

    name: str
    manufacturer: str
    model: str
    field_strength: float
    bias: float
    b1_spread: float
    tilt: float
    dtype: str
    gain: float
    protocols: dict[str, Protocol] = field(default_factory=dict)
    t1_scale: dict[str, float] = field(default_factory=dict)

    def metadata(self) -> dict[str, Any]:
        """Sidecar fields of the scanner (BIDS names and units)."""
        return {
            "Modality": "MR",
            "Manufacturer": self.manufacturer,
            "ManufacturersModelName": self.model,
            "MagneticFieldStrength": self.field_strength,
            "InstitutionName": f"Simulated site {self.name}",
            "StationName": f"SIM{self.name.upper()}",
        }


def _spin_echo(
    voxel: tuple[float, float, float],
    snr: float,
    t2w: tuple[float, float],
    flair: tuple[float, float, float],
) -> dict[str, Protocol]:
    """T2w from (TR, TE) and FLAIR from (TR, TE, TI), seconds."""
    tr, te = t2w
    long_tr, long_te, ti = flair
    return {
        "T2w": Protocol("tse", tr, te, 90, voxel, "LAS", snr, train=1.6 * te, gain=0.3),
        "FLAIR": Protocol(
            "tirtse",
            long_tr,
            long_te,
            90,
            voxel,
            "LAS",
            0.8 * snr,
            ti=ti,
            train=1.6 * long_te,
            gain=0.5,
        ),
    }


def all_sites() -> dict[str, Site]:
    """Every simulated site by name, the reference domain first and `INFANTS` last.

    Infants of half a year have white matter hardly brighter than grey (isointense; Delisle et
    al. 2021, table 1): here T1 of both is longer, and the head is an adult's.
    """
    sites = [
        Site("mprage3", "Aurelia", "Magna 3", 3.0, 0.10, 0.12, 0.0, "int16", 600,
             {"T1w": Protocol("mprage", 2.3, 0.003, 9, (1, 1, 1), "PIR", 45, ti=0.9,
                              echo_spacing=0.0071, n_readouts=176),
              **_spin_echo((0.9, 0.9, 3.0), 50, (5.0, 0.100), (9.0, 0.120, 2.5))}),
        Site("mprage15", "Borealis", "Vela 1.5", 1.5, 0.07, 0.04, -8.0, "int16", 250,
             {"T1w": Protocol("mprage", 1.9, 0.0039, 15, (1.2, 1.0, 1.0), "RAS", 24, ti=1.1,
                              echo_spacing=0.0087, n_readouts=160),
              **_spin_echo((1.0, 1.0, 4.0), 32, (4.2, 0.110), (9.0, 0.115, 2.45))}),
        Site("spgr3", "Cygnal", "Tor 3.0", 3.0, 0.12, 0.14, 5.0, "int16", 1800,
             {"T1w": Protocol("spgr", 0.0098, 0.0046, 12, (0.9, 0.9, 1.2), "LAS", 32),
              **_spin_echo((0.8, 0.8, 4.0), 40, (6.0, 0.085), (10.0, 0.140, 2.65))}),
        Site("spgr15", "Dorado", "Echo 15", 1.5, 0.09, 0.05, -4.0, "uint8", 90,
             {"T1w": Protocol("spgr", 0.022, 0.006, 28, (1.0, 1.0, 1.5), "LPS", 20),
              **_spin_echo((1.0, 1.0, 5.0), 26, (3.6, 0.090), (8.0, 0.105, 2.25))}),
        Site("thick15", "Eridan", "Clinic 1.5", 1.5, 0.12, 0.05, 12.0, "int16", 400,
             {"T1w": Protocol("spgr", 0.18, 0.0045, 75, (0.9, 0.9, 4.5), "LPS", 38,
                              blur=(1.2, 1.2, 0.0)),
              **_spin_echo((0.9, 0.9, 5.0), 30, (3.0, 0.100), (6.5, 0.110, 2.05))}),
        Site("biased3", "Fornax", "Wide 3T", 3.0, 0.26, 0.18, 3.0, "float32", 1.0,
             {"T1w": Protocol("mprage", 2.4, 0.0024, 8, (1, 1, 1), "ASR", 26, ti=1.1,
                              echo_spacing=0.0065, n_readouts=192, blur=(0.8, 0.8, 0.8)),
              **_spin_echo((1.0, 1.0, 3.0), 36, (4.0, 0.120), (8.5, 0.095, 2.4))}),
        Site(INFANTS, "Gavia", "Cradle 3", 3.0, 0.10, 0.10, 2.0, "int16", 350,
             {"T1w": Protocol("mprage", 1.9, 0.0044, 7, (1, 1, 1), "RAS", 30, ti=1.1,
                              echo_spacing=0.0085, n_readouts=144),
              **_spin_echo((1.0, 1.0, 2.0), 36, (7.4, 0.119), (9.0, 0.120, 2.5))},
             t1_scale={"GM": 1.2, "WM": 1.5}),
    ]  # fmt: skip
    return {site.name: site for site in sites}


def get_sites(names: list[str] | tuple[str, ...]) -> list[Site]:
    """Look sites up by name, in the order given.

    Raises
    ------
    UsageError
        An unknown name, or one given twice.
    """
    known = all_sites()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"unknown site {unknown[0]!r}: choose from {', '.join(known)}")
    if len(set(names)) != len(names):
        raise UsageError("a site is named twice: name each site once")
    if not names:
        raise UsageError("no site given: name at least one of " + ", ".join(known))
    return [known[name] for name in names]
