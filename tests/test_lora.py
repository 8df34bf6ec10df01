"""Stages 3 and 4 of DIFFA-2: LoRA beside the LM, preference over a frozen copy."""

import argparse
import json
import math

import pytest
import torch
from conftest import SHAPES, edit_tensors
from safetensors.torch import load_file
from test_stage import begun, manifest, result, train  # noqa: F401 (a fixture)

import train_instruct
from checkpoints import key_tables
from checkpoints.command_line import add_model_arguments, settings_of
from checkpoints.copies import check_copies
from checkpoints.files import WeightsError
from checkpoints.fill import named
from checkpoints.lora import LoRA
from checkpoints.model import load_diffa, load_for_training, save_trained
from data import build_prompt
from sampler import SamplerConfig, answer
from training import preference

PEFT = "llm_model.base_model.model.model.transformer.blocks.{}.{}.lora_{}.default.weight"
LAYERS = ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj")
FEW = ["--steps", 4, "--batch", 4, "--save-every", 2, "--keep", 9, "--lr", 0.01]


@pytest.fixture
def adapters(toy, toy_dirs, tmp_path):
    """Stage-2 adapters without LoRA."""
    save_trained(toy, tmp_path / "adapters", **toy_dirs, answer_length=18)
    return tmp_path / "adapters"


@pytest.fixture
def with_lora(toy_dirs, adapters, tmp_path):
    """Adapters with LoRA of rank 3, none of whose matrices is zero."""
    torch.manual_seed(4)
    model = load_for_training(**toy_dirs, adapters=adapters, lora=3).model
    for parameter in model.lora.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_trained(model, tmp_path / "lora", **toy_dirs, answer_length=18)
    return tmp_path / "lora"


def hidden(lm):
    torch.manual_seed(9)
    with torch.no_grad():
        return lm(torch.randn(2, 7, 32))


# ---- LoRA in a file
def test_lora_has_the_release_s_names_and_computes_the_same_beside_and_in_the_weights(
    toy_dirs, with_lora
):
    tensors = load_file(with_lora / "adapters.safetensors")
    names = {PEFT.format(i, layer, side) for i in (0, 1) for layer in LAYERS for side in "AB"}
    assert {name for name in tensors if name.startswith("llm_model.")} == names
    assert tensors[PEFT.format(1, "up_proj", "A")].shape == (3, 32)
    assert tensors[PEFT.format(1, "up_proj", "B")].shape == (48, 3)

    merged = load_diffa(**toy_dirs, adapters=with_lora)
    beside = load_diffa(**toy_dirs, adapters=with_lora, lora="train").eval()
    without = load_diffa(**toy_dirs, adapters=with_lora, lora="none")
    assert torch.allclose(hidden(merged.lm), hidden(beside.lm), atol=1e-5)
    assert not torch.allclose(hidden(merged.lm), hidden(without.lm), atol=0.1)
    assert merged.lora is None and "lora" in beside.trained_parts()

    # W + 2 B A, by hand.
    product = tensors[PEFT.format(0, "v_proj", "B")] @ tensors[PEFT.format(0, "v_proj", "A")]
    expected = without.lm.blocks[0].attn.value.weight + 2 * product
    assert torch.allclose(merged.lm.blocks[0].attn.value.weight, expected, atol=1e-6)


@pytest.mark.parametrize("old, new", [("base_model.model.", ""), (".default", "")])
def test_shorter_names_of_lora_are_the_same(toy_dirs, with_lora, old, new):
    expected = hidden(load_diffa(**toy_dirs, adapters=with_lora).lm)

    def rename(tensors):
        for name in [name for name in tensors if "lora_" in name]:
            tensors[name.replace(old, new, 1)] = tensors.pop(name)

    edit_tensors(with_lora, rename)
    assert torch.equal(hidden(load_diffa(**toy_dirs, adapters=with_lora).lm), expected)


FIRST = PEFT.format(0, "q_proj", "B")


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda t: t.pop(FIRST), f"missing {FIRST}"),
        (lambda t: t.update({FIRST: torch.ones(32, 5)}), rf"{FIRST} is \(32, 5\) in the file"),
        (lambda t: t.update({PEFT.format(0, "ff_out", "A"): torch.ones(3, 48)}), "extra .*ff_out"),
        (lambda t: t.update({PEFT.format(2, "q_proj", "A"): torch.ones(3, 32)}), "extra .*cks.2"),
        (lambda t: t.update({FIRST.replace(".default", ""): t[FIRST].clone()}), "is there twice"),
        (lambda t: t[FIRST].fill_(math.nan), f"{FIRST}: it holds NaN"),
    ],
)
def test_lora_that_does_not_fit_is_refused_by_name(toy_dirs, with_lora, change, problem):
    edit_tensors(with_lora, change)
    with pytest.raises(WeightsError, match=problem):
        load_diffa(**toy_dirs, adapters=with_lora)


# ---- copies of frozen parts
def copies(toy_dirs):
    """Copies of encoder and LM as a training program may write them."""
    model = load_diffa(**toy_dirs, stage="stage1", **SHAPES)
    lm = named(model.lm, key_tables.LLADA_KEYS)
    found = {f"llm_model.base_model.model.{name}": t.clone() for name, t in lm.items()}
    name = "llm_model.base_model.model.model.transformer.blocks.0.q_proj"
    found[f"{name}.base_layer.weight"] = found.pop(f"{name}.weight").bfloat16()
    for name, tensor in named(model.encoder, key_tables.WHISPER_KEYS).items():
        found[name.replace("model.encoder.", "whisper_model.encoder.")] = tensor.clone()
    return found | {"whisper_model.decoder.layers.0.fc1.weight": torch.ones(2)}


def test_copies_of_the_frozen_parts_are_left_out(toy_dirs, with_lora):
    expected = hidden(load_diffa(**toy_dirs, adapters=with_lora).lm)
    edit_tensors(with_lora, lambda tensors: tensors.update(copies(toy_dirs)))
    assert torch.equal(hidden(load_diffa(**toy_dirs, adapters=with_lora).lm), expected)


@pytest.mark.parametrize(
    "name",
    [
        "llm_model.x.y",
        "llm_model.model.transformer.blocks.0.q_proj.lora_magnitude_vector.default.weight",
        "llm_model.model.transformer.blocks.0.q_proj.lora_A.other.weight",
        "whisper_model.encoder.adapter.weight",
    ],
)
def test_anything_else_under_a_dropped_prefix_is_named(toy_dirs, adapters, name):
    edit_tensors(adapters, lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises(WeightsError, match=f"adapters.safetensors: {name}: neither LoRA"):
        load_diffa(**toy_dirs, adapters=adapters)


@pytest.mark.parametrize(
    "name",
    [
        "llm_model.base_model.model.model.transformer.ln_f.weight",
        "whisper_model.encoder.conv1.bias",
    ],
)
def test_a_copy_that_was_trained_is_no_copy(toy_dirs, adapters, name):
    edit_tensors(adapters, lambda t: t.update(copies(toy_dirs)))
    edit_tensors(adapters, lambda t: t[name].add_(0.5))
    with pytest.raises(WeightsError, match=f"{name} differs from that of the frozen part"):
        load_diffa(**toy_dirs, adapters=adapters)
    load_diffa(**toy_dirs, adapters=adapters, allow_other_parts=True)


@pytest.mark.parametrize("at", [(0, 0), (11, 17), (-1, -1)])
def test_a_copy_that_differs_in_one_number_is_no_copy(toy_dirs, adapters, at):
    name = "llm_model.base_model.model.model.transformer.blocks.0.k_proj.weight"
    edit_tensors(adapters, lambda t: t.update(copies(toy_dirs)))
    edit_tensors(adapters, lambda t: t[name][at].add_(0.5))
    with pytest.raises(WeightsError, match=f"{name} differs from that of the frozen part"):
        load_diffa(**toy_dirs, adapters=adapters)


@pytest.mark.parametrize("name", ["blocks.7.q_proj", "blocks.0.q_norm"])
def test_a_copy_of_another_lm_s_tensor_is_no_copy(toy_dirs, adapters, name):
    full = f"llm_model.model.transformer.{name}.weight"
    edit_tensors(adapters, lambda t: t.update({full: torch.ones(32, 32)}))
    with pytest.raises(WeightsError, match=full):
        load_diffa(**toy_dirs, adapters=adapters)


def test_a_shortened_window_keeps_the_first_positions(toy_dirs):
    model = load_diffa(**toy_dirs, stage="stage1", audio_context=0.4, **SHAPES)
    check_copies("x.bin", copies(toy_dirs), model.encoder, model.lm)


# ---- stage 3
def test_stage_3_trains_lora_resumes_bit_for_bit_and_its_model_answers(
    toy_dirs,
    manifest,  # noqa: F811
    tmp_path,
    adapters,
):
    options = [*FEW, "--adapters", adapters, "--lora", 2, "--accumulate", 2]
    whole = train(train_instruct, toy_dirs, tmp_path / "whole", manifest(), *options)
    half = begun(tmp_path / "whole", tmp_path / "half")
    again = train(train_instruct, toy_dirs, half, manifest(), *options)
    assert again[1] == whole[1]
    assert all(torch.equal(again[0][name], whole[0][name]) for name in whole[0])
    assert all(whole[0][PEFT.format(i, n, "B")].any() for i in (0, 1) for n in LAYERS)

    # Not from adapters that differ in what this stage could leave as it is.
    edit_tensors(adapters, lambda tensors: [tensors[n].mul_(2) for n in tensors if "acoustic" in n])
    with pytest.raises(SystemExit, match="acoustic was .*, now is"):
        train(train_instruct, toy_dirs, half, manifest(), *options)

    # The LM's own weights are those of its directory; the answer comes through the sampler.
    model = load_diffa(**toy_dirs, adapters=half).eval()
    prompts = [build_prompt(model.tokenizer, "What is said?")]
    waveforms, samples = torch.zeros(1, model.encoder.config.n_samples), torch.tensor([6000])

    def hear(rows):
        return model.hear(*model.encode(waveforms, samples))

    (said,) = answer(model.lm, model.tokenizer, prompts, hear, SamplerConfig(length=6))
    assert len(said.ids) == 6


def test_lora_starts_as_no_change_and_is_dropped_at_random_in_training(toy_dirs, adapters):
    model = load_for_training(**toy_dirs, adapters=adapters, lora=4).model
    plain = load_diffa(**toy_dirs, adapters=adapters)
    assert torch.equal(hidden(model.lm), hidden(plain.lm))
    pair = model.lora.blocks[0]["query"]
    pair.B.data.fill_(1.0)
    x = torch.ones(1, 32)
    assert not torch.equal(pair.train()(x), pair(x))
    assert torch.equal(pair.eval()(x), pair(x))


def test_answers_without_lora_are_those_of_another_model(with_lora):
    parser = argparse.ArgumentParser()
    add_model_arguments(parser, "")
    given = ["--adapters", str(with_lora)]
    settings = [settings_of(parser.parse_args([*given, *more])) for more in ([], ["--no-lora"])]
    assert [known["no_lora"] for known in settings] == ["False", "True"]


@pytest.mark.parametrize(
    "options, problem",
    [
        ([], "holds LoRA of rank 3; train it too by train_instruct.py --lora RANK"),
        (["--lora", 2], "holds LoRA of rank 3, --lora is 2"),
        (["--lora", 3, "--no-lora"], "--lora and --no-lora exclude each other"),
    ],
)
def test_training_leaves_out_no_lora_in_silence(
    toy_dirs,
    manifest,  # noqa: F811
    tmp_path,
    with_lora,
    options,
    problem,
):
    options = [*FEW, "--adapters", with_lora, *options]
    with pytest.raises(SystemExit, match=problem):
        train(train_instruct, toy_dirs, tmp_path / "out", manifest(), *options)


# ---- stage 4
def test_masks_are_exactly_k_with_k_uniform():
    ids = torch.arange(5).repeat(3000, 1)
    noisy, t = preference.draw_masks(ids, 2, 99, torch.Generator().manual_seed(0))
    is_masked = noisy == 99
    assert torch.equal(torch.where(is_masked, ids, noisy), ids.expand(2, -1, -1))
    counts = is_masked.sum(dim=-1)
    assert torch.equal(t, counts / 5)
    shares = torch.bincount(counts.flatten(), minlength=6) / counts.numel()
    assert shares[0] == 0 and (shares[1:] - 0.2).abs().max() < 0.03
    assert (is_masked.float().mean(dim=(0, 1)) - 0.6).abs().max() < 0.03


def pairs(i, item):
    return item | {"rejected": "sing two sing"}


def test_stage_4_prefers_the_better_answer_and_resumes_bit_for_bit(
    toy_dirs,
    manifest,  # noqa: F811
    tmp_path,
    with_lora,
    monkeypatch,
):
    options = [*FEW, "--adapters", with_lora, "--steps", 6, "--samples", 2]
    path = manifest(change=pairs)
    whole = train(preference, toy_dirs, tmp_path / "whole", path, *options)
    half = begun(tmp_path / "whole", tmp_path / "half")
    again = train(preference, toy_dirs, half, path, *options)
    assert again[1] == whole[1]
    assert all(torch.equal(again[0][name], whole[0][name]) for name in whole[0])

    assert min(whole[1][3:]) < 0.5
    before = load_file(with_lora / "adapters.safetensors")
    assert not torch.equal(whole[0][FIRST], before[FIRST])

    # At first policy and reference agree, where the policy has no dropout.
    set_mode = torch.nn.Module.train
    monkeypatch.setattr(torch.nn.Module, "train", lambda part, mode=True: set_mode(part, False))
    options[-3] = 1
    first = train(preference, toy_dirs, tmp_path / "first", path, *options)
    assert first[1] == pytest.approx([math.log(2)], abs=1e-5)


def test_the_reference_is_the_model_before_training_and_shares_the_lm_s_memory(toy_dirs, with_lora):
    model = load_diffa(**toy_dirs, adapters=with_lora, lora="train").eval()
    reference = preference.frozen_copy(model)
    expected = hidden(model.lm)
    assert torch.equal(hidden(reference.lm), expected)
    pairs = zip(model.lm.parameters(), reference.lm.parameters(), strict=True)
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in pairs)

    for parameter in model.lora.parameters():
        parameter.data.add_(1.0)
    assert torch.equal(hidden(reference.lm), expected)
    assert not torch.equal(hidden(model.lm), expected)


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda i, item: item, "8 bad pairs\n  item 0 .clip0.: lacks rejected"),
        (lambda i, item: item | {"rejected": item["target"]}, "rejected equals target"),
    ],
)
def test_pairs_without_a_worse_answer_are_listed(
    toy_dirs,
    manifest,  # noqa: F811
    tmp_path,
    with_lora,
    change,
    problem,
):
    with pytest.raises(SystemExit, match=problem):
        path = manifest(change=change)
        train(preference, toy_dirs, tmp_path / "out", path, *FEW, "--adapters", with_lora)


def test_random_weights_measure_both_stages(manifest, tmp_path, capsys):  # noqa: F811
    shared = ["--random-weights", "toy+toy", "--device", "cpu", "--steps", "1", "--batch", "2"]
    path = str(manifest(change=pairs))
    out = str(tmp_path / "out")
    train_instruct.main([*shared, "--train", path, "--out", out, "--lora", "2"])
    assert "lora " in capsys.readouterr().out
    assert json.loads((tmp_path / "out/training.json").read_text())["parts"][-1] == "lora"


def test_a_rank_is_one_number_for_all_layers(toy):
    lora = LoRA(toy.lm, 5)
    assert {pair.A.shape[0] for _, pair in lora.pairs(toy.lm)} == {5}
    assert len(list(lora.pairs(toy.lm))) == 5 * len(toy.lm.blocks)
