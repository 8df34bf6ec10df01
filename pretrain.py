"""Tiny stand-ins for the two downloads: a Whisper-shaped encoder and a LLaDA-shaped LM, saved in the hub's formats.

The encoder learns which word sounds in each frame, from eSpeak's own alignments, and keeps hearing voices through four
small heads on its first block (gender, accent, speed, pitch of the training voices); the heads are then thrown away.

The LM learns to answer about a clip when what is known of the clip stands as text where the audio will go: attribute
words, then the sentence, half of the time stretched as speech is (words repeated, gaps between). Next-token first, which
finds copying by far the fastest; the same weights then go on as masked diffusion. The next-token model is kept, for the
autoregressive twin of the paper's backbone ablation.

    python pretrain.py --corpus runs/toy/corpus --out runs/toy            both, side by side
    python pretrain.py lm --out runs/toy                                  one of them

Shapes: B batch, T encoder frames, M mels, W words, G answer tokens.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import grammar
import weights
from batches import pick
from data import (
    HEADER, HEADER_END, MASK, START, TEXT_END, TURN_END, Prompt, SentencePieceTokenizer, build_prompt, decode_answer,
    encode_answers, load_manifest, pad_waveforms, read_audio, word_error_rate,
)  # fmt: skip
from diffa import Spliced
from diffusion_lm import SIZES as LM_SIZES
from diffusion_lm import DiffusionLM, diffusion_loss, next_token_loss, noise, noise_levels
from encoder import CONV_STRIDE, HOP, SAMPLE_RATE, WhisperEncoder, encoder_frames, log_mel
from encoder import SIZES as ENCODER_SIZES
from grammar import ANSWER_LENGTH as G
from sampler import SamplerConfig, generate
from trainer import TrainConfig, fit

ENCODER = TrainConfig(steps=1000, batch=32, lr=2e-3, warmup=60)
NEXT_TOKEN = TrainConfig(steps=350, batch=32, lr=2e-3, warmup=50)
DIFFUSION = TrainConfig(steps=1300, batch=32, lr=2e-3, warmup=50)
HEADS_WEIGHT = 0.3  # of the attribute heads in the encoder's loss
BLUR = 0.9  # most noise, as a share of variance, in the embeddings that stand for sound, at the end of training
GAP = "~"  # stands between stretched words, for the silence between spoken ones
N_CHECK = 200  # unseen prompts for each figure of the LM
GATE = {"copy_error": 3.0, "oracle": 98.0}  # percent, at most and at least: no adapter can mend what the LM cannot read
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


def pretrain_encoder(corpus: Path, out: Path, seed: int, device: str, position: int) -> dict:
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
    losses = fit(parameters, loss_of_step, training, out / "checkpoints" / "encoder.pt", "1/4 encoder", position)
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
def train_tokenizer(path: Path, seed: int) -> SentencePieceTokenizer:
    """A sentencepiece BPE model in which markers and grammar words are single pieces and no character is lost."""
    rng = random.Random(seed)
    # What stands in every prompt, often enough that each of its words becomes one piece: short prompts are quick ones.
    roles = [f"{HEADER}{role}{HEADER_END}" for role in ("system", "user", "assistant")]
    lines = [*roles, "You are a helpful voice assistant.", "This is the audio:", " <audio>. "] * 400
    for _ in range(4000):
        sentence = grammar.random_sentence(rng, held_out=False)
        lines += [grammar.TRANSCRIBE]
        for question, answer in grammar.instructions(sentence, grammar.random_attributes(rng), rng).values():
            lines += [question, answer]
    path.parent.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path.with_suffix("")), model_type="bpe", vocab_size=1100,
        hard_vocab_limit=False, byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_by_unicode_script=False, minloglevel=2, num_threads=1,
        user_defined_symbols=[START, HEADER, HEADER_END, TURN_END, TEXT_END, MASK, GAP, "\n\n"],
    )  # fmt: skip
    return SentencePieceTokenizer(path)


def text_prompt(tokenizer, sentence, attributes, instruction: str, rng: random.Random, stretched: bool, voiced: bool) -> tuple[Prompt, list[int]]:
    """A prompt, and the ids of words that stand where its sound would be: attributes (if voiced), then the sentence."""
    gap, pace = tokenizer.id(GAP), rng.uniform(0.4, 1.0)
    known = [[gap] * rng.randint(0, 2) + tokenizer.encode(value) for value in vars(attributes).values()]
    rng.shuffle(known)
    region = [token for ids in known for token in ids] if voiced else [gap] * rng.randint(0, 10)
    for word in sentence.text.split():
        ids = tokenizer.encode(word)
        if stretched:  # about as many semantic embeddings as eSpeak's words last, and hardly a silence between them
            lasts = max(1, round(len(word) * pace + rng.uniform(-0.7, 0.7)))
            region += [token for token in ids for _ in range(lasts)] + [gap] * rng.choice((0, 0, 0, 1))
        else:
            region += ids
    return build_prompt(tokenizer, instruction), region


KIND_WEIGHTS = {"transcribe": 5, "repeat": 1.5, "caption": 2, "count": 2, **dict.fromkeys(grammar.ATTRIBUTES, 0.75), **dict.fromkeys(grammar.SLOTS, 0.75)}  # fmt: skip


def draw_item(tokenizer, rng: random.Random, held_out: bool, kind: str | None = None, stretched: bool | None = None) -> tuple[tuple[Prompt, list[int]], str]:
    """A prompt, the words in the place of its sound, and the answer; of one kind of question, or of any."""
    while True:
        sentence, attributes = grammar.random_sentence(rng, held_out=held_out), grammar.random_attributes(rng)
        items = grammar.instructions(sentence, attributes, rng) | {"transcribe": (grammar.TRANSCRIBE, sentence.text)}
        if kind is None or kind in items:  # not every sentence has a number, say: draw until one has what is asked
            break
    kinds = list(items) if kind is None else [kind]
    chosen = rng.choices(kinds, [KIND_WEIGHTS[k] for k in kinds])[0]
    question, answer = items[chosen]
    voiced = chosen in (*grammar.ATTRIBUTES, "caption") or rng.random() < 0.5  # stage 1 hears no voice
    stretched = rng.random() < 0.5 if stretched is None else stretched
    return text_prompt(tokenizer, sentence, attributes, question, rng, stretched, voiced), answer


@dataclass(frozen=True)
class Prompts:
    """A left-padded batch of prompts in which words stand for sound."""

    ids: Tensor  # (B, P)
    mask: Tensor  # (B, P) true where a position is real
    is_sound: Tensor  # (B, P) true where a word stands for sound


def pad_prompts(lm: DiffusionLM, prompts: list[tuple[Prompt, list[int]]], device: str) -> Prompts:
    """One tensor of many prompts."""
    rows = [(prompt.before, region, prompt.after) for prompt, region in prompts]
    P = max(sum(map(len, row)) for row in rows)
    pads = [P - sum(map(len, row)) for row in rows]
    ids = [[lm.config.end_id] * n + a + b + c for n, (a, b, c) in zip(pads, rows)]
    sound = [[False] * (n + len(a)) + [True] * len(b) + [False] * len(c) for n, (a, b, c) in zip(pads, rows)]
    mask = [[False] * n + [True] * (P - n) for n in pads]
    return Prompts(*(torch.tensor(value, device=device) for value in (ids, mask, sound)))


def as_heard(lm: DiffusionLM, prompts: Prompts, gap: int, most: float, generator: torch.Generator) -> Tensor:
    """Embeddings (B, P, D) of prompts whose region is as uncertain as an adapter's output while it is learned.

    x = sqrt(1 - s) e + sqrt(s) noise, s ~ U(0, most) for each item, noise of the embeddings' size. An LM that has only seen pure
    words snaps to one of them and gives an adapter no gradient towards another; one that has learned to weigh faint traces
    of words does. What is no word (silence, stage-1 prompts) is all noise.
    """
    clean = lm.embed(prompts.ids)  # (B, P, D)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device) * lm.embedding.weight.detach().pow(2).mean().sqrt()
    share = (most * torch.rand(len(clean), 1, 1, generator=generator)).to(clean.device)  # (B, 1, 1)
    share = torch.where(prompts.ids == gap, 1.0, share[..., 0])[..., None] * prompts.is_sound[..., None]  # (B, P, 1)
    return (1 - share).sqrt() * clean + share.sqrt() * noise


def ask_text(lm: DiffusionLM, tokenizer, items: list[tuple[tuple[Prompt, list[int]], str]], device: str) -> list[str]:
    """The LM's answers to prompts of text alone, by the threshold rule."""
    said = []
    for start in range(0, len(items), 100):
        prompts = pad_prompts(lm, [prompt for prompt, _ in items[start : start + 100]], device)
        out = generate(lm, Spliced(lm.embed(prompts.ids), prompts.mask, prompts.mask), SamplerConfig(G, G, G, "threshold", 0.9))
        said += [decode_answer(tokenizer, ids) for ids in out.ids.tolist()]
    return said


def pretrain_lm(out: Path, seed: int, device: str, position: int) -> dict:
    """Train and save `out/llada` and `out/next_token`; returns copy error and oracle accuracies on unseen sentences."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(out / "llada" / "tokenizer.model", seed)
    config = replace(LM_SIZES["toy"], vocab=tokenizer.size, mask_id=tokenizer.id(MASK), end_id=tokenizer.id(TEXT_END))
    lm, gap = DiffusionLM(config), tokenizer.id(GAP)
    nn.init.normal_(lm.embedding.weight, std=0.2)
    lm.to(device)

    def batch_of(step: int, training: TrainConfig) -> tuple[Prompts, Tensor]:
        rng = random.Random(f"{training.seed} {step}")
        items = [draw_item(tokenizer, rng, held_out=False) for _ in range(training.batch)]
        prompts = pad_prompts(lm, [prompt for prompt, _ in items], device)
        answers = encode_answers(tokenizer, [answer for _, answer in items], G).to(device)
        return prompts, answers

    def next_token(step: int, generator: torch.Generator) -> Tensor:
        prompts, answers = batch_of(step, first)
        return next_token_loss(lm, lm.embed(prompts.ids), prompts.mask, answers)

    def masked(step: int, generator: torch.Generator) -> Tensor:
        prompts, answers = batch_of(step, second)
        embeddings = as_heard(lm, prompts, gap, BLUR * step / second.steps, generator)  # copying is learned on clean words
        t = noise_levels(len(answers), generator, t_min=0.3, stratified=True)
        noisy = noise(answers, t, config.mask_id, generator)
        return diffusion_loss(lm, embeddings, prompts.mask, answers, noisy, t, answers.numel())

    def set_causal(value: bool) -> None:
        lm.config = replace(config, causal=value)

    first, second = replace(NEXT_TOKEN, seed=seed), replace(DIFFUSION, seed=seed + 1000)
    set_causal(True)
    checkpoints = out / "checkpoints"
    losses = fit(dict(lm.named_parameters()), next_token, first, checkpoints / "next_token.pt", "2/4 LM, next token", position)
    weights.save_llada(lm, out / "next_token")
    (out / "next_token" / "tokenizer.model").write_bytes((out / "llada" / "tokenizer.model").read_bytes())
    set_causal(False)
    losses += fit(dict(lm.named_parameters()), masked, second, checkpoints / "lm.pt", "2/4 LM, diffusion", position)
    weights.save_llada(lm, out / "llada")
    rng, n = random.Random(seed), N_CHECK
    plain = [draw_item(tokenizer, rng, True, "transcribe", stretched) for stretched in (False, True) for _ in range(n)]
    said = ask_text(lm.eval(), tokenizer, plain, device)
    result = {"copy_error": word_error_rate(said[:n], [a for _, a in plain[:n]])}
    result["copy_error_stretched"] = word_error_rate(said[n:], [a for _, a in plain[n:]])
    result["oracle"] = {}
    for kind in (*grammar.ATTRIBUTES, *grammar.SLOTS, "count"):
        items = [draw_item(tokenizer, rng, True, kind, True) for _ in range(n)]
        result["oracle"][kind] = 100 * sum(s == a for s, (_, a) in zip(ask_text(lm, tokenizer, items, device), items)) / n
    return result | {"items": n, "losses": losses}


def short_of_gate(result: dict) -> str:
    """What an LM's result lacks to pass GATE, in words; empty when it passes."""
    lacks = [f"{kind} answered {share:.1f} %" for kind, share in result["oracle"].items() if share < GATE["oracle"]]
    if result["copy_error"] > GATE["copy_error"]:
        lacks.append(f"copy error {result['copy_error']:.1f} %")
    return ", ".join(lacks)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny encoder and LM.")
    parser.add_argument("which", nargs="?", choices=["encoder", "lm", "both"], default="both")
    parser.add_argument("--corpus", type=Path, default=Path("runs/toy/corpus"))
    parser.add_argument("--out", type=Path, default=Path("runs/toy"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bar", type=int, default=0, help="line of the progress bar")
    args = parser.parse_args()
    if args.which == "both":  # two small models on half of the cores each are done sooner than one after the other
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        environment = os.environ | {"OMP_NUM_THREADS": str(max(cores // 2, 1)), "OMP_WAIT_POLICY": "passive"}
        options = ["--corpus", str(args.corpus), "--out", str(args.out), "--seed", str(args.seed), "--device", args.device]
        jobs = [
            subprocess.Popen([sys.executable, __file__, which, *options, "--bar", str(bar)], env=environment)
            for bar, which in enumerate(("encoder", "lm"))
        ]
        if any([job.wait() for job in jobs]):
            raise SystemExit("pretrain.py: one of the two trainings failed; its message is above")
        return
    started = time.perf_counter()
    if args.which == "encoder":
        result = pretrain_encoder(args.corpus, args.out, args.seed, args.device, args.bar)
    else:
        result = pretrain_lm(args.out, args.seed, args.device, args.bar)
    result["minutes"] = (time.perf_counter() - started) / 60
    weights.write_json(args.out / f"{args.which}.json", result)
    tqdm.write(json.dumps({k: v for k, v in result.items() if k != "losses"}))
    if args.which == "lm" and (short := short_of_gate(result)):
        raise SystemExit(f"pretrain.py: the LM is not fit for the adapters: {short}; train it longer (DIFFUSION in pretrain.py)")


if __name__ == "__main__":
    main()
