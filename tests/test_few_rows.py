"""Few rows through large weights: the layer's numbers, and the fast path where it is promised."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from checkpoints.lm import load_lm, save_lm
from checkpoints.model import random_pieces
from checkpoints.sizes import LM_SIZES
from diffusion_lm import DiffusionLM, LMConfig
from speed.few_rows import FEW_ROWS, LARGE, STRIPE, FewRowsLinear, use_few_rows

WIDTH = 512
# Its unembedding is large, its other layers are not.
CONFIG = LMConfig(
    width=32, n_layers=1, n_heads=2, ffn=48, vocab=LARGE // 32 + 1, mask_id=1, end_id=2
)


def layer(out=LARGE // WIDTH, **options):
    torch.manual_seed(0)
    return nn.Linear(WIDTH, out, bias=False, **options)


def fast(plain):
    """The same weight in a layer of its own, with the fast path."""
    made = FewRowsLinear(plain.in_features, plain.out_features, bias=False, device="meta")
    made.weight = plain.weight
    return made


@pytest.fixture
def plain_calls(monkeypatch):
    """The shapes of what goes through nn.Linear's own forward."""
    shapes = []
    forward = nn.Linear.forward

    def counted(self, x):
        shapes.append(tuple(x.shape))
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    return shapes


@torch.no_grad()
@pytest.mark.parametrize("rows", [(2,), (1, FEW_ROWS), (4, 16), (FEW_ROWS + 1,), (1, 1)])
@pytest.mark.parametrize("out", [2 * STRIPE + 3, LARGE // WIDTH, 10])
def test_the_numbers_are_the_layers(rows, out):
    plain = layer(out)
    x = torch.randn(*rows, WIDTH)
    ours = fast(plain)(x)
    expected = x.double() @ plain.weight.double().t()
    assert ours.shape == expected.shape and ours.dtype == torch.float32
    assert (ours - expected).abs().max().item() < 1e-5


def test_the_gradients_are_the_layers():
    plain = layer()
    x = torch.randn(3, WIDTH, requires_grad=True)
    fast(plain)(x).sum().backward()
    assert torch.allclose(x.grad, plain.weight.sum(dim=0).expand(3, -1), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rows", [(2,), (FEW_ROWS,), (1, 2), (4, 16)])
def test_few_rows_take_the_fast_path(plain_calls, rows):
    fast(layer())(torch.randn(*rows, WIDTH))
    assert plain_calls == []


@torch.no_grad()
@pytest.mark.parametrize("rows", [(1,), (1, 1), (FEW_ROWS + 1,), (5, 13), (0,)])
def test_one_row_and_many_rows_take_the_plain_path(plain_calls, rows):
    fast(layer())(torch.randn(*rows, WIDTH))
    assert plain_calls == [(*rows, WIDTH)]


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}]
)
def test_other_dtypes_and_devices_take_the_plain_path(plain_calls, options):
    fast(layer(**options))(torch.ones(3, WIDTH, **options))
    assert plain_calls == [(3, WIDTH)]


def test_training_takes_the_plain_path(plain_calls):
    fast(layer())(torch.randn(3, WIDTH))
    assert plain_calls == [(3, WIDTH)]


@pytest.mark.parametrize("tied", [False, True])
def test_only_large_layers_without_a_bias_are_replaced_and_nothing_is_renamed(tied):
    lm = DiffusionLM(replace(CONFIG, tied=tied))
    lm.extra = nn.Linear(WIDTH, LARGE // WIDTH)  # large, with a bias
    before = dict(lm.named_parameters())
    assert use_few_rows(lm) is lm
    changed = [name for name, module in lm.named_modules() if type(module) is FewRowsLinear]
    after = dict(lm.named_parameters())
    assert changed == ["unembedding"]
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert (lm.unembedding.weight is lm.embedding.weight) == tied
    unembedding = lm.unembedding
    assert use_few_rows(lm).unembedding is unembedding


@torch.no_grad()
def test_a_loaded_lm_takes_the_fast_path_and_gives_the_plain_logits(tmp_path, plain_calls):
    torch.manual_seed(0)
    plain = DiffusionLM(CONFIG)
    save_lm(plain, tmp_path)
    loaded = load_lm(tmp_path)
    assert type(loaded.unembedding) is FewRowsLinear
    hidden = plain(torch.randn(1, 7, CONFIG.width))
    plain_calls.clear()
    logits = loaded.head(hidden)
    assert plain_calls == []
    assert torch.allclose(logits, plain.head(hidden), atol=1e-5)


def test_an_lm_of_random_weights_has_the_fast_path(monkeypatch):
    monkeypatch.setitem(LM_SIZES, "toy", CONFIG)
    _, lm = random_pieces("toy+toy")
    assert isinstance(lm.unembedding, FewRowsLinear)


@torch.no_grad()
def test_the_fast_path_compiles_as_one_graph():
    ours = fast(layer())
    x = torch.randn(3, WIDTH)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), ours(x))
