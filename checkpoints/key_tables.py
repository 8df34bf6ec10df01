"""Names in published checkpoints <-> names in our modules: one table per format, and how a module is filled by it.

In the tables of tensors "{}" stands for a layer number, and an entry may name a module, whose tensors keep their last
name, or one tensor. The tables of configs map our fields to those of `config.json`.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from checkpoints.files import WeightsError

PAGE = 4096  # bytes of memory that are mapped together
TYPES = {"rope_theta": (int, float), "norm_eps": (int, float), "tied": (bool,)}  # of config fields that are not whole numbers

# Whisper. Hugging Face (`openai/whisper-*`) and OpenAI's own `.pt` hold the same tensors under other names.

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
WHISPER_DROPPED = ("model.decoder.", "proj_out.")  # DIFFA reads no word from Whisper's own decoder
WHISPER_CONFIG = {
    "n_mels": "num_mel_bins",
    "width": "d_model",
    "n_layers": "encoder_layers",
    "n_heads": "encoder_attention_heads",
    "ffn": "encoder_ffn_dim",
    "context": "max_source_positions",
}
WHISPER_FIXED = {"activation_function": ("gelu",)}  # what our module cannot do otherwise, where a config speaks of it

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
}  # its feed-forward width is not told: always four times the width

# Language models. Our DiffusionLM is one; LLaDA and Qwen3 differ in names and in what their configs switch on.

LLADA_KEYS = {
    "embedding": "model.transformer.wte",
    "blocks.{}.attn_norm": "model.transformer.blocks.{}.attn_norm",
    "blocks.{}.query": "model.transformer.blocks.{}.q_proj",
    "blocks.{}.key": "model.transformer.blocks.{}.k_proj",
    "blocks.{}.value": "model.transformer.blocks.{}.v_proj",
    "blocks.{}.out": "model.transformer.blocks.{}.attn_out",
    "blocks.{}.ffn_norm": "model.transformer.blocks.{}.ff_norm",
    "blocks.{}.gate": "model.transformer.blocks.{}.ff_proj",
    "blocks.{}.up": "model.transformer.blocks.{}.up_proj",
    "blocks.{}.down": "model.transformer.blocks.{}.ff_out",
    "norm": "model.transformer.ln_f",
    "unembedding": "model.transformer.ff_out",  # absent where tied
}
LLADA_CONFIG = {
    "width": "d_model",
    "n_layers": "n_layers",
    "n_heads": "n_heads",
    "ffn": "mlp_hidden_size",
    "vocab": "embedding_size",  # rows of the table; the tokenizer may know fewer ids
    "max_length": "max_sequence_length",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "mask_id": "mask_token_id",
    "end_id": "eos_token_id",
    "n_kv_heads": "n_kv_heads",
    "tied": "weight_tying",
}
LLADA_FIXED = {
    "block_type": ("llama",), "activation_type": ("silu",), "layer_norm_type": ("rms",), "rope": (True,), "alibi": (False,),
    "attention_layer_norm": (False,), "input_emb_norm": (False,), "scale_logits": (False,),
    "include_bias": (False,), "include_qkv_bias": (False,),
}  # fmt: skip

QWEN3_KEYS = {
    "embedding": "model.embed_tokens",
    "blocks.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blocks.{}.query": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.key": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.value": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.query_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.key_norm": "model.layers.{}.self_attn.k_norm",
    "blocks.{}.out": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.up": "model.layers.{}.mlp.up_proj",
    "blocks.{}.down": "model.layers.{}.mlp.down_proj",
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

LM_TABLES = {"llada": (LLADA_KEYS, LLADA_CONFIG, LLADA_FIXED), "qwen3": (QWEN3_KEYS, QWEN3_CONFIG, QWEN3_FIXED)}  # by family
LM_FAMILIES = {"llada": "llada", "a2d-qwen3": "qwen3", "qwen3": "qwen3"}  # by the config's model_type; "a2d": autoregressive to diffusion

# The release of DIFFA, and our own `adapters.safetensors`.

PROMPT_KEYS = {"prompts": "trainable_prompts.weight"}
SEMANTIC_KEYS = {
    "conv1": "semantic_connector.conv.0",
    "conv2": "semantic_connector.conv.2",
    "linear1": "semantic_connector.linear_connector.0",
    "linear2": "semantic_connector.linear_connector.2",
    "norm": "semantic_connector.layernorm",
}
_QFORMER = "acoustic_connector.qformer.layer.{}"
ACOUSTIC_KEYS = {
    "queries.{}": "acoustic_connector.layer_prompts.{}",
    "layer_weights": "acoustic_connector.layer_weights",
    "blocks.{}.ffn_in": f"{_QFORMER}.intermediate.dense",
    "blocks.{}.ffn_out": f"{_QFORMER}.output.dense",
    "blocks.{}.norm": f"{_QFORMER}.output.LayerNorm",
    "norm": "acoustic_connector.proj.0",
    "proj": "acoustic_connector.proj.1",
}
for _ours, _theirs in {"self_attn": "attention", "cross_attn": "crossattention"}.items():
    for _part in ("query", "key", "value"):
        ACOUSTIC_KEYS[f"blocks.{{}}.{_ours}.{_part}"] = f"{_QFORMER}.{_theirs}.self.{_part}"
    ACOUSTIC_KEYS[f"blocks.{{}}.{_ours}.out"] = f"{_QFORMER}.{_theirs}.output.dense"
    ACOUSTIC_KEYS[f"blocks.{{}}.{_ours}.norm"] = f"{_QFORMER}.{_theirs}.output.LayerNorm"
ADAPTERS_DROPPED = ("whisper_model.", "llm_model.")  # copies of the frozen parts, loaded from their own directories


def their_name(table: dict[str, str], ours: str) -> str:
    """The name in the file of our tensor `ours`, by a key table."""
    numbers = re.findall(r"\.(\d+)(?=\.|$)", ours)
    template = re.sub(r"\.\d+(?=\.|$)", ".{}", ours)
    if template in table:
        return table[template].format(*numbers)
    module, _, leaf = template.rpartition(".")
    return f"{table[module].format(*numbers)}.{leaf}"


class Unfilled(TorchFunctionMode):
    """`with torch.device("meta"), Unfilled():` builds a module's shapes alone: no memory, and no first weights drawn in vain.

    Drawing them, even on the meta device, makes PyTorch import two seconds' worth of modules.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):  # of tensors and of torch.nn.init
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


def assign(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Make the tensors the module's parameters, without a copy; a parameter that two parts share stays shared."""
    new: dict[int, nn.Parameter] = {}
    for name, old in list(module.named_parameters(remove_duplicate=False)):
        if id(old) not in new:
            new[id(old)] = nn.Parameter(tensors[name], requires_grad=old.requires_grad)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, new[id(old)])


def fill(
    module: nn.Module,
    tensors: dict[str, Tensor],
    table: dict[str, str],
    dropped: tuple[str, ...],
    source: Path,
    files: dict[str, Path] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Give every parameter of `module` its tensor, and every tensor its parameter.

    Args:
        tensors: by their names, in the order of the files; taken out one after the other, so that a shard whose tensors
            were all moved is let go. dropped: prefixes of names to leave out.
        source, files: what errors name: the file of each tensor in `files`, else source.
        dtype: of the parameters; None keeps the file's.
    Raises:
        WeightsError: lists all missing, extra and mis-shaped tensors with both shapes and the file.
    """
    shapes = {their_name(table, ours): tuple(parameter.shape) for ours, parameter in module.named_parameters()}
    wanted = {their_name(table, ours): ours for ours, _ in module.named_parameters()}  # one name where two parts share
    for name in [name for name in tensors if name.startswith(dropped)]:
        del tensors[name]
    where = {name: (files or {}).get(name, Path(source)).name for name in tensors}
    problems = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in tensors]
    problems += [f"extra {name} {tuple(t.shape)} in {where[name]}" for name, t in tensors.items() if name not in wanted]
    for name, shape in shapes.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            problems.append(f"{name} is {tuple(tensors[name].shape)} in the file, {shape} by the config ({where[name]})")
        elif name in tensors and not tensors[name].is_floating_point():
            problems.append(f"{name} is {tensors[name].dtype}: quantised weights are not read ({where[name]})")
    if problems:
        shown = "\n  ".join(problems[:10]) + (f"\n  and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise WeightsError(f"{source}: tensors do not fit\n  {shown}")
    placed = {}
    total = sum(t.nbytes for t in tensors.values())
    with tqdm(total=total, desc=f"loading {Path(source).name}", unit="B", unit_scale=True, delay=1, leave=False) as bar:
        for name in list(tensors):
            tensor = tensors.pop(name)
            bar.update(tensor.nbytes)
            try:
                tensor = tensor.to(device=device, dtype=dtype or tensor.dtype).contiguous()  # no copy where nothing changes
            except RuntimeError as error:  # torch.OutOfMemoryError, and what the CPU's allocator raises
                told = f"after {bar.n / 1e9:.1f} of {total / 1e9:.1f} GB on {device}: {str(error).partition(chr(10))[0]}"
                raise WeightsError(f"{source}: {told}; take a smaller model, --dtype bfloat16, or --device cpu") from error
            if tensor.is_cpu and tensor.numel():
                tensor.flatten().view(torch.uint8)[::PAGE].amax()  # mapped pages are read now, under the bar, not in the first pass
            placed[wanted[name]] = tensor
    assign(module, placed)


def named(module: nn.Module, table: dict[str, str]) -> dict[str, Tensor]:
    """The module's tensors under their names in the file, ready to be saved; a shared one once."""
    return {their_name(table, ours): p.detach().cpu().contiguous() for ours, p in module.named_parameters()}


def our_fields(raw: dict, table: dict[str, str], fixed: dict[str, tuple], source: Path) -> dict:
    """Our config fields from a file's; WeightsError where it lacks one, or asks for what our modules do not do."""
    absent = [theirs for theirs in table.values() if raw.get(theirs) is None]
    if absent:
        raise WeightsError(f"{source}: lacks {', '.join(absent)}")
    odd = [
        f"{theirs} is {raw[theirs]!r}"
        for ours, theirs in table.items()
        if type(raw[theirs]) not in TYPES.get(ours, (int,)) or (raw[theirs] < 0 and not ours.endswith("_id"))
    ]
    odd += [f"{theirs} is {raw[theirs]!r}" for theirs, can in fixed.items() if raw.get(theirs) is not None and raw[theirs] not in can]
    if odd:
        raise WeightsError(f"{source}: {', '.join(odd)}, which this code cannot run")
    return {ours: raw[theirs] for ours, theirs in table.items()}
