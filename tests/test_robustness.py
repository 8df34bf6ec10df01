"""Each degradation does what its name says, and the table is made of clips that fit."""

import json
import shutil

import pytest
import torch

from checkpoints.lm import load_lm, save_lm
from data import load_manifest
from encoder import SAMPLE_RATE
from lab import robustness


def tone(hertz, seconds=1.0):
    return 0.1 * torch.sin(
        2 * torch.pi * hertz * torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    )


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def power_above(waveform, hertz):
    """The fraction of a waveform's power in frequencies above."""
    power = torch.fft.rfft(waveform).abs().pow(2)
    return (power[int(hertz * len(waveform) / SAMPLE_RATE) :].sum() / power.sum()).item()


@pytest.mark.parametrize("snr", [20, 10, 5])
def test_noise_is_as_far_below_the_clip_as_snr_says(snr):
    clip = tone(300)
    noise = robustness.add_noise(clip, draw(), snr) - clip
    assert 10 * torch.log10(clip.pow(2).mean() / noise.pow(2).mean()).item() == pytest.approx(
        snr, abs=0.01
    )
    assert power_above(noise, 4000) == pytest.approx(0.5, abs=0.03)  # white


def test_the_generator_s_seed_determines_the_noise():
    first, again, other = (robustness.add_noise(tone(300), draw(seed), 10) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_length_and_pitch_follow_the_speed(factor):
    clip = robustness.change_speed(tone(400), draw(), factor)
    assert len(clip) == pytest.approx(SAMPLE_RATE / factor, abs=1)
    loudest = torch.fft.rfft(clip).abs().argmax().item() * SAMPLE_RATE / len(clip)
    assert loudest == pytest.approx(400 * factor, abs=2)


def test_a_telephone_carries_nothing_above_4_khz():
    clip = 0.1 * torch.randn(SAMPLE_RATE, generator=draw())
    heard = robustness.telephone(clip, draw())
    assert len(heard) == len(clip)
    assert power_above(clip, 4000) > 0.4 and power_above(heard, 4000) < 0.001


def test_a_telephone_s_8_bits_are_the_mu_law_s():
    """Against the law as written down: a tone loses the rounding of its compressed amplitude."""
    clip = tone(500)
    compressed = clip.sign() * torch.log1p(255 * clip.abs()) / torch.log(torch.tensor(256.0))
    rounded = ((compressed + 1) / 2 * 255).round() / 255 * 2 - 1
    expected = rounded.sign() * (256 ** rounded.abs() - 1) / 255
    error, wanted = robustness.telephone(clip, draw()) - clip, expected - clip
    middle = slice(1000, -1000)  # resampling bends the ends
    assert error[middle].pow(2).mean().sqrt().item() == pytest.approx(
        wanted[middle].pow(2).mean().sqrt().item(), rel=0.5
    )


def test_clips_that_become_too_long_are_left_out(tiny_run, tmp_path):
    items = load_manifest(tiny_run / "corpus/asr_test.json")  # half a second each
    slow = robustness.CONDITIONS["speed 0.9"]
    assert len(set(robustness.degrade_clips(items, slow, tmp_path, SAMPLE_RATE).values())) == 6
    assert robustness.degrade_clips(items, slow, tmp_path, SAMPLE_RATE // 2) == {}


def test_a_condition_that_is_done_is_not_done_again(tiny_run, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    few = {name: robustness.CONDITIONS[name] for name in ("clean", "telephone")}
    monkeypatch.setattr(robustness, "CONDITIONS", few)
    robustness.main(["--run", str(run), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "| clean |" in printed and "| telephone |" in printed
    rows = json.loads((run / "ablations/robustness.json").read_text())
    assert rows["telephone"]["items"] == 6 and rows["telephone"]["too_long"] == 0
    (run / "ablations/robustness.json").write_text(json.dumps({"clean": rows["clean"]}))
    monkeypatch.setitem(few, "clean", lambda waveform, generator: pytest.fail("done before"))
    robustness.main(["--run", str(run), "--device", "cpu"])
    assert json.loads((run / "ablations/robustness.json").read_text()) == rows


def test_parts_of_another_run_are_measured_by_force_alone(tiny_run, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    lm = load_lm(run / "llada")
    lm.embedding.weight.data = lm.embedding.weight * 2
    save_lm(lm, run / "llada")
    monkeypatch.setattr(robustness, "CONDITIONS", {"clean": robustness.CONDITIONS["clean"]})
    options = ["--run", str(run), "--device", "cpu"]
    with pytest.raises(SystemExit, match="another LM .* --force-parts"):
        robustness.main(options)
    robustness.main([*options, "--force-parts"])
    assert (run / "ablations/robustness.json").is_file()


def test_a_run_without_a_second_stage_is_named(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(run / "stage2")
    with pytest.raises(SystemExit, match="python -m lab.robustness: .*stage2"):
        robustness.main(["--run", str(run), "--device", "cpu"])
