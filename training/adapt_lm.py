"""Turn a causal LM into a masked-diffusion LM that reads text and what imitates audio.

    python -m training.adapt_lm --lm smollm2 --text texts/train.txt --validation texts/test.txt \\
        --out runs/smol/lm

No small masked-diffusion LM is published, and small causal ones are. Their weights are a good
start: attention opens in both directions at once, position i predicts token i from the first step
on (no shift of the logits), and the loss is LLaDA's (diffusion_lm.diffusion_loss). Everything
trains but the embedding table, so that audio adapters and text keep the table of the causal LM.

The batches (text_rows.py) also teach what DIFFA needs before any adapter exists: to quote its
prompt, and to read words and the attributes of a voice from blurred embeddings. A run that was
stopped or killed resumes when the same command is run again.

Shapes: B batch, P prompt positions, G answer tokens, D LM width, V vocabulary.
"""

import argparse
import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.chats import CHATS
from checkpoints.command_line import DTYPES, count, count_or_zero, one_line_errors, seed
from checkpoints.digests import digest
from checkpoints.downloads import require
from checkpoints.files import check_writable, refuse_model, write_json
from checkpoints.lm import added_ids, load_lm, read_lm_config, save_lm
from checkpoints.tokenizer import Tokenizer, load_tokenizer
from diffusion_lm import DiffusionLM, diffusion_loss, noise, noise_levels
from training.exam import Exam
from training.flops import Work, lm_flops, measured_peak
from training.imitation import blurred_embeddings
from training.loop import Trainer
from training.optimizers import TrainConfig
from training.questions import spoken_lines
from training.recipe import given, learning_rate
from training.run_files import checkpoints
from training.text_rows import Mixture, TextRows

# Ours throughout; no paper says how a small LM is adapted for DIFFA.
TRAIN = TrainConfig(
    steps=1000,
    batch=128,
    lr=6e-4,
    warmup=100,
    schedule="cosine",
    weight_decay=0.0,  # the causal weights are kept where nothing speaks against them
    clip=1.0,
    optimizer="adamw",
    save_every=250,
    validate_every=250,
    keep=1,
)
T_MIN = 0.5  # with few masks, the rest of the answer gives a word away, and the prompt is not read
PLAIN_T_MIN = 0.1  # of plain text, which has no prompt
MASK_SEED = 0  # of the vector of [MASK]
BLUR = 0.6  # largest fraction of other words in a word that imitates audio
ITEMS = 200  # sentences of the validation for each figure
JITTER = 0.7  # largest noise on it, relative to the embeddings


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """The LM, its tokenizer, and how it is computed.

    autocast: to bfloat16. The weights that train are float32. accumulate: parts of a batch that are
    computed one after the other.
    """

    lm: DiffusionLM
    tokenizer: Tokenizer
    autocast: bool
    work: Work
    accumulate: int = 1

    @property
    def device(self) -> torch.device:
        return self.lm.embedding.weight.device

    def losses(self, rows: dict[str, Tensor], generator: torch.Generator) -> Iterator[Tensor]:
        """Masked-diffusion losses of the parts of a batch of TextRows (LLaDA, equation 5)."""
        lm = self.lm
        B, G = rows["answer_ids"].shape

        # Forward process.
        t_min = PLAIN_T_MIN if rows["is_plain"] else T_MIN
        t = noise_levels(B, generator, t_min, stratified=True)  # (B,)
        noisy_ids = noise(rows["answer_ids"], t, lm.config.mask_id, generator)  # (B, G)

        # On a GPU the noise of the embeddings is drawn there, from the seed of the step.
        blurring = generator
        if self.device.type != "cpu":
            blurring = torch.Generator(self.device).manual_seed(generator.initial_seed())

        def moved(values: Tensor) -> Tensor:
            return values.to(self.device, non_blocking=True)

        ids, mask, is_audio = (moved(rows[name]) for name in ("ids", "mask", "is_audio"))
        prompt = blurred_embeddings(lm, ids, is_audio, lm.config.mask_id, BLUR, blurring, JITTER)

        answer_ids = moved(rows["answer_ids"])
        noisy_ids = moved(noisy_ids)
        for part in torch.arange(B).chunk(self.accumulate):
            # Rows of similar length come together: columns that pad all of them are left out.
            used = rows["mask"][part].any(dim=0)  # (P,)
            P = int(used.sum())

            # A backward pass costs twice the forward pass: all weights train.
            self.work.tokens += len(part) * (P + G)
            self.work.flops += 3 * lm_flops(lm.config, len(part), P + G, P + G, G)

            columns = slice(len(used) - P, None)
            inputs = (prompt[part, columns], mask[part, columns], answer_ids[part], noisy_ids[part])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                yield diffusion_loss(lm, *inputs, t[part], B * G)

    def loss_of_step(
        self, rows: TextRows, steps: int, workers: int
    ) -> Callable[[int, torch.Generator], Iterator[Tensor]]:
        """What the loop calls for the losses of a step; the rows are made ahead, up to `steps`."""
        batches = None

        def losses(step: int, generator: torch.Generator) -> Iterator[Tensor]:
            nonlocal batches
            if batches is None:  # the first step of this run
                pin = self.device.type == "cuda"
                batches = rows.batches(range(step, steps), workers, pin)
            return self.losses(next(batches), generator)

        return losses


def choose_mask(path: Path, name: str | None) -> int:
    """The id of the added token that becomes [MASK]: `name`, or the last one that is free.

    Raises ValueError: there is no such token.
    """
    formats = "".join(f"{chat.published} {chat.answer}" for chat in CHATS.values())
    end_id = read_lm_config(path, causal_weights=True).end_id
    added = added_ids(path)
    free = {token: i for token, i in added.items() if token not in formats and i != end_id}
    if name is None and free:
        return max(free.values())
    if name not in free:
        listed = ", ".join(list(free)[-5:]) or "none"
        problem = f"--mask {name} is no added token that is free" if name else "no [MASK]"
        raise ValueError(f"{path}: {problem}; free added tokens are: {listed}")
    return free[name]


def load_causal(
    path: Path, mask: str | None, device: str
) -> tuple[DiffusionLM, Tokenizer, torch.dtype]:
    """A causal LM's weights in a DiffusionLM (float32) with a [MASK], its tokenizer, its dtype."""
    mask_id = choose_mask(path, mask)
    lm = load_lm(path, None, device, causal_weights=True, mask_id=mask_id)
    tokenizer = load_tokenizer(path, lm.config)
    dtype = lm.embedding.weight.dtype

    with torch.no_grad():
        # Copies: on the CPU the parameters are the mapped file, which must not change.
        for parameter in lm.parameters():
            parameter.data = parameter.to(torch.float32, copy=True)

        # The unused rows of a published table are all one vector, near to the chat markers. The
        # mask gets a vector of its own.
        table = lm.embedding.weight  # (V, D)
        drawn = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(MASK_SEED))
        table[mask_id] = drawn.to(device) * table.pow(2).mean().sqrt()
    return lm, tokenizer, dtype


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where an adaptation reads and writes, and how it is executed.

    source: the causal LM. text: files of a sentence a line; validation: such a file, or None, of
    which validation_items sentences are used. mask: see choose_mask. dtype: of the arithmetic.
    accumulate: see Adaptation. workers: processes that make rows.
    """

    source: Path
    text: list[Path]
    out: Path
    validation: Path | None
    validation_items: int
    mask: str | None
    device: str
    dtype: str
    accumulate: int
    workers: int


def check_run(run: Run, config: TrainConfig) -> None:
    """Raise ValueError or OSError: the new LM cannot be written or would overwrite another, the
    source is no LM with a tokenizer, or the batch does not divide.
    """
    if run.out.resolve() == run.source.resolve():
        raise ValueError(
            f"--out {run.out} is --lm, which would be overwritten; take another folder"
        )
    if not checkpoints(run.out / "checkpoint.pt"):
        refuse_model(run.out)
    require(llm=run.source)
    if not (run.source / "tokenizer.json").is_file():
        raise ValueError(f"{run.source}: holds no tokenizer.json; download it beside config.json")
    if config.batch % run.accumulate:
        raise ValueError(f"--batch {config.batch} does not divide into {run.accumulate} parts")
    run.out.mkdir(parents=True, exist_ok=True)
    check_writable(run.out / "config.json")


def adapt(run: Run, config: TrainConfig, mixture: Mixture) -> None:
    """Adapt the LM in run.source and write it to run.out, or resume.

    Raises:
        ValueError, OSError: texts, a tokenizer or weights that cannot be used, or a batch that does
        not divide into its parts. SystemExit: see Trainer.run.
    """
    # A mistake shows before anything large is read.
    check_run(run, config)
    lines = [line for file in run.text for line in spoken_lines(file)]
    held_out = spoken_lines(run.validation) if run.validation else []

    # The LM, of which the table is frozen.
    lm, tokenizer, dtype = load_causal(run.source, run.mask, run.device)
    lm.embedding.requires_grad_(False)
    work = Work(peak=measured_peak(run.device, DTYPES[run.dtype]))
    autocast = run.dtype == "bfloat16"
    adaptation = Adaptation(
        lm=lm.train(),
        tokenizer=tokenizer,
        autocast=autocast,
        work=work,
        accumulate=run.accumulate,
    )

    # The text.
    rows = TextRows(tokenizer, lines, mixture, lm.config, config.seed)
    rows[0]  # whether rows fit the LM's context
    exam = None
    if held_out:
        others = TextRows(tokenizer, held_out, mixture, lm.config, seed=0)
        exam = Exam(adaptation, others, run.validation_items)

    # A run resumes only with the same LM, tokenizer, [MASK], text and mixture.
    identity = asdict(mixture) | {"lm": digest(lm.named_parameters()), "dtype": run.dtype}
    identity |= {"tokenizer": tokenizer.digest, "mask_id": lm.config.mask_id}
    identity["text"] = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    trainer = Trainer(
        {name: p for name, p in lm.named_parameters() if p.requires_grad},
        adaptation.loss_of_step(rows, config.steps, run.workers),
        config,
        run.out / "checkpoint.pt",
        "adapting",
        identity=identity,
        validate=exam,
        metrics=run.out / "metrics.jsonl",
        work=work,
    )
    losses = trainer.run()

    # In the hub's layout, with the dtype in which the source was read.
    save_lm(lm.to(dtype), run.out)
    shutil.copy(run.source / "tokenizer.json", run.out)
    write_json(run.out / "training.json", {"losses": losses, "minutes": trainer.minutes()})


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and adapt."""
    parser = argparse.ArgumentParser(description="Turn a causal LM into a masked-diffusion LM.")
    option = parser.add_argument
    option("--lm", dest="source", type=Path, required=True, help="directory (hub format)")
    option("--text", type=Path, nargs="+", required=True, help="files of one sentence a line")
    option("--validation", type=Path, help="such a file of sentences that do not train")
    option("--validation-items", type=count, help=f"sentences a figure (default {ITEMS})")
    option("--out", type=Path, required=True, help="directory of the new LM, and of the run")
    option("--mask", metavar="TOKEN", help="added token that becomes [MASK] (default: the last)")
    option("--answer-length", type=count, help="tokens that are noised (default 32)")

    # Optimisation, and how it is executed.
    option("--steps", type=count, help=f"(default {TRAIN.steps})")
    option("--batch", type=count, help=f"rows of a step (default {TRAIN.batch})")
    option("--accumulate", type=count, default=1, help="parts of a batch, one after the other")
    option("--lr", type=learning_rate, help=f"peak learning rate (default {TRAIN.lr})")
    option("--seed", type=seed, help="of rows and noise (default 0)")
    option("--validate-every", type=count_or_zero, help=f"steps (default {TRAIN.validate_every})")
    option("--save-every", type=count, help=f"steps (default {TRAIN.save_every})")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    option("--device", default=usual, help="(default: %(default)s)")
    dtypes = ("float32", "bfloat16")
    dtype = "bfloat16" if usual == "cuda" else "float32"
    option(
        "--dtype", choices=dtypes, default=dtype, help="of the arithmetic (default: %(default)s)"
    )
    option("--workers", type=count_or_zero, default=2, help="processes that make rows (default 2)")
    args = parser.parse_args(arguments)
    for name in ("validate_every", "validation_items"):
        if getattr(args, name) and not args.validation:
            option_name = "--" + name.replace("_", "-")
            parser.error(f"{option_name} has no effect without --validation FILE")
    args.validation_items = args.validation_items or ITEMS

    config = replace(TRAIN, **given(TrainConfig, vars(args)))
    mixture = Mixture(batch=config.batch, **given(Mixture, {"answer_length": args.answer_length}))
    run = Run(**{field.name: getattr(args, field.name) for field in fields(Run)})
    with one_line_errors("python -m training.adapt_lm"):
        adapt(run, config, mixture)


if __name__ == "__main__":
    main()
