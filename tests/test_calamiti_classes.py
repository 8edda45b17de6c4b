"""Classes of voxels that CALAMITI's beta starts from."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.cluster import KMeans

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")

from bids_harmony.methods import calamiti_training  # noqa: E402
from bids_harmony.methods.calamiti_data import paired_sessions  # noqa: E402
from bids_harmony.networks.calamiti import CalamitiNetworks  # noqa: E402
from bids_harmony.training import calamiti_losses as losses  # noqa: E402
from bids_harmony.training.classes import joint_classes  # noqa: E402
from bids_harmony.training.contrasts import PairDrawer  # noqa: E402
from tests.contrast_brains import SHAPE, anatomy, cohort  # noqa: E402
from tests.tiny_calamiti import coded, tiny  # noqa: E402


def test_classes_are_those_of_both_contrasts_alike_at_all_sites():
    sessions = paired_sessions(cohort({"a": (1,), "b": (2,)}), 2.0)[0]
    for session, classes in zip(sessions, joint_classes(sessions, 3), strict=True):
        labels, mask = anatomy(int(session.subject))
        assert classes.dtype == torch.uint8
        assert torch.equal(classes > 0, session.mask)
        inside = np.asarray(session.mask)
        agree = np.mean(classes.numpy()[inside] == labels[mask] + 1)  # fluid, grey, white in T1w
        assert agree > 0.9


def test_classes_are_the_nearest_of_their_own_means():
    session = paired_sessions(cohort({"a": (1,)}), 2.0)[0][0]
    (classes,) = joint_classes([session], 4)
    values = torch.stack([session.images[m][0][session.mask] for m in ("T1w", "T2w")], dim=1)
    values = ((values - values.mean(0)) / values.std(0, correction=0)).clamp(-3, 3).numpy()
    found = classes[session.mask].numpy() - 1
    own = np.stack([values[found == k].mean(0) for k in range(4)])
    assert (np.diff(own[:, 0]) > 0).all(), "the brighter in T1w, the higher"
    far = ((values[:, None] - own) ** 2).sum(2)
    assert np.mean(far.argmin(1) == found) > 0.98
    reference = KMeans(4, n_init=5, random_state=0).fit(values)
    assert far.min(1).sum() < 1.05 * reference.inertia_


def test_where_no_classes_can_be_told_there_are_none():
    pairs = paired_sessions(cohort({"a": (1, 2)}), 2.0)[0]
    other = replace(pairs[0], images={"FLAIR": pairs[0].images["T2w"], **pairs[0].images})
    lacking = replace(
        pairs[0], images={"FLAIR": pairs[0].images["T1w"], "PDw": pairs[0].images["T2w"]}
    )
    found = joint_classes([*pairs, other, lacking], 3)
    assert [bool(f.any()) for f in found] == [True, True, True, False], "T1w is missing in one"
    for values in (torch.ones(SHAPE), (pairs[0].images["T1w"][0] > 0.6).float()):
        flat = replace(pairs[0], images={m: [values] for m in ("T1w", "T2w")})
        assert not joint_classes([flat], 4)[0].any()


def test_classes_go_with_their_slices():
    session = coded()
    place = session.images["T1w"][0] % 1e5
    classes = (place % 4 + 1).to(torch.uint8)
    drawer = PairDrawer([session], side=24, count=16, first=None, classes=[classes])
    batch = drawer(torch.Generator().manual_seed(1))
    wanted = (batch.images[:, 0] % 1e5 % 4 + 1) * batch.mask[:, 0]
    assert torch.equal(batch.classes.float(), wanted)
    without = PairDrawer([session], side=24, count=16, first=None)
    assert not without(torch.Generator().manual_seed(1)).classes.any()


def test_of_equally_common_contrasts_t1w_numbers_the_classes():
    """In FLAIR grey and white matter lie close, at some sites one above the other."""
    (pair,) = paired_sessions(cohort({"a": (1,)}), 2.0)[0]
    other = replace(pair, images={"FLAIR": pair.images["T2w"], "T1w": pair.images["T1w"]})
    assert torch.equal(joint_classes([other], 3)[0], joint_classes([pair], 3)[0])


def test_means_from_some_of_the_voxels_are_those_of_all(monkeypatch):
    (session,) = paired_sessions(cohort({"a": (1,)}), 2.0)[0]
    (whole,) = joint_classes([session], 3)
    monkeypatch.setattr("bids_harmony.training.classes._LEARNED", 2000)
    assert int(session.mask.sum()) > 4 * 2000
    (some,) = joint_classes([session], 3)
    assert (some == whole)[session.mask].float().mean() > 0.98


def test_class_error_against_numpy_and_its_weight():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, 5, generator=rng)
    classes = torch.randint(0, 5, (2, 3, 5), generator=rng, dtype=torch.uint8)
    chance = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    expected = [
        -np.log(chance[b, classes[b, i, j] - 1, i, j])
        for b, i, j in np.ndindex(2, 3, 5)
        if classes[b, i, j]
    ]
    found = losses.class_error(logits, classes)
    assert float(found) == pytest.approx(float(np.mean(expected)), rel=1e-5)
    assert float(losses.class_error(logits, torch.zeros_like(classes))) == 0.0
    weights = [losses.class_weight(step, 100) for step in (0, 25, 50, 80, 100, 10_000)]
    assert weights == pytest.approx([1, 0.75, 0.5, 0.2, 0.2, 0.2])


def test_the_loss_holds_each_slice_to_the_classes_of_its_pair():
    torch.manual_seed(0)
    networks = CalamitiNetworks(4, 4, 2).eval()
    sessions = [coded(), coded(subject="02")]
    known = [
        (s.images["T1w"][0] % 1e5 % (k + 3) + 1).to(torch.uint8) for k, s in enumerate(sessions)
    ]
    sessions = [
        replace(s, images={m: [found[0] / 2e5] for m, found in s.images.items()}) for s in sessions
    ]
    with_classes, without = (
        PairDrawer(sessions, side=24, count=6, first=None, classes=c)(
            torch.Generator().manual_seed(2)
        )
        for c in (known, None)
    )
    assert len({tuple(c.unique().tolist()) for c in with_classes.classes}) > 1, "slices differ"
    found = []
    for batch in (with_classes, without):
        networks.steps.fill_(24)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            found.append(losses.calamiti_loss(networks, batch, generator, start=100))
    each = [
        losses.class_error(networks.beta(seen[None, None]), classes[None]) * (classes > 0).sum()
        for pair, classes in zip(with_classes.seen, with_classes.classes, strict=True)
        for seen in pair
    ]
    expected = 0.75 * sum(each).detach() / (2 * (with_classes.classes > 0).sum())
    assert float(expected) > 0.5
    assert float(found[0] - found[1]) == pytest.approx(float(expected), rel=1e-3)


def test_a_training_starts_from_the_classes(monkeypatch):
    """Seen where the batches are made; adaptation and the held-out score have none."""
    given = []
    made = calamiti_training.PairDrawer.__init__

    def note(self, sessions, *, classes=None, **options):
        given.append(None if classes is None else [bool(c.any()) for c in classes])
        made(self, sessions, classes=classes, **options)

    monkeypatch.setattr(calamiti_training.PairDrawer, "__init__", note)
    for name in ("calamiti", "dewey2020"):
        given.clear()
        learned = tiny(name, steps=2).fit(cohort({"a": (1, 2), "b": (3, 4)}), seed=0)
        assert given == [[True] * 3, None]
        assert learned.scores()["sessions_with_classes"] == 3
