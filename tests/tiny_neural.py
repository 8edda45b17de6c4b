"""A plug-in method with a 'network' of one number, to test all that surrounds neural methods.

It notes every step of its training and every adaptation in the file that TINY_LOG names, and its
training is interrupted before the step that TINY_STOP names.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np

from bids_harmony.errors import ScanError
from bids_harmony.methods.base import (
    Adaptation,
    Contract,
    Harmonized,
    NeuralMethod,
    Training,
)

STEPS = {"cpu": 5, "paper": 8}
MILLIMETRES = {"cpu": 4.0, "paper": 5.0}
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c636800000082008177cd72b60000000049454e44ae426082"
)
CARD = """
name = "tiny"
title = "Tiny network"
summary = "One gain per site."
kind = "neural"
modalities = ["T1w", "T2w", "FLAIR"]
sites_to_train = 1
paired = false
labels = false
grid = "MNI152NLin2009aSym"
memory_gb = 0.1
devices = ["cpu", "cuda"]
monotone = true
status = "experimental"
citation = "Nobody 2020."
adapts = true
presets = ["cpu", "paper"]
needs = ["numpy"]

[[options]]
name = "pull"
level = "train"
default = 0.9
minimum = 0.0
maximum = 1.0
summary = "of the way to the mean that a step goes"

[[options]]
name = "boost"
level = "participant"
default = 1
minimum = 0.5
maximum = 2
summary = "factor on the gain"
"""
EXAMPLE_CARD = (
    CARD.replace('"tiny"', '"example"')
    .replace("adapts = true", "by_example = true")
    .replace("sites_to_train = 1", "sites_to_train = 2")
)


def install(root: Path, card: str = CARD) -> Path:
    """Write the plug-in as an installed distribution below `root`."""
    package, info = root / "tiny_plugin", root / "tiny_plugin-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(__file__, package / "method.py")
    (package / "tiny.toml").write_text(card)
    (package / "example.toml").write_text(EXAMPLE_CARD)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny_plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[bids_harmony.methods]\ntiny = tiny_plugin.method:TinyNeural\n"
        "example = tiny_plugin.method:TinyExample\n"
    )
    return root


def note(text):
    with Path(os.environ["TINY_LOG"]).open("a") as stream:
        stream.write(text + "\n")


def mean_of(volumes):
    values = [v.data[v.mask].mean() for v in volumes if v.mask.any()]
    if not values:
        raise ScanError("no volume can be used")
    return float(np.mean(values))


def entropy_of(volumes, gain, segmentation):
    """Of the coronal slices of all volumes, multiplied by a gain."""
    import torch

    found = []
    for index in range(len(volumes)):
        volume = volumes[index]
        mask = torch.from_numpy(np.asarray(volume.mask, dtype=bool)).movedim(1, 0)[:, None]
        image = torch.from_numpy(np.array(volume.data)).movedim(1, 0)[:, None]
        found.append(segmentation.entropy(image * gain * mask, mask.float()))
    return float(np.mean(found))


class TinyNeural(NeuralMethod):
    """Multiplies a brain by the gain of its site."""

    name = "tiny"
    adapts = True
    adapts_by_entropy = True
    train_options: ClassVar = {"pull": 0.9}
    participant_options: ClassVar = {"boost": 1.0}
    boost = 1.0

    def __init__(self, mean, preset, modalities, gain=1.0, device="cpu", threads=1):
        self.mean, self.preset, self.modalities = mean, preset, tuple(modalities)
        self.gain, self.device, self.threads = gain, device, threads

    @classmethod
    def contract_for(cls, modalities):
        return cls.contract_for_preset(modalities, "cpu")

    @classmethod
    def contract_for_preset(cls, modalities, preset):
        return Contract(tuple(modalities), "MNI152NLin2009aSym", MILLIMETRES[preset])

    @property
    def contract(self):
        return self.contract_for_preset(self.modalities, self.preset)

    @classmethod
    def fit(cls, volumes, *, seed, training=None):
        training = training or Training()
        note(f"fit {training.preset} {training.max_minutes} {training.device} {training.threads}")
        state = Path(training.folder) / "state.json"
        step, mean = json.loads(state.read_text()) if state.is_file() else (0, 0.0)
        while step < STEPS[training.preset]:
            if os.environ.get("TINY_STOP") == str(step):
                raise KeyboardInterrupt
            if "TINY_ERROR" in os.environ:
                raise RuntimeError(os.environ["TINY_ERROR"])
            pull = training.options.get("pull", 0.9)
            step, mean = step + 1, mean + pull * (mean_of(volumes) - mean)
            note(f"step {step}")
            state.write_text(json.dumps([step, mean]))
        return cls(mean, training.preset, sorted({v.modality for v in volumes}))

    def files(self):
        return {"curves.csv": b"step,loss\n1,0.5\n", "training.png": PNG}

    def scores(self):
        return {"psnr_db": 31.25}

    def take_options(self, options):
        self.boost = options["boost"]

    def place_on(self, device, threads):
        self.device, self.threads = device, threads

    def harmonize(self, volume, *, seed):
        data = np.where(volume.mask, np.maximum(volume.data * self.gain * self.boost, 0), 0)
        facts = {"gain": self.gain, "device": self.device, "threads": self.threads}
        return Harmonized(data.astype(np.float32), facts)

    def adapt(self, volumes, *, seed, segmentation=None):
        note("adapt " + " ".join(v.name for v in volumes))
        if {v.name for v in volumes} <= set(os.environ.get("TINY_REFUSES", "").split()):
            raise ScanError("no scan can be adapted to: all lie turned")
        gain = self.mean / mean_of(volumes)
        details = {"bpd_before": 3.0, "bpd_after": 2.5, "steps": 7, "stop_reason": "converged"}
        if segmentation is not None:
            before, after = (entropy_of(volumes, g, segmentation) for g in (1.0, gain))
            gain = gain if after <= before else 1.0
            details |= {"entropy_before": before, "entropy_after": min(before, after)}
            details |= segmentation.words
        return Adaptation({"gain": np.array([gain])}, details)

    def adapted(self, adaptation):
        if "gain" not in adaptation.arrays:
            raise ScanError("the adaptation does not fit the model")
        gain = float(adaptation.arrays["gain"][0])
        made = type(self)(self.mean, self.preset, self.modalities, gain, self.device, self.threads)
        made.boost = self.boost
        return made

    def arrays(self):
        return {"mean": np.array([self.mean])}

    def params(self):
        return {"preset": self.preset, "modalities": list(self.modalities)}

    @classmethod
    def from_state(cls, arrays, params):
        return cls(float(arrays["mean"][0]), params["preset"], params["modalities"])


class TinyExample(TinyNeural):
    """Gives a brain the mean of its examples."""

    name = "example"
    adapts = False
    adapts_by_entropy = False
    by_example = True
    fine_tunes = True
    tuned = False

    def towards(self, volumes, *, seed):
        note("towards " + " ".join(v.name for v in volumes))
        seen = sorted({v.modality for v in volumes})
        return type(self)(mean_of(volumes), self.preset, seen)

    def at_theta(self, theta):
        note(f"at_theta {theta}")
        return type(self)(theta["T1w"][0], self.preset, sorted(theta))

    def fine_tuned(self, volumes, *, seed, training=None):
        note("fine_tuned " + " ".join(v.name for v in volumes))
        made = type(self)(self.mean, self.preset, self.modalities)
        made.tuned = True
        return made

    def harmonize(self, volume, *, seed):
        gain = self.mean / mean_of([volume])
        data = np.where(volume.mask, np.maximum(volume.data * gain, 0), 0)
        return Harmonized(data.astype(np.float32), {"mean": self.mean})

    def params(self):
        return {**super().params(), "tuned": self.tuned}

    @classmethod
    def from_state(cls, arrays, params):
        made = super().from_state(arrays, params)
        made.tuned = params["tuned"]
        return made
