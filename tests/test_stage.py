"""The two stages' command: one recipe on any machine, and nothing usable is lost to what is not."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import diffusion_lm
import train_asr
import train_instruct
from checkpoints.lm import save_lm
from diffa import DIFFA
from training.execution import recompute_blocks
from training.run_files import checkpoints, read_metrics

WORDS = [
    "two red birds",
    "red birds sing",
    "two birds",
    "birds sing",
    "sing",
    "red birds",
    "two red",
    "birds",
]


@pytest.fixture
def manifest(tone, tmp_path):
    """Writes a manifest of eight tones with words, each item changed by `change(i, item)`."""

    def write(name="train.json", change=lambda i, item: item):
        items = []
        for i, words in enumerate(WORDS):
            file = tone(f"{i}.wav", 0.3 + 0.05 * i, 200 + 50 * i)
            item = {
                "audio_id": f"clip{i}",
                "audio_filepath": file.name,
                "input": "What is said?",
                "transcription": words,
                "target": words,
                "dataset": "tones",
                "duration": 0.3 + 0.05 * i,
                "seed_transcript": words,
            }
            items.append(change(i, item))
        (tmp_path / name).write_text(json.dumps(items))
        return tmp_path / name

    return write


def train(module, dirs, out, manifest, *options):
    """Run a stage's command in this process; returns the trained weights by name and the losses."""
    where = {"whisper": dirs["whisper"], "llm": dirs["llm"], "train": manifest, "out": out}
    arguments = [word for name, value in where.items() for word in (f"--{name}", str(value))]
    module.main([*arguments, "--device", "cpu", *map(str, options)])
    return result(out)


def result(out):
    return load_file(Path(out) / "adapters.safetensors"), json.loads(
        (Path(out) / "training.json").read_text()
    )["losses"]


def alike(first, second, tolerance=1e-5):
    (first_weights, first_losses), (second_weights, second_losses) = first, second
    assert first_losses == pytest.approx(second_losses, rel=tolerance)
    assert first_weights.keys() == second_weights.keys()
    for name in first_weights:
        assert (first_weights[name] - second_weights[name]).abs().max() < tolerance, name


FEW = ["--steps", 4, "--batch", 8, "--lr", 1e-4, "--save-every", 2, "--keep", 9]


@pytest.fixture
def whole(toy_dirs, manifest, tmp_path):
    """Weights and losses of a run on one process."""
    return train(train_asr, toy_dirs, tmp_path / "whole", manifest(), *FEW)


def test_a_training_clip_is_answered_as_it_learns_and_nothing_changes(
    toy_dirs, manifest, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("DIFFA_QUIET", raising=False)
    loud = train(train_asr, toy_dirs, tmp_path / "loud", manifest(), *FEW)
    lines = [line for line in capsys.readouterr().err.splitlines() if "a training clip" in line]
    assert len(lines) == 2 and "stage 1: step 2: " in lines[0]  # with each of two checkpoints
    assert lines[1].endswith("target 'two red birds'")

    monkeypatch.setenv("DIFFA_QUIET", "1")
    alike(loud, train(train_asr, toy_dirs, tmp_path / "quiet", manifest(), *FEW), tolerance=1e-12)
    printed = capsys.readouterr()
    assert printed.err == "" and all("warning" in line for line in printed.out.splitlines())


def two_processes(*commands):
    """Run commands of train_asr one by one, in two processes that torchrun would start."""
    # A port for each command: none meets the leavings of another.
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in commands]
    commands = [(str(free.getsockname()[1]), *command) for free, command in zip(sockets, commands)]
    for free in sockets:
        free.close()

    jobs = []
    for rank in range(2):
        variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        variables["PYTHONPATH"] = str(Path(__file__).parents[1])
        command = [sys.executable, __file__, json.dumps(commands)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        jobs.append(subprocess.Popen(command, env={**os.environ, **variables}, **pipes))
    printed = [job.communicate(timeout=240)[0].decode() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(printed)
    return printed


def begun(whole_out, out):
    """A run that stopped at step 2, made of a whole one."""
    out.mkdir()
    shutil.copy(whole_out / "checkpoint-00000002.pt", out)
    return out


@pytest.mark.long
def test_two_processes_are_one_and_each_resumes_where_the_other_stopped(
    toy_dirs, manifest, tmp_path, whole
):
    path = manifest()
    held_out = ["--validation", str(path), "--validation-items", "3"]
    common = [str(toy_dirs["whisper"]), str(toy_dirs["llm"]), str(path)]
    runs = {
        "two": FEW + held_out,  # DistributedDataParallel
        "two_shards": [
            *FEW,
            "--shard",
            "--recompute",
            "--accumulate",
            2,
            "--workers",
            1,
            "--cache-encoder",
            "none",
            *held_out,
        ],  # FSDP2
        "two_after_one": FEW,
    }
    begun(tmp_path / "whole", tmp_path / "two_after_one")
    printed = two_processes(
        *([*common, str(tmp_path / name), *map(str, options)] for name, options in runs.items())
    )
    for name in runs:
        alike(result(tmp_path / name), whole)
    assert (
        "Recipe(train=TrainConfig(steps=4," in printed[0] and "Recipe" not in printed[1]
    )  # the first process alone prints
    one_after_two = train(
        train_asr,
        toy_dirs,
        begun(tmp_path / "two", tmp_path / "one_after_two"),
        path,
        *FEW,
        *held_out,
    )
    alike(one_after_two, whole)
    first, shards = (
        read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "two_shards")
    )
    assert first[-1]["validation"]["loss"] == pytest.approx(
        shards[-1]["validation"]["loss"], abs=1e-5
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--accumulate", 4],
        ["--recompute"],
        ["--cache-encoder", "none"],
        ["--cache-encoder", "DIR", "--workers", 1],
    ],
)
def test_the_machine_does_not_change_the_result(toy_dirs, manifest, tmp_path, whole, options):
    options = [str(tmp_path / "states") if option == "DIR" else option for option in options]
    alike(
        train(train_asr, toy_dirs, tmp_path / "other", manifest(), *FEW, *options),
        whole,
        tolerance=1e-4 if "none" in options else 1e-5,
    )


@pytest.mark.long
def test_stage_2_resumes_bit_for_bit_with_dropout_and_workers(
    toy_dirs, manifest, tmp_path, monkeypatch
):
    recipe = train_asr.RECIPES["toy"]
    with_dropout = replace(recipe, shapes={**recipe.shapes, "dropout": 0.2})
    for module in (train_asr, train_instruct):
        with_own = replace(module.RECIPES["toy"], shapes=with_dropout.shapes)
        monkeypatch.setitem(module.RECIPES, "toy", with_own)
    path = manifest()
    train(train_asr, toy_dirs, tmp_path / "stage1", path, "--steps", 1, "--batch", 4)
    options = [
        *FEW,
        "--adapters",
        tmp_path / "stage1",
        "--accumulate",
        2,
        "--workers",
        1,
        "--cache-encoder",
        "none",
    ]
    expected = train(train_instruct, toy_dirs, tmp_path / "two", path, *options)
    again = train(
        train_instruct, toy_dirs, begun(tmp_path / "two", tmp_path / "again"), path, *options
    )
    assert again[1] == expected[1] and all(
        torch.equal(again[0][name], expected[0][name]) for name in expected[0]
    )


def test_logits_in_chunks_give_the_same_loss_and_gradient(toy, monkeypatch):
    lm = toy.lm
    hidden, ids = torch.randn(50, 32, requires_grad=True), torch.randint(0, lm.config.vocab, (50,))
    whole = diffusion_lm.token_losses(lm, hidden, ids)
    gradient = torch.autograd.grad(whole.sum(), hidden)[0]
    made = []
    monkeypatch.setattr(diffusion_lm, "LOGITS_AT_ONCE", 7 * lm.config.vocab)
    monkeypatch.setattr(lm, "head", lambda h: (made.append(len(h)), lm.unembedding(h))[1])
    chunked = diffusion_lm.token_losses(lm, hidden, ids)
    assert torch.allclose(chunked, whole, atol=1e-6)
    assert torch.allclose(torch.autograd.grad(chunked.sum(), hidden)[0], gradient, atol=1e-6)
    assert max(made) == 7 and sum(made) == 2 * 50  # no more at a time; once forward, once back


def test_recomputed_blocks_give_the_same_gradient_and_keep_less(toy):
    def kept_and_gradient(recompute):
        if recompute:
            recompute_blocks(toy.lm)
        x, sizes = (
            torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0)).requires_grad_(),
            [],
        )
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            loss = toy.lm(x).pow(2).sum()
        return sum(sizes), torch.autograd.grad(loss, x)[0]

    (all_of_it, first), (less, second) = kept_and_gradient(False), kept_and_gradient(True)
    assert torch.equal(first, second) and less < all_of_it / 4


@pytest.mark.long
def test_compiled_blocks_train_alike(toy_dirs, manifest, tmp_path, whole, monkeypatch):
    real, compiled = torch.nn.Module.compile, []
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self: (compiled.append(self), real(self, backend="eager"))[1],
    )
    alike(train(train_asr, toy_dirs, tmp_path / "compiled", manifest(), *FEW, "--compile"), whole)
    assert len(compiled) == 2


def test_bfloat16_trains_float32_adapters_close_to_float32(
    toy_dirs, manifest, tmp_path, whole, monkeypatch
):
    monkeypatch.setitem(
        train_asr.RECIPES, "toy", replace(train_asr.RECIPES["toy"], dtype="bfloat16")
    )
    weights, losses = train(train_asr, toy_dirs, tmp_path / "bf16", manifest(), *FEW)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert losses == pytest.approx(whole[1], rel=0.05) and losses != whole[1]


def test_each_stage_prints_its_recipe_and_where_its_parts_come_from(
    toy_dirs, manifest, tmp_path, capsys
):
    path = manifest()
    train(train_asr, toy_dirs, tmp_path / "stage1", path, *FEW)
    first = capsys.readouterr().out
    train(
        train_instruct, toy_dirs, tmp_path / "stage2", path, *FEW, "--adapters", tmp_path / "stage1"
    )
    second = capsys.readouterr().out
    assert "steps=4, batch=8, lr=0.0001" in first and first.count("new, random weights") == 2
    assert [line.split()[0] for line in second.splitlines() if "new, random weights" in line] == [
        "acoustic"
    ]
    assert f"trained, float32, from {tmp_path / 'stage1'}" in second


def test_the_optimizer_is_an_option_and_a_run_keeps_its_own(toy_dirs, manifest, tmp_path):
    options = manifest(), "--steps", 2, "--batch", 2
    by_muon, _ = train(train_asr, toy_dirs, tmp_path / "muon", *options)
    by_adamw, _ = train(train_asr, toy_dirs, tmp_path / "adamw", *options, "--optimizer", "adamw")
    assert any(not torch.equal(by_muon[name], by_adamw[name]) for name in by_muon)
    with pytest.raises(SystemExit, match="optimizer was 'muon', now is 'adamw'"):
        train(train_asr, toy_dirs, tmp_path / "muon", *options, "--optimizer", "adamw")


def test_the_paper_s_preset_runs_on_a_tiny_model(toy_dirs, manifest, tmp_path):
    options = ["--preset", "paper", "--steps", 3, "--batch", 4, "--workers", 1, "--accumulate", 2]
    train(train_asr, toy_dirs, tmp_path / "stage1", manifest(), *options)
    weights, losses = train(
        train_instruct,
        toy_dirs,
        tmp_path / "stage2",
        manifest(),
        *options,
        "--adapters",
        tmp_path / "stage1",
    )
    assert (
        len(losses) == 3
        and all(0 < loss < 1000 for loss in losses)
        and all(torch.isfinite(w).all() for w in weights.values())
    )


def test_one_process_cannot_shard(toy_dirs, manifest, tmp_path):
    with pytest.raises(SystemExit, match="start it with torchrun"):
        train(train_asr, toy_dirs, tmp_path / "out", manifest(), *FEW, "--shard")


def test_validation_is_the_same_each_time_and_changes_nothing(toy_dirs, manifest, tmp_path, whole):
    held_out = ["--validation", manifest("held_out.json"), "--validate-every", 2]
    alike(
        train(train_asr, toy_dirs, tmp_path / "checked", manifest(), *FEW, *held_out),
        whole,
        tolerance=1e-9,
    )
    records = read_metrics(tmp_path / "checked" / "metrics.jsonl")
    assert [r["step"] for r in records] == [2, 4]
    assert {"loss", "loss at 0.25", "loss at 1.0", "prediction"} <= records[0]["validation"].keys()
    assert records[0]["validation"]["target"] == WORDS[0]
    assert (
        DIFFA.from_pretrained(
            toy_dirs["whisper"], toy_dirs["llm"], tmp_path / "checked" / "best"
        ).stage
        == "stage1"
    )
    # A run with other noise and other batches: at the same weights, the same validation.
    shutil.copytree(tmp_path / "checked" / "best", tmp_path / "start")
    values = []
    for seed in (1, 2):
        options = [
            "--steps",
            1,
            "--batch",
            4,
            "--lr",
            0.0,
            "--seed",
            seed,
            "--adapters",
            tmp_path / "start",
        ]
        train(train_asr, toy_dirs, tmp_path / f"seed{seed}", manifest(), *options, *held_out)
        values.append(read_metrics(tmp_path / f"seed{seed}" / "metrics.jsonl")[-1]["validation"])
    assert values[0] == values[1]


def test_curves_of_two_runs_are_drawn_and_a_run_without_any_is_named(
    toy_dirs, manifest, tmp_path, monkeypatch
):
    from lab import curves

    for name in ("one", "two"):
        train(
            train_asr,
            toy_dirs,
            tmp_path / name,
            manifest(),
            "--steps",
            10,
            "--batch",
            4,
            "--validation",
            manifest("held_out.json"),
        )
    assert curves.series(read_metrics(tmp_path / "one" / "metrics.jsonl"), "validation")[0] == [10]
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "curves.py",
            str(tmp_path / "one"),
            str(tmp_path / "two"),
            "--out",
            str(tmp_path / "c.png"),
        ],
    )
    curves.main()
    assert (tmp_path / "c.png").stat().st_size > 5000
    monkeypatch.setattr(sys, "argv", ["curves.py", str(tmp_path / "three")])
    with pytest.raises(SystemExit, match="three: holds no metrics.jsonl"):
        curves.main()


def too_long(i, item):
    return item | {"duration": 31.0}


def test_items_that_are_too_long_are_left_out_and_counted(toy_dirs, manifest, tmp_path, capsys):
    path = manifest(
        change=lambda i, item: (
            too_long(i, item)
            if i == 2
            else item | {"transcription": {3: "x" * 30, 4: "y" * 30, 5: " "}.get(i, "birds")}
        )
    )
    train(train_asr, toy_dirs, tmp_path / "out", path, *FEW)
    printed = capsys.readouterr()
    counts = (
        "of 8 items, 1 last longer than the encoder's 0.80 s, 2 have answers of 18 tokens or more "
        "and 1 have none; they are left out"
    )
    assert counts in printed.out + printed.err


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "not a JSON list with at least one item"),
        (None, "of 8 items, 8 last longer.*no item is left"),
    ],
)
def test_an_empty_or_all_too_long_manifest_stops_before_training(
    toy_dirs, manifest, tmp_path, content, message
):
    path = manifest(change=too_long)
    if content:
        path.write_text(content)
    with pytest.raises(SystemExit, match=message):
        train(train_asr, toy_dirs, tmp_path / "out", path, *FEW)
    assert not (tmp_path / "out").exists()


def test_a_corrupt_clip_costs_its_own_loss_and_no_more(toy_dirs, manifest, tmp_path, capsys):
    options = ["--steps", 3, "--batch", 8, "--cache-encoder", "none"]
    path = manifest()
    (tmp_path / "5.wav").write_bytes(b"RIFF")
    _, losses = train(train_asr, toy_dirs, tmp_path / "out", path, *options)
    printed = capsys.readouterr()
    assert (
        (printed.out + printed.err).count("skipped (") == 1
        and "5.wav" in printed.out + printed.err
        and "skipped (1 so far)" in printed.out + printed.err
    )
    assert all(0 < loss < 100 for loss in losses)
    with pytest.raises(
        SystemExit, match="1 clips cannot be read, more than the 0 allowed(.|\n)*5.wav"
    ):
        train(train_asr, toy_dirs, tmp_path / "strict", path, *options, "--max-unreadable", 0)


def test_a_loss_that_is_not_finite_names_the_clips(toy_dirs, manifest, tmp_path, monkeypatch):
    path, real = manifest(), train_asr.diffusion_loss
    seen = []
    monkeypatch.setattr(
        train_asr,
        "diffusion_loss",
        lambda *a, **k: (seen.append(1), real(*a, **k))[1] * (math.nan if len(seen) == 3 else 1),
    )
    with pytest.raises(
        SystemExit, match="loss is nan at step 2; .*its items: clip., clip., clip., clip.$"
    ):
        train(train_asr, toy_dirs, tmp_path / "out", path, "--steps", 4, "--batch", 4)
    assert [file.name for file in checkpoints(tmp_path / "out" / "checkpoint.pt")] == [
        "checkpoint-00000002.pt"
    ]


def test_a_run_does_not_resume_with_other_words_or_another_lm(toy_dirs, manifest, tmp_path, whole):
    other = manifest(
        "other.json", lambda i, item: item | {"transcription": "birds birds"} if i == 3 else item
    )
    with pytest.raises(SystemExit, match="other settings(.|\n)*corpus was"):
        train(train_asr, toy_dirs, tmp_path / "whole", other, *FEW)
    model = DIFFA.from_pretrained(**toy_dirs)
    model.lm.blocks[0].attn.query.weight.data += 0.01
    shutil.copytree(toy_dirs["llm"], tmp_path / "llm")
    save_lm(model.lm, tmp_path / "llm")
    with pytest.raises(SystemExit, match="lm was") as error:
        train(train_asr, toy_dirs | {"llm": tmp_path / "llm"}, tmp_path / "whole", manifest(), *FEW)
    assert "corpus was" not in str(error.value)


def test_made_up_weights_train_without_a_file_and_say_so(manifest, tmp_path, capsys):
    nowhere = {
        "whisper": tmp_path / "no",
        "llm": tmp_path / "no",
    }  # train_instruct's --adapters too: runs/toy/stage1 by default
    train(
        train_instruct,
        nowhere,
        tmp_path / "out",
        manifest(),
        "--random-weights",
        "toy+toy",
        "--steps",
        1,
        "--batch",
        2,
    )
    printed = capsys.readouterr().out
    assert (
        printed.count("from random weights (toy+toy)") == 2
        and printed.count("new, random weights") == 2
    )
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["llm"] == "random weights (toy+toy)" and config["adapters"]["n_queries"] == 8


def test_in_stage_2_the_semantic_adapter_alone_is_pretrained(toy_dirs, manifest, tmp_path):
    train(train_asr, toy_dirs, tmp_path / "stage1", manifest(), *FEW)
    began, _ = train(
        train_instruct,
        toy_dirs,
        tmp_path / "still",
        manifest(),
        "--adapters",
        tmp_path / "stage1",
        "--pretrained-lr-scale",
        0,
        *FEW,
    )
    stage1 = result(tmp_path / "stage1")[0]
    kept = {name for name in began if name in stage1 and torch.equal(began[name], stage1[name])}
    assert kept == {name for name in began if name.startswith("semantic_connector")} != set()


if __name__ == "__main__":  # one of two processes
    for port, whisper, llm, path, out, *options in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = port
        train(train_asr, {"whisper": whisper, "llm": llm}, out, path, *options)
