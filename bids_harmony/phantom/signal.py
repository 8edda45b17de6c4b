"""MR signal equations and relaxation times of tissue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]

#: Simulated tissue classes, in the order of every array of fractions.
TISSUES = ("CSF", "GM", "WM", "lesion", "fat", "marrow", "muscle", "bone")


@dataclass(frozen=True)
class Tissue:
    """Relaxation of one tissue at one field strength.

    Attributes
    ----------
    t1, t2, t2star
        Relaxation times, seconds.
    pd
        Proton density relative to water, 0 to 1.
    """

    t1: float
    t2: float
    t2star: float
    pd: float


def tissue_table(field: float) -> dict[str, Tissue]:
    """Relaxation times at 1.5 or 3 tesla, adults, in vivo.

    Parameters
    ----------
    field
        1.5 or 3.0, tesla.

    Returns
    -------
    One entry per class of ``TISSUES``.

    Raises
    ------
    ValueError
        At any other field strength.

    Notes
    -----
    Rounded from Wansapura et al. 1999 (J Magn Reson Imaging 9:531; brain, 3 T), Rooney et al.
    2007 (Magn Reson Med 57:308; brain and CSF, 1.5 T), Stanisz et al. 2005 (Magn Reson Med
    54:507; T2 of brain, muscle), Peters et al. 2007 (Magn Reson Imaging 25:748; T2*), de
    Bazelaire et al. 2004 (Radiology 230:652; fat, marrow), Whittall et al. 1997 (Magn Reson Med
    37:34; water content). Values for lesions (white-matter hyperintensities) and cortical bone
    are chosen inside the wide published ranges.
    """
    if field == 3.0:
        return {
            "CSF": Tissue(4.30, 1.60, 0.90, 1.00),
            "GM": Tissue(1.33, 0.099, 0.066, 0.82),
            "WM": Tissue(0.83, 0.075, 0.053, 0.70),
            "lesion": Tissue(1.35, 0.140, 0.090, 0.83),
            "fat": Tissue(0.38, 0.068, 0.030, 0.90),
            "marrow": Tissue(0.58, 0.049, 0.010, 0.55),
            "muscle": Tissue(1.41, 0.040, 0.025, 0.75),
            "bone": Tissue(0.22, 0.0005, 0.0004, 0.20),
        }
    if field == 1.5:
        return {
            "CSF": Tissue(4.10, 1.80, 1.10, 1.00),
            "GM": Tissue(1.15, 0.095, 0.084, 0.82),
            "WM": Tissue(0.66, 0.072, 0.066, 0.70),
            "lesion": Tissue(1.05, 0.150, 0.110, 0.83),
            "fat": Tissue(0.34, 0.058, 0.035, 0.90),
            "marrow": Tissue(0.55, 0.049, 0.015, 0.55),
            "muscle": Tissue(1.00, 0.042, 0.030, 0.75),
            "bone": Tissue(0.17, 0.0005, 0.0004, 0.20),
        }
    raise ValueError(f"no relaxation times at {field} T: choose 1.5 or 3.0")


def vary_tissues(table: Mapping[str, Tissue], scale: Mapping[str, float]) -> dict[str, Tissue]:
    """Multiply T1 of the named tissues: no two people have quite the same T1.

    Parameters
    ----------
    table
        Relaxation times of the average adult.
    scale
        Factor of T1 per tissue; a tissue not named keeps its T1.
    """
    return {name: replace(t, t1=t.t1 * scale.get(name, 1.0)) for name, t in table.items()}


def spgr(tissue: Tissue, *, tr: float, te: float, flip: FloatArray | float) -> FloatArray:
    """Spoiled gradient echo (FLASH, SPGR) in the steady state.

    Parameters
    ----------
    tissue
        Relaxation of the tissue.
    tr, te
        Repetition and echo time, seconds.
    flip
        Flip angle, radians, any shape.

    Returns
    -------
    Transverse magnetisation relative to water in equilibrium, shape of ``flip``.

    Notes
    -----
    Ernst and Anderson 1966, Rev Sci Instrum 37:93.
    """
    e1 = np.exp(-tr / tissue.t1)
    flip = np.asarray(flip, dtype=float)
    mz = (1 - e1) / (1 - e1 * np.cos(flip))
    return tissue.pd * np.sin(flip) * mz * np.exp(-te / tissue.t2star)


def mprage(
    tissue: Tissue,
    *,
    tr: float,
    te: float,
    ti: float,
    flip: FloatArray | float,
    echo_spacing: float,
    n_readouts: int,
    inversion: float = 0.96,
) -> FloatArray:
    """Magnetisation-prepared rapid gradient echo at the centre of k-space, in the steady state.

    Inversion, wait, ``n_readouts`` pulses of which the middle one is at ``ti``, recovery. Every
    event maps the longitudinal magnetisation m to ``a * m + b``, so the steady state of the
    whole cycle is the fixed point of one such map.

    Parameters
    ----------
    tissue
        Relaxation of the tissue.
    tr
        Time between two inversions, seconds.
    te, ti
        Echo and inversion time, seconds; ``ti`` ends at the middle pulse.
    flip
        Flip angle of the readout pulses, radians, any shape.
    echo_spacing
        Time between two readout pulses, seconds.
    n_readouts
        Readout pulses per inversion.
    inversion
        Inversion efficiency, 0 to 1 (adiabatic: the same everywhere).

    Returns
    -------
    Signed transverse magnetisation, shape of ``flip``.

    Raises
    ------
    ValueError
        The pulses do not fit into the cycle.

    Notes
    -----
    Sequence: Mugler and Brookeman 1990, Magn Reson Med 15:152; Brant-Zawadzki et al. 1992,
    Radiology 182:769. Signal: Deichmann et al. 2000, NeuroImage 12:112.
    """
    before = n_readouts // 2
    wait = ti - before * echo_spacing
    rest = tr - ti - (n_readouts - before) * echo_spacing
    if wait < 0 or rest < 0:
        raise ValueError("the readout pulses of MPRAGE do not fit between TI and TR")
    cos = np.cos(np.asarray(flip, dtype=float))
    e_wait, e_rest = np.exp(-wait / tissue.t1), np.exp(-rest / tissue.t1)
    e_pulse = np.exp(-echo_spacing / tissue.t1)
    ratio = cos * e_pulse
    fixed = (1 - e_pulse) / (1 - ratio)

    def pulses(mz: FloatArray, n: int) -> FloatArray:
        return fixed + (mz - fixed) * ratio**n

    # m just before the first pulse, as a function of m just before the inversion: 1 - e - inv*e*m
    slope = -inversion * e_wait * ratio**n_readouts * e_rest
    offset = 1 - e_rest + e_rest * pulses(np.full_like(cos, 1 - e_wait), n_readouts)
    m_before = offset / (1 - slope)
    m_first = 1 - e_wait - inversion * e_wait * m_before
    m_centre = pulses(m_first, before)
    decay = np.exp(-te / tissue.t2star)
    return tissue.pd * np.sin(np.asarray(flip, dtype=float)) * m_centre * decay


def tse(
    tissue: Tissue,
    *,
    tr: float,
    te: float,
    train: float,
    b1: FloatArray | float = 1.0,
    ti: float | None = None,
    inversion: float = 0.96,
) -> FloatArray:
    """Turbo spin echo, with ``ti`` the inversion recovery form of FLAIR (TIR-TSE).

    The echo train leaves no longitudinal magnetisation; it recovers for ``tr - train``.

    Parameters
    ----------
    tissue
        Relaxation of the tissue.
    tr, te
        Repetition and effective echo time, seconds.
    train
        Length of the echo train, seconds.
    b1
        Transmit field relative to nominal, any shape: scales the 90 and 180 degree pulses.
    ti
        Inversion time, seconds; None without inversion.
    inversion
        Inversion efficiency, 0 to 1.

    Returns
    -------
    Signed transverse magnetisation, shape of ``b1``.

    Raises
    ------
    ValueError
        Inversion time and echo train do not fit into the cycle.

    Notes
    -----
    Hajnal et al. 1992, J Comput Assist Tomogr 16:841 (FLAIR).
    """
    free = tr - train - (ti or 0.0)
    if free <= 0:
        raise ValueError("the echo train and TI do not fit into TR")
    mz = 1 - np.exp(-free / tissue.t1)
    if ti is not None:
        mz = 1 - (1 + inversion * mz) * np.exp(-ti / tissue.t1)
    angle = np.asarray(b1, dtype=float) * np.pi / 2
    pulse = np.sin(angle) * np.sin(angle) ** 2
    return tissue.pd * mz * np.exp(-te / tissue.t2) * pulse
