"""Training with Lightning: what is kept, resumed, left out, stopped and said."""

import logging
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")

from bids_harmony.errors import HarmonyError  # noqa: E402
from bids_harmony.training import fit, loop  # noqa: E402
from bids_harmony.training.fit import train_network  # noqa: E402
from bids_harmony.training.plan import Adversary, Plan  # noqa: E402

TRUTH = torch.tensor([1.0, -2.0, 0.5])
CHECK = torch.randn(64, 3, generator=torch.Generator().manual_seed(9))
PLAN = Plan(120, 0.1, every=20, half=False)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Toy:
    """Linear regression on three numbers; `on_draw` is called with the number of each batch."""

    def __init__(self, on_draw=None, noise=0.0, scores=None):
        torch.manual_seed(3)
        self.network = torch.nn.Linear(3, 1)
        self.draws, self.looks = 0, 0
        self.on_draw, self.noise, self.scores = on_draw, noise, scores

    def draw(self, generator):
        self.draws += 1
        x = torch.randn(16, 3, generator=generator)
        return x if self.on_draw is None else self.on_draw(self.draws, x)

    def loss(self, x, generator):
        noise = self.noise * torch.randn(len(x), generator=generator)
        return (self.network(x)[:, 0] - x @ TRUTH + noise).square().mean()

    def held_out(self):
        assert not self.network.training
        assert not torch.is_grad_enabled()
        self.looks += 1
        if self.scores is not None:
            return self.scores[self.looks - 1]
        return float((self.network(CHECK)[:, 0] - CHECK @ TRUTH).square().mean())

    def train(self, plan=PLAN, folder=None, seed=0):
        return train_network(
            self.network, name="toy", draw=self.draw, loss=self.loss, held_out=self.held_out,
            plan=plan, seed=seed, device="cpu", folder=folder,
        )  # fmt: skip

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.network.parameters()])


def interrupt_at(number):
    def on_draw(count, x):
        if count == number:
            raise RuntimeError("killed")
        return x

    return on_draw


def forbid(_, x):
    raise AssertionError("a step was taken")


def test_learns_a_regression():
    toy = Toy()
    first = float((toy.network(CHECK)[:, 0] - CHECK @ TRUTH).detach().square().mean())
    trained = toy.train(Plan(300, 0.1, every=50, half=False))
    assert trained.best < 1e-3 * first
    assert toy.weights() == pytest.approx(torch.cat([TRUTH, torch.zeros(1)]), abs=0.03)
    assert (trained.steps, trained.rejected, trained.stop_reason) == (300, 0, "all steps")
    assert [row["step"] for row in trained.curve] == [50, 100, 150, 200, 250, 300]
    assert trained.curve[-1]["loss"] < 0.01 * trained.curve[0]["loss"]
    assert not toy.network.training


def test_steps_that_are_not_a_multiple_of_the_looks():
    toy = Toy()
    trained = toy.train(Plan(50, 0.1, every=20, half=False))
    assert (trained.steps, toy.draws) == (50, 50)
    assert [row["step"] for row in trained.curve] == [20, 40, 50]


def test_it_ends_in_the_state_with_the_best_score():
    """The best of six looks is the third."""
    toy = Toy(scores=[9.0, 5.0, 1.0, 4.0, 3.0, 2.0])
    seen = []
    look = toy.held_out
    toy.held_out = lambda: seen.append(toy.weights().clone()) or look()
    trained = toy.train()
    assert trained.best == 1.0
    assert torch.equal(toy.weights(), seen[2])
    assert not torch.equal(seen[2], seen[5])


def test_same_seed_same_weights_and_another_seed_others():
    toys = [Toy(noise=0.3) for _ in range(3)]
    for toy, seed in zip(toys, (0, 0, 1), strict=True):
        toy.train(seed=seed)
    assert torch.equal(toys[0].weights(), toys[1].weights())
    assert not torch.equal(toys[0].weights(), toys[2].weights())


@pytest.mark.parametrize("killed_at", [41, 75, 115])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path, killed_at):
    whole = Toy(noise=0.3)
    expected = whole.train()
    killed = Toy(interrupt_at(killed_at), noise=0.3)
    with pytest.raises(RuntimeError, match="killed"):
        killed.train(folder=tmp_path / "a")
    resumed = Toy(noise=0.3)
    trained = resumed.train(folder=tmp_path / "a")
    assert resumed.draws == 120 - (killed_at - 1) // 20 * 20
    assert trained == expected
    assert torch.equal(resumed.weights(), whole.weights())


def test_a_killed_training_goes_on_from_a_plateau(tmp_path):
    """The newest state counts, not the one with the best score."""
    scores = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError, match="killed"):
        Toy(interrupt_at(90), scores=scores).train(folder=tmp_path)
    resumed = Toy(scores=scores[4:])
    trained = resumed.train(folder=tmp_path)
    assert resumed.draws == 40
    assert [row["held_out"] for row in trained.curve] == scores
    assert trained.best == 1.0


@pytest.mark.parametrize("early", [False, True])
def test_a_finished_training_is_not_done_again(tmp_path, early):
    scores = [2.0, 1.0, 3.0, 3.0, 3.0, 3.0]
    plan = Plan(120, 0.1, every=20, patience=2 if early else 9, half=False)
    first = Toy(scores=scores)
    expected = first.train(plan, tmp_path)
    again = Toy(forbid, scores=[])
    assert again.train(plan, tmp_path) == expected
    assert torch.equal(again.weights(), first.weights())
    assert expected.steps == (80 if early else 120)


def test_a_step_that_is_not_finite_is_left_out():
    def spoil(count, x):
        return x * torch.nan if count in (5, 30, 31) else x

    toy = Toy(spoil)
    trained = toy.train()
    assert (trained.steps, trained.rejected) == (117, 3)
    assert torch.isfinite(toy.weights()).all()
    assert trained.best < 0.05


def test_a_step_that_is_left_out_leaves_no_trace_in_running_statistics():
    """The forward pass has written them before the loss is known."""
    toy = Toy(lambda count, x: x * torch.nan if count == 30 else x)
    toy.network = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    trained = toy.train()
    assert (trained.steps, trained.rejected) == (119, 1)
    assert all(np.isfinite(row["held_out"]) for row in trained.curve)
    assert torch.isfinite(toy.network[0].running_var).all()
    assert (int(toy.network[0].num_batches_tracked) + 1) % 20 == 0  # one less than at a look


def test_twenty_such_steps_in_a_row_end_the_training():
    toy = Toy(lambda count, x: x * torch.inf if count > 30 else x)
    with pytest.raises(HarmonyError, match=r"20 steps in a row.*--random-seed"):
        toy.train()
    assert toy.draws in (50, 51)  # the loader may be one batch ahead
    nineteen = Toy(lambda count, x: x * torch.inf if 30 < count < 50 else x)
    assert nineteen.train().rejected == 19


def test_held_out_scores_that_are_never_finite_are_an_error():
    with pytest.raises(HarmonyError, match=r"training of the toy .*--max-time"):
        Toy(scores=[float("nan")] * 6).train()
    some = Toy(scores=[float("nan"), float("inf"), 2.0, float("nan"), 3.0, 4.0])
    assert some.train().best == 2.0


def slow(count, x):
    time.sleep(0.01)
    return x


def test_the_time_limit_ends_it_and_a_larger_one_goes_on(tmp_path):
    plan = Plan(2000, 0.1, every=20, half=False)
    first = Toy(slow).train(plan.with_limit(0.5 / 60), tmp_path)
    assert first.stop_reason == "time limit"
    assert 0 < first.steps < 60
    assert Toy(forbid).train(plan.with_limit(0.5 / 60), tmp_path) == first
    more = Toy(slow).train(plan.with_limit(0.8 / 60), tmp_path)
    assert more.stop_reason == "time limit"
    assert first.steps < more.steps < first.steps + 40
    assert more.curve[: len(first.curve)] == first.curve


def test_one_step_is_taken_however_short_the_time():
    toy = Toy()
    trained = toy.train(PLAN.with_limit(1e-6))
    assert (trained.steps, trained.stop_reason) == (1, "time limit")


def test_it_stops_early_when_the_score_no_longer_improves():
    toy = Toy(scores=[3.0, 2.0, 2.5, 2.5, 2.5, 0.0])
    trained = toy.train(Plan(120, 0.1, every=20, patience=3, half=False))
    assert trained.stop_reason == "held-out score no longer improves"
    assert (trained.steps, trained.best) == (100, 2.0)


def test_no_files_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Toy().train()
    assert list(tmp_path.iterdir()) == []


def test_one_checkpoint_in_the_folder(tmp_path):
    Toy().train(folder=tmp_path / "below" / "a")
    assert [p.name for p in (tmp_path / "below" / "a").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("broken", [True, False], ids=["broken", "of another network"])
def test_a_checkpoint_that_does_not_fit_is_told_and_left(tmp_path, caplog, broken):
    if broken:
        (tmp_path / "last.ckpt").write_bytes(b"half of a file")
    else:
        other = Toy()
        other.network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        other.train(folder=tmp_path)
    toy, alone = Toy(), Toy()
    assert toy.train(folder=tmp_path).steps == alone.train().steps
    assert torch.equal(toy.weights(), alone.weights())
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "the training starts anew" in line
    assert str(tmp_path / "last.ckpt") in line


def test_lightning_is_silent_and_the_network_has_its_name(tmp_path, capfd, caplog, recwarn):
    caplog.set_level(logging.INFO, "bids_harmony")
    Toy().train(folder=tmp_path)
    Toy().train(folder=tmp_path)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert [w for w in recwarn if "lightning" in w.filename] == []
    assert {r.name for r in caplog.records} == {"bids_harmony"}
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 6
    assert all(line.startswith("training toy: step ") for line in lines)


def test_an_interrupt_stays_an_interrupt(tmp_path):
    def press(count, x):
        if count == 50:
            os.kill(os.getpid(), signal.SIGINT)
        return x

    # a shell's background job ignores interrupts, and so would this test there
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Toy(press).train(folder=tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    resumed = Toy()
    assert resumed.train(folder=tmp_path).steps == 120
    assert resumed.draws == 80


def test_several_tasks_of_slurm_are_one_process(monkeypatch):
    for key, value in {
        "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "x", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    assert Toy().train().steps == 120


def test_the_key_of_weights_is_that_of_the_weights_alone():
    torch.manual_seed(1)
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert fit.weights_key(first) != fit.weights_key(second)
    second.load_state_dict(first.state_dict())
    assert fit.weights_key(first) == fit.weights_key(second)


@pytest.mark.parametrize(
    ("device", "wanted"), [("cpu", 1), ("cuda", [0]), ("cuda:0", [0]), ("cuda:3", [3])]
)
def test_the_gpu_that_was_asked_for(device, wanted):
    assert loop._devices(device) == wanted


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs Linux")
def test_half_precision_is_used_where_the_processor_has_it():
    """PyTorch says yes to processors, too, on which it imitates bfloat16 at twice the time."""
    flags = Path("/proc/cpuinfo").read_text().split()
    assert loop._fast_half("cpu") == bool({"avx512_bf16", "amx_bf16"} & set(flags))


class Game(torch.nn.Module):
    """A guess that follows a target, and a judge that follows the guess."""

    def __init__(self):
        super().__init__()
        self.guess = torch.nn.Parameter(torch.zeros(()))
        self.judge = torch.nn.Linear(1, 1, bias=False)
        self.drop = torch.nn.Dropout(0.3)
        torch.nn.init.zeros_(self.judge.weight)


def play(folder=None, seed=0, on_draw=None, plan=PLAN):
    game, drawn, grads = Game(), [], []

    def draw(generator):
        drawn.append(float(torch.rand((), generator=generator)))
        if on_draw == len(drawn):
            raise RuntimeError("killed")
        return torch.tensor(drawn[-1])

    def loss(batch, generator):
        grads.append(game.judge.weight.requires_grad)
        return (game.guess - 2).square() + 0 * (game.judge.weight.sum() + batch)

    def against(batch, generator):
        away = game.judge.weight.squeeze() - 3 * game.guess.detach()
        return away.square() + 1e-3 * game.drop(game.judge.weight).sum() + 0 * batch

    adversary = Adversary(game.judge, against, steps=3, rate=0.2)
    run = train_network(
        game, name="game", draw=draw, loss=loss,
        held_out=lambda: float((game.guess - 2).abs().detach()), plan=plan,
        seed=seed, device="cpu", folder=folder, adversary=adversary,
    )  # fmt: skip
    return game, run, drawn, grads


def test_an_adversary_has_turns_batches_and_a_rate_of_its_own():
    game, run, drawn, grads = play()
    assert run.steps == PLAN.steps
    assert len(drawn) == len(set(drawn)) == 4 * PLAN.steps
    assert not any(grads), "the judge must not be moved by the loss of the rest"
    assert float(game.guess.detach()) == pytest.approx(2, abs=0.05)
    assert float(game.judge.weight.detach()) == pytest.approx(6, abs=0.5)
    assert game.judge.weight.requires_grad


def test_a_part_that_is_never_finite_is_noticed_beside_one_that_is():
    game = Game()
    adversary = Adversary(game.judge, lambda batch, _: game.judge.weight.sum() * 0, steps=3)
    with pytest.raises(HarmonyError, match="20 steps in a row were not finite"):
        train_network(
            game, name="game", draw=lambda generator: torch.zeros(()),
            loss=lambda batch, _: game.guess * float("nan"), held_out=lambda: 1.0, plan=PLAN,
            seed=0, device="cpu", folder=None, adversary=adversary,
        )  # fmt: skip


def test_a_killed_game_goes_on(tmp_path):
    whole, run, *_ = play()
    with pytest.raises(RuntimeError, match="killed"):
        play(tmp_path, on_draw=4 * 50)
    again, resumed, drawn, _ = play(tmp_path)
    assert len(drawn) == 4 * (PLAN.steps - 40), "from the last checkpoint"
    assert resumed.curve == run.curve
    assert float(again.judge.weight) == float(whole.judge.weight)


def test_weight_decay_pulls_to_zero():
    from dataclasses import replace

    plain, *_ = play()
    decayed, *_ = play(plan=replace(PLAN, weight_decay=0.5))
    assert float(decayed.guess) < float(plain.guess) - 0.05
