"""Names in checkpoint files <-> names in our modules. Reads and writes the very formats of the Hugging Face hub.

One table per format. A loader uses every tensor of the file exactly once, or drops it on purpose by a listed prefix, or
stops with the tensor, both shapes and the file. Nothing is ever unpickled but tensors (`weights_only=True`).
"""

import json
import os
import re
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters import TAPS, AcousticAdapter, AdapterConfig, SemanticAdapter
from diffusion_lm import DiffusionLM, LMConfig
from encoder import EncoderConfig, WhisperEncoder

# Ours -> theirs. "{}" is a layer number; an entry may name a module, whose tensors keep their last name, or one tensor.
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
    "unembedding": "model.transformer.ff_out",
}

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

# config.json fields: ours -> theirs.
WHISPER_CONFIG = {
    "n_mels": "num_mel_bins",
    "width": "d_model",
    "n_layers": "encoder_layers",
    "n_heads": "encoder_attention_heads",
    "ffn": "encoder_ffn_dim",
    "context": "max_source_positions",
}
LLADA_CONFIG = {
    "width": "d_model",
    "n_layers": "n_layers",
    "n_heads": "n_heads",
    "ffn": "mlp_hidden_size",
    "vocab": "embedding_size",
    "max_length": "max_sequence_length",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "mask_id": "mask_token_id",
    "end_id": "eos_token_id",
}


class WeightsError(ValueError):
    """A checkpoint that cannot be used, said in terms of its files and tensors."""


def their_name(table: dict[str, str], ours: str) -> str:
    """The name in the file of our tensor `ours`, by a key table."""
    numbers = re.findall(r"\.(\d+)(?=\.|$)", ours)
    template = re.sub(r"\.\d+(?=\.|$)", ".{}", ours)
    if template in table:
        return table[template].format(*numbers)
    module, _, leaf = template.rpartition(".")
    return f"{table[module].format(*numbers)}.{leaf}"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` or `.bin` file, memory-mapped.

    Raises WeightsError when the file is absent, truncated, or a pickle that holds anything but tensors.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise WeightsError(f"{path}: not a whole checkpoint file ({error}); download it again") from error
    except Exception as error:  # pickle.UnpicklingError and what broken pickles raise besides
        raise WeightsError(f"{path}: refused, holds more than plain tensors or is damaged ({error})") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise WeightsError(f"{path}: holds something else than tensors with names")
    return tensors


def read_directory(path: Path) -> dict[str, Tensor]:
    """All tensors of a hub directory: shards with an index, one safetensors file, or `pytorch_model.bin`."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise WeightsError(f"{index}: lacks weight_map")
        shards = sorted(set(names.values()))
        absent = [shard for shard in shards if not (path / shard).is_file()]
        if absent:
            raise WeightsError(f"{index} names files that are not there: {', '.join(absent)}; download them")
        tensors = {}
        for shard in shards:
            tensors.update(read_tensors(path / shard))
        if set(tensors) != set(names):
            odd = sorted(set(tensors) ^ set(names))
            raise WeightsError(f"{index} and its shards disagree about {', '.join(odd[:5])}")
        return tensors
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return read_tensors(path / name)
    raise WeightsError(f"{path}: holds neither model.safetensors, its index, nor pytorch_model.bin")


def read_json(path: Path) -> dict:
    """A JSON object from a file; WeightsError names the file when it is absent or broken."""
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: not a JSON object")
    return value


def write_json(path: Path, value: object) -> None:
    """Write JSON under another name first, so that a killed run leaves the old file whole."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def fill(module: nn.Module, tensors: dict[str, Tensor], table: dict[str, str], dropped: tuple[str, ...], source: Path) -> None:
    """Give every parameter of `module` its tensor, and every tensor its parameter.

    Raises WeightsError that lists all missing, extra and mis-shaped tensors with both shapes and the file.
    """
    wanted = {their_name(table, ours): ours for ours in module.state_dict()}
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(dropped)}
    shapes = {theirs: tuple(module.state_dict()[ours].shape) for theirs, ours in wanted.items()}
    problems = [f"missing {name} {shapes[name]}" for name in wanted if name not in given]
    problems += [f"extra {name} {tuple(tensor.shape)}" for name, tensor in given.items() if name not in wanted]
    problems += [
        f"{name} is {tuple(given[name].shape)} in the file, {shape} by the config"
        for name, shape in shapes.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    if problems:
        shown = "\n  ".join(problems[:10]) + (f"\n  and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise WeightsError(f"{source}: tensors do not fit\n  {shown}")
    module.load_state_dict({ours: given[theirs] for theirs, ours in wanted.items()}, assign=True)


def named(module: nn.Module, table: dict[str, str]) -> dict[str, Tensor]:
    """The module's tensors under their names in the file, ready to be saved."""
    return {their_name(table, ours): t.detach().cpu().contiguous() for ours, t in module.state_dict().items()}


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically."""
    temporary = Path(f"{path}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def _config(path: Path, table: dict[str, str], model_type: str) -> dict:
    """Our config fields from a directory's config.json."""
    if not path.is_dir():
        raise WeightsError(f"{path}: no such directory; see 'Real weights' in the README for the download command")
    raw = read_json(path / "config.json")
    if raw.get("model_type") != model_type:
        raise WeightsError(f"{path / 'config.json'}: model_type is {raw.get('model_type')!r}, expected {model_type!r}")
    absent = [theirs for theirs in table.values() if raw.get(theirs) is None]
    if absent:
        raise WeightsError(f"{path / 'config.json'}: lacks {', '.join(absent)}")
    return {ours: raw[theirs] for ours, theirs in table.items()}


def load_whisper(path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> WhisperEncoder:
    """The encoder of a Hugging Face Whisper directory (`openai/whisper-*`); its decoder is dropped."""
    path = Path(path)
    with torch.device("meta"):
        model = WhisperEncoder(EncoderConfig(**_config(path, WHISPER_CONFIG, "whisper")))
    fill(model, read_directory(path), WHISPER_KEYS, WHISPER_DROPPED, path)
    return model.to(device=device, dtype=dtype).eval()


def save_whisper(model: WhisperEncoder, path: str | Path) -> None:
    """Write an encoder as `openai/whisper-*` lies on the hub (encoder only)."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_tensors(path / "model.safetensors", named(model, WHISPER_KEYS))
    raw = {theirs: getattr(model.config, ours) for ours, theirs in WHISPER_CONFIG.items()}
    write_json(path / "config.json", {"model_type": "whisper", "activation_function": "gelu"} | raw)


def load_llada(path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DiffusionLM:
    """The language model of a LLaDA directory (`GSAI-ML/LLaDA-8B-*`)."""
    path = Path(path)
    with torch.device("meta"):
        model = DiffusionLM(LMConfig(**_config(path, LLADA_CONFIG, "llada")))
    fill(model, read_directory(path), LLADA_KEYS, (), path)
    return model.to(device=device, dtype=dtype).eval()


def save_llada(model: DiffusionLM, path: str | Path, n_shards: int = 1) -> None:
    """Write a language model as LLaDA lies on the hub: config, shards and their index."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = named(model, LLADA_KEYS)
    names = sorted(tensors)
    weight_map = {}
    for i in range(n_shards):
        shard = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        save_tensors(path / shard, {name: tensors[name] for name in names[i::n_shards]})
        weight_map.update(dict.fromkeys(names[i::n_shards], shard))
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    raw = {theirs: getattr(model.config, ours) for ours, theirs in LLADA_CONFIG.items()}
    raw |= {"model_type": "llada", "vocab_size": model.config.vocab, "n_kv_heads": model.config.n_heads}
    raw |= {"pad_token_id": model.config.end_id, "weight_tying": False}
    write_json(path / "config.json", raw)


def load_adapters(path: str | Path, n_heads: int, n_layers: int = 12) -> tuple[AdapterConfig, dict[str, nn.Module | Tensor], dict]:
    """Trained adapters: one of our directories, or the release's `pytorch_model.bin` (or a directory that holds it).

    Args:
        n_heads: of the Q-Former, which no tensor tells: the release takes the encoder's number.
        n_layers: of the encoder, which tells the tapped layers of a release.
    Returns:
        config (shapes read off the tensors), parts among "prompts", "semantic" and "acoustic" (a part may be absent
        whole, never in pieces), and the directory's config.json ({} for the release).
    """
    path = Path(path)
    info = read_json(path / "config.json") if (path / "adapters.safetensors").is_file() else {}
    file = path / "adapters.safetensors" if info else path / "pytorch_model.bin" if path.is_dir() else path
    tensors = {k: v for k, v in read_tensors(file).items() if not k.startswith(ADAPTERS_DROPPED)}
    for needed in ("semantic_connector.conv.0.weight", "semantic_connector.linear_connector.2.weight"):
        if needed not in tensors:
            raise WeightsError(f"{file}: missing {needed}; is this a DIFFA adapter file?")
    known = {f.name for f in fields(AdapterConfig)}
    shapes = {k: tuple(v) if k == "taps" else v for k, v in info.get("adapters", {}).items() if k in known}
    shapes["encoder_width"] = tensors["semantic_connector.conv.0.weight"].shape[0]
    shapes["lm_width"] = tensors["semantic_connector.linear_connector.2.weight"].shape[0]
    shapes.setdefault("n_heads", n_heads)
    if "trainable_prompts.weight" in tensors:
        shapes["n_prompts"] = tensors["trainable_prompts.weight"].shape[0]
    if "acoustic_connector.layer_weights" in tensors and not info:
        n_queries, n_taps = tensors["acoustic_connector.layer_weights"].shape
        layers = [int(k.split(".")[3]) for k in tensors if k.startswith("acoustic_connector.qformer.layer.")]
        taps = TAPS.get(n_layers, ())
        if len(taps) != n_taps:
            raise WeightsError(f"{file}: taps {n_taps} hidden states, an encoder of {n_layers} layers has {len(taps)} tapped")
        inner = tensors.get("acoustic_connector.qformer.layer.0.intermediate.dense.weight")
        shapes |= {} if inner is None else {"ffn": inner.shape[0]}
        shapes |= {"n_queries": n_queries, "qformer_layers": max(layers, default=-1) + 1, "taps": taps}
    config = AdapterConfig(**shapes)
    parts: dict[str, nn.Module | Tensor] = {}
    rest = dict(tensors)
    with torch.device("meta"):
        prompts = nn.ParameterDict({"prompts": nn.Parameter(torch.empty(config.n_prompts, config.lm_width))})
        modules = {
            "prompts": (prompts, PROMPT_KEYS, "trainable_prompts."),
            "semantic": (SemanticAdapter(config), SEMANTIC_KEYS, "semantic_connector."),
            "acoustic": (AcousticAdapter(config), ACOUSTIC_KEYS, "acoustic_connector."),
        }
    for name, (module, table, prefix) in modules.items():
        mine = {k: rest.pop(k) for k in list(rest) if k.startswith(prefix)}
        if mine:
            fill(module, mine, table, (), file)
            parts[name] = module["prompts"] if name == "prompts" else module
    if rest:
        raise WeightsError(f"{file}: extra tensors {', '.join(sorted(rest)[:5])}")
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
