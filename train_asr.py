"""Stage 1: teach the semantic adapter to carry words (paper, section 3.3).

Encoder and LM are frozen; the semantic adapter and 20 learned prompts train on transcripts, so that the LM, asked to
transcribe, writes down what is said.

    python train_asr.py --train runs/toy/corpus/asr_train.json --out runs/toy/stage1

Killed or stopped, the same command goes on from the newest checkpoint.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import AudioError, ManifestError, StateCache, build_prompt, encode_answers, load_manifest, pick
from diffa import AUDIO_PARTS, DIFFA, add_model_arguments, model_options
from grammar import ANSWER_LENGTH
from trainer import TrainConfig, fit
from weights import write_json


@dataclass(frozen=True)
class Preset:
    """A recipe: the optimiser's settings and what of the method is adapted to the size."""

    train: TrainConfig
    answer_length: int  # tokens, padded with the end of text
    t_min: float  # noise levels are drawn from (t_min, 1]; the paper's is 0
    stratified: bool  # noise levels spread over the batch instead of independent
    match_embedding_scale: bool  # new adapters start at the size of the LM's embeddings; the paper's at LayerNorm's 1
    shapes: dict  # AdapterConfig fields of new adapters that differ from the paper's


TOY_SHAPES = {"n_queries": 8, "qformer_layers": 2, "ffn": 512, "dropout": 0.0}
PRESETS = {
    # 960 hours of LibriSpeech hold 281,241 clips; 10 epochs at batch 128 (paper, section 4.1).
    "paper": Preset(TrainConfig(21_972, 128, 1e-4, 1000, "linear"), 128, 0.0, False, False, {}),
    "toy": Preset(TrainConfig(2400, 32, 2e-3, 50, "cosine"), ANSWER_LENGTH, 0.1, True, True, TOY_SHAPES),
}


def train_stage(model: DIFFA, items: list[dict], answers: list[str], preset: Preset, out: Path, title: str) -> list[float]:
    """Train what the model's stage trains, on manifest items; writes `out` and returns the loss of every step.

    Raises ValueError: an answer longer than preset.answer_length, all of it known before the first step.
    """
    targets = encode_answers(model.tokenizer, answers, preset.answer_length)  # (N, G)
    prompts = {text: build_prompt(model.tokenizer, text) for text in {item["input"] for item in items}}
    longest = max(len(p.before) + len(p.after) for p in prompts.values()) + preset.answer_length
    if longest > model.lm.config.max_length:
        raise ValueError(f"a prompt and answer of {longest} tokens exceed the LM's context of {model.lm.config.max_length}")
    heard = StateCache(model, items, progress=lambda it: tqdm(it, desc=f"{title}: encoding", leave=False))

    def loss_of_step(step: int, generator: torch.Generator) -> Tensor:
        rows = pick(step, len(items), preset.train.batch, preset.train.seed)
        batch = [items[i] for i in rows]
        audio = model.hear(*heard(batch))
        chosen = [prompts[item["input"]] for item in batch]
        return model.loss(audio, chosen, targets[torch.from_numpy(rows)], generator, preset.t_min, preset.stratified)

    model.train()
    model.encoder.eval()
    parameters = {}
    for name, part in model.trainable().items():
        parameters |= {name: part} if isinstance(part, Tensor) else {f"{name}.{n}": p for n, p in part.named_parameters()}
    return fit({n: p.requires_grad_() for n, p in parameters.items()}, loss_of_step, preset.train, out / "checkpoint.pt", title)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that both stages take."""
    parser.add_argument("--preset", choices=["toy", "paper"], default="toy")
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument("--batch", type=int, help="clips a step, instead of the preset's")
    parser.add_argument("--lr", type=float, help="peak learning rate, instead of the preset's")
    parser.add_argument("--seed", type=int, default=0)


def chosen_preset(presets: dict[str, Preset], args: argparse.Namespace) -> Preset:
    """The preset by name with what the command line overrides."""
    given = {"steps": args.steps, "batch": args.batch, "lr": args.lr, "seed": args.seed}
    preset = presets[args.preset]
    return replace(preset, train=replace(preset.train, **{k: v for k, v in given.items() if v is not None}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Stage 1: transcripts.")
    parser.add_argument("--train", type=Path, default=Path("runs/toy/corpus/asr_train.json"), help="manifest")
    parser.add_argument("--out", type=Path, default=Path("runs/toy/stage1"))
    add_model_arguments(parser, "")
    add_training_arguments(parser)
    args = parser.parse_args()
    started = time.perf_counter()
    preset = chosen_preset(PRESETS, args)
    try:
        items = load_manifest(args.train)
        torch.manual_seed(args.seed)
        model = DIFFA.from_pretrained(args.whisper, args.llm, args.adapters or None, "stage1", **model_options(args), **preset.shapes)
        if preset.match_embedding_scale and not args.adapters:
            model.match_embedding_scale(("prompts", "semantic"))
        losses = train_stage(model, items, [item["transcription"] for item in items], preset, args.out, "3/4 stage 1")
    except (AudioError, ManifestError, ValueError) as error:
        raise SystemExit(f"train_asr.py: {error}") from None
    model.save(args.out, args.whisper, args.llm)
    n = sum(p.numel() if isinstance(p, Tensor) else sum(q.numel() for q in p.parameters()) for p in model.trainable().values())
    minutes = (time.perf_counter() - started) / 60
    write_json(args.out / "training.json", {"losses": losses, "minutes": minutes, "trained_parameters": n, "parts": AUDIO_PARTS["stage1"]})


if __name__ == "__main__":
    main()
