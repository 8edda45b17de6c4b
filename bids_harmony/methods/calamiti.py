"""CALAMITI (Zuo et al., IPMI 2021).

A slice is taken apart into anatomy (beta) and contrast (theta), and drawn anew with the wanted
contrast. What the decoder cannot draw (noise, fine detail, lesions) would be lost, so not the
drawing is given back: the scan gets the change between the brain drawn with its own theta and the
same brain drawn with the wanted one (`change_between`). A scan that has the wanted theta already
stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from bids_harmony.errors import ScanError, UsageError
from bids_harmony.imaging.guided import bound_warnings
from bids_harmony.methods.base import (
    Contract,
    Harmonized,
    NeuralMethod,
    Training,
    Volume,
    preset_named,
)
from bids_harmony.methods.calamiti_admission import Known, checked_theta
from bids_harmony.methods.calamiti_case import Case, theta_of_volume
from bids_harmony.methods.calamiti_data import cohort_of
from bids_harmony.methods.calamiti_drawing import change_between
from bids_harmony.methods.calamiti_files import theta_png, theta_tsv
from bids_harmony.methods.calamiti_learned import Learned, Preset
from bids_harmony.methods.calamiti_training import adapt_learned, train_calamiti
from bids_harmony.methods.lazy_volumes import Chosen
from bids_harmony.methods.training_files import curves_csv, training_png
from bids_harmony.training.plan import Plan

LOG = logging.getLogger("bids_harmony")
TEMPLATE = "MNI152NLin2009aSym"

_CPU = Preset(
    resolution=2.0,
    batch=4,
    networks={"beta_base": 8, "decoder_base": 8, "levels": 3, "decay": 4e-4},
    plan=Plan(5000, 2e-3, every=250, patience=10),
    fusion_plan=Plan(400, 2e-3, every=50),
    adaptation_plan=Plan(800, 5e-4, every=50),
    start=1000,
)
_PAPER = Preset(
    resolution=1.0,
    batch=8,
    networks={"beta_base": 8, "decoder_base": 16, "levels": 4, "decay": 2e-4},
    plan=Plan(60_000, 4e-4, every=1000, patience=20),
    fusion_plan=Plan(2000, 1e-3, every=100),
    adaptation_plan=Plan(6000, 1e-4, every=200),
    start=6000,
)


class Calamiti(NeuralMethod):
    """CALAMITI: one set of networks for all sites; the wanted contrast is two numbers.

    Trained on sessions with two modalities; applied to a scan of one of them. Every change is
    at most 0.5 of the scale (brain roughly 0..1).

    Parameters
    ----------
    learned
        Networks and what is known of the training scans.
    preset
        With which it was trained.
    wanted
        By modality theta of the wanted appearance, and the names of the scans that show it;
        empty until `towards` was called.
    site
        To which the encoders were adapted, if they were.
    """

    name: ClassVar[str] = "calamiti"
    by_example: ClassVar[bool] = True
    fine_tunes: ClassVar[bool] = True
    presets_by_name: ClassVar[Mapping[str, Preset]] = {"cpu": _CPU, "paper": _PAPER}
    #: Whether a discriminator makes beta alike across sites (paper, 2.2).
    discriminator: ClassVar[bool] = True
    #: Whether theta comes from the slice that is drawn, not from another one of the volume.
    same_slice: ClassVar[bool] = False
    #: Whether training shows each volume in random tones too, which theta alone can tell.
    tones: ClassVar[bool] = True

    def __init__(
        self,
        learned: Learned,
        preset: str,
        wanted: Mapping[str, tuple[tuple[float, float], tuple[str, ...]]] | None = None,
        site: str | None = None,
    ) -> None:
        self._learned, self._preset, self._site = learned, preset, site
        self._wanted = dict(sorted((wanted or {}).items()))
        self._device, self._threads = "cpu", 1
        self._files: dict[str, bytes] = {}

    @classmethod
    def contract_for(cls, modalities: Sequence[str]) -> Contract:
        """The template's grid at 2 mm, robust scale, skull-stripped."""
        return cls.contract_for_preset(modalities, "cpu")

    @classmethod
    def contract_for_preset(cls, modalities: Sequence[str], preset: str) -> Contract:
        """The template's grid at the preset's voxel size."""
        return Contract(
            tuple(modalities),
            TEMPLATE,
            preset_named(cls.name, cls.presets_by_name, preset).resolution,
        )

    @property
    def contract(self) -> Contract:
        """For the modalities of `towards`; before it, for those of the training."""
        modalities = tuple(self._wanted) or tuple(sorted(self._learned.known))
        return self.contract_for_preset(modalities, self._preset)

    @classmethod
    def fit(
        cls, volumes: Sequence[Volume], *, seed: int, training: Training | None = None
    ) -> Self:
        """Train on the sessions of all sites that have two modalities.

        Raises
        ------
        ScanError
            If a scan cannot be used, no session has two modalities, or no subject can be held
            out.
        UsageError
            If the preset is unknown.
        """
        training = training or Training()
        preset = preset_named(cls.name, cls.presets_by_name, training.preset)
        torch.set_num_threads(training.threads)
        cohort = cohort_of(volumes, preset.resolution)
        for sentence in cohort.left_out:
            LOG.warning("left out of the training: %s", sentence)
        learned = train_calamiti(
            cohort, preset, seed=seed, training=training,
            discriminator=cls.discriminator, same_slice=cls.same_slice, tones=cls.tones,
        )  # fmt: skip
        LOG.info("discriminator: %s", learned.scores["discriminator"])
        made = cls(learned, training.preset)
        made._files = {
            "curves.csv": curves_csv(learned.runs),
            "training.png": training_png(learned.runs),
            "theta.tsv": theta_tsv(learned.thetas),
            "theta.png": theta_png(learned.thetas),
        }
        return made

    def place_on(self, device: str, threads: int) -> None:
        """Run on this device with this many CPU threads from now on."""
        self._device, self._threads = device, threads
        self._learned.networks.to(device)
        if self._learned.fusion is not None:
            self._learned.fusion.to(device)

    def towards(self, volumes: Sequence[Volume], *, seed: int) -> Self:
        """The same networks with the mean theta of these scans, for each of their modalities.

        Scans that `harmonize` would refuse are left out, with a warning in the log.

        Raises
        ------
        ScanError
            If no volume can be used, or the encoders were adapted to a site: they measure the
            theta of that site's scans only.
        """
        if self._site is not None:
            raise ScanError(
                f"the model is adapted to site {self._site}: give another reference to the model "
                "that it was adapted from, then adapt that"
            )
        torch.set_num_threads(self._threads)
        found: dict[str, list[tuple[str, tuple[float, float]]]] = {}
        refused = []
        for index in range(len(volumes)):
            volume = volumes[index]
            try:
                self._known(volume)
                case = self._case(volume)
            except ScanError as error:
                refused.append(str(error))
                LOG.warning("no example: %s", error)
                continue
            for sentence in case.warnings:
                LOG.warning("%s: %s", volume.name or "scan", sentence)
            found.setdefault(volume.modality, []).append((volume.name, case.theta))
        if not found:
            why = refused[0] if refused else "no scan was given"
            raise ScanError(f"{self.name}: no example can be used: {why}")
        wanted = {}
        for modality, examples in found.items():
            one, two = np.mean([theta for _, theta in examples], axis=0).tolist()
            wanted[modality] = ((one, two), tuple(name for name, _ in examples))
        return self._with(self._learned, wanted)

    def at_theta(self, theta: Mapping[str, Sequence[float]]) -> Self:
        """The same networks with this theta, two numbers for each modality.

        Raises
        ------
        UsageError
            If the networks do not know a modality, theta is not two numbers, lies far outside
            the training scans', or the encoders were adapted to a site.
        """
        if self._site is not None:
            raise UsageError(
                f"the model is adapted to site {self._site}: give numbers to the model that it "
                "was adapted from, then adapt that"
            )
        found = {m: checked_theta(self._learned.known, m, given) for m, given in theta.items()}
        wanted: dict[str, tuple[tuple[float, float], tuple[str, ...]]] = {
            modality: (numbers, ()) for modality, numbers in found.items()
        }
        return self._with(self._learned, wanted)

    def _with(
        self,
        learned: Learned,
        wanted: Mapping[str, tuple[tuple[float, float], tuple[str, ...]]],
    ) -> Self:
        made = type(self)(learned, self._preset, wanted, self._site)
        made._files = dict(self._files)
        made.place_on(self._device, self._threads)
        return made

    def theta_of(self, volume: Volume) -> tuple[float, float]:
        """The two numbers that describe the contrast of a scan.

        Raises
        ------
        ScanError
            If the mask is empty, or the brain constant or not finite.
        """
        return theta_of_volume(self._learned, volume, self._resolution)

    def harmonize(self, volume: Volume, *, seed: int) -> Harmonized:
        """Make `volume` look like the scans that were given to `towards`; no noise is drawn.

        Raises
        ------
        ScanError
            If `towards` was not called or knows no scan of this modality, the brain is unusable,
            or it cannot be a brain of this modality in this orientation.
        """
        torch.set_num_threads(self._threads)
        self._known(volume)
        if volume.modality not in self._wanted:
            raise ScanError(
                f"{volume.name or 'scan'}: the {self.name} model has no example of how "
                f"{volume.modality} scans should look; give a site or a scan with --reference"
            )
        wanted, names = self._wanted[volume.modality]
        case = self._case(volume, wanted)
        own, other = case.drawn
        change = change_between((own, other), case.image, case.mask, self._resolution)
        details = {
            "theta": [round(v, 4) for v in case.theta],
            "theta_wanted": [round(v, 4) for v in wanted],
            "examples": list(names),
            "drawing_error": round(case.error, 4),
            "held_out_drawing_error": round(self._learned.known[volume.modality].error, 4),
            "fusion": "voxel median" if self._learned.fusion is None else "network",
            "lost_contrast": round(change.lost, 4),
            "guided_radius_voxels": change.radius,
            "mean_absolute_change": round(change.mean, 4),
            "share_at_bound": round(change.at_bound, 4),
        }
        brain = np.asarray(volume.mask, dtype=bool)
        data = case.grid.add_change(volume.data, brain, change.values)
        doubts = self._doubts(volume.site, change.at_bound)
        return Harmonized(data, details, (*case.warnings, *doubts))

    def _doubts(self, site: str, at_bound: float) -> list[str]:
        """Sentences on a scan of another site than adapted to, and on a change that was held."""
        doubts = []
        if self._site not in (None, site):
            doubts.append(
                f"The model's encoders were adapted to site {self._site}; this scan is of "
                f"{site}. Use the model that was adapted from."
            )
        doubts += bound_warnings(at_bound)
        return doubts

    @property
    def _resolution(self) -> float:
        return preset_named(self.name, self.presets_by_name, self._preset).resolution

    def _known(self, volume: Volume) -> Known:
        known = self._learned.known
        if volume.modality not in known:
            raise ScanError(
                f"{volume.name or 'scan'}: the {self.name} model was trained on "
                f"{', '.join(sorted(known))} only; train it on {volume.modality} too"
            )
        return known[volume.modality]

    def _case(self, volume: Volume, *wanted: tuple[float, float]) -> Case:
        return Case.of(self._learned, volume, self._resolution, *wanted)

    def fine_tuned(
        self, volumes: Sequence[Volume], *, seed: int, training: Training | None = None
    ) -> Self:
        """The last layers of both encoders trained on the paired scans of a new site alone.

        Paper, 2.4. The decoder stays, so thetas from `towards` keep their meaning. With one
        subject its own scans are the held-out ones too, which cannot show overfitting.

        Raises
        ------
        ScanError
            If no session has two modalities that the networks know, the volumes are of several
            sites, or the encoders were adapted before.
        """
        training = replace(training or Training(), preset=self._preset)
        torch.set_num_threads(training.threads)
        usable = [i for i in range(len(volumes)) if volumes[i].modality in self._learned.known]
        chosen = Chosen(volumes, usable)
        sites = sorted({volume.site for volume in chosen})
        if len(sites) != 1 or self._site is not None:
            raise ScanError(
                f"{self.name} is adapted once, to scans of one site, of modalities that it knows "
                f"({', '.join(sorted(self._learned.known))})"
            )
        learned = adapt_learned(
            self._learned, chosen, preset_named(self.name, self.presets_by_name, self._preset),
            seed=seed, training=training, same_slice=self.same_slice, tones=self.tones,
        )  # fmt: skip
        made = self._with(learned, self._wanted)
        made._site = sites[0]
        made._files = {
            "curves.csv": curves_csv(learned.runs),
            "training.png": training_png(learned.runs),
        }
        return made

    def files(self) -> Mapping[str, bytes]:
        """Training curves, table and picture of theta; empty after loading."""
        return dict(self._files)

    def scores(self) -> Mapping[str, Any]:
        """Held-out scores and facts of the training."""
        return dict(self._learned.scores)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Weights, what is known of each modality, and the wanted thetas."""
        thetas = {f"{m}/wanted": np.array(theta) for m, (theta, _) in self._wanted.items()}
        return {**self._learned.arrays(), **thetas}

    def params(self) -> dict[str, Any]:
        """Preset, what was learned, and the names of the examples."""
        examples = {modality: list(names) for modality, (_, names) in self._wanted.items()}
        return {
            "preset": self._preset,
            "examples": examples,
            "site": self._site,
            **self._learned.params(),
        }

    @classmethod
    def from_state(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Self:
        """Rebuild from `arrays` and `params`; ScanError if they do not fit together."""
        wanted = {}
        for modality, names in params["examples"].items():
            one, two = (float(v) for v in arrays[f"{modality}/wanted"])
            wanted[str(modality)] = ((one, two), tuple(str(name) for name in names))
        site = params["site"]
        learned = Learned.from_state(arrays, params)
        return cls(learned, str(params["preset"]), wanted, None if site is None else str(site))
