"""Text <-> ids: the tokenizers of all families of LMs behind one small interface."""

import re
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from checkpoints.chats import CHATS, ChatFormat, chat_format
from checkpoints.digests import file_digest
from checkpoints.files import MOST_TEXT, first_line, refuse_pointer
from diffusion_lm import LMConfig


class Tokenizer(Protocol):
    """What the rest of the code needs of a tokenizer."""

    size: int  # number of ids
    digest: str  # of its file
    markers: dict[str, int]  # control tokens that `encode` finds in a text
    chat: ChatFormat = CHATS["llada"]  # of its model

    def encode(self, text: str) -> list[int]:
        """Ids of a text. A marker in it becomes one id; nothing is added before or after."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, markers included."""

    def id(self, piece: str) -> int | None:
        """The id of one piece by its name, None if there is no such piece."""

    def encode_text(self, text: str, before: str = "", after: str = "") -> list[int]:
        """Ids of a user's text between two parts of a prompt, encoded as one string.

        Markers such as <|eot_id|> in `before` and `after` become control tokens. Those in the text
        stay text: they are written with ordinary tokens.

        Raises ValueError: the text is not Unicode, or a marker in it cannot be written.
        """
        if text != text.encode(errors="replace").decode():
            raise ValueError(f"text {text[:60]!r} is not valid Unicode; save or type it as UTF-8")
        ids = self.encode(before + text + after)

        # Where are the control tokens of the text? The first and last ones belong to the prompt.
        names = {i: marker for marker, i in self.markers.items()}
        n_before = sum(i in names for i in self.encode(before))
        n_after = sum(i in names for i in self.encode(after))
        places = [place for place, i in enumerate(ids) if i in names]
        for place in reversed(places[n_before : len(places) - n_after]):
            ids[place : place + 1] = self.spell(names[ids[place]])
        return ids

    def spell(self, marker: str) -> list[int]:
        """Ordinary ids that write a marker, in two parts, in which `encode` does not find it.

        Each part is encoded after a marker, where no tokenizer adds a space.
        """
        skipped = len(self.encode(marker))
        parts = (marker[:1], marker[1:])
        ids = [i for part in parts for i in self.encode(marker + part)[skipped:]]
        if self.decode(ids) != marker or not set(ids).isdisjoint(self.markers.values()):
            raise ValueError(
                f"the tokenizer cannot write {marker} as text; take it out of the text"
            )
        return ids


class SentencePieceTokenizer(Tokenizer):
    """The toy's tokenizer: `tokenizer.model` of sentencepiece."""

    def __init__(self, path: Path):
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.size = self.model.get_piece_size()
        known = {marker: self.id(marker) for chat in CHATS.values() for marker in chat.published}
        self.markers = {marker: i for marker, i in known.items() if i is not None}

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if i < self.size])  # an LM may have more ids

    def id(self, piece: str) -> int | None:
        found = self.model.piece_to_id(piece)
        return None if found == self.model.unk_id() else found


class JSONTokenizer(Tokenizer):
    """A tokenizer of the hub: `tokenizer.json`, read by the `tokenizers` library."""

    def __init__(self, path: Path):
        self.model = tokenizers.Tokenizer.from_file(str(path))
        # A file may contain the padding and the length limit of its training.
        self.model.no_truncation()
        self.model.no_padding()
        self.size = max(self.model.get_vocab().values(), default=-1) + 1
        added = self.model.get_added_tokens_decoder()
        self.markers = {token.content: i for i, token in added.items()}

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)

    def id(self, piece: str) -> int | None:
        return self.model.token_to_id(piece)


class ByteTokenizer(Tokenizer):
    """For random weights, which have no tokenizer: bytes are ids, markers have the model's ids."""

    def __init__(self, lm_config: LMConfig):
        self.size = lm_config.vocab
        self.chat = CHATS[lm_config.family]
        self.markers = self.chat.published

        # The toy's vocabulary is small: its mask and end are followed by the other markers.
        known = {self.chat.mask: lm_config.mask_id, self.chat.text_end: lm_config.end_id}
        if lm_config.mask_id != self.markers[self.chat.mask]:
            others = [marker for marker in self.markers if marker not in known]
            first = max(known.values()) + 1
            self.markers = {marker: first + i for i, marker in enumerate(others)} | known

    def encode(self, text: str) -> list[int]:
        ids = []
        any_marker = "|".join(re.escape(marker) for marker in self.markers)
        for piece in re.split(f"({any_marker})", text):
            ids += [self.markers[piece]] if piece in self.markers else piece.encode()
        return ids

    def decode(self, ids: list[int]) -> str:
        names = {i: marker.encode() for marker, i in self.markers.items()}
        pieces = [bytes([i]) if i < 256 else names.get(i, f"<{i}>".encode()) for i in ids]
        return b"".join(pieces).decode(errors="replace")

    def id(self, piece: str) -> int | None:
        return self.markers.get(piece)


def load_tokenizer(path: str | Path, lm_config: LMConfig) -> Tokenizer:
    """The tokenizer of an LM directory, checked against the LM's config.

    Raises:
        ValueError: there is none, it is damaged, or it belongs to another model: it lacks a chat
            marker, has one at another id than the model, or has more ids than the model has
            embeddings.
    """
    # Which of the two formats is there?
    kinds = {"tokenizer.json": JSONTokenizer, "tokenizer.model": SentencePieceTokenizer}
    files = [Path(path) / name for name in kinds if (Path(path) / name).is_file()]
    if not files:
        advice = "is the download complete?"
        if (Path(path) / "vocab.json").is_file():
            advice = "docs/backbones.md says how to make it from vocab.json and merges.txt"
        raise ValueError(f"{path}: lacks {' or '.join(kinds)}; {advice}")
    file = files[0]
    refuse_pointer(file, most=MOST_TEXT)

    try:
        tokenizer = kinds[file.name](file)
    except BaseException as error:
        raise damaged(file, error) from error
    tokenizer.digest = file_digest(file)

    # Of a published model the ids of all markers are known; of any other, the two in its config.
    chat = tokenizer.chat = chat_format(tokenizer.markers, lm_config, file)
    is_published = lm_config.mask_id == chat.published[chat.mask]
    expected = chat.published if is_published else {}
    expected = expected | {chat.mask: lm_config.mask_id, chat.text_end: lm_config.end_id}

    # Does it belong to this LM?
    for piece in chat.published:
        found = tokenizer.id(piece)
        if found is None:
            raise ValueError(
                f"{file}: has no {piece}; it is the tokenizer of another model, or of one that is "
                "not a diffusion model; download it with its weights"
            )
        if found != expected.get(piece, found):
            raise ValueError(
                f"{path}: its tokenizer has {piece} at {found}, its config at {expected[piece]}; "
                "they belong to different models, download both again"
            )
    if tokenizer.size > lm_config.vocab:
        raise ValueError(
            f"{path}: {tokenizer.size} ids in its tokenizer, the LM only {lm_config.vocab} "
            "embeddings"
        )
    check_encoding(tokenizer, file)
    return tokenizer


def check_encoding(tokenizer: Tokenizer, file: Path) -> None:
    """Raise ValueError if text cannot be encoded, or a marker in it is not one id."""
    try:
        tokenizer.decode(tokenizer.encode("".join(map(chr, range(32, 256)))))
        encoded = {m: tokenizer.encode(f"{m}a{m}a") for m in tokenizer.chat.published}
    except BaseException as error:
        raise damaged(file, error) from error

    # A marker that is no added token is cut like any word, unless it happens to be one.
    for marker, ids in encoded.items():
        if ids.count(tokenizer.id(marker)) != 2:
            raise ValueError(
                f"{file}: {marker} in a text is not encoded as its one id, {tokenizer.id(marker)}; "
                "list it in the file's added_tokens (normalized and single_word false)"
            )


def damaged(file: Path, error: BaseException) -> BaseException:
    """The error that says a tokenizer's file is damaged. An interrupt stays what it is.

    The libraries raise no narrower class than Exception; a panic in Rust is not even that.
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return error
    return ValueError(f"{file}: not a whole tokenizer ({first_line(error)}); download it again")
