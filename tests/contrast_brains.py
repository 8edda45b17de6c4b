"""Small synthetic brains in two contrasts at several sites, with known anatomy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import ndimage

from bids_harmony.methods.base import Volume

SHAPE = (36, 40, 36)
#: Fluid, grey and white matter, lesion, by site and modality.
TISSUES = {
    ("a", "T1w"): (0.15, 0.60, 0.95, 0.55),
    ("a", "T2w"): (1.00, 0.60, 0.40, 0.85),
    ("b", "T1w"): (0.30, 0.55, 0.75, 0.50),
    ("b", "T2w"): (1.00, 0.75, 0.55, 0.95),
}


def anatomy(seed, shape=SHAPE, lesion=None):
    """Labels 0 fluid, 1 grey, 2 white, 3 lesion (a ball: centre, radius), and brain mask."""
    rng = np.random.default_rng(seed)
    axes = [np.linspace(-1, 1, n) for n in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    wobble = ndimage.gaussian_filter(rng.normal(size=shape), 2)
    ball = np.sqrt(x**2 + (y + 0.15 * z) ** 2 + z**2) * (1 + 0.04 * rng.normal())
    radius = ball + 0.06 * wobble / wobble.std()
    mask = (ball < 0.9) & ~((z < -0.3) & (y > 0.2))
    labels = np.select([radius < 0.22, radius < 0.6, radius < 0.8], [0, 2, 1], 0)
    if lesion is not None:
        centre, size = lesion
        far = sum((np.arange(n) - c).reshape([-1 if a == b else 1 for b in range(3)]) ** 2
                  for a, (n, c) in enumerate(zip(shape, centre, strict=True)))  # fmt: skip
        labels[far <= size**2] = 3
    return labels, mask


def scan(seed, site="a", modality="T1w", *, noise=0.02, shape=SHAPE, lesion=None, session=""):
    """One scan of the person `seed`; lesion as for `anatomy`."""
    labels, mask = anatomy(seed, shape, lesion)
    data = ndimage.gaussian_filter(np.array(TISSUES[site, modality])[labels], 0.5)
    rng = np.random.default_rng([seed, ord(site), len(modality), ord(modality[1])])
    data = np.abs(data + rng.normal(0, noise, shape))
    return Volume(
        np.where(mask, data, 0).astype(np.float32),
        mask,
        modality,
        (2.0,) * 3,
        site=site,
        name=f"sub-{seed:02d}_{site}_{modality}",
        subject=f"{seed:02d}",
        session=session,
    )


def labelled(seed, site="a", modality="T1w"):
    """A scan with its known tissues: 1 fluid, 2 grey, 3 white matter."""
    labels, mask = anatomy(seed)
    tissues = np.where(mask, np.array([1, 2, 3], np.uint8)[labels], 0).astype(np.uint8)
    return replace(scan(seed, site, modality), labels=tissues)


def cohort(seeds_by_site, modalities=("T1w", "T2w"), **kwargs):
    """Scans of several people by site."""
    return [
        scan(seed, site, modality, **kwargs)
        for site, seeds in seeds_by_site.items()
        for seed in seeds
        for modality in modalities
    ]
