"""Train one network with Lightning: steps drawn at random, held-out score, resume, best state."""

from __future__ import annotations

import hashlib
import logging
import math
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bids_harmony.config import PROGRESS
from bids_harmony.errors import HarmonyError

LOG = logging.getLogger("bids_harmony")
_CHECKPOINT = "last"
_REJECTED_LIMIT = 20  # in a row: the training has diverged and does not come back


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    Attributes
    ----------
    steps
        Most optimizer steps.
    rate
        Learning rate of Adam after the warm-up; it falls to nearly 0 along half a cosine of the
        steps, or of the time where that is limited and runs out first.
    every
        Steps between two looks at the held-out score.
    patience
        Stop after this many looks without a better score.
    clip
        Largest norm of the gradient.
    minutes
        Time limit, of all sittings of a resumed training together; None for none.
    half
        Use bfloat16 for convolutions where the device is fast at it.
    weight_decay
        Of Adam.
    """

    steps: int
    rate: float
    every: int = 100
    patience: int = 6
    clip: float = 1.0
    minutes: float | None = None
    half: bool = True
    weight_decay: float = 0.0

    def with_limit(self, minutes: float | None) -> Plan:
        """The same plan with a time limit; None leaves its own."""
        return self if minutes is None else replace(self, minutes=minutes)


@dataclass(frozen=True)
class Adversary:
    """A part of the network that is trained against the rest of it, in turns.

    Attributes
    ----------
    part
        Its parameters are moved by `loss` alone, the others by the training's loss alone.
    loss
        Of a batch; the generator is on the network's device.
    steps
        How many it takes before each step of the rest, every one with a batch of its own.
    rate
        Learning rate of its Adam; it falls as the plan's does.
    """

    part: nn.Module
    loss: Callable[[Any, torch.Generator], Tensor]
    steps: int = 1
    rate: float = 1e-4


@dataclass(frozen=True)
class Trained:
    """How a training went.

    Attributes
    ----------
    curve
        One row per look at the held-out score: step, training loss, held-out score.
    steps, rejected
        Steps taken, and steps left out because they were not finite.
    best
        Held-out score of the state that was kept.
    stop_reason
        ``all steps``, ``held-out score no longer improves`` or ``time limit``.
    """

    curve: tuple[dict[str, float], ...]
    steps: int
    rejected: int
    best: float
    stop_reason: str


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
    module = _Module(network, name, draw, loss, held_out, plan, seed, adversary)
    stop = EarlyStopping("held_out", patience=plan.patience, check_finite=False)
    timer = Timer(timedelta(minutes=plan.minutes) if plan.minutes else None, interval="step")
    module.timer = timer
    trainer = _trainer(plan, device, folder, [stop, timer, module.keeper])
    last = folder / f"{_CHECKPOINT}.ckpt" if folder else None
    _run(trainer, module, last if last is not None and last.is_file() else None)
    network.cpu().eval()
    if not module.keeper.state or not math.isfinite(module.keeper.score):
        raise HarmonyError(
            f"training of the {name} ended without a state whose held-out score is finite; give "
            "it more time (--max-time), or check the training scans for artefacts"
        )
    module.keeper.restore(network)
    remaining = timer.time_remaining()
    reason = "all steps"
    if stop.wait_count >= stop.patience:
        reason = "held-out score no longer improves"
    elif remaining is not None and remaining <= 0:
        reason = "time limit"
    return Trained(tuple(module.curve), module.taken, module.rejected, module.keeper.score, reason)


def _trainer(
    plan: Plan, device: str, folder: Path | None, callbacks: list[lightning.Callback]
) -> lightning.Trainer:
    for name in ("lightning.pytorch", "lightning.fabric"):  # its notes are not for our users
        logging.getLogger(name).setLevel(logging.WARNING)
    if folder:  # the newest state, whatever its score: `_Keeper` has the best one
        callbacks.append(
            ModelCheckpoint(dirpath=folder, filename=_CHECKPOINT, enable_version_counter=False)
        )
    return lightning.Trainer(
        accelerator="gpu" if device.startswith("cuda") else "cpu",
        devices=_devices(device),
        max_epochs=math.ceil(plan.steps / plan.every),
        callbacks=callbacks,
        plugins=[LightningEnvironment()],  # one process, also where Slurm granted several tasks
        reload_dataloaders_every_n_epochs=1,
        enable_checkpointing=folder is not None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        precision="bf16-mixed" if plan.half and _fast_half(device) else "32-true",
    )


def _run(trainer: lightning.Trainer, module: _Module, checkpoint: Path | None) -> None:
    """Train, from the checkpoint if there is one; Ctrl-C stays what it is elsewhere."""
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():  # such as: the folder of checkpoints is not empty
            warnings.filterwarnings("ignore", module=r"lightning\.")
            trainer.fit(module, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    except SystemExit as error:  # Lightning's answer to an interrupt, which it then ignores
        signal.signal(signal.SIGINT, interrupt)
        raise KeyboardInterrupt from error


def weights_key(network: nn.Module) -> str:
    """Checksum of a network's weights: names the folder of a training that builds on them."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _devices(device: str) -> int | list[int]:
    """Lightning's name for a device: the number of a GPU, or one CPU process."""
    kind, _, number = device.partition(":")
    return [int(number or 0)] if kind == "cuda" else 1


def _fast_half(device: str) -> bool:
    """Whether the device multiplies bfloat16 by itself; imitated, it takes twice as long."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class _Draws(Dataset[Any]):
    """The batches of one epoch; each has its own generator, so that any of them can be redrawn."""

    def __init__(
        self, draw: Callable[[torch.Generator], Any], seed: int, first: int, count: int, turns: int
    ) -> None:
        self._draw, self._seed, self._first, self._count = draw, seed, first, count
        self._turns = turns

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> list[Any]:
        """A batch for every turn of a step."""
        generator = _generator(self._seed, self._first + index)
        return [self._draw(generator) for _ in range(self._turns)]


def _generator(seed: int, step: int, device: Any = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)


class _Keeper(lightning.Callback):
    """Keeps the weights with the lowest held-out score, also across sittings."""

    def __init__(self) -> None:
        self.score, self.state = math.inf, {}  # type: tuple[float, dict[str, Tensor]]

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """A training that had stopped by itself does not go on when its command is repeated."""
        stops = trainer.early_stopping_callbacks
        trainer.should_stop |= any(stop.wait_count >= stop.patience for stop in stops)

    def look(self, network: nn.Module, score: float) -> None:
        if score < self.score or not self.state:
            self.score = score
            self.state = {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}

    def restore(self, network: nn.Module) -> None:
        if self.state:
            network.load_state_dict(self.state)

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "state": self.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score, self.state = state_dict["score"], state_dict["state"]


class _Module(lightning.LightningModule):
    """A network with its loss: manual steps, so that one that is not finite can be left out."""

    def __init__(
        self,
        network: nn.Module,
        name: str,
        draw: Callable[[torch.Generator], Any],
        loss: Callable[[Any, torch.Generator], Tensor],
        held_out: Callable[[], float],
        plan: Plan,
        seed: int,
        adversary: Adversary | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network, self._adversary = network, adversary
        self.timer = Timer()
        self.keeper = _Keeper()
        self._draw, self._loss, self._held_out = draw, loss, held_out
        self._plan, self._seed, self._name = plan, seed, name
        self.curve: list[dict[str, float]] = []
        self.taken = self.rejected = 0
        self._in_a_row: dict[int, int] = {}
        self._sum, self._count = 0.0, 0

    def train_dataloader(self) -> DataLoader[Any]:
        first = self.current_epoch * self._plan.every
        count = min(self._plan.every, self._plan.steps - first)
        turns = 1 + (self._adversary.steps if self._adversary else 0)
        return DataLoader(_Draws(self._draw, self._seed, first, count, turns), batch_size=None)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        against = list(self._adversary.part.parameters()) if self._adversary else []
        apart = {id(parameter) for parameter in against}
        own = [p for p in self.network.parameters() if id(p) not in apart]
        groups = [(own, self._plan.rate)]
        if self._adversary:
            groups.append((against, self._adversary.rate))
        decay = self._plan.weight_decay
        return [
            torch.optim.Adam(parameters, rate, betas=(0.9, 0.99), weight_decay=decay)
            for parameters, rate in groups
        ]

    def training_step(self, batches: list[Any], batch_idx: int) -> None:
        step = self.current_epoch * self._plan.every + batch_idx
        found: Any = self.optimizers()
        own, *others = found if isinstance(found, list) else [found]
        source = _generator(self._seed + 1, step, self.device)
        torch.manual_seed((self._seed + 2) * 1_000_003 + step)  # dropout, also after a resume
        if self._adversary:
            rate = self._rate(step, self._adversary.rate)
            for batch in batches[:-1]:
                self._move(others[0], rate, partial(self._adversary.loss, batch, source))
            self._adversary.part.requires_grad_(False)
        loss = self._move(own, self._rate(step), partial(self._loss, batches[-1], source))
        if self._adversary:
            self._adversary.part.requires_grad_(True)
        if loss is not None:
            self.taken += 1
            self._sum, self._count = self._sum + loss, self._count + 1

    def _move(self, optimizer: Any, rate: float, loss_of: Callable[[], Tensor]) -> float | None:
        """One step of an optimizer; its loss, or None if it was not finite and left out."""
        before = [buffer.clone() for buffer in self.network.buffers()]
        parameters = []
        for group in optimizer.param_groups:
            group["lr"] = rate
            parameters += group["params"]
        loss = loss_of()
        optimizer.zero_grad()
        self.manual_backward(loss)
        norm = nn.utils.clip_grad_norm_(parameters, self._plan.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            for buffer, old in zip(self.network.buffers(), before, strict=True):
                buffer.copy_(old)  # running statistics, which the forward pass has changed
            self._reject(optimizer)
            return None
        self._in_a_row[id(optimizer)] = 0
        optimizer.step()
        return float(loss.detach())

    def _reject(self, optimizer: Any) -> None:
        """Count a step that was not finite; each optimizer's come in a row of their own."""
        self.rejected += 1
        count = self._in_a_row[id(optimizer)] = self._in_a_row.get(id(optimizer), 0) + 1
        if count >= _REJECTED_LIMIT:
            raise HarmonyError(
                f"training: {count} steps in a row were not finite; check the training "
                "scans for artefacts, or train with another --random-seed"
            )

    def _rate(self, step: int, highest: float | None = None) -> float:
        """Learning rate of a step, of the plan's or another highest rate."""
        warm = min(1.0, (step + 1) / 50)
        part = step / max(self._plan.steps, 1)
        if self._plan.minutes:  # a limited training ends with small steps too
            part = max(part, self.timer.time_elapsed() / (60 * self._plan.minutes))
        fall = 0.5 + 0.5 * math.cos(math.pi * min(part, 1.0))
        return (highest or self._plan.rate) * warm * max(fall, 1e-3)

    def on_train_epoch_end(self) -> None:
        self.network.eval()
        with torch.no_grad():
            score = self._held_out()
        self.network.train()
        score = score if math.isfinite(score) else math.inf
        self.keeper.look(self.network, score)
        self.log("held_out", score)
        self.curve.append({
            "step": float(self.taken), "loss": self._sum / max(self._count, 1), "held_out": score,
        })  # fmt: skip
        LOG.log(
            PROGRESS, "training %s: step %d of %d, loss %.4f, held out %.4f",
            self._name, self.taken, self._plan.steps, self.curve[-1]["loss"], score,
        )  # fmt: skip
        self._sum, self._count = 0.0, 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["progress"] = {
            "curve": self.curve, "taken": self.taken, "rejected": self.rejected,
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress = checkpoint["progress"]
        self.curve, self.taken = list(progress["curve"]), progress["taken"]
        self.rejected = progress["rejected"]
