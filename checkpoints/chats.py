"""How each family of LMs writes a conversation.

Chat markers are always looked up by name in the tokenizer, never by number.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment

from checkpoints.files import first_line, read_json, read_text
from data import TEXT_END
from diffusion_lm import LMConfig

# LLaDA's markers (its tokenizer_config.json).
START = "<|startoftext|>"
HEADER = "<|start_header_id|>"
HEADER_END = "<|end_header_id|>"
TURN_END = "<|eot_id|>"
MASK = "<|mdm_mask|>"

# Those of iLLaDA and Seed-Coder.
SEED_START = "<[begin▁of▁sentence]>"
SEED_END = "<[end▁of▁sentence]>"

LLAMA_OPENING = f"{HEADER}system{HEADER_END}\n\n{{system}}{TURN_END}{HEADER}user{HEADER_END}\n\n"
CHATML_OPENING = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a family writes a conversation."""

    opening: str  # a system turn with {system}, and the user's turn up to the user's text
    answer: str  # closes the user's turn and opens the assistant's
    turn_end: str
    text_end: str = TEXT_END  # ends an answer and pads it
    mask: str = ""  # "": the token of the id that the LM's config gives
    published: dict[str, int]  # all markers, with their ids in a published tokenizer


# The families "llada" and "qwen3" have the formats of their names. A family without one has the
# first format without a mask whose markers are all in the tokenizer.
CHATS = {
    "llada": ChatFormat(
        opening=START + LLAMA_OPENING,
        answer=f"{TURN_END}{HEADER}assistant{HEADER_END}\n\n",
        turn_end=TURN_END,
        mask=MASK,
        published={
            START: 126_080,
            TEXT_END: 126_081,
            MASK: 126_336,
            HEADER: 126_346,
            HEADER_END: 126_347,
            TURN_END: 126_348,
        },
    ),
    "qwen3": ChatFormat(
        opening=CHATML_OPENING,
        # An empty thought: thinking is off.
        answer="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        turn_end="<|im_end|>",
        mask="<|mask|>",
        published={
            TEXT_END: 151_643,
            "<|im_start|>": 151_644,
            "<|im_end|>": 151_645,
            "<|mask|>": 151_669,
        },
    ),
    # SmolLM2, Qwen2.5
    "chatml": ChatFormat(
        opening=CHATML_OPENING,
        answer="<|im_end|>\n<|im_start|>assistant\n",
        turn_end="<|im_end|>",
        published={TEXT_END: 0, "<|im_start|>": 1, "<|im_end|>": 2},
    ),
    "llama3": ChatFormat(
        opening="<|begin_of_text|>" + LLAMA_OPENING,
        answer=f"{TURN_END}{HEADER}assistant{HEADER_END}\n\n",
        turn_end=TURN_END,
        text_end="<|end_of_text|>",
        published={
            "<|begin_of_text|>": 128_000,
            "<|end_of_text|>": 128_001,
            HEADER: 128_006,
            HEADER_END: 128_007,
            TURN_END: 128_009,
        },
    ),
    # Seed-Coder's, which has iLLaDA's vocabulary. A chat template in the directory comes first.
    "seed": ChatFormat(
        opening=f"{SEED_START}system\n{{system}}{SEED_END}{SEED_START}user\n",
        answer=f"{SEED_END}{SEED_START}assistant\n",
        turn_end=SEED_END,
        text_end=SEED_END,
        published={SEED_START: 0, SEED_END: 2},
    ),
}


def chat_format(markers: dict[str, int], lm_config: LMConfig, file: Path) -> ChatFormat:
    """The chat format of the LM's family, or else the one whose markers the tokenizer has.

    Args:
        markers: the tokenizer's control tokens and their ids. file: the tokenizer's; a template of
            iLLaDA lies beside it.
    Raises:
        ValueError: the tokenizer has the markers of no known format, or no mask.
    """
    # The ids of mask and end are in the LM's config. The mask of an adapted LM has no usual name.
    names = {i: marker for marker, i in markers.items()}
    mask = names.get(lm_config.mask_id)
    end = names.get(lm_config.end_id)
    usual = CHATS.get(lm_config.family)

    # Published masks have their names.
    if usual and (usual.mask in markers or lm_config.family == "llada" or mask is None):
        return usual
    if mask is None:
        raise ValueError(
            f"{file}: id {lm_config.mask_id}, the mask by the LM's config, is no added token; "
            "download both again, or make a diffusion LM with python -m training.adapt_lm"
        )

    # A template beside the tokenizer says more than its markers.
    if lm_config.family == "illada" and end and (template := read_template(file.parent)):
        return from_template(template, file.parent, mask, end, markers)

    # Which format has all its markers there?
    known = [usual] if usual else [chat for chat in CHATS.values() if not chat.mask]
    for chat in known:
        others = [marker for marker in chat.published if marker != chat.mask]
        if markers.keys() >= set(others):
            published = {marker: markers[marker] for marker in (*others, mask)}
            return replace(chat, mask=mask, published=published)
    wanted = ", nor ".join(" ".join(chat.published) for chat in known)
    advice = "it is the tokenizer of another model, or of one that was not trained to chat"
    raise ValueError(f"{file}: has no {wanted}; {advice}")


def read_template(path: Path) -> str | None:
    """The chat template of a directory of the hub, None without one."""
    if (path / "chat_template.jinja").is_file():
        return read_text(path / "chat_template.jinja")

    # Older directories have it in a config.
    config = path / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.is_file() else None

    # Several templates have names.
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def from_template(
    template: str, path: Path, mask: str, end: str, markers: dict[str, int]
) -> ChatFormat:
    """The chat format with the texts that a template of the hub writes around a user's text.

    A template without a system turn gets the system's text at the start of the user's.

    Args:
        path: the directory. mask, end: two of the tokenizer's markers.
    Raises:
        ValueError: the template fails, or writes neither.
    """
    system = {"role": "system", "content": "{system}"}
    user = {"role": "user", "content": "{user}"}
    merged = {"role": "user", "content": "{system}\n\n{user}"}

    # A template is code of a stranger: it runs in a sandbox, without Python's objects.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    options = {
        "bos_token": SEED_START if SEED_START in markers else "",
        "eos_token": end,
        "add_generation_prompt": True,
        "enable_thinking": False,
    }

    # Each text must appear once. What stands around them is the format.
    reason = "it leaves texts out"
    for turns in ([system, user], [merged]):
        try:
            text = environment.from_string(template).render(messages=turns, **options)
        except Exception as error:  # a template may raise anything
            reason = first_line(error)
            continue

        opening, _, answer = text.partition("{user}")
        if opening.count("{system}") == 1 and text.count("{user}") == 1:
            return ChatFormat(
                opening=opening,
                answer=answer,
                turn_end=end,
                text_end=end,
                mask=mask,
                published={marker: markers[marker] for marker in (mask, end)},
            )
    raise ValueError(f"{path}: its chat template does not write a user's turn ({reason})")
