"""Memory and time of one training step through a frozen LM: logits at the masked positions, and at all of them.

    python -m lab.measure_step                                              the CPU figures of the docs
    python -m lab.measure_step --size llada-8b --batch 16 --dtype bfloat16 --device cuda

Each variant runs in a process of its own, so that its peak memory is its own. On a CPU this is resident memory, and freed
memory is returned at once (MALLOC_MMAP_THRESHOLD_), so that holes in the heap do not count. It takes minutes and gigabytes.

Shapes: B batch, P prompt positions, G answer tokens, L = P + G, n masked positions, V vocabulary.
"""

import argparse
import os
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints.fill import randomize
from diffusion_lm import SIZES, DiffusionLM, LMConfig, diffusion_loss, noise, noise_levels
from training.flops import lm_flops, measured_peak
from training.stage import recompute_blocks

CPU_SIZE = LMConfig(
    width=1024, n_layers=12, n_heads=16, ffn=3072
)  # LLaDA's vocabulary and proportions
VARIANTS = {  # name: logits at all positions, blocks recomputed
    "masked positions, blocks recomputed": (False, True),
    "all positions, blocks recomputed": (True, True),
    "masked positions": (False, False),
    "all positions": (True, False),
}


def loss_at_all_positions(
    lm: DiffusionLM, prompt: Tensor, answer_ids: Tensor, noisy_ids: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """diffusion_loss as in LLaDA's guide: logits at all positions, then those of the masked ones.

    Also returns the logits, which in the guide's loop live until the backward pass is over.
    """
    hidden = lm(torch.cat([prompt, lm.embed(noisy_ids)], dim=1))
    logits = lm.head(hidden).float()  # (B, L, V)

    masked = noisy_ids == lm.config.mask_id  # (B, G)
    at_masked = logits[F.pad(masked, (prompt.shape[1], 0))]  # (n, V)
    losses = F.cross_entropy(at_masked, answer_ids[masked], reduction="none")  # (n,)
    weights = t.to(losses)[:, None].expand_as(masked)[masked]  # (n,)
    return (losses / weights).sum() / answer_ids.numel(), logits


def measure(args: argparse.Namespace, everywhere: bool, recompute: bool) -> None:
    """Run forward and backward passes; print the last one's loss, peak memory and seconds."""
    config = SIZES.get(args.size, CPU_SIZE)
    dtype = getattr(torch, args.dtype)
    device = args.device
    B = args.batch
    G = args.answer

    # A frozen LM of random weights.
    torch.manual_seed(0)
    with torch.device("meta"):
        lm = DiffusionLM(config)
    lm = randomize(lm, dtype, device).requires_grad_(False)
    if recompute:
        recompute_blocks(lm)

    # A batch: a prompt that takes gradients, and a noised answer.
    generator = torch.Generator().manual_seed(0)
    answer_ids = torch.randint(0, 1000, (B, G), generator=generator)
    t = noise_levels(B, generator, stratified=True)
    noisy_ids = noise(answer_ids, t, config.mask_id, generator).to(device)
    answer_ids = answer_ids.to(device)
    P = max(args.positions - G, 1)
    prompt = torch.randn(B, P, config.width, generator=generator).to(device, dtype)
    prompt.requires_grad_()

    def resident() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    before = resident()
    for _ in range(args.repeat):
        started = time.perf_counter()
        logits = None
        if everywhere:
            loss, logits = loss_at_all_positions(lm, prompt, answer_ids, noisy_ids, t)
        else:
            loss = diffusion_loss(lm, prompt, None, answer_ids, noisy_ids, t, answer_ids.numel())
        loss.backward()
        del logits
        value = loss.item()
        seconds = time.perf_counter() - started

    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else resident()
    n_masked = int((noisy_ids == config.mask_id).sum())
    flops = lm_flops(config, B, P + G, P + G, n_masked / B, backward=True)
    fraction = flops / seconds / measured_peak(torch.device(device), dtype)
    print(
        f"loss {value:.4f}, peak {peak:.2f} GB, before the step {before:.2f} GB, "
        f"{seconds:.2f} s, {fraction:.0%} of peak FLOPs",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab.measure_step", description="Memory and time of a training step."
    )
    parser.add_argument("--size", default="cpu", choices=["cpu", *SIZES])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--positions", type=int, default=500, help="prompt and answer")
    parser.add_argument("--answer", type=int, default=128, help="of these positions")
    parser.add_argument("--repeat", type=int, default=1, help="the last one is timed")
    parser.add_argument("--variant", choices=VARIANTS, help="only this one, in this process")
    args = parser.parse_args()

    if args.variant:
        measure(args, *VARIANTS[args.variant])
        return

    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "lab.measure_step", *sys.argv[1:]]
    for name in VARIANTS:
        print(f"{name}: ", end="", flush=True)
        subprocess.run([*command, "--variant", name], env=environment)


if __name__ == "__main__":
    main()
