"""Audio of every kind is read alike or refused by name; prompts, answers, manifests are exact."""

import json
import os
import re
import struct
import time

import numpy as np
import pytest
import soundfile
import torch

from audio.completeness import mp3_frame
from audio.decode import decode
from checkpoints.chats import MASK, TURN_END
from checkpoints.tokenizer import load_tokenizer
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
from training.examples import usable

# Sound


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_every_format_rate_and_channel_number_sounds_alike(tone, kind, rate, channels):
    clip = read_audio(tone(f"x.{kind}", seconds=1.0, rate=rate, channels=channels))
    assert clip.dtype == torch.float32 and clip.ndim == 1
    assert len(clip) / SAMPLE_RATE == pytest.approx(
        1.0, abs=0.01 if kind in ("wav", "flac") else 0.1
    )
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
    soundfile.write(
        tmp_path / "odd.wav", np.array(samples, dtype=np.float32), SAMPLE_RATE, subtype="FLOAT"
    )
    with pytest.raises(AudioError, match=f"odd.wav.*{said}"):
        read_audio(tmp_path / "odd.wav")


def test_missing_sound_is_refused_by_name(tmp_path):
    with pytest.raises(AudioError, match="nowhere.wav: no such audio file"):
        read_audio(tmp_path / "nowhere.wav")


@pytest.mark.parametrize(
    "name, content",
    [
        ("x.wav", b""),
        ("x.wav", b"not sound" * 99),
        ("x.mp3", b"<html>404</html>"),
        ("x.txt", b"hi"),
    ],
)
def test_corrupt_sound_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AudioError, match=f"{name}: cannot be read as WAV, FLAC, OGG or MP3"):
        read_audio(tmp_path / name)


def test_a_flac_cut_in_the_middle_is_refused_by_name(tone):
    path = tone("cut.flac")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(AudioError, match="cut.flac"):
        read_audio(path)


def refusal(path, **options):
    """What read_audio says of a file; it names the file, and ends soon."""
    started = time.perf_counter()
    with pytest.raises(AudioError) as error:
        read_audio(path, **options)
    assert time.perf_counter() - started < 5
    said = str(error.value)
    said.encode()  # can be printed
    return said


def noise(seconds=20.0, rate=SAMPLE_RATE, channels=1):
    """Quiet at first, then loud: a variable rate begins low."""
    n = int(seconds * rate)
    wave = 0.2 * np.random.default_rng(0).standard_normal((n, channels))
    wave[: n // 4] *= 0.01
    return wave


@pytest.mark.parametrize(
    "peak, said",
    [
        (1e30, "far outside"),
        (9.0, "16-bit numbers"),
        (30_000, "16-bit numbers"),
        (2e9, "far outside"),
        (1e300, "NaN or infinite"),
    ],
)
def test_samples_far_outside_are_refused_by_name(tmp_path, peak, said):
    soundfile.write(
        tmp_path / "loud.wav",
        noise(1) / np.abs(noise(1)).max() * peak,
        SAMPLE_RATE,
        subtype="DOUBLE",
    )
    assert re.search(f"loud.wav.*{said}", refusal(tmp_path / "loud.wav"))


def test_samples_somewhat_above_1_are_read(tmp_path):
    soundfile.write(tmp_path / "x.wav", 3 * noise(1), SAMPLE_RATE, subtype="FLOAT")
    assert read_audio(tmp_path / "x.wav").abs().max() > 1.5


@pytest.mark.parametrize("rest", [0, 1e-3, 0.05])
def test_channels_that_cancel_are_refused(tmp_path, rest):
    left, other = noise(1), noise(1)[::-1]
    soundfile.write(
        tmp_path / "x.wav", np.hstack([left, rest * other - left]), SAMPLE_RATE, subtype="FLOAT"
    )
    assert "cancel" in refusal(tmp_path / "x.wav")
    soundfile.write(tmp_path / "x.wav", np.hstack([left, 0 * left]), SAMPLE_RATE, subtype="FLOAT")
    assert read_audio(tmp_path / "x.wav").any()


def with_a_hole(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(9000) + data[middle + 9000 :]


def without_index(mp3: bytes) -> bytes:
    """An MP3 without its first frame, which holds the Xing header."""
    return mp3[mp3.index(b"\xff\xf3", 40) :]


@pytest.mark.parametrize(
    "name, change",
    [
        ("x.mp3", lambda data: data + data),
        ("x.mp3", lambda data: data + without_index(data)),
        ("x.mp3", lambda data: data[: len(data) * 2 // 3]),
        ("x.ogg", lambda data: data + data),
        ("x.ogg", lambda data: data[: len(data) * 2 // 3]),
        ("x.ogg", lambda data: data[: data.rindex(b"OggS")]),
        ("x.ogg", with_a_hole),
        ("x.opus", with_a_hole),
        ("x.flac", lambda data: data + data),
        ("x.wav", lambda data: data + data),
        ("x.wav", lambda data: data[: len(data) // 2]),
        ("x.aiff", lambda data: data[: len(data) // 2]),
        ("x.au", lambda data: data[: len(data) // 2]),
    ],
)
def test_sound_is_read_whole_or_refused_by_name(tmp_path, name, change):
    options = {"format": "OGG", "subtype": "OPUS"} if name == "x.opus" else {}
    soundfile.write(tmp_path / name, noise(), SAMPLE_RATE, **options)  # MP3 of variable rate
    whole = (tmp_path / name).read_bytes()
    assert len(read_audio(tmp_path / name)) / SAMPLE_RATE == pytest.approx(20, abs=0.1)
    (tmp_path / name).write_bytes(change(whole))
    assert name in refusal(tmp_path / name)
    if (
        len(change(whole)) < len(whole) or name != "x.wav"
    ):  # a WAV with a second header is not opened
        assert len(read_audio(tmp_path / name, seconds=1)) == SAMPLE_RATE


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_variable_rate_without_an_index_is_read_whole(tmp_path, rate, channels):
    sound = noise(8, rate, channels)
    soundfile.write(tmp_path / "x.mp3", sound, rate, bitrate_mode="VARIABLE")
    whole, _ = decode(tmp_path / "x.mp3")
    assert len(whole) == 8 * rate
    data = (tmp_path / "x.mp3").read_bytes()
    bare = data[sum(mp3_frame(data, 0)[:1]) :]  # the first frame is the index

    # The same samples, after the encoder's delay that the index would have taken off.
    delay = 576
    for tag in (b"", b"ID3\4\0\0\0\0\1\0" + bytes(128)):
        (tmp_path / "x.mp3").write_bytes(tag + bare)
        assert len(soundfile.read(tmp_path / "x.mp3")[0]) < 0.9 * len(whole)  # libsndfile's guess
        found, found_rate = decode(tmp_path / "x.mp3")
        assert found_rate == rate and len(whole) <= len(found) < len(whole) + 3000
        np.testing.assert_array_equal(found[delay : delay + len(whole)], whole)
    assert len(read_audio(tmp_path / "x.mp3", seconds=7.5)) == 7.5 * SAMPLE_RATE

    # Two of them joined are as good as one.
    (tmp_path / "x.mp3").write_bytes(bare * 2)
    assert len(decode(tmp_path / "x.mp3")[0]) / rate == pytest.approx(16, abs=0.4)


def test_a_constant_rate_needs_no_index(tmp_path):
    constant = {"bitrate_mode": "CONSTANT", "compression_level": 0.5}
    soundfile.write(tmp_path / "x.mp3", noise(), SAMPLE_RATE, **constant)
    (tmp_path / "x.mp3").write_bytes(without_index((tmp_path / "x.mp3").read_bytes()))
    assert len(read_audio(tmp_path / "x.mp3")) / SAMPLE_RATE == pytest.approx(20, abs=0.2)


def test_streamed_files_that_do_not_know_their_length_are_read(tmp_path, tone):
    flac = bytearray(tone("x.flac").read_bytes())
    flac[21] &= 0xF0  # the 36 bits of the number of samples
    flac[22:26] = bytes(4)
    wav = bytearray(tone("x.wav").read_bytes())
    wav[4:8] = wav[40:44] = b"\xff" * 4
    for name, data in (("x.flac", flac), ("x.wav", wav)):
        (tmp_path / name).write_bytes(data)
        assert len(read_audio(tmp_path / name)) == SAMPLE_RATE // 2


def test_whatever_cannot_be_opened_is_an_audio_error(tmp_path, tone, monkeypatch):
    os.mkfifo(tmp_path / "fifo.wav")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "x.raw").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "locked.wav").touch()
    (tmp_path / "locked.wav").chmod(0)
    strange = tmp_path / os.fsdecode(b"\xff.wav")
    for path in (tmp_path / "fifo.wav", tmp_path / "folder.wav", "/dev/zero", "/dev/null"):
        assert "not an audio file" in refusal(path)
    for path in (
        tmp_path / "x.raw",
        tmp_path / "locked.wav",
        tmp_path / "a\0.wav",
        tmp_path / ("x" * 999),
        tmp_path / "\ud800.wav",
    ):
        assert "cannot be read" in refusal(path)
    for path in (strange, tmp_path / "x.raw" / "x.wav"):
        assert "no such" in refusal(path)
    os.rename(tone(), strange)
    assert len(read_audio(strange)) == SAMPLE_RATE // 2
    os.rename(strange, tmp_path / "sound.raw")
    assert len(read_audio(tmp_path / "sound.raw")) == SAMPLE_RATE // 2


@pytest.mark.parametrize("rate", [2000, 15_999, 16_001, 44_101, 47_999, 96_001, 767_999])
def test_odd_rates_cost_little_and_keep_pitch_and_length(tone, rate):
    path = tone(seconds=1.0, rate=rate)
    started = time.perf_counter()
    clip = read_audio(path)
    assert time.perf_counter() - started < 5
    assert len(clip) == pytest.approx(SAMPLE_RATE, rel=1e-3)
    assert torch.fft.rfft(clip[4000:12_000]).abs().argmax() * 2 == 440


def test_promises_of_a_header_are_not_believed(tmp_path, tone):
    wav = bytearray(tone("x.wav").read_bytes())
    for rate in (0, 1, 2**31 - 1):
        wav[24:28] = struct.pack("<I", rate)
        (tmp_path / "x.wav").write_bytes(wav)
        refusal(tmp_path / "x.wav")

    mp3 = bytearray(tone("x.mp3", seconds=2.0).read_bytes())
    frames = mp3.index(b"Info") + 8 if b"Info" in mp3 else mp3.index(b"Xing") + 8
    mp3[frames : frames + 4] = struct.pack(">I", 2**28)
    (tmp_path / "x.mp3").write_bytes(mp3)
    refusal(tmp_path / "x.mp3")

    w64 = tone("x.w64").read_bytes()
    at = w64.index(b"data") + 16
    (tmp_path / "x.w64").write_bytes(w64[:at] + struct.pack("<q", 10**18) + w64[at + 8 :])
    assert len(read_audio(tmp_path / "x.w64")) == SAMPLE_RATE // 2


def test_the_beginning_is_read_alone(tmp_path):
    soundfile.write(tmp_path / "x.flac", noise(60, rate=44_100, channels=2), 44_100)
    start = read_audio(tmp_path / "x.flac", seconds=2.5)
    torch.testing.assert_close(start, read_audio(tmp_path / "x.flac")[:40_000])
    (tmp_path / "x.flac").write_bytes(
        (tmp_path / "x.flac").read_bytes()[:2_000_000]
    )  # what follows is not looked at
    assert torch.equal(read_audio(tmp_path / "x.flac", seconds=2.5), start)


def test_a_clip_too_long_is_refused_and_cut_only_when_asked():
    clips, names = [torch.ones(3000), torch.ones(50)], ["long.wav", "short.wav"]
    with pytest.raises(AudioError, match="long.wav.*--cut"):
        pad_waveforms(clips, 2000, names)
    batch, lengths = pad_waveforms(clips, 2000, names, cut=True)
    assert lengths.tolist() == batch.sum(dim=1).tolist() == [2000, 50]
    assert batch.shape == (2, 2000) and batch[1, 50:].eq(0).all()


@pytest.mark.parametrize(
    "extra, kept", [(0, True), (1, True), (160, True), (161, False), (400, False)]
)
def test_one_bound_says_what_is_longer_than_the_window(toy, extra, kept):
    """A manifest's duration and the clip are judged alike; the message has two unequal numbers."""
    window = toy.encoder.config.n_samples
    duration = (window + extra) / SAMPLE_RATE
    one = {"audio_id": "a", "input": "What is said?", "target": "two birds", "duration": duration}
    waveform = torch.ones(window + extra)
    if kept:
        assert len(usable([one], "m.json", "target", toy, 18).items) == 1
        assert pad_waveforms([waveform], window, ["a.wav"])[1].tolist() == [window]
        return
    with pytest.raises(ManifestError, match="1 last longer"):
        usable([one], "m.json", "target", toy, 18)
    with pytest.raises(AudioError) as error:
        pad_waveforms([waveform], window, ["a.wav"])
    numbers = re.findall(r"[0-9.]+ s", str(error.value))
    assert len(set(numbers)) == 2


# Text


@pytest.fixture
def tokenizer(toy):
    return toy.tokenizer


def test_the_prompt_is_llada_s_chat_with_a_place_for_the_sound(tokenizer):
    prompt = build_prompt(tokenizer, "What is said?")
    assert tokenizer.decode(prompt.before) == (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful voice assistant.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nThis is the audio:"
    )
    assert tokenizer.decode(prompt.after) == (
        " <audio>. What is said?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )  # fmt: skip
    for ids, markers in (
        (prompt.before, 6),
        (prompt.after, 3),
    ):  # each marker is one token, not its letters
        assert sum(tokenizer.decode([i]).startswith("<|") for i in ids) == markers
    assert tokenizer.id("\n\n") == prompt.after[-1]


@pytest.mark.parametrize(
    "answer",
    ["two red birds sing", "", "Ünïcödé: 鳥", "two  spaces", "a <|mdm_mask|><|endoftext|> b"],
)
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
    ids = (
        tokenizer.encode("two red")
        + [tokenizer.id(end)]
        + tokenizer.encode("birds")
        + [tokenizer.id(TEXT_END)]
    )
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
    return {
        **dict.fromkeys(MANIFEST_FIELDS, "x"),
        "audio_id": "clip",
        "audio_filepath": path.name,
        "duration": 0.5,
        **changes,
    }


def write(tmp_path, content):
    (tmp_path / "m.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path / "m.json"


def test_paths_of_a_manifest_hang_on_its_folder_and_become_absolute(tmp_path, tone, monkeypatch):
    clip = tone()
    monkeypatch.chdir(tmp_path.parent)
    write(tmp_path, [item(clip), item(clip, audio_filepath=str(clip))])
    loaded = load_manifest(f"{tmp_path.name}/m.json")
    assert [i["audio_filepath"] for i in loaded] == [str(clip)] * 2


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "not valid JSON"),
        (
            '[{"audio_id": "c7", "input": "a", "input": "b"}]',
            "'input' is twice .* 'audio_id': 'c7'",
        ),
        ("{}", "not a JSON list"),
        ("[]", "at least one item"),
        ("\x00", "not valid"),
    ],
)
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
    bad = [
        item(clip),
        lacking,
        7,
        item(clip, audio_id="d", audio_filepath="gone.wav"),
        item(clip, audio_id="e", audio_filepath=None),
    ]
    with pytest.raises(ManifestError) as error:
        load_manifest(write(tmp_path, bad))
    said = str(error.value)
    assert "4 bad items" in said and "item 0" not in said
    for words in (
        "item 1 (b): lacks target, duration",
        "item 2: not an object",
        "item 3 (d): no such file",
        "gone.wav",
        "item 4 (e)",
    ):
        assert words in said


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"input": None}, "input must be text"),
        ({"audio_id": 7, "target": ["x"]}, "audio_id, target must be text"),
        ({"duration": None}, "duration must be seconds"),
        ({"duration": "0.5"}, "duration must be seconds"),
        ({"duration": True}, "duration must be seconds"),
        ({"duration": -1}, "duration must be seconds"),
        ({"duration": 0}, "duration must be seconds"),
        ({"duration": float("nan")}, "duration must be seconds"),
        ({"duration": float("inf")}, "duration must be seconds"),
        ({"duration": 10**400}, "duration must be seconds"),
        ({"transcription": "\ud800"}, "half a character"),
        ({"audio_filepath": "a\0b"}, "no such file"),
        ({"audio_filepath": "x" * 999}, "no such file"),
        ({"audio_filepath": "."}, "no such file"),
    ],
)
def test_a_field_that_cannot_be_used_is_listed(tmp_path, tone, changes, said):
    with pytest.raises(ManifestError, match=rf"1 bad items\n  item 1 \(.*{said}"):
        load_manifest(write(tmp_path, [item(tone()), item(tone(), **changes)]))


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"[1" + b"0" * 5000 + b"]",
        '["café"]'.encode("latin-1"),
        "[]".encode("utf-16"),
    ],
)
def test_json_that_cannot_be_read_is_refused(tmp_path, content):
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(ManifestError, match="m.json: not valid JSON"):
        load_manifest(tmp_path / "m.json")


def test_a_manifest_is_utf_8_in_any_locale_with_or_without_a_mark(tmp_path, tone, monkeypatch):
    text = json.dumps([item(tone(), transcription="café")], ensure_ascii=False)
    monkeypatch.setattr("locale.getencoding", lambda: "latin-1")
    for mark in ("", "\ufeff"):
        (tmp_path / "m.json").write_bytes((mark + text).encode())
        assert load_manifest(tmp_path / "m.json")[0]["transcription"] == "café"
