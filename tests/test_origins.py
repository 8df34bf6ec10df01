"""Adapters record what they were trained with, and run with nothing else unless forced to."""

import json
import shutil
import sys

import pytest
import torch
from conftest import SHAPES, edit_config, edit_tensors

import data
from checkpoints import fill
from checkpoints.command_line import settings_of
from checkpoints.digests import digest
from checkpoints.files import WeightsError, read_json
from checkpoints.lm import load_lm, save_lm
from checkpoints.model import load_diffa, load_for_training, save_trained
from checkpoints.whisper import load_whisper, save_whisper
from diffa import DIFFA
from evaluation import ask
from training.run_files import name_on_disk


@pytest.fixture
def adapters(toy, dirs, tmp_path):
    save_trained(toy, tmp_path / "stage2", dirs["whisper"], dirs["llm"], answer_length=18)
    return tmp_path / "stage2"


def another(piece, folder):
    """Other weights of the same shapes, as another seed makes them; or another tokenizer."""
    torch.manual_seed(7)
    if piece == "encoder":
        encoder = load_whisper(folder)
        save_whisper(type(encoder)(encoder.config), folder)
    elif piece == "LM":
        lm = load_lm(folder)
        save_lm(type(lm)(lm.config), folder)
    else:
        # The same pieces with other scores: nothing but the file differs.
        path = folder / "tokenizer.model"
        path.write_bytes(path.read_bytes() + b"\x1a\0")


@pytest.mark.parametrize(
    "piece, option", [("encoder", "whisper"), ("LM", "llm"), ("tokenizer", "llm")]
)
def test_other_parts_of_the_same_shapes_are_refused_unless_forced(dirs, adapters, piece, option):
    another(piece, dirs[option])
    where = {**dirs, "adapters": adapters}
    for load in (load_diffa, load_for_training):
        with pytest.raises(WeightsError, match=f"with another {piece} .*--{option}.*--force-parts"):
            load(**where)
    assert load_diffa(**where, allow_other_parts=True).stage == "stage2"


def test_a_part_of_another_seed_is_refused_before_the_lm_is_copied(dirs, adapters, monkeypatch):
    another("LM", dirs["llm"])
    copied = []
    real = fill.place
    monkeypatch.setattr(fill, "place", lambda *a: copied.append(a[0].shape) or real(*a))
    with pytest.raises(WeightsError, match="another LM"):
        load_diffa(**dirs, adapters=adapters)
    assert torch.Size([32]) in copied and torch.Size([48, 32]) not in copied


@pytest.mark.parametrize(
    "fields", [{"rope_theta": 1e4}, {"n_heads": 2, "n_kv_heads": 2}, {"rms_norm_eps": 1e-3}]
)
def test_another_config_of_the_same_weights_is_another_lm(dirs, adapters, fields):
    edit_config(dirs["llm"], **fields)
    with pytest.raises(WeightsError, match="another LM"):
        load_diffa(**dirs, adapters=adapters)


@pytest.mark.parametrize("piece", ["whisper", "llm"])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_one_changed_number_anywhere_is_noticed(dirs, toy, tmp_path, piece, saved):
    save_lm(load_lm(dirs["llm"]).to(saved), dirs["llm"])
    save_whisper(load_whisper(dirs["whisper"], saved), dirs["whisper"])
    model = DIFFA.from_pretrained(**dirs, stage="stage2", **SHAPES)
    save_trained(model, tmp_path / "stage2", **dirs)
    load_diffa(**dirs, adapters=tmp_path / "stage2")

    # Past the first number: a sample of 64 takes every n-th.
    name = {"whisper": "model.encoder.layers.1.fc1.weight", "llm": "model.transformer.wte.weight"}
    edit_tensors(dirs[piece], lambda t: t[name[piece]].view(-1)[1:2].mul_(1.01))
    with pytest.raises(WeightsError, match="another (encoder|LM)"):
        load_diffa(**dirs, adapters=tmp_path / "stage2")


def test_digests_of_before_have_samples_alone(dirs, adapters):
    recorded = read_json(adapters / "config.json")["trained_with"]
    assert recorded["lm"].count("-") == 4 and recorded["lm"].count(":") == 3
    short = {part: "-".join(recorded[part].split("-")[:2]) for part in ("encoder", "lm")}
    edit_config(adapters, trained_with=recorded | short)
    load_diffa(**dirs, adapters=adapters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_weights_in_another_dtype_or_in_shards_are_the_same(dirs, adapters, dtype):
    save_lm(load_lm(dirs["llm"]).to(dtype), dirs["llm"], n_shards=3)
    save_whisper(load_whisper(dirs["whisper"], dtype), dirs["whisper"])
    for wanted in (None, torch.float32, torch.bfloat16):
        assert load_diffa(**dirs, adapters=adapters, dtype=wanted).stage == "stage2"


def test_adapters_remember_the_lengths_of_answers_and_where_their_models_are(dirs, adapters):
    model = load_diffa(adapters=adapters)
    assert model.answer_length == 18
    assert load_for_training(adapters=adapters).sources == {n: str(p) for n, p in dirs.items()}
    assert DIFFA.from_pretrained(**dirs, **SHAPES).answer_length is None
    save_trained(model, adapters, **dirs)  # what was loaded is kept
    assert load_diffa(**dirs, adapters=adapters).answer_length == 18


def test_a_run_that_was_moved_finds_its_models_beside_it(dirs, adapters, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for path in (*dirs.values(), adapters):
        shutil.move(path, tmp_path / "elsewhere")
    moved = load_for_training(adapters=tmp_path / "elsewhere/stage2")
    assert moved.sources["llm"] == tmp_path / "elsewhere" / dirs["llm"].name
    shutil.rmtree(tmp_path / "elsewhere" / dirs["llm"].name)
    with pytest.raises(WeightsError, match=f"--llm {dirs['llm']}: no such directory"):
        load_diffa(adapters=tmp_path / "elsewhere/stage2")


def test_a_directory_of_before_loads_with_a_note(dirs, adapters, capsys):
    info = read_json(adapters / "config.json")
    for field in ("trained_with", "answer_length"):
        del info[field]
    (adapters / "config.json").write_text(json.dumps(info))
    another("LM", dirs["llm"])
    assert load_diffa(**dirs, adapters=adapters).answer_length is None
    assert "does not record the models that it was trained with" in capsys.readouterr().err


def test_another_prompt_than_in_training_is_refused(dirs, adapters, monkeypatch):
    monkeypatch.setattr(data, "SYSTEM", "You are a pirate.")
    with pytest.raises(WeightsError, match="helpful voice assistant.*pirate.*--force-parts"):
        load_diffa(**dirs, adapters=adapters)


def test_the_command_takes_the_recorded_models_and_can_be_forced(
    dirs, adapters, tone, monkeypatch, capsys
):
    def command(*options):
        words = [tone(), "What?", "--adapters", adapters, "--device", "cpu", *options]
        monkeypatch.setattr(sys, "argv", ["sampler.py", *map(str, words)])
        ask.main()

    command()
    assert "calls for 18 positions" in capsys.readouterr().err
    command("--audio-context", 0.8)
    with pytest.raises(SystemExit, match="a window of 0.8 s, not 0.6 s; leave --audio-context"):
        command("--audio-context", 0.6)
    command("--audio-context", 0.6, "--force-parts")


@pytest.mark.parametrize("order", [1, -1])
def test_adapters_beside_random_weights_are_refused(tmp_path, capsys, order):
    options = [("--adapters", str(tmp_path)), ("--random-weights", "toy+toy")][::order]
    words = ["clip", "What?", *(word for option in options for word in option)]
    with pytest.raises(SystemExit) as stopped:
        ask.make_parser().parse_args(words)
    assert stopped.value.code == 2 and "leave out --adapters" in capsys.readouterr().err
    assert ask.make_parser().parse_args(["clip", "What?", *options[order == 1]]).clip == "clip"


def test_what_adapters_record_are_the_settings_of_a_command(dirs, adapters, tmp_path):
    args = ask.make_parser().parse_args(["clip", "What?", "--adapters", str(adapters)])
    settings = settings_of(args)
    assert (settings["whisper"], settings["llm"]) == (str(dirs["whisper"]), str(dirs["llm"]))
    args.llm = "other"
    assert settings_of(args)["llm"] == "other"
    args.random_weights = "toy+toy"
    assert settings_of(args)["whisper"] == "None"


# Parts that are missing


def test_the_config_of_one_stage_beside_the_tensors_of_another_is_refused(dirs, adapters, tmp_path):
    first = DIFFA.from_pretrained(**dirs, stage="stage1", **SHAPES)
    save_trained(first, tmp_path / "stage1", **dirs)
    shutil.copy(tmp_path / "stage1/adapters.safetensors", adapters)
    for load in (load_diffa, load_for_training):
        with pytest.raises(WeightsError, match="adapters.safetensors: .*belong to different runs"):
            load(**dirs, adapters=adapters, stage="stage2")


def test_a_config_of_other_shapes_than_the_tensors_is_refused(dirs, adapters):
    edit_config(
        adapters, adapters=read_json(adapters / "config.json")["adapters"] | {"n_queries": 64}
    )
    with pytest.raises(WeightsError, match="n_queries is 64 by config.json, 4 in the file"):
        load_diffa(**dirs, adapters=adapters)


@pytest.mark.parametrize("field, value", [("n_heads", 4), ("taps", [0, 2, 1])])
def test_shapes_that_no_tensor_shows_are_those_of_the_training(dirs, adapters, field, value):
    shapes = read_json(adapters / "config.json")["adapters"]
    edit_config(adapters, adapters=shapes | {field: value})
    with pytest.raises(WeightsError, match="was trained with the shapes .*train them again"):
        load_diffa(**dirs, adapters=adapters)


@pytest.mark.parametrize("stage, lacks", [("stage2", "acoustic"), ("stage1", "")])
def test_only_training_draws_the_parts_that_a_stage_lacks(dirs, tmp_path, stage, lacks):
    first = DIFFA.from_pretrained(**dirs, stage="stage1", **SHAPES)
    save_trained(first, tmp_path, **dirs)
    assert load_for_training(**dirs, adapters=tmp_path, stage=stage).new == (
        (lacks,) if lacks else ()
    )
    if lacks:
        with pytest.raises(WeightsError, match=f"lacks {lacks} of {stage}"):
            load_diffa(**dirs, adapters=tmp_path, stage=stage)
    edit_tensors(tmp_path, lambda t: t.pop("trainable_prompts.weight"))
    with pytest.raises(WeightsError, match="belong to different runs"):
        load_for_training(**dirs, adapters=tmp_path, stage=stage)


@pytest.mark.parametrize(
    "fields",
    [
        {"stage": ["stage2"]},
        {"stage": "stage3"},
        {"audio_context": float("inf")},
        {"audio_context": float("nan")},
        {"audio_context": "0.8"},
        {"audio_context": -1},
        {"answer_length": 0},
        {"answer_length": 1e9},
        {"whisper": 3},
        {"llm": ["a"]},
        {"trained_with": "x"},
        {"trained_with": {"lm": 3}},
    ],
)
def test_values_that_no_training_writes_are_refused(dirs, adapters, fields):
    edit_config(adapters, **fields)
    with pytest.raises(WeightsError, match="config.json: .*which no training writes"):
        load_diffa(**dirs, adapters=adapters)


# Digests


def test_digests_of_runs_stay_those_of_before(toy):
    """Old runs resume: checkpoints hold these names of the frozen parts."""
    ours = {n: torch.arange(p.numel()).view(p.shape) for n, p in toy.lm.named_parameters()}
    named = [(name_on_disk(name), numbers) for name, numbers in ours.items()]
    assert digest(named) == "5034057bc77d2dd4"
