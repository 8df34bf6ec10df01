"""Whitening: what a new acoustic adapter's keys and values start on; it stays an option."""

import numpy as np
import pytest
import torch
from test_stage import FEW, manifest, train  # noqa: F401 (manifest is a fixture)

import train_asr
import train_instruct
from adapters import AcousticAdapter, AdapterConfig
from diffa import DIFFA
from training import whitening

D = 12


def uneven_states(n=2, B=30, T=50):
    """States whose directions vary by 1 to 100, around a large mean, as a Whisper's do."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.linalg.qr(torch.randn(D, D, generator=generator))[0] * torch.logspace(0, 1, D)
    return [20 + torch.randn(B, T, D, generator=generator) @ mixing.T for _ in range(n)]


def test_whitened_states_have_no_mean_and_one_variance(monkeypatch):
    monkeypatch.setattr(whitening, "RIDGE", 0.0)
    states = uneven_states()
    mean, matrix = whitening.mean_and_whitening(states)
    white = torch.cat([(s - mean) @ matrix for s in states]).flatten(0, 1)  # (N, D)
    assert np.allclose(np.cov(white.T.numpy(), bias=True), np.eye(D), atol=1e-3)
    assert white.mean(dim=0).abs().max() < 1e-3


def test_a_direction_that_never_varies_is_not_blown_up():
    states = [s.clone() for s in uneven_states()]
    for state in states:
        state[..., 0] = 7.0
    _, matrix = whitening.mean_and_whitening(states)
    assert torch.isfinite(matrix).all()
    variances = torch.cat(states).flatten(0, 1).var(dim=0, correction=0)
    assert matrix.norm(dim=0)[0] <= (whitening.RIDGE * variances.mean()) ** -0.5 * 1.01


def test_the_adapter_hears_states_as_another_hears_them_whitened():
    torch.manual_seed(0)
    config = AdapterConfig(
        encoder_width=D, lm_width=8, n_heads=2, taps=(0, 1), n_queries=3, ffn=16, dropout=0.0
    )
    plain, other = AcousticAdapter(config), AcousticAdapter(config)
    other.load_state_dict(plain.state_dict())
    states = uneven_states()
    mean, matrix = whitening.mean_and_whitening(states)
    whitening.see_whitened(other, mean, matrix)
    with torch.no_grad():  # values of the whitened states, so many times as loud
        for block in plain.blocks:
            block.cross_attn.value.weight *= whitening.LOUD
            block.cross_attn.value.bias *= whitening.LOUD
    assert torch.allclose(other(states), plain([(s - mean) @ matrix for s in states]), atol=1e-4)
    assert not torch.allclose(other(states), plain(states), atol=1e-2)


def test_clips_that_cannot_be_read_are_left_out(toy_dirs, tone, tmp_path):
    model = DIFFA.from_pretrained(toy_dirs["whisper"], toy_dirs["llm"], stage="stage2", taps=(1, 2))
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    good = [{"audio_filepath": str(tone(f"{i}.wav", 0.5, 200 + 90 * i))} for i in range(3)]
    bad = [{"audio_filepath": str(tmp_path / "bad.wav")}]
    heard = torch.cat(
        list(whitening.tapped_states(model, good + bad, 0))
    )  # (3 clips of 2 taps, T, D)
    assert heard.shape == (6, model.encoder.config.context, model.encoder.config.width)
    with pytest.raises(ValueError, match="whiten"):
        whitening.whiten(model, bad, 0)


def test_it_is_an_option_of_a_new_acoustic_adapter_alone_and_a_run_keeps_it(
    toy_dirs,
    manifest,  # noqa: F811
    tmp_path,
):
    train(train_asr, toy_dirs, tmp_path / "stage1", manifest(), *FEW)
    with_it = ["--whiten", "--lr", 0, *FEW[:4]]  # nothing moves: weights as they began
    with pytest.raises(SystemExit, match="stage1 has no acoustic adapter"):
        train(train_asr, toy_dirs, tmp_path / "same", manifest(), "--whiten", *FEW)
    began = {}
    for name, options in (("plain", with_it[1:]), ("white", with_it)):
        began[name], _ = train(
            train_instruct,
            toy_dirs,
            tmp_path / name,
            manifest(),
            "--adapters",
            tmp_path / "stage1",
            *options,
        )
    differ = {n for n in began["plain"] if not torch.equal(began["plain"][n], began["white"][n])}
    assert (
        differ
        == {
            n
            for n in began["plain"]
            if ".cross" in n and any(f"{part}." in n for part in ("key", "value"))
        }
        != set()
    )
    # A finished stage 2's adapter is not new.
    with pytest.raises(SystemExit, match="the acoustic adapter of this run is not new"):
        options = ["--adapters", tmp_path / "white", *with_it]
        train(train_instruct, toy_dirs, tmp_path / "again", manifest(), *options)
    with pytest.raises(SystemExit, match="whiten was True, now is False"):
        train(
            train_instruct,
            toy_dirs,
            tmp_path / "white",
            manifest(),
            "--adapters",
            tmp_path / "stage1",
            *with_it[1:],
        )
