"""The loop of a training, with Lightning."""

from __future__ import annotations

import logging
import math
import pickle
import signal
import warnings
from collections.abc import Callable
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
from bids_harmony.training.plan import Adversary, Plan, Trained

LOG = logging.getLogger("bids_harmony")
_CHECKPOINT = "last"
_REJECTED_LIMIT = 20  # in a row: the training has diverged and does not come back


def run(module: TrainingModule, device: str, folder: Path | None) -> Trained:
    """Train a module's network in place; arguments and errors as those of `train_network`."""
    plan, network = module.plan, module.network
    stop = EarlyStopping("held_out", patience=plan.patience, check_finite=False)
    timer = Timer(timedelta(minutes=plan.minutes) if plan.minutes else None, interval="step")
    module.timer = timer
    trainer = _trainer(plan, device, folder, [stop, timer, module.keeper])
    _run(trainer, module, _checkpoint(folder, module) if folder else None)
    network.cpu().eval()
    if not module.keeper.state or not math.isfinite(module.keeper.score):
        raise HarmonyError(
            f"training of the {module.name} ended without a state whose held-out score is finite; "
            "give it more time (--max-time), or check the training scans for artefacts"
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


def _checkpoint(folder: Path, module: TrainingModule) -> Path | None:
    """The state that a killed training left; none, and a warning, if it is of other networks."""
    path = folder / f"{_CHECKPOINT}.ckpt"
    if not path.is_file():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError):
        found = {}
    wanted = {name: value.shape for name, value in module.state_dict().items()}
    if {name: value.shape for name, value in found.items()} == wanted:
        return path
    LOG.warning(
        "training %s: %s is broken or of another version's networks; the training starts anew",
        module.name,
        path,
    )
    return None


def _run(trainer: lightning.Trainer, module: TrainingModule, checkpoint: Path | None) -> None:
    """Train, from the checkpoint if there is one; Ctrl-C stays what it is elsewhere."""
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():  # such as: the folder of checkpoints is not empty
            warnings.filterwarnings("ignore", module=r"lightning\.")
            trainer.fit(module, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    except SystemExit as error:  # Lightning's answer to an interrupt, which it then ignores
        signal.signal(signal.SIGINT, interrupt)
        raise KeyboardInterrupt from error


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


class TrainingModule(lightning.LightningModule):
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
        self.plan, self.name, self._seed = plan, name, seed
        self.curve: list[dict[str, float]] = []
        self.taken = self.rejected = 0
        self._in_a_row: dict[int, int] = {}
        self._sum, self._count = 0.0, 0

    def train_dataloader(self) -> DataLoader[Any]:
        first = self.current_epoch * self.plan.every
        count = min(self.plan.every, self.plan.steps - first)
        turns = 1 + (self._adversary.steps if self._adversary else 0)
        return DataLoader(_Draws(self._draw, self._seed, first, count, turns), batch_size=None)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        against = list(self._adversary.part.parameters()) if self._adversary else []
        apart = {id(parameter) for parameter in against}
        own = [p for p in self.network.parameters() if id(p) not in apart]
        groups = [(own, self.plan.rate)]
        if self._adversary:
            groups.append((against, self._adversary.rate))
        decay = self.plan.weight_decay
        return [
            torch.optim.Adam(parameters, rate, betas=(0.9, 0.99), weight_decay=decay)
            for parameters, rate in groups
        ]

    def training_step(self, batches: list[Any], batch_idx: int) -> None:
        step = self.current_epoch * self.plan.every + batch_idx
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
        norm = nn.utils.clip_grad_norm_(parameters, self.plan.clip)
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
        part = step / max(self.plan.steps, 1)
        if self.plan.minutes:  # a limited training ends with small steps too
            part = max(part, self.timer.time_elapsed() / (60 * self.plan.minutes))
        fall = 0.5 + 0.5 * math.cos(math.pi * min(part, 1.0))
        return (highest or self.plan.rate) * warm * max(fall, 1e-3)

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
            self.name, self.taken, self.plan.steps, self.curve[-1]["loss"], score,
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
