"""Memory and time of one training step through a frozen LM with random weights.

    export MALLOC_MMAP_THRESHOLD_=65536
    python -m lab.measure_step                        logits at the masked positions
    python -m lab.measure_step --everywhere           at all positions, as in LLaDA's guide
    python -m lab.measure_step --recompute            blocks recomputed in the backward pass
    python -m lab.measure_step --size llada-8b --dtype bfloat16 --device cuda

One process measures one variant, so that the peak is its own. On a CPU the peak is that of the
resident memory; the variable makes malloc return freed memory at once, so that holes do not count.

Shapes: B batch, P prompt positions, G answer tokens, L = P + G, n masked positions, V vocabulary.
"""

import argparse
import resource
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints.model import randomize
from checkpoints.sizes import LM_SIZES
from diffusion_lm import DiffusionLM, LMConfig, diffusion_loss, noise, noise_levels
from training.execution import recompute_blocks

CPU_SIZE = LMConfig(width=1024, n_layers=12, n_heads=16, ffn=3072)  # LLaDA's vocabulary
G = 128


def loss_everywhere(
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


def peak_memory(device: torch.device) -> float:
    """The most memory so far, in GiB: of a GPU what was allocated, else what was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_step(lm: DiffusionLM, B: int, P: int, everywhere: bool) -> str:
    """Loss, peak memory and seconds of a step."""
    weight = lm.embedding.weight
    generator = torch.Generator().manual_seed(0)
    answer_ids = torch.randint(0, 1000, (B, G), generator=generator)
    t = noise_levels(B, generator, stratified=True)
    noisy_ids = noise(answer_ids, t, lm.config.mask_id, generator).to(weight.device)
    answer_ids = answer_ids.to(weight.device)
    prompt = torch.randn(B, P, lm.config.width, generator=generator).to(weight).requires_grad_()

    started = time.perf_counter()
    logits = None
    if everywhere:
        loss, logits = loss_everywhere(lm, prompt, answer_ids, noisy_ids, t)
    else:
        loss = diffusion_loss(lm, prompt, None, answer_ids, noisy_ids, t, answer_ids.numel())
    loss.backward()
    del logits
    value = loss.item()  # waits for the device
    seconds = time.perf_counter() - started

    return f"loss {value:.4f}, peak {peak_memory(weight.device):.2f} GiB, {seconds:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.measure_step")
    parser.add_argument("--size", default="cpu", choices=["cpu", *LM_SIZES])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--everywhere", action="store_true", help="logits at all positions")
    parser.add_argument("--recompute", action="store_true", help="blocks in the backward pass")
    args = parser.parse_args()

    torch.manual_seed(0)
    with torch.device("meta"):
        lm = DiffusionLM(LM_SIZES.get(args.size, CPU_SIZE))
    lm = randomize(lm, getattr(torch, args.dtype), args.device).requires_grad_(False)
    if args.recompute:
        recompute_blocks(lm)
    print(measure_step(lm, args.batch, 500 - G, args.everywhere))


if __name__ == "__main__":
    main()
