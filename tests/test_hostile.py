"""Files that ask for the impossible end in a sentence within a second, and never in garbage."""

import json
import os
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import QWEN3, SHAPES, edit_config, edit_tensors
from test_text import byte_level_bpe

from checkpoints.adapters import load_adapters
from checkpoints.command_line import add_model_arguments
from checkpoints.files import WeightsError, read_json, read_tensors
from checkpoints.lm import load_lm, read_lm_config, save_lm
from checkpoints.model import load_for_training, save_trained
from checkpoints.tokenizer import load_tokenizer
from checkpoints.whisper import load_whisper
from diffa import DIFFA
from diffusion_lm import DiffusionLM


@pytest.fixture(autouse=True)
def soon():
    """A test may take a few seconds on a busy machine, not the minutes of what is asked for."""
    started = time.perf_counter()
    yield
    assert time.perf_counter() - started < 20


@pytest.fixture
def adapters(toy, toy_dirs, tmp_path):
    save_trained(toy, tmp_path / "adapters", **toy_dirs, answer_length=18)
    return tmp_path / "adapters"


# Sizes


@pytest.mark.parametrize(
    "piece, fields",
    [
        ("whisper", {"encoder_layers": 10**6}),
        ("whisper", {"max_source_positions": 10**12}),
        ("whisper", {"d_model": 10**15}),
        ("whisper", {"d_model": 2**40, "encoder_attention_heads": 1}),
        ("whisper", {"num_mel_bins": 10**400}),
        ("whisper", {"d_model": 2}),
        ("whisper", {"encoder_attention_heads": 0}),
        ("llm", {"n_layers": 10**6}),
        ("llm", {"mlp_hidden_size": 10**18}),
        ("llm", {"embedding_size": 2**62}),
        ("llm", {"n_layers": 0}),
        ("llm", {"n_heads": 32}),  # heads of width 1
        ("llm", {"rope_theta": 0}),
        ("llm", {"rope_theta": float("nan")}),
        ("llm", {"rope_theta": 1e300}),
        ("llm", {"rms_norm_eps": 1e30}),
        ("llm", {"rms_norm_eps": float("inf")}),
    ],
)
def test_sizes_and_numbers_that_no_model_has_are_refused(dirs, piece, fields):
    edit_config(dirs[piece], **fields)
    with pytest.raises(WeightsError, match=str(dirs[piece])):
        load_whisper(dirs[piece]) if piece == "whisper" else load_lm(dirs[piece])


@pytest.mark.parametrize(
    "fields",
    [
        {"qformer_layers": 10**6},
        {"ffn": 10**12},
        {"taps": [0] * 10**5},
        {"taps": [0, -1, 2]},
        {"dropout": float("nan")},
        {"ffn": True},
    ],
)
def test_stage_1_does_not_make_stage_2_as_large_as_its_config_says(toy_dirs, tmp_path, fields):
    first = DIFFA.from_pretrained(**toy_dirs, stage="stage1", **SHAPES)
    save_trained(first, tmp_path, **toy_dirs)
    edit_config(tmp_path, adapters=read_json(tmp_path / "config.json")["adapters"] | fields)
    with pytest.raises(WeightsError, match="adapters.safetensors: not the shapes of adapters"):
        load_for_training(**toy_dirs, adapters=tmp_path, stage="stage2")


@pytest.mark.parametrize("size", [2**63, 10**12, 10**8])
@pytest.mark.parametrize("shape", [[10**11], [2**62, 4], [10**6, 10**6, 10**6]])
def test_a_header_that_asks_for_hundreds_of_gigabytes_is_refused(tmp_path, size, shape):
    header = {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * 10**11]}}
    text = json.dumps(header).encode()
    for claimed in (size, len(text)):
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", claimed) + text + bytes(64))
        with pytest.raises(WeightsError, match="x.safetensors.*download it again"):
            read_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1).expand(10**6, 10**6),
        torch.empty(3, 3, device="meta"),
        torch.eye(3).to_sparse(),
    ],
)
def test_a_pickle_of_tensors_without_their_numbers_is_refused(tmp_path, tensor):
    torch.save({"x": tensor}, tmp_path / "x.bin")
    with pytest.raises(WeightsError, match="x.bin"):
        read_tensors(tmp_path / "x.bin")


def test_an_archive_that_unpacks_to_more_than_itself_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**8))
    with pytest.raises(WeightsError, match="x.bin.*100,000"):
        read_tensors(tmp_path / "x.bin")


# Files


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.model"])
def test_a_pipe_a_folder_or_a_device_in_place_of_a_file_is_refused(dirs, make, name):
    (dirs["llm"] / name).unlink()
    make(dirs["llm"] / name)
    with pytest.raises(ValueError, match=str(dirs["llm"])):
        DIFFA.from_pretrained(**dirs, **SHAPES)
    for piece in ("whisper", "llm", "adapters"):
        with pytest.raises(ValueError, match=name):
            DIFFA.from_pretrained(**dirs | {piece: dirs["llm"] / name})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.model"])
def test_a_file_of_hundreds_of_gigabytes_is_not_read_into_memory(dirs, name):
    with open(dirs["llm"] / name, "r+b") as file:
        file.truncate(500 * 10**9)  # takes no place on the disk
    with pytest.raises(WeightsError, match=f"{name}: 500,000,000,000 bytes"):
        DIFFA.from_pretrained(**dirs, **SHAPES)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5,
        '{"a":' * 10**5,
        '{"d_model": 16, "d_model": 32}',
        "1" * 5000,
        '{"model_type": "whisper", "d_model": "\\ud800"}',
        b"\xff\xfe{\0}\0",
        b'{"caf\xe9": 1}',
    ],
)
def test_json_that_is_too_deep_doubled_or_not_utf_8_is_refused(dirs, text):
    data = text if isinstance(text, bytes) else text.encode()
    (dirs["whisper"] / "config.json").write_bytes(data)
    with pytest.raises(WeightsError, match="config.json: "):
        load_whisper(dirs["whisper"])


def test_files_are_utf_8_whatever_the_locale_and_may_begin_with_a_mark(dirs, tmp_path):
    config = dirs["whisper"] / "config.json"
    text = json.dumps(read_json(config) | {"café": "naïve"}, ensure_ascii=False)
    config.write_bytes(b"\xef\xbb\xbf" + text.encode())
    code = f"from checkpoints.files import read_json; print(ascii(read_json({str(config)!r})))"
    latin = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=latin,
        capture_output=True,
        text=True,
    )
    assert "'caf\\xe9': 'na\\xefve'" in done.stdout, done.stderr


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b", "", ".", "..", "a\0"])
def test_an_index_names_files_of_its_own_folder_alone(dirs, shard):
    index = dirs["llm"] / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(WeightsError, match="index.json: .*(in its folder|lacks)"):
        load_lm(dirs["llm"])


# Numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, -1])
def test_a_weight_that_is_no_number_is_named_with_its_file(dirs, adapters, value, place):
    def spoil(name):
        return lambda tensors: tensors[name].view(-1)[place].fill_(value)

    edit_tensors(dirs["whisper"], spoil("model.encoder.layers.1.fc1.weight"))
    with pytest.raises(WeightsError, match="model.safetensors: model.*1.fc1.weight: .*NaN or inf"):
        load_whisper(dirs["whisper"])
    edit_tensors(dirs["llm"], spoil("model.transformer.blocks.1.ff_proj.weight"))
    with pytest.raises(WeightsError, match="00001.safetensors: model.*ff_proj.weight: .*NaN"):
        load_lm(dirs["llm"])
    with pytest.raises(WeightsError, match="fc1.weight: .*NaN"):  # not: another encoder
        DIFFA.from_pretrained(**dirs, adapters=adapters)
    edit_tensors(adapters, spoil("acoustic_connector.layer_weights"))
    with pytest.raises(WeightsError, match="adapters.safetensors: acoustic.*layer_weights: .*NaN"):
        load_adapters(adapters, n_heads=2)


def test_weights_that_overflow_float16_are_refused_with_the_dtypes_that_hold_them(dirs):
    edit_tensors(dirs["llm"], lambda t: t["model.transformer.wte.weight"][3].fill_(1e6))
    assert load_lm(dirs["llm"], torch.bfloat16).embedding.weight[3, 0] > 9e5
    with pytest.raises(WeightsError, match="wte.weight: .*overflow float16; .*bfloat16"):
        load_lm(dirs["llm"], torch.float16)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int16])
def test_weights_that_need_a_scale_are_not_taken_as_numbers(dirs, dtype):
    name = "model.encoder.layers.1.fc1.weight"
    edit_tensors(dirs["whisper"], lambda t: t.update({name: t[name].to(dtype)}))
    with pytest.raises(WeightsError, match="fc1.weight is torch.*quantised"):
        load_whisper(dirs["whisper"])


@pytest.mark.parametrize(
    "fields, theta",
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 1e4}}, 1e4),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1_000_000}}, 1e6),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, 1e4),
        ({"rope_theta": 1e6, "rope_scaling": {"rope_theta": 1e4, "rope_type": "default"}}, 1e4),
        ({"rope_theta": None}, None),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}}, None),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, None),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, None),
        ({"rope_parameters": [1e4]}, None),
    ],
)
@pytest.mark.parametrize("family", ["llada", "qwen3"])
def test_rope_parameters_win_over_rope_theta_as_in_transformers(
    toy_dirs, tmp_path, family, fields, theta
):
    save_lm(DiffusionLM(QWEN3) if family == "qwen3" else load_lm(toy_dirs["llm"]), tmp_path)
    edit_config(tmp_path, **fields)
    if theta:
        assert read_lm_config(tmp_path).rope_theta == theta
    else:
        with pytest.raises(WeightsError, match="config.json: .*(rope_theta|rotary)"):
            read_lm_config(tmp_path)


# Tokenizers


@pytest.mark.parametrize("family", ["llada", "qwen3"])
@pytest.mark.parametrize("change", ["gone", "single_word"])
def test_a_marker_that_is_cut_into_letters_is_refused(tmp_path, family, change):
    config = byte_level_bpe(tmp_path, family)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["model"]["vocab"] |= {token["content"]: token["id"] for token in raw["added_tokens"]}
    load_tokenizer(tmp_path, config)
    if change == "gone":
        raw["added_tokens"] = []
    for token in raw["added_tokens"]:
        token["single_word"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="tokenizer.json: .* not encoded as its one id"):
        load_tokenizer(tmp_path, config)


def test_an_id_beyond_the_embeddings_is_refused(tmp_path):
    config = byte_level_bpe(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["model"]["vocab"][max(raw["model"]["vocab"], key=len)] = 10**6
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="1000001 ids in its tokenizer, the LM only"):
        load_tokenizer(tmp_path, config)


# Options


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0", "-1", "1e400", "", "x"])
def test_a_window_that_is_no_time_is_refused_by_the_parser(capsys, value):
    import argparse

    parser = argparse.ArgumentParser()
    add_model_arguments(parser, "")
    with pytest.raises(SystemExit):
        parser.parse_args([f"--audio-context={value}"])
    assert "must be a number of 0.01 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["--dtype=float8"])


@pytest.mark.parametrize("device", ["meta", "hpu", "cuda:99999999999999999999", "", "\0"])
def test_a_device_that_holds_no_numbers_is_refused(toy_dirs, device):
    with pytest.raises(WeightsError, match="--device .*: cannot be used here"):
        load_whisper(toy_dirs["whisper"], device=device)
