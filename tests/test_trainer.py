"""A run that is killed, stopped or goes wrong loses nothing that was promised."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer import TrainConfig, fit, learning_rate

CONFIG = TrainConfig(steps=12, batch=4, lr=0.05, warmup=3, save_every=4, seed=7)


def task(hurt=None):
    """A regression with dropout and noise; hurt(step, loss) -> loss may spoil a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 1))

    def loss_of_step(step, generator):
        x = torch.randn(CONFIG.batch, 3, generator=generator)
        loss = (model(x)[:, 0] - x.sum(dim=1)).pow(2).mean()
        return hurt(step, loss) if hurt else loss

    return dict(model.named_parameters()), loss_of_step


def run(checkpoint, hurt=None, config=CONFIG):
    parameters, loss_of_step = task(hurt)
    return parameters, fit(parameters, loss_of_step, config, checkpoint, "test")


def same(first, second):
    (first_parameters, first_losses), (second_parameters, second_losses) = first, second
    assert first_losses == second_losses
    assert all(torch.equal(first_parameters[name], second_parameters[name]) for name in first_parameters)


def at(step, action):
    """A hurt that acts at one step only."""
    return lambda now, loss: action(loss) if now == step else loss


def interrupt(loss):
    os.kill(os.getpid(), signal.SIGINT)  # what Ctrl-C sends
    return loss


def kill(loss):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def whole(tmp_path):
    return run(tmp_path / "whole.pt")


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, whole):
    checkpoint = tmp_path / "run.pt"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    died = subprocess.run([sys.executable, __file__, str(checkpoint)], env=environment, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert len(torch.load(checkpoint, weights_only=True)["losses"]) == 4  # killed at step 6, saved at 4
    same(run(checkpoint), whole)


@pytest.mark.parametrize("step", [0, 5, 11])
def test_ctrl_c_saves_the_very_step_and_the_run_goes_on_bit_for_bit(tmp_path, whole, step):
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(SystemExit, match="stopped at step") as stop:
        run(checkpoint, at(step, interrupt))
    done = len(torch.load(checkpoint, weights_only=True)["losses"])
    assert done in (step, step + 1) and f"stopped at step {done};" in stop.value.code
    same(run(checkpoint), whole)


def test_ctrl_c_within_the_optimizer_s_step_counts_no_step_twice(tmp_path, whole, monkeypatch):
    checkpoint, steps, real = tmp_path / "run.pt", [], torch.optim.AdamW.step

    def step_then_interrupt(self, *arguments):
        real(self, *arguments)
        steps.append(None)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_then_interrupt)
    with pytest.raises(SystemExit, match="stopped at step"):
        run(checkpoint)
    monkeypatch.undo()
    same(run(checkpoint), whole)


def test_a_finished_run_is_not_trained_again(tmp_path, whole):
    def never(step, loss):
        raise AssertionError(f"step {step} ran again")

    same(run(tmp_path / "whole.pt", never), whole)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_with_the_weights_before_it(tmp_path, bad):
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(SystemExit, match=f"loss is {bad} at step 6"):
        run(checkpoint, at(6, lambda loss: loss * bad))
    saved = torch.load(checkpoint, weights_only=True)
    assert len(saved["losses"]) == 6
    assert all(torch.isfinite(tensor).all() for tensor in saved["parameters"].values())


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(SystemExit, match="at step 6"):
        run(checkpoint, at(6, lambda loss: loss + (loss - loss.detach()).sqrt()))  # finite, its slope is not
    assert all(torch.isfinite(tensor).all() for tensor in torch.load(checkpoint, weights_only=True)["parameters"].values())


@pytest.mark.parametrize("other", [{"lr": 0.01}, {"seed": 8}, {"steps": 20}, {"schedule": "linear"}])
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, whole, other):
    config = TrainConfig(**{**vars(CONFIG), **other})
    with pytest.raises(ValueError, match="whole.pt.*other settings"):
        run(tmp_path / "whole.pt", config=config)


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path, whole):
    with pytest.raises(ValueError, match="whole.pt.*other settings"):
        fit({"weight": nn.Parameter(torch.zeros(2))}, lambda step, generator: None, CONFIG, tmp_path / "whole.pt", "test")


def test_half_a_checkpoint_left_by_a_kill_does_not_matter(tmp_path, whole):
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(SystemExit):
        run(checkpoint, at(5, interrupt))
    (tmp_path / "run.pt.tmp").write_bytes(checkpoint.read_bytes()[:100])
    same(run(checkpoint), whole)
    assert not (tmp_path / "run.pt.tmp").exists()


def test_training_lowers_the_loss(tmp_path):
    _, losses = run(tmp_path / "long.pt", config=TrainConfig(steps=150, batch=4, lr=0.05, warmup=3))
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


@pytest.mark.parametrize("schedule, expected", [("cosine", [0.2, 0.4, 1.0, 1.0, 0.5, 0.0]), ("linear", [0.2, 0.4, 1.0, 1.0, 0.5, 0.0])])
def test_learning_rate_warms_up_and_falls_to_zero(schedule, expected):
    config = TrainConfig(steps=25, batch=1, lr=2.0, warmup=5, schedule=schedule)
    rates = [learning_rate(step, config) / 2.0 for step in (0, 1, 4, 5, 15, 25)]
    assert rates == pytest.approx(expected)


def test_cosine_lies_above_the_line_at_first_and_below_at_last():
    cosine, linear = (TrainConfig(steps=25, batch=1, lr=1.0, warmup=5, schedule=s) for s in ("cosine", "linear"))
    assert learning_rate(10, cosine) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(10, linear) == pytest.approx(0.75)
    assert learning_rate(20, cosine) < learning_rate(20, linear)


if __name__ == "__main__":  # the run that test_a_killed_run_goes_on_bit_for_bit kills
    run(Path(sys.argv[1]), at(6, kill))
