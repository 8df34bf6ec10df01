"""Weights in 8 bits: how far they are from the file's, what they take, and who accepts them."""

import argparse
import json
import math
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import edit_tensors
from test_lora import adapters, copies, hidden, with_lora  # noqa: F401  (fixtures)
from torch import nn

import train_asr
from checkpoints.command_line import add_model_arguments, model_options, settings_of
from checkpoints.files import WeightsError
from checkpoints.lm import load_lm, save_lm
from checkpoints.model import load_diffa, random_pieces, randomize
from checkpoints.sizes import LM_SIZES
from diffa import DIFFA
from diffusion_lm import DiffusionLM, LMConfig
from evaluation import likelihood
from evaluation.answer_files import check_made_by
from speed.few_rows import FewRowsLinear
from speed.int8 import CPU_STRIPE, Int8Linear, int8_layers, to_rows, use_int8, weight_bytes
from speed.joined import JoinedAttention, join

DOCS = Path(__file__).parents[1] / "docs/full-size.md"
CONFIG = LMConfig(width=32, n_layers=2, n_heads=4, ffn=48, vocab=60, mask_id=1, end_id=2)


def taken(weight, bias=None):
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    layer.__class__ = Int8Linear
    layer.take(weight)
    layer.bias = bias
    return layer


# ---- the numbers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_number_is_farther_from_its_weight_than_half_a_step_of_its_row(dtype):
    torch.manual_seed(0)
    sizes = torch.tensor([1e-30, 1e-6, 1e-3, 0.02, 1.0, 100.0, 0.0])[:, None]
    weight = (sizes * torch.randn(7, 500)).to(dtype)
    weight[3, 0] = 5.0  # an outlier makes the steps of its own row coarse, and of no other
    rows, scale = to_rows(weight)
    assert rows.dtype == torch.int8 and scale.dtype == dtype and scale.shape == (7, 1)
    assert rows.amin() >= -127 and rows[3:6].abs().amax(dim=1).eq(127).all()

    error = (rows.double() * scale.double() - weight.double()).abs()
    assert (error <= scale.double() / 2 * (1 + 1e-6)).all()
    assert not rows[-1].any() and scale.isfinite().all()

    # A step is a 127th of the row's largest number, unless the dtype has no such small scale.
    step = weight.abs().amax(dim=1, keepdim=True).double() / 127
    least = torch.finfo(dtype).smallest_normal
    assert (scale.double() <= step.clamp(min=least) * (1 + 2**-8)).all()


@torch.no_grad()
@pytest.mark.parametrize("width", [4096, 12_288])
def test_a_product_of_llada_8b_is_as_far_off_as_rounding_to_steps_predicts(width):
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(256, width)  # all rows of a layer are alike
    x = torch.randn(16, width)
    exact = F.linear(x.double(), weight.double())
    found = ((taken(weight)(x) - exact).norm() / exact.norm()).item()

    # Rounding errors are uniform within a step: their deviation is step / sqrt(12).
    steps = weight.abs().amax(dim=1) / 127
    expected = ((steps.pow(2).mean() / 12).sqrt() / 0.02).item()
    assert found == pytest.approx(expected, rel=0.05) and found < 0.01


@torch.no_grad()
def test_the_logits_of_full_width_blocks_are_no_farther_off_than_by_noise_of_half_a_step():
    shapes = {"n_heads": 8, "n_kv_heads": 4, "head_dim": 128, "ffn": 512, "vocab": 300}
    config = replace(LM_SIZES["llada-8b"], n_layers=2, mask_id=1, end_id=2, **shapes)
    torch.manual_seed(0)
    with torch.device("meta"):
        lm = DiffusionLM(config)
        noisy = DiffusionLM(config)
    randomize(lm, torch.float32, "cpu")
    x = 0.02 * torch.randn(1, 12, config.width)
    exact = lm.head(lm(x))

    # The same weights, and in each layer uniform noise of at most half a step of its row.
    weights = dict(lm.named_parameters())
    for name, weight in weights.items():
        if weight.ndim > 1 and name != "embedding.weight":
            step = weight.abs().amax(dim=1, keepdim=True) / 127
            weights[name] = weight + step * (torch.rand_like(weight) - 0.5)
    disturbed = torch.func.functional_call(noisy, weights, (x,))
    disturbed = F.linear(disturbed, weights["unembedding.weight"])

    for layer in int8_layers(use_int8(lm)).values():
        layer.take(layer.weight)
    rounded = lm.head(lm(x))
    error = ((rounded - exact).norm() / exact.norm()).item()
    by_noise = ((disturbed - exact).norm() / exact.norm()).item()
    assert error < 1.15 * by_noise and error < 0.05


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stripes_are_one_product_with_the_bias(dtype):
    torch.manual_seed(0)
    width = 512
    weight = torch.randn(CPU_STRIPE // width * 2 + 3, width).to(dtype)  # two stripes and a bit
    bias = nn.Parameter(torch.randn(len(weight)).to(dtype))
    layer = taken(weight, bias)
    x = torch.randn(2, 3, width).to(dtype)
    y = layer(x)
    expected = x.double() @ (layer.rows.double() * layer.scale.double()).T + bias.double()
    assert y.dtype == dtype and y.shape == expected.shape
    error = (y - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]


# ---- what a loaded LM holds
@torch.no_grad()
@pytest.mark.parametrize("family", ["llada", "tied", "dream"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_loaded_lm_has_rows_in_every_linear_layer_and_nearly_the_same_states(
    tmp_path, family, dtype
):
    more = {"tied": {"tied": True}, "dream": {"family": "dream", "qkv_bias": True, "shifted": True}}
    torch.manual_seed(0)
    save_lm(DiffusionLM(replace(CONFIG, **more.get(family, {}))), tmp_path, n_shards=2)
    plain = load_lm(tmp_path, dtype)
    lm = load_lm(tmp_path, dtype, int8=True)
    assert type(lm.unembedding) is (nn.Linear if family == "tied" else Int8Linear)
    assert len(int8_layers(lm)) == 2 * 7 + (family != "tied")
    assert not any(name.endswith(("query.weight", "down.weight")) for name in lm.state_dict())
    assert {p.dtype for p in lm.parameters()} == {dtype or torch.float32}

    # The bytes are those that the config promises.
    size = sum(t.nbytes for t in (*lm.parameters(), *lm.buffers()))
    assert size == weight_bytes(lm.config, dtype or torch.float32, True)
    states = plain(plain.embed(torch.arange(9)[None])).float()
    near = lm(lm.embed(torch.arange(9)[None])).float()
    assert ((near - states).norm() / states.norm()) < 0.03 and not torch.equal(near, states)


def test_one_float_weight_at_a_time_is_held_while_an_lm_is_read(tmp_path, monkeypatch):
    save_lm(DiffusionLM(CONFIG), tmp_path)
    held = []
    take = Int8Linear.take

    def watched(layer, weight):
        assert not any(reference() is not None for reference in held)
        held.append(weakref.ref(weight))
        take(layer, weight)

    monkeypatch.setattr(Int8Linear, "take", watched)
    load_lm(tmp_path, torch.bfloat16, int8=True)
    assert len(held) == 15


def test_the_sizes_in_the_docs_are_those_of_the_configs():
    text = DOCS.read_text()
    for size in ("llada-8b", "qwen3-0.6b"):
        plain, eight = (
            weight_bytes(LM_SIZES[size], torch.bfloat16, i) / 1e9 for i in (False, True)
        )
        assert f"| `{size}` | {plain:.2f} GB | {eight:.2f} GB |" in text

    # The formula of docs, by hand: bytes of rows, of scales, and of what stays in 16 bits.
    c = LM_SIZES["llada-8b"]
    linear = c.n_layers * (4 * c.width**2 + 3 * c.width * c.ffn) + c.vocab * c.width
    scales = c.n_layers * (5 * c.width + 2 * c.ffn) + c.vocab
    rest = c.vocab * c.width + (2 * c.n_layers + 1) * c.width
    assert weight_bytes(c, torch.bfloat16, True) == linear + 2 * scales + 2 * rest


def test_weights_that_are_not_finite_are_refused_by_name(toy_dirs, dirs):
    edit_tensors(dirs["llm"], lambda t: t["model.transformer.ff_out.weight"][3].fill_(math.nan))
    with pytest.raises(WeightsError, match=r"transformer.ff_out.weight: it holds NaN"):
        load_lm(dirs["llm"], int8=True)


# ---- the whole model
def test_the_bundled_clips_are_answered_and_the_parts_recognised():
    weights = Path(__file__).parents[1] / "toy/weights"
    plain = DIFFA.from_pretrained(adapters=weights / "stage2")
    eight = DIFFA.from_pretrained(adapters=weights / "stage2", int8=True)
    clips = sorted((weights / "clips").iterdir())
    question = "Please transcribe the speech."
    assert eight.answer(clips, question) == plain.answer(clips, question)

    # Digests are those of the file, so other weights are still refused.
    assert eight.made_of == plain.made_of and "lm" in eight.made_of
    assert int8_layers(eight.lm) and not int8_layers(eight.encoder)
    assert not any(isinstance(m, Int8Linear) for m in eight.semantic.modules())


def test_lora_runs_beside_the_rows(toy_dirs, with_lora):  # noqa: F811
    merged = load_diffa(**toy_dirs, adapters=with_lora)
    eight = load_diffa(**toy_dirs, adapters=with_lora, int8=True).eval()
    without = load_diffa(**toy_dirs, adapters=with_lora, int8=True, lora="none")
    expected = hidden(merged.lm)
    error = (hidden(eight.lm) - expected).norm() / expected.norm()
    assert error < 0.03 < (hidden(without.lm) - expected).norm() / expected.norm()
    assert eight.lora is None and not any(p.requires_grad for p in eight.lm.parameters())


def test_copies_of_the_lm_are_compared_with_its_rows(toy_dirs, adapters):  # noqa: F811
    edit_tensors(adapters, lambda t: t.update(copies(toy_dirs)))
    load_diffa(**toy_dirs, adapters=adapters, int8=True)
    load_diffa(**toy_dirs, adapters=adapters, int8=True, dtype=torch.bfloat16)

    name = "llm_model.base_model.model.model.transformer.blocks.0.k_proj.weight"
    edit_tensors(adapters, lambda t: t[name][11, 17].add_(0.5))
    with pytest.raises(WeightsError, match=f"{name} differs from that of the frozen part"):
        load_diffa(**toy_dirs, adapters=adapters, int8=True)


def test_random_weights_are_rounded_too():
    encoder, lm = random_pieces("toy+toy", int8=True)
    assert len(int8_layers(lm)) == lm.config.n_layers * 7 + 1 and not int8_layers(encoder)
    assert lm.head(lm(torch.randn(1, 5, lm.config.width))).isfinite().all()


@torch.no_grad()
@pytest.mark.long
def test_other_ways_to_multiply_leave_the_rows_alone_and_the_graph_is_whole(tmp_path):
    save_lm(DiffusionLM(CONFIG), tmp_path)
    lm = load_lm(tmp_path, int8=True)
    join(lm)
    assert not any(isinstance(m, FewRowsLinear | JoinedAttention) for m in lm.modules())

    x = torch.randn(1, 5, CONFIG.width)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: lm.head(lm(x)), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), lm.head(lm(x)), atol=1e-5)


# ---- the option
def test_commands_pass_the_option_and_record_it(toy_dirs, tmp_path):
    parser = argparse.ArgumentParser()
    add_model_arguments(parser, str(tmp_path / "none"))
    plain, eight = parser.parse_args([]), parser.parse_args(["--weights", "int8"])
    assert [model_options(args)["int8"] for args in (plain, eight)] == [False, True]

    # Answers of one are not resumed by the other, also not those of records without the option.
    assert [settings_of(args)["weights"] for args in (plain, eight)] == ["None", "int8"]
    old = {name: value for name, value in settings_of(plain).items() if name != "weights"}
    (tmp_path / "out.made_by").write_text(json.dumps(old))
    check_made_by(tmp_path / "out", settings_of(plain))
    with pytest.raises(ValueError, match="begun with weights None, now int8"):
        check_made_by(tmp_path / "out", settings_of(eight))


def test_the_likelihood_of_texts_takes_it(toy_dirs, tmp_path, monkeypatch, capsys):
    text = tmp_path / "a.txt"
    text.write_text("two red birds sing")
    command = ["x", str(text), "--llm", str(toy_dirs["llm"]), "--device", "cpu"]
    found = []
    for more in ([], ["--weights", "int8"]):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        likelihood.main()
        found.append(float(capsys.readouterr().out.split()[-1]))
    assert found[0] != found[1] and found[1] == pytest.approx(found[0], rel=0.1)


def test_training_refuses_it_and_says_why(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_asr.py", "--weights", "int8", "--device", "cpu"])
    with pytest.raises(SystemExit, match="--weights int8 is for answers alone: adapters would"):
        train_asr.main()
