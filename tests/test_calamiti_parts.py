"""Parts of CALAMITI against independent computations: networks, losses, pairs, admission."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")

from bids_harmony.errors import ScanError  # noqa: E402
from bids_harmony.imaging.layout import Coarse, Layout  # noqa: E402
from bids_harmony.methods import calamiti_data as data  # noqa: E402
from bids_harmony.methods.calamiti_admission import Known, admit  # noqa: E402
from bids_harmony.methods.calamiti_drawing import (  # noqa: E402
    draw_brain,
    drawing_error,
    fused,
    lost_contrast,
)
from bids_harmony.methods.calamiti_files import ThetaRow, contour, theta_tsv  # noqa: E402
from bids_harmony.methods.calamiti_fusion import Stack, draw_patches  # noqa: E402
from bids_harmony.networks import calamiti as net  # noqa: E402
from bids_harmony.networks.slice_unet import SliceUNet  # noqa: E402
from bids_harmony.training import calamiti_losses as losses  # noqa: E402
from bids_harmony.training import slice_losses  # noqa: E402
from bids_harmony.training.contrasts import PairDrawer, full_slices  # noqa: E402
from bids_harmony.training.fit import train_network  # noqa: E402
from bids_harmony.training.plan import Plan  # noqa: E402
from tests.contrast_brains import cohort, scan  # noqa: E402
from tests.tiny_calamiti import coded  # noqa: E402

GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    GENERATOR.manual_seed(0)


def small(**kwargs):
    return net.CalamitiNetworks(**{"beta_base": 4, "decoder_base": 4, "levels": 2, **kwargs})


# --- networks


def test_gumbel_one_hot_has_the_gradient_of_its_soft_form():
    logits = torch.randn((2, 4, 3, 5), requires_grad=True)
    weight = torch.randn((2, 4, 3, 5))
    hard = net.gumbel_one_hot(logits, 0.7, GENERATOR)
    assert set(np.unique(hard.detach().numpy().round(6))) == {0.0, 1.0}
    assert torch.allclose(hard.sum(1), torch.ones(2, 3, 5))
    (hard * weight).sum().backward()
    uniform = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0))
    again = logits.detach().clone().requires_grad_()
    (torch.softmax((again - torch.log(-torch.log(uniform))) / 0.7, 1) * weight).sum().backward()
    assert torch.allclose(logits.grad, again.grad, atol=1e-5)


def test_gumbel_samples_follow_the_softmax_whatever_the_temperature():
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    for tau in (1.0, 0.5):
        drawn = net.gumbel_one_hot(logits.view(1, 4, 1, 1).expand(1, 4, 200, 200), tau, GENERATOR)
        assert torch.allclose(drawn.mean((0, 2, 3)), logits.softmax(0), atol=0.01)


def test_temperature_falls_to_a_half():
    assert net.temperature(0, 2e-4) == 1.0
    assert net.temperature(1000, 2e-4) == pytest.approx(np.exp(-0.2))
    assert net.temperature(10**6, 2e-4) == 0.5


def test_beta_is_one_hot_in_the_brain_and_applied_without_noise():
    networks = small().eval()
    image, mask = torch.rand(2, 1, 16, 16), torch.zeros(2, 1, 16, 16)
    mask[..., 4:12, 3:12] = 1
    one, two = (networks.applied_beta(image, mask) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(one.sum(1, keepdim=True), mask)
    assert torch.equal(one.argmax(1)[:, 5, 5], networks.beta(image).argmax(1)[:, 5, 5])


def test_theta_changes_what_is_drawn_far_from_the_borders():
    """A constant channel would be lost in an instance norm behind the first convolution."""
    networks = small(levels=1).eval()
    beta = torch.zeros(1, 4, 48, 48)
    beta[:, 0] = 1
    mask = torch.ones(1, 1, 48, 48)
    drawn = [networks.draw(beta, torch.tensor([t]), mask)[0, 0, 24, 24] for t in ([0, 0], [1, 2])]
    assert abs(float(drawn[0].detach() - drawn[1].detach())) > 0.05


def test_discriminator_weights_have_spectral_norm_one():
    judge = net.BetaDiscriminator().train()
    for _ in range(60):
        judge(torch.rand(1, 4, 16, 16))
    weights = [m.weight.detach().flatten(1).numpy() for m in judge.layers if hasattr(m, "weight")]
    assert len(weights) == 4
    for weight in weights:
        assert np.linalg.svd(weight, compute_uv=False)[0] == pytest.approx(1.0, abs=0.02)


def test_theta_is_of_the_brain_not_of_the_canvas():
    encoder = net.ThetaEncoder().eval()
    image = torch.zeros(1, 1, 64, 64)
    image[..., 16:48, 16:48] = torch.rand(1, 1, 32, 32)
    wide = torch.nn.functional.pad(image, (32, 32, 32, 32))
    assert torch.allclose(encoder(image)[0], encoder(wide)[0], atol=1e-5)
    assert not torch.allclose(encoder(image)[0], encoder(2 * image)[0], atol=1e-2)


def test_unet_refuses_sizes_it_cannot_halve():
    with pytest.raises(ValueError, match="multiple of 4"):
        SliceUNet(1, 1, 2, 2, norm=False)(torch.zeros(1, 1, 18, 16))


def test_networks_are_rebuilt_from_their_config():
    networks = small(discriminator=False, decay=1e-3)
    again = net.CalamitiNetworks.from_config(networks.config())
    again.load_state_dict(networks.state_dict())
    assert again.config() == networks.config()
    assert again.discriminator is None


# --- losses


def test_losses_against_numpy():
    rng = np.random.default_rng(0)
    drawn, wanted = rng.random((2, 2, 3, 8, 12))
    mask = rng.random((2, 1, 8, 12)) < 0.5
    a, b, m = (torch.from_numpy(v) for v in (drawn, wanted, mask))
    expected = np.abs(drawn - wanted)[np.broadcast_to(mask, drawn.shape)].mean()
    assert float(slice_losses.masked_l1(a, b, m)) == pytest.approx(expected)
    expected = 0.0
    for size in (1, 2, 4):
        rest = (drawn - wanted).reshape(2, 3, 8 // size, size, 12 // size, size).mean((3, 5))
        expected += np.abs(np.diff(rest, axis=2)).mean() + np.abs(np.diff(rest, axis=3)).mean()
    assert float(slice_losses.edge_difference(a, b)) == pytest.approx(expected)
    logits, label = torch.randn(2, 1, 3, 3), torch.tensor([1.0, 0.0])
    chance = 1 / (1 + np.exp(-logits.numpy()))
    expected = -np.concatenate([np.log(chance[0]), np.log(1 - chance[1])]).mean()
    assert float(losses.same_label(logits, label)) == pytest.approx(expected, rel=1e-5)


def test_kl_against_torch_distributions():
    mean, log_variance = torch.randn(5, 2), torch.randn(5, 2)
    own = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(own, torch.distributions.Normal(0, 1))
    found = losses.kl_to_standard(mean, log_variance)
    assert torch.allclose(found, expected.sum(1).mean(), atol=1e-5)


def batch_of(judging, count=2):
    rng = torch.Generator().manual_seed(3)
    images, seen, others = (torch.rand(count, 2, 16, 16, generator=rng) for _ in range(3))
    crossed = torch.tensor([[True, False]] * count)
    known = torch.tensor([1.0] + [0.0] * (count - 1))
    classes = torch.randint(0, 5, (count, 16, 16), generator=rng, dtype=torch.uint8)
    return losses.PairBatch(
        images, seen, others, torch.ones(count, 1, 16, 16), crossed, known, torch.tensor(judging),
        classes,
    )  # fmt: skip


def test_each_step_trains_the_discriminator_or_the_rest():
    networks = small()
    for judging in (True, False):
        networks.zero_grad(set_to_none=True)
        losses.calamiti_loss(networks, batch_of(judging), GENERATOR, start=5).backward()
        with_gradient = {
            n.split(".")[0] for n, p in networks.named_parameters() if p.grad is not None
        }
        assert with_gradient == ({"discriminator"} if judging else {"beta", "theta", "decoder"})
    assert int(networks.steps) == 2
    assert int(networks.state_dict()["steps"]) == 2


def test_a_resumed_training_goes_on_with_its_temperature(tmp_path):
    """The counter of steps is in the checkpoint: the end is that of an uninterrupted training."""
    drawer = PairDrawer([coded()], side=24, count=1, first="b")
    ends, seen = [], []

    def train(folder, stop):
        torch.manual_seed(0)
        networks = small(decay=0.05)

        def loss(batch, generator):
            seen.append(int(networks.steps))
            if len(seen) == stop:
                raise KeyboardInterrupt
            return losses.calamiti_loss(networks, batch, generator, start=3)

        train_network(
            networks, name="networks", draw=drawer, loss=loss, held_out=lambda: -len(seen),
            plan=Plan(8, 1e-3, every=4, half=False), seed=0, device="cpu", folder=folder,
        )  # fmt: skip
        ends.append(networks.state_dict())

    train(tmp_path / "whole", None)
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", 7)
    train(tmp_path / "killed", None)
    assert seen == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_crossed_contrasts_are_drawn_from_the_other_anatomy(monkeypatch):
    networks, batch, seen = small(discriminator=False), batch_of(False), []
    draw = networks.draw
    monkeypatch.setattr(networks, "draw", lambda b, t, m: seen.append(b) or draw(b, t, m))
    beta = torch.randn(2, 2, 4, 16, 16)
    losses.drawing_loss(networks, batch, beta, GENERATOR)
    chosen = seen[0].unflatten(0, (2, 2))
    assert torch.equal(chosen[:, 0], beta[:, 1])  # crossed
    assert torch.equal(chosen[:, 1], beta[:, 1])


# --- pairs


@pytest.mark.parametrize("same", [False, True])
def test_pairs_show_one_slice_and_theta_another_of_the_same_volume(same):
    drawer = PairDrawer([coded()], side=24, count=16, first=None, same_slice=same)
    batch = drawer(GENERATOR)
    assert not bool(batch.judging)
    for images, others in zip(batch.images, batch.others, strict=True):
        contrast = (images / 1e5).floor().amax((1, 2))
        assert sorted(contrast.tolist()) == [0.0, 1.0]
        assert torch.equal((others / 1e5).floor().amax((1, 2)), contrast)
        inside = (images > 0).all(0)
        assert len(torch.unique((images[0] - images[1])[inside])) == 1
        assert torch.equal(images, others) == same
    again = drawer(torch.Generator().manual_seed(0))
    assert torch.equal(again.images, batch.images)


def test_a_tone_is_told_by_theta_alone():
    """What is drawn and what tells theta have one tone, what tells the anatomy has another."""
    session = coded()
    images = {m: [found[0] % 1e5 / 8000] for m, found in session.images.items()}  # 0 to 1.3
    session = replace(session, images=images)
    plain, batch = (
        PairDrawer([session], side=24, count=40, first=None, tones=tones)(
            torch.Generator().manual_seed(5)
        )
        for tones in (False, True)
    )
    assert torch.equal(plain.seen, plain.images)
    assert torch.equal(batch.mask, plain.mask)
    found = []
    for b in range(40):
        for k in range(2):
            before = torch.cat((plain.images[b, k], plain.others[b, k])).flatten()
            after = torch.cat((batch.images[b, k], batch.others[b, k])).flatten()
            seen, real = batch.seen[b, k].flatten(), plain.images[b, k].flatten()
            found.append((power_of(before, after), power_of(real, seen)))
    powers = np.array(found)
    assert powers.min() > 0.499
    assert powers.max() < 2.001
    same = np.isclose(powers, 1, atol=1e-3)
    assert same.mean(0) == pytest.approx([0.5, 0.5], abs=0.17)
    assert same.all(1).mean() == pytest.approx(0.25, abs=0.15), "drawn one by one"
    drawn = np.log2(powers[~same])
    assert abs(drawn.mean()) < 0.25, "up as often as down"
    assert drawn.std() == pytest.approx(1 / np.sqrt(3), abs=0.12)


def power_of(before, after):
    """Exponent that made one of the other, the same for all voxels; its tangent above 1."""
    low, high = (before > 0.05) & (before < 0.95), before > 1.02
    powers = after[low].log() / before[low].log(), (after[high] - 1) / (before[high] - 1)
    power = float(torch.cat(powers).median())
    assert torch.allclose(after[low], before[low] ** power, atol=1e-4)
    assert torch.allclose(after[high], 1 + power * (before[high] - 1), atol=1e-4)
    assert not after[before == 0].any()
    return power


def test_anatomy_comes_from_what_is_seen_and_the_drawing_is_of_the_image():
    networks, batch = small(discriminator=False).eval().requires_grad_(False), batch_of(False)
    theta, _ = networks.theta(batch.others.flatten(0, 1)[:, None])
    mask = torch.ones(4, 1, 16, 16)
    beta = networks.applied_beta(batch.seen.flatten(0, 1)[:, None], mask)
    other = beta[[1, 0, 3, 2]]
    wanted = batch.images.flatten(0, 1)[:, None]
    errors = [(networks.draw(b, theta, mask) - wanted).abs().mean() for b in (beta, other)]
    found = losses.pair_error(networks, batch)
    assert float(found) == pytest.approx(float(sum(errors) / 2), rel=1e-5)


def test_sites_are_drawn_equally_and_the_first_in_half_of_the_judging_steps():
    sessions = [coded("a", f"{k}") for k in range(6)] + [coded("b", "7"), coded("c", "8")]
    drawer = PairDrawer(sessions, side=24, count=8, first="a")
    batches = [drawer(torch.Generator().manual_seed(k)) for k in range(150)]
    share = {
        j: np.mean([b.first_site.mean() for b in batches if bool(b.judging) == j])
        for j in (True, False)
    }
    assert np.mean([bool(b.judging) for b in batches]) == pytest.approx(0.5, abs=0.12)
    assert share[True] == pytest.approx(1 / 2, abs=0.06)
    assert share[False] == pytest.approx(1 / 3, abs=0.06)


def test_full_slices_leave_out_the_ends_of_a_ball():
    z = np.arange(21) - 10
    ball = z[:, None, None] ** 2 + z[:, None] ** 2 + z**2 <= 100
    area = ball.sum((1, 2))
    expected = np.flatnonzero(area >= 0.25 * area.max())
    assert full_slices(torch.from_numpy(ball), 0) == expected.tolist()


def test_sessions_are_paired_by_site_subject_and_session():
    volumes = [
        *cohort({"a": (1, 2)}),
        scan(3, "a", "T1w"),
        replace(scan(1, "a", "T1w"), name="second"),
        scan(4, "b", "T1w", session="1"),
        scan(4, "b", "T2w", session="2"),
    ]
    found, left_out = data.paired_sessions(volumes, 2.0)
    assert [(s.site, s.subject) for s in found] == [("a", "01"), ("a", "02")]
    assert {m: len(images) for m, images in found[0].images.items()} == {"T1w": 2, "T2w": 1}
    assert found[0].names["T1w"] == ["sub-01_a_T1w", "second"]
    assert found[0].images["T1w"][0].shape == found[0].images["T2w"][0].shape
    assert len(left_out) == 3
    assert "sub-03_a_T1w (site a): no scan of another modality" in left_out[0]


def test_brain_of_a_session_is_what_its_masks_share():
    one, two = scan(1, "a", "T1w"), scan(1, "a", "T2w")
    mask = two.mask.copy()
    mask[:14] = False
    two = replace(two, mask=mask, data=two.data * mask)
    (found,), _ = data.paired_sessions([one, two], 2.0)
    assert int(found.mask.sum()) == int((one.mask & mask).sum())
    assert not found.images["T1w"][0][~found.mask].any()
    mask = mask.copy()
    mask[:24] = False
    two = replace(two, mask=mask)
    others = [scan(2, "a", "T1w"), scan(2, "a", "T2w")]
    found, left_out = data.paired_sessions([one, two, *others], 2.0)
    assert [s.subject for s in found] == ["02"]
    assert "less than half in common" in left_out[0]


def test_sessions_that_cannot_be_used_are_named():
    with pytest.raises(ScanError, match="sessions with two modalities"):
        data.paired_sessions([scan(1, "a", "T1w"), scan(2, "a", "T2w")], 2.0)
    cut = scan(1, "a", "T2w")
    cut = replace(cut, data=cut.data[1:], mask=cut.mask[1:])
    with pytest.raises(ScanError, match=r"sub-01_a_T1w, sub-01_a_T2w .*on one grid"):
        data.paired_sessions([scan(1, "a", "T1w"), cut], 2.0)
    bad = scan(1, "a", "T2w")
    bad = replace(bad, data=np.full_like(bad.data, np.nan))
    with pytest.raises(ScanError, match=r"sub-01_a_T2w: .*NaN"):
        data.paired_sessions([scan(1, "a", "T1w"), bad], 2.0)


def split(**sites):
    sessions = [coded(site, f"{k:02d}") for site, people in sites.items() for k in people]
    return data.split_sessions(sessions)


def test_one_subject_in_five_of_each_site_is_held_out():
    learn, apart = split(a=range(10), b=range(20, 25))
    assert sorted((s.site, s.subject) for s in apart) == [("a", "08"), ("a", "09"), ("b", "24")]
    assert len(learn) == 12


def test_a_travelling_subject_is_held_out_everywhere_and_no_site_is_emptied():
    learn, apart = split(a=range(5), b=(4, 5), c=(4,))
    assert not {s.subject for s in learn} & {s.subject for s in apart}
    assert {s.site for s in learn} == {"a", "b", "c"}
    assert {s.subject for s in apart} == {"03"}  # 04 is all that site c has
    learn, apart = split(a=range(3), b=range(3))
    assert {s.subject for s in apart} == {"02"}
    assert len(apart) == 2


def test_somebody_must_be_held_out():
    with pytest.raises(ScanError, match="two subjects or more"):
        split(a=(1,), b=(2,))


def test_first_site_has_the_most_scans():
    sessions = [coded("b", "1"), coded("b", "2"), coded("a", "3")]
    assert data.Cohort(tuple(sessions), (), ()).first_site == "b"
    assert data.Cohort(tuple(sessions[:2]), (), ()).first_site is None


# --- drawing


class Copy(torch.nn.Module):
    """Takes the image for its anatomy, and adds theta when it draws."""

    steps = torch.zeros(())

    def applied_beta(self, x, mask):
        return x

    def draw(self, beta, theta, mask):
        return (beta + theta[:, :1, None, None]) * mask


def test_slices_are_put_back_where_they_were():
    image, mask = torch.rand(11, 14, 9), torch.rand(11, 14, 9) < 0.7
    mask[0] = False
    drawn = draw_brain(Copy(), image, mask, [(0.0, 9.0), (2.0, 9.0)], 16)
    assert torch.allclose(drawn[0], (image * mask).expand(3, -1, -1, -1))
    assert torch.allclose(drawn[1], ((image + 2) * mask).expand(3, -1, -1, -1))


def test_fusion_starts_as_the_mean_and_falls_back_to_the_median():
    drawn, mask = torch.rand(3, 8, 9, 10), torch.rand(8, 9, 10) < 0.8
    mean = fused(net.FusionNetwork(4), drawn, mask)
    assert mean.numpy() == pytest.approx(drawn.numpy().mean(0) * mask.numpy(), abs=1e-6)
    median = fused(None, drawn, mask)
    assert median.numpy() == pytest.approx(np.median(drawn.numpy(), 0) * mask.numpy())


def test_drawing_error_is_relative_to_a_grey_brain():
    image, mask = torch.rand(8, 9, 10), torch.rand(8, 9, 10) < 0.8
    grey = torch.full_like(image, float(np.median(image[mask].numpy())))
    assert drawing_error(image, image, mask) == 0
    assert drawing_error(grey, image, mask) == pytest.approx(1, abs=0.01)


def test_patches_are_cut_alike_from_drawing_scan_and_mask():
    wanted = torch.rand(40, 36, 34)
    stack = Stack(torch.stack([wanted] * 3), wanted, wanted > 0.3)
    drawn, scan_, mask = draw_patches([stack], 3, GENERATOR)
    assert drawn.shape == (3, 3, 32, 32, 32)
    assert torch.equal(drawn, scan_.expand(-1, 3, -1, -1, -1))
    assert torch.equal(mask, (scan_ > 0.3).float())


# --- admission, files


def known(centre, brain, error=0.3):
    thetas = np.array(centre) + 0.1 * np.random.default_rng(0).normal(size=(6, 2))
    return Known(thetas, error, 0.02, Layout.of([brain.cells()]))


def test_what_is_refused_and_what_is_flagged():
    scans = {m: scan(1, "a", m) for m in ("T1w", "T2w")}
    brains = {m: Coarse(v.data, v.mask, v.spacing) for m, v in scans.items()}
    of = {"T1w": known((0, 0), brains["T1w"]), "T2w": known((3, 0), brains["T2w"])}

    def told(theta=(0.05, 0.0), error=0.3, brain=brains["T1w"]):
        return admit(of, "T1w", name="x", theta=theta, error=error, brain=brain)

    assert told() == []
    (words,) = told(error=0.5)
    assert "Unlike the scans" in words
    (words,) = told(theta=(0.0, 2.0))
    assert "far outside" in words
    with pytest.raises(ScanError, match=r"x: the networks cannot draw it.*no T1w brain"):
        told(error=0.8)
    with pytest.raises(ScanError, match="cannot draw"):
        told(error=float("nan"))
    with pytest.raises(ScanError, match="contrast is that of T2w scans, not of T1w"):
        told(theta=(2.9, 0.0))
    upside = Coarse(scans["T1w"].data[:, :, ::-1], scans["T1w"].mask[:, :, ::-1], (2.0,) * 3)
    with pytest.raises(ScanError, match=r"lies turned: .* right, anterior, inferior"):
        told(brain=upside)


def test_theta_table():
    rows = [ThetaRow("s1", "a", "01", "", "T1w", 0.25, -1.5)]
    lines = theta_tsv(rows).decode().split("\n")
    assert lines[0] == "name\tsite\tsubject\tsession\tmodality\ttheta1\ttheta2"
    assert lines[1] == "s1\ta\t01\tn/a\tT1w\t0.250000\t-1.500000"


def test_contour_lies_two_deviations_from_the_mean():
    points = np.random.default_rng(0).normal(size=(40, 2)) @ [[2, 1], [0, 0.5]] + [3, -1]
    far = contour(points) - points.mean(0)
    squared = np.einsum("ni,ij,nj->n", far, np.linalg.inv(np.cov(points.T)), far)
    assert squared == pytest.approx(4)


def test_networks_that_learned_too_little_say_so():
    cells = [np.random.default_rng(k).random((2, 12, 12, 12)) for k in range(3)]
    ball = np.indices((24, 24, 24)) - 11.5
    mask = (ball**2).sum(0) < 100
    brain = Coarse(mask.astype(np.float32), mask, (2.0, 2.0, 2.0))
    for error, told in ((0.3, False), (0.9, True)):
        known = Known(np.zeros((3, 2)), error, 0.05, Layout.of(cells))
        found = admit({"T1w": known}, "T1w", name="x", theta=(0.0, 0.0), error=error, brain=brain)
        assert any("train them for longer" in sentence for sentence in found) == told


def test_the_contrast_that_a_drawing_lost():
    brain = scan(1, noise=0.0)
    image, mask = torch.from_numpy(brain.data), torch.from_numpy(brain.mask)
    mean = image[mask].mean()
    for factor, told in ((1.0, 1.0), (0.8, 1.25), (0.2, 2.0), (1.5, 1.0)):
        drawn = (mean + factor * (image - mean)) * mask
        assert lost_contrast(drawn, image, mask) == pytest.approx(told, abs=1e-3)
    noisy = torch.from_numpy(scan(1, noise=0.08).data)
    assert lost_contrast(image, noisy, mask) == pytest.approx(1, abs=0.05)
