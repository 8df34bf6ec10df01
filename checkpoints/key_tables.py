"""Names in published checkpoints <-> names in our modules: tables only, one for each format.

In the tables of tensors, `{}` stands for a layer number. An entry names a module, whose tensors keep their last name
(`weight`, `bias`), or it names one tensor. The tables of configs map our fields to those of `config.json`. The tables
`*_FIXED` list what our modules can do where a config offers a choice.
"""

# Whisper. Hugging Face (`openai/whisper-*`) and OpenAI's own `.pt` hold the same tensors under different names.

WHISPER_KEYS = {
    "conv1": "model.encoder.conv1",
    "conv2": "model.encoder.conv2",
    "positions": "model.encoder.embed_positions.weight",
    "blocks.{}.attn_norm": "model.encoder.layers.{}.self_attn_layer_norm",
    "blocks.{}.attn.query": "model.encoder.layers.{}.self_attn.q_proj",
    "blocks.{}.attn.key": "model.encoder.layers.{}.self_attn.k_proj",
    "blocks.{}.attn.value": "model.encoder.layers.{}.self_attn.v_proj",
    "blocks.{}.attn.out": "model.encoder.layers.{}.self_attn.out_proj",
    "blocks.{}.mlp_norm": "model.encoder.layers.{}.final_layer_norm",
    "blocks.{}.mlp_in": "model.encoder.layers.{}.fc1",
    "blocks.{}.mlp_out": "model.encoder.layers.{}.fc2",
    "norm": "model.encoder.layer_norm",
}
WHISPER_DROPPED = ("model.decoder.", "proj_out.")  # DIFFA does not use Whisper's decoder
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
    "blocks.{}.attn_norm": "encoder.blocks.{}.attn_ln",
    "blocks.{}.attn.query": "encoder.blocks.{}.attn.query",
    "blocks.{}.attn.key": "encoder.blocks.{}.attn.key",
    "blocks.{}.attn.value": "encoder.blocks.{}.attn.value",
    "blocks.{}.attn.out": "encoder.blocks.{}.attn.out",
    "blocks.{}.mlp_norm": "encoder.blocks.{}.mlp_ln",
    "blocks.{}.mlp_in": "encoder.blocks.{}.mlp.0",
    "blocks.{}.mlp_out": "encoder.blocks.{}.mlp.2",
    "norm": "encoder.ln_post",
}
OPENAI_DROPPED = ("decoder.",)
OPENAI_CONFIG = {
    "n_mels": "n_mels",
    "width": "n_audio_state",
    "n_layers": "n_audio_layer",
    "n_heads": "n_audio_head",
    "context": "n_audio_ctx",
}  # the width of the feed-forward layer is not stored: it is always four times the width

# Language models: LLaDA and Qwen3 are one architecture to us. They differ in names and in what their configs switch on.

LLADA_KEYS = {
    "embedding": "model.transformer.wte",
    "blocks.{}.attn_norm": "model.transformer.blocks.{}.attn_norm",
    "blocks.{}.attn.query": "model.transformer.blocks.{}.q_proj",
    "blocks.{}.attn.key": "model.transformer.blocks.{}.k_proj",
    "blocks.{}.attn.value": "model.transformer.blocks.{}.v_proj",
    "blocks.{}.attn.out": "model.transformer.blocks.{}.attn_out",
    "blocks.{}.mlp_norm": "model.transformer.blocks.{}.ff_norm",
    "blocks.{}.mlp.gate": "model.transformer.blocks.{}.ff_proj",
    "blocks.{}.mlp.up": "model.transformer.blocks.{}.up_proj",
    "blocks.{}.mlp.down": "model.transformer.blocks.{}.ff_out",
    "norm": "model.transformer.ln_f",
    "unembedding": "model.transformer.ff_out",  # absent where tied
}
LLADA_CONFIG = {
    "width": "d_model",
    "n_layers": "n_layers",
    "n_heads": "n_heads",
    "ffn": "mlp_hidden_size",
    "vocab": "embedding_size",  # rows of the embedding table; the tokenizer may have fewer ids
    "max_length": "max_sequence_length",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "mask_id": "mask_token_id",
    "end_id": "eos_token_id",
    "n_kv_heads": "n_kv_heads",
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
}

QWEN3_KEYS = {
    "embedding": "model.embed_tokens",
    "blocks.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blocks.{}.attn.query": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attn.key": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attn.value": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attn.query_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attn.key_norm": "model.layers.{}.self_attn.k_norm",
    "blocks.{}.attn.out": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.mlp.up": "model.layers.{}.mlp.up_proj",
    "blocks.{}.mlp.down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "unembedding": "lm_head",  # absent where tied
}
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
QWEN3_FIXED = {"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)}

LM_TABLES = {  # by family
    "llada": (LLADA_KEYS, LLADA_CONFIG, LLADA_FIXED),
    "qwen3": (QWEN3_KEYS, QWEN3_CONFIG, QWEN3_FIXED),
}
LM_FAMILIES = {
    "llada": "llada",
    "a2d-qwen3": "qwen3",
    "qwen3": "qwen3",
}  # by model_type; a2d: autoregressive to diffusion

# Adapters: the release of DIFFA, and our own `adapters.safetensors`.

PROMPT_KEYS = {"prompts": "trainable_prompts.weight"}
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
    "blocks.{}.self_attn.query": "acoustic_connector.qformer.layer.{}.attention.self.query",
    "blocks.{}.self_attn.key": "acoustic_connector.qformer.layer.{}.attention.self.key",
    "blocks.{}.self_attn.value": "acoustic_connector.qformer.layer.{}.attention.self.value",
    "blocks.{}.self_attn.out": "acoustic_connector.qformer.layer.{}.attention.output.dense",
    "blocks.{}.self_attn.norm": "acoustic_connector.qformer.layer.{}.attention.output.LayerNorm",
    "blocks.{}.cross_attn.query": "acoustic_connector.qformer.layer.{}.crossattention.self.query",
    "blocks.{}.cross_attn.key": "acoustic_connector.qformer.layer.{}.crossattention.self.key",
    "blocks.{}.cross_attn.value": "acoustic_connector.qformer.layer.{}.crossattention.self.value",
    "blocks.{}.cross_attn.out": "acoustic_connector.qformer.layer.{}.crossattention.output.dense",
    "blocks.{}.cross_attn.norm": "acoustic_connector.qformer.layer.{}.crossattention.output.LayerNorm",
    "blocks.{}.ffn_in": "acoustic_connector.qformer.layer.{}.intermediate.dense",
    "blocks.{}.ffn_out": "acoustic_connector.qformer.layer.{}.output.dense",
    "blocks.{}.norm": "acoustic_connector.qformer.layer.{}.output.LayerNorm",
    "norm": "acoustic_connector.proj.0",
    "proj": "acoustic_connector.proj.1",
}
ADAPTERS_DROPPED = (
    "whisper_model.",
    "llm_model.",
)  # copies of the frozen parts, which have directories of their own
