"""Sentences out of plain text files, one a line: what an LM is adapted to, and what is spoken.

    python -m corpora.texts FILE... --out texts [--most 20] [--held-out 2] [--exclude MANIFEST...]

Writes OUT/train.txt and OUT/test.txt. A sentence has 3 to 20 words, all of them of letters. It is
held out if a hash of its words says so: whatever files it comes from, it is in the same split.

Paragraphs are separated by an empty line or by `%` alone, as in fortune files. Chapter and verse at
the start of a line ("Ge1:1 In the beginning") are removed.
"""

import argparse
import functools
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from checkpoints.command_line import number, one_line_errors
from checkpoints.files import check_writable, read_text, whole_file
from data import load_manifest
from training.questions import plain_words

FEWEST = 3  # words of a sentence
MOST = 20  # unless --most says otherwise
LONGEST_WORD = 20  # letters; what is longer is no word

PARAGRAPH = re.compile(r"\n\s*(?:%\s*)?\n|^%$", re.MULTILINE)
VERSE = re.compile(r"^\w+ ?\d+:\d+ ", re.MULTILINE)
SENTENCE_END = re.compile(r"(?<=[.!?;:])[\"')\]]*\s+|--")
# Letters with apostrophes or hyphens, punctuation around them.
WORD = re.compile(r"[\"'(\[]*[A-Za-z]+(?:['-][A-Za-z]+)*[\"')\].,;:!?]*")


def sentences(text: str, most: int = MOST) -> Iterator[str]:
    """The sentences of a text that have FEWEST to `most` words, all of them of letters."""
    for paragraph in PARAGRAPH.split(VERSE.sub("", text)):
        for sentence in SENTENCE_END.split(paragraph):
            words = sentence.split()
            if not FEWEST <= len(words) <= most:
                continue
            if all(WORD.fullmatch(word) and len(word) <= LONGEST_WORD for word in words):
                yield " ".join(words)


def is_held_out(words: str, percent: float) -> bool:
    """Whether a sentence, in plain words, belongs to the test; a hash of its words decides."""
    return zlib.crc32(words.encode()) % 10_000 < 100 * percent


def make_texts(
    files: list[Path], out: Path, held_out: float, exclude: list[Path], most: int = MOST
) -> None:
    """Write OUT/train.txt and OUT/test.txt.

    Args:
        most: words of a sentence.
        held_out: percent of the sentences that go to the test.
        exclude: manifests whose transcripts go to neither.
    Raises:
        ValueError: no sentence is left for one of the two, or a file would be overwritten.
        ManifestError: a manifest is bad.
    """
    written = [(out / f"{split}.txt").resolve() for split in ("train", "test")]
    for file in files:
        if file.resolve() in written:
            raise ValueError(f"{file} would be overwritten by --out {out}; take another folder")
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        check_writable(out / f"{split}.txt")
    known = {plain_words(i["transcription"]) for path in exclude for i in load_manifest(path)}

    # Each sentence counts once, whatever its capitals and punctuation.
    found = {"train": [], "test": []}
    for file in files:
        for sentence in sentences(read_text(file), most):
            words = plain_words(sentence)
            if words not in known:
                known.add(words)
                found["test" if is_held_out(words, held_out) else "train"].append(sentence)

    # Both files, or neither.
    for split, lines in found.items():
        if not lines:
            raise ValueError(f"no sentence of {FEWEST} to {most} words is left for {split}.txt")
    for split, lines in found.items():
        with whole_file(out / f"{split}.txt") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        n_words = sum(len(line.split()) for line in lines)
        print(f"{len(lines):,} sentences, {n_words:,} words in {out / split}.txt")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Sentences out of plain text files.")
    option = parser.add_argument
    option("files", nargs="+", type=Path, metavar="FILE", help="plain text in UTF-8")
    option("--out", type=Path, required=True, help="folder of train.txt and test.txt")
    words = functools.partial(number, kind=int, least=FEWEST, most=1000)
    option("--most", type=words, default=MOST, help="words of a sentence (default %(default)s)")
    percent = functools.partial(number, kind=float, least=0.01, most=50.0)
    option("--held-out", type=percent, default=2.0, help="percent of sentences (default 2)")
    option(
        "--exclude", nargs="*", type=Path, default=[], help="manifests: transcripts to leave out"
    )
    args = parser.parse_args(arguments)

    with one_line_errors("python -m corpora.texts"):
        make_texts(args.files, args.out, args.held_out, args.exclude, args.most)


if __name__ == "__main__":
    main()
