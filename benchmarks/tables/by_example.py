"""Phantom scans from site to site, for the methods that learn from several sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from benchmarks.goals import Goal
from benchmarks.harness import Case, Column, Prepared
from benchmarks.scoring import towards_example
from benchmarks.tables.travelling import RESOLUTION, SCORES, Travelling
from benchmarks.trials import Trial, example_of
from benchmarks.view import View
from bids_harmony.phantom.sites import REFERENCE

NEAR, FAR, UNSEEN = "mprage15", "spgr3", "biased3"
_TWO = ("--preset", "cpu", "--modality", "T1w", "T2w")


def way(site: str, to: str) -> str:
    """Name of a condition."""
    return f"{site} to {to}"


#: Two pairs of sites, in both directions: a near and a wide one.
NARROW = (way(NEAR, REFERENCE), way(REFERENCE, NEAR))
WIDE = (way(FAR, REFERENCE), way(REFERENCE, FAR))
#: What a translator from one site to the reference domain is tried with.
TO_REFERENCE = tuple(way(site, REFERENCE) for site in (NEAR, FAR, UNSEEN, REFERENCE))

TRIALS = (
    Trial("hail", "hail", ("--preset", "cpu"), neural=True, sites=(REFERENCE, FAR),
          one_example=True),
    Trial("hail-without-consistency", "hail",
          ("--preset", "cpu", "--method-option", "consistency=0"),
          neural=True, sites=(REFERENCE, FAR), one_example=True),
    Trial("calamiti", "calamiti", _TWO, neural=True),
    Trial("calamiti-narrow", "calamiti", _TWO, neural=True, sites=(REFERENCE, NEAR)),
    Trial("calamiti-wide", "calamiti", _TWO, neural=True, sites=(REFERENCE, FAR),
          conditions=WIDE),
    Trial("calamiti-narrow-adapted", "calamiti", _TWO, neural=True, sites=(REFERENCE, NEAR),
          networks_of="calamiti-narrow", adapt_to=FAR, conditions=(way(FAR, REFERENCE),)),
    Trial("dewey2020", "dewey2020", _TWO, neural=True),
    Trial("unet", "unet", ("--preset", "cpu"), neural=True, travellers=True,
          conditions=TO_REFERENCE),
    Trial("cyclegan", "cyclegan", ("--preset", "cpu"), neural=True, sites=(REFERENCE, FAR),
          conditions=TO_REFERENCE),
    Trial("stylegan", "stylegan", ("--preset", "cpu"), neural=True, sites=(REFERENCE, FAR),
          one_example=True),
)  # fmt: skip


class ByExample(Travelling):
    """Directions between three sites that training can see, and from one that none has seen."""

    name: ClassVar[str] = "by-example"
    title: ClassVar[str] = "Travelling subjects, from site to site (phantom)"
    sites: ClassVar[tuple[str, ...]] = (NEAR, FAR, UNSEEN)
    tested: ClassVar[int] = 3
    trained: ClassVar[int] = 15
    trained_at: ClassVar[tuple[str, ...]] = (REFERENCE, NEAR, FAR)
    trained_on: ClassVar[tuple[str, ...]] = ("T1w", "T2w")
    travellers: ClassVar[int] = 5
    travelled_to: ClassVar[tuple[str, ...]] = (REFERENCE, FAR)
    about: ClassVar[str] = (
        f"Digital brain phantom at {RESOLUTION:g} mm: {trained} training subjects, five at each "
        f"of the sites {', '.join(trained_at)}; tested on the T1w of {tested} others who were "
        f"scanned at all sites and at {UNSEEN}, which no training has seen. A condition is the "
        f"scan's site and the site whose appearance it gets; {REFERENCE} and {NEAR} are a narrow "
        f"pair, {REFERENCE} and {FAR} a wide one. Histogram matching and Nyul learn from the five "
        "scans of the wanted site. "
        f"HAIL learns from the T1w of {REFERENCE} and {FAR} ({NEAR} is unseen) and is shown one "
        "scan of the wanted site; `hail-without-consistency` is trained with the weight 0 of "
        "that loss. CALAMITI and Dewey 2020 learn from T1w and T2w of all three sites and take "
        "the mean theta of the wanted site's five; `calamiti-narrow` and `calamiti-wide` learn "
        "from that pair only, and `calamiti-narrow-adapted` is the former after `train "
        f"--adapt-to {FAR}`. The comparators learn one pair of sites: the paired U-Net from "
        f"{travellers} subjects who were scanned at {REFERENCE} and {FAR}, CycleGAN and the "
        f"style-transfer GAN from the T1w of {REFERENCE} and {FAR}; the latter is shown one scan, "
        "as HAIL. " + SCORES + " The example's columns have the one scan of the wanted "
        "site as target that HAIL is shown: another person's, as in the paper."
    )
    columns: ClassVar[tuple[Column, ...]] = (
        *Travelling.columns[:4],
        Column("nwd_example_ip", "nWD(i,p), example", "%", 1, "hundred"),
        Column("nwd_example_tp", "nWD(t,p), example", "%", 1, "lower"),
        *Travelling.columns[4:],
    )
    trials: ClassVar[tuple[str, ...]] = (
        "none", "histogram-matching", "nyul", *(trial.label for trial in TRIALS),
    )  # fmt: skip
    controls: ClassVar[tuple[str, ...]] = (way(REFERENCE, REFERENCE),)
    paper: ClassVar[Mapping[tuple[str, str], Mapping[str, float]]] = {
        ("hail", "mean"): {"nwd_example_ip": 94.63, "nwd_example_tp": 11.87,
                           "ravd_input_gm": 7.06, "ravd_input_wm": 13.42},
        ("hail-without-consistency", "mean"): {
            "nwd_example_ip": 90.96, "nwd_example_tp": 15.16, "ravd_input_gm": 10.70,
            "ravd_input_wm": 20.33},
        ("none", "C to D"): {"ssim": 0.8034, "psnr": 26.81},
        ("calamiti", "C to D"): {"ssim": 0.8814, "psnr": 29.82},
        ("calamiti", "D to C"): {"ssim": 0.8663, "psnr": 28.68},
        ("none", "E to F"): {"ssim": 0.8706, "psnr": 29.74},
        ("calamiti", "E to F"): {"ssim": 0.8834, "psnr": 30.17},
        ("calamiti", "F to E"): {"ssim": 0.8843, "psnr": 30.36},
        ("calamiti before adaptation", "D to C"): {"ssim": 0.8028, "psnr": 25.37},
        ("calamiti after adaptation", "D to C"): {"ssim": 0.8486, "psnr": 27.82},
    }  # fmt: skip
    goals: ClassVar[tuple[Goal, ...]] = (
        Goal("HAIL: nWD(t,p), example, at most 8 %", "nwd_example_tp", 8.0, floor=False),
        Goal("HAIL: rAVD GM at most 3 %", "ravd_gm", 3.0, floor=False),
        Goal("HAIL: rAVD WM at most 4 %", "ravd_wm", 4.0, floor=False),
        Goal("CALAMITI, wide pair: SSIM .08 above the input", "ssim", 0.08, above="none",
             conditions=WIDE),
        Goal("CALAMITI, wide pair: PSNR 3 dB above the input", "psnr", 3.0, above="none",
             conditions=WIDE),
        Goal("CALAMITI, narrow pair: SSIM .014 above the input", "ssim", 0.014, above="none",
             conditions=NARROW),
        Goal("CALAMITI, narrow pair: PSNR .6 dB above the input", "psnr", 0.6, above="none",
             conditions=NARROW),
    )  # fmt: skip

    def ways(self) -> dict[str, tuple[str, str]]:
        """Both pairs in both directions, HAIL's unseen ones, the unseen site, and a control."""
        pairs = (
            (NEAR, REFERENCE), (REFERENCE, NEAR), (FAR, REFERENCE), (REFERENCE, FAR),
            (NEAR, FAR), (FAR, NEAR), (UNSEEN, REFERENCE), (REFERENCE, REFERENCE),
        )  # fmt: skip
        return {way(site, to): (site, to) for site, to in pairs}

    def score(self, case: Case, result: View, prep: Prepared) -> dict[str, float]:
        """Result against the truth, and against the one example of the wanted site."""
        (scan,) = case.scans
        shown = example_of(prep.cohort, case.to)
        example = (prep.scaled(shown), prep.mask(shown))
        near = towards_example(prep.scaled(scan), result(scan), prep.mask(scan), example)
        return {**super().score(case, result, prep), **near}
