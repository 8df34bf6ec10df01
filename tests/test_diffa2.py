"""Our code reproduces what DIFFA-2's own code computed on small random weights.

The data are described in tests/golden-diffa2/README.md.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints.adapters import load_adapters, open_adapters
from checkpoints.lm import load_lm
from checkpoints.lora import attach, merge, read_lora
from checkpoints.whisper import load_whisper
from data import Prompt
from diffa import DIFFA, splice
from diffusion_lm import diffusion_loss
from encoder import encoder_frames, log_mel
from sampler import SamplerConfig, commit, generate, generate_plain
from training.preference import elbo, vrpo_loss

GOLDEN = Path(__file__).parent / "golden-diffa2"
Z = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "golden.npz").items()
     if array.dtype.kind in "fib"}  # fmt: skip
TOLERANCE = 1e-4  # absolute, float32
CASES = [n for n in Z if re.match("(fast|asr|plain)_", n) and not n.endswith("_nfe")]


def close(ours, name):
    assert ours.shape == Z[name].shape
    assert (ours - Z[name]).abs().max().item() < TOLERANCE


def lm_with(path, is_merged=False):
    """The golden LM with the LoRA of a file, or alone."""
    lm = load_lm(GOLDEN / "llada").requires_grad_(False)
    if path:
        lora = read_lora(*open_adapters(path), lm.config).eval().requires_grad_(False)
        (merge if is_merged else attach)(lm, lora)
    return lm


@pytest.fixture(scope="module")
def lms():
    """The LM alone, with DIFFA-2's LoRA beside or in its weights, with that of VRPO's reference."""
    ours = GOLDEN / "diffa2"
    return {
        "frozen": lm_with(None),
        "policy": lm_with(ours),
        "merged": lm_with(ours, is_merged=True),
        "reference": lm_with(GOLDEN / "reference_lora.bin"),
    }


def spliced(lm, ids, insert_at, speech):
    prompt = Prompt(ids[:insert_at].tolist(), ids[insert_at:].tolist())
    audio = Z[speech][None]  # (1, A, D)
    return splice(lm, [prompt], audio, torch.ones(audio.shape[:2], dtype=torch.bool))


# ---- hearing
@pytest.fixture(scope="module")
def heard():
    """The hidden states of the clip, and its real frames."""
    encoder = load_whisper(GOLDEN / "whisper")
    clip = Z["waveform_int16"].float() / 32768
    waveform = torch.zeros(1, encoder.config.n_samples)
    waveform[0, : len(clip)] = clip
    with torch.no_grad():
        return encoder(log_mel(waveform, 128)), encoder_frames(torch.tensor([len(clip)]))


def test_the_hidden_states_of_32_layers(heard):
    states, frames = heard
    assert frames.item() == Z["n_encoder_frames_real"]
    for k in range(33):
        close(states[k][0, ::60], f"hidden_{k}_every60")


def test_the_audio_embeddings_of_stage_1(heard):
    config, parts, info = load_adapters(GOLDEN / "diffa2", n_heads=4, n_layers=32)
    assert config.taps == (3, 7, 11, 15, 19, 23, 27, 31) and info == {}
    model = DIFFA(load_whisper(GOLDEN / "whisper"), lm_with(None), None, config, parts).eval()
    with torch.no_grad():
        audio, mask = model.hear(*heard)
    assert mask.all()
    close(audio[0], "speech_stage1")


# ---- losses of stages 1 to 3
STAGES = [("frozen", 1, 1), ("frozen", 2, 2), ("policy", 2, 3)]  # LM, audio, stage


def answer_loss(lm, audio, row, n_tokens):
    """The loss of row 0 or 1 of the golden batch."""
    n = int(Z["batch_prompt_len"][row])
    target, noisy = Z["batch_target_ids"][row][None], Z["batch_noisy_ids"][row][None]
    insert_at = int(Z["batch_insert_at"][row])
    prompt = spliced(lm, noisy[0, :n], insert_at, f"speech_stage{audio}")
    t = Z["batch_t"][row : row + 1].float()
    pieces = (prompt.embeddings, prompt.mask, target[:, n:], noisy[:, n:], t)
    return diffusion_loss(lm, *pieces, n_tokens).item()


@pytest.mark.parametrize("lm, audio, stage", STAGES)
def test_the_loss_of_a_stage(lms, lm, audio, stage):
    n = 40 - int(Z["prompt_len"])
    expected = Z[f"loss_stage{stage}"].item()
    assert answer_loss(lms[lm], audio, 0, n) == pytest.approx(expected, rel=1e-5)

    lengths = 80 - int(Z["batch_prompt_len"].sum())
    both = sum(answer_loss(lms[lm], audio, row, lengths) for row in (0, 1))
    assert both == pytest.approx(Z[f"loss_stage{stage}_batch"].item(), rel=1e-5)


# ---- LoRA
@pytest.mark.parametrize("kind", ["policy", "merged"])
def test_logits_with_lora_beside_the_weights_and_in_them(lms, kind):
    lm = lms[kind]
    close(lm.head(lm(lm.embed(Z["noisy_ids"][None])))[0], "logits_text_only")


def test_lora_is_merged_with_scale_2(lms):
    close(lms["merged"].blocks[2].mlp.up.weight, "merged_blocks2_up_proj")


# ---- preference
def elbos(lm, kind):
    """The ELBO of both items' answers of a kind. Their prompts differ in length, so one by one."""
    found = []
    for i in range(2):
        n = int(Z["vrpo_prompt_len"][i])
        ids = Z[f"vrpo_{kind}_ids"][i]
        prompt = spliced(lm, ids[:n], int(Z["vrpo_insert_at"][i]), "speech_stage2")
        noisy = Z[f"vrpo_{kind}_noisy"][:, i : i + 1, n:]  # (S, 1, G)
        found.append(elbo(lm, prompt, ids[None, n:], noisy, Z[f"vrpo_{kind}_t"][:, i : i + 1]))
    return torch.cat(found)


def test_vrpo_s_elbos_and_loss(lms):
    sides = {}
    for who in ("policy", "reference"):
        sides[who] = [elbos(lms[who], kind) for kind in ("chosen", "rejected")]
        for ours, kind in zip(sides[who], ("chosen", "rejected")):
            assert torch.allclose(ours, Z[f"vrpo_elbo_{kind}_{who}"], rtol=1e-5, atol=0)
    losses, s = vrpo_loss(sides["policy"], sides["reference"], float(Z["vrpo_beta"]))
    assert torch.allclose(s, Z["vrpo_s"], rtol=1e-4, atol=0)
    assert losses.mean().item() == pytest.approx(Z["vrpo_loss"].item(), rel=1e-4)


# ---- generation
def settings(case):
    length, block = (int(re.search(rf"{name}(\d+)", case)[1]) for name in ("len", "block"))
    config = {"length": length, "block_length": block}
    if factor := re.search(r"factor([\d.]+)", case):
        return config | {"rule": "factor", "factor": float(factor[1]), "last_candidate": True}
    if threshold := re.search(r"thr([\d.]+)", case):
        return config | {"rule": "threshold", "threshold": float(threshold[1])}
    config["steps"] = int(re.search(r"steps(\d+)", case)[1])
    if case.startswith("plain"):
        config |= {"cfg_scale": float(case.split("cfg")[1]), "stop_at_end": False}
    return config


@pytest.mark.parametrize("case", CASES)
def test_generated_ids_and_calls(lms, case):
    is_asr = case.startswith("asr")
    lm = lms["frozen" if is_asr else "merged"]
    number = re.search(r"_p(\d)", case)[1]
    place = int(Z[f"gen_insert_at{number}"])
    prompt = spliced(lm, Z[f"gen_prompt{number}"], place, f"speech_stage{1 if is_asr else 2}")
    config = SamplerConfig(**settings(case))
    out = generate(lm, prompt, config)
    ours, theirs = out.ids[0].tolist(), Z[case].tolist()

    if case.startswith("plain"):
        assert ours == theirs
        if not config.cfg_scale:
            assert generate_plain(lm, prompt, config).ids[0].tolist() == theirs
        return
    # After the end the accelerated sampler may leave masks.
    end = int(Z["end_id"])
    stop = theirs.index(end) + 1 if end in theirs else len(theirs)
    assert ours[:stop] == theirs[:stop]
    assert out.calls.item() == Z[f"{case}_nfe"]


def test_the_factor_rule_with_and_without_its_last_candidate():
    confidence, is_masked = Z["rule_confidence"], Z["rule_masked"]
    for row, factor in enumerate(Z["rule_factor"]):
        args = (confidence[row : row + 1], is_masked[row : row + 1], "factor", factor)
        assert torch.equal(commit(*args, last_candidate=True)[0], Z["rule_committed"][row])
        differs = not torch.equal(commit(*args)[0], Z["rule_committed"][row])
        assert differs == Z["rule_last_committed"][row]


def test_the_last_candidate_is_an_option_of_the_factor_rule_alone():
    with pytest.raises(ValueError, match="last_candidate does nothing under rule threshold"):
        SamplerConfig(rule="threshold", last_candidate=True)
