"""Pictures and tables of a training, for the bundle's folder."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bids_harmony.networks.flow import Flow
from bids_harmony.training.plan import Trained
from bids_harmony.training.slices import canvas_size, on_canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SAMPLES = 4
_TEMPERATURE = 0.7


class Person(Protocol):
    """Whose a scan is."""

    @property
    def site(self) -> str:
        """Label."""

    @property
    def subject(self) -> str:
        """Label."""


def curves_csv(runs: Mapping[str, Trained]) -> bytes:
    """Training loss and held-out score of each network by step."""
    rows = ["network,step,loss,held_out"]
    for name, run in runs.items():
        rows += [
            f"{name},{int(row['step'])},{row['loss']:.6f},{row['held_out']:.6f}"
            for row in run.curve
        ]
    return ("\n".join(rows) + "\n").encode()


def run_facts(run: Trained) -> dict[str, Any]:
    """What a bundle says of a training; no times, so that equal trainings give equal bundles."""
    return {
        "steps": run.steps,
        "rejected_steps": run.rejected,
        "best_held_out": round(run.best, 5),
        "stop_reason": run.stop_reason,
    }


def site_facts(learn: Sequence[Person], apart: Sequence[Person]) -> dict[str, Any]:
    """Training scans by site, and how many subjects were held out."""
    return {
        "sites": {
            site: sum(person.site == site for person in learn)
            for site in sorted({person.site for person in learn})
        },
        "held_out_subjects": len({person.subject for person in apart}),
    }


def training_png(runs: Mapping[str, Trained]) -> bytes:
    """The same as a picture."""
    figure = figure_of(5 * len(runs), 3)
    axes = figure.subplots(1, len(runs), squeeze=False)[0]
    for axis, (name, run) in zip(axes, runs.items(), strict=True):
        steps = [row["step"] for row in run.curve]
        axis.plot(steps, [row["loss"] for row in run.curve], label="training loss")
        axis.plot(steps, [row["held_out"] for row in run.curve], label="held out")
        axis.set(title=name, xlabel="step")
        axis.legend()
    return png_of(figure)


def samples_png(flow: Flow, brain: tuple[Tensor, Tensor], axis: int, seed: int) -> bytes:
    """Slices drawn from the flow (at temperature .7) below slices of a training brain."""
    image, _ = brain
    side = canvas_size([tuple(image.shape)], (axis,), flow.divisor)
    count = image.shape[axis]
    chosen = [round(count * (i + 2) / (_SAMPLES + 3)) for i in range(_SAMPLES)]
    real = [on_canvas(image.movedim(axis, 0)[i], side, side) for i in chosen]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        drawn = flow.sample(_SAMPLES, side, side, temperature=_TEMPERATURE, generator=generator)[
            :, 0
        ]
    figure = figure_of(2 * _SAMPLES, 4.4)
    axes = figure.subplots(2, _SAMPLES)
    for row, slices in enumerate((torch.stack(real), drawn)):
        for column, values in enumerate(slices):
            axes[row, column].imshow(
                torch.nan_to_num(values).numpy().T, cmap="gray", vmin=0, vmax=1.1, origin="lower"
            )
            axes[row, column].set_axis_off()
    figure.suptitle("training slices (top), drawn from the flow (bottom)", fontsize=9)
    return png_of(figure)


def brains_png(brains: Mapping[str, NDArray[np.float32]]) -> bytes:
    """The middle slices across all three axes of each brain (R, A, S), titles on the left."""
    figure = figure_of(6, 2 * len(brains))
    axes = figure.subplots(len(brains), 3, squeeze=False)
    for row, (title, image) in zip(axes, brains.items(), strict=True):
        for axis, panel in enumerate(row):
            values = np.take(image, image.shape[axis] // 2, axis=axis)
            panel.imshow(values.T, cmap="gray", vmin=0, vmax=1.1, origin="lower")
            panel.set(xticks=[], yticks=[])
        row[0].set_ylabel(title, fontsize=6)
    return png_of(figure)


def figure_of(width: float, height: float) -> Figure:
    """Empty figure of so many inches."""
    from matplotlib.figure import Figure  # who harmonizes draws none of these pictures

    return Figure(figsize=(width, height), layout="constrained")


def png_of(figure: Figure) -> bytes:
    """PNG at 80 dpi; the same figure gives the same bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=80, metadata={"Software": None})
    return stream.getvalue()
