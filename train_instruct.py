"""Stage 2: teach both adapters to answer (paper, section 3.3).

Starts from stage 1's semantic adapter; its 20 prompts give way to the acoustic adapter. Encoder and LM stay frozen. The
ablation `--audio semantic` leaves the acoustic adapter out, all else equal.

    python train_instruct.py --train runs/toy/corpus/instruct_train.json --adapters runs/toy/stage1 --out runs/toy/stage2
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
        train=TrainConfig(steps=10 * (96_874 // 32), batch=32, lr=5e-5, warmup=2000, schedule="cosine"),
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
        train=TrainConfig(steps=600, batch=32, lr=1e-3, warmup=50, schedule="cosine", optimizer="muon"),
        answer_length=ANSWER_LENGTH,
        t_min=0.5,
        stratified=True,
        match_embedding_scale=True,
        shapes=TOY_SHAPES,
        alike=True,
    ),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Stage 2: instructions.")
    parser.add_argument("--train", type=Path, default=Path("runs/toy/corpus/instruct_train.json"), help="manifest")
    parser.add_argument("--out", type=Path, default=Path("runs/toy/stage2"))
    parser.add_argument("--audio", choices=["both", "semantic"], default="both", help="adapters in the prompt")
    add_model_arguments(parser, "runs/toy/stage1")
    add_training_arguments(parser)
    args = parser.parse_args(arguments)
    stage = "stage2" if args.audio == "both" else "semantic"
    try:
        run_stage(args, chosen_preset(PRESETS, args), stage, "target", "4/4 stage 2")
    except (AudioError, ManifestError, ValueError) as error:
        raise SystemExit(f"train_instruct.py: {error}") from None


if __name__ == "__main__":
    main()
