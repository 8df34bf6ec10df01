"""The commands of `make demo`, in order, on a few clips and steps; what is frozen stays frozen."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import edit_config

import train_asr
import train_instruct
from checkpoints.sizes import ENCODER_SIZES
from data import build_prompt
from diffa import DIFFA
from diffusion_lm import DiffusionLM, LMConfig
from encoder import WhisperEncoder
from evaluation.wer import word_error_rate
from toy import (
    corpus,
    evaluate,
    grammar,
    imitation,
    pretrain,
    pretrain_encoder,
    pretrain_lm,
    report,
)
from training.imitation import blurred_embeddings
from training.run_files import load_newest


def command(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory after every command but toy.evaluate."""
    run = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        few = replace(pretrain_encoder.ENCODER, steps=3, batch=4)
        patch.setattr(pretrain_encoder, "ENCODER", few)
        for name, steps in (("NEXT_TOKEN", 2), ("DIFFUSION", 2), ("MORE", 1)):
            few = replace(getattr(pretrain_lm, name), steps=steps, batch=4)
            patch.setattr(pretrain_lm, name, few)
        patch.setattr(pretrain_lm, "N_CHECK", 4)
        patch.setattr(pretrain_lm, "ROUNDS", 1)
        # Three steps teach nothing.
        patch.setattr(pretrain, "GATE", {"copy_error": float("inf"), "oracle": 0.0})
        command(patch, corpus, "--out", run / "corpus", "--train", 12, "--test", 8)
        command(patch, pretrain, "encoder", "--corpus", run / "corpus", "--out", run)
        command(patch, pretrain, "lm", "--out", run)
        where = [
            "--whisper",
            run / "whisper",
            "--llm",
            run / "llada",
            "--device",
            "cpu",
            "--batch",
            4,
        ]
        command(
            patch,
            train_asr,
            *where,
            "--train",
            run / "corpus/asr_train.json",
            "--out",
            run / "stage1",
            "--steps",
            3,
        )
        frozen = [
            "--adapters",
            run / "stage1",
            "--train",
            run / "corpus/instruct_train.json",
            "--steps",
            3,
        ]
        command(patch, train_instruct, *where, *frozen, "--out", run / "stage2")
        command(
            patch, train_instruct, *where, *frozen, "--out", run / "semantic", "--audio", "semantic"
        )
    return run


def load(run, stage, **options):
    return DIFFA.from_pretrained(run / "whisper", run / "llada", run / stage, **options)


def test_stage_2_starts_from_stage_1(run):
    first, second = load(run, "stage1"), load(run, "stage2")
    assert first.stage == "stage1" and second.stage == "stage2"
    change = (first.semantic.linear2.weight - second.semantic.linear2.weight).abs().max()
    assert 0 < change < 0.05  # three steps away, not newly drawn


def test_the_control_has_no_acoustic_adapter(run):
    assert load(run, "semantic").trained_parts().keys() == {"semantic"}


def test_training_leaves_encoder_and_lm_as_they_were(run):
    model = load(run, "stage1")
    assert not any(p.requires_grad for part in (model.encoder, model.lm) for p in part.parameters())
    names = set(load_newest(run / "stage1/checkpoint.pt")["parameters"])
    assert names and all(name.split(".")[0] in ("prompts", "semantic") for name in names)


@pytest.fixture(scope="module")
def measured(run):
    """The report that toy.evaluate writes of the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "PROMISES", [])
        command(patch, evaluate, "--run", run, "--device", "cpu", "--check")
    return json.loads((run / "report.json").read_text())


def test_evaluate_writes_report_and_figures(run, measured):
    assert measured["stage1"]["items"] == 8
    assert measured["stage1"]["by_sampler"]["18 steps"]["calls"] == 18
    assert measured["stage2"]["gender"]["items"] == 8
    assert all(
        (run / name).stat().st_size > 1000 for name in ("losses.png", "steps.png", "questions.png")
    )


def test_summary_shows_mean_and_span_of_runs(run, measured, tmp_path, monkeypatch, capsys):
    other = json.loads(json.dumps(measured))
    low = measured["stage2"]["gender"]["accuracy"]
    other["lm"]["oracle"]["speed"], other["stage2"]["gender"]["accuracy"] = -1.0, low + 20
    (tmp_path / "report.json").write_text(json.dumps(other))
    command(monkeypatch, evaluate, "--summary", run, tmp_path)
    rows = dict(line[2:].split(" | ", 1) for line in capsys.readouterr().out.splitlines()[2:])
    assert (
        rows["stage 2: gender, accuracy (%)"]
        == f"{low + 10:.1f} | {low:.1f} to {low + 20:.1f} | 8 |"
    )
    assert "-1.0 to" in rows["LM answering from text, worst of 10 kinds of question (%)"]


def test_summary_names_the_run_that_was_not_evaluated(run, measured, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="toy.evaluate: .*report.json: no such file"):
        command(monkeypatch, evaluate, "--summary", run, tmp_path)


@pytest.mark.long
def test_evaluate_takes_parts_from_elsewhere_and_names_them(run, monkeypatch, tmp_path):
    other = tmp_path / "other"
    for name in ("whisper", "stage1", "stage2"):
        shutil.copytree(run / name, other / name)
    for name in ("stage1", "stage2"):
        edit_config(other / name, audio_context=3.2)
    where = ["--run", other, "--llm", run / "llada", "--corpus", run / "corpus", "--device", "cpu"]
    command(monkeypatch, evaluate, *where)
    written = json.loads((other / "report.json").read_text())
    parts = {"whisper": other / "whisper", "llm": run / "llada", "corpus": run / "corpus"}
    assert written["parts"] == {name: str(path) for name, path in parts.items()} | {
        "audio_context": 3.2
    }
    assert (
        "encoder" not in written and "copy_error" in written["lm"]
    )  # what is known of each lies beside it
    edit_config(other / "stage2", audio_context=3.0)
    monkeypatch.setattr(evaluate, "transcription", lambda *_: {})
    with pytest.raises(SystemExit, match="different windows"):
        command(monkeypatch, evaluate, *where)


def test_evaluate_takes_adapters_from_elsewhere_and_a_dtype(run, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    where = [
        "--run",
        tmp_path / "here",
        "--whisper",
        run / "whisper",
        "--llm",
        run / "llada",
        "--corpus",
        run / "corpus",
        "--device",
        "cpu",
    ]
    with pytest.raises(SystemExit, match="holds no trained adapters"):
        command(monkeypatch, evaluate, *where)
    dtypes = set()
    monkeypatch.setattr(
        evaluate, "questions", lambda model, *_: dtypes.add(model.lm.embedding.weight.dtype) or {}
    )
    monkeypatch.setattr(evaluate, "plot", lambda *_: None)
    command(monkeypatch, evaluate, *where, "--adapters", run / "stage2", "--dtype", "bfloat16")
    written = json.loads((tmp_path / "here/report.json").read_text())
    assert "stage2" in written and "stage1" not in written and dtypes == {torch.bfloat16}
    assert "stage1/by_sampler/18 steps/word_error_rate was not measured" in report.broken_promises(
        {}
    )


@pytest.mark.long
def test_encoder_and_lm_side_by_side_are_those_made_alone(run, tmp_path):
    script = tmp_path / "few_steps.py"
    steps = {"encoder.ENCODER": 3, "lm.NEXT_TOKEN": 2, "lm.DIFFUSION": 2, "lm.MORE": 1}
    lines = ["from dataclasses import replace"]
    lines += ["from toy import pretrain, pretrain_encoder, pretrain_lm"]
    for name, n in steps.items():
        lines.append(f"pretrain_{name} = replace(pretrain_{name}, steps={n}, batch=4)")
    lines += ["pretrain_lm.N_CHECK, pretrain_lm.ROUNDS = 4, 1"]
    lines += ["pretrain.GATE = {'copy_error': 1e9, 'oracle': 0}"]
    lines += ["if __name__ == '__main__':", "    pretrain.main()"]
    script.write_text("\n".join(lines))
    both = [
        sys.executable,
        script,
        "--device",
        "cpu",
        "--corpus",
        run / "corpus",
        "--out",
        tmp_path,
    ]
    environment = os.environ | {
        "PYTHONPATH": str(Path(pretrain.__file__).parents[1]),
        "OMP_NUM_THREADS": "2",
    }
    subprocess.run(both, env=environment, check=True, capture_output=True)
    for name, keys in (
        ("encoder", ("losses", "word_error_rate")),
        ("lm", ("losses", "copy_error")),
    ):
        alone, beside = (
            json.loads((where / f"{name}.json").read_text()) for where in (run, tmp_path)
        )
        assert [beside[key] for key in keys] == [
            pytest.approx(alone[key], rel=1e-4) for key in keys
        ]
    assert (tmp_path / "whisper/model.safetensors").is_file() and (
        tmp_path / "llada/tokenizer.model"
    ).is_file()


@pytest.mark.long
def test_an_error_of_one_does_not_leave_the_other_training(tmp_path):
    started = time.monotonic()
    both = [
        sys.executable,
        "-m",
        "toy.pretrain",
        "--device",
        "cpu",
        "--corpus",
        tmp_path / "none",
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(
        both,
        cwd=Path(pretrain.__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )  # ends when no process holds its output
    assert (
        done.returncode != 0 and "asr_train.json" in done.stderr and "Traceback" not in done.stderr
    )
    assert time.monotonic() - started < 60  # the LM alone would take minutes


def test_an_lm_that_cannot_quote_or_answer_does_not_pass_the_gate():
    good = {"copy_error": 1.0, "oracle": {"gender": 100.0, "number": 98.5}}
    assert pretrain_lm.short_of(pretrain_lm.GATE, good) == ""
    worse = good | {"copy_error": 4.0}
    assert "copy error 4.0 %" in pretrain_lm.short_of(pretrain_lm.GATE, worse)
    worse = good | {"oracle": {"gender": 100.0, "number": 16.0}}
    assert pretrain_lm.short_of(pretrain_lm.GATE, worse) == "number answered 16.0 %"


def test_a_round_asks_more_of_what_the_lm_lacks(tmp_path):
    bad = {"copy_error": 4.0, "oracle": {"gender": 100.0, "pitch": 56.5}}
    assert list(pretrain_lm.lacking(pretrain_lm.AIM, bad)) == ["pitch", "transcribe"]
    tokenizer = imitation.train_tokenizer(tmp_path / "tokenizer.model", 0)
    text = pretrain_lm.GrammarText(tokenizer, 0)

    def fraction(wanted):  # of answers that name a pitch and nothing else
        items = text.draw(random.Random(0), 256, False, wanted)
        return sum(item.answer in ("high", "low") for item in items) / len(items)

    assert fraction([]) < 0.2 and 0.4 < fraction(["pitch"]) < 0.7


def test_a_broken_promise_is_named(monkeypatch):
    monkeypatch.setattr(report, "PROMISES", [("a/b", "max", 5), ("a/c", "min", 90)])
    assert report.broken_promises({"a": {"b": 4.0, "c": 95.0}}) == []
    assert report.broken_promises({"a": {"b": 6.0, "c": 95.0}}) == [
        "a/b is 6.00, promised at most 5"
    ]


def test_the_tokenizer_loses_no_character_and_keeps_words_and_markers_whole(run):
    tokenizer = load(run, "stage1").tokenizer
    rng = random.Random(1)
    for _ in range(200):
        sentence = grammar.random_sentence(rng)
        for question, answer in grammar.instructions(
            sentence, grammar.random_attributes(rng), rng
        ).values():
            assert tokenizer.decode(tokenizer.encode(question)) == question
            assert tokenizer.decode(tokenizer.encode(answer)) == answer
    other = 'Zürich, 日本 & "quotes"?'
    assert tokenizer.decode(tokenizer.encode(other)) == other
    words = {
        *grammar.WORDS,
        *grammar.NUMBER_WORDS.values(),
        *(v for vs in grammar.ATTRIBUTES.values() for v in vs),
    }
    assert [word for word in words if len(tokenizer.encode(word)) != 1] == []
    prompt = build_prompt(tokenizer, "What?")
    assert {tokenizer.id(m) for m in ("<|startoftext|>", "<|eot_id|>", "\n\n")} <= set(
        prompt.before
    )


def test_the_lm_trains_on_no_held_out_sentence(run):
    tokenizer, rng = load(run, "stage1").tokenizer, random.Random(0)
    text = pretrain_lm.GrammarText(tokenizer, 0)
    items = text.draw(rng, 1000, stretched=False, wanted=["transcribe"])
    quoted = [item.answer for item in items if len(item.answer.split()) > 3]
    quoted = [answer for answer in quoted if " says " not in answer]  # a caption is no sentence
    assert len(quoted) > 300 and not any(grammar.is_held_out(answer) for answer in quoted)


def test_a_mixed_word_is_still_most_of_all_itself():
    # Orthonormal embeddings, so that a mixture shows its fractions: column w is that of word w.
    size = {"width": 64, "vocab": 64, "n_layers": 1, "n_heads": 1, "ffn": 8, "max_length": 8}
    lm = DiffusionLM(LMConfig(**size, mask_id=62, end_id=61))
    lm.embedding.weight.data = torch.eye(64)
    gap = 63
    ids = torch.arange(60).repeat(4).view(12, 20)
    ids[:, 5] = gap
    is_audio = torch.ones_like(ids, dtype=torch.bool)
    is_audio[:, 12:] = False
    words = is_audio & (ids != gap)

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        heard = blurred_embeddings(lm, ids, is_audio, gap, 0.7, generator)
    assert torch.equal(heard[~is_audio], torch.eye(64)[ids[~is_audio]])
    assert heard[ids == gap].abs().max() > 0.1  # noise

    # Up to 0.7 of a word is of three others: the word's own fraction is the largest, unless two of
    # the others coincide.
    fractions = heard[words]
    own = torch.eye(64, dtype=torch.bool)[ids[words]]
    others = fractions.masked_fill(own, 0)
    assert torch.allclose(fractions.sum(dim=1), torch.ones(len(fractions)))
    assert fractions[own].min() >= 0.3 - 1e-6 and fractions[own].min() < 0.6
    assert ((others > 0).sum(dim=1) <= 3).all() and (others > 0).any()
    apart = others.amax(dim=1) <= 0.7 / 3 + 1e-6
    assert apart.float().mean() > 0.9 and (fractions[own] > others.amax(dim=1))[apart].all()


def test_a_shorter_window_is_heard_with_the_same_weights():
    torch.manual_seed(0)
    encoder = WhisperEncoder(ENCODER_SIZES["toy"])
    short = WhisperEncoder(replace(ENCODER_SIZES["toy"], context=48))
    weights = encoder.state_dict()
    short.load_state_dict(weights | {"positions": weights["positions"][:48]})

    mel = torch.randn(2, 80, 96)
    narrow = pretrain_encoder.narrowed(encoder, 48)
    for found, expected in zip(narrow(mel), short(mel), strict=True):
        assert torch.equal(found, expected)
    assert narrow.blocks is encoder.blocks and len(encoder.positions) == 160


def test_a_window_holds_the_longest_clip_and_is_whole_now_and_then():
    window = pretrain_encoder.window_of_step
    assert [window(step, 33, 160) for step in range(9)] == [160, *[48] * 7, 160]
    assert window(1, 48, 160) == 48 and window(1, 49, 160) == 64 and window(1, 157, 158) == 158


def test_the_prompts_of_a_batch_have_similar_lengths_and_no_question_is_lost(run):
    text = pretrain_lm.GrammarText(load(run, "stage1").tokenizer, 0)
    batches = pretrain_lm.pool_of_questions(text, 5, 16, 3, True, ())

    def length(item):
        return len(item.prompt.before) + len(item.audio_ids) + len(item.prompt.after)

    # Sorted, no batch reaches into the next one.
    lengths = sorted([length(item) for item in batch] for batch in batches)
    assert len(batches) == pretrain_lm.POOL and {len(batch) for batch in batches} == {16}
    assert all(a[-1] <= b[0] for a, b in itertools.pairwise(lengths))

    drawn = text.draw(random.Random("5 3 True"), 16 * len(batches), True, ())
    assert sorted(map(repr, drawn)) == sorted(map(repr, sum(batches, [])))


def test_frame_targets_read_back_as_the_words_said(run):
    item = json.loads((run / "corpus/asr_train.json").read_text())[0]
    targets = pretrain_encoder.word_targets([item], 160)
    logits = 20.0 * torch.nn.functional.one_hot(targets, len(grammar.WORDS) + 1).float()
    assert pretrain_encoder.read_words(logits, torch.tensor([160])) == [item["transcription"]]


def test_word_error_rate_counts_every_kind_of_error():
    assert word_error_rate(["a b c"], ["a b c"]) == 0
    assert word_error_rate(["a x", "b"], ["a b", "b c"]) == 50


def test_a_bad_manifest_stops_training_before_it_starts(run, monkeypatch, tmp_path):
    (tmp_path / "bad.json").write_text("[{}, 3]")
    with pytest.raises(SystemExit, match="2 bad items"):
        where = ["--whisper", run / "whisper", "--llm", run / "llada", "--out", tmp_path / "out"]
        command(monkeypatch, train_asr, *where, "--train", tmp_path / "bad.json")
    assert not (tmp_path / "out").exists()


def test_an_asked_kind_of_question_is_the_one_drawn(run):
    tokenizer, rng = load(run, "stage1").tokenizer, random.Random(0)
    options = {"held_out": True, "stretched": False}
    for kind in grammar.SLOTS:
        items = [imitation.draw_question(tokenizer, rng, kind=kind, **options) for _ in range(30)]
        assert all(item.answer in grammar.CATEGORIES[kind] for item in items)
