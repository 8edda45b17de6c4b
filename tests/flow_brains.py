"""Small synthetic brains for the flow methods, with known anatomy."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from bids_harmony.methods.base import Volume

SHAPE = (40, 48, 40)
TISSUES = {"T1w": (0.2, 0.6, 0.9), "T2w": (1.0, 0.55, 0.4), "FLAIR": (0.15, 0.75, 0.6)}


def brain(seed=0, *, modality="T1w", gamma=1.0, noise=0.02, ventricle=0.2, shape=SHAPE):
    """Folded ellipsoids of white core, grey shell, fluid rim and ventricle, on a 2 mm grid."""
    rng = np.random.default_rng(seed)
    axes = [np.linspace(-1, 1, n) for n in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    wobble = ndimage.gaussian_filter(rng.normal(size=shape), 2)
    ball = np.sqrt(x**2 + (y + 0.1 * z) ** 2 + z**2) * (1 + 0.04 * rng.normal())
    radius = ball + 0.06 * wobble / wobble.std()
    mask = ball < 0.88
    fluid, grey, white = TISSUES[modality]
    data = np.select([radius < ventricle, radius < 0.6, radius < 0.8], [fluid, white, grey], fluid)
    data = ndimage.gaussian_filter(data, 0.5) ** gamma
    data = np.abs(data + rng.normal(0, noise, shape))
    return Volume(
        np.where(mask, data, 0).astype(np.float32),
        mask,
        modality,
        (2.0,) * 3,
        site="a",
        name=f"sub-{seed:02d}_{modality}",
        subject=f"{seed:02d}",
    )
