"""How sure a user's segmentation network is of harmonized slices: the entropy of its classes.

Beizaee et al. end the adaptation by the entropy of the task's network. It comes as a TorchScript
file: reading one builds no Python objects but tensors and the network's own types, where a
``torch.export`` file falls back to full unpickling, which runs what the file says.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bids_harmony.errors import MissingInputError, UsageError
from bids_harmony.training.slices import on_canvas

#: Networks that halve their input up to five times can be used as they are.
_DIVISOR = 32
_CHUNK = 4  # slices at once
_CURE = "give a TorchScript file (torch.jit.script or torch.jit.trace, then save) that takes"
_CURE += " (N, 1, H, W) and returns class scores (N, C, H, W) before softmax"
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError)


@dataclass(frozen=True)
class Segmentation:
    """A segmentation network, frozen, on the CPU: few slices are looked at, seldom.

    Attributes
    ----------
    name
        Of its file.
    sha256
        Of the file, the first 12 hexadecimal digits.
    network
        Takes float32 slices (N, 1, H, W), gives class scores (N, C, H, W) before softmax.
    """

    name: str
    sha256: str
    network: Any

    @property
    def words(self) -> dict[str, str]:
        """What the records say of it."""
        return {"segmentation": self.name, "segmentation_sha256": self.sha256}

    def entropy(self, images: Tensor, masks: Tensor) -> float:
        """Mean normalised entropy over the brain voxels of some slices.

        Parameters
        ----------
        images
            Shape (N, 1, H, W), on the reference domain's scale, 0 outside the masks.
        masks
            Same shape, 1 in the brain.

        Returns
        -------
        entropy
            0 (sure) to 1 (all classes alike); NaN where scores in the brain are not finite.

        Raises
        ------
        UsageError
            If the network fails or returns another shape.
        """
        side = -(-max(images.shape[2:]) // _DIVISOR) * _DIVISOR
        total, voxels = 0.0, 0
        for chunk, inside in zip(images.split(_CHUNK), masks.split(_CHUNK), strict=True):
            brain = on_canvas(inside.cpu(), side, side)[:, 0] > 0
            found = normalised_entropy(self.scores(on_canvas(chunk.cpu().float(), side, side)))
            total += float(found[brain].sum())
            voxels += int(brain.sum())
        return total / voxels if voxels else math.nan

    def scores(self, images: Tensor) -> Tensor:
        """Class scores of some slices on the network's canvas, repeatable whatever it draws.

        Raises
        ------
        UsageError
            If the network fails or returns another shape.
        """
        count, _, height, width = images.shape
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                with torch.jit.optimized_execution(False):  # the same sums at every call
                    scores = self.network(images)
            except _FAILURES as error:
                raise UsageError(
                    f"{self.name}: the segmentation network fails on slices of shape "
                    f"{tuple(images.shape)} ({_last_line(error)}); {_CURE}"
                ) from error
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
            raise UsageError(
                f"{self.name}: the segmentation network returns {kind}, not a tensor of scores; "
                f"{_CURE}"
            )
        wanted = scores.dim() == 4 and (scores.shape[0], *scores.shape[2:])
        if wanted != (count, height, width) or scores.shape[1] < 2:
            raise UsageError(
                f"{self.name}: the segmentation network returns {tuple(scores.shape)} for slices "
                f"of shape {tuple(images.shape)}; {_CURE}, with C >= 2"
            )
        return scores


def normalised_entropy(scores: Tensor) -> Tensor:
    """Entropy of the softmax over classes, in bits, divided by its largest value, log2 C.

    Parameters
    ----------
    scores
        Before softmax, shape (N, C, H, W), C >= 2.

    Returns
    -------
    entropy
        Shape (N, H, W), float64, 0 to 1; NaN where a score is not finite.
    """
    logs = torch.log_softmax(scores.double(), dim=1)
    return -(logs.exp() * logs).sum(1) / math.log(scores.shape[1])


def read_segmentation(path: Path) -> Segmentation:
    """Read a segmentation network and see that it does what is asked of it.

    Parameters
    ----------
    path
        TorchScript file.

    Raises
    ------
    MissingInputError
        If the file cannot be read.
    UsageError
        If it is no TorchScript, or the network fails, returns another shape, scores that are not
        finite, or probabilities.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MissingInputError(
            f"{path}: the segmentation network cannot be read ({error.strerror}); name its file"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(io.BytesIO(content), map_location="cpu").eval()
    except _FAILURES as error:
        raise UsageError(f"{path}: no TorchScript network can be read from it; {_CURE}") from error
    found = Segmentation(path.name, hashlib.sha256(content).hexdigest()[:12], network)
    for count, side in ((1, 96), (3, 128)):
        _probe(Segmentation(str(path), found.sha256, network), count, side)
    return found


def _probe(network: Segmentation, count: int, side: int) -> None:
    """Let the network segment random discs."""
    rows = torch.linspace(-1, 1, side)
    disc = (rows[:, None] ** 2 + rows**2 < 0.6).float()
    noise = torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(0))
    scores = network.scores(disc * (0.3 + 0.6 * noise))
    if not bool(torch.isfinite(scores).all()):
        raise UsageError(
            f"{network.name}: the segmentation network returns scores that are not finite; {_CURE}"
        )
    whole = bool(((scores.sum(1) - 1).abs() < 1e-3).all())
    if whole and bool((scores >= 0).all()):
        raise UsageError(
            f"{network.name}: the segmentation network returns probabilities; leave its last "
            f"softmax out and {_CURE}"
        )


def _last_line(error: Exception) -> str:
    """What went wrong, without TorchScript's listing of the code around it."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
