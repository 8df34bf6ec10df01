"""The ablations end to end on tiny untrained models, what is not done twice, and sentences that follow from the numbers."""

import json
import shutil
from dataclasses import replace

import pytest

from lab import ablations
from lab import findings
from toy import pretrain
from lab import robustness
from training import stage
import train_instruct
from data import load_manifest
from lab.findings import KINDS, accuracy, spread, verdict
from toy.grammar import SLOTS, VOICE_KINDS


def command(run, *options):
    ablations.main(["--run", str(run), "--device", "cpu", "--seeds", "0", "1", "--steps", "2", "--stage1-steps", "2", *map(str, options)])


@pytest.fixture(scope="module")
def few():
    """Few sampler settings of few steps, and one condition."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "measured_peak", lambda *_: 1e9)
        patch.setattr(ablations, "MOST_PROCESSES", 1)  # others would not know of these patches
        settings = {name: ablations.SWEEP[name] for name in ("count 1", "threshold 0.9", "factor 1")} | {"count 18": ablations.SWEEP["count 3"]}
        patch.setattr(ablations, "SWEEP", settings)
        patch.setattr(ablations, "RACE", {name: settings[name] for name in ("count 18", "threshold 0.9")})
        # An untrained LM's answers do not end: the first letters stand for them.
        patch.setattr(ablations, "ask_text", lambda *arguments: [text[:3] or "fox" for text in pretrain.ask_text(*arguments)])
        patch.setattr(robustness, "CONDITIONS", {"clean": robustness.CONDITIONS["clean"]})
        yield


@pytest.fixture(scope="module")
def ablated(tiny_run, few, tmp_path_factory):
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("ablated") / "run")
    command(run)
    return run


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(stage, "fit", lambda *_, **__: pytest.fail("trained again"))


def test_the_report_has_every_part(ablated):
    report = (ablated / "ablations/report.md").read_text()
    assert "--steps 2" in report and "seeds 0, 1" in report and "torch" in report
    of_each_table = ("gender", "paper: MMSU, backbone", "autoregressive, greedy", "autoregressive twin", "factor 1", "caption", "clean")
    assert [row for row in of_each_table if f"| {row} | " not in report] == []
    assert len([line for line in report.splitlines() if line.startswith("- ") and "eproduce" in line]) == 7  # a verdict for each finding
    assert all((ablated / "ablations" / name).stat().st_size > 1000 for name in ("ablations.png", "sweep.png"))


def test_arms_differ_in_what_they_are_about(ablated):
    configs = {arm: json.loads((ablated / f"ablations/{arm}-1/config.json").read_text()) for arm in ablations.PARTS}
    assert {arm: config["stage"] for arm, config in configs.items()} == dict.fromkeys(configs, "stage2") | {"semantic": "semantic"}
    assert [arm for arm, config in configs.items() if config["llm"].endswith("twin")] == ["twin"]
    losses = {arm: json.loads((ablated / f"ablations/{arm}-1/training.json").read_text())["losses"] for arm in configs}
    assert len(losses["both"]) == 2 and len({tuple(one) for one in losses.values()}) == 4


def test_own_targets_are_the_lm_s_answers_to_the_same_questions(ablated):
    own, given = load_manifest(ablated / "ablations/instruct_self.json"), load_manifest(ablated / "corpus/instruct_train.json")
    assert [(item["audio_id"], item["input"]) for item in own] == [(item["audio_id"], item["input"]) for item in given]
    result = json.loads((ablated / "ablations/self_targets.json").read_text())
    assert result["differ"] == sum(a["target"] != b["target"] for a, b in zip(own, given)) > 0


def test_what_is_done_is_not_done_again(ablated, no_training, monkeypatch):
    before = {file: file.stat().st_mtime_ns for file in ablated.rglob("*.json")}
    monkeypatch.setattr(ablations, "StateCache", lambda *_, **__: pytest.fail("measured again"))
    command(ablated)
    assert {file: file.stat().st_mtime_ns for file in ablated.rglob("*.json")} == before


def test_a_part_that_a_kill_took_is_done_from_what_is_trained(ablated, no_training):
    file = ablated / "ablations/questions-semantic-1.json"
    whole = json.loads(file.read_text())
    file.unlink()
    command(ablated)
    again = json.loads(file.read_text())
    assert again | {"minutes": 0} == whole | {"minutes": 0}


def test_processes_side_by_side_measure_what_one_alone_does(ablated):
    files = [ablated / f"ablations/questions-{arm}-{seed}.json" for arm in ("semantic", "twin") for seed in (0, 1)]
    alone = [json.loads(file.read_text()) for file in files]
    for file in files:
        file.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "MOST_PROCESSES", 2)
        command(ablated)
    for file, before in zip(files, alone):
        assert json.loads(file.read_text()) | {"minutes": 0} == before | {"minutes": 0}


def test_an_error_in_another_process_comes_back_as_it_was_said(ablated, tmp_path):
    run = shutil.copytree(ablated, tmp_path / "run")
    for seed in (0, 1):
        (run / f"ablations/questions-semantic-{seed}.json").unlink()
        (run / f"ablations/semantic-{seed}/training.json").unlink()
    (run / "corpus/instruct_train.json").write_text("{")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "MOST_PROCESSES", 2)
        with pytest.raises(SystemExit, match="train_instruct.py: .*instruct_train.json"):
            command(run)


def test_other_steps_do_not_mix_with_those_of_before(ablated):
    with pytest.raises(SystemExit, match="was made with steps 2, and now it is 3"):
        command(ablated, "--steps", 3)


def test_another_learning_rate_does_not_mix_with_that_of_before(ablated, monkeypatch):
    preset = train_instruct.PRESETS["toy"]
    monkeypatch.setitem(train_instruct.PRESETS, "toy", replace(preset, train=replace(preset.train, lr=5e-4)))
    with pytest.raises(SystemExit, match="was made with lr 0.001, and now it is 0.0005"):
        command(ablated)


def test_an_unfinished_run_is_told_what_is_missing(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(run / "stage2")
    with pytest.raises(SystemExit, match="stage2.*make demo"):
        command(run)


# ---- from numbers to sentences
def test_mean_and_range():
    assert spread([1.0, 2.0, 6.0]) == "3.0 (1.0 to 6.0)"
    assert spread([-0.5, 1.0], sign="+") == "+0.2 (-0.5 to +1.0)" and spread([0.123], 2) == "0.12 (0.12 to 0.12)"


def table(content, voice):
    """What evaluate.questions returns, where all content questions have one accuracy and all voice questions another."""
    return {kind: {"accuracy": voice if kind in VOICE_KINDS else content} for kind in KINDS} | {"content_mean": content, "voice_mean": voice}


def made_up(**changes):
    """Results of three seeds in which every finding reproduces, but for what is changed."""
    tables = {"both": table(90.0, 90.0), "semantic": table(89.0, 50.0), "self": table(90.0, 89.5), "twin": table(70.0, 60.0)}
    setting = {"content_mean": 90.0, "voice_mean": 90.0, "repeat": 5.0, "caption": 5.0, "calls": 10.0, "tokens": 4.0}
    sweep = {"count 18": setting, "threshold 0.9": setting | {"calls": 2.0}, "count 1": setting | {"calls": 1.0, "repeat": 40.0}}
    seconds = {"both": {"count 18": {"seconds": 0.2}, "threshold 0.9": {"seconds": 0.02}}, "twin": {"greedy": {"seconds": 0.1}}}
    return {
        "questions": {arm: [one] * 3 for arm, one in tables.items()} | changes.get("questions", {}),
        "sweep": {"both": [sweep | changes.get("sweep", {})] * 3},
        "race": {arm: [row | changes.get("race", {}).get(arm, {})] * 3 for arm, row in seconds.items()},
        "self_targets": {"items": 10, "differ": 1},
    }


def test_every_finding_reproduces_where_the_numbers_say_so():
    sentences = findings.findings(made_up())
    assert len(sentences) == 7 and all("Reproduces (for 3 of 3 seeds)." in sentence for sentence in sentences)
    assert "+40.0 (+40.0 to +40.0) points on voice, +1.0" in sentences[0] and "1 of 10 targets" in sentences[4]


@pytest.mark.parametrize("number, changes", [
    (0, {"questions": {"semantic": [table(90.0, 91.0)] * 3}}),
    (1, {"questions": {"twin": [table(95.0, 95.0)] * 3}}),
    (2, {"sweep": {"threshold 0.9": made_up()["sweep"]["both"][0]["threshold 0.9"] | {"voice_mean": 88.0}}}),
    (3, {"sweep": {"count 1": made_up()["sweep"]["both"][0]["count 18"]}}),
    (4, {"questions": {"self": [table(80.0, 80.0)] * 3}}),
    (5, {"race": {"twin": {"greedy": {"seconds": 0.3}}}}),
    (6, {"race": {"twin": {"greedy": {"seconds": 0.01}}}}),
])  # fmt: skip
def test_a_finding_that_the_numbers_contradict_does_not_reproduce(number, changes):
    wrong = ["Does not reproduce" in sentence for sentence in findings.findings(made_up(**changes))]
    assert wrong == [i == number for i in range(7)]


def test_one_seed_against_it_is_enough():
    assert verdict([True, True, False]) == "Does not reproduce (it holds for 2 of 3 seeds)."
    semantic = [table(90.0, 50.0), table(90.0, 91.0), table(90.0, 50.0)]
    assert "does not reproduce (it holds for 2 of 3" in findings.findings(made_up(questions={"semantic": semantic}))[0].lower()


def test_accuracy_counts_each_kind_with_one_right_answer_once():
    assert len(KINDS) == len(SLOTS) + len(VOICE_KINDS) + 1  # and count
    assert accuracy([table(100.0, 0.0)]) == [pytest.approx(60.0)]


def test_seeds_that_agree_have_no_reach_below_nothing():
    """The mean of three equal numbers can round to another; matplotlib refuses what reaches less than 0."""
    equal = [[k / 343 * 100] * 3 for k in range(344)]
    assert any(sum(seeds) / 3 != seeds[0] for seeds in equal)
    assert all(min(below, above) >= 0 for _, ((below,), (above,)) in map(findings.bounds, equal))
