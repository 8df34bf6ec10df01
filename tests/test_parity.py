"""Ours equals other implementations, on random models of odd shapes and on one real encoder."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import whisper
from torch import nn
from transformers.models.bert.modeling_bert import BertLayer
from whisper.model import ModelDimensions

from adapters import AdapterConfig, QFormerBlock
from checkpoints.files import read_checkpoint
from checkpoints.fill import fill
from checkpoints.key_tables import ACOUSTIC_KEYS, WHISPER_DROPPED
from checkpoints.lm import load_lm
from checkpoints.whisper import load_whisper
from data import read_audio
from diffusion_lm import DiffusionLM, LMConfig
from encoder import SAMPLE_RATE, log_mel
from lab.measure_window import states_of_clips
from toy.autoregressive import CausalLM

SHARED = Path(__file__).parents[2] / "shared"
CLIP = SHARED / "speech/audio/activated.flac"


def close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() < tolerance


def compare_states(theirs, directory, mel, tolerance):
    ours = load_whisper(directory)
    with torch.no_grad():
        states, expected = ours(mel), theirs.model.encoder(mel, output_hidden_states=True)
    assert len(states) == len(expected.hidden_states) == ours.config.n_layers + 1
    for state, reference in zip(states[:-1], expected.hidden_states):
        close(state, reference, tolerance)
    close(states[-1], expected.last_hidden_state, tolerance)


@pytest.mark.parametrize(
    "n_mels, width, layers, heads, context", [(80, 24, 2, 3, 50), (128, 40, 5, 5, 30)]
)
def test_encoder_states_equal_transformers_and_its_decoder_is_dropped(
    tmp_path, n_mels, width, layers, heads, context
):
    torch.manual_seed(width)
    config = transformers.WhisperConfig(
        vocab_size=32,
        num_mel_bins=n_mels,
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=56,
        decoder_layers=1,
        decoder_attention_heads=1,
        decoder_ffn_dim=8,
        max_source_positions=context,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        init_std=0.3,
        tie_word_embeddings=False,
    )
    theirs = transformers.WhisperForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    names = list(read_checkpoint(tmp_path))
    dropped = [name for name in names if not name.startswith("model.encoder.")]
    assert {"model.decoder.", "proj_out."} <= set(WHISPER_DROPPED)
    assert dropped and all(name.startswith(WHISPER_DROPPED) for name in dropped)
    compare_states(theirs, tmp_path, torch.randn(2, n_mels, 2 * context), 1e-4)


def openai_model(n_mels=80, width=24, layers=2, heads=3, context=50):
    """OpenAI's Whisper with random weights, its LayerNorms too."""
    torch.manual_seed(width)
    dims = ModelDimensions(n_mels, context, width, heads, layers, 64, 8, 8, 1, 1)
    theirs = whisper.model.Whisper(dims).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    return theirs


def openai_states(theirs, mel):
    """All states of OpenAI's encoder: before the first block, after each, the last normed."""
    states, blocks = [], theirs.encoder.blocks
    hooks = [blocks[0].register_forward_pre_hook(lambda block, given: states.append(given[0]))]
    hooks += [
        block.register_forward_hook(lambda block, given, left: states.append(left))
        for block in blocks
    ]
    last = theirs.encoder(mel)
    for hook in hooks:
        hook.remove()
    return [*states[:-1], last]


@torch.no_grad()
@pytest.mark.parametrize(
    "n_mels, width, layers, heads, context", [(80, 24, 2, 3, 50), (128, 40, 5, 5, 30)]
)
def test_encoder_states_equal_openai_whisper_from_its_own_file(
    tmp_path, n_mels, width, layers, heads, context
):
    theirs = openai_model(n_mels, width, layers, heads, context)
    torch.save(
        {"dims": asdict(theirs.dims), "model_state_dict": theirs.state_dict()},
        tmp_path / "small.pt",
    )
    ours, mel = load_whisper(tmp_path / "small.pt"), torch.randn(2, n_mels, 2 * context)
    for state, expected in zip(ours(mel), openai_states(theirs, mel), strict=True):
        close(state, expected, 1e-4)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_the_log_mel_equals_openai_whisper_s_but_for_rounding(n_mels):
    seconds = torch.arange(16_000) / SAMPLE_RATE
    noise = 0.1 * torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    for clip in (noise, 0.5 * torch.sin(2 * torch.pi * 440 * seconds)):
        close(log_mel(clip, n_mels), whisper.log_mel_spectrogram(clip, n_mels), 1e-6)


@torch.no_grad()
@pytest.mark.skipif(
    not (SHARED / "whisper-tiny.en").is_dir() or not CLIP.is_file(),
    reason="no real encoder on this machine",
)
def test_real_encoder_states_equal_two_other_implementations_on_speech(tmp_path):
    reference = (
        transformers.WhisperForConditionalGeneration.from_pretrained(SHARED / "whisper-tiny.en")
        .eval()
        .float()
    )
    ours = load_whisper(SHARED / "whisper-tiny.en")
    renamed = {}
    for name, tensor in reference.model.encoder.state_dict().items():  # by hand, not by our tables
        for old, new in (
            ("layers.", "blocks."),
            ("self_attn_layer_norm", "attn_ln"),
            ("final_layer_norm", "mlp_ln"),
            ("layer_norm", "ln_post"),
            ("self_attn.", "attn."),
            ("q_proj", "query"),
            ("k_proj", "key"),
            ("v_proj", "value"),
            ("out_proj", "out"),
            ("fc1", "mlp.0"),
            ("fc2", "mlp.2"),
            ("embed_positions.weight", "positional_embedding"),
        ):
            name = name.replace(old, new)
        renamed[name] = tensor
    openai = whisper.model.Whisper(ModelDimensions(80, 1500, 384, 6, 4, 64, 8, 8, 1, 1)).eval()
    openai.encoder.load_state_dict(renamed)
    items = json.loads((SHARED / "speech/test.json").read_text())[::8][:10]
    assert len(items) == 10
    for item in items:
        clip = read_audio(SHARED / "speech" / item["audio_filepath"])
        mel = log_mel(nn.functional.pad(clip, (0, 480_000 - len(clip))))[None]
        states = ours(mel)
        theirs = reference.model.encoder(mel, output_hidden_states=True)
        for state, expected in zip(
            states, [*theirs.hidden_states[:-1], theirs.last_hidden_state], strict=True
        ):
            close(state, expected, 1e-3)
        their_mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(clip))[None]
        for state, expected in zip(states, openai_states(openai, their_mel), strict=True):
            close(state, expected, 1e-3)


@torch.no_grad()
@pytest.mark.skipif(
    not (SHARED / "whisper-tiny.en").is_dir() or not CLIP.is_file(),
    reason="no real encoder on this machine",
)
def test_a_shorter_window_moves_the_real_encoder_s_states_little_and_the_less_the_longer_it_is():
    windows = {}
    for seconds in (30, 4, 10):
        encoder = load_whisper(SHARED / "whisper-tiny.en", audio_context=seconds)
        windows[seconds], _ = states_of_clips(encoder, [str(CLIP)])
    moved = {}
    for seconds in (4, 10):
        pairs = zip(windows[seconds], windows[30], strict=True)
        moved[seconds] = [
            100 * ((state - whole).norm() / whole.norm()).item() for state, whole in pairs
        ]
    assert (
        moved[4][0] < 1e-3 and moved[10][0] < 1e-3
    )  # before any block has attended to the silence
    assert all(0 < less < more < 30 for more, less in zip(moved[4][1:], moved[10][1:], strict=True))


def test_qformer_block_equals_bert_with_cross_attention():
    torch.manual_seed(3)
    config = transformers.BertConfig(
        hidden_size=24,
        num_attention_heads=3,
        intermediate_size=40,
        is_decoder=True,
        add_cross_attention=True,
        attn_implementation="eager",
    )
    theirs = BertLayer(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)  # LayerNorms too, so that none is at rest
    ours = nn.Module()
    ours.blocks = nn.ModuleList([QFormerBlock(AdapterConfig(encoder_width=24, n_heads=3, ffn=40))])
    tensors = {
        f"acoustic_connector.qformer.layer.0.{name}": tensor
        for name, tensor in theirs.state_dict().items()
    }
    fill(ours, tensors, ACOUSTIC_KEYS, (), Path("bert"))
    ours.eval()
    queries, states = torch.randn(2, 5, 24), torch.randn(2, 11, 24)
    with torch.no_grad():
        expected = theirs(queries, encoder_hidden_states=states)
        close(
            ours.blocks[0](queries, states),
            expected[0] if isinstance(expected, tuple) else expected,
        )


def llama_and_ours(causal):
    torch.manual_seed(4)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=60,
            hidden_size=40,
            num_hidden_layers=3,
            num_attention_heads=5,
            num_key_value_heads=5,
            intermediate_size=72,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            attn_implementation="eager",
            initializer_range=0.3,
        )
    ).eval()
    config = LMConfig(
        width=40, n_layers=3, n_heads=5, ffn=72, vocab=60, max_length=64, mask_id=58, end_id=59
    )
    ours = (CausalLM if causal else DiffusionLM)(config).eval()
    to_llama = {
        "embedding": "model.embed_tokens",
        "norm": "model.norm",
        "unembedding": "lm_head",
        "blocks.{}.attn_norm": "model.layers.{}.input_layernorm",
        "blocks.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
        "blocks.{}.attn.query": "model.layers.{}.self_attn.q_proj",
        "blocks.{}.attn.key": "model.layers.{}.self_attn.k_proj",
        "blocks.{}.attn.value": "model.layers.{}.self_attn.v_proj",
        "blocks.{}.attn.out": "model.layers.{}.self_attn.o_proj",
        "blocks.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
        "blocks.{}.mlp.up": "model.layers.{}.mlp.up_proj",
        "blocks.{}.mlp.down": "model.layers.{}.mlp.down_proj",
    }
    fill(ours, theirs.state_dict(), to_llama, (), Path("llama"))
    return theirs, ours


@torch.no_grad()
def test_lm_equals_llama_without_its_causal_mask():
    theirs, ours = llama_and_ours(causal=False)
    ids = torch.randint(58, (2, 13))
    everywhere = torch.zeros(2, 1, 13, 13)  # additive: nothing is hidden

    def llama(ids):
        return theirs(ids, attention_mask=everywhere).logits

    other_end = ids.clone()
    other_end[:, -1] = (ids[:, -1] + 1) % 58
    assert (
        llama(ids)[:, 0] - llama(other_end)[:, 0]
    ).abs().max() > 1e-2  # the reference does look ahead
    close(ours.head(ours(ours.embed(ids))), llama(ids), 1e-4)


@torch.no_grad()
def test_causal_lm_equals_llama():
    theirs, ours = llama_and_ours(causal=True)
    ids = torch.randint(58, (2, 13))
    close(ours.head(ours(ours.embed(ids))), theirs(ids).logits, 1e-4)


def qwen3(path, tied, max_shard_size="5GB", **shapes):
    """A random Qwen3 of odd shapes, saved by transformers as if it were a diffusion model."""
    torch.manual_seed(7)
    given = {
        "vocab_size": 60,
        "hidden_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 72,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "initializer_range": 0.3,
        "attn_implementation": "eager",
    } | shapes
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**given)).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.normal_(
                parameter, mean=1.0, std=0.3
            )  # none at rest, those of the heads neither
    theirs.save_pretrained(path, max_shard_size=max_shard_size)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(config | {"model_type": "a2d-qwen3", "mask_token_id": 58, "pad_token_id": 59})
    )
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(6, 2, 16), (5, 5, 8), (4, 1, 10)])
def test_lm_equals_qwen3_without_its_causal_mask(tmp_path, tied, heads, kv_heads, head_dim):
    shapes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    theirs, ids = qwen3(tmp_path, tied, **shapes), torch.randint(58, (2, 13))
    ours = load_lm(tmp_path)
    assert (ours.config.mask_id, ours.config.end_id, ours.config.tied) == (58, 59, tied)
    expected = theirs(ids, attention_mask=torch.zeros(2, 1, 13, 13)).logits
    assert (expected - theirs(ids).logits).abs().max() > 1e-2  # the mask is off in the reference
    close(ours.head(ours(ours.embed(ids))), expected, 1e-4)


@torch.no_grad()
def test_qwen3_in_shards_is_read_alike(tmp_path):
    theirs, ids = qwen3(tmp_path, tied=False, max_shard_size="40KB"), torch.randint(58, (1, 9))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load_lm(tmp_path)
    close(
        ours.head(ours(ours.embed(ids))),
        theirs(ids, attention_mask=torch.zeros(1, 1, 9, 9)).logits,
        1e-4,
    )


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "mask", ["1111111110000", "0000111111111", "0001111111110", "1111001100111"]
)
def test_lm_padding_anywhere_changes_nothing(causal, mask):
    _, ours = llama_and_ours(causal)
    x, mask = torch.randn(1, 9, 40), torch.tensor([[bit == "1" for bit in mask]])
    padded = torch.full((1, 13, 40), 7.0)
    padded[mask] = x[0]
    close(ours(padded, mask)[mask], ours(x)[0], 1e-4)


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("sound", ["noise", "loud", "faint", "chirp", "mostly silence"])
def test_log_mel_equals_whisper(n_mels, sound):
    seconds = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    noise = np.random.default_rng(5).standard_normal(SAMPLE_RATE)
    wave = {
        "noise": 0.1 * noise,
        "loud": np.clip(2 * noise, -1, 1),
        "faint": 1e-4 * noise,
        "chirp": 0.5 * np.sin(2 * np.pi * (100 + 3000 * seconds) * seconds),
        "mostly silence": 0.3 * noise * (seconds < 0.2),
    }[sound].astype(np.float32)
    close(log_mel(torch.from_numpy(wave), n_mels), whisper.log_mel_spectrogram(wave, n_mels), 2e-4)


@pytest.mark.skipif(not CLIP.is_file(), reason="no speech on this machine")
@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_of_speech_equals_whisper(n_mels):
    clip = nn.functional.pad(read_audio(CLIP), (0, 16_000))
    clip = clip[: len(clip) // 160 * 160]
    close(log_mel(clip, n_mels), whisper.log_mel_spectrogram(clip, n_mels), 2e-4)


def test_log_mel_of_a_batch_is_each_clip_s_own():
    quiet, loud = 1e-3 * torch.randn(3200), torch.randn(3200)
    assert torch.equal(log_mel(torch.stack([quiet, loud]))[0], log_mel(quiet))
