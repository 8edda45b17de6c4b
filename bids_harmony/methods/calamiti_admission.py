"""What CALAMITI refuses: brains that it draws badly, of another modality, or lying turned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bids_harmony.errors import ScanError, UsageError
from bids_harmony.imaging.layout import Coarse, Layout, side_words

#: Above the mean error of training brains by so many standard deviations, at least by so much.
_FLAG, _REFUSE = (4.0, 0.15), (8.0, 0.4)
_UNLEARNED = 0.7  # error of held-out scans above which the networks have learned too little
_FAR = 2.0  # theta from the modality's mean, in distances of the farthest training scan
_OTHER = 0.5  # theta this much nearer to a scan of another modality than to one of its own


@dataclass(frozen=True)
class Known:
    """What training scans of one modality are like.

    Attributes
    ----------
    thetas
        Of each scan, (N, 2).
    error, deviation
        `drawing_error` of scans that were drawn with their own theta: mean of held-out ones, and
        standard deviation.
    layout
        Where brain and brightness lie.
    """

    thetas: NDArray[np.float64]
    error: float
    deviation: float
    layout: Layout

    @property
    def flag(self) -> float:
        """Error above which a scan is told to be unlike the training's."""
        return self.error + max(_FLAG[0] * self.deviation, _FLAG[1])

    @property
    def refuse(self) -> float:
        """Error above which a scan is refused."""
        return self.error + max(_REFUSE[0] * self.deviation, _REFUSE[1])

    def distance(self, theta: Sequence[float]) -> float:
        """From the nearest training scan."""
        return float(np.linalg.norm(self.thetas - np.array(theta), axis=1).min())

    def is_far(self, theta: Sequence[float]) -> bool:
        """Whether theta lies far outside the training scans'."""
        mean = self.thetas.mean(0)
        reach = np.linalg.norm(self.thetas - mean, axis=1).max()
        return bool(np.linalg.norm(np.array(theta) - mean) > _FAR * max(reach, 1e-3))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Inverse of `from_arrays`."""
        return {
            "thetas": self.thetas,
            "error": np.array([self.error, self.deviation]),
            **self.layout.arrays(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Known:
        """From `arrays`."""
        error, deviation = (float(v) for v in arrays["error"])
        thetas = np.array(arrays["thetas"], dtype=np.float64)
        return cls(thetas, error, deviation, Layout.from_arrays(arrays))


def checked_theta(
    known: Mapping[str, Known], modality: str, numbers: Sequence[float]
) -> tuple[float, float]:
    """Theta that a user gives as numbers.

    Raises
    ------
    UsageError
        If the networks do not know the modality, or theta is not two numbers near those of
        training scans.
    """
    words = f"theta of {modality}, {', '.join(f'{v:g}' for v in numbers)}"
    if modality not in known:
        raise UsageError(f"{words}: the model was trained on {', '.join(sorted(known))} only")
    if len(numbers) != 2 or known[modality].is_far(numbers):
        low, high = known[modality].thetas.min(0), known[modality].thetas.max(0)
        raise UsageError(
            f"{words}: give two numbers near those of the training scans, {low[0]:.3g} to "
            f"{high[0]:.3g} and {low[1]:.3g} to {high[1]:.3g} (theta.tsv of the bundle)"
        )
    return numbers[0], numbers[1]


def admit(
    known: Mapping[str, Known],
    modality: str,
    *,
    name: str,
    theta: Sequence[float],
    error: float,
    brain: Coarse,
) -> list[str]:
    """Refuse a scan, or say what is doubtful about it.

    Parameters
    ----------
    known
        By modality; `modality` is among them.
    name
        Of the scan, for the message.
    theta, error
        Of the scan, as in `Known`.
    brain
        The scan.

    Returns
    -------
    warnings
        For the report.

    Raises
    ------
    ScanError
        If it is no brain of the modality, or lies turned.
    """
    own = known[modality]
    if not error <= own.refuse:
        raise ScanError(
            f"{name}: the networks cannot draw it (error {error:.2f}, held-out scans "
            f"{own.error:.2f}, refused above {own.refuse:.2f}): no {modality} brain, or full of "
            "artefacts; check modality, mask and header, or use a statistical method"
        )
    near = own.distance(theta)
    for other in known.keys() - {modality}:
        if known[other].distance(theta) < _OTHER * near:
            raise ScanError(
                f"{name}: its contrast is that of {other} scans, not of {modality}; correct the "
                "file's name, or use a statistical method"
            )
    axes, saved = own.layout.turned(brain)
    if saved > 0:
        raise ScanError(
            f"{name}: the brain lies turned: what the header calls right, anterior, superior "
            f"seems to be {side_words(axes)} (left and right may be "
            "exchanged); correct the header's orientation"
        )
    warnings = []
    if own.error > _UNLEARNED:
        warnings.append(
            f"The networks draw their own held-out {modality} scans hardly better than one grey "
            f"value (error {own.error:.2f}, a grey brain has 1): train them for longer."
        )
    if error > own.flag:
        warnings.append(
            f"Unlike the scans that the networks learned from: drawn with an error of {error:.2f},"
            f" held-out scans with {own.error:.2f}. Look at the result before you use it."
        )
    if own.is_far(theta):
        warnings.append(
            "The scan's contrast lies far outside those that the networks learned from; train on "
            "scans of its site too."
        )
    return warnings
