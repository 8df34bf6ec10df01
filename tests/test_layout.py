"""Who may import whom: the method is eight files at the top, and every arrow points down."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHOD = "encoder adapters diffusion_lm data diffa sampler train_asr train_instruct".split()
LOWER_SIX = [*METHOD[:6], "audio"]
# What each file or folder may import at its top, of ours. A folder may always import itself.
ALLOWED = {
    "encoder": [],
    "adapters": [],
    "diffusion_lm": [],
    "audio": [],
    "data": ["encoder", "audio"],
    "diffa": ["encoder", "adapters", "diffusion_lm", "data"],
    "sampler": ["diffa", "diffusion_lm", "data", "speed"],  # of speed, what it refuses
    "speed": LOWER_SIX,
    "checkpoints": [*LOWER_SIX, "speed"],
    "training": [*LOWER_SIX, "checkpoints"],
    "train_asr": [*LOWER_SIX, "checkpoints", "training"],
    "train_instruct": [*LOWER_SIX, "checkpoints", "training"],
}
ALLOWED["corpora"] = ALLOWED["evaluation"] = [*METHOD, "audio", "speed", "checkpoints", "training"]
ALLOWED["toy"] = [*ALLOWED["corpora"], "corpora", "evaluation"]
ALLOWED["lab"] = [*ALLOWED["toy"], "toy"]
# The method's files may import these inside a function: a command, a loader, compiled calls.
INSIDE_FUNCTIONS = {"speed", "checkpoints", "evaluation"}
FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0] in {*ALLOWED, *(f"{name}.py" for name in METHOD)}
)


def ours_imported(path: Path) -> tuple[set[str], set[str]]:
    """Modules of ours, dotted, that a file imports at its top level, and those inside functions."""
    tree = ast.parse(path.read_text())
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found = (set(), set())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module in ALLOWED
                else [node.module]
            )
        found[node in inside].update(name for name in names if name.split(".")[0] in ALLOWED)
    return found


def owner(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_eight_python_files_stand_at_the_top_and_no_other():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(METHOD)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_arrow_points_down(path):
    me = owner(path)
    top, inside = ours_imported(path)
    allowed = {*ALLOWED[me], me}
    assert {name.split(".")[0] for name in top} <= allowed
    assert {name.split(".")[0] for name in inside} <= allowed | (
        INSIDE_FUNCTIONS if me in METHOD else set()
    )


def test_no_circle_of_files():
    """A file's imports at its top, followed to the end, never come back to it."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    arrows = {}
    for name, path in modules.items():
        top, _ = ours_imported(path)
        arrows[name] = {
            module
            for module in modules
            for found in top
            if found == module or found.startswith(f"{module}.")
        } - {name}

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            new = arrows[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    assert [name for name in modules if name in reached(name)] == []


def test_importing_stage_1_loads_nothing_of_the_toy_the_lab_or_the_exams():
    others = ("toy", "lab", "evaluation", "corpora")
    code = f"import sys, train_asr; print([m for m in sys.modules if m.split('.')[0] in {others}])"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "[]"
