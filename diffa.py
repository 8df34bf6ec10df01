"""The four parts put together: frozen encoder, two adapters, frozen language model.

hear:   waveform -> hidden states -> audio embeddings        (paper, section 3.1)
splice: prompt text with the audio embeddings in its middle  (paper, figure 1)
loss:   the masked-diffusion loss of a batch of answers      (paper, section 3.2)

Shapes: B batch, S samples, T encoder frames, A audio embeddings, P prompt positions, G answer tokens, D LM width.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints import weights
from adapters import TAPS, AcousticAdapter, AdapterConfig, SemanticAdapter
from checkpoints.tokenizer import ByteTokenizer, Prompt, load_tokenizer
from diffusion_lm import DiffusionLM, diffusion_loss, noise, noise_levels
from encoder import WhisperEncoder, encoder_frames, log_mel

# What stands where the audio goes, by stage (paper, section 3.3). "semantic" is the ablation without the acoustic adapter.
AUDIO_PARTS = {
    "stage1": ("prompts", "semantic"),
    "stage2": ("acoustic", "semantic"),
    "semantic": ("semantic",),
}


@dataclass(frozen=True)
class Spliced:
    """Prompts as the language model reads them, left-padded to one length P."""

    embeddings: Tensor  # (B, P, D)
    mask: Tensor  # (B, P) true where a position is real
    is_text: Tensor  # (B, P) true where a token stands, false at sound and padding


class DIFFA(nn.Module):
    """Encoder, adapters and LM. Only `prompts`, `semantic` and `acoustic` ever train."""

    def __init__(self, encoder: WhisperEncoder, lm: DiffusionLM, config: AdapterConfig, stage: str = "stage1"):
        super().__init__()
        if stage not in AUDIO_PARTS:
            raise ValueError(f"stage {stage!r} is none of {', '.join(AUDIO_PARTS)}")
        self.config, self.stage = config, stage
        self.encoder, self.lm = encoder.requires_grad_(False), lm.requires_grad_(False)
        self.prompts = nn.Parameter(torch.randn(config.n_prompts, config.lm_width))
        self.semantic = SemanticAdapter(config)
        self.acoustic = AcousticAdapter(config)
        self.audio_context = None  # seconds, where the encoder's window was cut

    @torch.no_grad()
    def match_embedding_scale(self, parts: tuple[str, ...]) -> None:
        """Start the new parts' embeddings at the size of the LM's token embeddings; at tiny scale training needs it."""
        rms = self.lm.embedding.weight.float().pow(2).mean().sqrt().item()
        if "prompts" in parts:
            self.prompts.normal_(std=rms)
        if "semantic" in parts:
            self.semantic.norm.weight.fill_(rms)
        if "acoustic" in parts:
            self.acoustic.proj.weight.normal_(std=rms * self.config.encoder_width**-0.5)
            self.acoustic.proj.bias.zero_()

    def trainable(self) -> dict[str, nn.Module | nn.Parameter]:
        """The parts that this stage trains, by name."""
        return {name: getattr(self, name) for name in AUDIO_PARTS[self.stage]}

    @property
    def used_states(self) -> tuple[int, ...]:
        """Indices of the hidden states that any adapter reads."""
        return tuple(sorted({*self.config.taps, self.encoder.config.n_layers}))

    @torch.no_grad()
    def encode(self, waveforms: Tensor, n_samples: Tensor) -> tuple[list[Tensor], Tensor]:
        """Frozen half of hearing: waveforms (B, S), each padded with zeros to the encoder's context, to hidden states.

        Returns:
            all n_layers + 1 hidden states (B, T, D_w), and the real encoder frames (B,) of clips of n_samples (B,).
        """
        states = self.encoder(log_mel(waveforms, self.encoder.config.n_mels))
        return [state.float() for state in states], encoder_frames(n_samples)  # float32, as the adapters are

    def hear(self, states: list[Tensor], frames: Tensor) -> tuple[Tensor, Tensor]:
        """Trained half of hearing: hidden states to audio embeddings (B, A, D) and their mask (B, A)."""
        B = len(frames)
        pieces, masks = [], []
        for part in AUDIO_PARTS[self.stage]:
            if part == "semantic":
                embeddings, mask = self.semantic(states[-1], frames)
            else:
                embeddings = self.prompts.expand(B, -1, -1) if part == "prompts" else self.acoustic(states)
                mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
            pieces.append(embeddings)
            masks.append(mask)
        return torch.cat(pieces, dim=1), torch.cat(masks, dim=1)

    def splice(self, prompts: list[Prompt], audio: Tensor, audio_mask: Tensor) -> Spliced:
        """Put audio (B, A, D) between the two halves of each prompt; pads on the left, so that answers line up."""
        device, rows, texts = audio.device, [], []
        for prompt, sound, real in zip(prompts, audio, audio_mask):
            before = self.lm.embed(torch.tensor(prompt.before, dtype=torch.long, device=device))
            after = self.lm.embed(torch.tensor(prompt.after, dtype=torch.long, device=device))
            sound = sound[real].to(before.dtype)  # (A_real, D): padding inside the splice is squeezed out
            rows.append(torch.cat([before, sound, after]))  # (P_item, D)
            flags = [True] * len(before) + [False] * len(sound) + [True] * len(after)
            texts.append(torch.tensor(flags, device=device))
        P = max(len(row) for row in rows)
        pad = [P - len(row) for row in rows]
        mask = torch.tensor([[False] * n + [True] * (P - n) for n in pad], device=device)  # (B, P)
        return Spliced(
            embeddings=torch.stack([nn.functional.pad(row, (0, 0, n, 0)) for row, n in zip(rows, pad)]),  # (B, P, D)
            mask=mask,
            is_text=torch.stack([nn.functional.pad(text, (n, 0)) for text, n in zip(texts, pad)]),  # (B, P)
        )

    def loss(
        self,
        heard: tuple[Tensor, Tensor],
        prompts: list[Prompt],
        answer_ids: Tensor,
        generator: torch.Generator,
        t_min: float = 0.0,
        stratified: bool = False,
    ) -> Tensor:
        """Masked-diffusion loss of answers (B, G) to heard clips (audio embeddings and mask, from `hear`); a scalar."""
        prompt = self.splice(prompts, *heard)
        answer_ids = answer_ids.to(prompt.mask.device)
        t = noise_levels(len(answer_ids), generator, t_min, stratified)
        noisy_ids = noise(answer_ids, t, self.lm.config.mask_id, generator)
        return diffusion_loss(self.lm, prompt.embeddings, prompt.mask, answer_ids, noisy_ids, t, answer_ids.numel())

    @classmethod
    def from_pretrained(
        cls, whisper, llm, adapters=None, stage=None, dtype=None, device="cpu", audio_context=None, random_weights=None, **shapes
    ):
        """A DIFFA from directories, with its tokenizer in `.tokenizer`.

        Args:
            whisper, llm: directories in the hub's formats (whisper: OpenAI's `.pt` too). adapters: a directory of ours or
                the release's file; None starts new adapters, of the paper's shapes but for AdapterConfig fields in `shapes`.
            shapes: with `adapters`, only `taps`: hidden states that a release taps, where not those of adapters.TAPS.
            stage: a key of AUDIO_PARTS; by default what the adapters' directory says, else stage 2 when they hold an
                acoustic adapter or weights are random, else stage 1.
            dtype: of the frozen parts; None: the LM's as in its file, the encoder's float32. Adapters stay float32.
            audio_context: seconds of the encoder's window; None: what the adapters were trained with, else all of it.
            random_weights: named sizes, "small+llada-8b", to be made up; the three paths are then not looked at.
        Raises:
            WeightsError: files absent, damaged or of other shapes; ValueError: parts that do not fit each other.
        """
        parts, info = {}, {}
        # The large part comes last: what does not fit is found before it is read.
        if random_weights:
            encoder, lm = weights.random_pieces(random_weights, dtype, device, audio_context)
            tokenizer, lm_config, adapters = ByteTokenizer(lm.config), lm.config, None
        else:
            weights.require(whisper=whisper, llm=llm, adapters=adapters)
            encoder = weights.load_whisper(whisper, dtype or torch.float32, device)
            lm_config = weights.read_lm_config(llm)
            tokenizer = load_tokenizer(llm, lm_config)
        widths = {"encoder_width": encoder.config.width, "lm_width": lm_config.width}
        if adapters is None:
            if encoder.config.n_layers not in TAPS and "taps" not in shapes:
                raise ValueError(f"no tapped layers are known for {encoder.config.n_layers} encoder layers; pass taps=")
            taps = TAPS.get(encoder.config.n_layers)
            config = AdapterConfig(**{**widths, "n_heads": encoder.config.n_heads, "taps": taps, **shapes})
        else:
            if other := sorted(shapes.keys() - {"taps"}):
                raise ValueError(f"{', '.join(other)}: of adapters that are read from {adapters} the shapes are known")
            config, parts, info = weights.load_adapters(adapters, encoder.config.n_heads, encoder.config.n_layers, shapes.get("taps"))
            for name, width in widths.items():
                if getattr(config, name) != width:
                    made_for = f"adapters were made for {name} {getattr(config, name)}, this one has {width}"
                    raise ValueError(f"{adapters}: {made_for}; take the models that they were trained with, or train new ones")
        if max(config.taps) > encoder.config.n_layers:
            raise ValueError(f"taps {config.taps} reach past the encoder's {encoder.config.n_layers} layers; these adapters want a deeper Whisper")
        if not random_weights:
            audio_context = info.get("audio_context") if audio_context is None else audio_context
            encoder = encoder if audio_context is None else encoder.shorten(audio_context)
            lm = weights.load_lm(llm, dtype, device)
        stage = stage or info.get("stage") or ("stage2" if "acoustic" in parts or random_weights else "stage1")
        model = cls(encoder, lm, config, stage)
        for name, part in parts.items():
            setattr(model, name, part)
        model.semantic.to(device).float()
        model.acoustic.to(device).float()
        model.prompts = nn.Parameter(model.prompts.data.to(device).float())
        model.tokenizer, model.audio_context = tokenizer, audio_context
        return model

    def save(self, path: str | Path, whisper: str, llm: str) -> None:
        """Write the trained parts, where the frozen ones came from, and the window they were trained with when it was cut."""
        info = {"stage": self.stage, "whisper": str(whisper), "llm": str(llm)}
        info |= {"audio_context": self.audio_context} if self.audio_context is not None else {}
        weights.save_adapters(path, self.config, self.trainable(), info)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_arguments(parser: argparse.ArgumentParser, adapters: str) -> None:
    """The options by which every command finds its weights; the defaults are the toy run."""
    parser.add_argument("--whisper", default="runs/toy/whisper", help="Whisper: directory (hub format), or OpenAI's .pt")
    parser.add_argument("--llm", default="runs/toy/llada", help="LLaDA or Qwen3-diffusion directory (hub format)")
    parser.add_argument("--adapters", default=adapters, help="trained adapters: directory, or the release's file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the frozen encoder and LM (default: the LM as in its file, the encoder float32)")
    parser.add_argument("--audio-context", type=float, metavar="SECONDS", help="hear a window shorter than Whisper's 30 s")
    parser.add_argument("--random-weights", metavar="SIZE", help="make the frozen parts up, such as small+llada-8b: for speed and memory")


def model_options(args: argparse.Namespace) -> dict:
    """What add_model_arguments parsed, beside the paths, as arguments of DIFFA.from_pretrained."""
    dtype = DTYPES[args.dtype] if args.dtype else None
    return {"device": args.device, "dtype": dtype, "audio_context": args.audio_context, "random_weights": args.random_weights}
