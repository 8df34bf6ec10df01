"""What adapters were trained with: recorded beside them, and compared when they are loaded."""

import sys
from pathlib import Path

from checkpoints.digests import same_weights
from checkpoints.files import WeightsError
from data import build_prompt
from encoder import FRAMES_PER_SECOND

# Where the models are if neither the command nor the adapters say so.
USUAL = {"whisper": "runs/toy/whisper", "llm": "runs/toy/llada"}
OPTIONS = {"encoder": "--whisper", "lm": "--llm", "tokenizer": "--llm"}


def model_path(
    name: str, given: str | Path | None, adapters: str | Path | None, info: dict
) -> str | Path:
    """The path of "whisper" or "llm": as given, else as recorded, else the toy run's.

    info: the config.json of the adapters, {} without one.
    """
    recorded = info.get(name)
    if given is not None or not recorded:
        return USUAL[name] if given is None else given

    # A run that was moved as a whole has its models beside its adapters.
    beside = Path(adapters).parent / Path(recorded).name
    return beside if beside.exists() and not Path(recorded).exists() else recorded


class Origins:
    """The parts of a model by their digests, compared with those that its adapters record.

    Attributes:
        found: what the model is made of: digests of encoder, LM and tokenizer, and the prompt.
    """

    def __init__(self, adapters: str | Path | None, info: dict, allow_other_parts: bool):
        """info: the adapters' config.json, {} without one; compared unless allow_other_parts."""
        self.adapters = adapters
        self.info = info
        self.allow = allow_other_parts
        self.recorded = info.get("trained_with") or {}
        self.found: dict[str, str] = {}
        if info and not self.recorded:
            unknown = "does not record the models that it was trained with; they are not compared"
            print(f"note: {adapters} {unknown}", file=sys.stderr)

    def path(self, name: str, given: str | Path | None) -> str | Path:
        """The path of "whisper" or "llm": see model_path."""
        return model_path(name, given, self.adapters, self.info)

    def window(self, seconds: float | None) -> float | None:
        """The encoder's window: as given, else as recorded. Raises WeightsError: they differ."""
        recorded = self.info.get("audio_context")
        if seconds is None or recorded is None or self.allow:
            return recorded if seconds is None else seconds
        if round((seconds - recorded) * FRAMES_PER_SECOND):
            self.refuse(f"a window of {recorded:g} s, not {seconds:g} s", "leave --audio-context")
        return seconds

    def note(self, part: str, value: str) -> None:
        """Remember what a part is. Raises WeightsError: the adapters were trained with another."""
        self.found[part] = value
        recorded = self.recorded.get(part, value)
        same = recorded == value or (part in ("encoder", "lm") and same_weights(recorded, value))
        if same or self.allow:
            return
        if part not in OPTIONS:
            self.refuse(f"the {part} {recorded!r}, not {value!r}", "train them again")
        option = OPTIONS[part]
        path = self.info.get(option[2:])
        another = f"another {part.replace('lm', 'LM')} (digest {recorded}, this one has {value})"
        self.refuse(another, f"pass {option} {path}")

    def note_text(self, tokenizer) -> None:
        """Note a tokenizer, and the prompt around the audio as text."""
        self.note("tokenizer", tokenizer.digest)
        prompt = build_prompt(tokenizer, "{instruction}")
        text = f"{tokenizer.decode(prompt.before)}{{audio}}{tokenizer.decode(prompt.after)}"
        self.note("prompt", text)

    def refuse(self, trained_with: str, advice: str) -> None:
        """Raise the error of adapters that do not belong to the model."""
        force = "or use it all the same by --force-parts (allow_other_parts=True)"
        raise WeightsError(f"{self.adapters}: was trained with {trained_with}; {advice}, {force}")
