"""Text <-> ids: tokenizers behind one small interface, the chat format of each family, the one prompt builder, answers.

Chat markers are always found by their name in the tokenizer, never by number.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers
import torch
from torch import Tensor

from checkpoints.files import refuse_pointer

SYSTEM = "You are a helpful voice assistant."
TEXT_END = "<|endoftext|>"  # ends an answer and pads it, in both families

# LLaDA's markers (its tokenizer_config.json).
START, HEADER, HEADER_END, TURN_END, MASK = "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|mdm_mask|>"


@dataclass(frozen=True)
class ChatFormat:
    """How a family writes a conversation."""

    turn: str  # of system and user, with {role} and {text}
    start: str  # before the first turn
    answer: str  # what opens the assistant's turn
    turn_end: str
    mask: str
    published: dict[str, int]  # all markers, with their ids in the published tokenizer


CHATS = {
    "llada": ChatFormat(
        turn=f"{HEADER}{{role}}{HEADER_END}\n\n{{text}}{TURN_END}",
        start=START,
        answer=f"{HEADER}assistant{HEADER_END}\n\n",
        turn_end=TURN_END,
        mask=MASK,
        published={START: 126_080, TEXT_END: 126_081, MASK: 126_336, HEADER: 126_346, HEADER_END: 126_347, TURN_END: 126_348},
    ),
    "qwen3": ChatFormat(
        turn="<|im_start|>{role}\n{text}<|im_end|>\n",
        start="",
        answer="<|im_start|>assistant\n<think>\n\n</think>\n\n",  # an empty thought: thinking is off
        turn_end="<|im_end|>",
        mask="<|mask|>",
        published={TEXT_END: 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645, "<|mask|>": 151_669},
    ),
}


class Tokenizer(Protocol):
    """What the rest of the code asks of any tokenizer: `size`, `encode`, `decode`, `id` and the `chat` format of its model."""

    size: int
    chat: ChatFormat = CHATS["llada"]

    def encode(self, text: str) -> list[int]:
        """Ids of a text; markers in it become their one id, and nothing is added in front or behind."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, markers included."""

    def id(self, piece: str) -> int | None:
        """The id of one piece by its name, None when there is no such piece."""


class SentencePieceTokenizer(Tokenizer):
    """The toy's tokenizer: `tokenizer.model` of sentencepiece."""

    def __init__(self, path: Path):
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.size = self.model.get_piece_size()

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def id(self, piece: str) -> int | None:
        found = self.model.piece_to_id(piece)
        return None if found == self.model.unk_id() else found


class JSONTokenizer(Tokenizer):
    """A hub tokenizer: `tokenizer.json`, through the `tokenizers` library."""

    def __init__(self, path: Path):
        self.model = tokenizers.Tokenizer.from_file(str(path))
        self.model.no_truncation()  # a file may carry the padding and the limit of its training
        self.model.no_padding()
        self.size = self.model.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)

    def id(self, piece: str) -> int | None:
        return self.model.token_to_id(piece)


class ByteTokenizer(Tokenizer):
    """Stands in where weights are random and no tokenizer is at hand: bytes are ids, markers have the model's own."""

    def __init__(self, lm_config):
        self.size, self.chat = lm_config.vocab, CHATS[lm_config.family]
        self.markers = dict(self.chat.published)
        if lm_config.mask_id != self.markers[self.chat.mask]:  # the toy's: mask, end, then the rest
            others = [marker for marker in self.markers if marker not in (self.chat.mask, TEXT_END)]
            last = max(lm_config.mask_id, lm_config.end_id)
            self.markers = {marker: last + 1 + i for i, marker in enumerate(others)}
            self.markers |= {self.chat.mask: lm_config.mask_id, TEXT_END: lm_config.end_id}

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            marker = next((marker for marker in self.markers if text.startswith(marker)), None)
            ids += list(text[0].encode()) if marker is None else [self.markers[marker]]
            text = text[len(marker or " ") :]
        return ids

    def decode(self, ids: list[int]) -> str:
        names = {i: marker.encode() for marker, i in self.markers.items()}
        return b"".join(bytes([i]) if i < 256 else names.get(i, f"<{i}>".encode()) for i in ids).decode(errors="replace")

    def id(self, piece: str) -> int | None:
        return self.markers.get(piece, ord(piece) if len(piece) == 1 and piece.isascii() else None)


def load_tokenizer(path: str | Path, lm_config) -> Tokenizer:
    """The tokenizer of an LM directory, its special tokens checked against the LM's config.

    Raises ValueError: none is there, it lacks a chat marker, has one at another id than the model, or more ids than the
    model has embeddings (a tokenizer of another model).
    """
    path = Path(path)
    kinds = {"tokenizer.json": JSONTokenizer, "tokenizer.model": SentencePieceTokenizer}
    file = next((path / name for name in kinds if (path / name).is_file()), None)
    if file is None:
        raise ValueError(f"{path}: holds neither tokenizer.json nor tokenizer.model; is the download complete?")
    refuse_pointer(file)
    try:
        tokenizer = kinds[file.name](file)
    except Exception as error:  # tokenizers raises no narrower class
        raise ValueError(f"{file}: not a whole tokenizer ({error}); download it again") from error
    chat = tokenizer.chat = CHATS[lm_config.family]
    expected = {chat.mask: lm_config.mask_id, TEXT_END: lm_config.end_id}
    if lm_config.mask_id == chat.published[chat.mask]:  # a published model: all its markers are known
        expected = chat.published | expected
    for piece in chat.published:
        found = tokenizer.id(piece)
        if found is None:
            raise ValueError(
                f"{file}: has no {piece}; it is the tokenizer of another model, or of one that is not a diffusion model; "
                "download it with its weights"
            )
        if piece in expected and found != expected[piece]:
            raise ValueError(
                f"{path}: its tokenizer has {piece} at {found}, its config at {expected[piece]}; they belong to different models, download both anew"
            )
        if found >= lm_config.vocab:
            raise ValueError(f"{path}: its tokenizer has {piece} at {found}, the LM only {lm_config.vocab} embeddings")
    if tokenizer.size > lm_config.vocab:
        raise ValueError(f"{path}: its tokenizer has {tokenizer.size} ids, the LM only {lm_config.vocab} embeddings")
    return tokenizer


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt on both sides of the place where the audio goes."""

    before: list[int]
    after: list[int]


def build_prompt(tokenizer: Tokenizer, instruction: str) -> Prompt:
    """The prompt of DIFFA, the same in training and inference (paper, section 3.3), in the chat format of its LM.

    The two halves are encoded each by itself, as the release does: no token may join the text on both sides of the sound.
    The assistant's header belongs to the prompt; the release noised and scored it as part of the answer in training but
    not in inference. The literal " <audio>. " after the embeddings is a quirk of the release that its weights expect.
    """
    chat = tokenizer.chat
    opening, closing = chat.turn.split("{text}")
    before = chat.start + chat.turn.format(role="system", text=SYSTEM) + opening.format(role="user") + "This is the audio:"
    after = f" <audio>. {instruction}{closing}{chat.answer}"
    return Prompt(tokenizer.encode(before), tokenizer.encode(after))


def text_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """A user's turn of text alone, without sound, up to where the assistant begins."""
    chat = tokenizer.chat
    turns = chat.turn.format(role="system", text=SYSTEM) + chat.turn.format(role="user", text=text)
    return tokenizer.encode(chat.start + turns + chat.answer)


def encode_answers(tokenizer: Tokenizer, answers: list[str], length: int) -> Tensor:
    """Answers as ids (B, length), padded with the end of text, which is itself part of what is learned.

    Raises ValueError: an answer leaves no room for its end; it names the answer.
    """
    end = tokenizer.id(TEXT_END)
    rows = []
    for answer in answers:
        ids = tokenizer.encode(answer)
        if len(ids) >= length:
            raise ValueError(f"answer of {len(ids)} tokens does not fit {length} with its end: {answer[:60]!r}")
        rows.append(ids + [end] * (length - len(ids)))
    return torch.tensor(rows)


def decode_answer(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Text of generated ids up to the first end of turn or text."""
    ends = {tokenizer.id(TEXT_END), tokenizer.id(tokenizer.chat.turn_end)}
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return tokenizer.decode(list(ids[:stop])).strip()
