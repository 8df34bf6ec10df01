"""Language models that would load here, or nearly so, and answer wrongly: refused with the reason.

A name or a model_type shows what no field of a config does. An mdlm and a bd3lm of dllm-hub have
the same files.
"""

import re
from pathlib import Path

from checkpoints.files import WeightsError, read_json

BLOCK_CAUSAL = "a block of tokens does not attend to later blocks, which this code does not do"
EXPERTS = "its feed-forward layers are experts with a router, which this code does not have"
OTHER = "an architecture of local and global layers, which this code does not have"

# Parts of model types, class names and directory names; letters and digits alone.
NAMES = {
    "bd3lm": BLOCK_CAUSAL,
    "sdar": BLOCK_CAUSAL,
    "trado": BLOCK_CAUSAL,
    "fastdllmv2": BLOCK_CAUSAL,
    "fastdllmqwen": BLOCK_CAUSAL,
    "llada2moe": EXPERTS,
    "llada20": EXPERTS,
    "llada21": EXPERTS,
    "lladamoe": EXPERTS,
    "modernbert": OTHER,
}
FIELDS = {
    "block_size": BLOCK_CAUSAL,
    "bd_size": BLOCK_CAUSAL,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": EXPERTS,
    "expert_intermediate_size": EXPERTS,
    "moe_intermediate_size": EXPERTS,
}


def refuse_unsupported(path: Path) -> None:
    """Raise WeightsError: a directory's name or config says that it cannot run here."""
    source = path / "config.json"
    raw = read_json(source)

    # In the hub's own cache, a directory is named two levels above its snapshot.
    real = path.resolve()
    names = [raw.get(field) for field in ("model_type", "architectures", "_name_or_path")]
    names += [path.name, real.name]
    if real.parent.name == "snapshots":
        names.append(real.parents[1].name)
    for name in names:
        letters = re.sub("[^a-z0-9]", "", str(name).lower())
        for part, reason in NAMES.items():
            if part in letters:
                raise WeightsError(f"{source}: {str(name)[:60]!r} cannot run: {reason}")

    for field, reason in FIELDS.items():
        if raw.get(field):
            value = repr(raw[field])[:60]
            raise WeightsError(f"{source}: {field} is {value}: {reason}")

    # Layers of other kinds, by transformers 5.
    kinds = raw.get("layer_types") or []
    others = [k for k in kinds if k != "full_attention"] if isinstance(kinds, list) else [kinds]
    if others:
        raise WeightsError(f"{source}: cannot run layers of {str(others[0])[:60]!r} (layer_types)")
