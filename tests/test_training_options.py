"""Settings of training take effect or are refused, and checks come before long work."""

import json

import pytest
import soundfile
from test_stage import FEW, manifest, train  # noqa: F401 (fixture)

import train_asr
import train_instruct
from checkpoints.files import read_json
from checkpoints.model import load_diffa
from training import stage as stage_module


def ask(module, dirs, tmp_path, *options):
    """Run a stage that must be refused; returns what it says."""
    with pytest.raises(SystemExit) as stopped:
        train(module, dirs, tmp_path / "out", tmp_path / "train.json", *options)
    return str(stopped.value)


@pytest.mark.parametrize(
    "option, value",
    [
        *((name, bad) for name in ("steps", "batch", "epochs", "queries") for bad in (0, -5)),
        *((name, 0) for name in ("accumulate", "save-every", "validation-items", "keep")),
        *((name, -1) for name in ("workers", "max-unreadable", "seed", "lr", "t-min")),
        ("seed", 2**32),
        ("lr", 1e20),
        ("steps", 10**400),
        ("lr", "nan"),
        ("lr", "inf"),
        ("t-min", 1),
    ],
)
def test_values_without_meaning_are_refused_at_the_parser(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit) as stopped:
        train_asr.main([f"--{option}={value}", f"--out={tmp_path / 'out'}"])
    assert stopped.value.code == 2 and f"--{option}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, says",
    [
        (["--steps", 2, "--epochs", 2], "exclude each other"),
        (["--workers", 2], "--workers"),
        (["--validate-every", 2], "without --validation"),
        (["--dtype", "float16"], "use bfloat16 or float32"),
        (["--validation", "nowhere.json"], "no such manifest"),
        (["--queries", 4], "--queries 4 has no effect: stage1"),
        (["--whiten"], "--whiten has no effect"),
        (["--pretrained-lr-scale", 0.5], "--pretrained-lr-scale has no effect"),
    ],
)
def test_what_cannot_take_effect_is_refused(
    toy_dirs,
    manifest,  # noqa: F811
    tmp_path,
    options,
    says,
):
    manifest()
    assert says in ask(train_asr, toy_dirs, tmp_path, *options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_refused_first(tmp_path):
    (tmp_path / "out").write_text("a file")
    assert "out is not a folder" in ask(train_asr, {"whisper": "no", "llm": "no"}, tmp_path)


def test_a_new_acoustic_adapter_has_the_shapes_that_were_asked_for(
    toy_dirs,
    manifest,  # noqa: F811
    tmp_path,
    capsys,  # noqa: F811
):
    path = manifest()
    train(train_asr, toy_dirs, tmp_path / "stage1", path, "--epochs", 2, "--batch", 4)
    assert "2 epochs of 8 items are 4 steps" in capsys.readouterr().out
    options = ["--adapters", tmp_path / "stage1", "--queries", 5, "--answer-length", 20]
    options += ["--steps", 1, "--batch", 4]
    train(train_instruct, toy_dirs, tmp_path / "out", path, *options)
    printed = capsys.readouterr().out
    assert "'n_queries': 5" in printed and "answer_length=20" in printed
    model = load_diffa(toy_dirs["whisper"], toy_dirs["llm"], tmp_path / "out")
    assert model.acoustic.layer_weights.shape[0] == 5
    assert read_json(tmp_path / "out/config.json")["answer_length"] == 20


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_run_without_one_readable_clip_is_an_error(
    toy_dirs,
    manifest,  # noqa: F811
    tmp_path,
    cache,
):
    manifest()
    for file in tmp_path.glob("*.wav"):
        file.write_bytes(b"RIFF")
    said = ask(train_asr, toy_dirs, tmp_path, *FEW, "--cache-encoder", cache)
    assert "8 clips cannot be read" in said
    assert not (tmp_path / "out/adapters.safetensors").exists()


def test_clips_near_the_window_are_kept_and_longer_ones_with_cut(
    toy_dirs,
    manifest,  # noqa: F811
    tmp_path,
):
    def longer(i, item):
        samples, rate = soundfile.read(tmp_path / item["audio_filepath"])
        n = int(0.8 * rate) + (1 if i < 7 else rate)
        samples = [*samples, *samples, *samples, *samples, *samples, *samples][:n]
        soundfile.write(tmp_path / item["audio_filepath"], samples, rate)
        return item | {"duration": n / rate}

    path = manifest(change=longer)
    train(train_asr, toy_dirs, tmp_path / "near", path, *FEW, "--max-unreadable", 0)
    path.write_text(json.dumps(json.loads(path.read_text())[7:]))
    assert "pass --cut" in ask(train_asr, toy_dirs, tmp_path, *FEW)
    train(train_asr, toy_dirs, tmp_path / "out", path, *FEW, "--cut", "--max-unreadable", 0)


def test_a_finished_run_and_other_settings_are_seen_before_any_clip_is_encoded(
    toy_dirs,
    manifest,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,  # noqa: F811
):
    path = manifest()
    train(train_asr, toy_dirs, tmp_path / "out", path, *FEW)
    before = (tmp_path / "out/training.json").read_bytes()

    def never(*arguments, **options):
        raise AssertionError("a clip was encoded")

    monkeypatch.setattr(stage_module.DIFFA, "encode", never)
    train(train_asr, toy_dirs, tmp_path / "out", path, *FEW)
    assert "this run is finished" in capsys.readouterr().out
    assert (tmp_path / "out/training.json").read_bytes() == before
    assert "other settings" in ask(train_asr, toy_dirs, tmp_path, *FEW, "--t-min", 0.25)
