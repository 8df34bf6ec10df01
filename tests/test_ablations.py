"""The ablations end to end on tiny untrained models, and sentences that follow from the numbers."""

import json
import shutil
from dataclasses import replace

import pytest

import train_asr
import train_instruct
from data import load_manifest
from lab import ablations, findings
from lab.baseline import existing
from lab.findings import SCORED_KINDS, mean_accuracy, spread, verdict
from toy.grammar import SLOTS, VOICE_KINDS
from toy.pretrain_lm import answer_text
from training import flops, loop

pytestmark = pytest.mark.long  # four models are trained


def command(run, *options):
    given = ["--run", str(run), "--device", "cpu", "--seeds", "0", "1", "--steps", "2"]
    ablations.main([*given, *map(str, options)])


def read(file):
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def few():
    """Few sampler settings of few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "MATRIX_SIZE", {"cpu": 16})
        recipe = train_asr.RECIPES["toy"]
        small = replace(recipe, train=replace(recipe.train, steps=2))
        patch.setitem(train_asr.RECIPES, "toy", small)
        patch.setattr(ablations, "MAX_PROCESSES", 1)  # others would not know of these patches
        names = ("count 1", "threshold 0.9", "factor 1")
        settings = {name: ablations.SETTINGS[name] for name in names}
        settings["count 18"] = ablations.SETTINGS["count 3"]
        patch.setattr(ablations, "SETTINGS", settings)
        patch.setattr(ablations, "TIMED", ("count 18", "threshold 0.9"))

        # An untrained LM's answers do not end: the first letters stand for them.
        def shortened(*arguments):
            return [text[:3] or "fox" for text in answer_text(*arguments)]

        patch.setattr(ablations, "answer_text", shortened)
        yield


@pytest.fixture(scope="module")
def ablated(tiny_run, few, tmp_path_factory):
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("ablated") / "run")
    command(run)
    return run


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(loop.Trainer, "run", lambda *_: pytest.fail("trained again"))


def test_the_report_has_every_part(ablated):
    report = (ablated / "ablations/report.md").read_text()
    assert "--steps 2" in report and "--seeds 0 1" in report and "torch" in report
    rows = ("gender", "mean of voice", "autoregressive, greedy", "both adapters, factor 1")
    assert [row for row in rows if f"| {row} | " not in report] == []
    assert "autoregressive baseline 100.0 % WER" in report and "+16.32 on MMSU" in report
    verdicts = [line for line in report.splitlines() if line.startswith("- ")]
    assert len(verdicts) == 7 and all("eproduce" in line for line in verdicts)
    assert (ablated / "ablations/ablations.png").stat().st_size > 1000


def test_arms_differ_in_what_they_are_about(ablated):
    out = ablated / "ablations"
    configs = {arm: read(out / f"{arm}-1/config.json") for arm in findings.ARMS}
    stages = {arm: config["stage"] for arm, config in configs.items()}
    assert stages == dict.fromkeys(configs, "stage2") | {"semantic": "semantic"}
    causal = [arm for arm, config in configs.items() if config["llm"].endswith("baseline")]
    assert causal == ["baseline"]
    losses = {arm: read(out / f"{arm}-1/training.json")["losses"] for arm in configs}
    assert len(losses["both"]) == 2 and len({tuple(one) for one in losses.values()}) == 4


def test_own_targets_are_the_lm_s_answers_to_the_same_questions(ablated):
    own = load_manifest(ablated / "ablations/instruct_self.json")
    given = load_manifest(ablated / "corpus/instruct_train.json")
    fields = ("audio_id", "input")
    assert [[a[f] for f in fields] for a in own] == [[b[f] for f in fields] for b in given]
    result = read(ablated / "ablations/self_targets.json")
    assert result["differ"] == sum(a["target"] != b["target"] for a, b in zip(own, given)) > 0
    kinds = [b["kind"] for a, b in zip(own, given) if a["target"] != b["target"]]
    assert result["differ_by_kind"] == {kind: kinds.count(kind) for kind in kinds}


def test_what_is_done_is_not_done_again(ablated, no_training, monkeypatch):
    before = {file: file.stat().st_mtime_ns for file in ablated.rglob("*.json")}
    fail = lambda *_, **__: pytest.fail("measured again")  # noqa: E731
    monkeypatch.setattr(ablations, "StateCache", fail)
    command(ablated)
    assert {file: file.stat().st_mtime_ns for file in ablated.rglob("*.json")} == before


def test_a_part_that_a_kill_took_is_done_from_what_is_trained(ablated, no_training):
    file = ablated / "ablations/questions-semantic-1.json"
    before = read(file)
    file.unlink()
    command(ablated)
    assert read(file) == before


def test_a_run_of_an_earlier_version_is_read(ablated, no_training, tmp_path, monkeypatch):
    """Its baseline is called twin, and each result also has the minutes that it took."""
    run = shutil.copytree(ablated, tmp_path / "run")
    out = run / "ablations"
    for path in [*run.glob("baseline*"), *out.glob("*baseline*")]:
        path.rename(path.with_name(path.name.replace("baseline", "twin")))
    for file in [*out.glob("questions-*.json"), *out.glob("sweep-*.json"), *out.glob("race-*")]:
        file.write_text(json.dumps(read(file) | {"minutes": 1.0}))
    monkeypatch.setattr(ablations, "StateCache", lambda *_, **__: pytest.fail("measured again"))
    command(run)
    report = (out / "report.md").read_text().split("Mean (")[1]
    assert report == (ablated / "ablations/report.md").read_text().split("Mean (")[1]
    assert existing(run / "baseline") == run / "twin"


def test_processes_side_by_side_measure_what_one_alone_does(ablated):
    names = [f"questions-{arm}-{seed}.json" for arm in ("semantic", "baseline") for seed in (0, 1)]
    files = [ablated / "ablations" / name for name in names]
    alone = [read(file) for file in files]
    for file in files:
        file.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations.torch, "get_num_threads", lambda: 2)
        patch.setattr(ablations, "MAX_PROCESSES", 2)
        command(ablated)
    assert [read(file) for file in files] == alone


def test_an_error_in_another_process_comes_back_with_its_message(ablated, tmp_path):
    run = shutil.copytree(ablated, tmp_path / "run")
    for seed in (0, 1):
        (run / f"ablations/questions-semantic-{seed}.json").unlink()
        (run / f"ablations/semantic-{seed}/training.json").unlink()
    (run / "corpus/instruct_train.json").write_text("{")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations.torch, "get_num_threads", lambda: 2)
        patch.setattr(ablations, "MAX_PROCESSES", 2)
        with pytest.raises(SystemExit, match="python -m lab.ablations: .*instruct_train.json"):
            command(run)


def test_other_steps_do_not_mix_with_those_of_before(ablated):
    with pytest.raises(SystemExit, match="was made with steps 2, and now it is 3"):
        command(ablated, "--steps", 3)


def test_another_learning_rate_does_not_mix_with_that_of_before(ablated, monkeypatch):
    recipe = train_instruct.RECIPES["toy"]
    other = replace(recipe, train=replace(recipe.train, lr=5e-4))
    monkeypatch.setitem(train_instruct.RECIPES, "toy", other)
    with pytest.raises(SystemExit, match="was made with lr 0.001, and now it is 0.0005"):
        command(ablated)


def test_an_unfinished_run_says_what_is_missing(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(run / "stage1")
    with pytest.raises(SystemExit, match="stage1.*make demo"):
        command(run)


# ---- from numbers to sentences
def test_mean_and_range():
    assert spread([1.0, 2.0, 6.0]) == "3.0 (1.0 to 6.0)"
    assert (
        spread([-0.5, 1.0], sign="+") == "+0.2 (-0.5 to +1.0)"
        and spread([0.123], 2) == "0.12 (0.12 to 0.12)"
    )


def table(content, voice):
    """What toy.evaluate.questions returns; one accuracy for content and another for voice."""
    return {
        kind: {"accuracy": voice if kind in VOICE_KINDS else content} for kind in SCORED_KINDS
    } | {
        "content_mean": content,
        "voice_mean": voice,
    }


def synthetic(**changes):
    """Results of three seeds in which every finding reproduces, but for what is changed."""
    tables = {
        "both": table(90.0, 90.0),
        "semantic": table(89.0, 50.0),
        "self": table(90.0, 89.5),
        "baseline": table(70.0, 60.0),
    }
    setting = {
        "content_mean": 90.0,
        "voice_mean": 90.0,
        "repeat": 5.0,
        "caption": 5.0,
        "calls": 10.0,
        "tokens": 4.0,
    }
    sweep = {
        "count 18": setting,
        "threshold 0.9": setting | {"calls": 2.0},
        "count 1": setting | {"calls": 1.0, "repeat": 40.0},
    }
    seconds = {
        "both": {"count 18": {"seconds": 0.2}, "threshold 0.9": {"seconds": 0.02}},
        "baseline": {"greedy": {"seconds": 0.1}},
    }
    return {
        "questions": {arm: [one] * 3 for arm, one in tables.items()} | changes.get("questions", {}),
        "sweep": {"both": [sweep | changes.get("sweep", {})] * 3},
        "race": {
            arm: [row | changes.get("race", {}).get(arm, {})] * 3 for arm, row in seconds.items()
        },
        "self_targets": {"items": 10, "differ": 1, "differ_by_kind": {"caption": 1, "name": 0}},
    }


def test_every_finding_reproduces_where_the_numbers_say_so():
    sentences = findings.findings(synthetic())
    assert len(sentences) == 7 and all(
        "Reproduces (for 3 of 3 seeds)." in sentence for sentence in sentences
    )
    assert (
        "+40.0 (+40.0 to +40.0) points on voice, +1.0" in sentences[0]
        and "1 of 10 targets differ (caption 1)." in sentences[2]
    )


SETTINGS = synthetic()["sweep"]["both"][0]
CONTRADICTIONS = [
    {"questions": {"semantic": [table(90.0, 91.0)] * 3}},
    {"questions": {"baseline": [table(95.0, 95.0)] * 3}},
    {"questions": {"self": [table(80.0, 80.0)] * 3}},
    {"sweep": {"threshold 0.9": SETTINGS["threshold 0.9"] | {"voice_mean": 88.0}}},
    {"sweep": {"count 1": SETTINGS["count 18"]}},
    {"race": {"baseline": {"greedy": {"seconds": 0.3}}}},
    {"race": {"baseline": {"greedy": {"seconds": 0.01}}}},
]


@pytest.mark.parametrize("number, changes", list(enumerate(CONTRADICTIONS)))
def test_a_finding_that_the_numbers_contradict_does_not_reproduce(number, changes):
    wrong = [
        "Does not reproduce" in sentence for sentence in findings.findings(synthetic(**changes))
    ]
    assert wrong == [i == number for i in range(7)]


def test_one_seed_against_it_is_enough():
    assert verdict([True, True, False]) == "Does not reproduce (it holds for 2 of 3 seeds)."
    semantic = [table(90.0, 50.0), table(90.0, 91.0), table(90.0, 50.0)]
    assert (
        "does not reproduce (it holds for 2 of 3"
        in findings.findings(synthetic(questions={"semantic": semantic}))[0].lower()
    )


def test_accuracy_counts_each_kind_with_one_right_answer_once():
    assert len(SCORED_KINDS) == len(SLOTS) + len(VOICE_KINDS) + 1  # and count
    assert mean_accuracy([table(100.0, 0.0)]) == [pytest.approx(60.0)]
