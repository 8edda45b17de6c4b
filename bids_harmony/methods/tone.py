"""A scan's tone: one increasing curve that takes its intensities to the reference domain's.

The first step of the flow methods. Quantiles are mapped to the reference domain's mean quantiles,
which undoes every increasing map, then a small network corrects what the scan's own tissue
fractions did to that mapping. Neither can change the order of intensities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bids_harmony.errors import ScanError
from bids_harmony.imaging.quantiles import merge_ties
from bids_harmony.imaging.tone import ToneCurve
from bids_harmony.networks.tone import KNOTS, TOP, ToneNetwork, joint_histogram
from bids_harmony.training.tone import Quantiles, mean_quantiles, train_tone

Brain = tuple[Tensor, Tensor]  # image and brain mask, (X, Y, Z)


@dataclass(frozen=True)
class Tone:
    """What a method knows of the reference domain's tone.

    Attributes
    ----------
    quantiles
        Mean quantiles of the reference domain.
    network
        Corrects the mapping to them.
    """

    quantiles: Quantiles
    network: ToneNetwork

    def curve(self, image: Tensor, mask: Tensor) -> ToneCurve:
        """The curve of one brain.

        Parameters
        ----------
        image, mask
            Shape (X, Y, Z), model's grid, the scan's own scale.

        Raises
        ------
        ScanError
            If the brain is constant.
        """
        values = image[mask]
        if float(values.max() - values.min()) < 1e-5:
            raise ScanError("all brain voxels have one value; check image and mask")
        own = self.quantiles.map_of(values)
        mapped = torch.zeros_like(image)
        mapped[mask] = self.quantiles.apply(values, own)
        with torch.no_grad():
            correction = self.network(joint_histogram(mapped, mask)[None])[0].double().numpy()
        targets = self.quantiles.values.double().numpy()
        knots = np.linspace(0, TOP, KNOTS)
        y = targets + np.interp(targets, knots, correction)
        x, y = merge_ties(own.double().numpy(), np.maximum.accumulate(np.maximum(y, 0)))
        edge = max(len(x) // 20, 1)
        slopes = [
            (y[edge] - y[0]) / (x[edge] - x[0]),
            (y[-1] - y[-1 - edge]) / (x[-1] - x[-1 - edge]),
        ]
        return ToneCurve(tuple(x.tolist()), tuple(y.tolist()), float(slopes[0]), float(slopes[1]))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything learned, as arrays."""
        return {"quantiles": self.quantiles.values.numpy(), **state_arrays(self.network, "tone")}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Tone:
        """Inverse of `arrays`."""
        network = ToneNetwork(hidden=len(arrays["tone/layers.1.bias"]))
        load_arrays(network, arrays, "tone")
        return cls(Quantiles(torch.from_numpy(np.array(arrays["quantiles"]))), network)


def fit_tone_model(
    brains: Sequence[Brain],
    held_out: Sequence[Brain],
    *,
    samples: int,
    epochs: int,
    seed: int,
    minutes: float | None,
) -> tuple[Tone, dict[str, float]]:
    """Learn the tone of the reference domain; tell the held-out error before and after."""
    quantiles = mean_quantiles([*brains, *held_out])
    network, scores = train_tone(
        brains, held_out, quantiles, samples=samples, epochs=epochs, seed=seed, minutes=minutes
    )
    return Tone(quantiles, network), scores


def state_arrays(network: torch.nn.Module, name: str) -> dict[str, NDArray[Any]]:
    """Weights and buffers as arrays with keys ``<name>/<key>``."""
    return {f"{name}/{k}": v.detach().cpu().numpy() for k, v in network.state_dict().items()}


def load_arrays(network: torch.nn.Module, arrays: Mapping[str, NDArray[Any]], name: str) -> None:
    """Inverse of `state_arrays`; leaves the network in eval mode.

    Raises
    ------
    ScanError
        If the arrays are not those of this network.
    """
    prefix = f"{name}/"
    state = {
        key.removeprefix(prefix): torch.from_numpy(np.array(value))
        for key, value in arrays.items()
        if key.startswith(prefix)
    }
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ScanError(f"the arrays are not those of the {name} network") from error
    network.eval()
