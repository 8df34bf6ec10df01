"""Transcripts of manifests: each clip as alone, resumed to the same file, counted independently."""

import argparse
import json
import re
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import edit_config
from test_wer import ways

from checkpoints.model import save_trained
from corpora.manifests import write_manifest
from data import TRANSCRIBE, AudioError, build_prompt, pad_waveforms, read_audio
from evaluation import clips, no_speech, transcribe
from evaluation.wer import normalize_english
from evaluation.wer_report import report_lines
from sampler import SamplerConfig, answer
from training import states

N = 7
BATCH = 3


@pytest.fixture
def options(toy, dirs, tmp_path):
    """Options of the commands: the tiny model of stage 2."""
    edit_config(dirs["llm"], max_sequence_length=1024)
    save_trained(toy, tmp_path / "adapters", dirs["whisper"], dirs["llm"], answer_length=6)
    return ["--adapters", tmp_path / "adapters", "--device", "cpu", "--batch", BATCH]


@pytest.fixture
def manifests(tone, tmp_path):
    """Two manifests of seven clips: one clip is in both, one cannot be read, one has no words."""
    items = []
    for i in range(N):
        path = tone(f"clip{i}.wav", seconds=(0.3, 0.7, 0.5)[i % 3], hertz=200 + 150 * i)
        items.append({
            "audio_id": f"c{i}", "audio_filepath": path.name, "input": "Which colour?",
            "transcription": "one two three" if i else "", "target": "red", "dataset": "tones",
            "duration": (0.3, 0.7, 0.5)[i % 3], "seed_transcript": "", "speaker": f"s{i % 2}",
        })  # fmt: skip
    (tmp_path / "clip3.wav").write_bytes(b"RIFF")
    write_manifest(tmp_path / "first.json", items[:4])
    write_manifest(tmp_path / "second.json", items[3:])
    return [tmp_path / "first.json", tmp_path / "second.json"]


@pytest.fixture
def stop(monkeypatch):
    """stop.before = n: Ctrl-C before the n-th answer of a run."""

    class Stop:
        before = None

    def stopping(*arguments, **settings):
        for n, reply in enumerate(answer(*arguments, **settings), start=1):
            if n == Stop.before:
                raise KeyboardInterrupt
            yield reply

    monkeypatch.setattr(clips, "answer", stopping)
    return Stop


def command(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    module.main()


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("block_length", [None, 2])
def test_each_clip_is_transcribed_once_as_it_is_alone(
    block_length, toy, manifests, options, tmp_path, monkeypatch
):
    out = tmp_path / "out.jsonl"
    blocks = ["--block-length", block_length] if block_length else []
    command(monkeypatch, transcribe, *manifests, "--out", out, *options, *blocks)
    rows = rows_of(out)
    assert [row["audio_id"] for row in rows] == [f"c{i}" for i in range(N)]
    assert rows[3]["text"] is None and "clip3.wav: cannot be read" in rows[3]["problem"]

    # The length is the one that the adapters record.
    config = SamplerConfig(length=6, rule="threshold", block_length=block_length)
    prompt = build_prompt(toy.tokenizer, TRANSCRIBE)
    for row in rows[:3] + rows[4:]:
        alone = pad_waveforms([read_audio(row["id"])], toy.encoder.config.n_samples, ["clip"])
        heard = toy.hear(*toy.encode(*alone))
        (reply,) = answer(toy.lm, toy.tokenizer, [prompt], lambda rows, heard=heard: heard, config)
        found = (row["text"], row["calls"], row["tokens"], row["ended"])
        assert found == (reply.text, reply.calls, reply.n_tokens, reply.n_tokens < 6)


@pytest.mark.parametrize("kept", [0, 2, 3, 5])
def test_a_killed_run_resumes_to_the_same_file(
    kept, manifests, options, tmp_path, monkeypatch, stop, capsys
):
    whole = tmp_path / "whole.jsonl"
    out = tmp_path / "out.jsonl"
    command(monkeypatch, transcribe, *manifests, "--out", whole, *options)
    figures = capsys.readouterr().out.split("real-time")[0]

    stop.before = kept + 1
    with pytest.raises(SystemExit, match="130"):
        command(monkeypatch, transcribe, *manifests, "--out", out, *options)
    assert len(rows_of(out)) == kept
    with open(out, "a") as file:
        file.write('{"id": "torn')
    stop.before = None
    command(monkeypatch, transcribe, *manifests, "--out", out, *options)
    assert out.read_bytes() == whole.read_bytes()

    # All is done: the figures come without a model.
    monkeypatch.setattr(transcribe, "load_diffa", None)
    capsys.readouterr()
    command(monkeypatch, transcribe, *manifests, "--out", out, *options)
    assert capsys.readouterr().out.split("real-time")[0] == figures


def test_other_manifests_or_settings_are_not_resumed(manifests, options, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    first = [transcribe, manifests[0], "--out", out, *options]
    command(monkeypatch, *first)
    before = out.read_bytes()
    with pytest.raises(SystemExit, match="begun with question Please transcribe.*now Say it"):
        command(monkeypatch, *first, "--question", "Say it")
    with pytest.raises(SystemExit, match="not an answer to a question here"):
        command(monkeypatch, transcribe, manifests[1], "--out", out, *options)
    with pytest.raises(SystemExit, match="begun with block_length"):
        command(monkeypatch, *first, "--block-length", 2)
    with pytest.raises(SystemExit, match="--steps does nothing under --rule threshold"):
        command(monkeypatch, *first, "--steps", 3)
    assert out.read_bytes() == before


def row(i, text, reference, speaker="", duration=1.0, **more):
    usual = {"id": f"clip{i}", "cut": False, "ended": True}
    known = {"text": text, "reference": reference, "speaker": speaker, "duration": duration}
    return usual | known | more


def numbers(line):
    """WER, words, substitutions, deletions and insertions of a line of the table."""
    return [float(number) for number in re.findall(r"[\d.]+(?=\s|$)", line)[-5:]]


def test_the_report_counts_as_an_independent_scorer():
    rows = [
        row(0, "Two red birds.", "two red birds", "a", 1.0),
        row(1, "colour of the the sea", "color of sea bed", "a", 7.0),
        row(2, "", "a cat", "b", 40.0, cut=True),
        row(3, "words", "", "b"),
        row(4, None, "not heard", "b", problem="clip4: gone"),
        row(5, "one", "one", "c", 7.0, ended=False),
    ]
    lines = report_lines(rows)
    text = "\n".join(lines)
    assert lines[0] == "6 clips of 57 s, 4 of them compared"
    for count in ("1 without a reference", "1 cannot be read", "1 longer than", "1 with an answer"):
        assert f"  {count}" in text
    assert "    clip4: gone" in text

    # As it stands: all pairs by enumeration.
    compared = [r for r in rows if r["text"] is not None and r["reference"]]
    best = [min(ways(r["text"].split(), r["reference"].split())) for r in compared]
    total, *kinds = (sum(column) for column in zip(*best))
    (line,) = [line for line in lines if line.startswith("as it stands")]
    assert numbers(line) == [pytest.approx(100 * total / 10, abs=0.01), 10, *kinds]

    # Normalised, by speaker and length: "colour" is "color", case and full stops do not count.
    table = {line[:40].strip(): numbers(line) for line in lines if len(line) > 80}
    assert table["up to 2 s"] == [0, 3, 0, 0, 0]
    assert table["up to 10 s"] == [60, 5, 0, 1, 2]
    assert table["over 30 s"] == [100, 2, 0, 2, 0]
    assert table["a"] == [pytest.approx(42.86), 7, 0, 1, 2]
    assert text.index("\nb  ") < text.index("\na  ") < text.index("\nc  ")
    assert text.index("clip1") < text.index("clip2") and "clip0" not in text


def test_without_anything_to_compare_there_is_a_sentence():
    assert "no clip has both" in report_lines([row(0, "a", "")])[-1]


def test_what_is_answered_where_nobody_speaks(options, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    sounds = ["--clips", 2, "--longest", 0.7]
    command(monkeypatch, no_speech, "--out", out, *options, *sounds)
    rows = rows_of(out)
    assert [row["kind"] for row in rows] == [kind for kind in no_speech.SOUNDS for _ in range(2)]
    table = capsys.readouterr().out
    for kind in no_speech.SOUNDS:
        texts = [normalize_english(row["text"]) for row in rows if row["kind"] == kind]
        words = sum(len(text.split()) for text in texts)
        (line,) = [line for line in table.splitlines() if line.startswith(f"{kind} ")]
        assert f" {60 * words / (0.6 + 0.7):.1f} " in line


def test_the_sounds_are_what_they_are_called():
    power = {}
    for kind in no_speech.SOUNDS:
        wave = no_speech.waveform_of({"kind": kind, "duration": 2.0, "seed": 1})
        assert wave.shape == (32_000,) and wave.isfinite().all() and wave.abs().max() <= 1
        assert wave.equal(no_speech.waveform_of({"kind": kind, "duration": 2.0, "seed": 1}))
        spectrum = wave.stft(512, window=no_speech.torch.hann_window(512), return_complex=True)
        power[kind] = spectrum.abs().pow(2).mean(dim=1)  # (257,) bins of 31 Hz

    def high_to_low(kind):
        return (power[kind][128:].mean() / power[kind][1:64].mean()).item()

    assert power["silence"].sum() == 0
    assert power["faint noise"].sum() < 1e-3 * power["white noise"].sum()
    assert high_to_low("white noise") == pytest.approx(1, rel=0.1)
    assert 0.02 < high_to_low("pink noise") < 0.3
    assert high_to_low("music") < 0.02  # a few overtones of low notes


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_of_a_clip_that_is_cut_only_the_start_is_decoded(tmp_path, monkeypatch, rate):
    path = str(tmp_path / "long.wav")
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(5 * rate), rate)
    whole = states.read_audio(path)[:8_000]

    decoded = []
    read_audio = states.read_audio

    def read(path, seconds=None):
        decoded.append(seconds)
        return read_audio(path, seconds)

    monkeypatch.setattr(states, "read_audio", read)
    waveforms, n_samples, errors = states.read_padded([path], 8_000, cut=True)
    assert torch.allclose(waveforms[0], whole, atol=1e-6)
    assert n_samples.tolist() == [8_000] and errors == [""]
    assert decoded[0] < 0.6


def test_no_clip_that_can_be_read_is_an_error(tmp_path):
    row = {"id": "a.wav", "duration": 1.0}
    args = argparse.Namespace(out=tmp_path / "o.jsonl", length=4, steps=None, rule="threshold")
    unread = {"text": None, "problem": "a.wav: not audio"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transcribe, "settings_of", lambda args: {})
        patch.setattr(transcribe, "answer_missing", lambda *args, **options: [row | unread])
        vars(args).update(
            stage=None, question="?", threshold=None, deliberate=None, batch=1, block_length=None
        )
        with pytest.raises(AudioError, match="none of 1 clips could be read, .* a.wav: not audio"):
            transcribe.answer_all(args, [row], None, "")
