"""Whatever is damaged, a command answers as before or ends in one sentence: a seeded loop.

FUZZ=1000:2000 runs these seeds instead: FUZZ=1000:2000 pytest -n 0 -s tests/test_fuzz.py
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import SHAPES
from safetensors.torch import load_file, save_file
from test_text import byte_level_bpe

import train_asr
from checkpoints.lm import save_lm
from checkpoints.model import save_trained
from diffa import DIFFA, match_embedding_scale
from diffusion_lm import DiffusionLM
from evaluation import ask

SECONDS = 20  # a case takes 0.1; the machine may be busy
JUNK = [None, True, False, -1, 0, 1, 3, 0.5, 10**7, 10**18, 2**63, 10**400, -(10**30), 1e308]
JUNK += [float("nan"), float("inf"), "", "x", "0", "\ud800", "../..", "a\0b", "x" * 10**5, [], [[]]]
JUNK += [{}, {"": 0}, [0] * 1000]
NUMBERS = "nan inf -inf -1 0 1 2 3 0.5 1e400 1e-400 99999999999999999999 0x10 x".split() + ["", " "]

# Damage to bytes


def cut(data, rng):
    return data[: rng.choice([0, 1, 7, 8, 9, rng.randrange(len(data) + 1), len(data) - 1])]


def flip(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 30])):
        data[rng.randrange(min(len(data), rng.choice([16, 400, 10**9])))] ^= 1 << rng.randrange(8)
    return bytes(data)


def overwrite(data, rng):
    """A run of zeros, of ones, or of other bytes of the file; here or inserted."""
    start, size = rng.randrange(len(data)), rng.choice([1, 4, 8, 100, 5000])
    other = rng.choice([bytes(size), b"\xff" * size, data[rng.randrange(len(data)) :][:size]])
    return data[:start] + other + data[start + rng.choice([0, len(other)]) :]


def grow(data, rng):
    return data + rng.choice([b"\0", data, bytes(10_000), b"}"])


def recode(data, rng):
    """As other editors save text; binary files become something else."""
    text = data.decode(errors="replace")
    how = rng.choice(["utf-16", "utf-8-sig", "latin-1", "utf-32"])
    return rng.choice([text.encode(how, "replace"), text.replace("\n", "\r\n").encode()])


def other_kind(data, rng):
    return rng.choice([b"", b"{}", b"[]", b"null", b"<html>404</html>", b"PK\3\4", bytes(1000)])


def deep(data, rng):
    return rng.choice([b"[" * 10**5, b'{"a":' * 10**5, b'{"a":1,' + data[1:], b"9" * 5000])


BYTES = [cut, flip, flip, overwrite, overwrite, grow, recode, other_kind, deep]

# Damage that keeps the format


def places(value, found=()):
    """All (container, key) of a JSON value."""
    found = []
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs)[:200]:
        found.append((value, key))
        if isinstance(inner, (dict, list)):
            found += places(inner)
    return found


def change_json(data, rng):
    """One value becomes another, moves, or disappears."""
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 1, 2])):
        found = places(value)
        if not found:
            break
        owner, key = rng.choice(found)
        how = rng.choice(["junk", "junk", "scale", "delete", "copy", "rename"])
        if how == "junk":
            owner[key] = rng.choice(JUNK)
        elif how == "scale" and type(owner[key]) in (int, float):
            owner[key] *= rng.choice([2, -1, 0.5, 10**6, 1000])
        elif how == "copy":
            other, name = rng.choice(found)
            owner[key] = json.loads(json.dumps(other[name]))
        elif how == "rename" and isinstance(owner, dict):
            owner[rng.choice(["x", "", "a/b", "rope_scaling", "n_layers"])] = owner.pop(key)
        else:
            del owner[key]
    return json.dumps(value).encode()


def change_header(data, rng):
    """The header of a safetensors file: names, dtypes, shapes and offsets."""
    size = struct.unpack("<Q", data[:8])[0]
    header = change_json(data[8 : 8 + size], rng)
    claimed = rng.choice([len(header)] * 4 + [0, 2**63, 2**40, len(header) + 10**6])
    return struct.pack("<Q", claimed) + header + data[8 + size :]


def change_tensors(file, rng):
    """Whole tensors: numbers that are none, other shapes and dtypes, names; one missing or more."""
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name].clone()
    how = rng.choice(["nan", "inf", "shape", "dtype", "drop", "rename", "swap", "empty", "more"])
    if how in ("nan", "inf"):
        tensor.view(-1)[rng.randrange(tensor.numel())] = float(how) * rng.choice([1, -1])
        tensors[name] = tensor
    elif how == "shape":
        tensors[name] = rng.choice([tensor.flatten(), tensor[None], tensor[:-1].contiguous()])
    elif how == "dtype":
        kinds = [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64, torch.uint16]
        tensors[name] = tensor.to(rng.choice(kinds))
    elif how == "swap":
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other].clone(), tensor
    elif how == "empty":
        tensors[name] = tensor.flatten()[:0]
    elif how == "more":
        tensors[rng.choice(["x", name + ".1", "model.transformer.blocks.99.q_proj.weight"])] = (
            tensor
        )
    else:
        del tensors[name]
        if how == "rename":
            tensors[name.upper()] = tensor
    save_file(tensors, file)
    return how


def pickled(file, rng):
    """The same tensors as a pickle, damaged in its bytes or by what it holds."""
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    how = rng.choice(
        ["bytes", "bytes", "expand", "meta", "sparse", "nested", "list", "key", "code"]
    )
    if how == "expand":
        tensors[name] = torch.ones(1).expand(rng.choice([tensors[name].shape, (10**9, 10**9)]))
    elif how == "meta":
        tensors[name] = torch.empty(tensors[name].shape, device="meta")
    elif how == "sparse":
        tensors[name] = tensors[name].to_sparse()
    elif how == "nested":
        tensors = {"model": tensors}
    elif how == "key":
        tensors[3] = tensors.pop(name)
    elif how == "list":
        tensors = list(tensors.items())
    elif how == "code":
        tensors[name] = Path
    file.unlink()
    file.with_name("model.safetensors.index.json").unlink(missing_ok=True)
    file = file.with_name("pytorch_model.bin")
    torch.save(tensors, file, _use_new_zipfile_serialization=rng.random() < 0.8)
    if how == "bytes":
        file.write_bytes(rng.choice(BYTES)(file.read_bytes(), rng))
    return how


def replace_file(file, rng):
    """Something else stands where the file was."""
    file.unlink()
    how = rng.choice(["nothing", "folder", "fifo", "zero", "loop", "beside"])
    if how == "folder":
        file.mkdir()
    elif how == "fifo":
        os.mkfifo(file)
    elif how == "zero":
        file.symlink_to("/dev/zero")
    elif how == "loop":
        file.symlink_to(file.name)
    elif how == "beside":
        others = [path for path in file.parents[1].rglob("*") if path.is_file()]
        shutil.copy(rng.choice(sorted(others)), file)


# The cases

FILES = {
    "whisper/model.safetensors": 3,
    "whisper/config.json": 3,
    "llada/model-00001-of-00001.safetensors": 3,
    "llada/model.safetensors.index.json": 2,
    "llada/config.json": 4,
    "llada/tokenizer.model": 3,
    "json/tokenizer.json": 4,
    "qwen/config.json": 3,
    "stage2/adapters.safetensors": 4,
    "stage2/config.json": 6,
    "clip.wav": 4,
    "clip.flac": 2,
    "clip.ogg": 2,
    "clip.mp3": 2,
}
NUMERIC = ["--length", "--block-length", "--steps", "--threshold", "--factor", "--temperature"]
NUMERIC += ["--cfg-scale", "--seed", "--audio-context"]
OPTIONS = {
    "--rule": ["count", "threshold", "factor", "x"],
    "--cache": ["none", "prefix", "dual", ""],
    "--remasking": ["random", "low_confidence"],
    "--stage": ["stage1", "stage2", "semantic", "stage3"],
    "--dtype": ["float16", "bfloat16", "float32", "float8", "int8"],
    "--device": ["cpu", "meta", "cuda:9", "hpu", "", "x"],
    "--random-weights": ["toy+toy", "toy", "+", "small+x", ""],
    "--adapters": ["", "stage1", "nowhere", "whisper", "llada"],
    "--whisper": ["", "llada", "nowhere", "\0"],
    "--llm": ["", "whisper", "baseline", "nowhere"],
    "--trace": ["nowhere/t.html", ".", "t.html"],
}
QUESTIONS = ["", " ", "<|eot_id|>", "<|mdm_mask|>", "\ud800", "\0", "é" * 300]
QUESTIONS += ["日本語", "a\n\nb"]


def damage(folder, rng):
    """Damage one file of a run; returns its name, how, and if another answer is right then."""
    name = rng.choices(list(FILES), list(FILES.values()))[0]
    file = folder / name
    kinds = ["bytes", "bytes", "replace"]
    if file.suffix == ".json":
        kinds += ["json"] * 5
    if file.suffix == ".safetensors":
        kinds += ["header", "tensors", "tensors", "pickle"]
    how = rng.choice(kinds)
    before = file.read_bytes()
    if how == "replace":
        replace_file(file, rng)
    elif how == "tensors":
        how = f"tensors: {change_tensors(file, rng)}"
    elif how == "pickle":
        how = f"pickle: {pickled(file, rng)}"
    elif how == "header":
        file.write_bytes(change_header(before, rng))
    elif how == "json":
        file.write_bytes(change_json(before, rng))
    else:
        change = rng.choice(BYTES)
        how = change.__name__
        file.write_bytes(change(before, rng))

    # Other numbers in a clip or in weights cannot be told from the right ones.
    numbers = name.startswith("clip") or file.suffix == ".safetensors" or how.startswith("pickle")
    return name, how, numbers and not how.startswith("tensors: ") or how == "tensors: swap"


class Hangs(BaseException):
    """The time of a case is over."""


@contextlib.contextmanager
def limited():
    """Raises Hangs in what takes too long."""

    def stop(*_):
        raise Hangs

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def run_command(main, arguments):
    """Run a command here: what it printed on both outputs, and its exit code or error."""
    out, errors = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    code = 0
    argv, sys.argv = sys.argv, ["command", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), limited():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                main()
    except SystemExit as stopped:
        code = stopped.code
    except BaseException as error:  # a raw traceback, or Hangs
        code = error
    finally:
        sys.argv = argv
    out.flush()
    return out.buffer.getvalue().decode(), errors.getvalue(), code


def problem_of(code, errors):
    """What is wrong with the end of a command that failed, or ""."""
    if isinstance(code, BaseException):
        return f"raised {type(code).__name__}: {str(code)[:300]}"
    said = code if isinstance(code, str) else errors
    if "Traceback" in said or not said.strip() or len(said) > 4000:
        return f"said {said[:300]!r}"
    return ""


def ask_arguments(folder, clip="clip.wav", llm="llada", forced=False):
    parts = {"--whisper": folder / "whisper", "--llm": folder / llm, "--device": "cpu"}
    parts |= {"--adapters": folder / "stage2", "--length": 8}
    words = [str(word) for pair in parts.items() for word in pair]
    return [str(folder / clip), "What is said?", *words, *["--force-parts"] * forced]


def train_arguments(folder):
    parts = {"whisper": "whisper", "llm": "llada", "train": "corpus/asr_train.json", "out": "out"}
    words = [word for name, path in parts.items() for word in (f"--{name}", str(folder / path))]
    return [*words, *"--device cpu --steps 1 --batch 2 --answer-length 60".split()]


def prepare(run, dirs, folder):
    """A run whose LM hears, two LMs with JSON tokenizers, and clips in all formats."""
    shutil.copytree(run, folder)
    shutil.copytree(dirs["llm"], folder / "llada", dirs_exist_ok=True)
    torch.manual_seed(0)
    model = DIFFA.from_pretrained(folder / "whisper", folder / "llada", stage="stage2", **SHAPES)
    match_embedding_scale(model.trained_parts(), model.lm)
    save_trained(model, folder / "stage2", folder / "whisper", folder / "llada")
    for name, family in (("json", "llada"), ("qwen", "qwen3")):
        config = byte_level_bpe(folder / name, family)
        config = replace(config, qk_norm=family == "qwen3", tied=family == "qwen3")
        save_lm(DiffusionLM(config), folder / name)
    samples, rate = soundfile.read(folder / "corpus/train0.wav")
    for suffix in ("wav", "flac", "ogg", "mp3"):
        soundfile.write(folder / f"clip.{suffix}", samples, rate)
    return folder


class Cases:
    """A run to damage, and the answers that it gives as long as it is whole."""

    def __init__(self, run, dirs, folder):
        self.pristine = prepare(run, dirs, folder / "pristine")
        self.folder = folder / "damaged"
        self.answers = {}

    def answer(self, *which):
        """What the whole run answers to ask_arguments(folder, *which)."""
        if which not in self.answers:
            out, errors, code = run_command(ask.main, ask_arguments(self.pristine, *which))
            assert code == 0, code or errors
            self.answers[which] = out
        return self.answers[which]

    def ask(self, seed):
        """Damage a copy of the run, or the options, and ask: what was done, what is wrong."""
        rng = random.Random(seed)
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.pristine, self.folder)
        if rng.random() < 0.15:
            arguments, which = self.odd_options(rng), None
            done = f"ask {seed}: {' '.join(arguments[12:])} {arguments[1]!r}"
        else:
            name, how, may_change = damage(self.folder, rng)
            clip = name if name.startswith("clip") else "clip.wav"
            llm = name.split("/")[0] if name.startswith(("json", "qwen")) else "llada"
            forced = llm != "llada" or rng.random() < 0.4
            which = None if may_change or (forced and "tensors" not in how) else (clip, llm, forced)
            arguments = ask_arguments(self.folder, clip, llm, forced)
            done = f"ask {seed}: {name}: {how}"

        out, errors, code = run_command(ask.main, arguments)
        if code != 0:
            return done, problem_of(code, errors)
        changed = which and out != self.answer(*which)
        return done, f"answered {out!r}, not {self.answer(*which)!r}" if changed else ""

    def odd_options(self, rng):
        """Arguments with values that few people would give."""
        arguments = ask_arguments(self.folder)
        for _ in range(rng.choice([1, 1, 2])):
            option = rng.choice([*NUMERIC, *OPTIONS])
            value = rng.choice(OPTIONS.get(option, NUMBERS))
            if option in ("--adapters", "--whisper", "--llm", "--trace") and value:
                value = self.folder / value
            arguments.append(f"{option}={value}")
        if rng.random() < 0.3:
            arguments[1] = rng.choice(QUESTIONS)
        return arguments

    def train(self, seed):
        """Damage what stage 1 reads, and train a step: what was done, what is wrong."""
        rng = random.Random(seed)
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.pristine, self.folder)
        arguments = train_arguments(self.folder)
        file = self.folder / rng.choice(["corpus/asr_train.json"] * 3 + ["corpus/train0.wav"])
        if rng.random() < 0.2:
            done = rng.choice(["lr", "t-min", "epochs", "batch", "steps", "answer-length", "keep"])
            arguments.append(f"--{done}={rng.choice(NUMBERS)}")
            done = arguments[-1]
        elif file.suffix == ".json" and rng.random() < 0.7:
            file.write_bytes(change_json(file.read_bytes(), rng))
            done = "manifest, as JSON"
        elif rng.random() < 0.1:
            replace_file(file, rng)
            done = f"{file.name} replaced"
        else:
            change = rng.choice(BYTES)
            file.write_bytes(change(file.read_bytes(), rng))
            done = f"{file.name}: {change.__name__}"

        _, errors, code = run_command(lambda: train_asr.main(arguments), [])
        done = f"train {seed}: {done}"
        if code not in (0, None):
            return done, problem_of(code, errors)
        written = load_file(self.folder / "out/adapters.safetensors").values()
        whole = all(torch.isfinite(tensor).all() for tensor in written)
        return done, "" if whole else "wrote adapters that are not finite"


@pytest.fixture(scope="module")
def cases(tiny_run, toy_dirs, tmp_path_factory):
    return Cases(tiny_run, toy_dirs, tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind, n", [("ask", 120), ("train", 12)])
def test_damage_ends_in_a_sentence_or_changes_nothing(cases, kind, n):
    first, last = map(int, os.environ.get("FUZZ", f"0:{n}").split(":"))
    problems = []
    for seed in range(first, last):
        (cases.folder.parent / "seed").write_text(f"{kind} {seed}")  # remains after a crash
        done, wrong = getattr(cases, kind)(seed)
        if wrong:
            problems.append(f"{done}: {wrong}")
            print(problems[-1], flush=True)
    assert problems == []
