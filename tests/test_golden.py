"""Our loaders and modules reproduce what the published system computed on small random weights.

The data are described in tests/golden/README.md.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints.adapters import load_adapters
from checkpoints.lm import load_lm
from checkpoints.whisper import load_whisper
from data import Prompt
from diffa import AUDIO_PARTS, DIFFA, Spliced, splice
from diffusion_lm import diffusion_loss
from encoder import encoder_frames, log_mel
from sampler import SamplerConfig, generate, generate_plain

GOLDEN = Path(__file__).parent / "golden"
Z = np.load(GOLDEN / "golden.npz")
TOLERANCE = 1e-4  # absolute, float32


def close(ours, name, tolerance=TOLERANCE):
    theirs = torch.from_numpy(Z[name])
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() < tolerance


@pytest.fixture(scope="module")
def models():
    """The same encoder, LM and adapters as stage 1 and as stage 2."""
    encoder, lm = load_whisper(GOLDEN / "whisper"), load_lm(GOLDEN / "llada")
    config, parts, _ = load_adapters(GOLDEN / "diffa_pytorch_model.bin", encoder.config.n_heads)
    made = {}
    for stage in ("stage1", "stage2"):
        chosen = {name: parts[name] for name in AUDIO_PARTS[stage]}
        made[stage] = DIFFA(encoder, lm, None, config, chosen).eval().requires_grad_(False)
    return made


@pytest.fixture(scope="module")
def model(models):
    return models["stage2"]


@pytest.fixture(scope="module")
def heard(model):
    clip = torch.from_numpy(Z["waveform_int16"]).float() / 32768
    waveform = torch.zeros(1, model.encoder.config.n_samples)
    waveform[0, : len(clip)] = clip
    return waveform, *model.encode(waveform, torch.tensor([len(clip)]))


def spliced(model, heard, ids, insert_at):
    audio, mask = model.hear(*heard[1:])
    return splice(
        model.lm, [Prompt(ids[:insert_at].tolist(), ids[insert_at:].tolist())], audio, mask
    )


def test_log_mel(heard):
    close(log_mel(heard[0])[0, :, ::10], "logmel_every10")


def test_real_frames(heard):
    assert heard[2].item() == Z["n_encoder_frames_real"] == encoder_frames(int(Z["n_samples"]))


@pytest.mark.parametrize("k", range(13))
def test_hidden_states(heard, k):
    close(heard[1][k][0, ::60], f"hidden_{k}_every60")


@pytest.mark.parametrize("stage, name", [("stage1", "speech_stage1"), ("stage2", "speech_stage2")])
def test_audio_embeddings(models, heard, stage, name):
    audio, mask = models[stage].hear(*heard[1:])
    assert mask.all()
    close(audio[0], name)


def test_acoustic_embeddings(model, heard):
    close(model.acoustic(heard[1])[0], "acoustic")


@pytest.mark.parametrize("stage", [1, 2])
def test_logits_and_loss(models, heard, stage):
    model = models[f"stage{stage}"]
    n = int(Z["prompt_len"])
    target, noisy = torch.from_numpy(Z["target_ids"])[None], torch.from_numpy(Z["noisy_ids"])[None]
    prompt = spliced(model, heard, noisy[0, :n], int(Z["insert_at"]))
    x = torch.cat([prompt.embeddings, model.lm.embed(noisy[:, n:])], dim=1)
    close(model.lm.head(model.lm(x))[0, -40:], f"logits_stage{stage}_last40")
    t = torch.tensor([float(Z["t"])])
    loss = diffusion_loss(
        model.lm, prompt.embeddings, prompt.mask, target[:, n:], noisy[:, n:], t, 40 - n
    )
    assert loss.item() == pytest.approx(float(Z[f"loss_stage{stage}"]), rel=1e-5)


def test_text_only_logits(model):
    close(
        model.lm.head(model.lm(model.lm.embed(torch.from_numpy(Z["noisy_ids"])[None])))[0],
        "logits_text_only",
    )


@pytest.mark.parametrize("case", [name for name in Z.files if name.startswith("gen_steps")])
def test_generated_ids_with_audio(model, heard, case):
    steps, length, block = (int(n) for n in re.findall(r"\d+", case)[:3])
    config = SamplerConfig(
        length=length,
        block_length=block,
        steps=steps,
        cfg_scale=float(case.split("cfg")[1]),
        stop_at_end=False,
    )
    prompt = spliced(model, heard, torch.from_numpy(Z["gen_prompt"]), int(Z["gen_insert_at"]))
    assert generate(model.lm, prompt, config).ids[0].tolist() == Z[case].tolist()
    if not config.cfg_scale:
        assert generate_plain(model.lm, prompt, config).ids[0].tolist() == Z[case].tolist()


CACHES = {"full": "none", "prefix": "prefix", "dual": "dual"}


@pytest.mark.parametrize(
    "case", [name for name in Z.files if name.startswith("text_") and not name.endswith("nfe")]
)
def test_generated_ids_and_calls_from_text(model, case):
    steps, length, block = (int(n) for n in re.findall(r"\d+", case)[:3])
    tau = case.split("thr")[1]
    rule = {"rule": "count"} if tau == "None" else {"rule": "threshold", "threshold": float(tau)}
    config = SamplerConfig(
        length=length,
        block_length=block,
        steps=steps,
        cache=CACHES[case.split("_")[1]],
        second_call=True,
        stop_at_end=False,
        **rule,
    )
    ids = torch.from_numpy(Z["gen_prompt"])[None]
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    out = generate(
        model.lm,
        Spliced(embeddings=model.lm.embed(ids), mask=everywhere, is_text=everywhere),
        config,
    )
    assert out.ids[0].tolist() == Z[case].tolist()
    assert out.calls.item() == Z[f"{case}_nfe"]
