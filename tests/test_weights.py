"""A checkpoint is read whole and exactly, or refused with words that help; nothing in it is ever run."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import weights
from adapters import AcousticAdapter, AdapterConfig, SemanticAdapter
from conftest import ENCODER, SHAPES
from data import build_prompt
from diffa import DIFFA
from encoder import WhisperEncoder
from weights import WeightsError


@pytest.fixture
def dirs(toy_dirs, tmp_path):
    """Copies of the toy directories that a test may spoil."""
    return {name: shutil.copytree(path, tmp_path / name) for name, path in toy_dirs.items()}


def edit_tensors(directory, change):
    """change(tensors) in place, in the one safetensors file of a directory."""
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_config(directory, **fields):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


def equal(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def hear(model, n_samples=(9000, 12_800)):
    torch.manual_seed(2)
    clips = torch.randn(len(n_samples), ENCODER.n_samples)
    with torch.inference_mode():
        return model.hear(*model.encode(clips, torch.tensor(n_samples)))[0]


# Roundtrips


def test_encoder_returns_as_it_was_saved(toy_dirs, tmp_path):
    encoder = weights.load_whisper(toy_dirs["whisper"])
    weights.save_whisper(encoder, tmp_path / "again")
    again = weights.load_whisper(tmp_path / "again")
    assert again.config == encoder.config == ENCODER
    equal(again, encoder)


@pytest.mark.parametrize("n_shards", [1, 3])
def test_lm_returns_as_it_was_saved(toy_dirs, tmp_path, n_shards):
    lm = weights.load_llada(toy_dirs["llm"])
    weights.save_llada(lm, tmp_path / "again", n_shards)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) == n_shards
    again = weights.load_llada(tmp_path / "again")
    assert again.config == lm.config
    equal(again, lm)


@pytest.mark.parametrize("stage", ["stage1", "stage2", "semantic"])
def test_diffa_hears_the_same_after_save_and_load(toy_dirs, tmp_path, stage):
    model = DIFFA.from_pretrained(**toy_dirs, stage=stage, **SHAPES).eval()
    model.save(tmp_path / "saved", **toy_dirs)
    again = DIFFA.from_pretrained(**toy_dirs, adapters=tmp_path / "saved").eval()
    assert (again.stage, again.config) == (stage, model.config)
    assert torch.equal(hear(again), hear(model))


def test_stage_2_starts_from_the_semantic_adapter_of_stage_1(toy_dirs, tmp_path):
    first = DIFFA.from_pretrained(**toy_dirs, stage="stage1", **SHAPES)
    first.save(tmp_path / "stage1", **toy_dirs)
    second = DIFFA.from_pretrained(**toy_dirs, adapters=tmp_path / "stage1", stage="stage2")
    equal(second.semantic, first.semantic)
    assert second.config == first.config


def test_loaded_adapters_can_train_and_frozen_parts_cannot(toy_dirs, toy, tmp_path):
    toy.save(tmp_path / "saved", **toy_dirs)
    again = DIFFA.from_pretrained(**toy_dirs, adapters=tmp_path / "saved")
    assert all(p.requires_grad for part in (again.semantic, again.acoustic) for p in part.parameters())
    assert not any(p.requires_grad for part in (again.encoder, again.lm) for p in part.parameters())


def test_frozen_parts_in_bfloat16_work_with_adapters_in_float32(toy_dirs):
    model = DIFFA.from_pretrained(**toy_dirs, stage="stage2", dtype=torch.bfloat16, **SHAPES).eval()
    assert {p.dtype for p in model.semantic.parameters()} == {torch.float32}
    states, frames = model.encode(torch.randn(1, ENCODER.n_samples), torch.tensor([9000]))
    prompt = model.splice([build_prompt(model.tokenizer, "What is said?")], *model.hear(states, frames))
    assert prompt.embeddings.dtype == torch.bfloat16


# Tensors that do not fit


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop("model.encoder.conv1.weight"), "missing model.encoder.conv1.weight (16, 80, 3)"),
        (lambda t: t.update({"model.encoder.odd": torch.ones(2)}), "extra model.encoder.odd (2,)"),
        (
            lambda t: t.update({"model.encoder.layers.1.fc1.bias": torch.ones(31)}),
            "model.encoder.layers.1.fc1.bias is (31,) in the file, (32,) by the config",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_shapes_and_place(dirs, change, said):
    edit_tensors(dirs["whisper"], change)
    with pytest.raises(WeightsError) as error:
        weights.load_whisper(dirs["whisper"])
    assert said in str(error.value) and str(dirs["whisper"]) in str(error.value)


def test_a_config_of_other_shapes_than_the_tensors_is_refused(dirs):
    edit_config(dirs["llm"], mlp_hidden_size=50)
    with pytest.raises(WeightsError, match=r"blocks.0.ff_proj.weight is \(48, 32\) in the file, \(50, 32\) by the config"):
        weights.load_llada(dirs["llm"])


# Damaged files


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_named(dirs, share):
    file = dirs["whisper"] / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match="model.safetensors.*download it again"):
        weights.load_whisper(dirs["whisper"])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_bin_file_is_named(toy_dirs, tmp_path, share):
    torch.save(load_file(toy_dirs["whisper"] / "model.safetensors"), tmp_path / "x.bin")
    whole = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match="x.bin"):
        weights.read_tensors(tmp_path / "x.bin")


class Mischief:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, zipped):
    file, trace = tmp_path / "pytorch_model.bin", tmp_path / "was_run"
    torch.save({"weight": Mischief(trace)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="pytorch_model.bin"):
        weights.read_tensors(file)
    assert not trace.exists()


@pytest.mark.parametrize("value", [torch.ones(3), {"epoch": 3}, {"model": {"weight": torch.ones(3)}}])
def test_a_bin_file_of_anything_but_named_tensors_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(WeightsError, match="x.bin"):
        weights.read_tensors(tmp_path / "x.bin")


def test_shards_that_are_absent_are_all_named(dirs):
    weights.save_llada(weights.load_llada(dirs["llm"]), dirs["llm"], n_shards=3)
    for i in (1, 3):
        (dirs["llm"] / f"model-0000{i}-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match="model-00001-of-00003.safetensors, model-00003-of-00003.safetensors"):
        weights.load_llada(dirs["llm"])


def test_an_index_that_disagrees_with_its_shards_is_refused(dirs):
    edit_tensors(dirs["llm"], lambda t: t.pop("model.transformer.ln_f.weight"))
    with pytest.raises(WeightsError, match="disagree about model.transformer.ln_f.weight"):
        weights.load_llada(dirs["llm"])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}'])
def test_a_broken_index_is_named(dirs, text):
    (dirs["llm"] / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match="model.safetensors.index.json"):
        weights.load_llada(dirs["llm"])


# Directories of the wrong kind


def test_the_two_directories_swapped_are_refused(toy_dirs):
    with pytest.raises(WeightsError, match="model_type is 'llada', expected 'whisper'"):
        weights.load_whisper(toy_dirs["llm"])
    with pytest.raises(WeightsError, match="model_type is 'whisper', expected 'llada'"):
        weights.load_llada(toy_dirs["whisper"])


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_a_broken_config_is_named(dirs, text):
    (dirs["whisper"] / "config.json").write_text(text)
    with pytest.raises(WeightsError, match="config.json"):
        weights.load_whisper(dirs["whisper"])


def test_config_fields_that_lack_are_named(dirs):
    edit_config(dirs["whisper"], d_model=None, encoder_layers=None)
    with pytest.raises(WeightsError, match="config.json: lacks d_model, encoder_layers"):
        weights.load_whisper(dirs["whisper"])


def test_a_directory_that_is_absent_or_empty_is_named(dirs, tmp_path):
    with pytest.raises(WeightsError, match="nowhere: no such directory"):
        weights.load_whisper(tmp_path / "nowhere")
    (dirs["whisper"] / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="neither model.safetensors"):
        weights.load_whisper(dirs["whisper"])


@pytest.mark.parametrize("field", ["mask_token_id", "eos_token_id"])
def test_a_tokenizer_of_another_model_is_refused(dirs, field):
    edit_config(dirs["llm"], **{field: 3})
    with pytest.raises(ValueError, match="at 3; they belong to different models"):
        DIFFA.from_pretrained(**dirs, **SHAPES)


# Adapters


def release(path, config, extra=()):
    """Adapters as the release saves them, with copies of the frozen parts beside; returns the modules."""
    torch.manual_seed(6)
    semantic, acoustic, prompts = SemanticAdapter(config), AcousticAdapter(config), torch.randn(config.n_prompts, config.lm_width)
    tensors = weights.named(semantic, weights.SEMANTIC_KEYS) | weights.named(acoustic, weights.ACOUSTIC_KEYS)
    tensors |= {"trainable_prompts.weight": prompts, "whisper_model.conv1.weight": torch.ones(2), "llm_model.x.y": torch.ones(3)}
    torch.save(tensors | dict(extra), path)
    return semantic, acoustic, prompts


RELEASE = AdapterConfig(encoder_width=16, lm_width=32, n_heads=2, n_queries=5)


@pytest.mark.parametrize("by", ["file", "directory"])
def test_the_release_s_file_is_read_without_its_copies_of_frozen_parts(tmp_path, by):
    semantic, acoustic, prompts = release(tmp_path / "pytorch_model.bin", RELEASE)
    config, parts, info = weights.load_adapters(tmp_path / "pytorch_model.bin" if by == "file" else tmp_path, n_heads=2)
    assert (config, info) == (RELEASE, {})
    equal(parts["semantic"], semantic)
    equal(parts["acoustic"], acoustic)
    assert torch.equal(parts["prompts"], prompts)


def test_the_release_s_taps_follow_the_depth_of_the_encoder(toy_dirs, tmp_path):
    torch.manual_seed(0)
    weights.save_whisper(WhisperEncoder(replace(ENCODER, n_layers=4)), tmp_path / "whisper")
    release(tmp_path / "pytorch_model.bin", RELEASE)  # four taps, as tiny, small and medium have
    model = DIFFA.from_pretrained(tmp_path / "whisper", toy_dirs["llm"], tmp_path / "pytorch_model.bin")
    assert model.config.taps == (0, 1, 2, 3)


def test_tensors_that_no_adapter_knows_are_named(tmp_path):
    release(tmp_path / "x.bin", RELEASE, {"pooler.weight": torch.ones(1)})
    with pytest.raises(WeightsError, match="x.bin: extra tensors pooler.weight"):
        weights.load_adapters(tmp_path / "x.bin", n_heads=2)


def test_half_an_adapter_is_refused(toy, toy_dirs, tmp_path):
    toy.save(tmp_path, **toy_dirs)
    edit_tensors(tmp_path, lambda t: t.pop("acoustic_connector.proj.1.bias"))
    with pytest.raises(WeightsError, match=r"missing acoustic_connector.proj.1.bias \(32,\)"):
        DIFFA.from_pretrained(**toy_dirs, adapters=tmp_path)


def test_adapters_of_another_width_are_refused(toy, toy_dirs, tmp_path):
    toy.save(tmp_path / "adapters", **toy_dirs)
    weights.save_whisper(WhisperEncoder(replace(ENCODER, width=24)), tmp_path / "wider")
    with pytest.raises(ValueError, match="encoder_width 16, this one has 24"):
        DIFFA.from_pretrained(tmp_path / "wider", toy_dirs["llm"], tmp_path / "adapters")


def test_a_file_without_adapters_is_refused(toy_dirs):
    with pytest.raises(WeightsError, match="is this a DIFFA adapter file"):
        weights.load_adapters(toy_dirs["whisper"] / "model.safetensors", n_heads=2)
