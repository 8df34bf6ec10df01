"""Every text file is read and written as UTF-8, whatever the locale."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = "checkpoints corpora evaluation lab speed toy training".split()
FILES = sorted([*ROOT.glob("*.py"), *(f for name in FOLDERS for f in (ROOT / name).glob("*.py"))])


def names_encoding(call):
    """Whether a call that opens a file says in which encoding, or that it holds bytes."""
    strings = [
        node.value.lower()
        for argument in [*call.args, *(keyword.value for keyword in call.keywords)]
        for node in ast.walk(argument)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return any(text in ("utf-8", "utf-8-sig", "rb", "wb", "rb+", "ab") for text in strings)


def test_every_text_file_is_opened_as_utf_8():
    lacking = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            is_open = isinstance(node.func, ast.Name) and node.func.id == "open"
            is_text = isinstance(node.func, ast.Attribute) and node.func.attr in (
                "read_text",
                "write_text",
            )
            if (is_open or is_text) and not names_encoding(node):
                lacking.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert lacking == []
