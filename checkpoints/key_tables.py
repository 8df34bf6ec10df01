"""Names in published checkpoints <-> names in our modules: one table for each format.

A table of tensors maps a module of ours to a module in the file (their tensors keep the last name,
`weight` or `bias`), or one tensor to another; "{}" stands for a number. A table of a config maps
our fields to those of `config.json`. `*_FIXED` lists the values of other fields that we support.
"""

import re
from collections.abc import Collection


def their_name(table: dict[str, str], ours: str) -> str:
    """The name in the file of our tensor `ours`, by a key table."""
    numbers = re.findall(r"\.(\d+)(?=\.|$)", ours)
    template = re.sub(r"\.\d+(?=\.|$)", ".{}", ours)
    if template in table:
        return table[template].format(*numbers)
    module, _, leaf = template.rpartition(".")
    return f"{table[module].format(*numbers)}.{leaf}"


def fitting_table(
    table: dict[str, str], ours: str, prefixes: tuple[str, ...], tensors: Collection[str]
) -> dict[str, str]:
    """The key table without the first prefix under whose names the file holds our tensor `ours`.

    Classes of transformers save the same tensors under `model.encoder.`, `encoder.` or no prefix.
    """
    for prefix in prefixes:
        shorter = {name: theirs.removeprefix(prefix) for name, theirs in table.items()}
        if their_name(shorter, ours) in tensors:
            return shorter
    return table


def blocks(theirs: str, names: dict[str, str]) -> dict[str, str]:
    """The part of a table under `blocks.{}.`, whose names in the file start with `theirs`."""
    return {f"blocks.{{}}.{ours}": f"{theirs}.{name}" for ours, name in names.items()}


# Whisper. The hub (`openai/whisper-*`) and OpenAI's `.pt` hold the same tensors. What DIFFA does
# not use is dropped: the decoder, and the head of a classifier.

WHISPER_KEYS = {
    "conv1": "model.encoder.conv1",
    "conv2": "model.encoder.conv2",
    "positions": "model.encoder.embed_positions.weight",
    "norm": "model.encoder.layer_norm",
} | blocks(
    "model.encoder.layers.{}",
    {
        "attn_norm": "self_attn_layer_norm",
        "attn.query": "self_attn.q_proj",
        "attn.key": "self_attn.k_proj",
        "attn.value": "self_attn.v_proj",
        "attn.out": "self_attn.out_proj",
        "mlp_norm": "final_layer_norm",
        "mlp_in": "fc1",
        "mlp_out": "fc2",
    },
)
WHISPER_DROPPED = (
    "model.decoder.",
    "decoder.",
    "proj_out.",
    "projector.",
    "classifier.",
    "layer_weights",
)
WHISPER_CONFIG = {
    "n_mels": "num_mel_bins",
    "width": "d_model",
    "n_layers": "encoder_layers",
    "n_heads": "encoder_attention_heads",
    "ffn": "encoder_ffn_dim",
    "context": "max_source_positions",
}
WHISPER_FIXED = {"activation_function": ("gelu",)}

OPENAI_KEYS = {
    "conv1": "encoder.conv1",
    "conv2": "encoder.conv2",
    "positions": "encoder.positional_embedding",
    "norm": "encoder.ln_post",
} | blocks(
    "encoder.blocks.{}",
    {
        "attn_norm": "attn_ln",
        "attn.query": "attn.query",
        "attn.key": "attn.key",
        "attn.value": "attn.value",
        "attn.out": "attn.out",
        "mlp_norm": "mlp_ln",
        "mlp_in": "mlp.0",
        "mlp_out": "mlp.2",
    },
)
OPENAI_DROPPED = ("decoder.",)
OPENAI_CONFIG = {
    "n_mels": "n_mels",
    "width": "n_audio_state",
    "n_layers": "n_audio_layer",
    "n_heads": "n_audio_head",
    "ffn": "ffn",
    "context": "n_audio_ctx",
}

# Language models. All are one architecture with different names and switches. A tied unembedding is
# absent from the file.

LLADA_KEYS = {
    "embedding": "model.transformer.wte",
    "norm": "model.transformer.ln_f",
    "unembedding": "model.transformer.ff_out",
} | blocks(
    "model.transformer.blocks.{}",
    {
        "attn_norm": "attn_norm",
        "attn.query": "q_proj",
        "attn.key": "k_proj",
        "attn.value": "v_proj",
        "attn.out": "attn_out",
        "mlp_norm": "ff_norm",
        "mlp.gate": "ff_proj",
        "mlp.up": "up_proj",
        "mlp.down": "ff_out",
    },
)
# embedding_size counts the rows of the embedding table; the tokenizer may have fewer ids.
LLADA_CONFIG = {
    "width": "d_model",
    "n_layers": "n_layers",
    "n_heads": "n_heads",
    "n_kv_heads": "n_kv_heads",
    "ffn": "mlp_hidden_size",
    "vocab": "embedding_size",
    "max_length": "max_sequence_length",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "mask_id": "mask_token_id",
    "end_id": "eos_token_id",
    "tied": "weight_tying",
}
LLADA_FIXED = {
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "bias_for_layer_norm": (False,),
    "block_group_size": (1,),
    "embedding_layer_norm": (False,),
    "layer_norm_with_affine": (True,),
    "norm_after": (False,),
    "rope_full_precision": (True,),
}

QWEN3_KEYS = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "unembedding": "lm_head",
} | blocks(
    "model.layers.{}",
    {
        "attn_norm": "input_layernorm",
        "attn.query": "self_attn.q_proj",
        "attn.key": "self_attn.k_proj",
        "attn.value": "self_attn.v_proj",
        "attn.query_norm": "self_attn.q_norm",
        "attn.key_norm": "self_attn.k_norm",
        "attn.out": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    },
)
QWEN3_CONFIG = {
    "width": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "max_length": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
# Qwen3's names are also those of Llama, Qwen2, Dream and iLLaDA, which have no norms on heads.
QWEN3_FIXED = {"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)}
QWEN2_FIXED = {"hidden_act": ("silu",), "mlp_bias": (False,), "use_sliding_window": (False,)}
LLAMA_FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_interleaved": (False,),
    "sliding_window": (),
    "layer_norm_eps": (),
}

# Fields of any family that would change what is computed.
ANY_FIXED = {
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "final_logit_softcapping": (),
    "no_rope_layers": (),
    "partial_rotary_factor": (1,),
    "quantization": (),
    "quantization_config": (),
    "use_mrope": (False,),
}

# Families by model_type ("a2d": autoregressive to diffusion), and the tables of each family.
LM_FAMILIES = {
    "llada": "llada",
    "illada": "illada",
    "Dream": "dream",
    "a2d-qwen2": "qwen2",
    "a2d-qwen3": "qwen3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "llama": "llama",
}
LM_TABLES = {
    "llada": (LLADA_KEYS, LLADA_CONFIG, LLADA_FIXED | ANY_FIXED),
    "illada": (QWEN3_KEYS, QWEN3_CONFIG, LLAMA_FIXED | ANY_FIXED),
    "dream": (QWEN3_KEYS, QWEN3_CONFIG, QWEN2_FIXED | ANY_FIXED),
    "qwen2": (QWEN3_KEYS, QWEN3_CONFIG, QWEN2_FIXED | ANY_FIXED),
    "qwen3": (QWEN3_KEYS, QWEN3_CONFIG, QWEN3_FIXED | ANY_FIXED),
    "llama": (QWEN3_KEYS, QWEN3_CONFIG, LLAMA_FIXED | ANY_FIXED),
}
# What no config says: fields of ours by family.
LM_SWITCHES = {
    "llada": {},
    "illada": {"appends": True},
    "dream": {"qkv_bias": True, "shifted": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "llama": {},
}
# The model_type that each family is saved with: the first one.
LM_TYPES = {family: name for name, family in reversed(LM_FAMILIES.items())}
# These are causal LMs, unless their config says `"diffusion": true`: then they were adapted.
CAUSAL_TYPES = ("qwen2", "qwen3", "llama")

# Adapters: the release of DIFFA, and our own `adapters.safetensors`. A file may also hold copies of
# the frozen parts (copies.py) and LoRA (lora.py).

SEMANTIC_KEYS = {
    "conv1": "semantic_connector.conv.0",
    "conv2": "semantic_connector.conv.2",
    "linear1": "semantic_connector.linear_connector.0",
    "linear2": "semantic_connector.linear_connector.2",
    "norm": "semantic_connector.layernorm",
}
ACOUSTIC_KEYS = {
    "queries.{}": "acoustic_connector.layer_prompts.{}",
    "layer_weights": "acoustic_connector.layer_weights",
    "norm": "acoustic_connector.proj.0",
    "proj": "acoustic_connector.proj.1",
} | blocks(
    "acoustic_connector.qformer.layer.{}",
    {
        "self_attn.query": "attention.self.query",
        "self_attn.key": "attention.self.key",
        "self_attn.value": "attention.self.value",
        "self_attn.out": "attention.output.dense",
        "self_attn.norm": "attention.output.LayerNorm",
        "cross_attn.query": "crossattention.self.query",
        "cross_attn.key": "crossattention.self.key",
        "cross_attn.value": "crossattention.self.value",
        "cross_attn.out": "crossattention.output.dense",
        "cross_attn.norm": "crossattention.output.LayerNorm",
        "ffn_in": "intermediate.dense",
        "ffn_out": "output.dense",
        "norm": "output.LayerNorm",
    },
)
ADAPTER_KEYS = {"prompts": "trainable_prompts.weight"}
ADAPTER_KEYS |= {f"semantic.{ours}": theirs for ours, theirs in SEMANTIC_KEYS.items()}
ADAPTER_KEYS |= {f"acoustic.{ours}": theirs for ours, theirs in ACOUSTIC_KEYS.items()}
