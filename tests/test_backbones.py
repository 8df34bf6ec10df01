"""Language models beside LLaDA: their names, numbers, special tokens and chat formats."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from torch import nn

from checkpoints.files import WeightsError
from checkpoints.lm import load_lm, read_lm_config, save_lm
from checkpoints.tokenizer import CHATS, load_tokenizer
from data import build_prompt, encode_answers
from diffusion_lm import DiffusionLM
from tests.test_text import byte_level_bpe
from toy.autoregressive import CausalLM

transformers = pytest.importorskip("transformers")

SMOLLM2 = Path(os.environ.get("DIFFA_SMOLLM2", "runs/smollm2"))
SHAPES = {
    "vocab_size": 60,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 72,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    "initializer_range": 0.3,
    "attn_implementation": "eager",
}
PEERS = {"llama": "Llama"}


def edit_config(path, **fields):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def peer(path, family="llama", model_type=None, **shapes):
    """A random model of transformers, saved as if it were a diffusion LM."""
    torch.manual_seed(7)
    name = PEERS[family]
    config = getattr(transformers, f"{name}Config")(**(SHAPES | shapes))
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:  # none at rest: norms are not 1, biases not 0
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    theirs.save_pretrained(path)
    edit_config(path, mask_token_id=58, pad_token_id=59, eos_token_id=59, diffusion=True)
    if model_type:
        edit_config(path, model_type=model_type)
    return theirs


def logits(lm, ids):
    return lm.head(lm(lm.embed(ids)))


def both_ways(theirs, ids):
    """Logits of a model of transformers without its causal mask."""
    L = ids.shape[1]
    return theirs(ids, attention_mask=torch.zeros(len(ids), 1, L, L)).logits


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("family", PEERS)
def test_logits_equal_transformers_without_the_causal_mask(tmp_path, family, heads, kv_heads, tied):
    shapes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    theirs = peer(tmp_path, family, tie_word_embeddings=tied, **shapes)
    ours = load_lm(tmp_path)
    ids = torch.randint(58, (2, 13))
    expected = both_ways(theirs, ids)
    assert (expected - theirs(ids).logits).abs().max() > 1e-2  # the mask is off in the reference
    assert (logits(ours, ids) - expected).abs().max() < 1e-4
    assert ours.config.tied == tied and (ours.config.mask_id, ours.config.end_id) == (58, 59)


@torch.no_grad()
def test_a_saved_lm_has_its_family_s_names_and_runs_in_transformers(tmp_path):
    peer(tmp_path / "theirs")
    save_lm(load_lm(tmp_path / "theirs"), tmp_path / "ours")
    names = load_file(tmp_path / "ours" / "model-00001-of-00001.safetensors").keys()
    assert names == load_file(tmp_path / "theirs" / "model.safetensors").keys()

    again = load_lm(tmp_path / "ours")
    assert again.config == load_lm(tmp_path / "theirs").config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    ids = torch.randint(58, (1, 9))
    assert (logits(again, ids) - both_ways(theirs, ids)).abs().max() < 1e-4


# A causal LM is no diffusion LM, unless it was adapted


@pytest.mark.parametrize("change", [{"diffusion": None}, {"diffusion": False}, {"diffusion": 1}])
def test_a_causal_lm_that_was_not_adapted_is_refused(tmp_path, change):
    peer(tmp_path)
    edit_config(tmp_path, **change)
    for read in (load_lm, read_lm_config):
        with pytest.raises(WeightsError, match="'llama' is a causal LM.*training.adapt_lm"):
            read(tmp_path)

    # Those who adapt it take its weights; the autoregressive baseline takes it as it is.
    assert type(load_lm(tmp_path, causal_weights=True)) is DiffusionLM
    ids = torch.randint(58, (1, 9))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        causal = logits(load_lm(tmp_path, lm_class=CausalLM), ids)
        assert (causal - theirs(ids).logits).abs().max() < 1e-4


def test_a_qwen3_that_was_not_adapted_is_refused(tmp_path):
    peer(tmp_path)
    edit_config(tmp_path, model_type="qwen3", diffusion=None)
    with pytest.raises(WeightsError, match="'qwen3' is a causal LM"):
        read_lm_config(tmp_path)


def test_an_adapted_lm_is_no_baseline(tmp_path):
    peer(tmp_path)
    with pytest.raises(WeightsError, match="this is a diffusion LM"):
        load_lm(tmp_path, lm_class=CausalLM)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"rope_interleaved": True},
    ],
)
def test_what_is_not_computed_is_refused(tmp_path, fields):
    peer(tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(WeightsError, match=f"config.json: .*({next(iter(fields))}|rotary)"):
        read_lm_config(tmp_path)


# Chat formats


def chat_tokenizer(path, format, mask="<|spare|>", **config):
    """A tokenizer with the markers of a chat format and a mask; the config of an LM that fits."""
    path.mkdir(exist_ok=True)
    byte_level_bpe(path, format, first=mask)
    bpe = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    end = bpe.token_to_id(CHATS[format].text_end)
    fitting = {"mask_id": bpe.token_to_id(mask), "end_id": end, "vocab": bpe.get_vocab_size()}
    return replace(read_lm_config_of(path), **(fitting | config))


def read_lm_config_of(path):
    """The config of a tiny LM of the family "llama", saved at `path`."""
    peer(path)
    return read_lm_config(path)


PROMPTS = {
    "chatml": (
        "<|im_start|>system\nYou are a helpful voice assistant.<|im_end|>\n"
        "<|im_start|>user\nThis is the audio:",
        " <audio>. What?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful voice assistant.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nThis is the audio:",
        " <audio>. What?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}


@pytest.mark.parametrize("format", PROMPTS)
def test_the_chat_format_is_that_of_the_tokenizer_s_markers(tmp_path, format):
    config = chat_tokenizer(tmp_path, format)
    tokenizer = load_tokenizer(tmp_path, config)
    prompt = build_prompt(tokenizer, "What?")
    assert (tokenizer.decode(prompt.before), tokenizer.decode(prompt.after)) == PROMPTS[format]
    markers = set(tokenizer.chat.published.values())
    n_markers = "".join(PROMPTS[format]).count("<|")
    assert sum(i in markers for i in prompt.before + prompt.after) == n_markers  # one id each
    assert encode_answers(tokenizer, ["a"], 3)[0, -1] == config.end_id
    assert tokenizer.chat.mask == "<|spare|>"


def test_a_mask_that_is_no_added_token_is_refused(tmp_path):
    config = chat_tokenizer(tmp_path, "chatml")
    for mask_id in (-1, 3):
        with pytest.raises(ValueError, match=f"id {mask_id}, the mask by .* is no added token"):
            load_tokenizer(tmp_path, replace(config, mask_id=mask_id))


def test_a_tokenizer_without_chat_markers_is_refused(tmp_path):
    config = chat_tokenizer(tmp_path, "chatml")
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_end|>", "<|im_stop|>"))
    with pytest.raises(ValueError, match="has neither .*<|im_end|>.* nor "):
        load_tokenizer(tmp_path, config)


# Published weights, where they are at hand


@torch.no_grad()
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="no SmolLM2 (DIFFA_SMOLLM2=DIR)")
def test_the_real_smollm2_equals_transformers():
    lm = load_lm(SMOLLM2, torch.float32, causal_weights=True)
    tokenizer = load_tokenizer(SMOLLM2, replace(lm.config, mask_id=16))
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        SMOLLM2, dtype=torch.float32, attn_implementation="eager"
    )
    prompt = build_prompt(tokenizer, "Please transcribe the speech.")
    ids = torch.tensor([prompt.before + prompt.after])
    assert (logits(lm, ids) - both_ways(theirs, ids)).abs().max() < 1e-3
    causal = load_lm(SMOLLM2, torch.float32, lm_class=CausalLM)
    assert (logits(causal, ids) - theirs(ids).logits).abs().max() < 1e-3
