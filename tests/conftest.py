"""A tiny random model, saved as the hub lays out the real ones."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
from safetensors.torch import load_file, save_file

from checkpoints.chats import HEADER, HEADER_END, MASK, START, TURN_END
from checkpoints.files import write_json
from checkpoints.lm import save_lm
from checkpoints.model import save_trained
from checkpoints.progress import QUIET
from checkpoints.whisper import save_whisper
from corpora.manifests import write_manifest
from data import SYSTEM, TEXT_END, TRANSCRIBE
from diffa import DIFFA
from diffusion_lm import DiffusionLM, LMConfig
from encoder import SAMPLE_RATE, EncoderConfig, WhisperEncoder
from toy import grammar
from toy.imitation import train_tokenizer

ENCODER = EncoderConfig(
    n_mels=80, width=16, n_layers=3, n_heads=2, ffn=32, context=40
)  # hears 0.8 s
SHAPES = {"n_queries": 4, "qformer_layers": 1, "ffn": 24, "n_prompts": 3}  # of the adapters
QWEN3 = LMConfig(
    width=24,
    n_layers=2,
    n_heads=4,
    ffn=20,
    vocab=30,
    mask_id=28,
    end_id=29,
    n_kv_heads=2,
    head_dim=10,
    qk_norm=True,
    tied=True,
    family="qwen3",
)
SENTENCES = [
    SYSTEM,
    "system user assistant",
    "This is the audio:",
    " <audio>. What is said?",
    "Repeat what is said.",
    "two red birds sing",
]


@pytest.fixture(autouse=True)
def progress_is_shown():
    """What --quiet sets in the environment ends with the test that used it."""
    before = os.environ.get(QUIET)
    yield
    os.environ.pop(QUIET, None)
    if before is not None:
        os.environ[QUIET] = before


@pytest.fixture(scope="session")
def toy_dirs(tmp_path_factory):
    """Directories {"whisper", "llm"} of a tiny encoder, and a tiny LM with its tokenizer."""
    root = tmp_path_factory.mktemp("toy")
    dirs = {"whisper": root / "whisper", "llm": root / "llada"}
    dirs["llm"].mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_prefix=str(dirs["llm"] / "tokenizer"),
        vocab_size=360,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=[START, HEADER, HEADER_END, TURN_END, TEXT_END, MASK, "\n\n"],
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(dirs["llm"] / "tokenizer.model"))
    torch.manual_seed(0)
    save_whisper(WhisperEncoder(ENCODER), dirs["whisper"])
    special = {"mask_id": pieces.piece_to_id(MASK), "end_id": pieces.piece_to_id(TEXT_END)}
    lm = DiffusionLM(
        LMConfig(
            width=32,
            n_layers=2,
            n_heads=4,
            ffn=48,
            vocab=pieces.get_piece_size(),
            max_length=256,
            **special,
        )
    )
    with torch.no_grad():
        lm.unembedding.weight.mul_(4)  # some guesses sure, some not
        lm.embedding.weight[lm.config.mask_id].mul_(0.1)  # so that what surrounds a mask decides
        for block in lm.blocks:
            for part in (block.attn.query, block.attn.key, block.attn.value, block.attn.out):
                part.weight.mul_(3)
    save_lm(lm, dirs["llm"])
    return dirs


@pytest.fixture(scope="session")
def tiny_run(toy_dirs, tmp_path_factory):
    """A run directory as of `make demo` and lab.baseline, of tiny models and six clips of noise.

    Copy it before changing it.
    """
    run = tmp_path_factory.mktemp("tiny_run")
    shutil.copytree(toy_dirs["whisper"], run / "whisper")
    tokenizer = train_tokenizer(run / "llada/tokenizer.model", 0)
    config = LMConfig(
        width=32,
        n_layers=2,
        n_heads=4,
        ffn=48,
        vocab=tokenizer.size,
        max_length=256,
        mask_id=tokenizer.id(MASK),
        end_id=tokenizer.id(TEXT_END),
    )
    torch.manual_seed(0)
    for name, result in (("llada", "lm"), ("baseline", "baseline")):
        lm = DiffusionLM(config)
        lm.unembedding.weight.data.mul_(
            100
        )  # sure of what it says: the threshold rule is done in few calls
        save_lm(lm, run / name, **({"causal": True} if name == "baseline" else {}))
        write_json(
            run / f"{result}.json",
            {
                "steps": 2,
                "asked": [],
                "copy_error": 100.0,
                "oracle": {"gender": 50.0, "name": 12.5},
            },
        )
    shutil.copy(run / "llada/tokenizer.model", run / "baseline")
    for stage in ("stage1", "stage2"):
        model = DIFFA.from_pretrained(run / "whisper", run / "llada", stage=stage, **SHAPES)
        save_trained(model, run / stage, whisper=run / "whisper", llm=run / "llada")
    (run / "corpus").mkdir()
    write_json(run / "corpus/corpus.json", {"corpus": "toy", "seed": 0, "train": 6, "test": 6})
    rng, noises = random.Random(1), np.random.default_rng(0)
    for split in ("train", "test"):
        asr, instruct = [], []
        for i in range(6):
            sentence, attributes = (
                grammar.random_sentence(rng, length=7 + i % 3),
                grammar.random_attributes(rng),
            )
            soundfile.write(
                run / f"corpus/{split}{i}.wav",
                0.05 * noises.standard_normal(SAMPLE_RATE // 2),
                SAMPLE_RATE,
            )
            item = {
                "audio_id": f"{split}{i}",
                "audio_filepath": f"{split}{i}.wav",
                "input": TRANSCRIBE,
                "transcription": sentence.text,
                "target": sentence.text,
                "dataset": "noise",
                "duration": 0.5,
                "seed_transcript": "",
            }
            asr.append(item | {"attributes": vars(attributes)})
            pairs = grammar.instructions(sentence, attributes, rng)
            instruct += [
                item | {"input": question, "target": answer, "kind": kind}
                for kind, (question, answer) in pairs.items()
            ]
        write_manifest(run / f"corpus/asr_{split}.json", asr)
        write_manifest(run / f"corpus/instruct_{split}.json", instruct)
    return run


@pytest.fixture
def toy(toy_dirs):
    """A fresh stage-2 DIFFA of the tiny parts, always with the same adapters."""
    torch.manual_seed(1)
    return DIFFA.from_pretrained(**toy_dirs, stage="stage2", **SHAPES).eval()


@pytest.fixture
def tone(tmp_path):
    """Writes a sine: tone(name, seconds, hertz, rate, channels, **soundfile options) -> path."""

    def write(name="tone.wav", seconds=0.5, hertz=440, rate=SAMPLE_RATE, channels=1, **options):
        wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
        soundfile.write(tmp_path / name, np.stack([wave] * channels, axis=1), rate, **options)
        return tmp_path / name

    return write


@pytest.fixture
def dirs(toy_dirs, tmp_path):
    """Copies of the toy directories that a test may spoil."""
    return {name: shutil.copytree(path, tmp_path / name) for name, path in toy_dirs.items()}


def edit_tensors(directory, change):
    """change(tensors) in place, in the one safetensors file of a directory."""
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_config(directory, **fields):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


def damage_norms(directory, value):
    """Fill the norms of an LM in a directory. At 1e38 weights are finite, but logits are not."""

    def spoil(tensors):
        for name, tensor in tensors.items():
            if "norm" in name or "ln_f" in name:
                tensor.fill_(value)

    edit_tensors(directory, spoil)
