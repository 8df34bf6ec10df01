"""WER of the warm-up alone (training/align.py): what the semantic adapter spells, without an LM.

    python -m lab.spelling MANIFEST --adapters runs/smol/align

Each audio embedding is read as the nearest row of the LM's embedding table, or as silence. As CTC
has it (Graves et al. 2006), repeats are one token. Nothing corrects the spelling.

Shapes: A audio embeddings, V vocabulary, D LM width.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.command_line import add_model_arguments, count, model_options, one_line_errors
from checkpoints.model import load_diffa
from data import load_manifest
from diffa import DIFFA
from evaluation.wer import word_error_rate
from training.align import table_logits
from training.questions import plain_words
from training.states import StateCache

SHOWN = 5  # clips whose spelling is printed


def spelled_ids(logits: Tensor) -> list[int]:
    """Token ids that logits (A, V + 1) of silence and each token spell: no repeats, no silence."""
    best = logits.argmax(dim=-1)  # (A,)
    return [int(i) - 1 for i in best.unique_consecutive() if i > 0]


@torch.inference_mode()
def spell(model: DIFFA, items: list[dict]) -> list[str]:
    """What each clip spells, in plain words. A clip longer than the window is cut."""
    cache = StateCache(model, items, used=(model.encoder.config.n_layers,), cut=True)
    texts = []
    for item in items:
        states, frames = cache([item])
        audio, mask = model.semantic(states[-1], frames)  # (1, A, D), (1, A)
        logits = table_logits(audio[mask], model.lm.embedding.weight)  # (A, V + 1)
        texts.append(plain_words(model.tokenizer.decode(spelled_ids(logits))))
    return texts


def main(arguments: list[str] | None = None) -> None:
    name = "python -m lab.spelling"
    parser = argparse.ArgumentParser(prog=name, description="WER of the warm-up alone.")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--items", type=count, default=200, help="clips, at most (default 200)")
    add_model_arguments(parser, "runs/smol/align")
    args = parser.parse_args(arguments)

    with one_line_errors(name):
        items = load_manifest(args.manifest)[: args.items]
        paths = (args.whisper, args.llm, args.adapters)
        model = load_diffa(*paths, **model_options(args)).eval()
        texts = spell(model, items)
        targets = [plain_words(item["transcription"]) for item in items]
        for text, target in list(zip(texts, targets))[:SHOWN]:
            print(f"{target!r} is spelled {text!r}")
        print(f"WER {word_error_rate(texts, targets):.1f} % of {len(items)} clips")


if __name__ == "__main__":
    main()
