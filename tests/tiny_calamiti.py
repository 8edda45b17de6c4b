"""CALAMITI with a preset of seconds, and a session whose voxels tell where they come from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from bids_harmony.methods import registry
from bids_harmony.training.contrasts import Session
from bids_harmony.training.plan import Plan


def tiny(name, steps=8, **networks):
    """The method with a preset of seconds."""
    kind = registry.load(name)
    plan = Plan(steps, 4e-3, every=max(steps // 2, 1), half=False)
    preset = replace(
        kind.presets_by_name["cpu"], batch=2,
        networks={"beta_base": 4, "decoder_base": 4, "levels": 2, "decay": 5e-3, **networks},
        plan=plan, fusion_plan=replace(plan, steps=4, every=2), fusion_width=2,
        adaptation_plan=replace(plan, steps=4, every=2),
    )  # fmt: skip
    members = {"presets_by_name": {"cpu": preset}, "__module__": __name__}
    return type(kind.__name__, (kind,), members)


def coded(site="a", subject="01", bump=0, modalities=("T1w", "T2w")):
    """A session whose voxels tell modality, place and session."""
    shape = (20, 24, 22)
    place = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1
    images = {
        m: [torch.from_numpy(place + 1e5 * k + 1e6 * bump)] for k, m in enumerate(modalities)
    }
    names = {m: [f"{subject}_{m}"] for m in modalities}
    return Session(site, images, torch.ones(shape, dtype=torch.bool), names, subject)
