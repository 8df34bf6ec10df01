"""Tiny stand-ins for the two downloads: a Whisper-shaped encoder and a LLaDA-shaped LM, saved in the hub's formats.

The encoder learns which word sounds in each frame, from eSpeak's own alignments, and keeps hearing voices through four
small heads on its first block (gender, accent, speed, pitch of the training voices); the heads are then thrown away.

The LM learns to answer about a clip when what is known of the clip stands as text where the audio will go: attribute
words, then the sentence, half of the time stretched as speech is (words repeated, gaps between). Next-token first, which
finds copying by far the fastest; the same weights then go on as masked diffusion. The next-token model is kept beside it
(the twin of the paper's backbone ablation is trained for longer, by autoregressive.py).

    python -m toy.pretrain --corpus runs/toy/corpus --out runs/toy            both; on a CPU side by side
    python -m toy.pretrain lm --out runs/toy                                  one of them

Shapes: B batch, T encoder frames, M mels, W words, G answer tokens.
"""

import argparse
import functools
import json
import math
import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from toy import grammar
from checkpoints import weights
from training.clips import pick
from data import AudioError, ManifestError, load_manifest, pad_waveforms, read_audio, word_error_rate
from checkpoints.tokenizer import MASK, TEXT_END, Prompt, decode_answer, encode_answers
from diffa import Spliced
from diffusion_lm import SIZES as LM_SIZES
from diffusion_lm import DiffusionLM, LMConfig, diffusion_loss, next_token_loss, noise, noise_levels
from encoder import CONV_STRIDE, HOP, SAMPLE_RATE, WhisperEncoder, encoder_frames, log_mel
from encoder import SIZES as ENCODER_SIZES
from toy.grammar import ANSWER_LENGTH as G
from toy.imitation import GAP, Prompts, as_heard, draw_item, pad_prompts, train_tokenizer
from sampler import Generation, SamplerConfig, generate
from training.loop import TrainConfig, fit

ENCODER = TrainConfig(steps=800, batch=32, lr=4e-3, warmup=60, optimizer="muon")
NEXT_TOKEN = TrainConfig(steps=500, batch=32, lr=2e-3, warmup=50, optimizer="muon")
DIFFUSION = TrainConfig(steps=800, batch=32, lr=2e-3, warmup=50, optimizer="muon")
# At most, while the LM is short of the aim; at more than this rate what it lacked is learned and something else forgotten.
MORE, ROUNDS = TrainConfig(steps=200, batch=32, lr=5e-4, warmup=30, optimizer="muon"), 3
LM_T_MIN = 0.3  # least noise level: with few masks the rest of the answer tells the word, and the prompt goes unread
MIXED = 0.7  # most of a word's embedding that is other words' (heard_text.as_heard)
HEADS_WEIGHT = 0.3  # of the attribute heads in the encoder's loss
WANTED = 0.5  # of an extra round's questions, the share that is of the kinds that the LM lacks
N_CHECK = 200  # unseen prompts for each figure of the LM
# Percent, at most and at least: no adapter can mend what the LM cannot read.
AIM = {"copy_error": 1.0, "oracle": 99.0}  # the LM trains on until it gets there
GATE = {"copy_error": 3.0, "oracle": 98.0}  # with less, nothing is trained on it
Decoding = Callable[[DiffusionLM, Spliced], Generation]  # from prompts to answers of G tokens
FRAME_RATE = SAMPLE_RATE / HOP / CONV_STRIDE  # encoder frames a second


# ---- the encoder
class Listener(nn.Module):
    """The encoder with what teaches it: a word head on each frame, attribute heads on the pooled first block."""

    def __init__(self, encoder: WhisperEncoder):
        super().__init__()
        self.encoder = encoder
        width = encoder.config.width
        self.words = nn.Linear(width, len(grammar.WORDS) + 1)  # 0 is "no word"
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in grammar.ATTRIBUTES.items()})

    def forward(self, mel: Tensor, frames: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """mel (B, M, F), real frames (B,) -> word logits (B, T, W + 1) and attribute logits, each (B, values)."""
        states = self.encoder(mel)
        real = (torch.arange(states[1].shape[1], device=mel.device)[None] < frames[:, None])[..., None]  # (B, T, 1)
        pooled = (states[1] * real).sum(dim=1) / frames[:, None]  # (B, D)
        return self.words(states[-1]), {name: head(pooled) for name, head in self.heads.items()}


def spectrograms(items: list[dict], n_samples: int, n_mels: int) -> tuple[Tensor, Tensor]:
    """Log-mels (N, M, F) in float16 and real frames (N,) of a manifest's clips."""
    mels, frames = [], []
    for start in range(0, len(items), 64):
        names = [item["audio_filepath"] for item in items[start : start + 64]]
        waveforms, lengths = pad_waveforms([read_audio(name) for name in names], n_samples, names)
        mels.append(log_mel(waveforms, n_mels).half())
        frames.append(encoder_frames(lengths))
    return torch.cat(mels), torch.cat(frames)


def word_targets(items: list[dict], context: int) -> Tensor:
    """Which word sounds in each frame, (N, T): 0 for none, else 1 + its place in grammar.WORDS."""
    index = {word: i + 1 for i, word in enumerate(grammar.WORDS)}
    targets = torch.zeros(len(items), context, dtype=torch.long)
    for row, item in zip(targets, items):
        for word, start, end in item["words"]:
            row[round(start * FRAME_RATE) : round(end * FRAME_RATE)] = index[word]
    return targets


def read_words(logits: Tensor, frames: Tensor, shortest: int = 4) -> list[str]:
    """Words of clips from frame logits (B, T, W + 1): runs of one word, those under `shortest` frames (80 ms) dropped."""
    texts = []
    smooth = F.avg_pool1d(logits.softmax(-1).transpose(1, 2), 5, stride=1, padding=2).transpose(1, 2)  # (B, T, W + 1)
    for best, n in zip(smooth.argmax(dim=-1), frames):
        values, counts = best[:n].unique_consecutive(return_counts=True)
        kept = [v for v, c in zip(values.tolist(), counts.tolist()) if v and c >= shortest]
        words = [w for i, w in enumerate(kept) if i == 0 or kept[i - 1] != w]
        texts.append(" ".join(grammar.WORDS[w - 1] for w in words))
    return texts


def pretrain_encoder(corpus: Path, out: Path, seed: int, device: str) -> dict:
    """Train and save `out/whisper`; returns its word error rate and attribute accuracies on the held-out clips."""
    torch.manual_seed(seed)
    config = ENCODER_SIZES["toy"]
    model = Listener(WhisperEncoder(config)).to(device)
    train, test = load_manifest(corpus / "asr_train.json"), load_manifest(corpus / "asr_test.json")
    mels, frames = spectrograms(train, config.n_samples, config.n_mels)
    words = word_targets(train, config.context)
    labels = {
        name: torch.tensor([values.index(item["attributes"][name]) for item in train])
        for name, values in grammar.ATTRIBUTES.items()
    }
    training = replace(ENCODER, seed=seed)

    def loss_of_step(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.from_numpy(pick(step, len(train), training.batch, seed))
        mel, real, target = mels[rows].float().to(device), frames[rows].to(device), words[rows].to(device)
        mel = mel + 0.1 * torch.randn(len(rows), 1, 1, generator=generator).to(device)  # loudness
        logits, heads = model(mel, real)
        inside = torch.arange(logits.shape[1], device=device)[None] < real[:, None]  # (B, T)
        loss = F.cross_entropy(logits[inside], target[inside])
        return loss + HEADS_WEIGHT * sum(F.cross_entropy(heads[n], labels[n][rows].to(device)) for n in heads)

    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    losses = fit(parameters, loss_of_step, training, out / "checkpoints" / "encoder.pt", "1/4 encoder")
    model.eval()
    mels, frames = spectrograms(test, config.n_samples, config.n_mels)
    said, right = [], dict.fromkeys(grammar.ATTRIBUTES, 0)
    with torch.no_grad():
        for start in range(0, len(test), 64):
            batch = slice(start, start + 64)
            logits, heads = model(mels[batch].float().to(device), frames[batch].to(device))
            said += read_words(logits.cpu(), frames[batch])
            for name, values in grammar.ATTRIBUTES.items():
                guesses = [values[i] for i in heads[name].argmax(dim=-1).tolist()]
                right[name] += sum(g == item["attributes"][name] for g, item in zip(guesses, test[batch]))
    weights.save_whisper(model.encoder, out / "whisper")
    result = {"word_error_rate": word_error_rate(said, [item["transcription"] for item in test])}
    return result | {"heads": {n: 100 * r / len(test) for n, r in right.items()}, "items": len(test), "losses": losses}


# ---- the language model
def by_threshold(lm: DiffusionLM, prompt: Spliced) -> Generation:
    """How a diffusion LM is asked."""
    return generate(lm, prompt, SamplerConfig(G, G, G, "threshold", 0.9))


def ask_text(
    lm: DiffusionLM, tokenizer, items: list[tuple[tuple[Prompt, list[int]], str]], device: str, decode: Decoding = by_threshold
) -> list[str]:
    """The LM's answers to prompts of text alone."""
    said = []
    for start in range(0, len(items), 100):
        prompts = pad_prompts(lm, [prompt for prompt, _ in items[start : start + 100]], device)
        out = decode(lm, Spliced(lm.embed(prompts.ids), prompts.mask, prompts.mask))
        said += [decode_answer(tokenizer, ids) for ids in out.ids.tolist()]
    return said


def new_lm(config: LMConfig, seed: int, device: str) -> DiffusionLM:
    """The LM that has learned nothing yet; a seed always gives the same weights."""
    torch.manual_seed(seed)
    lm = DiffusionLM(config)
    nn.init.normal_(lm.embedding.weight, std=0.2)
    return lm.to(device)


def phases(seed: int) -> list[TrainConfig]:
    """What an LM goes through at most: next tokens, masked diffusion, and as many rounds more as it may need."""
    more = [replace(MORE, seed=seed + 2000 + n) for n in range(ROUNDS)]
    return [replace(NEXT_TOKEN, seed=seed), replace(DIFFUSION, seed=seed + 1000), *more]


def batch_of(lm: DiffusionLM, tokenizer, step: int, training: TrainConfig, wanted: list[str], device: str) -> tuple[Prompts, Tensor]:
    """Prompts of text and answers (B, G) of a phase's step; a share WANTED of them of the wanted kinds, when there are any."""
    rng = random.Random(f"{training.seed} {step}")
    # Plain and stretched prompts take turns: a batch of one sort is padded less.
    kinds = [rng.choice(wanted) if wanted and rng.random() < WANTED else None for _ in range(training.batch)]
    items = [draw_item(tokenizer, rng, held_out=False, kind=kind, stretched=step % 2 == 1) for kind in kinds]
    prompts = pad_prompts(lm, [prompt for prompt, _ in items], device)
    answers = encode_answers(tokenizer, [answer for _, answer in items], G).to(device)
    return prompts, answers


def pretrain_lm(out: Path, seed: int, device: str) -> dict:
    """Train and save `out/llada` and `out/next_token`; returns copy error and oracle accuracies on unseen sentences."""
    tokenizer = train_tokenizer(out / "llada" / "tokenizer.model", seed)
    config = replace(LM_SIZES["toy"], vocab=tokenizer.size, mask_id=tokenizer.id(MASK), end_id=tokenizer.id(TEXT_END))
    lm, gap = new_lm(config, seed, device), tokenizer.id(GAP)

    def next_token(step: int, generator: torch.Generator) -> Tensor:
        prompts, answers = batch_of(lm, tokenizer, step, first, [], device)
        return next_token_loss(lm, lm.embed(prompts.ids), prompts.mask, answers, answers.numel())

    def masked(training: TrainConfig, wanted: list[str], step: int, generator: torch.Generator) -> Tensor:
        prompts, answers = batch_of(lm, tokenizer, step, training, wanted, device)
        embeddings = as_heard(lm, prompts, gap, MIXED, generator)
        t = noise_levels(len(answers), generator, t_min=LM_T_MIN, stratified=True)
        noisy = noise(answers, t, config.mask_id, generator)
        return diffusion_loss(lm, embeddings, prompts.mask, answers, noisy, t, answers.numel())

    def set_causal(value: bool) -> None:
        lm.config = replace(config, causal=value)

    first, second, *more = phases(seed)
    set_causal(True)
    checkpoints = out / "checkpoints"
    losses = fit(dict(lm.named_parameters()), next_token, first, checkpoints / "next_token.pt", "2/4 LM, next token")
    weights.save_llada(lm, out / "next_token")
    (out / "next_token" / "tokenizer.model").write_bytes((out / "llada" / "tokenizer.model").read_bytes())
    set_causal(False)
    title, loss = "2/4 LM, diffusion", functools.partial(masked, second, [])
    losses += fit(dict(lm.named_parameters()), loss, second, checkpoints / "lm.pt", title)
    result, asked = examine(lm, tokenizer, seed, device), []
    for n, third in enumerate(more):
        if not (wanted := lacking(AIM, result)):
            break
        # The switch to masks can cost a kind of question that the next-token LM knew, and chance alone brings it back late.
        asked.append(wanted)
        loss, where = functools.partial(masked, third, wanted), checkpoints / f"lm_more{n + 1}.pt"
        losses += fit(dict(lm.named_parameters()), loss, third, where, f"{title}, more of {', '.join(wanted)}")
        result = examine(lm, tokenizer, seed, device)
    weights.save_llada(lm, out / "llada")
    return result | {"steps": len(losses), "asked": asked, "losses": losses}


def examine(lm: DiffusionLM, tokenizer, seed: int, device: str, decode: Decoding = by_threshold) -> dict:
    """Copy errors and oracle accuracies, in percent, on unseen sentences; decode: as in ask_text."""
    rng, n = random.Random(seed), N_CHECK
    plain = [draw_item(tokenizer, rng, True, "transcribe", stretched) for stretched in (False, True) for _ in range(n)]
    said, meant = ask_text(lm, tokenizer, plain, device, decode), [answer for _, answer in plain]
    result = {"copy_error": word_error_rate(said[:n], meant[:n]), "copy_error_stretched": word_error_rate(said[n:], meant[n:])}
    result["oracle"] = {}
    for kind in (*grammar.ATTRIBUTES, *grammar.SLOTS, "count"):
        items = [draw_item(tokenizer, rng, True, kind, True) for _ in range(n)]
        said = ask_text(lm, tokenizer, items, device, decode)
        result["oracle"][kind] = 100 * sum(s == a for s, (_, a) in zip(said, items)) / n
    return result | {"items": n}


def lacking(bar: dict, result: dict) -> list[str]:
    """The kinds of question in which an LM's result does not pass a bar; empty when it passes."""
    kinds = [kind for kind, share in result["oracle"].items() if share < bar["oracle"]]
    return kinds + ["transcribe"] * (result["copy_error"] > bar["copy_error"])


def short_of(bar: dict, result: dict) -> str:
    """The same in words."""
    figures = {kind: f"{kind} answered {share:.1f} %" for kind, share in result["oracle"].items()}
    figures["transcribe"] = f"copy error {result['copy_error']:.1f} %"
    return ", ".join(figures[kind] for kind in lacking(bar, result))


def make(which: str, args: argparse.Namespace, threads: int) -> None:
    """Train one of the two and write its figures. Raises SystemExit: clips that cannot be used, an LM that adapters cannot."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    try:
        if which == "encoder":
            result = pretrain_encoder(args.corpus, args.out, args.seed, args.device)
        else:
            result = pretrain_lm(args.out, args.seed, args.device)
    except (AudioError, ManifestError, ValueError) as error:
        raise SystemExit(f"pretrain.py: {error}") from None
    result["minutes"] = (time.perf_counter() - started) / 60
    weights.write_json(args.out / f"{which}.json", result)
    tqdm.write(json.dumps({k: v for k, v in result.items() if k != "losses"}))
    if which == "lm" and (short := short_of(GATE, result)):
        raise SystemExit(f"pretrain.py: the LM is not fit for the adapters: {short}; train it longer (DIFFUSION in pretrain.py)")


def make_lm_below(args: argparse.Namespace, threads: int) -> None:
    """`make` the LM in a process of its own, its progress bar under the encoder's."""
    above = tqdm(delay=math.inf, leave=False)  # never shown, but it takes the first line
    make("lm", args, threads)
    above.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny encoder and LM.")
    parser.add_argument("which", nargs="?", choices=["encoder", "lm", "both"], default="both")
    parser.add_argument("--corpus", type=Path, default=Path("runs/toy/corpus"))
    parser.add_argument("--out", type=Path, default=Path("runs/toy"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args, threads = parser.parse_args(), torch.get_num_threads()
    if args.which != "both" or args.device != "cpu" or threads == 1:
        for which in ("encoder", "lm") if args.which == "both" else (args.which,):
            make(which, args, threads)
        return
    # Neither needs the other, and matrices as small as these gain little from a second core: side by side both end sooner.
    lm = multiprocessing.get_context("spawn").Process(target=make_lm_below, args=(args, threads // 2), daemon=True)
    lm.start()
    make("encoder", args, threads - threads // 2)
    lm.join()
    if lm.exitcode:
        raise SystemExit(f"pretrain.py: no LM was made, its process ended with code {lm.exitcode}")


if __name__ == "__main__":
    main()
