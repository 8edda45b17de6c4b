"""Who the simulated subjects are: age, sex and the volumes that go with them."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import numpy as np

#: Tissues whose T1 differs between people.
VARIED = ("GM", "WM", "CSF", "fat", "muscle")


@dataclass(frozen=True)
class Person:
    """One simulated subject.

    Attributes
    ----------
    index
        Number from 1; the same number is the same person in every data set of one seed.
    age, sex
        Years, and ``F`` or ``M``.
    icv
        Intracranial volume, mL.
    gm, wm, csf
        Share of the intracranial volume, adding up to 1.
    ventricles
        Share of the intracranial volume that is lateral and third ventricle.
    lesions
        Volume of white-matter hyperintensities, mL; 0 without lesions.
    t1_scale
        Factor of T1 per tissue.
    seed
        Seed of the data set.
    """

    index: int
    age: int
    sex: str
    icv: float
    gm: float
    wm: float
    csf: float
    ventricles: float
    lesions: float
    t1_scale: dict[str, float]
    seed: int

    @property
    def label(self) -> str:
        """Participant label without ``sub-``."""
        return f"{self.index:02d}"


def stream(seed: int, index: int, purpose: str) -> np.random.Generator:
    """Random numbers of one purpose of one subject, independent of every other."""
    return np.random.default_rng([seed, index, crc32(purpose.encode())])


def expected_shares(age: float) -> tuple[float, float, float]:
    """Mean shares of the intracranial volume at an age.

    Parameters
    ----------
    age
        Years, 18 to 95.

    Returns
    -------
    Grey matter, white matter, and the ventricles (a part of the CSF).

    Notes
    -----
    Grey matter falls linearly from early adulthood, white matter follows a parabola that peaks
    in mid-life (Ge et al. 2002, AJNR 23:1327), so that brain tissue is near 0.86 of the
    intracranial volume at 20 and near 0.74 at 85 (Fotenos et al. 2005, Neurology 64:1032).
    Ventricles grow faster than exponentially flat: about threefold over adult life (Bethlehem
    et al. 2022, Nature 604:525); sulcal CSF takes the rest (Pfefferbaum et al. 1994, Arch
    Neurol 51:874).
    """
    gm = 0.505 - 0.00125 * (age - 20)
    wm = 0.365 - 2.2e-5 * (age - 42) ** 2
    ventricles = 0.0105 * np.exp(0.0165 * (age - 20))
    return float(gm), float(wm), float(ventricles)


def make_person(seed: int, index: int, *, lesions: float = 0.0) -> Person:
    """Draw a subject.

    Parameters
    ----------
    seed
        Seed of the data set.
    index
        Number of the subject, from 1.
    lesions
        Probability, 0 to 1, that the subject has white-matter hyperintensities.

    Notes
    -----
    Ages follow the golden ratio sequence, so that few subjects already span 20 to 85 years.
    Hyperintensities: about 1 mL at 40, 10 mL at 80, with a wide spread (Wardlaw et al. 2015,
    J Am Heart Assoc 4:001140, for the order of magnitude). T1 differs between people by 4 %
    (standard deviations of 2.5 to 6 % in Stanisz et al. 2005 and Rooney et al. 2007).
    """
    rng = stream(seed, index, "person")
    start = np.random.default_rng([seed, crc32(b"ages")]).uniform()
    age = round(20 + 65 * ((start + index * 0.6180339887) % 1.0))
    sex = "F" if rng.uniform() < 0.5 else "M"
    icv = float(np.clip(rng.normal(1380 if sex == "F" else 1540, 95), 1130, 1830))
    gm, wm, ventricles = expected_shares(age)
    gm = gm + float(np.clip(rng.normal(0, 0.018), -0.04, 0.04))
    wm = wm + float(np.clip(rng.normal(0, 0.018), -0.04, 0.04))
    ventricles *= float(np.exp(np.clip(rng.normal(0, 0.28), -0.6, 0.6)))
    t1 = {name: float(np.exp(np.clip(rng.normal(0, 0.04), -0.09, 0.09))) for name in VARIED}
    has_lesions = rng.uniform() < lesions
    volume = float(np.exp(0.058 * (age - 40) + np.clip(rng.normal(0, 0.6), -1.2, 1.2)))
    return Person(
        index=index,
        age=age,
        sex=sex,
        icv=icv,
        gm=gm,
        wm=wm,
        csf=1 - gm - wm,
        ventricles=min(ventricles, 0.6 * (1 - gm - wm)),
        lesions=min(volume, 45.0) if has_lesions else 0.0,
        t1_scale=t1,
        seed=seed,
    )
