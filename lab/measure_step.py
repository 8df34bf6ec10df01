"""Memory and time of one training step through a frozen LM, with logits at the masked positions and at all of them.

    python -m lab.measure_step                                              the CPU figures of the README
    python -m lab.measure_step --size llada-8b --batch 16 --dtype bfloat16 --device cuda

Each variant runs in a process of its own, so that its peak is its own; on the CPU it is that of the resident memory, with
freed memory given back at once (MALLOC_MMAP_THRESHOLD_), so that holes in the heap do not count. Not a test: it takes
minutes and gigabytes.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F

from diffusion_lm import SIZES, DiffusionLM, LMConfig, diffusion_loss, noise, noise_levels
from training.stage import lm_flops, measured_peak

CPU_SIZE = LMConfig(width=1024, n_layers=12, n_heads=16, ffn=3072)  # LLaDA's vocabulary and proportions


def everywhere(lm, prompt, mask, answers, noisy, t, n_tokens):
    """The same loss as diffusion_loss, the way of LLaDA's guide: logits at all positions, then those of the masked ones.

    Returns the logits too: in the guide's loop, too, they live until the backward pass is over.
    """
    logits = lm.head(lm(torch.cat([prompt, lm.embed(noisy)], dim=1), mask)).float()  # (B, L, V)
    masked = noisy == lm.config.mask_id  # (B, G)
    losses = F.cross_entropy(logits[F.pad(masked, (prompt.shape[1], 0))], answers[masked], reduction="none")  # (n,)
    return (losses / t.to(losses)[:, None].expand_as(masked)[masked]).sum() / n_tokens, logits


def step(args) -> None:
    """One forward and backward pass; prints its loss, peak memory and seconds."""
    config, dtype, B, L, G = SIZES.get(args.size, CPU_SIZE), getattr(torch, args.dtype), args.batch, args.positions, args.answer
    torch.manual_seed(0)
    with torch.device(args.device):
        torch.set_default_dtype(dtype)
        lm = DiffusionLM(config).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    lm.recompute = args.recompute
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(0, 1000, (B, G), generator=generator)
    t = noise_levels(B, generator, stratified=True)
    noisy = noise(answers, t, config.mask_id, generator).to(args.device)
    answers = answers.to(args.device)
    prompt = torch.randn(B, max(L - G, 1), config.width, generator=generator).to(args.device, dtype).requires_grad_()
    weights = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for _ in range(args.repeat):
        started = time.perf_counter()
        inputs = lm, prompt, None, answers, noisy, t, answers.numel()
        loss, logits = everywhere(*inputs) if args.all else (diffusion_loss(*inputs), None)
        loss.backward()
        del logits
        value, seconds = loss.item(), time.perf_counter() - started
    cuda = args.device == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    share = lm_flops(config, B, L, int((noisy == config.mask_id).sum())) / seconds / measured_peak(torch.device(args.device), dtype)
    print(f"loss {value:.4f}, peak {peak:.2f} GB, before the step {weights:.2f} GB, {seconds:.2f} s, {share:.0%} of peak FLOPs", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="cpu", choices=["cpu", *SIZES])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--positions", type=int, default=500, help="prompt and answer")
    parser.add_argument("--answer", type=int, default=128, help="of them")
    parser.add_argument("--repeat", type=int, default=1, help="the last one's time counts")
    parser.add_argument("--variant", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--recomputed-only", action="store_true", help="only the first two")
    args = parser.parse_args()
    variants = [("masked positions, blocks recomputed", False, True), ("all positions, blocks recomputed", True, True),
                ("masked positions", False, False), ("all positions", True, False)]  # fmt: skip
    if args.variant is not None:
        _, args.all, args.recompute = variants[args.variant]
        return step(args)
    for i, (name, _, _) in enumerate(variants[:2] if args.recomputed_only else variants):
        print(f"{name}: ", end="", flush=True)
        subprocess.run([sys.executable, *sys.argv, "--variant", str(i)], env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})


if __name__ == "__main__":
    main()
