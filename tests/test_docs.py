"""README and docs: links resolve, and the commands that they show exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE_BLOCK = re.compile(r"^```\n(.*?)^```", re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[str]:
    """The command lines in a page's code blocks, continued lines joined, comments removed."""
    lines = []
    for block in CODE_BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            lines.append(line.split(" # ")[0].strip())
    return [line for line in lines if line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if path.startswith("https:"):
            continue

        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)

    for command in commands(page):
        for target in re.findall(r"^make ([a-z-]+)", command):
            assert target in targets, command
        for module in re.findall(r"python -m ([\w.]+)", command):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), command
        for script in re.findall(r"(?:python |\s)(\w+\.py)\b", command):
            assert (ROOT / script).is_file(), command


def is_option(option: str) -> bool:
    """Whether code outside tests holds the option, or its bare name in a table of options."""
    files = [path for path in ROOT.glob("*/*.py") if path.parent.name != "tests"]
    sources = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *files])
    return f'"{option}"' in sources or f'"{option.removeprefix("--")}"' in sources


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page):
    for command in commands(page):
        if not re.search(r"\bpython -m|\w+\.py\b", command) or command.startswith("pytest"):
            continue
        # What follows the script or module; torchrun's own options stand before it.
        arguments = re.split(r"python -m \S+|\w+\.py\b", command, maxsplit=1)[1]
        for option in re.findall(r"(?<=\s)(--[a-z][a-z0-9-]*)", arguments):
            assert is_option(option), command


def test_the_makefile_runs_modules_and_options_that_exist():
    # Each command, without those of pip, pytest and ruff.
    lines = re.findall(r"^\t\$\(PY\) (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    ours = [line for line in lines if not re.match(r"-m (pip|pytest|ruff)\b", line)]
    assert ours

    for line in ours:
        for module in re.findall(r"^-m (\w+\.\w+)", line):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), line
        for option in re.findall(r"(?<=\s)(--[a-z][a-z0-9-]*)", line):
            assert is_option(option), line


def test_the_readme_is_two_screens():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 170
    assert len(text.split()) <= 1300
