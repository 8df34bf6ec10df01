"""Sound of every kind is read alike or refused by name; prompts, answers, manifests and epochs are exact."""

import json

import numpy as np
import pytest
import soundfile
import torch

from checkpoints.tokenizer import MASK, TURN_END, load_tokenizer
from data import (
    MANIFEST_FIELDS,
    TEXT_END,
    AudioError,
    ManifestError,
    build_prompt,
    decode_answer,
    encode_answers,
    load_manifest,
    pad_waveforms,
    read_audio,
)
from encoder import SAMPLE_RATE

# Sound


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_every_format_rate_and_channel_number_sounds_alike(tone, kind, rate, channels):
    clip = read_audio(tone(f"x.{kind}", seconds=1.0, rate=rate, channels=channels))
    assert clip.dtype == torch.float32 and clip.ndim == 1
    assert len(clip) / SAMPLE_RATE == pytest.approx(1.0, abs=0.01 if kind in ("wav", "flac") else 0.1)
    middle = clip[4000:12_000]
    assert torch.fft.rfft(middle).abs().argmax() * 2 == 440  # bins of 2 Hz
    assert middle.pow(2).mean().sqrt() == pytest.approx(0.5 / 2**0.5, rel=0.03)


def test_stereo_is_the_mean_of_its_channels(tmp_path):
    both = np.random.default_rng(0).uniform(-0.5, 0.5, (800, 2)).astype(np.float32)
    soundfile.write(tmp_path / "x.wav", both, SAMPLE_RATE, subtype="FLOAT")
    assert torch.equal(read_audio(tmp_path / "x.wav"), torch.from_numpy(both.mean(axis=1)))


@pytest.mark.parametrize(
    "samples, said",
    [
        ([], "holds no samples"),
        ([0.0] * 500, "only silence"),
        ([0.1, float("nan"), 0.2], "NaN or infinite"),
        ([0.1, float("inf"), 0.2], "NaN or infinite"),
    ],
)
def test_sound_that_cannot_be_listened_to_is_refused_by_name(tmp_path, samples, said):
    soundfile.write(tmp_path / "odd.wav", np.array(samples, dtype=np.float32), SAMPLE_RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=f"odd.wav.*{said}"):
        read_audio(tmp_path / "odd.wav")


def test_missing_sound_is_refused_by_name(tmp_path):
    with pytest.raises(AudioError, match="nowhere.wav: no such audio file"):
        read_audio(tmp_path / "nowhere.wav")


@pytest.mark.parametrize("name, content", [("x.wav", b""), ("x.wav", b"not sound" * 99), ("x.mp3", b"<html>404</html>"), ("x.txt", b"hi")])
def test_corrupt_sound_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AudioError, match=f"{name}: cannot be read as WAV, FLAC, OGG or MP3"):
        read_audio(tmp_path / name)


def test_a_flac_cut_in_the_middle_is_refused_by_name(tone):
    path = tone("cut.flac")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(AudioError, match="cut.flac"):
        read_audio(path)


def test_a_clip_too_long_is_refused_and_cut_only_when_asked():
    clips, names = [torch.ones(300), torch.ones(50)], ["long.wav", "short.wav"]
    with pytest.raises(AudioError, match="long.wav.*--cut"):
        pad_waveforms(clips, 200, names)
    batch, lengths = pad_waveforms(clips, 200, names, cut=True)
    assert lengths.tolist() == batch.sum(dim=1).tolist() == [200, 50]
    assert batch.shape == (2, 200) and batch[1, 50:].eq(0).all()


# Text


@pytest.fixture
def tokenizer(toy):
    return toy.tokenizer


def test_the_prompt_is_llada_s_chat_with_a_place_for_the_sound(tokenizer):
    prompt = build_prompt(tokenizer, "What is said?")
    assert tokenizer.decode(prompt.before) == (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful voice assistant.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nThis is the audio:"
    )
    assert tokenizer.decode(prompt.after) == (
        " <audio>. What is said?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )  # fmt: skip
    for ids, markers in ((prompt.before, 6), (prompt.after, 3)):  # each marker is one token, not its letters
        assert sum(tokenizer.decode([i]).startswith("<|") for i in ids) == markers
    assert tokenizer.id("\n\n") == prompt.after[-1]


@pytest.mark.parametrize("answer", ["two red birds sing", "", "Ünïcödé: 鳥", "two  spaces", "a <|mdm_mask|><|endoftext|> b"])
def test_answers_end_padded_with_the_end_of_text_and_return_as_they_were(tokenizer, answer):
    (ids,) = encode_answers(tokenizer, [answer], 40).tolist()
    assert len(ids) == 40 and ids[-1] == tokenizer.id(TEXT_END) and tokenizer.id(MASK) not in ids
    assert decode_answer(tokenizer, ids) == answer


def test_an_answer_without_room_for_its_end_is_refused_by_name(tokenizer):
    n = len(tokenizer.encode("two red birds sing"))
    assert encode_answers(tokenizer, ["two red birds sing"], n + 1).shape == (1, n + 1)
    with pytest.raises(ValueError, match=f"{n} tokens does not fit {n}.*two red birds"):
        encode_answers(tokenizer, ["two", "two red birds sing"], n)


@pytest.mark.parametrize("end", [TEXT_END, TURN_END])
def test_decoding_stops_at_the_first_end(tokenizer, end):
    ids = tokenizer.encode("two red") + [tokenizer.id(end)] + tokenizer.encode("birds") + [tokenizer.id(TEXT_END)]
    assert decode_answer(tokenizer, ids) == "two red"


def test_a_piece_that_is_not_in_the_vocabulary_has_no_id(tokenizer):
    assert tokenizer.id("<|nonsense|>") is None and tokenizer.id(MASK) is not None


def test_a_directory_without_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="lacks tokenizer.json or tokenizer.model"):
        load_tokenizer(tmp_path, None)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_damaged_tokenizer_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"{broken")
    with pytest.raises(ValueError, match=name):
        load_tokenizer(tmp_path, None)


# Manifests


def item(path, **changes):
    return {**dict.fromkeys(MANIFEST_FIELDS, "x"), "audio_id": "clip", "audio_filepath": path.name, **changes}


def write(tmp_path, content):
    (tmp_path / "m.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path / "m.json"


def test_paths_of_a_manifest_hang_on_its_folder_and_become_absolute(tmp_path, tone, monkeypatch):
    clip = tone()
    monkeypatch.chdir(tmp_path.parent)
    write(tmp_path, [item(clip), item(clip, audio_filepath=str(clip))])
    loaded = load_manifest(f"{tmp_path.name}/m.json")
    assert [i["audio_filepath"] for i in loaded] == [str(clip)] * 2


@pytest.mark.parametrize("content, said", [("{", "not valid JSON"), ("{}", "not a JSON list"), ("[]", "at least one item"), ("\x00", "not valid")])
def test_a_manifest_that_is_no_list_is_refused(tmp_path, content, said):
    with pytest.raises(ManifestError, match=f"m.json.*{said}"):
        load_manifest(write(tmp_path, content))


def test_a_missing_manifest_is_refused(tmp_path):
    with pytest.raises(ManifestError, match="no such manifest"):
        load_manifest(tmp_path / "m.json")


def test_all_bad_items_of_a_manifest_are_listed_at_once(tmp_path, tone):
    clip = tone()
    lacking = item(clip, audio_id="b")
    del lacking["target"], lacking["duration"]
    bad = [item(clip), lacking, 7, item(clip, audio_id="d", audio_filepath="gone.wav"), item(clip, audio_id="e", audio_filepath=None)]
    with pytest.raises(ManifestError) as error:
        load_manifest(write(tmp_path, bad))
    said = str(error.value)
    assert "4 bad items" in said and "item 0" not in said
    for words in ("item 1 (b): lacks target, duration", "item 2: not an object", "item 3 (d): no such file", "gone.wav", "item 4 (e)"):
        assert words in said
