"""What all readers of corpora use: clips, what is missing, folders and texts on a disk."""

import codecs
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A recording and what the corpus says of it; `words` is "" if unknown.

    attributes: such as {"Gender": "female"} (corpora/vocabulary.py). held_out_with: names the clips
    that must not be in training if this one is in the test; "" for those of its speaker.
    """

    id: str
    path: Path
    speaker: str
    words: str
    attributes: dict[str, str]
    held_out_with: str = ""


@dataclass(frozen=True)
class Missing:
    """Something that cannot be used, or is not there; equal reasons are counted together."""

    reason: str
    name: str


class CorpusError(ValueError):
    """A folder that is not laid out as the corpus is; the message says what was looked for."""


def find_home(root: Path, entry: str) -> Path:
    """The folder that holds an entry of the corpus: ROOT, or the one folder in it that does.

    Raises CorpusError: there is none, or several.
    """
    if (root / entry).exists():
        return root

    # An archive may unpack to a folder of its own name; macOS adds __MACOSX.
    folders = [path for path in sorted(root.glob("*")) if path.name[0] not in "._"]
    homes = [folder for folder in folders if (folder / entry).exists()]

    if len(homes) > 1:
        listed = ", ".join(map(str, homes))
        raise CorpusError(f"{root} holds several such corpora; choose one as ROOT: {listed}")
    if not homes:
        raise CorpusError(
            f"{root / entry} is not there: ROOT should be the folder that the corpus unpacks to, "
            "as --help shows it"
        )
    return homes[0]


def visible(folder: Path, pattern: str) -> list[Path]:
    """Files that match, in order, except what macOS or an editor hides (`._1.wav`, `.cache/`)."""
    found = []
    for path in sorted(folder.glob(pattern)):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            found.append(path)
    return found


def read_text(path: Path) -> str:
    """A file's text, whatever the locale: UTF-8, UTF-16 with its mark, or Windows-1252.

    Older corpora hold single bytes of Windows-1252. Raises CorpusError: no such file.
    """
    if not path.is_file():
        raise CorpusError(f"{path} is {'not a file' if path.exists() else 'not there'}")

    # The mark of UTF-16 decides; bytes that are no UTF-8 are Windows-1252.
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def read_lines(path: Path) -> list[str]:
    """The lines of a file that are not blank, without spaces around them.

    Not splitlines, which also breaks at characters that belong to a text.
    """
    lines = read_text(path).replace("\r", "\n").split("\n")
    return [line.strip() for line in lines if line.strip()]


def text_of(row: dict, field: str) -> str:
    """A field of a row of metadata, "" where it is absent or not text."""
    value = row.get(field)
    return value.strip() if isinstance(value, str) else ""
