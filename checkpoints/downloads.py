"""Files that are missing: the command that downloads each published one."""

import shlex
from pathlib import Path

from checkpoints.files import WeightsError

# What can be downloaded, by a word in the path. The empty word is the default.
# A longer name comes before one that it contains.
WHISPER_SIZES = "large-v3-turbo large-v3 large-v2 large medium.en medium".split()
WHISPER_SIZES += "small.en small base.en base tiny.en tiny".split()
PUBLISHED = {
    "whisper": {"": "openai/whisper-small", "turbo": "openai/whisper-large-v3-turbo"}
    | {size: f"openai/whisper-{size}" for size in WHISPER_SIZES},
    "llm": {
        "": "GSAI-ML/LLaDA-8B-Instruct",
        "illada": "GSAI-ML/iLLaDA-8B-Instruct",
        "dream": "Dream-org/Dream-v0-Instruct-7B",
        "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "qwen2.5": "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1",
        "qwen": "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1",
        "1.5": "GSAI-ML/LLaDA-1.5",
        "instruct": "GSAI-ML/LLaDA-8B-Instruct",
        "base": "GSAI-ML/LLaDA-8B-Base",
    },
    "adapters": {"": "zhoujiaming777/DIFFA"},
}


def download_command(piece: str, path: Path) -> str:
    """The command that fills `path`. piece: a key of PUBLISHED."""
    if path.parts[:1] == ("runs",) or path.parts[-3:-1] == ("runs", "toy"):
        return "`make demo` makes the toy run's"

    # The last part of a path says more than the folders above it.
    known = PUBLISHED[piece]
    words = [w for part in reversed(path.parts) for w in known if w and w in part.lower()]
    repository = known[words[0] if words else ""]

    # Of a Whisper two files are enough: the others are for other libraries.
    only = " config.json model.safetensors" if piece == "whisper" else ""

    # The hub's files go into a folder, even where the missing path is a file.
    folder = path
    if path.suffix in (".pt", ".bin", ".safetensors"):
        folder = path.with_suffix("") if piece == "whisper" else path.parent
    where = shlex.quote(str(folder))
    then = "" if folder == path or piece == "adapters" else f", and pass --{piece} {where}"
    return f"download it: hf download {repository}{only} --local-dir {where}{then}"


def require(**pieces: str | Path | None) -> None:
    """Raise WeightsError that lists every missing piece, each with its download command.

    Args:
        pieces: paths by a key of PUBLISHED; None is skipped.
    """
    lines = []
    for piece, given in pieces.items():
        if given is None:
            continue

        # A directory without its config.json was downloaded in part.
        path = Path(given)
        problem = "" if path.exists() and str(given) else "no such directory or file"
        if piece != "adapters" and path.is_dir() and not (path / "config.json").is_file():
            problem = "holds no config.json"
        if problem:
            lines.append(f"--{piece} {path}: {problem}\n  {download_command(piece, path)}")
    if lines:
        raise WeightsError("\n".join(lines))
