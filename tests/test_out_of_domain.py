"""What has not the contrast of the reference domain's brains is refused or flagged (slow)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")

from bids_harmony.errors import ScanError  # noqa: E402
from bids_harmony.methods.base import Training  # noqa: E402
from bids_harmony.methods.blindharmony import BlindHarmony  # noqa: E402
from bids_harmony.methods.flow_training import Preset  # noqa: E402
from bids_harmony.training.fit import Plan  # noqa: E402
from tests.flow_brains import brain  # noqa: E402

pytestmark = pytest.mark.slow


class Small(BlindHarmony):
    """Trained in a minute or two."""

    presets_by_name: ClassVar[Mapping[str, Preset]] = {
        "cpu": replace(
            BlindHarmony.presets_by_name["cpu"],
            batch=8,
            tone_samples=120,
            flow={"levels": 2, "steps": 3, "hidden": 12, "blocks": 1},
            flow_plan=Plan(400, 2e-3, every=50, half=False),
        )
    }


@pytest.fixture(scope="module")
def method():
    torch.set_num_threads(1)
    return Small.fit([brain(seed) for seed in range(1, 8)], seed=0, training=Training("cpu"))


@pytest.fixture(scope="module")
def impostors():
    """As in `benchmarks.out_of_domain`, by name."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    try:
        make = importlib.import_module("benchmarks.out_of_domain").impostors
    finally:
        sys.path.pop(0)
    found = dict(make(brain(20)))
    for modality in ("T2w", "FLAIR"):
        found[modality] = replace(brain(21, modality=modality), modality="T1w")
    return found


def verdict(method, volume):
    try:
        done = method.harmonize(volume, seed=0)
    except ScanError as error:
        why = ("bits per dimension once smoothed", "lies turned")
        return "refused" if any(words in str(error) for words in why) else str(error)
    return "flagged" if any("unlike the reference domain" in w for w in done.warnings) else "taken"


def test_brains_of_the_reference_domain_and_of_other_sites_are_taken(method):
    for look in ({}, {"gamma": 0.7}, {"gamma": 1.4}, {"noise": 0.03}):
        assert verdict(method, brain(20, **look)) == "taken"


@pytest.mark.parametrize(
    "name",
    [
        "inverted contrast", "white noise", "CT (simulated)", "T2w", "FLAIR", "axes exchanged",
    ],
)  # fmt: skip
def test_impostors_are_not_taken(method, impostors, name):
    assert verdict(method, impostors[name]) in ("refused", "flagged")
