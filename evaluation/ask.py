"""The command of sampler.py: ask a question about an audio file and watch the masks fill.

    python sampler.py CLIP "QUESTION"                     answers, showing each denoising step
    python sampler.py CLIP "QUESTION" --trace out.html    also writes a page with all steps
    python sampler.py CLIP CLIP "QUESTION" --also "QUESTION"     each question about each clip
    python sampler.py FOLDER "QUESTION" --out out.jsonl   in batches, to a file that resumes
    python sampler.py MANIFEST.json - --out out.jsonl     the questions of a manifest itself

The answer goes to the standard output. Where that is a terminal, the steps are one changing line of
it; elsewhere they go to the standard error, so that a script reads the answer alone.

Shapes: G answer tokens, S samples.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from checkpoints.command_line import (
    add_model_arguments,
    count,
    model_options,
    one_line_errors,
    question_text,
)
from checkpoints.files import check_writable
from checkpoints.progress import add_quiet, is_quiet
from data import build_prompt, read_audio
from diffa import AUDIO_PARTS, DIFFA
from encoder import SAMPLE_RATE, EncoderConfig
from evaluation.clips import (
    OWN,
    RULE_OF,
    USUAL_LENGTH,
    Question,
    answer_to_file,
    find_questions,
    hear_clips,
)
from evaluation.screen import Screen, token_texts
from evaluation.trace import END, MASK, TEXT, Step, write_trace
from sampler import Answer, Generation, SamplerConfig, answer, generate
from speed.checks import CHOICES

USUAL_ADAPTERS = "runs/toy/stage2"
BUNDLED = Path(__file__).parents[1] / "toy/weights/stage2"  # they answer where no run is
DELIBERATE = "fill in the tokens with a lower confidence again, seeing the others (default: none)"
AUTO_LENGTH = 1024  # most tokens of an answer that grows until its end


def auto_or_int(text: str) -> int | str:
    """The value of --length. Raises ValueError: neither "auto" nor an integer."""
    return text if text == "auto" else int(text)


def make_parser(several: bool = False) -> argparse.ArgumentParser:
    """The options of the command. several: `clip` is a list, of files, folders and manifests."""
    parser = argparse.ArgumentParser(description="Ask a question about audio files.")
    option = parser.add_argument
    files = "WAV, FLAC, OGG or MP3; any rate; mono or stereo"
    if several:
        option("clip", nargs="+", help=f"{files}; or a folder of them, or a manifest (.json)")
        option(
            "question",
            type=question_text,
            help=f"in quotes; {OWN} asks the `input` of each item of a manifest",
        )
    else:
        option("clip", help=files)
        option("question", type=question_text, help="in quotes")
    add_model_arguments(parser, None)
    option("--stage", choices=AUDIO_PARTS, help="parts in the prompt (default: the adapters' own)")

    # How the answer is filled in.
    default = "(default: %(default)s)"
    trained = "as the adapters were trained with"
    auto = "auto: it grows by blocks until it ends"
    option("--length", type=auto_or_int, help=f"tokens of the answer (default: {trained}); {auto}")
    whole = "default: the whole answer; with --length auto as many as it was trained with"
    option("--block-length", type=int, help=f"tokens of a block ({whole})")
    behind = "no masks behind the current block, as in iLLaDA (default: as the LM was trained)"
    option("--append", action="store_true", default=None, help=behind)
    option("--rule", default="threshold", choices=CHOICES["rule"], help=default)
    option("--steps", type=int, help="of the count rule (default: one a token)")
    option("--threshold", type=float, help="of the threshold rule (default: 0.9)")
    option("--factor", type=float, help="of the factor rule (default: 1)")
    option("--frechet", type=float, help="of the frechet rule (default: 0.25)")
    last = "of the factor rule: as in DIFFA-2, one that fails alone stays"
    option("--last-candidate", action="store_true", help=last)
    option("--temperature", type=float, default=0.0, help=f"of Gumbel noise, 0: none {default}")
    option("--deliberate", type=float, help=DELIBERATE)
    option("--remasking", default="low_confidence", choices=CHOICES["remasking"], help=default)
    option("--cfg-scale", type=float, default=0.0, help=f"of the guidance, 0: none {default}")
    option("--seed", type=int, default=0, help=f"of temperature and random remasking {default}")
    option("--cache", default="none", choices=CHOICES["cache"], help=default)
    option("--refresh", type=int, default=1, help=f"blocks that share a prompt pass {default}")
    option("--compile", action="store_true", help="torch.compile; pays off for many answers only")
    option("--cut", action="store_true", help="use only the start of a clip that is too long")
    return parser


def sampler_config(args: argparse.Namespace, length: int, most: int = AUTO_LENGTH) -> SamplerConfig:
    """The sampler's settings; the length counts where the options give none.

    most: tokens of an answer with --length auto, which grows by blocks of `length`.

    Raises ValueError: an impossible setting, or one that the rule does not use.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name in RULE_OF.keys() & given.keys():
        if args.rule != RULE_OF[name]:
            raise ValueError(
                f"--{name} does nothing under --rule {args.rule}; add --rule {RULE_OF[name]}"
            )

    if args.length == "auto":
        given |= {"length": most, "append": True}
        given.setdefault("block_length", min(length, most))
    names = {field.name for field in fields(SamplerConfig)} & given.keys()
    config = SamplerConfig(**{"length": length, **{name: given[name] for name in names}})

    # Others need several blocks, or chance.
    for name, usual in (("append", False), ("refresh", 1)):
        is_one_block = config.n_blocks == 1 and args.length != "auto"
        if given.get(name, usual) != usual and is_one_block:
            raise ValueError(
                f"--{name} does nothing to an answer of one block; add --block-length, or "
                "--length auto"
            )
    by_chance = given.get("temperature") or given.get("remasking") == "random"
    if given.get("seed") and not by_chance:
        raise ValueError("--seed does nothing without --temperature or --remasking random")
    return config


def answer_in_steps(
    model: DIFFA,
    waveform: Tensor,
    name: str,
    question: str,
    config: SamplerConfig,
    *,
    cut: bool = False,
    show: Callable[[Step], None] | None = None,
    decode: Callable[..., Generation] = generate,
) -> tuple[Answer, list[Step]]:
    """Answer a question about a clip (S,) at 16 kHz, and keep each step.

    name: of the clip, for errors. cut: shorten a clip that is too long. show: called after each
    step. decode: as of `answer`. Raises ValueError: something cannot be used.
    """
    lm_config = model.lm.config
    kinds = {lm_config.mask_id: MASK, lm_config.end_id: END}
    steps = []

    def on_step(ids: Tensor, confidence: Tensor) -> None:
        # Of an answer that grows, the blocks that exist: the last one has the last new token.
        n = ids.shape[1]
        if lm_config.appends if config.append is None else config.append:
            last = int((confidence[0] > 0).nonzero().max())
            n = min((last // config.block_length + 1) * config.block_length, n)
        row = ids[0, :n].tolist()
        texts = token_texts(model.tokenizer, row, lm_config.mask_id, lm_config.end_id)
        steps.append(Step(texts, confidence[0, :n].tolist(), [kinds.get(i, TEXT) for i in row]))
        if show:
            show(steps[-1])

    def hear(rows: slice) -> tuple[Tensor, Tensor]:
        return hear_clips(model, [waveform], [name], cut)

    prompt = build_prompt(model.tokenizer, question)
    (result,) = answer(
        model.lm, model.tokenizer, [prompt], hear, config, decode=decode, on_step=on_step
    )
    return result, steps


def check_settings(args: argparse.Namespace) -> None:
    """Raise ValueError: impossible settings of the sampler; known before weights are read.

    The adapters' length is not known yet: the one taken here allows any number of steps.
    """
    length = max(args.steps or 0, 0) or USUAL_LENGTH
    if args.block_length and args.length is None:
        length = max(length, 2 * args.block_length)  # may be: --append needs several blocks
    sampler_config(args, length, most=length if args.length == "auto" else AUTO_LENGTH)


def read_clip(args: argparse.Namespace, path: str) -> Tensor:
    """The samples (S,) of a clip, with --cut those of the longest window. Raises AudioError."""
    longest = EncoderConfig().n_samples / SAMPLE_RATE  # of every Whisper: 30 s
    return read_audio(path, seconds=longest if args.cut else None)


def choose_weights(args: argparse.Namespace) -> None:
    """Without options for weights: those of the usual run, else the bundled ones, which is said."""
    if args.adapters is None:
        args.adapters = USUAL_ADAPTERS
        given = args.whisper or args.llm or args.random_weights
        if not given and not Path(USUAL_ADAPTERS).exists() and BUNDLED.exists():
            args.adapters = str(BUNDLED)
            bundled = f"no {USUAL_ADAPTERS} here: the bundled toy/weights answer"
            print(f"({bundled}; `make demo` trains your own)", file=sys.stderr)


def load_model(args: argparse.Namespace) -> tuple[DIFFA, SamplerConfig]:
    """The model of the command line, and how it answers. Raises ValueError or OSError."""
    choose_weights(args)
    options = model_options(args)
    model = DIFFA.from_pretrained(
        args.whisper, args.llm, args.adapters, stage=args.stage, **options
    ).eval()

    # In answers of another length than in their training the adapters make more errors.
    trained = model.answer_length
    if not (args.length or trained):
        unknown = "the adapters do not record the length of their answers"
        print(f"({unknown}: --length {USUAL_LENGTH})", file=sys.stderr)
    room = model.lm.config.max_length // 2  # the prompt takes less than the other half
    return model, sampler_config(args, trained or USUAL_LENGTH, most=min(AUTO_LENGTH, room))


def ask(
    args: argparse.Namespace, show: Callable[[Step], None]
) -> tuple[Answer, list[Step], Tensor]:
    """Answer the question of a command line with one clip.

    Args:
        show: called after each step.
    Returns:
        the answer; its steps; and what was heard, (S,) at 16 kHz.
    Raises:
        ValueError or OSError: something cannot be used.
    """
    check_settings(args)
    waveform = read_clip(args, args.clip)
    model, config = load_model(args)
    result, steps = answer_in_steps(
        model, waveform, args.clip, args.question, config, cut=args.cut, show=show
    )
    return result, steps, waveform[: model.encoder.config.n_samples]


def answer_live(args: argparse.Namespace, questions: list[Question]) -> None:
    """Answer one question after the other; print the answers, and each step as it comes."""
    if args.batch:
        raise ValueError("--batch does nothing without --out: answers are shown one by one")
    if args.trace:
        read = {Path(path).resolve() for path in [*args.clip, *(q.clip for q in questions)]}
        if args.trace.resolve() in read:
            raise ValueError(f"--trace {args.trace} is read by this command; give another file")
        check_writable(args.trace)
        if len(questions) > 1:
            raise ValueError(f"--trace shows one answer, and {len(questions)} are asked for")
    check_settings(args)
    waveforms = {clip: read_clip(args, clip) for clip in dict.fromkeys(q.clip for q in questions)}
    model, config = load_model(args)

    screen = Screen()
    for asked in questions:
        if len(questions) > 1:
            print(f"{asked.clip}: {asked.question}", file=sys.stderr, flush=True)
        waveform = waveforms[asked.clip]
        try:
            result, steps = answer_in_steps(
                model,
                waveform,
                asked.clip,
                asked.question,
                config,
                cut=args.cut,
                show=screen.show,
            )
        finally:
            screen.clear()

        # The answer alone goes to the standard output.
        print(result.text, flush=True)
        calls = f"{result.calls} model calls for {len(steps[-1].texts)} positions"
        counts = f"{calls}, {result.n_tokens} of them text"
        if not is_quiet():
            print(f"({counts})", file=sys.stderr)
        if args.trace:
            heard = waveform[: model.encoder.config.n_samples]
            write_trace(args.trace, asked.question, result.text, counts, heard, steps)


def answer_many(args: argparse.Namespace, questions: list[Question]) -> None:
    """Write the answers to the file `args.out`; exit with an error if clips could not be read."""
    if args.trace:
        raise ValueError("--trace and --out exclude each other")
    check_settings(args)
    missing = [q.clip for q in questions if not os.path.isfile(q.clip)]
    if missing:
        raise ValueError(f"{missing[0]}: no such audio file ({len(missing)} are missing)")

    args.batch = args.batch or 16
    choose_weights(args)
    n_bad = answer_to_file(args, questions, lambda: load_model(args))
    print(f"{args.out}: {len(questions)} questions answered", file=sys.stderr)
    if n_bad:
        raise ValueError(f"{n_bad} clips could not be read: see `error` in {args.out}")


def main() -> None:
    parser = make_parser(several=True)
    option = parser.add_argument
    another = {"type": question_text, "metavar": "QUESTION", "help": "another; repeatable"}
    option("--also", action="append", default=[], **another)
    option("--out", type=Path, help="write answers to this JSONL, in batches; resumes it")
    option("--batch", type=count, help="with --out: clips at a time (default: 16)")
    option("--trace", type=Path, help="also write the steps as an HTML page, here")
    add_quiet(parser)
    args = parser.parse_args()

    # An old terminal may lack characters of the answer.
    sys.stdout.reconfigure(errors="backslashreplace")
    with one_line_errors("sampler.py"):
        questions = find_questions(args.clip, [args.question, *args.also])
        if args.out:
            answer_many(args, questions)
        else:
            answer_live(args, questions)
