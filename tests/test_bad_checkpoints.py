"""A checkpoint that cannot be used is refused, with words that help; nothing in it is ever run."""

import os

import pytest
import torch
from conftest import QWEN3, SHAPES, edit_config, edit_tensors
from safetensors.torch import load_file, save_file

from checkpoints import files, fill
from checkpoints.command_line import one_line_errors
from checkpoints.files import (
    WeightsError,
    check_writable,
    read_tensors,
    save_tensors,
    whole_file,
    write_json,
)
from checkpoints.fill import check_device
from checkpoints.lm import load_lm, save_lm
from checkpoints.model import save_trained
from checkpoints.whisper import load_whisper
from data import AudioError, ManifestError
from diffa import DIFFA
from diffusion_lm import DiffusionLM

# Damaged files


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_named(dirs, share):
    file = dirs["whisper"] / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match="model.safetensors.*download it again"):
        load_whisper(dirs["whisper"])


def test_a_padded_safetensors_file_is_named(dirs):
    with open(dirs["whisper"] / "model.safetensors", "ab") as file:
        file.write(b"\0" * 64)
    with pytest.raises(
        WeightsError, match="model.safetensors.*cut short or padded.*download it again"
    ):
        load_whisper(dirs["whisper"])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_said_to_be_one(dirs, name):
    if name == "pytorch_model.bin":
        (dirs["whisper"] / "model.safetensors").unlink()
    (dirs["whisper"] / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n"
    )
    with pytest.raises(WeightsError, match=f"{name}: only a Git LFS pointer.*git lfs pull"):
        load_whisper(dirs["whisper"])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_bin_file_is_named(toy_dirs, tmp_path, share):
    torch.save(load_file(toy_dirs["whisper"] / "model.safetensors"), tmp_path / "x.bin")
    whole = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match="x.bin"):
        read_tensors(tmp_path / "x.bin")


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
        read_tensors(file)
    assert not trace.exists()


@pytest.mark.parametrize(
    "value", [torch.ones(3), {"epoch": 3}, {"model": {"weight": torch.ones(3)}}]
)
def test_a_bin_file_of_anything_but_named_tensors_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(WeightsError, match="x.bin"):
        read_tensors(tmp_path / "x.bin")


def test_shards_that_are_absent_are_all_named(dirs):
    save_lm(load_lm(dirs["llm"]), dirs["llm"], n_shards=3)
    for i in (1, 3):
        (dirs["llm"] / f"model-0000{i}-of-00003.safetensors").unlink()
    with pytest.raises(
        WeightsError, match="model-00001-of-00003.safetensors, model-00003-of-00003.safetensors"
    ):
        load_lm(dirs["llm"])


def test_an_index_that_disagrees_with_its_shards_is_refused(dirs):
    edit_tensors(dirs["llm"], lambda t: t.pop("model.transformer.ln_f.weight"))
    with pytest.raises(WeightsError, match="disagree about model.transformer.ln_f.weight"):
        load_lm(dirs["llm"])


def test_a_tensor_in_two_shards_is_refused(dirs):
    save_lm(load_lm(dirs["llm"]), dirs["llm"], n_shards=2)
    first, second = (dirs["llm"] / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file(load_file(second) | dict([next(iter(load_file(first).items()))]), second)
    with pytest.raises(WeightsError, match="is already in model-00001-of-00002.safetensors"):
        load_lm(dirs["llm"])


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 3}}']
)
def test_a_broken_index_is_named(dirs, text):
    (dirs["llm"] / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match="model.safetensors.index.json"):
        load_lm(dirs["llm"])


@pytest.mark.parametrize(
    "value",
    [
        {"model": {}},
        {"dims": 3, "model_state_dict": {}},
        {"dims": {"n_mels": 80}, "model_state_dict": {}},
        [1],
    ],
)
def test_a_pt_file_that_is_not_openai_s_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "tiny.pt")
    with pytest.raises(WeightsError, match="tiny.pt"):
        load_whisper(tmp_path / "tiny.pt")


def test_a_weights_file_in_place_of_its_directory_is_refused(toy_dirs):
    with pytest.raises(WeightsError, match="model.safetensors: pass the directory"):
        load_whisper(toy_dirs["whisper"] / "model.safetensors")


# Directories of the wrong kind


def test_the_two_directories_swapped_are_refused(toy_dirs):
    with pytest.raises(WeightsError, match="model_type is 'llada', expected 'whisper'"):
        load_whisper(toy_dirs["llm"])
    with pytest.raises(WeightsError, match="model_type is 'whisper', expected 'llada'"):
        load_lm(toy_dirs["whisper"])


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_a_broken_config_is_named(dirs, text):
    (dirs["whisper"] / "config.json").write_text(text)
    with pytest.raises(WeightsError, match="config.json"):
        load_whisper(dirs["whisper"])


def test_config_fields_that_lack_are_named(dirs):
    edit_config(dirs["whisper"], d_model=None, encoder_layers=None)
    with pytest.raises(WeightsError, match="config.json: lacks d_model, encoder_layers"):
        load_whisper(dirs["whisper"])


@pytest.mark.parametrize(
    "field, value",
    [
        ("activation_function", "relu"),
        ("d_model", "16"),
        ("d_model", 16.0),
        ("encoder_layers", True),
        ("encoder_ffn_dim", -32),
        ("encoder_attention_heads", 3),
    ],
)
def test_a_config_that_asks_for_what_we_cannot_do_is_refused(dirs, field, value):
    edit_config(dirs["whisper"], **{field: value})
    with pytest.raises(WeightsError, match=str(dirs["whisper"])):
        load_whisper(dirs["whisper"])


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"rope": False}, "rope is False"),
        ({"layer_norm_type": "low_precision"}, "layer_norm_type"),
        ({"n_kv_heads": 3}, "4 heads do not divide"),
    ],
)
def test_an_lm_of_another_architecture_is_refused(dirs, fields, said):
    edit_config(dirs["llm"], **fields)
    with pytest.raises(WeightsError, match=f"config.json: .*{said}"):
        load_lm(dirs["llm"])


def test_stretched_rotary_positions_are_refused(tmp_path):
    save_lm(DiffusionLM(QWEN3), tmp_path)
    edit_config(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(WeightsError, match="rotary positions.*yarn"):
        load_lm(tmp_path)


@pytest.mark.parametrize(
    "piece, name, command",
    [
        (
            "whisper",
            "whisper-small",
            "hf download openai/whisper-small config.json model.safetensors --local-dir ",
        ),
        ("whisper", "whisper-large-v3", "hf download openai/whisper-large-v3 config.json"),
        ("whisper", "medium.en.pt", "hf download openai/whisper-medium.en config.json"),
        ("whisper", "turbo.pt", "hf download openai/whisper-large-v3-turbo config.json"),
        (
            "llm",
            "models--GSAI-ML--LLaDA-8B-Base/snapshots/b0",
            "hf download GSAI-ML/LLaDA-8B-Base --local-dir ",
        ),
        ("adapters", "a folder/diffa", "/a folder/diffa'"),
        ("adapters", "diffa/stage2/pytorch_model.bin", "/diffa/stage2"),
        ("llm", "llada-8b", "hf download GSAI-ML/LLaDA-8B-Instruct --local-dir "),
        ("llm", "LLaDA-8B-Base", "hf download GSAI-ML/LLaDA-8B-Base --local-dir "),
        ("llm", "llada-1.5", "hf download GSAI-ML/LLaDA-1.5 --local-dir "),
        ("llm", "qwen3-0.6b", "hf download dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1 --local-dir "),
        ("adapters", "diffa", "hf download zhoujiaming777/DIFFA --local-dir "),
    ],
)
def test_a_piece_that_is_not_there_comes_with_its_download_command(
    toy, toy_dirs, tmp_path, piece, name, command
):
    save_trained(toy, tmp_path / "adapters", **toy_dirs)
    paths = {**toy_dirs, "adapters": tmp_path / "adapters", piece: tmp_path / name}
    with pytest.raises(WeightsError, match="no such directory") as error:
        DIFFA.from_pretrained(**paths)
    assert (
        command in str(error.value)
        and str(error.value).count("hf download") == 1
        and str(tmp_path / name) in str(error.value)
    )


def test_all_pieces_that_are_not_there_are_named_at_once():
    with pytest.raises(WeightsError) as error:
        DIFFA.from_pretrained("runs/none/whisper", "nowhere/llada-8b", "nowhere/diffa")
    assert str(error.value).count("hf download") == 2 and "make demo" in str(error.value)


def test_a_directory_that_is_absent_or_empty_is_named(dirs, tmp_path):
    with pytest.raises(WeightsError, match="nowhere: no such directory"):
        load_whisper(tmp_path / "nowhere")
    (dirs["whisper"] / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="neither model.safetensors"):
        load_whisper(dirs["whisper"])


@pytest.mark.parametrize("field", ["mask_token_id", "eos_token_id"])
def test_a_tokenizer_of_another_model_is_refused(dirs, field):
    edit_config(dirs["llm"], **{field: 3})
    with pytest.raises(ValueError, match="at 3; they belong to different models"):
        DIFFA.from_pretrained(**dirs, **SHAPES)


@pytest.mark.parametrize(
    "device, dtype, said",
    [
        ("cpu", torch.int8, "cannot run int8"),
        ("cuda:77", torch.float32, "cuda:77: cannot be used here"),
    ],
)
def test_a_device_or_dtype_that_cannot_run_is_refused_with_what_to_do(
    toy_dirs, device, dtype, said
):
    with pytest.raises(WeightsError, match=f"{said}.*(--dtype|--device)"):
        load_lm(toy_dirs["llm"], dtype, device)


@pytest.mark.parametrize(
    "error, said",
    [
        (torch.OutOfMemoryError("out of memory"), "memory is full already"),
        (RuntimeError(""), "RuntimeError"),
    ],
)
def test_what_a_device_says_when_tried_is_passed_on(monkeypatch, error, said):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(fill.F, "linear", fail)
    with pytest.raises(WeightsError, match=said) as raised:
        check_device("cpu", torch.float32)
    assert raised.value.__cause__ is error


def test_bfloat16_on_a_gpu_that_only_imitates_it_is_refused(monkeypatch):
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device, **options: ones(*shape, **options))
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation
    )
    with pytest.raises(
        WeightsError, match="--device cuda: cannot run bfloat16; pass --dtype float16"
    ):
        check_device("cuda", torch.bfloat16)


# Files that are written whole or not at all


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    path = tmp_path / "new folder" / "x.txt"
    for text in ("first", "second"):
        with whole_file(path) as temporary:
            temporary.write_text(text)
            assert path.exists() == (text == "second") and temporary.parent == path.parent
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "error, raised",
    [
        (ValueError("odd"), ValueError),
        (OSError(28, "No space left on device"), OSError),
        (RuntimeError("iostream"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_an_old_file_stays_whole_when_the_writing_fails(tmp_path, error, raised):
    path = tmp_path / "x.json"
    write_json(path, {"old": True})
    before = path.read_bytes()
    with pytest.raises(raised, match="x.json: cannot be saved" if raised is OSError else None):
        with whole_file(path) as temporary:
            temporary.write_text("half of")
            raise error
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_tensors_that_cannot_be_written_leave_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(2)})

    def half(tensors, file, metadata):
        file.write_bytes(b"half")
        raise files.SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(OSError, match="x.safetensors: cannot be saved .*No space left"):
        save_tensors(path, {"a": torch.zeros(2)})
    assert torch.equal(read_tensors(path)["a"], torch.ones(2)) and list(tmp_path.iterdir()) == [
        path
    ]


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(OSError, match="File exists: .*/x'"):
        write_json(tmp_path / "x" / "y.json", {})


# Errors of commands


@pytest.mark.parametrize(
    "error, line",
    [
        (WeightsError("llm: no such file"), "ask.py: llm: no such file"),
        (AudioError("a.wav: empty"), "ask.py: a.wav: empty"),
        (ManifestError("m.json: empty"), "ask.py: m.json: empty"),
        (OSError("disk full"), "ask.py: disk full"),
    ],
)
def test_an_error_that_a_user_can_cause_is_one_line(error, line):
    with pytest.raises(SystemExit) as raised, one_line_errors("ask.py"):
        raise error
    assert raised.value.code == line


def test_what_cannot_be_saved_is_known_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new.html")
    check_writable(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    device = tmp_path / "device"  # such as /dev/null, which root could replace
    os.mkfifo(device)
    for path in (tmp_path, tmp_path / "gone" / "x", tmp_path / "file" / "x", device):
        with pytest.raises(OSError, match="cannot be saved"):
            check_writable(path)
    with pytest.raises(OSError, match="a folder or a device"):
        write_json(device, {})


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), None]
)
def test_too_little_memory_is_one_line(error):
    with pytest.raises(SystemExit, match="ask.py: too little memory .*take a smaller model"):
        with one_line_errors("ask.py"):
            if error:
                raise error
            torch.empty(10**15)


def test_an_error_of_the_code_keeps_its_trace():
    with pytest.raises(KeyError), one_line_errors("ask.py"):
        raise KeyError("bug")


def test_ctrl_c_ends_in_one_line_and_130(capsys):
    with pytest.raises(SystemExit) as raised, one_line_errors("ask.py"):
        raise KeyboardInterrupt
    assert raised.value.code == 130
    assert capsys.readouterr().err == "ask.py: stopped; run the same command to resume\n"
