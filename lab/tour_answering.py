"""The second half of the tour: from the spliced prompt to the answer.

Shapes: P prompt positions, A audio embeddings, G answer tokens, L = P + G, D LM width.
"""

import random
from pathlib import Path

import matplotlib
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from torch import Tensor

from data import build_prompt, encode_answers
from diffa import Spliced, splice
from diffusion_lm import diffusion_loss, noise
from evaluation.ask import answer_in_steps
from evaluation.figure import figure
from evaluation.screen import token_texts
from evaluation.trace import MASK, Step
from lab.animation import commit_steps
from lab.tour_scene import (
    GREY,
    Clip,
    Scene,
    chip,
    chip_grid,
    confidence_colour,
    encode,
    nearest_words,
    widths_of,
)
from sampler import SamplerConfig, generate
from toy.grammar import instructions

QUESTION = "Describe the speech."
LENGTH = 18  # tokens of an answer, as in the toy's training
BLOCK = 6  # in the picture of the caches
FILLS = {"text": "#57606a", "acoustic": "#bc4c00", "semantic": "#1a7f37", "mask": GREY}
LEVELS = (0.2, 0.5, 0.8)  # of noise
CALL_COLOURS = ("#d0d7de", "#54aeff", "#0550ae")  # read, computed, predicted
CALL_SCALE = matplotlib.colormaps["viridis"]
LOSS_CLIPS = 12
DRAWS = 4  # noisy answers of each clip at each level


def prompt_of(scene: Scene, clip: Clip) -> Spliced:
    """The spliced prompt of QUESTION about a clip."""
    prompt = build_prompt(scene.model.tokenizer, QUESTION)
    return splice(scene.model.lm, [prompt], *scene.model.hear(*encode(scene.model, clip)))


def caption_ids(scene: Scene, clip: Clip) -> Tensor:
    """The right answer to QUESTION about a clip, (1, G)."""
    pairs = instructions(clip.sentence, clip.attributes, random.Random(0))
    return encode_answers(scene.model.tokenizer, [pairs["caption"][1]], LENGTH)


def texts_of(scene: Scene, ids: list[int]) -> list[str]:
    """Texts of an answer's tokens, without spaces around them."""
    config = scene.model.lm.config
    texts = token_texts(scene.model.tokenizer, ids, config.mask_id, config.end_id)
    return [text.strip() or "end" for text in texts]


def answered(scene: Scene, config: SamplerConfig) -> list[Step]:
    """The steps of an answer to QUESTION about the clip."""
    clip = scene.clip.waveform
    return answer_in_steps(scene.model, clip, "clip", QUESTION, config, cut=True)[1]


def draw_splice(scene: Scene, path: Path) -> None:
    """Every position of the sequence that the LM reads, in its order."""
    model = scene.model
    prompt = build_prompt(model.tokenizer, QUESTION)
    halves = []
    for half in (prompt.before, prompt.after):
        texts = [model.tokenizer.decode([i]) for i in half]
        halves.append(["⏎" if "\n" in text else text.strip() or "␣" for text in texts])
    words, _ = nearest_words(model, scene.clip)
    runs = [
        ("text", halves[0]),
        ("acoustic", [f"query {i + 1}" for i in range(model.config.n_queries)]),
        ("semantic", words),
        ("text", halves[1]),
        ("mask", ["mask"] * LENGTH),
    ]

    with figure(path, size=(10, 3.6)) as axis:
        # Tokens flow like words; a new line where one would pass the edge.
        x = y = 0.0
        for kind, texts in runs:
            for text, width in zip(texts, widths_of(texts)):
                if x + width > 66:
                    x = 0.0
                    y += 1
                chip(axis, x, y, width, text, FILLS[kind], fontsize=7)
                x += width

        # A legend with the numbers of positions.
        notes = {
            "text": f"text of the prompt: {len(halves[0])} + {len(halves[1])} tokens",
            "acoustic": f"acoustic embeddings: {model.config.n_queries}",
            "semantic": f"semantic embeddings, with their nearest words: {len(words)}",
            "mask": f"answer: {LENGTH} masks",
        }
        for x, (kind, note) in zip((0, 18, 31, 55), notes.items()):
            chip(axis, x, y + 1.6, 1.4, "", FILLS[kind])
            axis.text(x + 1.7, y + 2.07, note, va="center", fontsize=8)
        axis.set(xlim=(0, 66), ylim=(y + 2.7, 0))
        axis.set_axis_off()


def draw_noise(scene: Scene, path: Path) -> None:
    """An answer, and the same after the forward process at three noise levels."""
    clean = caption_ids(scene, scene.clip)
    texts = texts_of(scene, clean[0].tolist())
    rows = [("t = 0", [(text, FILLS["text"]) for text in texts])]
    for t in LEVELS:
        generator = torch.Generator().manual_seed(4)
        noisy = noise(clean, torch.tensor([t]), scene.model.lm.config.mask_id, generator)
        kept = (noisy == clean)[0].tolist()
        cells = [(text, FILLS["text"]) if keep else ("", GREY) for text, keep in zip(texts, kept)]
        rows.append((f"t = {t}", cells))

    with figure(path, size=(11, 1.9)) as axis:
        chip_grid(axis, rows, widths_of(texts))


def losses_at(scene: Scene, t: float, shift: int) -> list[float]:
    """Losses of DRAWS noisy captions a clip at level t, heard with the clip `shift` further on."""
    lm = scene.model.lm
    level = torch.tensor([t])
    losses = []
    for i, clip in enumerate(scene.clips[:LOSS_CLIPS]):
        generator = torch.Generator().manual_seed(i)
        prompt = prompt_of(scene, scene.clips[i + shift])
        ids = caption_ids(scene, clip)
        for _ in range(DRAWS):
            noisy = noise(ids, level, lm.config.mask_id, generator)
            loss = diffusion_loss(lm, prompt.embeddings, prompt.mask, ids, noisy, level, LENGTH)
            losses.append(loss.item())
    return losses


def draw_loss(scene: Scene, path: Path) -> None:
    """The loss against the noise level, with the right clip and with another one."""
    levels = [0.05, *torch.linspace(0.1, 1, 10).tolist()]
    with figure(path, size=(7.5, 3.6)) as axis:
        for shift, label in ((0, "the caption's own clip"), (1, "another clip")):
            losses = torch.tensor([losses_at(scene, t, shift) for t in levels])  # (levels, n)
            (line,) = axis.plot(levels, losses.mean(dim=1), "-", label=f"mean, hears {label}")
            for t, row in zip(levels, losses):
                axis.plot([t] * len(row), row, ".", ms=4, alpha=0.35, color=line.get_color(), mew=0)
        axis.set(xlabel="noise level t", ylabel="diffusion_loss\n(nats a token)", yscale="log")
        axis.set_ylim(bottom=1e-4)
        axis.legend(loc="lower right")
        axis.grid(alpha=0.3)


def draw_steps(scene: Scene, path: Path) -> None:
    """An answer's steps, each token coloured by the confidence with which it was committed."""
    steps = answered(scene, SamplerConfig(length=LENGTH, rule="count", steps=6))
    widths = widths_of([text.strip() or "end" for text in steps[-1].texts])
    rows = []
    for number, step in enumerate(steps, start=1):
        cells = []
        for text, confidence, kind in zip(*step):
            label = f"{text.strip() or 'end'}\n{confidence:.2f}"
            mask = ("", GREY)
            cells.append(mask if kind == MASK else (label, confidence_colour(confidence)))
        rows.append((f"step {number}", cells))

    with figure(path, size=(11, 0.5 * len(rows) + 0.3)) as axis:
        chip_grid(axis, rows, widths)


def recorded_calls(scene: Scene, config: SamplerConfig) -> Tensor:
    """What each model call of an answer did at each position, (calls, L).

    0: kept keys and values were read; 1: computed anew; 2: also predicted.
    """
    lm = scene.model.lm
    prompt = prompt_of(scene, scene.clip)
    L = prompt.embeddings.shape[1] + config.length
    calls = []

    def record(lm, inputs: tuple) -> None:
        _, _, _, indices, output_rows = inputs
        row = torch.zeros(L)
        row[indices] = 1
        row[indices[output_rows]] = 2
        calls.append(row)

    handle = lm.register_forward_pre_hook(record)
    generate(lm, prompt, config)
    handle.remove()
    return torch.stack(calls)


def draw_caches(scene: Scene, path: Path) -> None:
    """What each call computes and what it reads from the cache, for the three caches."""
    settings = {"length": LENGTH, "block_length": BLOCK, "steps": 9, "stop_at_end": False}
    with figure(path, rows=3, size=(10, 5), sharex=True) as axes:
        for axis, cache in zip(axes, ("none", "prefix", "dual")):
            calls = recorded_calls(scene, SamplerConfig(cache=cache, **settings))
            axis.imshow(calls, aspect="auto", cmap=ListedColormap(CALL_COLOURS), vmin=0, vmax=2)
            computed = (calls > 0).sum().item()
            axis.set_title(f"cache {cache}: {computed:,} positions computed", fontsize=10)
            axis.set(ylabel="model call", yticks=range(len(calls)))
            axis.set_yticklabels(range(1, len(calls) + 1), fontsize=7)

            # Lines between the calls, and where the blocks of the answer begin.
            L = calls.shape[1]
            axis.hlines([i - 0.5 for i in range(1, len(calls))], -0.5, L - 0.5, "w", lw=2)
            for start in range(L - LENGTH, L, BLOCK):
                axis.axvline(start - 0.5, color="black", lw=1)

        axes[-1].set_xlabel("position: the prompt, then three blocks of the answer")
        handles = [Patch(color=fill) for fill in CALL_COLOURS]
        labels = ["read from the cache", "computed", "computed and predicted"]
        axes[0].legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1.2), ncols=3)


def draw_rules(scene: Scene, path: Path) -> None:
    """The call that commits each token, under each rule."""
    settings = {
        "count, 18 steps": {"rule": "count"},
        "count, 6 steps": {"rule": "count", "steps": 6},
        "threshold 0.9": {"rule": "threshold", "threshold": 0.9},
        "threshold 0.6": {"rule": "threshold", "threshold": 0.6},
        "factor 1": {"rule": "factor", "factor": 1.0},
    }
    rows = []
    widths = [2.0] * LENGTH
    for name, options in settings.items():
        config = SamplerConfig(length=LENGTH, stop_at_end=False, **options)
        steps = answered(scene, config)
        texts = [text.strip() or "end" for text in steps[-1].texts]
        widths = [max(pair) for pair in zip(widths, widths_of(texts))]
        cells = []
        for text, number in zip(texts, commit_steps(steps)):
            cells.append((f"{text}\n{number + 1}", CALL_SCALE(number / LENGTH)))
        rows.append((f"{name}: {len(steps)} calls", cells))

    with figure(path, size=(11, 3.2)) as axis:
        chip_grid(axis, rows, widths)
