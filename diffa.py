"""The parts put together: frozen encoder, trained adapters, frozen language model.

DIFFA (arXiv 2507.18452, figure 2) makes a masked-diffusion LM listen in three steps:

    encode: waveform -> every hidden state of the frozen Whisper encoder
    hear:   hidden states -> audio embeddings, by the parts that train: adapters and prompts
    splice: prompt text with the audio embeddings in its middle

The loss of a spliced prompt is diffusion_lm.diffusion_loss; sampler.generate answers it.

Shapes: B batch, S samples, T encoder frames, D_w encoder width, A audio embeddings, Q acoustic
queries, P prompt positions, D LM width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters import AcousticAdapter, AdapterConfig, SemanticAdapter
from data import Prompt, left_pad
from diffusion_lm import DiffusionLM
from encoder import WhisperEncoder, encoder_frames, log_mel

# What stands where the audio goes, by stage; only these parts train. Stage 1 teaches the words: 20
# learned prompts announce to the LM the embeddings after them. Stage 2 drops the prompts, and the
# acoustic embeddings stand in their place. "semantic" is the ablation of table 5.
AUDIO_PARTS = {
    "stage1": ("prompts", "semantic"),
    "stage2": ("acoustic", "semantic"),
    "semantic": ("semantic",),
}

Part = nn.Parameter | nn.Module


@dataclass(frozen=True, kw_only=True)
class Spliced:
    """Prompts as the language model reads them, left-padded to one length P."""

    embeddings: Tensor  # (B, P, D)
    mask: Tensor  # (B, P), true where a position is real
    is_text: Tensor  # (B, P), true at tokens, false at audio and padding


def new_parts(config: AdapterConfig, names: tuple[str, ...]) -> dict[str, Part]:
    """Newly drawn parts, by name."""
    # All three are drawn, in one order, whichever are named: a seed gives a part the same weights
    # in every stage and ablation.
    drawn = {
        "prompts": nn.Parameter(torch.randn(config.n_prompts, config.lm_width)),
        "semantic": SemanticAdapter(config),
        "acoustic": AcousticAdapter(config),
    }
    return {name: drawn[name] for name in names}


@torch.no_grad()
def match_embedding_scale(parts: dict[str, Part], lm: DiffusionLM) -> None:
    """Scale new parts, in place, to the RMS of the LM's token embeddings: ours, for short runs."""
    rms = lm.embedding.weight.float().pow(2).mean().sqrt().item()
    if "prompts" in parts:
        parts["prompts"].normal_(std=rms)

    # Each adapter ends in a layer that sets the scale of its embeddings.
    if "semantic" in parts:
        parts["semantic"].norm.weight.fill_(rms)
    if "acoustic" in parts:
        proj = parts["acoustic"].proj
        proj.weight.normal_(std=rms * proj.in_features**-0.5)
        proj.bias.zero_()


class DIFFA(nn.Module):
    """Encoder, adapters and LM. Encoder and LM are frozen here; only the `parts` ever train."""

    def __init__(
        self,
        encoder: WhisperEncoder,
        lm: DiffusionLM,
        tokenizer,
        config: AdapterConfig,
        parts: dict[str, Part],
        answer_length: int | None = None,
        made_of: dict[str, str] | None = None,
    ):
        """tokenizer: of the LM (checkpoints/tokenizer.py). parts: those of one stage, by name.
        answer_length: tokens of the answers that the parts were trained with, if known.
        made_of: digests of what they were trained with (checkpoints/origins.py), saved with them.
        ValueError: the parts are those of no stage in AUDIO_PARTS.
        """
        super().__init__()
        audio_parts = set(parts) - {"lora"}
        stages = [stage for stage, names in AUDIO_PARTS.items() if set(names) == audio_parts]
        if not stages:
            raise ValueError(f"parts {', '.join(parts)} are those of no stage: {AUDIO_PARTS}")

        self.stage = stages[0]  # the name of this set of parts
        self.tokenizer = tokenizer
        self.config = config
        self.answer_length = answer_length
        self.made_of = made_of or {}

        # Frozen: their weights get no gradient. Gradients flow through the LM to the adapters.
        self.encoder = encoder.requires_grad_(False)
        self.lm = lm.requires_grad_(False)

        # Trained.
        self.prompts = parts.get("prompts")
        self.acoustic = parts.get("acoustic")
        self.semantic = parts["semantic"]
        self.lora = parts.get("lora")  # DIFFA-2's third stage: attached to the LM

    @classmethod
    def from_pretrained(cls, whisper=None, llm=None, adapters=None, **options) -> "DIFFA":
        """A DIFFA from directories in the hub's formats; see checkpoints.model.load_diffa."""
        from checkpoints.model import load_diffa

        return load_diffa(whisper, llm, adapters, **options).eval()

    def answer(self, clips, questions, **options) -> list[str]:
        """Texts that answer questions about clips; see evaluation.clips.answer_clips.

        model = DIFFA.from_pretrained(adapters="toy/weights/stage2")
        model.answer(["a.wav", "b.wav"], "Describe the speech.")  # two texts

        A clip is a path, or a waveform (S,) at 16 kHz. One question, or as many as clips.
        """
        from evaluation.clips import answer_clips

        return answer_clips(self, clips, questions, **options)

    @property
    def device(self) -> torch.device:
        """Where the adapters are."""
        return self.semantic.norm.weight.device

    @property
    def read_states(self) -> tuple[int, ...]:
        """Indices of the encoder's hidden states that the parts read."""
        last = self.encoder.config.n_layers
        taps = self.config.taps if self.acoustic is not None else ()
        return tuple(sorted({*taps, last}))

    def trained_parts(self) -> dict[str, Part]:
        """What trains, by name, in the order of the prompt."""
        names = (*AUDIO_PARTS[self.stage], *(["lora"] if self.lora is not None else []))
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def encode(self, waveforms: Tensor, n_samples: Tensor) -> tuple[list[Tensor], Tensor]:
        """Frozen half of hearing: n_layers + 1 hidden states (B, T, D_w) and real frames (B,).

        waveforms: (B, S) at 16 kHz, each padded with zeros to the encoder's context. n_samples:
        (B,) real samples of each. The states are in float32, as the adapters are.
        """
        # Waveform -> log-mel (B, M, F) -> hidden states.
        states = self.encoder(log_mel(waveforms, self.encoder.config.n_mels))
        return [state.float() for state in states], encoder_frames(n_samples)

    def hear(self, states: list[Tensor], frames: Tensor) -> tuple[Tensor, Tensor]:
        """Trained half of hearing, from the states and real frames that `encode` gives.

        Returns audio embeddings (B, A, D) and their mask (B, A), true where one is real. First come
        the prompts or the acoustic embeddings, never padded, then the semantic embeddings.
        """
        # The words, from the last hidden state.
        audio, mask = self.semantic(states[-1], frames)  # (B, A_words, D), (B, A_words)

        # What stands before them: stage 1's prompts, or the voice from the tapped states.
        if self.prompts is not None:
            first = self.prompts.expand(len(frames), -1, -1)  # (B, 20, D)
        elif self.acoustic is not None:
            first = self.acoustic(states)  # (B, Q, D)
        else:
            return audio, mask

        first_mask = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
        # One sequence (B, A, D): A = 20 + A_words in stage 1, Q + A_words in stage 2.
        return torch.cat([first, audio], dim=1), torch.cat([first_mask, mask], dim=1)


def splice(
    lm: DiffusionLM, prompts: list[Prompt], audio: Tensor | None, audio_mask: Tensor | None
) -> Spliced:
    """Put the audio embeddings between the two halves of each prompt (figure 2).

    prompts: B prompts (data.build_prompt). audio: (B, A, D) embeddings and audio_mask: (B, A), true
    where one is real, as DIFFA.hear gives them; both None for prompts of text alone. The result is
    left-padded to one length.
    """
    # Padding inside the audio is squeezed out, so an item does not depend on its neighbours.
    n_audio = [0] * len(prompts) if audio is None else audio_mask.sum(dim=1).tolist()

    # Token ids with room for the audio between the halves of the text, P_i positions an item.
    rows = []
    kinds = []
    for prompt, n in zip(prompts, n_audio):
        rows.append(torch.tensor([*prompt.before, *[0] * n, *prompt.after], dtype=torch.long))
        kinds.append(torch.ones(len(rows[-1]), dtype=torch.bool))
        kinds[-1][len(prompt.before) : len(prompt.before) + n] = False

    device = lm.embedding.weight.device
    ids, mask = (padded.to(device) for padded in left_pad(rows))  # (B, P), (B, P)
    is_text = left_pad(kinds)[0].to(device)  # (B, P)

    # The text, then the audio of all items into its room: two copies. One copy for each item would
    # take B backward passes through the whole of `audio`.
    embeddings = lm.embed(ids).masked_fill(~is_text[..., None], 0)  # (B, P, D)
    if audio is not None:
        embeddings[mask & ~is_text] = audio[audio_mask].to(embeddings.dtype)
    return Spliced(embeddings=embeddings, mask=mask, is_text=is_text)
