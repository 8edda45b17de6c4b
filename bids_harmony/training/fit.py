"""Train one network: steps drawn at random, held-out score, resume, best state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bids_harmony.training.plan import Adversary, Plan, Trained


def train_network(
    network: nn.Module,
    *,
    name: str,
    draw: Callable[[torch.Generator], Any],
    loss: Callable[[Any, torch.Generator], Tensor],
    held_out: Callable[[], float],
    plan: Plan,
    seed: int,
    device: str,
    folder: Path | None,
    adversary: Adversary | None = None,
) -> Trained:
    """Train a network in place; it ends in the state with the lowest held-out score.

    Parameters
    ----------
    network
        Trained in place and left in eval mode on the CPU.
    name
        Of the network, for the log.
    draw
        Makes a batch from a generator (CPU), so that step k sees the same batch in every run.
    loss
        Loss of a batch; the generator is on the network's device.
    held_out
        Score of the present state, lower is better, called in eval mode without gradients.
    plan
        Length and rates.
    seed
        Of all draws.
    device
        ``cpu``, ``cuda`` or ``cuda:N``. Training uses one GPU.
    folder
        For checkpoints: a training that was killed goes on from the last one. None for none.
    adversary
        A discriminator in the network, if it has one.

    Raises
    ------
    HarmonyError
        If the loss is no longer finite, or no held-out score ever was.
    """
    # Lightning takes longer to import than torch, and who harmonizes needs none of it
    from bids_harmony.training.loop import TrainingModule, run

    module = TrainingModule(network, name, draw, loss, held_out, plan, seed, adversary)
    return run(module, device, folder)


def weights_key(network: nn.Module) -> str:
    """Checksum of a network's weights: names the folder of a training that builds on them."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
