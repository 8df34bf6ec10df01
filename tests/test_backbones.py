"""Language models beside LLaDA: their names, numbers, special tokens and chat formats."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoints.chats import CHATS
from checkpoints.files import WeightsError
from checkpoints.lm import load_lm, read_lm_config, save_lm
from checkpoints.tokenizer import JSONTokenizer, load_tokenizer
from checkpoints.whisper import load_whisper
from data import build_prompt, encode_answers, left_pad
from diffa import Spliced
from diffusion_lm import DiffusionLM, LMConfig, diffusion_loss
from sampler import SamplerConfig, generate
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
# Class of transformers and model_type of each family. Dream and iLLaDA have code of their own on
# the hub, which computes what Qwen2 and Llama do.
PEERS = {
    "llama": ("Llama", "llama"),
    "qwen2": ("Qwen2", "a2d-qwen2"),
    "qwen3": ("Qwen3", "a2d-qwen3"),
    "dream": ("Qwen2", "Dream"),
    "illada": ("Llama", "illada"),
}


def edit_config(path, **fields):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def peer(path, family="llama", **shapes):
    """A random model of transformers, saved as if it were a diffusion LM."""
    torch.manual_seed(7)
    name, model_type = PEERS[family]
    config = getattr(transformers, f"{name}Config")(**(SHAPES | shapes))
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:  # none at rest: norms are not 1, biases not 0
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    theirs.save_pretrained(path)
    edit_config(path, mask_token_id=58, pad_token_id=59, eos_token_id=59, diffusion=True)
    edit_config(path, model_type=model_type)
    return theirs


def logits(lm, ids):
    return lm.head(lm(lm.embed(ids)))


def both_ways(theirs, ids):
    """Logits of a model of transformers without its causal mask."""
    L = ids.shape[1]
    return theirs(ids, attention_mask=torch.zeros(len(ids), 1, L, L)).logits


def moved_right(logits):
    """Logits (B, L, V) that predict the next token, at the token's own position, as in Dream."""
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("heads, kv_heads, tied", [(6, 2, True), (4, 4, False), (3, 1, True)])
@pytest.mark.parametrize("family", PEERS)
def test_logits_equal_transformers_without_the_causal_mask(tmp_path, family, heads, kv_heads, tied):
    shapes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    theirs = peer(tmp_path, family, tie_word_embeddings=tied, **shapes)
    ours = load_lm(tmp_path)
    ids = torch.randint(58, (2, 13))
    expected = both_ways(theirs, ids)
    assert (expected - theirs(ids).logits).abs().max() > 1e-2  # the mask is off in the reference
    if family == "dream":
        expected = moved_right(expected)
    assert (logits(ours, ids) - expected).abs().max() < 1e-4
    assert ours.config.tied == tied and (ours.config.mask_id, ours.config.end_id) == (58, 59)


@torch.no_grad()
@pytest.mark.parametrize("family", PEERS)
def test_a_saved_lm_has_its_family_s_names(tmp_path, family):
    peer(tmp_path / "theirs", family)
    lm = load_lm(tmp_path / "theirs")
    save_lm(lm, tmp_path / "ours")
    names = load_file(tmp_path / "ours" / "model-00001-of-00001.safetensors").keys()
    assert names == load_file(tmp_path / "theirs" / "model.safetensors").keys()

    again = load_lm(tmp_path / "ours")
    assert again.config == lm.config
    ids = torch.randint(58, (1, 9))
    assert torch.equal(logits(again, ids), logits(lm, ids))

    # Another family cannot say what this one does.
    other = "llama" if family != "llama" else "dream"
    with pytest.raises(ValueError, match=f"the format of '{other}' has another"):
        save_lm(DiffusionLM(replace(lm.config, family=other)), tmp_path / "other")


@torch.no_grad()
def test_an_adapted_llama_runs_in_transformers(tmp_path):
    peer(tmp_path / "theirs")
    save_lm(load_lm(tmp_path / "theirs"), tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    ids = torch.randint(58, (1, 9))
    assert (logits(load_lm(tmp_path / "ours"), ids) - both_ways(theirs, ids)).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("family", PEERS)
def test_names_of_the_inner_class_are_read(tmp_path, family):
    theirs = peer(tmp_path, family, tie_word_embeddings=True)
    lm = load_lm(tmp_path)
    theirs.model.save_pretrained(tmp_path / "inner")
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "inner" / "config.json").write_text(config)
    names = load_file(tmp_path / "inner" / "model.safetensors").keys()
    assert "embed_tokens.weight" in names and not any(name.startswith("model.") for name in names)
    ids = torch.randint(58, (1, 9))
    assert torch.equal(logits(load_lm(tmp_path / "inner"), ids), logits(lm, ids))


@torch.no_grad()
def test_rotary_frequencies_in_a_file_are_those_of_the_config_or_refused(tmp_path):
    peer(tmp_path)
    ids = torch.randint(58, (1, 9))
    expected = logits(load_lm(tmp_path), ids)
    file = tmp_path / "model.safetensors"
    frequencies = 1e5 ** -(torch.arange(0, 8, 2) / 8)  # the head width is 8
    for factor in (1, 2):
        buffers = {
            f"model.layers.{i}.self_attn.rotary_emb.inv_freq": factor * frequencies.half()
            for i in range(3)
        }
        save_file(load_file(file) | buffers, file, metadata={"format": "pt"})
        if factor == 1:
            assert torch.equal(logits(load_lm(tmp_path), ids), expected)
    with pytest.raises(WeightsError, match="safetensors: .*inv_freq is not what rope_theta 100000"):
        load_lm(tmp_path)


@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_a_missing_or_unknown_bias_is_an_error(tmp_path, tensor):
    peer(tmp_path, "qwen2" if tensor == "weight" else "llama")
    edit_config(tmp_path, model_type="llama" if tensor == "weight" else "a2d-qwen2")
    problem = "extra" if tensor == "weight" else "missing"
    with pytest.raises(WeightsError, match=f"{problem} model.layers.0.self_attn.[qkv]_proj.bias"):
        load_lm(tmp_path)


# Logits that are shifted by one


def dream(n_layers=2, **shapes):
    torch.manual_seed(3)
    sizes = {"width": 24, "n_heads": 4, "n_kv_heads": 2, "ffn": 32, "vocab": 40, "max_length": 64}
    config = LMConfig(
        **(sizes | shapes),
        n_layers=n_layers,
        mask_id=38,
        end_id=39,
        qkv_bias=True,
        shifted=True,
        family="dream",
    )
    lm = DiffusionLM(config).eval()
    for parameter in lm.parameters():
        nn.init.normal_(parameter, std=0.4)
    plain = DiffusionLM(replace(config, shifted=False)).eval()
    plain.load_state_dict(lm.state_dict())
    return lm, plain


def prompts(lm, lengths=(7, 7)):
    rows = [lm.embed(torch.randint(38, (n,))) for n in lengths]
    embeddings, mask = left_pad(rows)
    return Spliced(embeddings=embeddings.detach(), mask=mask, is_text=mask.clone())


def test_the_loss_of_shifted_logits_reads_one_row_before(tmp_path):
    lm, plain = dream()
    prompt = prompts(lm)
    answer = torch.randint(38, (2, 5))
    noisy = torch.where(torch.tensor([[1, 0, 1, 1, 0], [1, 1, 0, 0, 1]]) > 0, 38, answer)
    t = torch.tensor([0.5, 0.8])
    loss = diffusion_loss(lm, prompt.embeddings, prompt.mask, answer, noisy, t, 10)

    x = torch.cat([prompt.embeddings, plain.embed(noisy)], dim=1)
    rows = plain.head(plain(x)).log_softmax(dim=-1)[:, 6:-1]  # one before each answer token
    losses = -rows.gather(-1, answer[..., None])[..., 0] / t[:, None]
    assert torch.allclose(loss, losses[noisy == 38].sum() / 10, atol=1e-6)


@torch.no_grad()
def test_shifted_logits_are_sampled_one_row_before():
    lm, plain = dream()
    prompt = prompts(lm, lengths=(7,))
    config = SamplerConfig(length=6, block_length=3, stop_at_end=False)

    # By hand, with the logits of a plain LM moved right.
    ids = torch.full((1, 6), 38)
    for step in range(6):
        x = torch.cat([prompt.embeddings, plain.embed(ids)], dim=1)
        probabilities = moved_right(plain.head(plain(x))).softmax(dim=-1)[0, 7:]  # (6, V)
        probabilities[:, 38] = 0
        confidence, tokens = probabilities.max(dim=-1)
        confidence[(ids[0] != 38) | (torch.arange(6) // 3 != step // 3)] = -1
        best = confidence.argmax()
        ids[0, best] = tokens[best]
    assert generate(lm, prompt, config).ids.tolist() == ids.tolist()


@torch.no_grad()
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
def test_shifted_logits_with_a_cache_equal_those_without_in_one_layer(cache, cfg_scale):
    # In a single layer, keys and values depend on their own token alone: no cache is ever too old.
    lm, _ = dream(n_layers=1)
    prompt = prompts(lm, lengths=(7, 4))
    settings = {"length": 9, "block_length": 3, "cfg_scale": cfg_scale, "stop_at_end": False}
    expected = generate(lm, prompt, SamplerConfig(**settings))
    found = generate(lm, prompt, SamplerConfig(**settings, cache=cache))
    assert found.ids.tolist() == expected.ids.tolist()


@torch.no_grad()
def test_blocks_are_appended_where_the_lm_was_trained_so():
    lm, _ = dream()
    prompt = prompts(lm)
    lm.config = replace(lm.config, appends=True)
    settings = {"length": 9, "block_length": 3, "stop_at_end": False}
    found = [
        generate(lm, prompt, SamplerConfig(**settings, append=append)).ids.tolist()
        for append in (None, True, False)
    ]
    assert found[0] == found[1] != found[2]


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"refresh": 2}, {"append": True}, {"refresh": 3}])
def test_shifted_logits_with_a_kept_prompt_equal_those_without_in_one_layer(settings):
    lm, _ = dream(n_layers=1)
    prompt = prompts(lm, lengths=(7, 4))
    shape = {"length": 9, "block_length": 3, "stop_at_end": False}
    plain = SamplerConfig(**shape, append=settings.get("append"))
    expected = generate(lm, prompt, plain).ids.tolist()
    for cache in ("prefix", "dual"):
        config = SamplerConfig(**shape, **settings, cache=cache)
        assert generate(lm, prompt, config).ids.tolist() == expected


# What cannot run here


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"model_type": "sdar"}, "later blocks"),
        ({"architectures": ["SDARForCausalLM"]}, "later blocks"),
        ({"model_type": "Fast_dLLM_Qwen", "bd_size": 32}, "later blocks"),
        ({"block_size": 4}, "later blocks"),
        ({"_name_or_path": "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1"}, "later blocks"),
        ({"model_type": "llada", "num_experts": 64}, "experts"),
        ({"model_type": "llada_moe"}, "experts"),
        ({"model_type": "llada2_moe"}, "experts"),
        ({"model_type": "modernbert"}, "local and global layers"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_lms_that_would_answer_wrongly_are_refused_with_the_reason(tmp_path, fields, reason):
    peer(tmp_path / "lm", "qwen3")
    edit_config(tmp_path / "lm", **fields)
    with pytest.raises(WeightsError, match=f"config.json: .*{reason}"):
        read_lm_config(tmp_path / "lm")


@pytest.mark.parametrize(
    "name",
    [
        "Qwen3-0.6B-diffusion-bd3lm-v0.1",
        "SDAR-1.7B-Chat",
        "TraDo-4B-Instruct",
        "Fast_dLLM_v2_7B",
        "models--dllm-hub--Qwen3-0.6B-diffusion-bd3lm-v0.1/snapshots/1f0c",
    ],
)
def test_a_block_causal_lm_is_refused_by_its_directory_s_name(tmp_path, name):
    peer(tmp_path / name, "qwen3")
    with pytest.raises(WeightsError, match="does not attend to later blocks"):
        load_lm(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / name)
    with pytest.raises(WeightsError, match="does not attend to later blocks"):
        load_lm(tmp_path / "link")


LLADA_SWITCHES = {
    "activation_type": "swiglu",
    "alibi": True,
    "attention_layer_norm": True,
    "bias_for_layer_norm": True,
    "block_group_size": 2,
    "block_type": "sequential",
    "clip_qkv": 8.0,
    "include_bias": True,
    "include_qkv_bias": True,
    "input_emb_norm": True,
    "layer_norm_type": "default",
    "layer_norm_with_affine": False,
    "num_experts": 64,
    "rope": False,
    "rope_full_precision": False,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "scale_logits": True,
}


@pytest.mark.parametrize("field, value", LLADA_SWITCHES.items())
def test_switches_of_llada_that_are_not_computed_are_refused(toy_dirs, tmp_path, field, value):
    shutil.copytree(toy_dirs["llm"], tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, layer_norm_with_affine=True, block_group_size=1, clip_qkv=None)
    read_lm_config(tmp_path)
    edit_config(tmp_path, **{field: value})
    with pytest.raises(WeightsError, match=f"config.json: .*({field}|rotary)"):
        read_lm_config(tmp_path)


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
    byte_level_bpe(path, format, first=mask)
    bpe = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    end = bpe.token_to_id(CHATS[format].text_end)
    fitting = {"mask_id": bpe.token_to_id(mask), "end_id": end, "vocab": bpe.get_vocab_size()}
    return LMConfig(**({"width": 8, "n_heads": 2, "family": "llama"} | fitting | config))


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
    "seed": (
        "<[begin▁of▁sentence]>system\nYou are a helpful voice assistant.<[end▁of▁sentence]>"
        "<[begin▁of▁sentence]>user\nThis is the audio:",
        " <audio>. What?<[end▁of▁sentence]><[begin▁of▁sentence]>assistant\n",
    ),
}


@pytest.mark.parametrize("format", PROMPTS)
def test_the_chat_format_is_that_of_the_tokenizer_s_markers(tmp_path, format):
    config = chat_tokenizer(tmp_path, format)
    tokenizer = load_tokenizer(tmp_path, config)
    prompt = build_prompt(tokenizer, "What?")
    assert (tokenizer.decode(prompt.before), tokenizer.decode(prompt.after)) == PROMPTS[format]
    markers = set(tokenizer.chat.published.values())
    n_markers = sum("".join(PROMPTS[format]).count(start) for start in ("<|", "<["))
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
    with pytest.raises(ValueError, match="has no .*<|im_end|>.* nor "):
        load_tokenizer(tmp_path, config)


def test_an_adapted_qwen3_may_have_another_mask(tmp_path):
    byte_level_bpe(tmp_path, "qwen3", first="<|spare|>")
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|mask|>", "<|mosk|>"))
    markers = JSONTokenizer(file).markers
    ids = {"mask_id": markers["<|spare|>"], "end_id": markers["<|endoftext|>"]}
    config = LMConfig(width=8, n_heads=2, family="qwen3", vocab=500, **ids)
    tokenizer = load_tokenizer(tmp_path, config)
    assert tokenizer.chat.mask == "<|spare|>" and "<think>" in tokenizer.chat.answer


TEMPLATE = """{{ bos_token }}{% for message in messages %}
[{{ message['role'] }}] {{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
[assistant] <{think}>
{% endif %}
"""


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_illada_s_chat_format_is_its_template(tmp_path, place):
    config = chat_tokenizer(tmp_path, "seed", mask="<[MASK]>", family="illada")
    listed = json.dumps({"chat_template": [{"name": "default", "template": TEMPLATE}]})
    (tmp_path / place).write_text(TEMPLATE if "jinja" in place else listed)
    tokenizer = load_tokenizer(tmp_path, config)
    prompt = build_prompt(tokenizer, "What?")
    assert tokenizer.decode(prompt.before) == (
        "<[begin▁of▁sentence]>[system] You are a helpful voice assistant."
        "<[end▁of▁sentence]>\n[user] This is the audio:"
    )
    after = " <audio>. What?<[end▁of▁sentence]>\n[assistant] <{think}>\n"
    assert tokenizer.decode(prompt.after) == after


def test_a_template_that_refuses_a_system_turn_gets_its_text_in_the_user_s(tmp_path):
    config = chat_tokenizer(tmp_path, "seed", mask="<[MASK]>", family="illada")
    refusal = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(refusal + TEMPLATE)
    tokenizer = load_tokenizer(tmp_path, config)
    before = tokenizer.decode(build_prompt(tokenizer, "What?").before)
    assert before == (
        "<[begin▁of▁sentence]>[user] You are a helpful voice assistant.\n\nThis is the audio:"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('nothing pleases') }}",
        "{{ messages[0].__class__.mro() }}",
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% if %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_write_the_texts_once_is_refused(tmp_path, template):
    config = chat_tokenizer(tmp_path, "seed", mask="<[MASK]>", family="illada")
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="its chat template does not write"):
        load_tokenizer(tmp_path, config)


def test_illada_s_mask_and_end_are_its_own_tokens(tmp_path):
    peer(tmp_path, "illada")
    edit_config(tmp_path, mask_token_id=None, pad_token_id=1, eos_token_id=2)
    added = [{"id": 5, "content": "<[MASK]>"}, {"id": 2, "content": "<[end▁of▁sentence]>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    config = read_lm_config(tmp_path)
    assert (config.mask_id, config.end_id, config.appends) == (5, 2, True)
    edit_config(tmp_path, eos_token_id=None)
    assert read_lm_config(tmp_path).end_id == 2


@pytest.mark.parametrize("tensor_dtype", [torch.int32, torch.bool])
def test_a_quantised_embedding_table_is_named(tmp_path, tensor_dtype):
    peer(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(tensor_dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="embed_tokens.weight.*quantised"):
        load_lm(tmp_path)


def test_a_mask_that_is_the_end_token_is_refused(tmp_path):
    peer(tmp_path)
    edit_config(tmp_path, mask_token_id=59)
    with pytest.raises(WeightsError, match="MASK. and the end token are both 59"):
        load_lm(tmp_path)


# Whisper by the names of other classes


@pytest.mark.parametrize("name", ["ForConditionalGeneration", "Model", "ForAudioClassification"])
def test_encoders_are_read_by_the_names_of_every_class(tmp_path, name):
    torch.manual_seed(2)
    config = transformers.WhisperConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=40,
        vocab_size=60,
        pad_token_id=0,
        use_weighted_layer_sum=True,
    )
    theirs = getattr(transformers, f"Whisper{name}")(config)
    theirs.save_pretrained(tmp_path / "whole")
    whole = load_whisper(tmp_path / "whole")
    encoder = theirs.get_encoder() if name != "ForAudioClassification" else theirs.encoder
    assert torch.equal(whole.conv1.weight, encoder.conv1.weight)

    # The encoder alone has no prefix at all.
    encoder.save_pretrained(tmp_path / "alone")
    names = load_file(tmp_path / "alone" / "model.safetensors").keys()
    assert "conv1.weight" in names
    alone = dict(load_whisper(tmp_path / "alone").named_parameters())
    assert all(torch.equal(alone[name], p) for name, p in whole.named_parameters())


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
