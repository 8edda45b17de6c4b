"""Classes of brain voxels that the contrasts of a session tell together.

Left to itself, CALAMITI's beta stays for long with two labels of its four, and the decoder with
one grey brain. The classes are where beta starts from: they are the same for all contrasts of a
session, and numbered alike at all sites.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import ClusterError, kmeans2, vq
from torch import Tensor

from bids_harmony.training.contrasts import Session

_LEARNED = 20_000  # voxels of a brain, evenly spaced, that suffice to find the means from
_ROUNDS = 30
_FAR = 3.0  # deviations beyond it count as it


def joint_classes(sessions: Sequence[Session], count: int) -> list[Tensor]:
    """Classes of the voxels of some sessions: k-means of all of a session's contrasts.

    Of several scans of one contrast the first counts. The classes are numbered by their
    brightness in the contrast that most sessions have; of equals it is T1w, in which tissues lie
    farthest apart, so that no site's numbers are others than the next one's.

    Parameters
    ----------
    sessions
        To learn from.
    count
        Of classes.

    Returns
    -------
    classes
        For each session, (X, Y, Z), uint8: 1 to `count`; 0 where no class is known, which is
        outside the mask, and everywhere if the session lacks that contrast or its voxels do not
        fall into so many classes.
    """
    having = Counter(modality for session in sessions for modality in session.images)
    leading = max(sorted(having), key=lambda modality: (having[modality], modality == "T1w"))
    return [_of_session(session, leading, count) for session in sessions]


def _of_session(session: Session, leading: str, count: int) -> Tensor:
    classes = torch.zeros(session.mask.shape, dtype=torch.uint8)
    if leading in session.images:
        order = sorted(session.images, key=lambda modality: (modality != leading, modality))
        values = torch.stack([session.images[m][0][session.mask] for m in order], dim=1)
        found = _clustered(values.double().numpy(), count)
        if found is not None:
            classes[session.mask] = torch.from_numpy(found)
    return classes


def _clustered(values: NDArray[np.float64], count: int) -> NDArray[np.uint8] | None:
    """Classes 1.. of voxels (N, contrasts), by the first contrast; None if there are fewer."""
    deviation = values.std(0)
    if not (deviation > 0).all():
        return None
    values = ((values - values.mean(0)) / deviation).clip(-_FAR, _FAR)
    some = values[:: max(len(values) // _LEARNED, 1)]
    middle = np.argsort(some[:, 0])[((np.arange(count) + 0.5) / count * len(some)).astype(int)]
    try:
        means, _ = kmeans2(some, some[middle], iter=_ROUNDS, minit="matrix", missing="raise")
    except ClusterError:
        return None
    nearest, _ = vq(values, means[np.argsort(means[:, 0])])
    return (nearest + 1).astype(np.uint8)
