"""Loads and saves the four pieces of a DIFFA in the very formats of the Hugging Face hub, and builds them at random.

A loader uses every tensor of a checkpoint exactly once (by the tables in `checkpoints/key_tables.py`), or drops it on purpose by a
listed prefix, or stops with the tensor, both shapes and the file. Models are built on the meta device, where they take no
memory, and each tensor is then assigned: mapped from the file, or moved straight to the device, one at a time.

Trained adapters stay float32; the frozen parts may have any dtype that their device can run.
"""

from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters import TAPS, AcousticAdapter, AdapterConfig, SemanticAdapter
from checkpoints.files import (
    WeightsError, named_tensors, read_checkpoint, read_json, read_shards, read_tensors, require, save_tensors, unpickle, write_json,
)  # fmt: skip
from diffusion_lm import SIZES as LM_SIZES
from diffusion_lm import DiffusionLM, LMConfig
from encoder import EncoderConfig, WhisperEncoder, sinusoids
from encoder import SIZES as ENCODER_SIZES
from checkpoints.key_tables import (
    ACOUSTIC_KEYS, ADAPTERS_DROPPED, LM_FAMILIES, LM_TABLES, OPENAI_CONFIG, OPENAI_DROPPED, OPENAI_KEYS, PROMPT_KEYS, SEMANTIC_KEYS,
    WHISPER_CONFIG, WHISPER_DROPPED, WHISPER_FIXED, WHISPER_KEYS, Unfilled, assign, fill, named, our_fields, their_name,
)  # fmt: skip


def check_device(device: str | torch.device, dtype: torch.dtype) -> None:
    """WeightsError when there is no such device, or it cannot run `dtype`: tried out, not looked up in a list."""
    name = str(dtype).removeprefix("torch.")
    try:
        torch.ones(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter is what a torch that was built without CUDA raises
        raise WeightsError(f"--device {device}: cannot be used here ({first_line(error)}); try --device cpu") from error
    other = "float16, or float32 where memory allows" if dtype == torch.bfloat16 else "float32"
    advice = f"pass --dtype {other}"
    try:
        x = torch.ones(1, 1, 2, 2, device=device, dtype=dtype)
        F.linear(F.scaled_dot_product_attention(x, x, x), x[0, 0])
    except torch.OutOfMemoryError as error:  # says nothing of the dtype
        raise WeightsError(f"--device {device}: its memory is full already ({first_line(error)})") from error
    except (RuntimeError, TypeError) as error:
        raise WeightsError(f"--device {device} cannot run {name}; {advice} ({first_line(error)})") from error
    if torch.device(device).type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise WeightsError(f"--device {device} cannot run {name}; {advice} (it would be emulated)")


def first_line(error: Exception) -> str:
    """Of an error's message, or its type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_config(path: Path, model_types: tuple[str, ...]) -> dict:
    """The `config.json` of a directory, its model_type one of those that are expected."""
    raw = read_json(path / "config.json")
    if raw.get("model_type") not in model_types:
        expected = " or ".join(repr(name) for name in model_types)
        raise WeightsError(
            f"{path / 'config.json'}: model_type is {raw.get('model_type')!r}, expected {expected}; are --whisper and --llm swapped?"
        )
    return raw


def configure(config_class: type, values: dict, source: Path):
    """config_class(**values); what it refuses is said of the file."""
    try:
        return config_class(**values)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise WeightsError(f"{source}: {error}") from error


# Encoder


def load_whisper(
    path: str | Path, dtype: torch.dtype | None = torch.float32, device: str = "cpu", audio_context: float | None = None
) -> WhisperEncoder:
    """The encoder of a Whisper, its decoder dropped: a Hugging Face directory (`openai/whisper-*`) or OpenAI's `.pt`.

    audio_context: seconds of the window, at most the file's (30 s); the positions past it are cut off.
    """
    path = Path(path)
    require(whisper=path)
    if path.is_dir():
        values = our_fields(read_config(path, ("whisper",)), WHISPER_CONFIG, WHISPER_FIXED, path / "config.json")
        table, dropped, (tensors, files) = WHISPER_KEYS, WHISPER_DROPPED, read_checkpoint(path)
    else:
        if path.suffix != ".pt":
            raise WeightsError(f"--whisper {path}: pass the directory that holds it and its config.json, or OpenAI's own .pt file")
        whole = unpickle(path)
        if not isinstance(whole, dict) or not isinstance(whole.get("dims"), dict) or "model_state_dict" not in whole:
            raise WeightsError(f"{path}: not one of OpenAI's Whisper files, which hold dims and model_state_dict")
        values = our_fields(whole["dims"], OPENAI_CONFIG, {}, path)
        values["ffn"] = 4 * values["width"]
        table, dropped, tensors, files = OPENAI_KEYS, OPENAI_DROPPED, named_tensors(whole["model_state_dict"], path), None
        del whole
    config = configure(EncoderConfig, values, path)
    check_device(device, dtype or torch.float32)
    with torch.device("meta"), Unfilled():
        model = WhisperEncoder(config)
    fill(model, tensors, table, dropped, path, files, dtype, device)
    return (model if audio_context is None else model.shorten(audio_context)).eval()


def save_whisper(model: WhisperEncoder, path: str | Path) -> None:
    """Write an encoder as `openai/whisper-*` lies on the hub (encoder only)."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_tensors(path / "model.safetensors", named(model, WHISPER_KEYS))
    raw = {theirs: getattr(model.config, ours) for ours, theirs in WHISPER_CONFIG.items()}
    write_json(path / "config.json", {"model_type": "whisper", "activation_function": "gelu"} | raw)


# Language model


def read_lm_config(path: str | Path) -> LMConfig:
    """Shapes and special ids of a language model directory, LLaDA's or Qwen3's, without its weights."""
    path = Path(path)
    require(llm=path)
    source, raw = path / "config.json", read_config(path, tuple(LM_FAMILIES))
    family = LM_FAMILIES[raw["model_type"]]
    _, table, fixed = LM_TABLES[family]
    if family == "llada":
        implied = {"weight_tying": False, "embedding_size": raw.get("vocab_size")}
        implied["n_kv_heads"] = 1 if raw.get("multi_query_attention") else raw.get("n_heads")
        if isinstance(raw.get("mlp_ratio"), int) and isinstance(raw.get("d_model"), int):
            implied["mlp_hidden_size"] = raw["mlp_ratio"] * raw["d_model"]
        ours = {}
    else:
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5 writes the first, older ones the second
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise WeightsError(f"{source}: stretches its rotary positions ({rope}), which this code cannot run")
        implied = {"rope_theta": rope.get("rope_theta"), "tie_word_embeddings": False}
        # Its config need not tell [MASK], and its end of turn is not what pads an answer: both by name (-1: not known here).
        added = added_ids(path)
        ends = [i for i in (added.get("<|endoftext|>"), raw.get("pad_token_id"), raw.get("eos_token_id")) if isinstance(i, int)]
        mask = raw.get("mask_token_id")
        ours = {"qk_norm": True, "end_id": (ends + [-1])[0], "mask_id": mask if type(mask) is int else added.get("<|mask|>", -1)}
    raw |= {theirs: value for theirs, value in implied.items() if raw.get(theirs) is None}
    ours |= our_fields(raw, table, fixed, source) | {"family": family, "causal": raw.get("causal", False)}
    return configure(LMConfig, ours, source)


def added_ids(path: Path) -> dict[str, int]:
    """Ids of the tokens that were added to a tokenizer's vocabulary, by name; empty when there is no `tokenizer.json`."""
    if not (path / "tokenizer.json").is_file():
        return {}
    entries = read_json(path / "tokenizer.json").get("added_tokens")
    entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return {entry["content"]: entry["id"] for entry in entries if type(entry.get("id")) is int and "content" in entry}


def load_lm(path: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> DiffusionLM:
    """The language model of a LLaDA or Qwen3 directory (`GSAI-ML/LLaDA-*`, `dllm-hub/Qwen3-0.6B-diffusion-*`).

    dtype: None keeps the file's, so that on the CPU the parameters are the mapped file itself.
    """
    path = Path(path)
    config = read_lm_config(path)
    table = LM_TABLES[config.family][0]
    tensors, files = read_checkpoint(path)
    embedding, unembedding = (their_name(table, f"{part}.weight") for part in ("embedding", "unembedding"))
    if config.tied and unembedding in tensors and embedding in tensors:  # some files hold the shared table twice
        if not torch.equal(tensors.pop(unembedding), tensors[embedding]):
            raise WeightsError(f"{files[unembedding]}: {unembedding} differs from {embedding}, which the config says are one")
    if dtype is None and embedding in tensors:
        dtype = tensors[embedding].dtype
    check_device(device, dtype or torch.float32)
    with torch.device("meta"), Unfilled():
        model = DiffusionLM(config)
    fill(model, tensors, table, (), path, files, dtype, device)
    return model.eval()


def save_lm(model: DiffusionLM, path: str | Path, n_shards: int = 1) -> None:
    """Write a language model as its family lies on the hub: config, shards and their index. A causal one says so."""
    path, config = Path(path), model.config
    plain = LMConfig(**{**asdict(config), "head_dim": None, "qk_norm": False}) if config.width % config.n_heads == 0 else None
    if config.family == "llada" and plain != config:
        raise ValueError("LLaDA's format has no norms on heads and no head width of its own; save it with family='qwen3'")
    path.mkdir(parents=True, exist_ok=True)
    table, config_table, _ = LM_TABLES[config.family]
    tensors = named(model, table)
    names = sorted(tensors)
    weight_map = {}
    for i in range(n_shards):
        shard = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        save_tensors(path / shard, {name: tensors[name] for name in names[i::n_shards]})
        weight_map.update(dict.fromkeys(names[i::n_shards], shard))
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    raw = {theirs: getattr(config, ours) for ours, theirs in config_table.items()}
    raw |= {"model_type": "llada" if config.family == "llada" else "a2d-qwen3", "vocab_size": config.vocab}
    raw |= {"mask_token_id": config.mask_id, "eos_token_id": config.end_id, "pad_token_id": config.end_id}
    write_json(path / "config.json", raw | ({"causal": True} if config.causal else {}))  # a field of ours; absent: both directions


load_llada, save_llada = load_lm, save_lm  # the names under which LLaDA is asked for


# Adapters

ADAPTER_FILES = ("adapters.safetensors", "pytorch_model.bin", "model.safetensors", "pytorch_model.bin.index.json", "model.safetensors.index.json")


def find_adapters(path: Path) -> Path:
    """The one file of an adapters' path, or the index of its shards; WeightsError names the choice where a directory holds several."""
    require(adapters=path)
    if not path.is_dir():
        return path
    for name in ADAPTER_FILES:
        if (path / name).is_file():
            return path / name
    below = sorted(file for name in ADAPTER_FILES for file in path.glob(f"**/{name}"))
    if len(below) > 1:
        raise WeightsError(f"--adapters {path}: holds several things; pass one of {', '.join(str(file) for file in below[:10])}")
    if not below:
        raise WeightsError(f"{path}: holds neither adapters.safetensors nor pytorch_model.bin; is the download or training complete?")
    return below[0]


def adapter_shapes(tensors: dict[str, Tensor], info: dict, n_heads: int, taps: tuple[int, ...] | None, n_layers: int) -> dict:
    """AdapterConfig's fields, read off the tensors and, for one of our directories, its config.json."""
    known = {f.name for f in fields(AdapterConfig)}
    shapes = {k: tuple(v) if k == "taps" else v for k, v in info.get("adapters", {}).items() if k in known}
    shapes["encoder_width"] = tensors["semantic_connector.conv.0.weight"].shape[0]
    shapes["lm_width"] = tensors["semantic_connector.linear_connector.2.weight"].shape[0]
    shapes.setdefault("n_heads", n_heads)
    if "trainable_prompts.weight" in tensors:
        shapes["n_prompts"] = tensors["trainable_prompts.weight"].shape[0]
    if not info:  # a release: all that is known stands in its tensors
        taps = taps or TAPS.get(n_layers, ())
        if "acoustic_connector.layer_weights" in tensors:
            n_queries, n_taps = tensors["acoustic_connector.layer_weights"].shape
            layers = [int(k.split(".")[3]) for k in tensors if k.startswith("acoustic_connector.qformer.layer.")]
            if len(taps) != n_taps:
                tapped = f"of {n_layers} encoder layers {len(taps)} are tapped"
                raise ValueError(f"taps {n_taps} hidden states, and {tapped}; pass taps=, or another Whisper")
            inner = tensors.get("acoustic_connector.qformer.layer.0.intermediate.dense.weight")
            shapes |= {} if inner is None else {"ffn": inner.shape[0]}
            shapes |= {"n_queries": n_queries, "qformer_layers": max(layers, default=-1) + 1}
    return shapes | ({"taps": tuple(taps)} if taps else {})


def load_adapters(
    path: str | Path, n_heads: int, n_layers: int = 12, taps: tuple[int, ...] | None = None
) -> tuple[AdapterConfig, dict[str, nn.Module | Tensor], dict]:
    """Trained adapters: one of our directories, or the release's `pytorch_model.bin` (or a directory that holds it).

    Args:
        n_heads: of the Q-Former, which no tensor tells: the release takes the encoder's number.
        n_layers: of the encoder, which tells the tapped layers of a release, by TAPS.
        taps: these are tapped instead.
    Returns:
        config (shapes read off the tensors), parts among "prompts", "semantic" and "acoustic" (a part may be absent
        whole, never in pieces), and the directory's config.json ({} for the release).
    """
    file = find_adapters(Path(path))
    info = read_json(file.parent / "config.json") if file.name == "adapters.safetensors" else {}
    tensors = read_shards(file)[0] if file.suffix == ".json" else read_tensors(file)
    tensors = {k: v for k, v in tensors.items() if not k.startswith(ADAPTERS_DROPPED)}
    for needed in ("semantic_connector.conv.0.weight", "semantic_connector.linear_connector.2.weight"):
        if needed not in tensors:
            raise WeightsError(f"{file}: missing {needed}; is this a DIFFA adapter file?")
    try:
        config = AdapterConfig(**adapter_shapes(tensors, info, n_heads, taps, n_layers))
    except (ValueError, TypeError, IndexError, AttributeError, ArithmeticError) as error:  # of tensors or fields that no adapter has
        raise WeightsError(f"{file}: not the shapes of adapters ({error})") from error
    parts: dict[str, nn.Module | Tensor] = {}
    with torch.device("meta"), Unfilled():
        prompts = nn.ParameterDict({"prompts": nn.Parameter(torch.empty(config.n_prompts, config.lm_width))})
        modules = {
            "prompts": (prompts, PROMPT_KEYS, "trainable_prompts."),
            "semantic": (SemanticAdapter(config), SEMANTIC_KEYS, "semantic_connector."),
            "acoustic": (AcousticAdapter(config), ACOUSTIC_KEYS, "acoustic_connector."),
        }
    for name, (module, table, prefix) in modules.items():
        mine = {k: tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}
        if mine:
            fill(module, mine, table, (), file, dtype=torch.float32)
            parts[name] = module["prompts"] if name == "prompts" else module
    if tensors:
        raise WeightsError(f"{file}: extra tensors {', '.join(sorted(tensors)[:5])}")
    return config, parts, info


def save_adapters(path: str | Path, config: AdapterConfig, parts: dict[str, nn.Module | Tensor], info: dict) -> None:
    """Write a trained DIFFA: `adapters.safetensors` (the release's names) and `config.json`."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    if "prompts" in parts:
        tensors["trainable_prompts.weight"] = parts["prompts"].detach().cpu().contiguous()
    for name, table in (("semantic", SEMANTIC_KEYS), ("acoustic", ACOUSTIC_KEYS)):
        if name in parts:
            tensors |= named(parts[name], table)
    save_tensors(path / "adapters.safetensors", tensors)
    write_json(path / "config.json", info | {"adapters": asdict(config)})


# Random weights of full shapes, for trying speed and memory without a download


@torch.no_grad()
def randomize(model: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """A model from the meta device with weights: matrices N(0, 0.02), norms 1, biases 0."""
    check_device(device, dtype)
    new = {}
    for name, parameter in model.named_parameters():
        new[name] = torch.empty(parameter.shape, dtype=dtype, device=device)
        new[name].normal_(std=0.02) if parameter.ndim > 1 else new[name].fill_(float(name.endswith("weight")))
    assign(model, new)
    return model.eval()


def random_pieces(
    size: str, dtype: torch.dtype | None = None, device: str = "cpu", audio_context: float | None = None
) -> tuple[WhisperEncoder, DiffusionLM]:
    """An encoder and a language model of named sizes, such as "small+llada-8b"; "toy+toy" for the smallest."""
    whisper, _, llm = size.partition("+")
    if whisper not in ENCODER_SIZES or llm not in LM_SIZES:
        raise ValueError(f"--random-weights {size}: give one of {', '.join(ENCODER_SIZES)}, a plus, and one of {', '.join(LM_SIZES)}")
    config = LM_SIZES[llm]
    if not config.vocab:  # the toy's comes from its tokenizer; this one has bytes and markers
        config = replace(config, vocab=272, mask_id=256, end_id=257)
    with torch.device("meta"), Unfilled():
        encoder, lm = WhisperEncoder(ENCODER_SIZES[whisper]), DiffusionLM(config)
    encoder = randomize(encoder, dtype or torch.float32, device)
    encoder.positions.data.copy_(sinusoids(encoder.config.context, encoder.config.width))
    if audio_context is not None:
        encoder.shorten(audio_context)
    return encoder, randomize(lm, dtype or (torch.float32 if llm == "toy" else torch.bfloat16), device)
