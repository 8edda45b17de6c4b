"""Entropy of a user's segmentation network: its value, its file, and the adaptation it bounds."""

import hashlib
import json
import os
import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")

from bids_harmony.errors import MissingInputError, UsageError  # noqa: E402
from bids_harmony.methods import registry  # noqa: E402
from bids_harmony.methods.guided_adaptation import (  # noqa: E402
    AdaptationPlan,
    adapt_harmonizer,
)
from bids_harmony.methods.task_entropy import (  # noqa: E402
    normalised_entropy,
    read_segmentation,
)
from bids_harmony.networks.harmonizer import HarmonizerUNet  # noqa: E402
from tests import test_flow_methods as tiny  # noqa: E402
from tests.flow_brains import brain  # noqa: E402

PLAN = AdaptationPlan(steps=20, every=5, rate=2e-3, batch=4, checks=6, tie=0.01, gain=1e-4)
ROSE = "entropy of the segmentation rose"


class Classes(torch.nn.Module):
    """Class k is likely where the intensity is near k of `n`; `sharp` says how likely."""

    def __init__(self, n=3, sharp=8.0):
        super().__init__()
        self.levels = torch.nn.Parameter(torch.linspace(0, 1, n).reshape(1, n, 1, 1))
        self.sharp = sharp

    def forward(self, x):
        return -self.sharp * (x - self.levels).abs()


class Stale(torch.nn.Module):
    """Another shape than the slices'."""

    def forward(self, x):
        return torch.cat([x, x], 1)[:, :, ::2]


class One(torch.nn.Module):
    def forward(self, x):
        return x


class Whole(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x, x], 1).long()


class Two(torch.nn.Module):
    def forward(self, x):
        return x, x


class Probabilities(torch.nn.Module):
    def forward(self, x):
        return torch.softmax(torch.cat([x, 2 * x], 1), 1)


class Endless(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x, 1 / x], 1)


class Fixed(torch.nn.Module):
    """For one size of slice only."""

    def forward(self, x):
        return torch.cat([x, x], 1) + torch.zeros(1, 1, 96, 96)


class Noisy(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x, x + torch.rand(1)], 1)


class MeanFlow(torch.nn.Module):
    """Stands for a flow: bits rise with the distance of a slice's brain mean from `wanted`."""

    divisor = 4

    def __init__(self, wanted):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.wanted = wanted

    def bits_per_dim(self, x, mask):
        mean = (x * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
        return 1 + 40 * (mean - self.wanted).abs()


class Told:
    """An entropy that is told beforehand, look by look; the last one goes on."""

    def __init__(self, *values):
        self.values, self.seen = list(values), []

    def __call__(self, images, masks):
        assert images.shape == masks.shape
        assert not (images[masks == 0]).any()
        self.seen.append(images)
        return self.values.pop(0) if len(self.values) > 1 else self.values[0]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def brains():
    volume = brain(1)
    return [(torch.from_numpy(volume.data), torch.from_numpy(volume.mask))]


def saved(folder, network, name="task.pt"):
    path = folder / name
    torch.jit.save(torch.jit.script(network), path)
    return path


def adapt(brains, entropy=None, plan=PLAN):
    torch.manual_seed(0)
    network = HarmonizerUNet(1, (4, 8), "leaky-relu").eval()
    image, mask = brains[0]
    flow = MeanFlow(float(image[mask].mean()) + 0.05)
    states = []
    details = adapt_harmonizer(
        network, flow, brains, goal=1.0, axis=1, plan=plan, seed=0, states=states,
        entropy=entropy,
    )  # fmt: skip
    state = network.state_dict()
    at = [i for i, s in enumerate(states) if all(torch.equal(s[k], state[k]) for k in s)]
    assert [details["history"][i]["step"] for i in at] == [details["kept_step"]]
    return details


# --- the measure


def test_entropy_against_scipy():
    scores = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (2, 5, 6, 7)))
    probabilities = torch.softmax(scores, 1).numpy()
    expected = stats.entropy(probabilities, base=2, axis=1) / np.log2(5)
    np.testing.assert_allclose(normalised_entropy(scores).numpy(), expected, atol=1e-12)


def test_entropy_of_sure_and_of_unsure_classes():
    scores = torch.zeros(1, 4, 1, 3)
    scores[0, 2, 0, 1] = 1e4  # sure; its other classes have probability 0 exactly
    scores[0, :2, 0, 2] = 1e4  # two of four
    found = normalised_entropy(scores)[0, 0]
    np.testing.assert_allclose(found.numpy(), [1, 0, 0.5], atol=1e-12)
    assert normalised_entropy(torch.tensor([[[[torch.nan]], [[0.0]]]])).isnan().all()


def test_mean_over_the_brain_voxels_of_all_slices(tmp_path):
    """Slices of any size and number; what lies outside the brain does not count."""
    rng = np.random.default_rng(1)
    network = Classes()
    found = read_segmentation(saved(tmp_path, network))
    masks = np.zeros((7, 1, 40, 50), np.float32)
    for index in range(7):
        masks[index, 0, 5 : 12 + index, 7:31] = 1
    images = (rng.random(masks.shape) * masks).astype(np.float32)
    with torch.no_grad():
        scores = network(torch.from_numpy(images)).numpy()
    voxels = stats.entropy(np.exp(scores), base=3, axis=1)[masks[:, 0] > 0]
    measured = found.entropy(torch.from_numpy(images), torch.from_numpy(masks))
    assert measured == pytest.approx(voxels.mean(), abs=1e-6)


def test_a_network_that_draws_numbers_repeats_itself_and_disturbs_nobody(tmp_path):
    found = read_segmentation(saved(tmp_path, Noisy()))
    torch.manual_seed(3)
    expected = torch.rand(2)
    images = torch.full((2, 1, 32, 32), 0.5)
    torch.manual_seed(3)
    first = found.entropy(images, torch.ones_like(images))
    assert torch.equal(torch.rand(2), expected)
    assert found.entropy(images, torch.ones_like(images)) == first


# --- the file


def test_a_traced_network_and_its_checksum(tmp_path):
    path = tmp_path / "traced.pt"
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Dropout(0.5), torch.nn.MaxPool2d(2),
        torch.nn.Upsample(scale_factor=2), torch.nn.BatchNorm2d(4),
    )  # fmt: skip
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 1, 64, 64), check_trace=False), path)
    first, again = read_segmentation(path), read_segmentation(path)
    images = torch.rand(5, 1, 36, 44, generator=torch.Generator().manual_seed(0))
    values = [s.entropy(images, torch.ones_like(images)) for s in (first, again, first)]
    assert 0 < values[0] < 1
    assert values[0] == values[1] == values[2]
    assert first.words == {"segmentation": "traced.pt", "segmentation_sha256": first.sha256}
    other = read_segmentation(saved(tmp_path, Classes()))
    assert len(first.sha256) == 12
    assert first.sha256 == again.sha256 != other.sha256


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (One(), r"returns \(1, 1, 96, 96\) for slices of shape \(1, 1, 96, 96\)"),
        (Stale(), r"returns \(1, 2, 48, 96\)"),
        (Whole(), r"returns torch.int64"),
        (Two(), "returns tuple"),
        (Probabilities(), "returns probabilities; leave its last softmax out"),
        (Endless(), "scores that are not finite"),
        (Fixed(), r"fails on slices of shape \(3, 1, 128, 128\)"),
        (torch.nn.Conv2d(3, 2, 1), r"fails on slices of shape \(1, 1, 96, 96\)"),
    ],
)
def test_networks_that_do_not_keep_the_contract(tmp_path, network, words):
    path = saved(tmp_path, network)
    with pytest.raises(UsageError, match=words) as caught:
        read_segmentation(path)
    assert str(path) in str(caught.value)
    assert "give a TorchScript file" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_network(tmp_path):
    path = tmp_path / "task.pt"
    with pytest.raises(MissingInputError, match=r"task\.pt: .* cannot be read"):
        read_segmentation(path)
    contents = [b"", b"\x89PNG\r\n"]
    torch.save(Classes().state_dict(), path)
    contents.append(path.read_bytes())
    contents.append(saved(tmp_path, Classes()).read_bytes()[:-400])
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"task\.pt: no TorchScript network") as caught:
            read_segmentation(path)
        assert "\n" not in str(caught.value)


def test_a_file_cannot_run_python(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    good, path = saved(tmp_path, Classes(), "good.pt"), tmp_path / "evil.pt"
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            is_object = name.endswith("/data.pkl")
            new.writestr(name, pickle.dumps(Evil(), 2) if is_object else old.read(name))
    with pytest.raises(UsageError, match="no TorchScript network"):
        read_segmentation(path)
    assert not (tmp_path / "made").exists()


# --- the adaptation


def test_without_a_network_nothing_changes(brains):
    details = adapt(brains)
    assert not any("entropy" in key for key in details)
    assert set(details["history"][0]) == {"step", "bits", "edges"}
    still = adapt(brains, Told(0.3))
    assert [{**h, "entropy": 0.3} for h in details["history"]] == still["history"]
    assert still["entropy_before"] == still["entropy_after"] == 0.3
    assert still["kept_step"] == details["kept_step"] > 0
    assert still["stop_reason"] == details["stop_reason"]


def test_it_stops_once_the_entropy_rose_at_several_looks(brains):
    details = adapt(brains, Told(0.3, 0.31), replace(PLAN, steps=100))
    assert details["stop_reason"] == ROSE
    assert details["kept_step"] == 0
    assert details["steps"] == PLAN.every * PLAN.patience
    assert details["entropy_after"] == details["entropy_before"] == 0.3
    assert details["bpd_after"] == details["bpd_before"]


def test_the_state_before_the_rise_is_kept(brains):
    told = Told(0.3, 0.25, 0.26)
    details = adapt(brains, told, replace(PLAN, steps=100))
    assert details["stop_reason"] == ROSE
    assert (details["kept_step"], details["steps"]) == (5, 20)
    assert (details["entropy_before"], details["entropy_after"]) == (0.3, 0.25)
    assert details["bpd_after"] == details["history"][1]["bits"] < details["bpd_before"]
    assert [h["entropy"] for h in details["history"]] == [0.3, 0.25, 0.26, 0.26, 0.26]
    assert len(told.seen) == 5


def test_one_rise_does_not_end_it(brains):
    details = adapt(brains, Told(0.3, 0.31, 0.31, 0.29))
    assert details["stop_reason"] != ROSE
    assert details["kept_step"] >= 15
    assert details["entropy_after"] == 0.29


def test_slack_never_adds_up_to_more_than_the_pre_trained_entropy(brains):
    creeping = [0.3, 0.2985, 0.2994, 0.3003, 0.3]
    plan = replace(PLAN, gain=-1.0, patience=9)  # every state is better in bits
    details = adapt(brains, Told(*creeping), plan)
    assert details["kept_step"] == 20
    assert details["entropy_after"] == 0.3
    third = adapt(brains, Told(*creeping), replace(plan, steps=15))
    assert third["kept_step"] == 10  # 0.3003 is within the slack of 0.2994, but above 0.3
    strict = adapt(brains, Told(*creeping), replace(plan, steps=15, entropy_slack=0.0))
    assert strict["kept_step"] == 5


def test_other_bounds_stay_in_force(brains):
    details = adapt(brains, Told(0.3, 0.2), replace(PLAN, least_edges=1.1))
    assert details["stop_reason"] == "edges moved"
    assert details["kept_step"] == 0
    details = adapt(brains, Told(0.3, 0.2), replace(PLAN, gain=100.0))
    assert details["stop_reason"] == "no longer improves"
    assert details["entropy_after"] == 0.3


def test_an_entropy_that_is_not_finite(brains):
    details = adapt(brains, Told(0.3, float("nan")), replace(PLAN, steps=100))
    assert details["stop_reason"] == ROSE
    assert details["kept_step"] == 0
    assert details["history"][1]["entropy"] is None  # and not NaN, which JSON has not
    with pytest.raises(UsageError, match="not finite"):
        adapt(brains, Told(float("nan")))


def test_a_network_of_the_task_judges_the_harmonized_slices(brains, tmp_path):
    """The flow wants brighter brains; a network sure of bright ones agrees, another does not."""
    glad = read_segmentation(saved(tmp_path, Bright(1.0)))
    sorry = read_segmentation(saved(tmp_path, Bright(-1.0)))
    agreed, refused = (adapt(brains, s.entropy) for s in (glad, sorry))
    assert agreed["kept_step"] > 0
    assert agreed["entropy_after"] < agreed["entropy_before"]
    assert refused["kept_step"] == 0
    assert refused["stop_reason"] == ROSE
    assert refused["history"][1]["entropy"] > refused["entropy_before"]


def test_harmonizing_flows_adapts_by_it_and_names_it(tmp_path):
    path = saved(tmp_path, Classes())
    task = read_segmentation(path)
    method = tiny.tolerant(tiny.train("harmonizing-flows"))
    for part in method._parts.values():
        part.goal = 0.0  # a goal that is out of reach
    site = [tiny.brain(seed, gamma=0.7) for seed in (11, 12)]
    plain = method.adapt(site, seed=0)
    judged = method.adapt(site, seed=0, segmentation=task)
    details = judged.details
    json.dumps(dict(details), allow_nan=False)
    assert details["segmentation"] == "task.pt"
    assert details["segmentation_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    assert 0 < details["entropy_after"] <= details["entropy_before"] < 1
    assert [h["step"] for h in details["history"]] == [h["step"] for h in plain.details["history"]]
    assert not any("entropy" in key or "segmentation" in key for key in plain.details)
    assert type(method).adapts_by_entropy
    assert not registry.load("blindharmony").adapts_by_entropy


class Bright(torch.nn.Module):
    """Surer of bright voxels than of dark ones, or the other way round."""

    def __init__(self, sign):
        super().__init__()
        self.sign = sign

    def forward(self, x):
        return torch.cat([4 + 3 * self.sign * x, torch.zeros_like(x)], 1)
