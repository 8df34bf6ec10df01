"""A run that is killed, stopped or goes wrong loses nothing that was promised."""

import math
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from training.flops import Work
from training.loop import fit
from training.optimizers import TrainConfig, learning_rate
from training.run_files import checkpoints, load_newest, minutes_of, read_metrics

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


def run(checkpoint, hurt=None, config=CONFIG, **options):
    parameters, loss_of_step = task(hurt)
    return parameters, fit(parameters, loss_of_step, config, checkpoint, "test", **options)


def same(first, second):
    (first_parameters, first_losses), (second_parameters, second_losses) = first, second
    assert first_losses == second_losses
    assert all(
        torch.equal(first_parameters[name], second_parameters[name]) for name in first_parameters
    )


def at(step, action):
    """A hurt that acts at one step only."""
    return lambda now, loss: action(loss) if now == step else loss


def interrupt(loss):
    os.kill(os.getpid(), signal.SIGINT)  # what Ctrl-C sends
    return loss


def fail(loss):
    raise ValueError("this step fails")


def kill(loss):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def whole(tmp_path):
    return run(tmp_path / "whole.pt")


@pytest.mark.long
def test_a_killed_run_resumes_bit_for_bit(tmp_path, whole):
    checkpoint = tmp_path / "run.pt"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    died = subprocess.run(
        [sys.executable, __file__, str(checkpoint)], env=environment, capture_output=True
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert len(load_newest(checkpoint)["losses"]) == 4  # killed at step 6, saved at 4
    same(run(checkpoint), whole)


def test_minutes_add_up_over_all_processes_of_a_run_and_its_phases(tmp_path):
    checkpoint = tmp_path / "first.pt"
    with pytest.raises(SystemExit, match="stopped at step"):
        run(checkpoint, at(2, interrupt))

    # As if the first process had taken an hour.
    newest = checkpoints(checkpoint)[0]
    torch.save(load_newest(checkpoint) | {"minutes": 60.0}, newest)
    run(checkpoint)
    run(tmp_path / "second.pt")
    assert 60 < minutes_of(tmp_path, ["first"]) < 61
    assert 60 < minutes_of(tmp_path, ["first", "second", "absent"]) < 61


@pytest.mark.parametrize("step", [0, 5, 11])
def test_ctrl_c_saves_the_very_step_and_the_run_resumes_bit_for_bit(tmp_path, whole, step):
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(SystemExit, match="stopped at step") as stop:
        run(checkpoint, at(step, interrupt))
    done = len(load_newest(checkpoint)["losses"])
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
    saved = load_newest(checkpoint)
    assert len(saved["losses"]) == 6
    assert all(torch.isfinite(tensor).all() for tensor in saved["parameters"].values())


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(SystemExit, match="at step 6"):
        run(
            checkpoint, at(6, lambda loss: loss + (loss - loss.detach()).sqrt())
        )  # finite, its slope is not
    assert all(
        torch.isfinite(tensor).all() for tensor in load_newest(checkpoint)["parameters"].values()
    )


@pytest.mark.parametrize(
    "other", [{"lr": 0.01}, {"seed": 8}, {"steps": 20}, {"schedule": "linear"}]
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, whole, other):
    config = TrainConfig(**{**vars(CONFIG), **other})
    with pytest.raises(ValueError, match="whole was made by a run with other settings"):
        run(tmp_path / "whole.pt", config=config)


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path, whole):
    with pytest.raises(ValueError, match="whole was made by a run with other settings"):
        fit(
            {"weight": nn.Parameter(torch.zeros(2))},
            lambda step, generator: None,
            CONFIG,
            tmp_path / "whole.pt",
            "test",
        )


def test_a_checkpoint_of_another_model_or_corpus_is_refused_and_what_differs_is_said(tmp_path):
    run(tmp_path / "run.pt", identity={"lm": "one", "corpus": "first"})
    run(tmp_path / "run.pt", identity={"lm": "one", "corpus": "first"})
    with pytest.raises(ValueError, match="corpus was 'first', now is 'second'") as error:
        run(tmp_path / "run.pt", identity={"lm": "one", "corpus": "second"})
    assert "lm was" not in str(error.value)


def test_what_a_result_does_not_depend_on_may_change_on_resume(tmp_path, whole):
    same(
        run(tmp_path / "whole.pt", config=replace(CONFIG, save_every=3, keep=5, validate_every=2)),
        whole,
    )


def test_a_checkpoint_with_the_first_names_of_settings_and_parameters_resumes(tmp_path, whole):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Linear(3, 4)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention()
            self.mlp_norm = nn.LayerNorm(4)

    config = replace(CONFIG, steps=8)

    def lm(checkpoint, stop_at=None):
        torch.manual_seed(0)
        model = nn.ModuleDict({"blocks": nn.ModuleList([Block()])})
        (block,) = model["blocks"]

        def loss_of_step(step, generator):
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            x = torch.randn(2, 3, generator=generator)
            return block.mlp_norm(block.attn.query(x)).pow(3).mean()

        return dict(model.named_parameters()), fit(
            dict(model.named_parameters()), loss_of_step, config, checkpoint, "test"
        )

    expected = lm(tmp_path / "expected.pt")
    with pytest.raises(SystemExit):
        lm(tmp_path / "old.pt", stop_at=3)
    (file,) = checkpoints(tmp_path / "old.pt")
    saved = torch.load(file, weights_only=True)
    assert {"blocks.0.query.weight", "blocks.0.ffn_norm.weight"} <= saved["parameters"].keys()
    assert "shape of blocks.0.query.weight" in saved["run"]

    # As the first runs wrote it.
    saved["run"]["inherited"] = saved["run"].pop("pretrained_lr_scale")
    for optimizer in saved["optimizers"]:
        for group in optimizer["param_groups"]:
            group["share"] = group.pop("lr_scale")
    torch.save(saved, file)
    same(lm(tmp_path / "old.pt"), expected)


def test_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path / "run.pt", config=replace(CONFIG, save_every=2, keep=3))
    assert [file.name for file in checkpoints(tmp_path / "run.pt")] == [
        f"run-000000{n}.pt" for n in ("12", "10", "08")
    ]


def cut(file):
    file.write_bytes(file.read_bytes()[:-200])


def flip(file):
    data = bytearray(file.read_bytes())
    weights = load_newest(file.with_name("run.pt"))["parameters"]["0.weight"].numpy().tobytes()
    data[data.index(weights)] ^= 1  # the last bit of one weight: only the checksum tells
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, lambda file: file.write_bytes(b"")])
def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(
    tmp_path, whole, damage, capsys
):
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(SystemExit):
        run(checkpoint, at(9, interrupt))
    damage(checkpoints(checkpoint)[0])
    same(run(checkpoint), whole)
    printed = capsys.readouterr()
    assert (
        "run-00000010.pt is damaged" in printed.out + printed.err
        and "resumes from step 8" in printed.out + printed.err
    )


def test_a_run_whose_checkpoints_are_all_damaged_is_not_silently_begun_anew(tmp_path, whole):
    for file in checkpoints(tmp_path / "whole.pt"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="every checkpoint is damaged; remove whole-00000012.pt"):
        run(tmp_path / "whole.pt")


def test_a_full_disk_stops_the_run_and_leaves_the_old_checkpoint_whole(tmp_path, whole):
    checkpoint, limits = tmp_path / "run.pt", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(loss):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may grow further
        return loss

    try:
        with pytest.raises(
            SystemExit,
            match="run-00000008.pt: cannot be saved.*run-00000004.pt is intact; make room",
        ):
            run(checkpoint, at(6, fill_the_disk))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.glob("run*")] == ["run-00000004.pt"]
    same(run(checkpoint), whole)


def test_a_polite_kill_saves_first_as_ctrl_c_does(tmp_path, whole):
    def ask(loss):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with pytest.raises(SystemExit, match="stopped at step 6;"):
        run(tmp_path / "run.pt", at(5, ask))
    same(run(tmp_path / "run.pt"), whole)


def test_parts_of_a_batch_add_up_to_it(tmp_path):
    """Gradient accumulation: the same loss and weights, but for rounding."""
    config = replace(CONFIG, batch=8)

    def parts(n):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)

        def loss_of_step(step, generator):
            x = torch.randn(8, 3, generator=generator)
            for part in x.split(8 // n):
                yield (model(part)[:, 0] - part.sum(dim=1)).pow(2).sum() / 8

        return dict(model.named_parameters()), fit(
            dict(model.named_parameters()), loss_of_step, config, tmp_path / f"{n}.pt", "test"
        )

    whole, split = parts(1), parts(4)
    assert split[1] == pytest.approx(whole[1], rel=1e-5)
    assert all(torch.allclose(split[0][name], whole[0][name], atol=1e-6) for name in whole[0])


def test_a_bad_loss_names_the_items_of_its_batch(tmp_path):
    with pytest.raises(SystemExit, match="its items: clip 6, clip 7"):
        run(
            tmp_path / "run.pt",
            at(6, lambda loss: loss * math.nan),
            names_of_step=lambda step: [f"clip {step}", f"clip {step + 1}"],
        )


def test_it_saves_before_it_validates_and_validates_again_what_a_kill_cut_short(tmp_path, whole):
    checkpoint, metrics, config = (
        tmp_path / "run.pt",
        tmp_path / "metrics.jsonl",
        replace(CONFIG, save_every=100, validate_every=5),
    )

    def dies():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, config=config, validate=dies, metrics=metrics)
    assert len(load_newest(checkpoint)["losses"]) == 5
    same(run(checkpoint, config=config, validate=lambda: {"loss": 1.0}, metrics=metrics), whole)
    assert [r["step"] for r in read_metrics(metrics) if "validation" in r] == [5, 10, 12]


def test_the_best_validation_is_kept(tmp_path):
    losses, kept = iter([3.0, 1.0, 2.0, 0.5]), []
    values = []

    def validate():
        values.append(next(losses))
        return {"loss": values[-1]}

    config = replace(CONFIG, validate_every=3)
    run(
        tmp_path / "run.pt",
        config=config,
        validate=validate,
        keep_best=lambda: kept.append(values[-1]),
        metrics=tmp_path / "m.jsonl",
    )
    assert kept == [3.0, 1.0, 0.5]


def test_metrics_of_a_resumed_run_are_those_of_a_whole_one(tmp_path):
    def numbers(name):
        return [
            {k: r[k] for k in ("step", "loss", "lr", "gradient_norm")}
            for r in read_metrics(tmp_path / f"{name}.jsonl")
        ]

    config = TrainConfig(steps=40, batch=4, lr=0.05, warmup=3, save_every=8)
    run(tmp_path / "whole.pt", config=config, metrics=tmp_path / "whole.jsonl", work=Work())
    with pytest.raises(ValueError):  # after a record at 30 that no checkpoint covers
        run(tmp_path / "run.pt", at(31, fail), config, metrics=tmp_path / "run.jsonl")
    with open(tmp_path / "run.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # cut short by a kill
    run(tmp_path / "run.pt", config=config, metrics=tmp_path / "run.jsonl")
    assert numbers("run") == numbers("whole")
    assert [r["step"] for r in read_metrics(tmp_path / "whole.jsonl")] == [10, 20, 30, 40]


def test_half_a_checkpoint_left_by_a_kill_does_not_matter(tmp_path, whole):
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(SystemExit):
        run(checkpoint, at(5, interrupt))
    (tmp_path / "run-00000008.pt.tmp").write_bytes(checkpoints(checkpoint)[0].read_bytes()[:100])
    same(run(checkpoint), whole)


def test_training_lowers_the_loss(tmp_path):
    _, losses = run(tmp_path / "long.pt", config=TrainConfig(steps=150, batch=4, lr=0.05, warmup=3))
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


@pytest.mark.parametrize(
    "schedule, expected",
    [("cosine", [0.2, 0.4, 1.0, 1.0, 0.5, 0.0]), ("linear", [0.2, 0.4, 1.0, 1.0, 0.5, 0.0])],
)
def test_learning_rate_warms_up_and_falls_to_zero(schedule, expected):
    config = TrainConfig(steps=25, batch=1, lr=2.0, warmup=5, schedule=schedule)
    rates = [learning_rate(step, config) / 2.0 for step in (0, 1, 4, 5, 15, 25)]
    assert rates == pytest.approx(expected)


def test_cosine_lies_above_the_line_at_first_and_below_at_last():
    cosine, linear = (
        TrainConfig(steps=25, batch=1, lr=1.0, warmup=5, schedule=s) for s in ("cosine", "linear")
    )
    assert learning_rate(10, cosine) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(10, linear) == pytest.approx(0.75)
    assert learning_rate(20, cosine) < learning_rate(20, linear)


if __name__ == "__main__":  # the run that test_a_killed_run_resumes_bit_for_bit kills
    run(Path(sys.argv[1]), at(6, kill))
