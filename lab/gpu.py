"""What one GPU makes of full-size shapes: sampling against its floors, and training steps.

    python -m lab.gpu --out docs/gpu.md             all parts, at most 240 s; also writes gpu.json
    python -m lab.gpu --out x.md --parts stage1     one part
    python -m lab.gpu --out x.md --tiny             toy shapes on any device, to try the script

Weights are random and drawn on the device. Each part is a process of its own with a time limit. It
writes each table when it is measured, so a failure or a full memory loses only what comes after.
The parts: stage1 and stage2 time training steps; joined compares the products of speed/joined.py in
8 of LLaDA-8B's blocks, which compile fast; the others are sizes of lab.benchmark to sample with.

Shapes: B items, P prompt positions, G answer tokens, L = P + G, n masked tokens.
"""

import argparse
import functools
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from checkpoints.command_line import count, one_line_errors
from checkpoints.files import check_writable, whole_file, write_json
from diffa import Spliced
from diffusion_lm import DiffusionLM, LMConfig
from lab.benchmark import (
    BATCH,
    HEADS,
    RANDOM,
    one_by_one,
    random_lm,
    take,
    time_setting,
)
from lab.gpu_report import Report, page
from lab.gpu_training import STAGES, train
from lab.one_call import calls_of, time_calls
from lab.roofline import clock, floor_of_answer, floor_of_call, measure_rates, time_in_turns
from sampler import SamplerConfig, generate, generate_plain

# Seconds of each part.
LIMITS = {"stage1": 60, "stage2": 50, "joined": 60, "llada-8b": 170, "qwen3-0.6b": 90}
ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")  # how a traceback's last part begins
LEAST = 15  # seconds; with less left a part is not started
TINY = LMConfig(width=32, n_layers=2, n_heads=2, ffn=48, vocab=272, mask_id=256, end_id=257)


# ---- sampling
def compilations() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def profile(work: Callable[[], object], device: torch.device, most: int = 12) -> list[list[str]]:
    """Where the time of some work goes: its longest kernels, with calls, ms and percent."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    side = "device" if device.type == "cuda" else "cpu"
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU]
    work()
    with record(activities=activities if device.type == "cuda" else activities[1:]) as recorded:
        work()
        clock(device)

    # The host's calls that launch a kernel would count it twice.
    spent = {}
    for event in recorded.key_averages():
        if side == "cpu" or "cuda" in str(event.device_type).lower():
            spent[event.key] = (event.count, getattr(event, f"self_{side}_time_total") / 1000)
    total = sum(ms for _, ms in spent.values()) or 1.0
    longest = sorted(spent.items(), key=lambda item: -item[1][1])[:most]
    rows = [[n[:70], str(c), f"{ms:.3f}", f"{100 * ms / total:.0f} %"] for n, (c, ms) in longest]
    return [*rows, ["all kernels", str(sum(c for c, _ in spent.values())), f"{total:.3f}", "100 %"]]


def sample(report: Report, name: str, device: str, tiny: bool) -> None:
    """Single calls and whole answers against their floors, eager and compiled; a profile."""
    config = TINY if tiny else RANDOM[name]
    lm, batch = random_lm(config, device, None)
    prompt = one_by_one(batch)[0]
    weight = lm.embedding.weight
    rates = measure_rates(weight.device, weight.dtype)
    heads = ["read, GB/s", "bfloat16 products, TFLOP/s" if weight.is_cuda else "products, TFLOP/s"]
    report.add("rates", heads, [[f"{rates.bandwidth / 1e9:.0f}", f"{rates.flops / 1e12:.1f}"]])

    # The settings: one token a call, and 3.25 of them.
    length = 16 if tiny else 128
    base = SamplerConfig(length=length, block_length=length // 4, stop_at_end=False)
    steps = max(round(length / 3.25), base.n_blocks)
    dual = replace(base, cache="dual", steps=steps)

    # The published procedure, a few of its calls, then ours.
    floor_of = functools.partial(floor_of_answer, lm, rates)
    generate_plain(lm, prompt, base, max_steps=1)
    plain = functools.partial(generate_plain, max_steps=4)
    reference = time_setting(lm, [prompt], base, floor_of, plain)
    reference.name = f"generate_plain, {length} steps"
    rows = [reference]

    # Ours.
    configs = [replace(dual, cache="none"), dual, replace(dual, compile=True)]
    for setting in configs:
        started = clock(weight.device)
        rows.append(time_setting(lm, [prompt], setting, floor_of))
        taken = clock(weight.device) - started
    cells = [row.cells(reference.seconds)[:8] for row in rows]
    report.add("one answer", HEADS.split()[:8], cells)

    # Other numbers and prompts of the same padded length must not compile anything again.
    made = compilations()
    shorter = take(prompt, slice(None), slice(5, None))  # (1, P - 5)
    for setting in (replace(configs[-1], steps=steps + 1), configs[-1]):
        generate(lm, shorter, setting)
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    row = [str(made), str(compilations() - made), str(skips), f"{taken:.0f}"]
    heads = ["graphs", "compiled again", "graphs without CUDA graph", "s to compile and time"]
    report.add("compilation", heads, [row])

    # Single calls, and where the time of the slower kind goes.
    report.add("one call", *time_calls(lm, prompt, base, rates))
    for kind, call in calls_of(lm, prompt, base).items():
        heads = [f"kernels of a compiled {kind}", "calls", "ms", "share"]
        report.add(f"profile of a {kind}", heads, profile(call.works["compiled"], weight.device))

    # Its graphs take another minute, so it comes last.
    compare_batch(report, lm, batch, configs[-1], floor_of)


def compare_batch(
    report: Report,
    lm: DiffusionLM,
    batch: Spliced,
    config: SamplerConfig,
    floor_of: Callable[..., float],
) -> None:
    """Eight equal prompts at once against one."""
    many = take(batch, [0] * BATCH)
    alone = take(batch, [0])
    works = {
        f"{BATCH} at once": functools.partial(generate, lm, many, config),
        "one": functools.partial(generate, lm, alone, config),
    }
    times = list(time_in_turns(works, batch.mask.device, rounds=2).values())
    P = batch.mask.shape[1]
    floors = [floor_of(config, P, config.steps, B=B) for B in (BATCH, 1)]

    # Answers a second, and how many times as many.
    row = [f"{BATCH / times[0]:.2f}", f"{1 / times[1]:.2f}"]
    row += [f"{BATCH * one / eight:.2f} x" for eight, one in (times, floors)]
    heads = [f"{BATCH} at once, answers/s", "one, answers/s", "ratio", "ratio of the floors"]
    report.add("batch", heads, [row])


def compare_joined(report: Report, name: str, device: str, tiny: bool) -> None:
    """Both kinds of calls, compiled with and without joined products."""
    config = TINY if tiny else replace(RANDOM["llada-8b"], n_layers=8)
    lm, batch = random_lm(config, device, None)
    prompt = one_by_one(batch)[0]
    weight = lm.embedding.weight
    rates = measure_rates(weight.device, weight.dtype)
    base = SamplerConfig(length=128, block_length=32)

    # The weights are joined once, and stay so.
    table = []
    for way in ("apart", "joined"):
        for kind, call in calls_of(lm, prompt, base, joined=way == "joined").items():
            works = {name: call.works[name] for name in ("compiled", "its matrix products alone")}
            floor = floor_of_call(lm, rates, *call.shapes)
            times = time_in_turns(works, weight.device, rounds=9).values()
            ids, confidence, _ = call.works["compiled"]()
            same = f"{ids.sum().item()}, {confidence.sum().item():.6f}"
            cells = [f"{1000 * t:.3f} ms, {t / floor:.2f} x" for t in times]
            table.append([kind, way, *cells, f"{1000 * floor:.3f} ms", same])
            heads = ["one call", "products", *works, "floor", "sums of ids and confidence"]
            report.tables.clear()
            report.add(f"{config.n_layers} blocks", heads, table)


# ---- all parts
def command_of(name: str, path: Path, tiny: bool) -> list[str]:
    """The command that measures one part and writes its tables to path."""
    options = ["--tiny"] if tiny else []
    return [sys.executable, "-m", "lab.gpu", "--parts", name, "--only", str(path), *options]


def run_part(name: str, path: Path, seconds: float, tiny: bool) -> dict:
    """Run one part in a process of its own. Returns its tables, its seconds, and what failed."""
    path.unlink(missing_ok=True)
    started = time.perf_counter()
    failure = ""
    try:
        command = command_of(name, path, tiny)
        done = subprocess.run(command, timeout=seconds, capture_output=True, encoding="utf-8")
        if done.returncode:
            # What CUDA adds to an error takes some lines, none of which says what went wrong.
            lines = done.stderr.strip().splitlines() or [f"rc {done.returncode}"]
            failure = ([line for line in lines if ERROR.match(line)] or lines)[-1]
    except subprocess.TimeoutExpired:
        failure = f"stopped after {seconds:.0f} s"
    taken = round(time.perf_counter() - started, 1)
    tables = json.loads(path.read_text("utf-8")) if path.exists() else []
    path.unlink(missing_ok=True)
    return {"seconds": taken, "failure": failure, "tables": tables}


def measure_parts(args: argparse.Namespace, device: str) -> None:
    """Measure the parts of the options, one after the other, and write the report.

    Raises OSError: it cannot be written. ValueError: no part gave a figure.
    """
    # The report is written after each part; whether it can be is known before.
    if args.out.suffix == ".json":
        raise ValueError(f"--out {args.out}: the report is Markdown; a .json is written beside it")
    check_writable(args.out)
    card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    command = f"python -m lab.gpu{' --tiny' if args.tiny else ''}"
    machine = f"`{command}`, {card}, torch {torch.__version__}, {date.today()}."
    results = {"machine": machine, "parts": {}}
    started = time.perf_counter()
    for name in dict.fromkeys(args.parts):
        left = args.seconds - (time.perf_counter() - started)
        part = {"seconds": 0, "failure": "no time left", "tables": []}
        if left >= LEAST:
            limit = min(left, LIMITS[name])
            part = run_part(name, args.out.with_suffix(f".{name}.json"), limit, args.tiny)
        results["parts"][name] = part
        write_json(args.out.with_suffix(".json"), results)
        with whole_file(args.out) as temporary:
            temporary.write_text(page(results), "utf-8")
        print(f"{name}: {part['seconds']} s {part['failure'] or 'done'}", flush=True)
    print(page(results))
    if not any(part["tables"] for part in results["parts"].values()):
        raise ValueError(f"no part was measured: see {args.out}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.md"), help="the report, Markdown")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--seconds", type=count, default=240, help="for all parts together")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to try the script")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)  # a part's own process
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.only:
        (name,) = args.parts
        torch.manual_seed(0)
        measure = {"joined": compare_joined, **dict.fromkeys(STAGES, train)}.get(name, sample)
        measure(Report(args.only), name, device, args.tiny)
        return
    if device == "cpu" and not args.tiny:
        sys.exit("python -m lab.gpu: there is no GPU; --tiny tries the script without one")

    with one_line_errors("python -m lab.gpu"):
        measure_parts(args, device)


if __name__ == "__main__":
    main()
