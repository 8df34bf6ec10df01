"""The stand-in encoder: Whisper's shape, trained to hear the grammar's words and its voices.

It learns which word sounds in each frame, from eSpeak's own alignments. Four small heads on its
first block keep the voice audible there: gender, accent, speed and pitch of the training clips. The
heads are then thrown away.

Shapes: N clips, B batch, T encoder frames, M mels, F mel frames, W words, D encoder width.
"""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints.sizes import ENCODER_SIZES
from checkpoints.whisper import save_whisper
from data import load_manifest, pad_waveforms, read_audio
from encoder import (
    CONV_STRIDE,
    FRAMES_PER_SECOND,
    EncoderConfig,
    WhisperEncoder,
    encoder_frames,
    log_mel,
)
from evaluation.wer import word_error_rate
from toy import grammar
from training.loop import fit
from training.optimizers import TrainConfig
from training.order import pick_by_length
from training.run_files import minutes_of

ENCODER = TrainConfig(steps=800, batch=32, lr=4e-3, warmup=60, optimizer="muon")

# Weight of the attribute heads in the loss.
HEADS_WEIGHT = 0.3

# Standard deviation of the level that is added to a clip's log-mel.
LOUDNESS = 0.1

# A step's window ends within this many frames after its longest clip. Now and then it is whole, so
# that the silence after a clip is heard too.
WINDOW = 16
WHOLE_EVERY = 8

# Frames of 20 ms; a shorter run of one word is noise.
SHORTEST = 4


class Listener(nn.Module):
    """The encoder with its targets: words at each frame, attributes from the first block's mean."""

    def __init__(self, encoder: WhisperEncoder):
        super().__init__()
        self.encoder = encoder
        width = encoder.config.width
        self.words = nn.Linear(width, len(grammar.WORDS) + 1)  # 0 is "no word"
        self.heads = nn.ModuleDict()
        for name, values in grammar.ATTRIBUTES.items():
            self.heads[name] = nn.Linear(width, len(values))

    def forward(self, mel: Tensor, frames: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """mel (B, M, F), real frames (B,) -> logits of words (B, T, W + 1), of each attribute.

        The window may be shorter than the encoder's: T = F / 2.
        """
        states = narrowed(self.encoder, mel.shape[-1] // CONV_STRIDE)(mel)

        # Mean of the first block's states over the real frames.
        real = real_frames(frames, states[1].shape[1])[..., None]  # (B, T, 1)
        pooled = (states[1] * real).sum(dim=1) / frames[:, None]  # (B, D)

        return self.words(states[-1]), {name: head(pooled) for name, head in self.heads.items()}


def narrowed(encoder: WhisperEncoder, context: int) -> WhisperEncoder:
    """The same encoder for a window of its first `context` frames; both share their weights."""
    with torch.device("meta"):
        narrow = WhisperEncoder(replace(encoder.config, context=context))
    for name, part in encoder.named_children():
        setattr(narrow, name, part)
    narrow.positions = nn.Parameter(encoder.positions[:context], requires_grad=False)
    return narrow


def window_of_step(step: int, longest: int, context: int) -> int:
    """Frames of a step's window, whose longest clip has `longest` of the encoder's `context`."""
    if step % WHOLE_EVERY == 0:
        return context
    return min(math.ceil(longest / WINDOW) * WINDOW, context)


def real_frames(frames: Tensor, context: int) -> Tensor:
    """frames (B,) -> (B, T), true at the real frames of each clip."""
    return torch.arange(context, device=frames.device)[None] < frames[:, None]


def spectrograms(items: list[dict], config: EncoderConfig) -> tuple[Tensor, Tensor]:
    """Log-mels (N, M, F) in float16 and real frames (N,) of a manifest's clips."""
    mels = []
    frames = []
    for start in range(0, len(items), 64):
        names = [item["audio_filepath"] for item in items[start : start + 64]]
        clips = [read_audio(name) for name in names]
        waveforms, lengths = pad_waveforms(clips, config.n_samples, names)
        mels.append(log_mel(waveforms, config.n_mels).half())
        frames.append(encoder_frames(lengths))
    return torch.cat(mels), torch.cat(frames)


def word_targets(items: list[dict], context: int) -> Tensor:
    """Which word sounds in each frame, (N, T): 0 for none, else 1 + its index in grammar.WORDS."""
    index = {word: i for i, word in enumerate(grammar.WORDS, 1)}
    targets = torch.zeros(len(items), context, dtype=torch.long)
    for row, item in zip(targets, items):
        for word, start, end in item["words"]:
            row[round(start * FRAMES_PER_SECOND) : round(end * FRAMES_PER_SECOND)] = index[word]
    return targets


def read_words(logits: Tensor, frames: Tensor) -> list[str]:
    """Transcripts from frame logits (B, T, W + 1) and real frames (B,)."""
    # Mean probabilities over five frames.
    probabilities = logits.softmax(-1).transpose(1, 2)  # (B, W + 1, T)
    smooth = F.avg_pool1d(probabilities, 5, stride=1, padding=2).transpose(1, 2)  # (B, T, W + 1)

    texts = []
    for best, n in zip(smooth.argmax(dim=-1), frames):
        # Runs of one word, without short ones and silences; a repeated word counts once.
        values, counts = best[:n].unique_consecutive(return_counts=True)
        long = values[(counts >= SHORTEST) & (values > 0)].unique_consecutive()
        texts.append(" ".join(grammar.WORDS[word - 1] for word in long.tolist()))
    return texts


def attribute_labels(items: list[dict]) -> dict[str, Tensor]:
    """Labels (N,) of each attribute of a manifest's clips."""
    labels = {}
    for name, values in grammar.ATTRIBUTES.items():
        labels[name] = torch.tensor([values.index(item["attributes"][name]) for item in items])
    return labels


@torch.no_grad()
def examine_encoder(model: Listener, items: list[dict], device: str) -> dict:
    """Word error rate of frame transcripts and accuracy of each attribute head, in percent."""
    mels, frames = spectrograms(items, model.encoder.config)
    logits, heads = model(mels.float().to(device), frames.to(device))
    texts = read_words(logits.cpu(), frames)
    correct = {
        name: int((heads[name].argmax(dim=-1).cpu() == labels).sum())
        for name, labels in attribute_labels(items).items()
    }
    return {
        "word_error_rate": word_error_rate(texts, [item["transcription"] for item in items]),
        "heads": {name: 100 * n / len(items) for name, n in correct.items()},
        "items": len(items),
    }


def pretrain_encoder(corpus: Path, out: Path, seed: int, device: str) -> dict:
    """Train an encoder on a corpus and save it to OUT/whisper.

    Returns:
        the figures of `examine_encoder` on the held-out clips, and the "losses" of all steps.
    Raises:
        AudioError, ManifestError: clips that cannot be used. ValueError: the checkpoints are of
        a run with other settings.
    """
    torch.manual_seed(seed)
    config = ENCODER_SIZES["toy"]
    model = Listener(WhisperEncoder(config)).to(device)
    training = replace(ENCODER, seed=seed)

    # Inputs and targets of the whole corpus.
    train = load_manifest(corpus / "asr_train.json")
    test = load_manifest(corpus / "asr_test.json")
    mels, frames = spectrograms(train, config)
    words = word_targets(train, config.context)
    labels = attribute_labels(train)

    # Clips of similar length in a batch: the shorter its window, the faster its step.
    rows_of_step = pick_by_length(frames.numpy(), training.batch, seed)

    def loss_of_step(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.from_numpy(rows_of_step(step))
        real = frames[rows].to(device)
        T = window_of_step(step, int(frames[rows].max()), config.context)
        mel = mels[rows, :, : CONV_STRIDE * T].float().to(device)  # (B, M, F)

        # Another loudness for each clip, every time.
        mel = mel + LOUDNESS * torch.randn(len(rows), 1, 1, generator=generator).to(device)

        # Words at the real frames, attributes of each clip.
        logits, heads = model(mel, real)
        inside = real_frames(real, T)  # (B, T)
        loss = F.cross_entropy(logits[inside], words[rows, :T].to(device)[inside])
        losses = [F.cross_entropy(heads[name], labels[name][rows].to(device)) for name in heads]
        return loss + HEADS_WEIGHT * sum(losses)

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    checkpoint = out / "checkpoints" / "encoder.pt"
    manifest = (corpus / "asr_train.json").read_bytes()
    identity = {"corpus": hashlib.sha256(manifest).hexdigest()[:16]}
    losses = fit(parameters, loss_of_step, training, checkpoint, "encoder", identity=identity)

    result = examine_encoder(model.eval(), test, device)
    save_whisper(model.encoder, out / "whisper")
    minutes = minutes_of(checkpoint.parent, [checkpoint.stem])
    return result | {"losses": losses, "minutes": minutes}
