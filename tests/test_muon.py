"""Muon moves matrices by orthogonal steps; AdamW moves the rest; a run resumes with both."""

from dataclasses import replace

import pytest
import torch
from test_trainer import CONFIG, at, interrupt
from torch import nn

from training.loop import fit
from training.muon import ADAM_SIZE, MOMENTUM, Muon, orthogonal
from training.optimizers import make_optimizers

MUON = replace(CONFIG, optimizer="muon")


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 20), (2, 20, 6)])
def test_orthogonal_keeps_the_singular_vectors_and_makes_the_values_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, _, V = torch.linalg.svd(matrices, full_matrices=False)
    turned = U.mT @ orthogonal(matrices) @ V.mT  # diagonal, if the vectors are the same
    values = turned.diagonal(dim1=1, dim2=2)
    assert (turned - torch.diag_embed(values)).abs().max() < 1e-5  # of norm + 1e-7
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_agrees_with_torch_s_own_in_its_precision():
    """torch.optim.Muon does its polynomial in bfloat16, so the moves are alike, not the same."""
    torch.manual_seed(0)
    mine, theirs = (nn.Parameter(torch.ones(12, 20)) for _ in range(2))
    ours = Muon([mine], lr=0.01, weight_decay=0.1)
    torch_s = torch.optim.Muon(
        [theirs], lr=0.01, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        mine.grad = torch.randn(12, 20)
        theirs.grad = mine.grad.clone()
        ours.step()
        torch_s.step()
    moved, apart = (theirs - 1).norm(), (mine - theirs).norm()
    assert apart < 0.02 * moved


def test_a_convolution_moves_as_a_matrix_by_steps_of_adamw_s_size():
    torch.manual_seed(0)
    gradient, moves = torch.randn(4, 3, 5), []
    for shape in ((4, 15), (4, 3, 5)):
        weight = nn.Parameter(torch.ones(shape))
        weight.grad = gradient.view(shape).clone()
        Muon([weight], lr=0.1, weight_decay=0.0).step()
        moves.append((weight.detach() - 1).flatten())
    assert torch.equal(*moves)
    assert 0.7 * 0.1 * ADAM_SIZE < moves[0].square().mean().sqrt() < 1.2 * 0.1 * ADAM_SIZE


def task():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(8, 1)
    )

    def loss_of_step(step, generator):
        x = torch.randn(CONFIG.batch, 2, 4, generator=generator)
        return (model(x)[:, 0] - x.sum(dim=(1, 2))).pow(2).mean()

    return dict(model.named_parameters()), loss_of_step


def test_a_run_that_was_stopped_resumes_bit_for_bit(tmp_path):
    parameters, loss_of_step = task()
    losses = fit(parameters, loss_of_step, MUON, tmp_path / "whole.pt", "test")
    again, loss_of_step = task()
    hurt = at(5, interrupt)
    with pytest.raises(SystemExit, match="stopped at step"):
        fit(
            again,
            lambda step, generator: hurt(step, loss_of_step(step, generator)),
            MUON,
            tmp_path / "run.pt",
            "test",
        )
    again, loss_of_step = task()
    assert fit(again, loss_of_step, MUON, tmp_path / "run.pt", "test") == losses
    assert all(torch.equal(parameters[name], again[name]) for name in parameters)
    assert losses[-1] < losses[0]


def test_matrices_are_the_weights_that_map_one_width_to_another():
    shapes = {
        "embedding.weight": (9, 4),
        "blocks.0.up.weight": (8, 4),
        "conv1.weight": (4, 4, 3),
        "norm.weight": (4,),
        "positions": (5, 4),
    }
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    optimizers = make_optimizers(parameters, MUON)
    assert [type(optimizer) for optimizer in optimizers] == [Muon, torch.optim.AdamW]
    muon, adamw = (optimizer.param_groups[0]["params"] for optimizer in optimizers)
    assert [p.shape for p in muon] == [(8, 4), (4, 4, 3)] and [p.shape for p in adamw] == [
        (9, 4),
        (4,),
        (5, 4),
    ]
    assert len(make_optimizers(parameters, CONFIG)) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_pretrained_part_takes_its_fraction_of_every_step(tmp_path, optimizer):
    def moved(share, lr_scale_parts):
        torch.manual_seed(0)
        model = nn.ModuleDict({"old": nn.Linear(3, 4), "new": nn.Linear(3, 4)})
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        config = replace(
            CONFIG,
            optimizer=optimizer,
            pretrained_lr_scale=share,
            steps=1,
            warmup=0,
            weight_decay=0.0,
        )

        def loss_of_step(step, generator):
            return sum(part(torch.ones(1, 3)).square().sum() for part in model.values())

        fit(
            dict(model.named_parameters()),
            loss_of_step,
            config,
            tmp_path / f"{share} {lr_scale_parts}.pt",
            "test",
            lr_scale_parts=lr_scale_parts,
        )
        return {name: p.detach() - before[name] for name, p in model.named_parameters()}

    whole, shared = moved(1.0, ("old",)), moved(0.25, ("old",))
    for name, step in whole.items():
        assert step.abs().max() > 0 and torch.allclose(
            shared[name], step * (0.25 if name.startswith("old") else 1.0), atol=1e-7
        )
    assert all(torch.equal(step, moved(0.25, ())[name]) for name, step in whole.items())


def test_an_optimizer_of_another_name_is_refused():
    with pytest.raises(ValueError, match="sgd"):
        make_optimizers(
            {"weight": nn.Parameter(torch.ones(2, 2))}, replace(CONFIG, optimizer="sgd")
        )
