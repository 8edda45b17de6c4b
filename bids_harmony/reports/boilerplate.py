"""The methods text that users may paste into a paper (CC0)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SOFTWARE = (
    "Gorgolewski K et al. Nipype: a flexible, lightweight and extensible neuroimaging data "
    "processing framework in Python. Front Neuroinform 2011;5:13.",
    "Yarkoni T et al. PyBIDS: Python tools for BIDS datasets. J Open Source Softw 2019;4:1294.",
    "Tustison NJ et al. N4ITK: improved N3 bias correction. IEEE Trans Med Imaging "
    "2010;29:1310-1320.",
    "Avants BB et al. A reproducible evaluation of ANTs similarity metric performance in brain "
    "image registration. NeuroImage 2011;54:2033-2044.",
    "Fonov VS et al. Unbiased average age-appropriate atlases for pediatric studies. NeuroImage "
    "2011;54:313-327.",
)


_ADAPTED = {
    "site": " The model was adapted, without labels or paired scans, to a few scans of each site "
    "that its training had not seen.",
    "scan": " The model was adapted, without labels or paired scans, to each scan by itself.",
}


def methods_text(
    fingerprint: Mapping[str, Any], title: str, reference: str, adapt: str = ""
) -> str:
    """Paragraphs that say what was done to each scan.

    Parameters
    ----------
    fingerprint
        Settings of the preprocessing (`Preprocessing.fingerprint`).
    title
        Human title of the method.
    reference
        Reference domain, in words.
    adapt
        ``site`` or ``scan``: what the model was adapted to; anything else: it was not.
    """
    bias = (
        "Intensity non-uniformity was corrected with N4 inside the brain mask."
        if fingerprint["BiasField"] == "N4"
        else "Intensity non-uniformity was not corrected."
    )
    return (
        f"Scans were harmonized with bids_harmony {fingerprint['Version']}, which is based on "
        "Nipype and PyBIDS. Each scan was checked (finite voxels, sane affine); a brain mask was "
        "taken from precomputed derivatives, from the zero background of skull-stripped scans, "
        f"or by nonlinear registration of a head template with ANTs. {bias} The brain was "
        f"registered rigidly to {fingerprint['Template']} (T2w and FLAIR scans to the T1w of "
        "their session, or FLAIR to its T2w, and with that to the template) and its intensities "
        "were brought to a common scale by a linear map whose parameters were kept.\n\n"
        f"Intensities were then harmonized by {title} to the reference domain {reference}."
        f"{_ADAPTED.get(adapt, '')} The change of the brain's intensities was carried back to "
        "the raw grid and added to the bias-corrected scan (where the method asks for it, an "
        "increasing map kept the brain's histogram), and the result was expressed in the "
        f"reference domain's intensity units. Random seed {fingerprint['Seed']}, "
        f"{fingerprint['Threads']} thread(s) per process."
    )


def citation_markdown(text: str, citations: Sequence[str]) -> str:
    """``logs/CITATION.md``: methods text and references; the same for concurrent runs."""
    references = "\n".join(f"- {c}" for c in (*citations, *SOFTWARE))
    return (
        "# Methods\n\nThis text may be copied unchanged into a manuscript (CC0).\n\n"
        f"{text}\n\n# References\n\n{references}\n"
    )
