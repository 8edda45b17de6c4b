"""How hard the phantom is for histogram matching, against the same figure on real scans.

For every simulated site other than the reference domain, a subject's scan is matched to the
histogram of ANOTHER subject's scan at the reference domain (scikit-image, voxels of the brain
masks only) and compared with the same subject's truth at the reference domain, on the scan's own
grid:

    PSNR = 20 log10(peak / RMSE),  RMSE over the brain mask, peak = maximum of the truth in it.

Four readings. ``corrected`` takes both scans as stored, divided by their true receive bias field
(a perfect N4; noise and transmit error stay): this is what real scans are after preprocessing,
and the figure to compare. ``clean`` takes both without bias field, transmit error and noise (what
is left is anatomy and contrast); ``acquired`` takes both as stored;
``own`` is ``clean`` with the subject's own histogram, what is lost even if all subjects shared
one. A site's figure is the median over all pairs of two different subjects. On real travelling
subjects histogram matching reads about 26.5 dB; simulated subjects that share one histogram read
about 37 dB, and then nothing can be learned from a comparison with it.

    python benchmarks/phantom_realism.py [--subjects 8] [--resolution 2] [--modality T1w]
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray
from skimage.exposure import match_histograms

from bids_harmony.phantom.acquisition import Scan, acquire
from bids_harmony.phantom.anatomy import build_anatomy
from bids_harmony.phantom.person import make_person
from bids_harmony.phantom.sites import ADULTS, REFERENCE, get_sites

FloatArray = NDArray[np.floating]


def psnr(image: FloatArray, truth: FloatArray) -> float:
    """Peak signal-to-noise ratio, dB, of two samples of the same voxels; peak of the truth."""
    error = float(np.sqrt(np.mean((image - truth) ** 2)))
    return 20 * float(np.log10(truth.max() / error))


def brain_values(image: FloatArray, scan: Scan) -> FloatArray:
    """Values of an image in the brain mask of its scan."""
    return np.asarray(image[scan.brain >= 0.5], dtype=float)


def score(scan: Scan, other: Scan, site: str) -> tuple[float, float, float]:
    """PSNR after matching one scan to another subject's: corrected, clean, acquired."""
    truth = brain_values(scan.truth[REFERENCE], scan)
    stored, target = scan.image * scan.slope, other.image * other.slope
    pairs = [
        (stored / scan.bias, target / other.bias),
        (scan.truth[site], other.truth[REFERENCE]),
        (stored, target),
    ]
    scores = []
    for image, reference in pairs:
        matched = match_histograms(brain_values(image, scan), brain_values(reference, other))
        # The gain of a stored scan is arbitrary: the medians bring it to the truth's level.
        level = brain_values(other.truth[REFERENCE], other)
        matched = matched * np.median(level) / np.median(brain_values(reference, other))
        scores.append(psnr(matched, truth))
    return scores[0], scores[1], scores[2]


def own_histogram(scan: Scan, site: str) -> float:
    """PSNR of the clean scan after histogram matching to the truth itself."""
    truth = brain_values(scan.truth[REFERENCE], scan)
    return psnr(match_histograms(brain_values(scan.truth[site], scan), truth), truth)


def collect(
    subjects: int, modality: str, resolution: float | None, seed: int
) -> dict[str, list[Scan]]:
    """Scan every subject at every site."""
    sites = {site.name: site for site in get_sites(ADULTS)}
    scans: dict[str, list[Scan]] = {name: [] for name in sites}
    for index in range(1, subjects + 1):
        person = make_person(seed, index)
        anatomy = build_anatomy(person, 2.0 if resolution and resolution >= 2 else 1.0)
        for name, site in sites.items():
            wanted = {REFERENCE: sites[REFERENCE], name: site}
            scans[name].append(acquire(anatomy, person, site, modality, wanted, resolution))
    return scans


def main() -> None:
    """Print a table of PSNR per site and its median over sites."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--resolution", type=float, default=2.0, help="mm; 0: the sites' own")
    parser.add_argument("--modality", default="T1w")
    parser.add_argument("--random-seed", type=int, default=0)
    options = parser.parse_args()
    resolution = options.resolution or None
    scans = collect(options.subjects, options.modality, resolution, options.random_seed)
    table = []
    print("site\tcorrected\t(range)\tclean\tacquired\town\t(median PSNR over pairs, dB)")
    for name, own in scans.items():
        if name == REFERENCE:
            continue
        pairs = [
            score(scan, other, name)
            for i, scan in enumerate(own)
            for j, other in enumerate(scans[REFERENCE])
            if i != j
        ]
        columns = np.array(pairs)
        lowest, highest = columns[:, 0].min(), columns[:, 0].max()
        ceiling = np.median([own_histogram(scan, name) for scan in own])
        row = [*np.median(columns, axis=0), ceiling]
        table.append(row)
        print(f"{name}\t{row[0]:.1f}\t{lowest:.1f}-{highest:.1f}", end="")
        print("".join(f"\t{value:.1f}" for value in row[1:]))
    middle = np.median(np.array(table), axis=0)
    print(f"median over sites\t{middle[0]:.1f}\t", end="")
    print("".join(f"\t{value:.1f}" for value in middle[1:]))


if __name__ == "__main__":
    main()
