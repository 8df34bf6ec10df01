"""How probable an LM finds a text: LLaDA's equation 6, scoring by confidence, pseudo-perplexity.

    python -m evaluation.likelihood FILE... --llm DIR         pseudo-perplexity of text files

A masked-diffusion LM gives no exact probability of a text. Three measures stand for it:

    log_likelihood      a random estimate of a lower bound (LLaDA, equation 6)
    confidence_scores   a deterministic score of candidates, as iLLaDA-8B is tested with
    pseudo_perplexity   each token predicted from all others (training/perplexity.py)

`choose` answers questions with choices by one of the first two.

Shapes: R rows of a call, P prompt positions, G answer tokens, L = P + G, V vocabulary, D width.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints.command_line import DTYPES, add_weights, count, is_blank, one_line_errors
from checkpoints.files import read_text
from checkpoints.lm import load_lm
from checkpoints.tokenizer import load_tokenizer
from data import Prompt
from diffa import Spliced, splice
from diffusion_lm import DiffusionLM
from speed.checks import check_finite
from training.perplexity import pseudo_perplexity

SAMPLES = 128  # of equation 6, LLaDA's number
MEASURES = ("likelihood", "confidence")  # by which `choose` can choose


def log_probabilities(
    lm: DiffusionLM,
    prompt: Spliced,
    noisy: Tensor,
    ids: Tensor,
    is_real: Tensor | None = None,
    cfg_scale: float = 0.0,
) -> Tensor:
    """Log-probabilities (R, G) of tokens after a prompt, each given the prompt and `noisy`.

    Args:
        prompt: of one item. noisy: (R, G) what the LM sees of the answers. ids: (R, G) the tokens.
        is_real: (R, G), false where a shorter answer is padded; None: real everywhere.
        cfg_scale: guidance, away from the logits without the prompt's text; 0: none.
    Raises:
        ValueError: prompt and answer exceed the LM's context, or logits are NaN or infinite.
    """
    R, G = noisy.shape
    P = prompt.embeddings.shape[1]
    room = lm.config.max_length - P
    if room < G:
        both = f"prompt of {P} positions and answer of {G}"
        raise ValueError(f"{both} exceed the LM's context of {lm.config.max_length}")

    # Every row has the same prompt; padding follows an answer.
    real = torch.ones_like(noisy, dtype=torch.bool) if is_real is None else is_real
    mask = torch.cat([prompt.mask.expand(R, -1), real], dim=1)  # (R, L)
    rows = torch.arange(P, P + G, device=noisy.device)  # (G,)

    def logits_after(embeddings: Tensor) -> Tensor:
        x = torch.cat([embeddings.expand(R, -1, -1), lm.embed(noisy)], dim=1)  # (R, L, D)
        return lm.head(lm(x, mask, output_rows=rows)).float()  # (R, G, V)

    # Guidance as in the sampler: the text of the prompt is masked, the audio stays.
    logits = logits_after(prompt.embeddings)
    if cfg_scale > 0:
        blank = lm.embed(torch.tensor(lm.config.mask_id, device=noisy.device))  # (D,)
        without_text = torch.where(prompt.is_text[..., None], blank, prompt.embeddings)
        unconditional = logits_after(without_text)
        logits = unconditional + (cfg_scale + 1) * (logits - unconditional)

    # log p = log sigmoid(own logit - logsumexp of the others): near p = 1 it keeps all its digits,
    # by which confident tokens are ranked.
    own = logits.gather(-1, ids[..., None])  # (R, G, 1)
    others = logits.scatter(-1, ids[..., None], -torch.inf).logsumexp(dim=-1)  # (R, G)
    found = F.logsigmoid(own[..., 0] - others)  # (R, G)
    check_finite(lm, found)
    return found


@torch.no_grad()
def log_likelihood(
    lm: DiffusionLM,
    prompt: Spliced,
    answer: Sequence[int],
    *,
    samples: int = SAMPLES,
    batch: int = 16,
    cfg_scale: float = 0.0,
    generator: torch.Generator | None = None,
) -> float:
    """An estimate of the answer's log-likelihood by LLaDA's equation 6, in nats.

    Each sample masks l of the G answer tokens and adds up (G / l) * log p(token). The prompt is
    never masked. Within a batch the l are spread evenly from a random first one.

    Args:
        prompt: of one item. answer: G token ids. samples: masked copies; one is enough for a
            single token, where nothing is random. batch: of them in a forward pass.
        cfg_scale: see `log_probabilities`. generator: of the masks; a CPU generator.
    Raises:
        ValueError: no token, samples that do not divide into batches; see `log_probabilities`.
    """
    G = len(answer)
    if G == 0:
        raise ValueError("an answer without a token has no likelihood")
    if G == 1:
        samples = batch = 1
    batch = min(batch, samples)
    if samples % batch:
        raise ValueError(f"{samples} samples do not divide into batches of {batch}")

    device = prompt.embeddings.device
    ids = torch.tensor(answer, device=device).expand(batch, -1)  # (R, G)
    total = 0.0
    for _ in range(samples // batch):
        # How many tokens each row masks.
        first = torch.randint(1, G + 1, (), generator=generator).double()
        n_masked = (first + torch.arange(batch) * (G / batch)).round().long()
        n_masked = (n_masked - 1) % G + 1  # (R,)

        # Which ones: those of the lowest random ranks.
        ranks = torch.rand(batch, G, generator=generator).argsort(dim=1).argsort(dim=1)
        is_masked = (ranks < n_masked[:, None]).to(device)  # (R, G)
        noisy = torch.where(is_masked, lm.config.mask_id, ids)

        # The weight makes up for the tokens that a row does not score.
        found = log_probabilities(lm, prompt, noisy, ids, cfg_scale=cfg_scale)
        weights = G / n_masked.to(found)  # (R,)
        total += float((found * is_masked).sum(dim=1) @ weights)
    return total / samples


@torch.no_grad()
def confidence_scores(
    lm: DiffusionLM, prompt: Spliced, answers: Sequence[Sequence[int]]
) -> list[float]:
    """A score of each candidate answer: how readily the LM would fill it in; not a likelihood.

    A candidate starts as masks. At each step the true token that the LM finds most probable at its
    position is written there, and its log-probability is added to the score. A candidate of G
    tokens takes G steps; all candidates go through the same forward passes.

    Args:
        prompt: of one item. answers: token ids of each candidate.
    Raises:
        ValueError: a candidate without a token; see `log_probabilities`.
    """
    if not all(answers):
        raise ValueError("a candidate without a token has no score")

    # Candidates as one batch, the shorter ones padded on the right.
    R = len(answers)
    device = prompt.embeddings.device
    lengths = torch.tensor([len(answer) for answer in answers], device=device)  # (R,)
    G = int(lengths.max())
    is_real = torch.arange(G, device=device) < lengths[:, None]  # (R, G)
    ids = torch.zeros(R, G, dtype=torch.long, device=device)
    ids[is_real] = torch.tensor([token for answer in answers for token in answer], device=device)

    is_masked = is_real.clone()
    scores = torch.zeros(R, dtype=torch.float64, device=device)
    for _ in range(G):
        noisy = torch.where(is_masked, lm.config.mask_id, ids)
        found = log_probabilities(lm, prompt, noisy, ids, is_real)  # (R, G)

        # The most probable true token of each row; a complete row adds nothing.
        waiting = is_masked.any(dim=1)
        best = found.masked_fill(~is_masked, -torch.inf).max(dim=1)
        scores += torch.where(waiting, best.values.double(), 0.0)
        is_masked[waiting, best.indices[waiting]] = False
    return scores.tolist()


def choose(
    lm: DiffusionLM,
    tokenizer,
    prompts: list[Prompt],
    audio: Callable[[slice], tuple[Tensor, Tensor]],
    candidates: list[list[str]],
    by: str,
    *,
    batch: int = 16,
) -> Iterator[str]:
    """The candidate text of each prompt that has the best score, in the order of the prompts.

    Args:
        audio: as for sampler.answer. candidates: of each prompt.
        by: one of MEASURES. "likelihood" draws the same masks for every candidate of a length;
            "confidence" adds an end token to each candidate, as iLLaDA's harness does for ARC-C.
        batch: prompts that are heard at once.
    Raises:
        ValueError: as log_likelihood and confidence_scores.
    """
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        with torch.inference_mode():
            heard, heard_mask = audio(rows)

        for i, (prompt, texts) in enumerate(zip(prompts[rows], candidates[rows])):
            one = slice(i, i + 1)
            spliced = splice(lm, [prompt], heard[one], heard_mask[one])
            answers = [tokenizer.encode_text(text) for text in texts]
            if by == "confidence":
                ended = [[*ids, lm.config.end_id] for ids in answers]
                scores = confidence_scores(lm, spliced, ended)
            else:
                scores = []
                for ids in answers:
                    generator = torch.Generator().manual_seed(0)
                    scores.append(log_likelihood(lm, spliced, ids, generator=generator))
            yield texts[scores.index(max(scores))]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.likelihood",
        description="Pseudo-perplexity of text files: each token predicted from all others.",
    )
    option = parser.add_argument
    option("files", type=Path, nargs="+", metavar="FILE", help="plain text in UTF-8")
    option("--llm", type=Path, default=Path("runs/toy/llada"), help="directory (hub format)")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    option("--device", default=usual, help="such as cuda:1 (default: %(default)s)")
    option("--dtype", choices=DTYPES, help="of the LM (default: as in its file)")
    add_weights(parser)
    window = "tokens that the LM sees at once (default: %(default)s)"
    option("--window", type=count, default=128, help=window)
    option("--batch", type=count, default=16, help="windows at once (default: %(default)s)")
    args = parser.parse_args()

    with one_line_errors(parser.prog):
        # Files come first: a mistake shows before the LM is read.
        texts = [read_text(path) for path in args.files]
        for path, text in zip(args.files, texts):
            if is_blank(text):
                raise ValueError(f"{path}: holds no text")
        eight = args.weights == "int8"
        lm = load_lm(args.llm, DTYPES.get(args.dtype), args.device, int8=eight).eval()
        tokenizer = load_tokenizer(args.llm, lm.config)
        for path, text in zip(args.files, texts):
            ids = tokenizer.encode_text(text)
            found = pseudo_perplexity(lm, ids, window=args.window, batch=args.batch)
            print(f"{path}: {len(ids)} tokens, pseudo-perplexity {found:.2f}", flush=True)


if __name__ == "__main__":
    main()
