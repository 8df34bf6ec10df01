"""Stage 1: teach the semantic adapter to carry words (paper, section 3.3).

Encoder and LM are frozen; the semantic adapter and 20 learned prompts train on transcripts, so that the LM, asked to
transcribe, writes down what is said.

    python train_asr.py --train runs/toy/corpus/asr_train.json --out runs/toy/stage1

Killed or stopped, the same command goes on from the newest checkpoint.
"""

import argparse
from pathlib import Path

from data import AudioError, ManifestError
from diffa import add_model_arguments
from toy.grammar import ANSWER_LENGTH
from training.stage import FULL_SIZE, TOY_SHAPES, Preset, add_training_arguments, chosen_preset, run_stage
from training.loop import TrainConfig

PRESETS = {
    "paper": Preset(
        train=TrainConfig(steps=10 * (281_241 // 128), batch=128, lr=1e-4, warmup=1000, schedule="linear"),
        answer_length=128,
        t_min=0.0,
        stratified=False,
        match_embedding_scale=False,
        shapes={},
        dtype="bfloat16",
        alike=True,
        machine=FULL_SIZE,
    ),
    "toy": Preset(
        train=TrainConfig(steps=600, batch=32, lr=2e-3, warmup=50, schedule="cosine", optimizer="muon"),
        answer_length=ANSWER_LENGTH,
        t_min=0.5,
        stratified=True,
        match_embedding_scale=True,
        shapes=TOY_SHAPES,
        alike=True,
    ),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Stage 1: transcripts.")
    parser.add_argument("--train", type=Path, default=Path("runs/toy/corpus/asr_train.json"), help="manifest")
    parser.add_argument("--out", type=Path, default=Path("runs/toy/stage1"))
    add_model_arguments(parser, "")
    add_training_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        run_stage(args, chosen_preset(PRESETS, args), "stage1", "transcription", "3/4 stage 1")
    except (AudioError, ManifestError, ValueError) as error:
        raise SystemExit(f"train_asr.py: {error}") from None


if __name__ == "__main__":
    main()
