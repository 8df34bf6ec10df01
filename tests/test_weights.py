"""A checkpoint of every published form is read exactly, and a saved one returns as it was."""

import json
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import ENCODER, QWEN3, SHAPES, edit_config, edit_tensors
from safetensors.torch import load_file, save_file

from adapters import AcousticAdapter, AdapterConfig, SemanticAdapter
from checkpoints import files, fill, key_tables
from checkpoints.adapters import load_adapters
from checkpoints.files import Checkpoint, WeightsError
from checkpoints.lm import load_lm, read_lm_config, save_lm
from checkpoints.model import load_for_training, random_pieces, save_trained
from checkpoints.whisper import cut_window, load_whisper, read_whisper_config, save_whisper
from data import build_prompt
from diffa import AUDIO_PARTS, DIFFA, splice
from diffusion_lm import DiffusionLM, LMConfig
from encoder import WhisperEncoder


def equal(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def equal_parts(first, second):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        equal(first, second)


def hear(model, n_samples=(9000, 12_800)):
    torch.manual_seed(2)
    clips = torch.randn(len(n_samples), ENCODER.n_samples)
    with torch.inference_mode():
        return model.hear(*model.encode(clips, torch.tensor(n_samples)))[0]


# Roundtrips


def test_encoder_returns_as_it_was_saved(toy_dirs, tmp_path):
    encoder = load_whisper(toy_dirs["whisper"])
    save_whisper(encoder, tmp_path / "again")
    again = load_whisper(tmp_path / "again")
    assert again.config == encoder.config == ENCODER
    equal(again, encoder)


@pytest.mark.parametrize("n_shards", [1, 3])
def test_lm_returns_as_it_was_saved(toy_dirs, tmp_path, n_shards):
    lm = load_lm(toy_dirs["llm"])
    save_lm(lm, tmp_path / "again", n_shards)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) == n_shards
    again = load_lm(tmp_path / "again")
    assert again.config == lm.config
    equal(again, lm)


@pytest.mark.parametrize("stage", ["stage1", "stage2", "semantic"])
def test_diffa_hears_the_same_after_save_and_load(toy_dirs, tmp_path, stage):
    model = DIFFA.from_pretrained(**toy_dirs, stage=stage, **SHAPES).eval()
    save_trained(model, tmp_path / "saved", **toy_dirs)
    again = DIFFA.from_pretrained(**toy_dirs, adapters=tmp_path / "saved").eval()
    assert (again.stage, again.config) == (stage, model.config)
    assert torch.equal(hear(again), hear(model))


def test_stage_2_starts_from_the_semantic_adapter_of_stage_1(toy_dirs, tmp_path):
    first = DIFFA.from_pretrained(**toy_dirs, stage="stage1", **SHAPES)
    save_trained(first, tmp_path / "stage1", **toy_dirs)
    second = load_for_training(**toy_dirs, adapters=tmp_path / "stage1", stage="stage2").model
    equal(second.semantic, first.semantic)
    assert second.config == first.config


def test_loaded_adapters_can_train_and_frozen_parts_cannot(toy_dirs, toy, tmp_path):
    save_trained(toy, tmp_path / "saved", **toy_dirs)
    again = DIFFA.from_pretrained(**toy_dirs, adapters=tmp_path / "saved")
    assert all(
        p.requires_grad for part in (again.semantic, again.acoustic) for p in part.parameters()
    )
    assert not any(p.requires_grad for part in (again.encoder, again.lm) for p in part.parameters())


def test_training_loaded_adapters_leaves_their_file_as_it_was(toy, toy_dirs, tmp_path):
    save_trained(toy, tmp_path, **toy_dirs)
    before = (tmp_path / "adapters.safetensors").read_bytes()
    again = DIFFA.from_pretrained(**toy_dirs, adapters=tmp_path)
    with torch.no_grad():
        for parameter in again.semantic.parameters():
            parameter.add_(1)  # in place, on memory that is mapped from the file
    assert (tmp_path / "adapters.safetensors").read_bytes() == before


def test_loading_shows_how_far_it_is_in_bytes(toy_dirs, monkeypatch):
    bars = []

    class Bar(fill.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False, "delay": 0})
            bars.append(self)

    monkeypatch.setattr(fill, "tqdm", Bar)
    lm = load_lm(toy_dirs["llm"])
    assert [(bar.n, bar.total, bar.desc) for bar in bars] == [
        (n := sum(p.nbytes for p in lm.parameters()), n, "loading llada")
    ]


def test_frozen_parts_in_bfloat16_work_with_adapters_in_float32(toy_dirs):
    model = DIFFA.from_pretrained(**toy_dirs, stage="stage2", dtype=torch.bfloat16, **SHAPES).eval()
    assert {p.dtype for p in model.semantic.parameters()} == {torch.float32}
    states, frames = model.encode(torch.randn(1, ENCODER.n_samples), torch.tensor([9000]))
    prompt = splice(
        model.lm, [build_prompt(model.tokenizer, "What is said?")], *model.hear(states, frames)
    )
    assert prompt.embeddings.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_encoder_in_shards_is_read_alike(dirs, kind):
    whole = load_whisper(dirs["whisper"])
    tensors = load_file(dirs["whisper"] / "model.safetensors")
    (dirs["whisper"] / "model.safetensors").unlink()
    main = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    weight_map = {}
    for i in range(3):
        shard = {name: tensors[name] for name in sorted(tensors)[i::3]}
        (save_file if kind == "safetensors" else torch.save)(
            shard, dirs["whisper"] / f"part{i}.{kind}"
        )
        weight_map |= dict.fromkeys(shard, f"part{i}.{kind}")
    (dirs["whisper"] / f"{main}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    equal(load_whisper(dirs["whisper"]), whole)


def test_a_bin_file_from_before_zip_archives_is_read_alike(dirs):
    whole = load_whisper(dirs["whisper"])
    torch.save(
        load_file(dirs["whisper"] / "model.safetensors"),
        dirs["whisper"] / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    (dirs["whisper"] / "model.safetensors").unlink()
    equal(load_whisper(dirs["whisper"]), whole)


def test_frozen_parts_keep_the_file_s_dtype_and_adapters_are_float32(toy, toy_dirs, dirs, tmp_path):
    save_lm(load_lm(toy_dirs["llm"]).bfloat16(), dirs["llm"])
    save_trained(toy, tmp_path / "saved", **toy_dirs)
    edit_tensors(
        tmp_path / "saved",
        lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}),
    )
    model = DIFFA.from_pretrained(**dirs, adapters=tmp_path / "saved")
    assert {p.dtype for p in model.lm.parameters()} == {torch.bfloat16}
    assert {
        p.dtype
        for part in (model.semantic, model.acoustic, model.encoder)
        for p in part.parameters()
    } == {torch.float32}
    assert {p.dtype for p in load_lm(dirs["llm"], torch.float32).parameters()} == {torch.float32}


class Baseline(DiffusionLM):
    """Stands in for the autoregressive baseline, which is a subclass too."""


def test_an_autoregressive_lm_is_loaded_as_its_class_alone(toy_dirs, tmp_path):
    lm = load_lm(toy_dirs["llm"])
    save_lm(lm, tmp_path, causal=True)
    with pytest.raises(WeightsError, match="config.json: causal is true, .*pass a diffusion LM"):
        load_lm(tmp_path)
    again = load_lm(tmp_path, lm_class=Baseline)
    assert type(again) is Baseline and again.config == lm.config == read_lm_config(tmp_path)
    equal(again, lm)


def test_a_diffusion_lm_is_not_loaded_as_an_autoregressive_one(toy_dirs):
    with pytest.raises(
        WeightsError,
        match="config.json: causal is false.*pass an autoregressive baseline .*lab.baseline",
    ):
        load_lm(toy_dirs["llm"], lm_class=Baseline)


def test_a_whole_model_is_loaded_around_the_baseline_and_refused_without_its_class(dirs, tmp_path):
    shutil.copytree(dirs["llm"], tmp_path / "baseline")
    edit_config(tmp_path / "baseline", causal=True)
    model = DIFFA.from_pretrained(
        dirs["whisper"], tmp_path / "baseline", lm_class=Baseline, **SHAPES
    )
    assert type(model.lm) is Baseline
    with pytest.raises(WeightsError, match="causal is true"):
        DIFFA.from_pretrained(dirs["whisper"], tmp_path / "baseline", **SHAPES)
    with pytest.raises(WeightsError, match="causal is false"):
        DIFFA.from_pretrained(**dirs, lm_class=Baseline, **SHAPES)
    assert type(random_pieces("toy+toy", lm_class=Baseline)[1]) is Baseline


@pytest.mark.parametrize(
    "config",
    [
        QWEN3,
        replace(QWEN3, tied=False, rope_theta=1e4),
        LMConfig(
            width=24,
            n_layers=2,
            n_heads=4,
            ffn=20,
            vocab=30,
            mask_id=28,
            end_id=29,
            n_kv_heads=2,
            tied=True,
        ),
    ],
)
def test_every_shape_of_both_families_returns_as_it_was_saved(tmp_path, config):
    lm = DiffusionLM(config)
    save_lm(lm, tmp_path, n_shards=2)
    again = load_lm(tmp_path)
    assert again.config == config
    equal(again, lm)
    assert (again.unembedding.weight is again.embedding.weight) == config.tied


def test_llada_s_format_does_not_take_what_it_cannot_say(tmp_path):
    with pytest.raises(ValueError, match="norms on heads"):
        save_lm(DiffusionLM(replace(QWEN3, family="llada")), tmp_path)


def test_a_tied_table_that_lies_in_the_file_twice_must_be_one(tmp_path):
    save_lm(DiffusionLM(QWEN3), tmp_path)
    edit_tensors(
        tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    index = tmp_path / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(
        json.dumps({"weight_map": names | {"lm_head.weight": next(iter(names.values()))}})
    )
    assert load_lm(tmp_path).config.tied
    edit_tensors(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(WeightsError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_lm(tmp_path)


def test_qwen3_s_mask_and_end_are_found_by_name_in_its_tokenizer(tmp_path):
    save_lm(DiffusionLM(QWEN3), tmp_path)
    edit_config(tmp_path, mask_token_id=None, eos_token_id=3, pad_token_id=None)
    added = [{"id": 26, "content": "<|endoftext|>"}, {"id": 27, "content": "<|mask|>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    config = read_lm_config(tmp_path)
    assert (config.mask_id, config.end_id) == (27, 26)


# A shorter window


def test_a_cut_window_is_the_encoder_without_its_last_positions(toy_dirs):
    whole, cut = (
        load_whisper(toy_dirs["whisper"]),
        load_whisper(toy_dirs["whisper"], audio_context=0.4),
    )
    assert cut.config == replace(ENCODER, context=20) and torch.equal(
        cut.positions, whole.positions[:20]
    )
    mel = torch.randn(1, 80, 40)
    assert torch.equal(cut(mel)[0][:, :19], whole(torch.cat([mel, mel], dim=-1))[0][:, :19])


@pytest.mark.parametrize("seconds", [0.0, -1.0, 0.9, 30.0])
def test_a_window_that_the_encoder_does_not_have_is_refused(toy_dirs, seconds):
    with pytest.raises(
        ValueError, match=f"window of {seconds:g} s is requested; this encoder's has 0.8 s"
    ):
        load_whisper(toy_dirs["whisper"], audio_context=seconds)


def test_a_window_is_cut_from_a_new_encoder_and_leaves_the_whole_one_alone(toy_dirs):
    whole = load_whisper(toy_dirs["whisper"])
    cut = cut_window(whole, 0.4)
    assert whole.config == read_whisper_config(toy_dirs["whisper"]) == ENCODER
    assert len(whole.positions) == 40 and len(cut.positions) == 20
    assert cut.conv1.weight.data_ptr() == whole.conv1.weight.data_ptr()
    assert cut_window(whole, None) is whole


def test_adapters_remember_the_window_they_were_trained_with(toy_dirs, tmp_path):
    model = DIFFA.from_pretrained(**toy_dirs, stage="stage2", audio_context=0.4, **SHAPES).eval()
    save_trained(model, tmp_path, **toy_dirs)
    again = DIFFA.from_pretrained(**toy_dirs, adapters=tmp_path).eval()
    assert again.encoder.config.context == 20
    other = {**toy_dirs, "adapters": tmp_path, "audio_context": 0.8}
    with pytest.raises(WeightsError, match="trained with a window of 0.4 s, not 0.8 s.*force"):
        DIFFA.from_pretrained(**other)
    forced = DIFFA.from_pretrained(**other, allow_other_parts=True)
    assert forced.encoder.config.context == 40
    edit_config(
        tmp_path, audio_context=None
    )  # as directories of a whole window were written before
    assert DIFFA.from_pretrained(**toy_dirs, adapters=tmp_path).encoder.config.context == 40


# New parts and parts that are read


def by_hand(config, seed):
    """The three parts in the order in which a DIFFA has always drawn them."""
    torch.manual_seed(seed)
    prompts = torch.randn(config.n_prompts, config.lm_width)
    return {
        "prompts": prompts,
        "semantic": SemanticAdapter(config),
        "acoustic": AcousticAdapter(config),
    }


@pytest.mark.parametrize("stage", AUDIO_PARTS)
def test_a_seed_gives_a_part_the_same_weights_in_every_stage(toy_dirs, stage):
    torch.manual_seed(5)
    loaded = load_for_training(**toy_dirs, stage=stage, **SHAPES)
    assert loaded.new == AUDIO_PARTS[stage] and loaded.model.stage == stage
    expected = by_hand(loaded.model.config, 5)
    for name, part in loaded.model.trained_parts().items():
        equal_parts(part, expected[name])


def test_what_is_drawn_after_loading_does_not_depend_on_the_adapters_file(toy, toy_dirs, tmp_path):
    save_trained(toy, tmp_path, **toy_dirs)
    torch.manual_seed(5)
    DIFFA.from_pretrained(**toy_dirs, stage="stage2", **SHAPES)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loaded = load_for_training(**toy_dirs, adapters=tmp_path)
    assert torch.equal(torch.rand(3), expected) and loaded.new == ()


def test_only_the_parts_that_the_file_lacks_are_new_and_the_file_is_read_once(
    toy_dirs, tmp_path, monkeypatch
):
    first = DIFFA.from_pretrained(**toy_dirs, stage="stage1", **SHAPES)
    save_trained(first, tmp_path, **toy_dirs)
    reads = []
    read = files.read_tensors
    monkeypatch.setattr(
        files, "read_tensors", lambda path: (reads.append(path.name), read(path))[1]
    )
    torch.manual_seed(5)
    loaded = load_for_training(**toy_dirs, adapters=tmp_path, stage="stage2")
    assert loaded.new == ("acoustic",) and reads.count("adapters.safetensors") == 1
    equal(loaded.model.semantic, first.semantic)
    equal(loaded.model.acoustic, by_hand(loaded.model.config, 5)["acoustic"])
    assert loaded.model.prompts is None


# Memory


def test_a_checkpoint_in_shards_holds_one_file_at_a_time(toy_dirs, tmp_path):
    save_lm(load_lm(toy_dirs["llm"]), tmp_path, n_shards=3)
    tensors = Checkpoint(*sorted(tmp_path.glob("*.safetensors")))
    first, *_, last = tensors
    assert tensors.files[first] != tensors.files[last]
    held = weakref.ref(tensors[first])
    assert held() is not None and tensors[last].numel()
    assert held() is None
    assert torch.equal(tensors[first], load_file(tensors.files[first])[first])


def test_fill_leaves_its_tensors_as_they_were(toy_dirs):
    tensors = load_file(toy_dirs["whisper"] / "model.safetensors") | {
        "model.decoder.x": torch.ones(1)
    }
    before = dict(tensors)
    encoder = WhisperEncoder(ENCODER)
    fill.fill(
        encoder, tensors, key_tables.WHISPER_KEYS, key_tables.WHISPER_DROPPED, toy_dirs["whisper"]
    )
    assert tensors.keys() == before.keys() and all(tensors[name] is before[name] for name in before)


# Tensors that do not fit


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda t: t.pop("model.encoder.conv1.weight"),
            "missing model.encoder.conv1.weight (16, 80, 3)",
        ),
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
        load_whisper(dirs["whisper"])
    assert said in str(error.value) and str(dirs["whisper"]) in str(error.value)


def test_the_shard_of_a_tensor_that_does_not_fit_is_named(dirs):
    save_lm(load_lm(dirs["llm"]), dirs["llm"], n_shards=3)
    (shard,) = [
        f
        for f in dirs["llm"].glob("*-of-00003.*")
        if "model.transformer.ln_f.weight" in load_file(f)
    ]
    tensors = load_file(shard)
    save_file(tensors | {"model.transformer.ln_f.weight": torch.ones(3)}, shard)
    with pytest.raises(
        WeightsError,
        match=rf"ln_f.weight is \(3,\) in the file, \(32,\) by the config \({shard.name}\)",
    ):
        load_lm(dirs["llm"])


def test_quantised_weights_are_refused(dirs):
    edit_tensors(
        dirs["whisper"],
        lambda t: t.update({"model.encoder.conv1.weight": torch.ones(16, 80, 3, dtype=torch.int8)}),
    )
    with pytest.raises(WeightsError, match="conv1.weight is torch.int8: quantised"):
        load_whisper(dirs["whisper"])


def test_a_config_of_other_shapes_than_the_tensors_is_refused(dirs):
    edit_config(dirs["llm"], mlp_hidden_size=50)
    with pytest.raises(
        WeightsError,
        match=r"blocks.0.ff_proj.weight is \(48, 32\) in the file, \(50, 32\) by the config",
    ):
        load_lm(dirs["llm"])


# Adapters


def release(path, config, extra=()):
    """Write adapters as the release does, with copies of the frozen parts; returns the modules."""
    torch.manual_seed(6)
    semantic, acoustic, prompts = (
        SemanticAdapter(config),
        AcousticAdapter(config),
        torch.randn(config.n_prompts, config.lm_width),
    )
    tensors = fill.named(semantic, key_tables.SEMANTIC_KEYS) | fill.named(
        acoustic, key_tables.ACOUSTIC_KEYS
    )
    tensors |= {
        "trainable_prompts.weight": prompts,
        "whisper_model.decoder.layers.0.fc1.weight": torch.ones(2),
    }
    torch.save(tensors | dict(extra), path)
    return semantic, acoustic, prompts


RELEASE = AdapterConfig(encoder_width=16, lm_width=32, n_heads=2, n_queries=5)


@pytest.mark.parametrize("by", ["file", "directory"])
def test_the_release_s_file_is_read_without_its_copies_of_frozen_parts(tmp_path, by):
    semantic, acoustic, prompts = release(tmp_path / "pytorch_model.bin", RELEASE)
    config, parts, info = load_adapters(
        tmp_path / "pytorch_model.bin" if by == "file" else tmp_path, n_heads=2
    )
    assert (config, info) == (RELEASE, {})
    equal(parts["semantic"], semantic)
    equal(parts["acoustic"], acoustic)
    assert torch.equal(parts["prompts"], prompts)


def test_a_release_of_several_files_asks_which(tmp_path):
    for stage in ("stage1", "stage2"):
        (tmp_path / stage).mkdir()
        release(tmp_path / stage / "pytorch_model.bin", RELEASE)
    with pytest.raises(WeightsError, match="stage1/pytorch_model.bin, .*stage2/pytorch_model.bin"):
        load_adapters(tmp_path, n_heads=2)


def test_the_release_s_taps_follow_the_depth_of_the_encoder(toy_dirs, tmp_path):
    torch.manual_seed(0)
    save_whisper(WhisperEncoder(replace(ENCODER, n_layers=4)), tmp_path / "whisper")
    release(tmp_path / "pytorch_model.bin", RELEASE)  # four taps, as tiny, small and medium have
    model = DIFFA.from_pretrained(
        tmp_path / "whisper", toy_dirs["llm"], tmp_path / "pytorch_model.bin"
    )
    assert model.config.taps == (0, 1, 2, 3)


def test_a_release_s_stage_1_serves_an_encoder_of_any_depth(toy_dirs, tmp_path):
    torch.manual_seed(0)
    save_whisper(WhisperEncoder(replace(ENCODER, n_layers=4)), tmp_path / "whisper")
    release(tmp_path / "x.bin", RELEASE)
    tensors = torch.load(tmp_path / "x.bin", weights_only=True)
    torch.save(
        {name: t for name, t in tensors.items() if not name.startswith("acoustic")},
        tmp_path / "x.bin",
    )
    where = (tmp_path / "whisper", toy_dirs["llm"], tmp_path / "x.bin")
    assert DIFFA.from_pretrained(*where).stage == "stage1"
    second = load_for_training(*where, stage="stage2")
    assert second.model.acoustic.taps == (0, 1, 2, 3)  # new, of this encoder's taps


def test_a_release_in_shards_is_read_alike(tmp_path):
    semantic, acoustic, _ = release(tmp_path / "whole.bin", RELEASE)
    tensors, weight_map = torch.load(tmp_path / "whole.bin", weights_only=True), {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        torch.save({name: tensors[name] for name in names}, tmp_path / f"pytorch_model-{i}.bin")
        weight_map |= dict.fromkeys(names, f"pytorch_model-{i}.bin")
    (tmp_path / "whole.bin").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _, parts, _ = load_adapters(tmp_path, n_heads=2)
    equal(parts["semantic"], semantic)
    equal(parts["acoustic"], acoustic)


def test_the_only_adapters_below_a_directory_are_meant(tmp_path):
    (tmp_path / "stage2").mkdir()
    release(tmp_path / "stage2/pytorch_model.bin", RELEASE)
    assert load_adapters(tmp_path, n_heads=2)[0] == RELEASE


def test_taps_of_a_release_can_be_told(toy_dirs, tmp_path):
    torch.manual_seed(0)
    save_whisper(WhisperEncoder(replace(ENCODER, n_layers=5)), tmp_path / "whisper")
    release(tmp_path / "x.bin", replace(RELEASE, taps=(1, 4)))
    where = (tmp_path / "whisper", toy_dirs["llm"], tmp_path / "x.bin")
    with pytest.raises(
        WeightsError,
        match="x.bin: .*taps 2 hidden states, and of 5 encoder layers 0 are tapped; pass taps=",
    ):
        DIFFA.from_pretrained(*where)
    assert DIFFA.from_pretrained(*where, taps=(1, 4)).acoustic.taps == (1, 4)
    with pytest.raises(ValueError, match="taps 2 hidden states"):
        DIFFA.from_pretrained(*where, taps=(1, 2, 4))
    with pytest.raises(ValueError, match="n_queries: .*are known"):  # they are the file's
        DIFFA.from_pretrained(*where, taps=(1, 4), n_queries=3)


@pytest.mark.parametrize(
    "change",
    [
        {"semantic_connector.conv.0.weight": torch.tensor(1.0)},
        {"trainable_prompts.weight": torch.tensor(1.0)},
        {"acoustic_connector.layer_weights": torch.ones(5)},
        {"acoustic_connector.qformer.layer.x.weight": torch.ones(5)},
    ],
)
def test_tensors_that_have_no_shapes_of_adapters_are_refused(tmp_path, change):
    release(tmp_path / "x.bin", RELEASE, change)
    with pytest.raises(WeightsError, match="x.bin: not the shapes of adapters"):
        load_adapters(tmp_path / "x.bin", n_heads=2)


@pytest.mark.parametrize(
    "fields", [3, {"taps": 3}, {"n_heads": 3}, {"n_heads": "2"}, {"n_heads": 0}]
)
def test_a_config_that_has_no_shapes_of_adapters_is_refused(toy, toy_dirs, tmp_path, fields):
    save_trained(toy, tmp_path, **toy_dirs)
    edit_config(tmp_path, adapters=fields)
    with pytest.raises(WeightsError, match="adapters.safetensors: not the shapes of adapters"):
        DIFFA.from_pretrained(**toy_dirs, adapters=tmp_path)


def test_what_does_not_fit_the_memory_is_said_with_what_to_do(dirs, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("out of memory\nand so on")

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(
        WeightsError,
        match="after 0.0 of 0.0 GB on cpu: out of memory; take a smaller model, --dtype",
    ):
        load_lm(dirs["llm"])


def test_tensors_that_no_adapter_knows_are_named(tmp_path):
    release(tmp_path / "x.bin", RELEASE, {"pooler.weight": torch.ones(1)})
    with pytest.raises(WeightsError, match=r"(?s)x.bin: .*extra pooler.weight \(1,\) in x.bin"):
        load_adapters(tmp_path / "x.bin", n_heads=2)


def test_half_an_adapter_is_refused(toy, toy_dirs, tmp_path):
    save_trained(toy, tmp_path, **toy_dirs)
    edit_tensors(tmp_path, lambda t: t.pop("acoustic_connector.proj.1.bias"))
    with pytest.raises(WeightsError, match=r"missing acoustic_connector.proj.1.bias \(32,\)"):
        DIFFA.from_pretrained(**toy_dirs, adapters=tmp_path)


def test_adapters_of_another_width_are_refused(toy, toy_dirs, tmp_path):
    save_trained(toy, tmp_path / "adapters", **toy_dirs)
    save_whisper(WhisperEncoder(replace(ENCODER, width=24)), tmp_path / "wider")
    with pytest.raises(ValueError, match="encoder_width 16, this one has 24"):
        DIFFA.from_pretrained(tmp_path / "wider", toy_dirs["llm"], tmp_path / "adapters")


def test_a_file_without_adapters_is_refused(toy_dirs):
    with pytest.raises(WeightsError, match="is this a DIFFA adapter file"):
        load_adapters(toy_dirs["whisper"] / "model.safetensors", n_heads=2)
