"""How long CALAMITI is trained, and what it has learned, with its form in a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bids_harmony.methods.calamiti_admission import Known
from bids_harmony.methods.calamiti_files import ThetaRow
from bids_harmony.methods.tone import arrays_below, load_arrays, state_arrays
from bids_harmony.networks.calamiti import CalamitiNetworks, FusionNetwork
from bids_harmony.training.contrasts import Session
from bids_harmony.training.plan import Plan, Trained


@dataclass(frozen=True)
class Preset:
    """Sizes and lengths of a training.

    Attributes
    ----------
    resolution
        Voxel size of the model's grid in mm.
    batch
        Pairs of a step.
    networks
        Arguments of `CalamitiNetworks`.
    plan, fusion_plan, adaptation_plan
        How long to train the slice networks, the fusion, and the encoders' last layers on a new
        site.
    start
        Steps in which the weight of the joint classes would fall to 0 (`class_weight`).
    fusion_width
        Of `FusionNetwork`.
    """

    resolution: float
    batch: int
    networks: Mapping[str, Any]
    plan: Plan
    fusion_plan: Plan
    adaptation_plan: Plan
    start: int
    fusion_width: int = 8


@dataclass(frozen=True)
class Learned:
    """What a training gave.

    Attributes
    ----------
    networks
        In eval mode, on the CPU.
    fusion
        None: the voxel median is taken.
    side
        Of the canvas.
    known
        By modality.
    thetas
        Of every image of the training.
    runs
        How the trainings went, by network.
    scores
        JSON-serialisable.
    """

    networks: CalamitiNetworks
    fusion: FusionNetwork | None
    side: int
    known: Mapping[str, Known]
    thetas: tuple[ThetaRow, ...]
    runs: Mapping[str, Trained]
    scores: Mapping[str, Any]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Weights, and what is known of each modality, as arrays."""
        found = state_arrays(self.networks, "networks")
        if self.fusion is not None:
            found |= state_arrays(self.fusion, "fusion")
        for modality, known in self.known.items():
            found |= {f"{modality}/{key}": value for key, value in known.arrays().items()}
        return found

    def params(self) -> dict[str, Any]:
        """JSON-serialisable form of all but the arrays, the table of theta and the curves."""
        return {
            "networks": self.networks.config(),
            "fusion_width": None if self.fusion is None else self.fusion.width,
            "side": self.side,
            "modalities": sorted(self.known),
            "scores": dict(self.scores),
        }

    @classmethod
    def from_state(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Learned:
        """Rebuild from `arrays` and `params`; ScanError if they do not fit together."""
        networks = CalamitiNetworks.from_config(params["networks"])
        load_arrays(networks, arrays, "networks")
        fusion = None
        if params["fusion_width"] is not None:
            fusion = FusionNetwork(int(params["fusion_width"])).requires_grad_(False)
            load_arrays(fusion, arrays, "fusion")
        known = {}
        for modality in params["modalities"]:
            known[str(modality)] = Known.from_arrays(arrays_below(arrays, modality))
        side, scores = int(params["side"]), params["scores"]
        return cls(networks.requires_grad_(False), fusion, side, known, (), {}, scores)


def spread(sessions: Sequence[Session], most: int) -> list[Session]:
    """At most so many of the sessions, evenly spaced."""
    chosen = np.linspace(0, len(sessions) - 1, min(most, len(sessions)))
    return [sessions[round(i)] for i in chosen]
