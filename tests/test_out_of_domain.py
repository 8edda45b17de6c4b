"""What has not the contrast of the reference domain's brains is refused or flagged."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")

from bids_harmony.errors import ScanError  # noqa: E402
from bids_harmony.methods import registry  # noqa: E402
from bids_harmony.methods.base import Training  # noqa: E402
from bids_harmony.training.plan import Plan  # noqa: E402
from tests.flow_brains import brain  # noqa: E402

SHAPE = (36, 44, 36)
PLAN = Plan(120, 4e-3, every=40, half=False)
SMALL = {
    "harmonizing-flows": {
        "flow": {"widths": (8,), "blocked": True, "split": True, "noise_couplings": 0},
        "harmonizer": {"slices": 3, "widths": (4, 8), "activation": "leaky-relu"},
        "harmonizer_plan": Plan(20, 2e-3, every=20, half=False),
    },
    "blindharmony": {"flow": {"levels": 2, "steps": 2, "hidden": 8, "blocks": 1}},
}


def head(seed, **look):
    return brain(seed, shape=SHAPE, **look)


@pytest.fixture(scope="module", params=sorted(SMALL))
def method(request):
    """Trained for some seconds."""
    torch.set_num_threads(1)
    kind = registry.load(request.param)
    small = replace(
        kind.presets_by_name["cpu"], batch=8, tone_samples=48, tone_epochs=4, flow_plan=PLAN,
        **SMALL[request.param],
    )  # fmt: skip
    made = type(kind.__name__, (kind,), {"presets_by_name": {"cpu": small}})
    return made.fit([head(seed) for seed in range(1, 7)], seed=0, training=Training("cpu"))


@pytest.fixture(scope="module")
def impostors():
    """As in `benchmarks.out_of_domain`, by name."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    try:
        make = importlib.import_module("benchmarks.out_of_domain").impostors
    finally:
        sys.path.pop(0)
    found = dict(make(head(20)))
    for modality in ("T2w", "FLAIR"):
        found[modality] = replace(head(21, modality=modality), modality="T1w")
    return found


def verdict(method, volume):
    try:
        done = method.harmonize(volume, seed=0)
    except ScanError as error:
        why = ("bits per dimension once smoothed", "lies turned")
        return "refused" if any(words in str(error) for words in why) else str(error)
    return "flagged" if any("unlike the reference domain" in w for w in done.warnings) else "taken"


def test_brains_of_the_reference_domain_and_of_other_sites_are_taken(method):
    for look in ({}, {"gamma": 0.7}, {"gamma": 1.4, "noise": 0.03}):
        assert verdict(method, head(20, **look)) == "taken"


@pytest.mark.parametrize(
    "name",
    [
        "inverted contrast", "white noise", "CT (simulated)", "T2w", "FLAIR", "axes exchanged",
    ],
)  # fmt: skip
def test_impostors_are_not_taken(method, impostors, name):
    assert verdict(method, impostors[name]) in ("refused", "flagged")
