"""Clips of a step: which they are, where their states come from, and what if one is unreadable."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHAPES
from safetensors.torch import load_file

from data import AudioError, pad_waveforms, read_audio
from diffa import DIFFA
from training.flops import Work
from training.order import local_rows, pick, pick_by_length
from training.recipe import Execution
from training.state_files import fill_folder, is_whole, state_file
from training.states import StateCache, Unreadable
from training.stream import Stream


@pytest.mark.parametrize("n_items, batch", [(10, 5), (10, 3), (3, 7), (1, 2)])
def test_pick_covers_every_item_once_an_epoch(n_items, batch):
    steps = [pick(step, n_items, batch, seed=1) for step in range(4 * n_items)]
    epochs = np.concatenate(steps).reshape(-1, n_items)  # 4 * batch epochs
    assert (np.sort(epochs, axis=1) == np.arange(n_items)).all()


def test_pick_shuffles_anew_each_epoch_and_seed_and_repeats_itself():
    epochs = [tuple(pick(step, 50, 50, seed)) for seed in (1, 2) for step in (0, 1)]
    assert len(set(epochs)) == 4
    assert tuple(pick(0, 50, 50, 1)) == epochs[0]


def test_cached_states_are_those_of_the_encoder(toy, tone):
    items = [
        {"audio_filepath": str(tone(f"{hertz}.wav", hertz / 1000, hertz))}
        for hertz in (300, 500, 700)
    ]
    cache = StateCache(toy, items, batch=2)
    order = [2, 0, 2]
    states, frames = cache([items[i] for i in order])
    names = [items[i]["audio_filepath"] for i in order]
    waveforms = [read_audio(name) for name in names]
    expected, expected_frames = toy.encode(
        *pad_waveforms(waveforms, toy.encoder.config.n_samples, names)
    )
    assert frames.tolist() == expected_frames.tolist()
    for k in toy.read_states:
        assert (states[k] - expected[k]).abs().max() < 1e-2
    assert torch.allclose(toy.hear(states, frames)[0], toy.hear(expected, frames)[0], atol=2e-2)


def test_a_cache_made_by_a_model_of_stage_1_serves_stage_2(toy_dirs, toy, tone):
    items = [{"audio_filepath": str(tone())}]
    stage1 = DIFFA.from_pretrained(**toy_dirs, stage="stage1", **SHAPES).eval()
    states, frames = StateCache(stage1, items)(items)
    assert torch.equal(toy.hear(states, frames)[0], toy.hear(*StateCache(toy, items)(items))[0])


def test_batches_of_one_length_cover_an_epoch_and_are_shuffled():
    lengths = np.random.default_rng(0).uniform(1, 30, 1000)
    rows_of_step = pick_by_length(lengths, 10, seed=3)
    first, second = (
        np.stack([rows_of_step(step) for step in range(e * 100, e * 100 + 100)]) for e in (0, 1)
    )
    for epoch in (first, second):
        assert sorted(epoch.flatten()) == list(range(1000))
        spread = [np.ptp(lengths[rows]) for rows in epoch]
        assert np.mean(spread) < 1.5  # of 29 s; of random batches it is 24
        means = np.array([lengths[rows].mean() for rows in epoch])
        assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.4  # not short ones first
    assert not (first == second).all()
    again = pick_by_length(lengths, 10, seed=3)(57)
    assert (again == rows_of_step(57)).all()  # the step alone determines the rows
    assert len(pick_by_length(lengths[:4], 10, seed=3)(0)) == 10  # fewer items than a batch


def test_a_batch_that_does_not_divide_is_refused():
    assert [list(rows) for rows in local_rows(6, 3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="batch of 6 does not divide by 1 processes with 4 parts"):
        local_rows(6, 4)


@pytest.fixture
def items(tone):
    return [
        {"audio_filepath": str(tone(f"{hertz}.wav", hertz / 1000, hertz))}
        for hertz in (300, 400, 500, 600, 700, 750)
    ]


def stream(model, items, cache="none", workers=0, limit=0):
    def parts_of(step):
        return ((np.arange(4) + step) % 6)[local_rows(4, 2)]

    execution = Execution(cache=str(cache), workers=workers, max_unreadable=limit)
    made = Stream(model, items, parts_of, 5, execution, "encoder", Work())
    made.open()
    return made


def file_of(model, folder):
    return functools.partial(state_file, folder, "encoder", used=model.read_states)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_states_are_the_same_from_memory_workers_and_files(toy_dirs, items, tmp_path, stage):
    model = DIFFA.from_pretrained(**toy_dirs, stage=stage, **SHAPES).eval()
    memory = StateCache(model, items)
    sources = [
        stream(model, items, cache="memory", workers=2),
        stream(model, items),
        stream(model, items, workers=2),
        stream(model, items, cache=tmp_path / "states", workers=2),
    ]
    for step in (2, 3):  # as when a run resumes from step 2
        for source in sources:
            local = np.split((np.arange(4) + step) % 6, 2)
            for rows, (states, frames, readable) in zip(local, source(step), strict=True):
                expected, real = memory([items[i] for i in rows])
                assert readable.all() and frames.tolist() == real.tolist()
                audio, mask = model.hear(states, frames)
                assert torch.equal(mask, model.hear(expected, real)[1])
                expected_audio = model.hear(expected, real)[0]
                assert torch.allclose(audio[mask], expected_audio[mask], atol=2e-2)  # float16


def test_stage_1_files_hold_the_last_state_of_the_real_frames_only(toy_dirs, items, tmp_path):
    model = DIFFA.from_pretrained(**toy_dirs, stage="stage1", **SHAPES).eval()
    stream(model, items, cache=tmp_path)
    states = load_file(file_of(model, tmp_path)(items[0]["audio_filepath"]))
    assert sorted(states) == ["3", "frames"]
    assert states["3"].shape == (15, 16)  # 0.3 s at 50 frames a second


def test_files_are_made_once_and_anew_when_damaged_or_the_clip_changes(
    toy, items, tone, tmp_path, monkeypatch
):
    name = file_of(toy, tmp_path)

    def fill():
        fill_folder(toy, items, name, 0, Unreadable())

    fill()
    monkeypatch.setattr(toy, "encode", None)  # would fail when called
    fill()
    monkeypatch.undo()
    broken = name(items[1]["audio_filepath"])
    broken.write_bytes(broken.read_bytes()[:50])
    fill()
    assert is_whole(broken)
    old = name(items[2]["audio_filepath"])
    tone("500.wav", 0.7, 300)
    assert name(items[2]["audio_filepath"]) != old


def test_waiting_workers_do_not_touch_the_random_state_of_training(toy, items):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(stream(toy, items, workers=1)(0))
    assert torch.equal(before, torch.get_rng_state())


def readable(source, step):
    return [flags.tolist() for _, _, flags in source(step)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_clip_in_the_middle_is_skipped_and_named_and_too_many_stop(
    toy, items, workers, capsys
):
    source = stream(toy, items, workers=workers, limit=1)
    for path in (items[4]["audio_filepath"], items[5]["audio_filepath"]):
        Path(path).write_bytes(b"RIFF, and nothing more")
    assert readable(source, 0) == [[True, True], [True, True]]
    assert readable(source, 1) == [[True, True], [True, False]]
    out = capsys.readouterr()
    assert "skipped (1 so far)" in out.out + out.err and "700.wav" in out.out + out.err
    with pytest.raises(
        AudioError, match="2 clips cannot be read, more than the 1 allowed(.|\n)*750.wav"
    ):
        list(source(2))


@pytest.mark.parametrize("lost", ["states", "clip"])
def test_a_clip_without_its_file_of_states_is_skipped(toy, items, tmp_path, lost):
    source = stream(toy, items, cache=tmp_path, limit=1)
    clip = Path(items[3]["audio_filepath"])
    (clip if lost == "clip" else file_of(toy, tmp_path)(clip)).unlink()
    assert readable(source, 0) == [[True, True], [True, False]]


def test_memory_skips_what_it_cannot_read_and_by_default_nothing(toy, items):
    Path(items[1]["audio_filepath"]).write_bytes(b"")
    with pytest.raises(AudioError, match="400.wav"):
        StateCache(toy, items)
    source = stream(toy, items, cache="memory", limit=1)
    assert readable(source, 0) == [[True, False], [True, True]]
