"""Scores that several tables share; images on one grid and one intensity scale."""

from __future__ import annotations

import hashlib
import inspect
import math
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nb
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bids_harmony.bids.write import save_nifti
from bids_harmony.imaging.tissues import TISSUES, dice
from bids_harmony.interfaces import segment
from bids_harmony.interfaces.ants import ants_session
from bids_harmony.metrics.intensity import normalized_wasserstein
from bids_harmony.metrics.similarity import edge_correlation, psnr, rank_agreement, ssim
from bids_harmony.metrics.slices import field_psnr, field_ssim, slice_consistency
from bids_harmony.metrics.tissue import relative_volume_difference

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]
Affine = NDArray[Any]
#: Field and slices of BlindHarmony: 144 x 176 voxels of 1.2 mm, 50 axial slices per person.
FIELD_MM, SLICES_MM = (144 * 1.2, 176 * 1.2), 50 * 1.2


def similarity(truth: Image, image: Image, mask: Mask) -> dict[str, float]:
    """PSNR (dB) and SSIM in the brain."""
    return {"psnr": psnr(truth, image, mask), "ssim": ssim(truth, image, mask)}


def anatomy(before: Image, image: Image, mask: Mask) -> dict[str, float]:
    """Rank agreement and edge correlation of result and input."""
    return {
        "rank": rank_agreement(before, image, mask),
        "edges": edge_correlation(before, image, mask),
    }


def whole_field(truth: Image, image: Image, mask: Mask, affine: Affine) -> dict[str, float]:
    """PSNR (dB) and SSIM over whole axial slices, background included."""
    turn = nb.orientations.io_orientation(affine)
    truth, image, mask = (nb.orientations.apply_orientation(x, turn) for x in (truth, image, mask))
    order = np.argsort(turn[:, 0])
    size = nb.affines.voxel_sizes(affine)[order]
    how: dict[str, Any] = {
        "axis": 2,
        "field": (round(FIELD_MM[0] / size[0]), round(FIELD_MM[1] / size[1])),
        "count": round(SLICES_MM / size[2]),
    }
    return {
        "field_psnr": field_psnr(truth, image, mask, **how),
        "field_ssim": field_ssim(truth, image, mask, **how),
    }


def distribution(before: Image, image: Image, truth: Image, mask: Mask) -> dict[str, float]:
    """nWD(i, p) and nWD(t, p) in per cent."""
    moved, left = normalized_wasserstein(before, image, truth, mask)
    return {"nwd_ip": moved, "nwd_tp": left}


def towards_example(
    before: Image, image: Image, mask: Mask, example: tuple[Image, Mask]
) -> dict[str, float]:
    """nWD as in the HAIL paper, in per cent: the target is one scan of the wanted site."""
    moved, left = normalized_wasserstein(before, image, example[0], mask, target_mask=example[1])
    return {"nwd_example_ip": moved, "nwd_example_tp": left}


def jumps(before: Image, image: Image, truth: Image, mask: Mask) -> dict[str, float]:
    """Slice consistency along x, y, z, and the largest of its ratios to input and truth."""
    found = [slice_consistency(image, mask, k) for k in range(3)]
    scores = {f"slice_{'xyz'[k]}": value for k, value in enumerate(found)}
    for name, other in (("input", before), ("truth", truth)):
        ratios = [found[k] / slice_consistency(other, mask, k) for k in range(3)]
        scores[f"slice_to_{name}"] = float(np.max(ratios))
    return scores


def segmented(
    images: Mapping[str, Image], affine: Affine, mask: Mask, kept: Path
) -> dict[str, NDArray[Any]]:
    """Tissue labels of several images of one brain, (X, Y, Z); found ones are kept in a folder.

    Trials share inputs and truths: the same voxels are not segmented again.
    """
    found = {}
    for name, image in images.items():
        path = kept / f"{_digest(image, affine, mask)}.nii.gz"
        if not path.is_file():
            with tempfile.TemporaryDirectory() as folder, ants_session(1, 1, folder) as ants:
                save_nifti(
                    segment.atropos(ants, image, affine, mask), affine, path, dtype=np.uint8
                )
        found[name] = np.asarray(nb.load(path).dataobj)  # type: ignore[attr-defined]
    return found


def _digest(image: Image, affine: Affine, mask: Mask) -> str:
    """Of everything that decides labels, the code among it."""
    words = f"{version('antspyx')} {inspect.getsource(segment)} {image.shape}"
    digest = hashlib.sha256(words.encode())
    for part in (image, np.asarray(affine, dtype=np.float64), mask):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:24]


def tissues(labels: dict[str, NDArray[Any]], known: NDArray[Any]) -> dict[str, float]:
    """rAVD (%) of ``image`` to ``truth`` and to ``before``, and Dice with the known labels."""
    numbers = TISSUES.values()
    to_truth = relative_volume_difference(labels["truth"], labels["image"], numbers)
    overlap = dice(labels["image"], known, numbers)
    scores = tissue_change(labels["before"], labels["image"])
    for name, number in TISSUES.items():
        scores[f"ravd_{name.lower()}"] = to_truth[number]
        scores[f"dice_{name.lower()}"] = overlap[number]
    return scores


def tissue_change(before: NDArray[Any], after: NDArray[Any]) -> dict[str, float]:
    """rAVD (%) of each tissue of a result to the input's (HAIL, equation 2)."""
    found = relative_volume_difference(before, after, TISSUES.values())
    return {f"ravd_input_{name.lower()}": found[number] for name, number in TISSUES.items()}


def divergence_of_sites(images: Sequence[Image], masks: Sequence[Mask], bins: int = 256) -> float:
    """Jensen-Shannon divergence of several brains' intensities in bits, 0 to log2 of their number.

    Common bins from the smallest value to the largest.
    """
    values = [image[mask] for image, mask in zip(images, masks, strict=True)]
    ends = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    counts = np.stack([np.histogram(v, bins, ends)[0] for v in values])
    shares = counts / counts.sum(axis=1, keepdims=True)
    whole = float(stats.entropy(shares.mean(axis=0), base=2))
    return whole - float(stats.entropy(shares, base=2, axis=1).mean())


def divergence_within_tissues(
    images: Sequence[Image], labels: Sequence[NDArray[Any]], bins: int = 256
) -> float:
    """Mean over tissues of `divergence_of_sites` of that tissue's voxels, bits.

    What makes whole brains alike by their histograms alone leaves tissues apart.
    """
    found = [
        divergence_of_sites(images, [label == number for label in labels], bins)
        for number in TISSUES.values()
        if all((label == number).any() for label in labels)
    ]
    return float(np.mean(found)) if found else math.nan


def slope_correlation(image: Image, mask: Mask) -> float:
    """Pearson's r of intensity and position along the second axis in the brain."""
    place = np.nonzero(mask)[1]
    return float(np.corrcoef(image[mask], place)[0, 1])


def ratio(value: float, other: float) -> float:
    """`value` over `other`; NaN where that is 0."""
    return value / other if other else math.nan
