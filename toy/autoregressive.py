"""The autoregressive twin: the same transformer sees only what came before, and writes one token after the other.

To tell what diffusion is worth to a model that listens, the paper gives LLaMA-3.1 the same adapters and data as LLaDA
(28.40 against 51.71 on MMAU, 38.40 against 54.72 on MMSU). Those two LMs also differ in what they had read; the twin does
not. It starts from the same random weights as the run's diffusion LM and learns from the same batches, for as many steps,
but each token from those before it. Only the learning rate takes a way of its own: one cosine over all steps, where the
diffusion LM has one for each of its phases.

Its answers are greedy. Keys and values of what was read are kept, which is exact here, since nothing that comes later
changes them: a call reads one position, as in any autoregressive model whose speed is to be compared.

    python -m toy.autoregressive --run runs/toy                  after `toy/pretrain.py lm`; writes runs/toy/twin and twin.json
    python train_asr.py --llm runs/toy/twin --out runs/toy/twin_stage1             both stages take it as they take the other
    python train_instruct.py --llm runs/toy/twin --adapters runs/toy/twin_stage1 --out runs/toy/twin_stage2

Shapes: B batch, R rows of it that are still being written, P prompt positions, G answer tokens, M positions of a call.
"""

import argparse
import bisect
import functools
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints import weights
from diffa import Spliced
from diffusion_lm import DiffusionLM, next_token_loss
from toy.grammar import ANSWER_LENGTH as G
from toy.imitation import GAP, as_heard
from toy.pretrain import GATE, MIXED, batch_of, examine, new_lm, phases, short_of
from sampler import Generation, SamplerConfig, check_prompt
from checkpoints.tokenizer import load_tokenizer
from training.loop import fit


@torch.no_grad()
def greedy(lm: DiffusionLM, prompt: Spliced, length: int) -> Generation:
    """Write answers to a batch of spliced prompts, always the likeliest next token, until an item's end token.

    Args:
        prompt: left-padded, as DIFFA.splice makes it; embeddings (B, P, D). length: G, tokens of an answer at most.
    Returns:
        ids (B, G), filled with the end token after the first one; `steps` (B,): calls of the model until it was written.
        The first call reads the prompt, each other one token.
    Raises:
        ValueError: the LM is not causal, a prompt is empty, or prompt and answer exceed the LM's context.
    """
    started = time.perf_counter()
    if not lm.config.causal:
        raise ValueError("this LM sees in both directions and was not trained to go on with a text; sampler.generate answers with it")
    check_prompt(lm, prompt, SamplerConfig(length, length, length))
    (B, P, _), device, end_id = prompt.embeddings.shape, prompt.embeddings.device, lm.config.end_id
    if P == 0 or not prompt.mask[:, -1].all():
        raise ValueError("a prompt has nothing at its end to go on from; is it empty, or padded on the right?")
    real = torch.cat([prompt.mask, prompt.mask.new_ones(B, length)], dim=1)  # (B, P + G)
    places = torch.arange(P + length, device=device)
    ids, calls = torch.full((B, length), end_id, device=device), torch.zeros(B, dtype=torch.long, device=device)
    rows, cache = torch.arange(B, device=device), lm.new_cache(B, P + length)
    x = prompt.embeddings  # (R, M, D): what the model has not read yet
    for n in range(length):
        M, L = x.shape[1], P + n  # positions of this call, and of all so far
        filled = [(k[:, :, :L], v[:, :, :L]) for k, v in cache]  # (R, K, L, C) each, written to in place
        hidden = lm(x, real[rows, :L], filled, places[L - M : L], wanted=places[M - 1 : M])  # (R, 1, D)
        token = lm.head(hidden[:, 0]).argmax(dim=-1)  # (R,)
        ids[rows, n] = token
        calls[rows] += 1
        going = token != end_id  # (R,)
        if not going.any():
            break
        if not going.all():  # what is done costs nothing
            rows, token, cache = rows[going], token[going], [(k[going], v[going]) for k, v in cache]
        x = lm.embed(token[:, None])  # (R, 1, D)
    return Generation(ids, calls, ((ids == end_id).cumsum(dim=1) == 0).sum(dim=1), time.perf_counter() - started)


def pretrain_twin(run: Path, seed: int, device: str) -> dict:
    """Train and save `run/twin` on what `run/llada` was trained on; returns the same figures as pretrain.pretrain_lm.

    Args:
        seed: the one that the run's LM was made with, or the text is another.
    Raises:
        ValueError: the run has no diffusion LM, or one that went through other phases than pretrain.py now has.
    """
    if not (run / "lm.json").is_file():
        raise ValueError(f"{run / 'lm.json'}: no such file; it tells the twin's steps. Run python -m toy.pretrain lm --out {run}")
    told, known = weights.read_json(run / "lm.json"), phases(seed)
    steps, asked = told["steps"], [[], [], *told["asked"]]  # asked: the kinds of question that each phase had more of
    ends = list(itertools.accumulate(training.steps for training in known))
    if steps not in ends:
        raise ValueError(f"{run / 'lm.json'}: its LM took {steps} steps, but phases of pretrain.py end after {ends}; make that LM anew")
    config = replace(weights.read_lm_config(run / "llada"), causal=True)
    tokenizer = load_tokenizer(run / "llada", config)
    lm, gap = new_lm(config, seed, device), tokenizer.id(GAP)

    def loss_of_step(step: int, generator: torch.Generator) -> Tensor:
        number = bisect.bisect_right(ends, step)  # the phase that the diffusion LM was in
        training = known[number]
        step -= ends[number] - training.steps
        prompts, answers = batch_of(lm, tokenizer, step, training, asked[number], device)
        embeddings = as_heard(lm, prompts, gap, MIXED, generator) if number else lm.embed(prompts.ids)  # (B, P, D)
        return next_token_loss(lm, embeddings, prompts.mask, answers, answers.numel())

    training = replace(known[1], steps=steps, seed=seed)  # the diffusion phase's recipe
    losses = fit(dict(lm.named_parameters()), loss_of_step, training, run / "checkpoints" / "twin.pt", "twin")
    result = examine(lm, tokenizer, seed, device, functools.partial(greedy, length=G))
    weights.save_llada(lm, run / "twin")
    (run / "twin" / "tokenizer.model").write_bytes((run / "llada" / "tokenizer.model").read_bytes())
    return result | {"steps": len(losses), "asked": told["asked"], "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the autoregressive twin of a run's language model.")
    parser.add_argument("--run", type=Path, default=Path("runs/toy"))
    parser.add_argument("--seed", type=int, default=0, help="the run's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    started = time.perf_counter()
    try:
        result = pretrain_twin(args.run, args.seed, args.device)
    except ValueError as error:
        raise SystemExit(f"autoregressive.py: {error}") from None
    result["minutes"] = (time.perf_counter() - started) / 60
    weights.write_json(args.run / "twin.json", result)
    tqdm.write(json.dumps({k: v for k, v in result.items() if k != "losses"}))
    if short := short_of(GATE, result):  # not refused: how well it reads is one of the things compared
        tqdm.write(f"warning: below what a diffusion LM needs to be trained on: {short}")


if __name__ == "__main__":
    main()
