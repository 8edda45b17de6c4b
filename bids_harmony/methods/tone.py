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
from scipy import ndimage
from torch import Tensor

from bids_harmony.errors import ScanError
from bids_harmony.imaging.quantiles import Float64Array, merge_ties
from bids_harmony.imaging.tone import ToneCurve, to_zero
from bids_harmony.networks.tone import KNOTS, TOP, ToneNetwork, joint_histogram
from bids_harmony.training.tone import Quantiles

_RIM = 4.0  # mm
_LEAST_CORE = 0.2
_LEAST_LEVELS = 8
_FOLDS = 4
_END_SLOPE = (0.5, 2.0)  # least and most, relative to the curve's mean slope

Brain = tuple[Tensor, Tensor]  # image and brain mask, (X, Y, Z)
Placed = tuple[Brain, Sequence[float]]  # with its voxel size in mm


@dataclass(frozen=True)
class Tone:
    """What a method knows of the reference domain's tone.

    Attributes
    ----------
    quantiles
        Mean quantiles of the reference domain.
    network
        Corrects the mapping to them.
    doubt
        Root mean square change that the curve makes to brains of the reference domain that it
        was not learned from, which need none: how far the curve can be trusted.
    share
        Of the network's correction that is applied: the one that changes such brains the least.
    """

    quantiles: Quantiles
    network: ToneNetwork
    doubt: float = 0.0
    share: float = 1.0

    def curve(
        self, image: Tensor, mask: Tensor, spacing: Sequence[float], *, whole: bool = False
    ) -> ToneCurve:
        """The curve of one brain, as far as it can be trusted (`trusted`) unless `whole`.

        Parameters
        ----------
        image, mask
            Shape (X, Y, Z), model's grid, the scan's own scale.
        spacing
            Voxel size in mm.

        Raises
        ------
        ScanError
            If the brain is constant, or nearly so.
        """
        inner = core(mask, spacing)
        values = image[inner]
        if float(values.max() - values.min()) < 1e-5:
            raise ScanError("all brain voxels have one value; check image and mask")
        plain, own = self.quantiles.own(values), self.quantiles.map_of(values)
        matched = torch.zeros_like(image)
        matched[inner] = self.quantiles.apply(values, own)
        with torch.no_grad():
            correction = self.network(joint_histogram(matched, inner)[None])[0].double().numpy()
        targets = self.quantiles.values.double().numpy()
        knots = np.linspace(0, TOP, KNOTS)
        y = targets + self.share * np.interp(targets, knots, correction)
        y = np.maximum.accumulate(np.maximum(y, 0))
        found = _curve(*merge_ties(plain.double().numpy(), y))
        found = to_zero(found, found.x[0])
        return found if whole else self.trusted(found, image[mask])

    def matching(self, values: Tensor) -> ToneCurve:
        """The curve from a brain's quantiles to the reference domain's, uncorrected.

        Parameters
        ----------
        values
            Of the brain, any order, (N,).
        """
        x = self.quantiles.own(values).double().numpy()
        return _curve(*merge_ties(x, self.quantiles.values.double().numpy()))

    def trusted(self, curve: ToneCurve, values: Tensor) -> ToneCurve:
        """A curve that goes only part of the way where it asks for little.

        With d its root mean square change of a brain's `values`, (N,), the share
        ``1 - (doubt / d)**2`` of it is left as in Stein's estimator, times 4/3, within 0..1: a
        scan that is like the reference domain already stays as it is, and a curve that asks for
        twice the doubt is believed.
        """
        asked = float(np.mean((curve(values.numpy()) - values.numpy()) ** 2))
        share = float(np.clip(4 / 3 * (1 - self.doubt**2 / max(asked, 1e-12)), 0, 1))
        x, y = np.array(curve.x), np.array(curve.y)
        return ToneCurve(
            curve.x,
            tuple(np.maximum(x + share * (y - x), 0).tolist()),
            1 + share * (curve.start_slope - 1),
            1 + share * (curve.end_slope - 1),
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything learned, as arrays."""
        return {
            "even_quantiles": self.quantiles.values.numpy(),
            "doubt": np.array([self.doubt, self.share]),
            **state_arrays(self.network, "tone"),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Tone:
        """Inverse of `arrays`."""
        network = ToneNetwork(hidden=len(arrays["tone/layers.0.bias"]))
        load_arrays(network, arrays, "tone")
        quantiles = Quantiles(torch.from_numpy(np.array(arrays["even_quantiles"])))
        doubt, share = (float(v) for v in arrays["doubt"])
        return cls(quantiles, network, doubt, share)


def core(mask: Tensor, spacing: Sequence[float]) -> Tensor:
    """The mask without its outer 4 mm, where masks of different make differ the most.

    At least one voxel on each side. The whole mask if less than a fifth of it would be left.

    Parameters
    ----------
    mask
        Shape (X, Y, Z).
    spacing
        Voxel size in mm.
    """
    reach = [max(1, round(_RIM / size)) for size in spacing]
    steps = np.meshgrid(*(np.arange(-r, r + 1) / r for r in reach), indexing="ij")
    near = np.abs(steps).sum(0) <= 1 + 1e-6
    inner = torch.from_numpy(ndimage.binary_erosion(mask.numpy(), near))
    return inner if inner.sum() > _LEAST_CORE * mask.sum() else mask


def mapped(curve: ToneCurve, image: Tensor, mask: Tensor) -> Tensor:
    """A brain after a curve: >= 0, 0 outside the mask, float32."""
    return torch.from_numpy(np.maximum(curve(image.numpy()), 0)).float() * mask


def _curve(x: Float64Array, y: Float64Array) -> ToneCurve:
    """Through these knots; beyond them with the slope of the outer ones, bounded."""
    if len(x) < _LEAST_LEVELS:
        raise ScanError("nearly all brain voxels have one value; check image and mask")
    edge = max(len(x) // 20, 1)
    outer = (y[edge] - y[0]) / (x[edge] - x[0]), (y[-1] - y[-1 - edge]) / (x[-1] - x[-1 - edge])
    gain = (y[-1] - y[0]) / (x[-1] - x[0])
    start, end = np.clip(outer, _END_SLOPE[0] * gain, _END_SLOPE[1] * gain)
    return ToneCurve(tuple(x.tolist()), tuple(y.tolist()), float(start), float(end))


def state_arrays(network: torch.nn.Module, name: str) -> dict[str, NDArray[Any]]:
    """Weights and buffers as arrays with keys ``<name>/<key>``."""
    return {f"{name}/{k}": v.detach().cpu().numpy() for k, v in network.state_dict().items()}


def arrays_below(arrays: Mapping[str, NDArray[Any]], name: str) -> dict[str, NDArray[Any]]:
    """Arrays with the keys ``<name>/...``, without that."""
    prefix = f"{name}/"
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def load_arrays(network: torch.nn.Module, arrays: Mapping[str, NDArray[Any]], name: str) -> None:
    """Inverse of `state_arrays`; leaves the network in eval mode.

    Raises
    ------
    ScanError
        If the arrays are not those of this network.
    """
    own = arrays_below(arrays, name)
    state = {key: torch.from_numpy(np.array(value)) for key, value in own.items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ScanError(f"the arrays are not those of the {name} network") from error
    network.eval()
