"""Training steps of the paper's recipes at full-size shapes, for lab.gpu.

Shapes: B items, G answer tokens, A audio embeddings, L positions of prompt and answer.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

import train_asr
import train_instruct
from checkpoints.model import load_for_training
from data import Prompt
from diffa import DIFFA
from encoder import SAMPLE_RATE
from lab.gpu_report import Report
from lab.roofline import time_in_turns
from training.batches import Batch, Part
from training.execution import prepare
from training.flops import lm_flops, measured_peak
from training.optimizers import TrainConfig, make_optimizers
from training.recipe import Execution, Recipe

STAGES = {"stage1": train_asr, "stage2": train_instruct}
GPUS = 4  # the paper's: the batch of a step is divided by them
# Mean seconds of a clip: 960 hours in 21,970 steps of 128, 10 epochs; 127.01 hours, 96,874 clips.
SECONDS = {"stage1": 12.3, "stage2": 4.7}
AROUND = 30  # tokens of the prompt before the audio, and after it


def random_batch(model: DIFFA, n: int, seconds: float, recipe: Recipe) -> tuple[Batch, Tensor]:
    """A batch of n clips of noise, encoded anew in each step, and the positions of each prompt."""
    device = model.device
    window = model.encoder.config.n_samples
    real = min(round(seconds * SAMPLE_RATE), window)
    waveforms = torch.zeros(n, window, device=device)
    waveforms[:, :real].normal_(std=0.1)
    n_samples = torch.full((n,), real, device=device)
    ids = list(range(AROUND))

    def hear() -> tuple[Tensor, Tensor]:
        states = model.encode(waveforms, n_samples)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
            return model.hear(*states)

    part = Part(
        rows=torch.arange(n).numpy(),
        prompts=[Prompt(ids, ids)] * n,
        readable=torch.ones(n, dtype=torch.bool, device=device),
        hear=hear,
    )
    answer_ids = torch.randint(0, 250, (n, recipe.answer_length))
    batch = Batch(answer_ids=answer_ids, parts=lambda: iter([part]))
    with torch.no_grad():
        audio = hear()[1].sum(dim=1)  # (B,)
    return batch, audio + 2 * AROUND


def time_step(
    model: DIFFA,
    execution: Execution,
    config: TrainConfig,
    losses: Callable[[], Iterator[Tensor]],
    floor: float,
) -> list[str]:
    """Seconds of a training step, percent of the peak rate, and GiB; or that it does not fit.

    losses: those of a batch's parts. floor: seconds of the step at the peak rate.
    """
    for block in model.lm.blocks:
        block.__dict__.pop("forward", None)  # what recomputing put there
    trained = prepare(model, execution, model.device.type)
    optimizers = make_optimizers(trained, config)

    def step() -> None:
        for loss in losses():
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    cells = ["out of memory", "", ""]
    is_cuda = model.device.type == "cuda"
    try:
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        (taken,) = time_in_turns({"step": step}, model.device, rounds=2).values()
        memory = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else 0.0
        cells = [f"{taken:.3f}", f"{100 * floor / taken:.0f} %", f"{memory:.1f}"]
    except torch.cuda.OutOfMemoryError:
        pass

    # The next way starts with all memory.
    if is_cuda:
        torch.cuda.empty_cache()
    return cells


def train(report: Report, name: str, device: str, tiny: bool) -> None:
    """A step of the paper's recipe on its part of the batch, by three ways to run the blocks."""
    script = STAGES[name]
    recipe = script.RECIPES["paper"]
    size = "toy+toy" if tiny else "small+llada-8b"
    if tiny:
        recipe = replace(recipe, answer_length=8, dtype="float32")
    dtype = getattr(torch, recipe.dtype)
    options = script.RECIPES["toy"].shapes | {"audio_context": 1.0} if tiny else {}
    model = load_for_training(
        stage=script.STAGE.parts, dtype=dtype, device=device, random_weights=size, **options
    ).model
    peak = measured_peak(device, dtype)
    n = recipe.train.batch // GPUS
    batch, positions = random_batch(model, 2 if tiny else n, SECONDS[name], recipe)
    B, G = batch.answer_ids.shape
    L = int(positions.max()) + G

    def losses() -> Iterator[Tensor]:
        return script.STAGE.loss(model, batch, torch.Generator().manual_seed(0), recipe)

    # About half of the answer's tokens are masked, and only these are scored.
    flops = lm_flops(model.lm.config, B, L, L, G / 2, backward=True)
    usual = replace(recipe.execution, recompute=False)
    ways = {
        "blocks recomputed (the recipe)": replace(usual, recompute=True),
        "all kept": usual,
        "all kept, blocks compiled": replace(usual, compile=True),
    }
    rows = []
    for way, execution in ways.items():
        rows.append([way, *time_step(model, execution, recipe.train, losses, flops / peak)])

        # Again for each way: the next one may take longer than the time limit.
        title = f"a step of {B} clips of {SECONDS[name]} s, {L} positions each, G = {G}"
        report.tables.clear()
        report.add(title, ["way", "s", f"of {peak / 1e12:.0f} TFLOP/s", "peak GiB"], rows)
