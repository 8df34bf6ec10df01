"""The full sizes without their files: parameter counts, memory and time, random weights."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHAPES
from safetensors.torch import save_file

from adapters import TAPS, AcousticAdapter, AdapterConfig, SemanticAdapter
from checkpoints.fill import their_name
from checkpoints.key_tables import LLADA_CONFIG, LLADA_KEYS
from checkpoints.lm import load_lm, save_lm
from checkpoints.sizes import ENCODER_SIZES, LM_SIZES
from data import build_prompt
from diffa import DIFFA, splice
from diffusion_lm import DiffusionLM, LMConfig, diffusion_loss, noise, noise_levels
from encoder import WhisperEncoder
from sampler import SamplerConfig, generate


def parameters(make):
    """Parameters of make(), shared ones once, without memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


# Counts. LLaDA's and the adapters' are published. The others are those of transformers' modules of
# the published shapes.


@pytest.mark.parametrize(
    "size, published",
    [("llada-8b", 8_015_581_184), ("llada-1.5", 8_015_581_184), ("qwen3-0.6b", 596_049_920)],
)
def test_parameters_of_the_language_models(size, published):
    assert parameters(lambda: DiffusionLM(LM_SIZES[size])) == published


@pytest.mark.parametrize(
    "size, published",
    [
        ("tiny", 8_208_384),
        ("base", 20_590_592),
        ("small", 88_154_112),
        ("medium", 307_216_384),
        ("large-v2", 636_784_640),
        ("large-v3", 636_968_960),
        ("large-v3-turbo", 636_968_960),
        ("large", 636_784_640),
        ("tiny.en", 8_208_384),
        ("small.en", 88_154_112),
    ],
)
def test_parameters_of_the_encoders(size, published):
    assert parameters(lambda: WhisperEncoder(ENCODER_SIZES[size])) == published


def test_parameters_of_the_adapters():
    config = AdapterConfig()  # Whisper small and LLaDA-8B
    assert parameters(lambda: SemanticAdapter(config)) == 14_369_280
    assert parameters(lambda: AcousticAdapter(config)) == 22_251_776
    assert config.n_prompts * config.lm_width == 81_920


def test_every_named_encoder_has_taps():
    for config in ENCODER_SIZES.values():
        assert max(TAPS[config.n_layers]) <= config.n_layers


# Random weights


@pytest.mark.parametrize("llm", ["toy", "qwen3-0.6b"])
def test_named_sizes_get_random_weights_and_answer(monkeypatch, llm):
    small = {"width": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "ffn": 24}
    monkeypatch.setitem(
        LM_SIZES, "qwen3-0.6b", replace(LM_SIZES["qwen3-0.6b"], **small)
    )  # its vocabulary and chat remain
    torch.manual_seed(0)
    model = DIFFA.from_pretrained(
        "no", "files", "here", random_weights=f"toy+{llm}", audio_context=1.0
    ).eval()
    assert model.stage == "stage2" and model.encoder.config.context == 50
    assert model.lm.embedding.weight.dtype == (torch.float32 if llm == "toy" else torch.bfloat16)
    with torch.inference_mode():
        audio, mask = model.hear(*model.encode(torch.randn(1, 16_000), torch.tensor([9000])))
        prompt = splice(model.lm, [build_prompt(model.tokenizer, "What?")], audio, mask)
        assert generate(
            model.lm, prompt, SamplerConfig(length=4, block_length=4, steps=2)
        ).ids.shape == (1, 4)


gpu = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize(
    "size",
    ["toy+toy", *(pytest.param(f"small+{llm}", marks=gpu) for llm in ("qwen3-0.6b", "llada-8b"))],
)
def test_random_weights_answer_a_clip_that_fills_the_window_and_take_a_training_step(size):
    full = size != "toy+toy"
    device, length, batch, dtype = ("cuda", 128, 8, torch.bfloat16) if full else ("cpu", 8, 2, None)
    torch.manual_seed(0)
    model = DIFFA.from_pretrained(
        "", "", random_weights=size, device=device, dtype=dtype, **({} if full else SHAPES)
    ).eval()
    lines = []

    def measured(what, count, act):
        if full:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = act()
        if full:
            torch.cuda.synchronize()
        seconds, peak = (
            time.perf_counter() - started,
            torch.cuda.max_memory_allocated() / 1e9 if full else 0.0,
        )
        lines.append(
            f"{size}, {what}: {seconds:.3f} s, {count / seconds:.1f} tokens/s, peak {peak:.2f} GB"
        )
        return result

    clips = 0.1 * torch.randn(batch, model.encoder.config.n_samples, device=device)
    n_samples = torch.full((batch,), clips.shape[1], device=device)

    @torch.inference_mode()
    def answer():
        audio = model.hear(*model.encode(clips[:1], n_samples[:1]))
        prompt = splice(model.lm, [build_prompt(model.tokenizer, "What can you hear?")], *audio)
        return generate(
            model.lm, prompt, SamplerConfig(length=length, block_length=length, steps=length)
        )

    def step():
        optimizer = torch.optim.AdamW(
            [p for part in (model.semantic, model.acoustic) for p in part.parameters()], 1e-4
        )
        answers = torch.randint(200, (batch, length), device=device)
        generator = torch.Generator().manual_seed(0)
        audio = model.hear(*model.encode(clips, n_samples))
        prompt = splice(
            model.lm, [build_prompt(model.tokenizer, "What can you hear?")] * batch, *audio
        )
        t = noise_levels(batch, generator)
        noisy = noise(answers, t, model.lm.config.mask_id, generator)
        loss = diffusion_loss(
            model.lm, prompt.embeddings, prompt.mask, answers, noisy, t, answers.numel()
        )
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(2 if full else 1):  # the first time on a GPU is not the usual one
        assert measured("answer", length, answer).ids.shape == (1, length)
        assert measured(f"training step at batch {batch}", batch * length, step).isfinite()
        model.zero_grad()
    print("\n".join(lines))


def test_a_size_that_has_no_name_is_refused_with_those_that_have():
    with pytest.raises(ValueError, match=r"small\+nothing: give one of .*large-v3.*llada-8b"):
        DIFFA.from_pretrained("", "", random_weights="small+nothing")


# Memory and time


def anonymous_memory():
    """Bytes of this process that are not mapped files."""
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon")
    ]
    return 1024 * int(line.split()[1])


linux = pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="measured by Linux's /proc"
)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A LLaDA directory of 100 MB in two shards of bfloat16."""
    path = tmp_path_factory.mktemp("large")
    config = LMConfig(width=512, n_layers=2, n_heads=4, ffn=1024, vocab=45_000, mask_id=1, end_id=2)
    save_lm(DiffusionLM(config).bfloat16(), path, n_shards=2)
    return path, sum(file.stat().st_size for file in path.glob("*.safetensors"))


@linux
def test_loading_in_the_file_s_dtype_takes_no_memory_but_the_mapped_file(large):
    path, size = large
    before = anonymous_memory()
    lm = load_lm(path)
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    assert anonymous_memory() - before < 0.1 * size


@linux
def test_loading_in_another_dtype_holds_one_copy(large):
    path, size = large
    before = anonymous_memory()
    lm = load_lm(path, torch.float32)
    assert anonymous_memory() - before < 1.1 * 2 * size
    assert sum(p.nbytes for p in lm.parameters()) > 1.9 * size


def generate_llada(path, config, n_shards, dtype=torch.bfloat16):
    """Write a LLaDA checkpoint of random weights, shard by shard, without the model in memory."""
    with torch.device("meta"):
        shapes = {
            their_name(LLADA_KEYS, name): p.shape
            for name, p in DiffusionLM(config).named_parameters()
        }
    noise, weight_map = (0.02 * torch.randn(1 << 20)).to(dtype), {}
    for i in range(n_shards):
        shard = {}
        for name in list(shapes)[i::n_shards]:
            n = shapes[name].numel()
            shard[name] = noise.repeat(n // len(noise) + 1)[:n].view(shapes[name])
        file = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        save_file(shard, path / file)
        weight_map |= dict.fromkeys(shard, file)
    raw = {theirs: getattr(config, ours) for ours, theirs in LLADA_CONFIG.items()} | {
        "model_type": "llada"
    }
    (path / "config.json").write_text(json.dumps(raw))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def forget(files):
    """Drop files from the page cache, so that reading them means reading the disk."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_once(files):
    """Seconds to read files from beginning to end."""
    buffer, started = bytearray(1 << 24), time.perf_counter()
    for file in files:
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.perf_counter() - started


LOAD = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
from checkpoints.lm import load_lm
started = time.perf_counter()
lm = load_lm(sys.argv[2])
seconds = time.perf_counter() - started
assert not any(p.is_meta for p in lm.parameters())
print(seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@linux
def test_a_checkpoint_of_full_width_is_loaded_in_little_more_than_its_own_memory_and_reading_time(
    tmp_path,
):
    generate_llada(tmp_path, replace(LMConfig(), n_layers=8), n_shards=6)
    files = sorted(tmp_path.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    try:
        for state in ("cold", "warm"):
            if state == "cold":
                forget(files)
            reading = read_once(files)
            if state == "cold":
                forget(files)
            out = subprocess.run(
                [sys.executable, "-c", LOAD, str(Path(__file__).parents[1]), str(tmp_path)],
                capture_output=True,
                check=True,
            )
            loading, peak = (float(number) for number in out.stdout.split())
            print(
                f"{state}: {size / 1e9:.2f} GB, read in {reading:.2f} s, "
                f"loaded in {loading:.2f} s, peak {peak / 1e9:.2f} GB"
            )
            assert peak < 1.1 * size + 1e9
            assert loading < 1.5 * reading
    finally:
        for file in files:
            file.unlink()
