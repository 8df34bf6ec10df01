"""The files of a run: checkpoints to resume from, and metrics.

Checkpoints `run.pt` lie on the disk as run-00000400.pt, run-00000200.pt, ...: weights, optimisers
and losses, and what the run is (settings, models, corpus, shapes), so that no other run resumes
from them. Metrics are a JSONL file: one object for every few steps, or for a validation.
"""

import json
import re
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints.files import whole_file
from training import processes

# Settings that older runs recorded under other names.
RENAMED = {"alike": "bucket_by_length", "inherited": "pretrained_lr_scale"}


def name_on_disk(name: str) -> str:
    """The name of a parameter in files: an LM's attention and MLP add no level to it there."""
    name = re.sub(r"^(blocks\.\d+)\.(attn|mlp)\.", r"\1.", name)
    return re.sub(r"^(blocks\.\d+)\.mlp_norm\.", r"\1.ffn_norm.", name)


# Checkpoints


def checkpoints(path: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted(path.parent.glob(f"{path.stem}-{'[0-9]' * 8}{path.suffix}"), reverse=True)


def save_checkpoint(state: dict, path: Path, step: int, keep: int) -> None:
    """Write the checkpoint of a step, then remove all but the newest `keep`.

    Raises OSError: it cannot be saved; older checkpoints stay as they were.
    """
    with whole_file(path.with_name(f"{path.stem}-{step:08d}{path.suffix}")) as temporary:
        torch.save(state, temporary)

    for old in checkpoints(path)[max(keep, 1) :]:
        old.unlink()


def load_newest(path: Path) -> dict | None:
    """The newest checkpoint that is undamaged, or None if there is no checkpoint.

    Damaged ones are skipped with a warning. Raises ValueError: all are damaged.
    """
    found = checkpoints(path)
    for file in found:
        try:
            # torch.load does not compare checksums.
            with zipfile.ZipFile(file) as archive:
                broken = archive.testzip()
            if broken:
                raise ValueError(f"{broken} does not match its checksum")
            return with_new_names(torch.load(file, weights_only=True, map_location="cpu"))
        # Damage shows in many ways.
        except Exception as error:
            if processes.rank() == 0:
                tqdm.write(f"warning: {file} is damaged ({error}); trying the one before it")

    if found:
        names = ", ".join(file.name for file in found)
        raise ValueError(
            f"{path.parent}: every checkpoint is damaged; remove {names} to start again"
        )
    return None


def minutes_of(folder: Path, names: list[str]) -> float:
    """Minutes of training that led to these checkpoints, over all processes that took part."""
    newest = [load_newest(folder / f"{name}.pt") for name in names]
    return sum(saved.get("minutes", 0.0) for saved in newest if saved)


def with_new_names(saved: dict) -> dict:
    """A checkpoint with the present names of settings."""
    saved["run"] = {RENAMED.get(name, name): value for name, value in saved["run"].items()}
    for optimizer in saved["optimizers"]:
        for group in optimizer["param_groups"]:
            group.setdefault("lr_scale", group.pop("share", 1.0))
    return saved


def refuse_another_run(saved: dict, current: dict, path: Path) -> None:
    """Raise ValueError if a checkpoint is of other settings, model, corpus or shapes; list them."""
    differences = [
        f"{name} was {saved.get(name)!r}, now is {current.get(name)!r}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if differences:
        listed = "\n  ".join(differences)
        raise ValueError(
            f"{path.parent}: its checkpoint {path.stem} was made by a run with other settings; "
            f"remove it or use another directory\n  {listed}"
        )


# Metrics


def read_metrics(path: Path) -> list[dict]:
    """Records of a run; [] without a file. A line that a kill cut short is left out."""
    records = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


class Metrics:
    """Records of a run, in a JSONL file if there is a path; the first process writes it."""

    def __init__(self, path: Path | None, steps: int):
        """Keep the records of the first `steps` steps: those after the checkpoint come again."""
        self.path = path if processes.rank() == 0 else None
        found = read_metrics(path) if path else []
        self.records = [record for record in found if record["step"] <= steps]

        # All have read before the first process writes.
        processes.wait()
        if self.path:
            with whole_file(self.path) as temporary:
                lines = "".join(json.dumps(r) + "\n" for r in self.records)
                temporary.write_text(lines, "utf-8")

    def add(self, **values) -> None:
        """Append a record; `step` is one of its values."""
        self.records.append(values)
        if self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    def validations(self) -> dict[int, dict]:
        """The results of all validations so far, by step."""
        return {r["step"]: r["validation"] for r in self.records if "validation" in r}
