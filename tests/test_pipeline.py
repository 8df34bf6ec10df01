"""The commands of `make demo`, in order, on a handful of clips and steps: they fit together, and what is frozen stays so."""

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

from corpora import manifests as corpora
from toy import grammar
from toy import evaluate
from toy import imitation as heard_text
from toy import pretrain
import train_asr
import train_instruct
from conftest import edit_config
from data import word_error_rate
from checkpoints.tokenizer import build_prompt, decode_answer
from diffa import DIFFA
from diffusion_lm import LMConfig
from training.loop import load_newest


def command(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory after every command but evaluate.py."""
    run = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "ENCODER", replace(pretrain.ENCODER, steps=3, batch=4))
        patch.setattr(pretrain, "NEXT_TOKEN", replace(pretrain.NEXT_TOKEN, steps=2, batch=4))
        patch.setattr(pretrain, "DIFFUSION", replace(pretrain.DIFFUSION, steps=2, batch=4))
        patch.setattr(pretrain, "N_CHECK", 4)
        patch.setattr(pretrain, "MORE", replace(pretrain.MORE, steps=1, batch=4))
        patch.setattr(pretrain, "ROUNDS", 1)
        patch.setattr(pretrain, "GATE", {"copy_error": float("inf"), "oracle": 0.0})  # three steps teach nothing
        command(patch, corpora, "toy", "--out", run / "corpus", "--train", 12, "--test", 8)
        command(patch, pretrain, "encoder", "--corpus", run / "corpus", "--out", run)
        command(patch, pretrain, "lm", "--out", run)
        where = ["--whisper", run / "whisper", "--llm", run / "llada", "--device", "cpu", "--batch", 4]
        command(patch, train_asr, *where, "--train", run / "corpus/asr_train.json", "--out", run / "stage1", "--steps", 3)
        frozen = ["--adapters", run / "stage1", "--train", run / "corpus/instruct_train.json", "--steps", 3]
        command(patch, train_instruct, *where, *frozen, "--out", run / "stage2")
        command(patch, train_instruct, *where, *frozen, "--out", run / "semantic", "--audio", "semantic")
    return run


def load(run, stage, **options):
    return DIFFA.from_pretrained(run / "whisper", run / "llada", run / stage, **options)


def test_stage_2_starts_from_stage_1(run):
    first, second = load(run, "stage1"), load(run, "stage2")
    assert first.stage == "stage1" and second.stage == "stage2"
    change = (first.semantic.linear2.weight - second.semantic.linear2.weight).abs().max()
    assert 0 < change < 0.05  # three steps away, not newly drawn


def test_the_control_has_no_acoustic_adapter(run):
    assert load(run, "semantic").trainable().keys() == {"semantic"}


def test_training_leaves_encoder_and_lm_as_they_were(run):
    model = load(run, "stage1")
    assert not any(p.requires_grad for part in (model.encoder, model.lm) for p in part.parameters())
    names = set(load_newest(run / "stage1/checkpoint.pt")["parameters"])
    assert names and all(name.split(".")[0] in ("prompts", "semantic") for name in names)


@pytest.fixture(scope="module")
def report(run):
    """What evaluate.py says of the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "PROMISES", [])
        command(patch, evaluate, "--run", run, "--device", "cpu", "--check")
    return json.loads((run / "report.json").read_text())


def test_evaluate_writes_report_and_figures(run, report):
    assert report["stage1"]["items"] == 8
    assert report["stage1"]["by_sampler"]["18 steps"]["calls"] == 18
    assert report["stage2"]["gender"]["items"] == 8
    assert all((run / name).stat().st_size > 1000 for name in ("losses.png", "steps.png", "questions.png"))


def test_summary_shows_mean_and_span_of_runs(run, report, tmp_path, monkeypatch, capsys):
    other, low = json.loads(json.dumps(report)), report["stage2"]["gender"]["accuracy"]
    other["lm"]["oracle"]["speed"], other["stage2"]["gender"]["accuracy"] = -1.0, low + 20
    (tmp_path / "report.json").write_text(json.dumps(other))
    command(monkeypatch, evaluate, "--summary", run, tmp_path)
    rows = dict(line[2:].split(" | ", 1) for line in capsys.readouterr().out.splitlines()[2:])
    assert rows["stage 2: gender (% right)"] == f"{low + 10:.1f} | {low:.1f} to {low + 20:.1f} | 8 |"
    assert "-1.0 to" in rows["LM answering from text, the worst of 10 kinds of question (% right)"]


def test_summary_names_the_run_that_was_not_evaluated(run, report, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="evaluate.py: .*report.json: no such file"):
        command(monkeypatch, evaluate, "--summary", run, tmp_path)


def test_evaluate_takes_parts_from_elsewhere_and_names_them(run, monkeypatch, tmp_path):
    other = tmp_path / "other"
    for name in ("whisper", "stage1", "stage2"):
        shutil.copytree(run / name, other / name)
    for name in ("stage1", "stage2"):
        edit_config(other / name, audio_context=3.2)
    where = ["--run", other, "--llm", run / "llada", "--corpus", run / "corpus", "--device", "cpu"]
    command(monkeypatch, evaluate, *where)
    report = json.loads((other / "report.json").read_text())
    parts = {"whisper": other / "whisper", "llm": run / "llada", "corpus": run / "corpus"}
    assert report["parts"] == {name: str(path) for name, path in parts.items()} | {"audio_context": 3.2}
    assert "encoder" not in report and "copy_error" in report["lm"]  # what is known of each lies beside it
    edit_config(other / "stage2", audio_context=3.0)
    monkeypatch.setattr(evaluate, "transcription", lambda *_: {})
    with pytest.raises(SystemExit, match="different windows"):
        command(monkeypatch, evaluate, *where)


def test_evaluate_takes_adapters_from_elsewhere_and_a_dtype(run, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    where = ["--run", tmp_path / "here", "--whisper", run / "whisper", "--llm", run / "llada", "--corpus", run / "corpus", "--device", "cpu"]
    with pytest.raises(SystemExit, match="holds no trained adapters"):
        command(monkeypatch, evaluate, *where)
    dtypes = set()
    monkeypatch.setattr(evaluate, "questions", lambda model, *_: dtypes.add(model.lm.embedding.weight.dtype) or {})
    monkeypatch.setattr(evaluate, "plot_questions", lambda *_: None)
    command(monkeypatch, evaluate, *where, "--adapters", run / "stage2", "--dtype", "bfloat16")
    report = json.loads((tmp_path / "here/report.json").read_text())
    assert "stage2" in report and "stage1" not in report and dtypes == {torch.bfloat16}
    assert "stage1/by_sampler/18 steps/word_error_rate was not measured" in evaluate.broken_promises({})


def test_encoder_and_lm_side_by_side_are_those_made_alone(run, tmp_path):
    script, few = tmp_path / "few_steps.py", {"ENCODER": 3, "NEXT_TOKEN": 2, "DIFFUSION": 2, "MORE": 1}
    lines = [f"pretrain.{name} = replace(pretrain.{name}, steps={steps}, batch=4)" for name, steps in few.items()]
    lines += ["pretrain.N_CHECK, pretrain.ROUNDS, pretrain.GATE = 4, 1, {'copy_error': 1e9, 'oracle': 0}"]
    lines = ["from dataclasses import replace", "from toy import pretrain", *lines, "if __name__ == '__main__':", "    pretrain.main()"]
    script.write_text("\n".join(lines))
    both = [sys.executable, script, "--device", "cpu", "--corpus", run / "corpus", "--out", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(Path(pretrain.__file__).parents[1]), "OMP_NUM_THREADS": "2"}
    subprocess.run(both, env=environment, check=True, capture_output=True)
    for name, keys in (("encoder", ("losses", "word_error_rate")), ("lm", ("losses", "copy_error"))):
        alone, beside = (json.loads((where / f"{name}.json").read_text()) for where in (run, tmp_path))
        assert [beside[key] for key in keys] == [pytest.approx(alone[key], rel=1e-4) for key in keys]
    assert (tmp_path / "whisper/model.safetensors").is_file() and (tmp_path / "llada/tokenizer.model").is_file()


def test_an_error_of_one_does_not_leave_the_other_training(tmp_path):
    started = time.monotonic()
    both = [sys.executable, "-m", "toy.pretrain", "--device", "cpu", "--corpus", tmp_path / "none", "--out", tmp_path / "out"]
    done = subprocess.run(both, cwd=Path(pretrain.__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True)  # ends when no process holds its output
    assert done.returncode != 0 and "asr_train.json" in done.stderr and "Traceback" not in done.stderr
    assert time.monotonic() - started < 60  # the LM alone would take minutes


def test_an_lm_that_cannot_quote_or_answer_does_not_pass_the_gate():
    good = {"copy_error": 1.0, "oracle": {"gender": 100.0, "number": 98.5}}
    assert pretrain.short_of(pretrain.GATE, good) == ""
    assert "copy error" in pretrain.short_of(pretrain.GATE, good | {"copy_error": 4.0})
    assert "number" in pretrain.short_of(pretrain.GATE, good | {"oracle": {"gender": 100.0, "number": 16.0}})


def test_a_round_asks_more_of_what_the_lm_lacks(tmp_path):
    bad = {"copy_error": 4.0, "oracle": {"gender": 100.0, "pitch": 56.5}}
    assert pretrain.lacking(pretrain.AIM, bad) == ["pitch", "transcribe"]
    tokenizer = heard_text.train_tokenizer(tmp_path / "tokenizer.model", 0)
    lm = pretrain.new_lm(LMConfig(16, 1, 2, 24, tokenizer.size, 256, mask_id=0, end_id=1), 0, "cpu")

    def share(wanted):  # of answers that name a pitch and nothing else
        batches = [pretrain.batch_of(lm, tokenizer, step, pretrain.MORE, wanted, "cpu")[1].tolist() for step in range(8)]
        return sum(decode_answer(tokenizer, row) in ("high", "low") for batch in batches for row in batch) / (8 * pretrain.MORE.batch)

    assert share([]) < 0.2 and 0.4 < share(["pitch"]) < 0.7


def test_a_broken_promise_is_named(monkeypatch):
    monkeypatch.setattr(evaluate, "PROMISES", [("a/b", "max", 5), ("a/c", "min", 90)])
    assert evaluate.broken_promises({"a": {"b": 4.0, "c": 95.0}}) == []
    assert evaluate.broken_promises({"a": {"b": 6.0, "c": 95.0}}) == ["a/b is 6.00, promised at most 5"]


def test_the_tokenizer_loses_no_character_and_keeps_words_and_markers_whole(run):
    tokenizer = load(run, "stage1").tokenizer
    rng = random.Random(1)
    for _ in range(200):
        sentence = grammar.random_sentence(rng)
        for question, answer in grammar.instructions(sentence, grammar.random_attributes(rng), rng).values():
            assert tokenizer.decode(tokenizer.encode(question)) == question
            assert tokenizer.decode(tokenizer.encode(answer)) == answer
    assert tokenizer.decode(tokenizer.encode("Zürich, 日本 & \"quotes\"?")) == "Zürich, 日本 & \"quotes\"?"
    words = {*grammar.WORDS, *grammar.NUMBER_WORDS.values(), *(v for vs in grammar.ATTRIBUTES.values() for v in vs)}
    assert [word for word in words if len(tokenizer.encode(word)) != 1] == []
    prompt = build_prompt(tokenizer, "What?")
    assert {tokenizer.id(m) for m in ("<|startoftext|>", "<|eot_id|>", "\n\n")} <= set(prompt.before)


def test_the_lm_trains_on_no_held_out_sentence(run):
    tokenizer, rng = load(run, "stage1").tokenizer, random.Random(0)
    answers = [pretrain.draw_item(tokenizer, rng, False, "transcribe")[1] for _ in range(300)]
    assert not any(grammar.is_held_out(answer) for answer in answers)


def test_a_mixed_word_is_still_most_of_all_itself(run):
    model, rng = load(run, "stage1"), random.Random(0)
    lm, tokenizer = model.lm, model.tokenizer
    gap = tokenizer.id(heard_text.GAP)
    prompts = heard_text.pad_prompts(lm, [pretrain.draw_item(tokenizer, rng, False)[0] for _ in range(8)], "cpu")
    words, silent = prompts.is_sound & (prompts.ids != gap), prompts.is_sound & (prompts.ids == gap)
    with torch.no_grad():
        heard = heard_text.as_heard(lm, prompts, gap, pretrain.MIXED, torch.Generator().manual_seed(0))
        clean = lm.embed(prompts.ids)
    nearest = torch.cdist(heard[words], lm.embedding.weight.detach()).argmin(dim=-1)
    assert torch.equal(nearest, prompts.ids[words])
    moved = (heard - clean).norm(dim=-1) / clean.norm(dim=-1)
    assert moved[words].mean() > 0.1 and (moved[silent] > 0.5).all() and moved[~prompts.is_sound].max() < 1e-6


def test_frame_targets_read_back_as_the_words_said(run):
    item = json.loads((run / "corpus/asr_train.json").read_text())[0]
    targets = pretrain.word_targets([item], 160)
    logits = 20.0 * torch.nn.functional.one_hot(targets, len(grammar.WORDS) + 1).float()
    assert pretrain.read_words(logits, torch.tensor([160])) == [item["transcription"]]


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
    for kind in grammar.SLOTS:
        assert all(pretrain.draw_item(tokenizer, rng, True, kind)[1] in grammar.CATEGORIES[kind] for _ in range(30))
