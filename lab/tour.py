"""A tour of the method in pictures, drawn from a trained toy model (docs/tour.md).

    python -m lab.tour                          draws docs/tour/*.png from toy/weights
    python -m lab.tour --run RUN --out FOLDER   from another run

eSpeak speaks held-out sentences in test voices, as toy/corpus.py does, so no corpus is needed. The
pictures are in lab/tour_hearing.py (sound to embeddings) and lab/tour_answering.py (prompt to
answer).
"""

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from checkpoints.command_line import one_line_errors
from checkpoints.files import check_writable
from diffa import DIFFA
from lab import tour_answering, tour_hearing
from lab.tour_scene import Scene, random_clip
from toy.speech import prepare_espeak

PICTURES = {
    "1-sound": tour_hearing.draw_sound,
    "2-states": tour_hearing.draw_states,
    "3-words": tour_hearing.draw_words,
    "4-attention": tour_hearing.draw_attention,
    "5-changes": tour_hearing.draw_changes,
    "6-splice": tour_answering.draw_splice,
    "7-noise": tour_answering.draw_noise,
    "8-loss": tour_answering.draw_loss,
    "9-steps": tour_answering.draw_steps,
    "10-caches": tour_answering.draw_caches,
    "11-rules": tour_answering.draw_rules,
}
CLIPS = 24
FOLLOWED = 13  # the clip that most pictures show
COLOURS = 32  # of a file; more would triple its size


def shrink(path: Path) -> None:
    """Rewrite a picture with COLOURS colours."""
    Image.open(path).convert("RGB").quantize(COLOURS).save(path, optimize=True)


@torch.no_grad()
def draw_tour(run: Path, out: Path, names: list[str]) -> None:
    """Draw pictures of PICTURES into the folder `out`.

    Args:
        run: a toy run directory with whisper, llada and stage2.
    Raises:
        WeightsError: no such model. OSError: eSpeak does not load, or `out` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out / f"{names[0]}.png")
    parts = (run / "whisper", run / "llada", run / "stage2")
    model = DIFFA.from_pretrained(*parts, stage="stage2", dtype=torch.float32).eval()

    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary)
        prepare_espeak(data)
        clips = [random_clip(f"tour/{i}", data) for i in range(CLIPS)]
        scene = Scene(model=model, clip=clips[FOLLOWED], clips=clips, data=data)
        for name in tqdm(names, "pictures", disable=None):
            PICTURES[name](scene, out / f"{name}.png")
            shrink(out / f"{name}.png")


def main(arguments: list[str] | None = None) -> None:
    name = "python -m lab.tour"
    parser = argparse.ArgumentParser(prog=name, description="Draw the tour's pictures.")
    option = parser.add_argument
    default = "(default: %(default)s)"
    option("--run", type=Path, default=Path("toy/weights"), help=f"a trained toy {default}")
    option("--out", type=Path, default=Path("docs/tour"), help=f"folder {default}")
    option("--only", nargs="+", choices=PICTURES, default=list(PICTURES), help="some of them")
    args = parser.parse_args(arguments)

    with one_line_errors(name):
        draw_tour(args.run, args.out, args.only)
    print(args.out)


if __name__ == "__main__":
    main()
