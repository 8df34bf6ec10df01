"""Loads and saves language models in the formats of their families: see docs/backbones.md.

Two fields of ours in config.json mark what the format does not say. `"causal": true` is the
autoregressive baseline. `"diffusion": true` is a masked-diffusion LM in the format of a causal LM,
made from one by `python -m training.adapt_lm`; its `mask_token_id` is recorded.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from checkpoints.downloads import require
from checkpoints.files import (
    Checkpoint,
    WeightsError,
    read_checkpoint,
    read_config,
    read_json,
    save_tensors,
    write_json,
)
from checkpoints.fill import PLAIN_DTYPES, build, fill, named, read_fields
from checkpoints.key_tables import (
    CAUSAL_TYPES,
    LM_FAMILIES,
    LM_SWITCHES,
    LM_TABLES,
    LM_TYPES,
    fitting_table,
    their_name,
)
from checkpoints.unsupported import refuse_unsupported
from data import TEXT_END
from diffusion_lm import DiffusionLM, LMConfig
from speed.few_rows import use_few_rows
from speed.int8 import use_int8


def read_lm_config(path: str | Path, causal_weights: bool = False) -> LMConfig:
    """Shapes and special ids of a language model directory, without its weights.

    causal_weights: take the weights of a causal LM as well; its mask_id may be -1, unknown.

    Raises WeightsError: as for load_lm.
    """
    path = Path(path)
    require(llm=path)
    source = path / "config.json"
    refuse_unsupported(path)
    raw = read_config(path, tuple(LM_FAMILIES))

    # Its attention would be opened without training.
    if is_causal(raw) and not causal_weights and not raw.get("causal"):
        raise WeightsError(
            f'{source}: model_type {raw["model_type"]!r} is a causal LM, and no "diffusion": true '
            "says that it was adapted; adapt it with python -m training.adapt_lm"
        )

    # What the config implies where it does not state it, and what it never states.
    family = LM_FAMILIES[raw["model_type"]]
    more = LM_SWITCHES[family]
    if family == "llada":
        implied = implied_by_llada(raw)
    else:
        implied = implied_by_llama(raw)
        more = more | special_ids(raw, path, family)

    raw |= {theirs: value for theirs, value in implied.items() if raw.get(theirs) is None}
    raw["rope_theta"] = rope_theta(raw, source)

    _, table, fixed = LM_TABLES[family]
    config = read_fields(LMConfig, raw, table, fixed, source, family=family, **more)
    if config.head_dim % 2:
        problem = f"heads of width {config.head_dim} have no two halves that rotate"
        raise WeightsError(f"{source}: {problem}")
    if config.mask_id == config.end_id != -1:
        raise WeightsError(f"{source}: [MASK] and the end token are both {config.end_id}")
    return config


def implied_by_llada(raw: dict) -> dict:
    """Values of fields that a LLaDA config may leave out."""
    ratio = raw.get("mlp_ratio")
    width = raw.get("d_model")
    return {
        "weight_tying": False,
        "embedding_size": raw.get("vocab_size"),
        "n_kv_heads": 1 if raw.get("multi_query_attention") else raw.get("n_heads"),
        "mlp_hidden_size": ratio * width if type(ratio) is type(width) is int else None,
    }


def implied_by_llama(raw: dict) -> dict:
    """Values of fields that a config of Llama or Qwen3 may leave out, as in transformers."""
    heads = raw.get("num_attention_heads")
    width = raw.get("hidden_size")
    divides = type(heads) is type(width) is int and heads > 0
    return {
        "tie_word_embeddings": False,
        "num_key_value_heads": heads,
        "head_dim": width // heads if divides else None,
    }


def is_causal(raw: dict) -> bool:
    """Whether a config is that of an autoregressive LM: the baseline, or one never adapted."""
    adapted = raw["model_type"] not in CAUSAL_TYPES or raw.get("diffusion") is True
    return bool(raw.get("causal")) or not adapted


def rope_theta(raw: dict, source: Path) -> float | None:
    """The base of the rotary positions, wherever a config states it; None if it does not.

    transformers 5 writes rope_parameters, which wins over rope_theta; rope_scaling wins over both.

    Raises WeightsError: the config stretches its rotary positions, or rotates a part of a head.
    """
    theta = raw.get("rope_theta")
    for name in ("rope_parameters", "rope_scaling"):
        rope = raw.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if type(rope) is dict else None
        if kind != "default" or rope.get("partial_rotary_factor", 1) not in (None, 1):
            problem = f"cannot run its stretched rotary positions ({name}: {str(rope)[:60]})"
            raise WeightsError(f"{source}: {problem}")

        # Bases by layer are dictionaries of their own.
        if nested := [key for key, value in rope.items() if type(value) is dict]:
            raise WeightsError(f"{source}: rotary positions differ by layer ({name}: {nested[0]})")
        if rope.get("rope_theta") is not None:
            theta = rope["rope_theta"]
    return theta


def special_ids(raw: dict, path: Path, family: str) -> dict[str, int]:
    """mask_id and end_id of a directory in any format but LLaDA's; -1 where unknown.

    The config may lack mask_token_id, and its eos (end of turn) is not the token that pads
    answers. Both are looked up by name in tokenizer.json. iLLaDA's eos ends its only turn.
    """
    added = added_ids(path)

    # Candidates, the best first.
    masks = [raw.get("mask_token_id"), added.get("<[MASK]>" if family == "illada" else "<|mask|>")]
    ends = [added.get(name) for name in (TEXT_END, "<|end_of_text|>")]
    ends += [raw.get("pad_token_id"), raw.get("eos_token_id")]
    if family == "illada":
        ends = [raw.get("eos_token_id"), added.get("<[end▁of▁sentence]>")]

    return {
        "end_id": next((i for i in ends if type(i) is int), -1),
        "mask_id": next((i for i in masks if type(i) is int), -1),
    }


def added_ids(path: Path) -> dict[str, int]:
    """Ids by name of tokens added to a tokenizer's vocabulary; empty without `tokenizer.json`."""
    file = path / "tokenizer.json"
    entries = read_json(file).get("added_tokens") if file.is_file() else None
    found = {}
    for entry in entries if isinstance(entries, list) else []:
        entry = entry if isinstance(entry, dict) else {}
        if type(entry.get("id")) is int and isinstance(entry.get("content"), str):
            found[entry["content"]] = entry["id"]
    return found


def load_lm(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    lm_class: type[DiffusionLM] = DiffusionLM,
    note: Callable[[str], None] | None = None,
    causal_weights: bool = False,
    mask_id: int | None = None,
    int8: bool = False,
) -> DiffusionLM:
    """The language model of a directory of the hub, of any family in LM_FAMILIES.

    Args:
        dtype: None keeps the file's; on the CPU the parameters are then the mapped file itself,
            but float16, in which a CPU computes very slowly, becomes float32.
        lm_class: DiffusionLM, or the subclass that is the autoregressive baseline.
        note: as for fill.
        causal_weights: take a causal LM's weights into a DiffusionLM, to adapt it.
        mask_id: the id of [MASK] where the files cannot know it; None: theirs.
        int8: hold the weights of linear layers in 8 bits (speed/int8.py).
    Raises:
        WeightsError: files are missing, damaged, or of another architecture; or the directory holds
            a causal LM and lm_class is not one, or the other way round.
    """
    path = Path(path)
    config = read_lm_config(path, causal_weights or lm_class is not DiffusionLM)
    if mask_id is not None:
        config = replace(config, mask_id=mask_id)
    if not causal_weights:
        check_kind(path, lm_class)

    tensors = read_checkpoint(path)

    # The file's names, with or without the prefix of an outer class.
    table, _, _ = LM_TABLES[config.family]
    table = fitting_table(table, "embedding.weight", ("", "model."), tensors)
    embedding = their_name(table, "embedding.weight")
    unembedding = their_name(table, "unembedding.weight")

    # Some files hold a tied table twice.
    dropped = ()
    if config.tied and unembedding in tensors and embedding in tensors:
        if not torch.equal(tensors[unembedding], tensors[embedding]):
            problem = f"{unembedding} differs from {embedding}, but the config ties them"
            raise WeightsError(f"{tensors.files[unembedding]}: {problem}")
        dropped = (unembedding,)
    dropped += computed_buffers(path, tensors, config)

    # Without a dtype, all parameters take that of the embedding table.
    kept = tensors[embedding].dtype if embedding in tensors else None
    if kept not in PLAIN_DTYPES:
        kept = None  # quantised weights, which `fill` refuses by name
    if kept == torch.float16 and torch.device(device).type == "cpu":
        kept = torch.float32
    lm = build(lambda: lm_class(config), config.n_layers, len(tensors), path)
    if int8:
        use_int8(lm)
    fill(lm, tensors, table, dropped, path, dtype or kept, device, note)
    return use_few_rows(lm).eval()


def computed_buffers(path: Path, tensors: Checkpoint, config: LMConfig) -> tuple[str, ...]:
    """Names of rotary frequencies, which old Llamas hold. WeightsError: not those of the config."""
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    expected = config.rope_theta**-exponents  # (C / 2,)
    names = tuple(name for name in tensors if name.endswith("rotary_emb.inv_freq"))
    for name in names:
        found = tensors[name].float()
        is_same = found.shape == expected.shape
        is_same = is_same and torch.allclose(found, expected, rtol=0.01, atol=1e-6)
        if not is_same:
            problem = f"{name} is not what rope_theta {config.rope_theta:g} of the config gives"
            raise WeightsError(f"{tensors.files[name]}: {problem}")
    return names


def check_kind(path: Path, lm_class: type[DiffusionLM]) -> None:
    """Raise WeightsError when the directory is not of the kind of lm_class: see load_lm."""
    source = path / "config.json"
    causal = is_causal(read_json(source))
    kinds = ["a diffusion LM", "an autoregressive baseline"]
    if causal == (lm_class is DiffusionLM):
        raise WeightsError(
            f"{source}: causal is {str(causal).lower()}, so this is {kinds[causal]}; "
            f"pass {kinds[not causal]} (`python -m lab.baseline` makes baselines)"
        )


def save_lm(lm: DiffusionLM, path: str | Path, n_shards: int = 1, **config_fields) -> None:
    """Write a language model as its family is on the hub: config.json, shards and their index.

    Args:
        config_fields: more fields of config.json; causal=True marks the autoregressive baseline.
    Raises:
        ValueError: the family's format cannot describe this LM.
    """
    path = Path(path)
    config = lm.config
    own_heads = config.qk_norm or config.head_dim * config.n_heads != config.width
    if config.family == "llada" and own_heads:
        raise ValueError("LLaDA's format has no norms on heads, no width of heads: take 'qwen3'")

    # What no config says must be what the family implies.
    for name in ("qk_norm", "qkv_bias", "shifted", "appends"):
        if getattr(config, name) != LM_SWITCHES[config.family].get(name, False):
            raise ValueError(f"the format of {config.family!r} has another {name} than this LM")

    # Shards, each with every n-th tensor, and their index.
    table, config_table, _ = LM_TABLES[config.family]
    tensors = named(lm, table)
    names = sorted(tensors)
    weight_map = {}
    for i in range(n_shards):
        shard = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        save_tensors(path / shard, {name: tensors[name] for name in names[i::n_shards]})
        weight_map |= dict.fromkeys(names[i::n_shards], shard)
    index = {"metadata": {}, "weight_map": weight_map}
    write_json(path / "model.safetensors.index.json", index)

    # The config, with the ids under the names that all families know.
    raw = {theirs: getattr(config, ours) for ours, theirs in config_table.items()}
    if LM_TYPES[config.family] in CAUSAL_TYPES:
        raw["diffusion"] = not config_fields.get("causal", False)
    raw |= {
        "model_type": LM_TYPES[config.family],
        "vocab_size": config.vocab,
        "mask_token_id": config.mask_id,
        "eos_token_id": config.end_id,
        "pad_token_id": config.end_id,
    }
    write_json(path / "config.json", raw | config_fields)
