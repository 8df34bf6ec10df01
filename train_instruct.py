"""Stage 2: teach both adapters to answer (paper, section 3.3).

Starts from stage 1's semantic adapter; its 20 prompts give way to the acoustic adapter. Encoder and LM stay frozen. The
ablation `--audio semantic` leaves the acoustic adapter out, all else equal.

    python train_instruct.py --train runs/toy/corpus/instruct_train.json --adapters runs/toy/stage1 --out runs/toy/stage2
"""

import argparse
from pathlib import Path

from data import AudioError, ManifestError
from diffa import add_model_arguments
from grammar import ANSWER_LENGTH
from stage import FULL_SIZE, TOY_SHAPES, Preset, add_training_arguments, chosen_preset, run_stage
from trainer import TrainConfig

PRESETS = {
    # 96,874 items, 10 epochs at batch 32 (paper, section 4.1).
    "paper": Preset(TrainConfig(30_273, 32, 5e-5, 2000, "cosine"), 128, 0.0, False, False, {}, "bfloat16", True, FULL_SIZE),
    # Half of stage 1's learning rate, as in the paper: at the whole of it, words that stage 1 tells apart can fall together.
    "toy": Preset(TrainConfig(600, 32, 1e-3, 50, "cosine", optimizer="muon"), ANSWER_LENGTH, 0.5, True, True, TOY_SHAPES, alike=True),
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
