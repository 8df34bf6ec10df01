"""The benchmark prints a row for every setting; the floor counts what a call really computes."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_asr
from checkpoints.model import load_for_training
from diffa import Spliced
from diffusion_lm import DiffusionLM, LMConfig
from lab import benchmark, measure_stage1, roofline
from lab.gpu_training import random_batch
from sampler import SamplerConfig, refine
from speed import compiled
from training import flops
from training.execution import prepare

SMALL = LMConfig(
    width=16, n_layers=2, n_heads=2, ffn=24, vocab=40, max_length=1000, mask_id=39, end_id=19
)
RATES = roofline.Rates(bandwidth=1e9, flops=1e9)


@pytest.fixture
def fast_measurements(monkeypatch):
    monkeypatch.setattr(roofline, "BYTES_READ", {"cpu": 2**20})
    monkeypatch.setattr(flops, "MATRIX_SIZE", {"cpu": 64})


@pytest.fixture
def small(monkeypatch):
    """A small LM in the place of the 150 M parameters, and nothing compiled: fast."""
    monkeypatch.setitem(benchmark.RANDOM, "150m", SMALL)
    monkeypatch.setattr(compiled, "compiled_refine", lambda device: refine)


@pytest.mark.parametrize("M, N", [(12, 3), (40, 12), (4, 4)])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_floor_counts_the_flops_of_the_call_itself(M, N, groups):
    lm = DiffusionLM(replace(SMALL, n_heads=4, n_kv_heads=4 // groups))
    cache = lm.new_cache(1, 40)
    indices = torch.arange(40)
    x = torch.randn(1, M, SMALL.width)
    with FlopCounterMode(display=False) as products:
        roofline.matrix_products(lm, M, 40, N)()
    # Fused attention is not counted by the counter.
    with FlopCounterMode(display=False) as call, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        lm.head(lm(x, None, cache, indices[:M], indices[:N]))
    expected = flops.lm_flops(lm.config, 1, M, 40, N)
    assert products.get_total_flops() == call.get_total_flops() == expected


def test_the_floor_is_the_slower_of_memory_and_arithmetic():
    lm = DiffusionLM(SMALL)
    both = [
        roofline.floor_of_call(lm, roofline.Rates(bandwidth=b, flops=f), 4, 40, 4)
        for b, f in ((1e9, 1e30), (1e30, 1e9))
    ]
    least = roofline.floor_of_call(lm, RATES, 4, 40, 4)
    assert least == max(both) > min(both) > 0


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_cache_lowers_the_floor_of_an_answer_but_not_of_its_first_call(cache):
    lm = DiffusionLM(SMALL)
    config = SamplerConfig(length=16, block_length=4, cache=cache)
    plain = replace(config, cache="none")
    floors = [roofline.floor_of_answer(lm, RATES, c, 100, 16) for c in (config, plain)]
    assert (floors[0] < floors[1]) == (cache != "none")
    # With one call a block every call is a full pass.
    floors = [roofline.floor_of_answer(lm, RATES, c, 100, 4) for c in (config, plain)]
    assert floors[0] == pytest.approx(floors[1])


@pytest.mark.parametrize("cache, widths", [("prefix", [10, 6, 2]), ("dual", [4, 4, 2])])
def test_the_floor_knows_a_short_last_block(monkeypatch, cache, widths):
    passed = []
    monkeypatch.setattr(
        roofline, "floor_of_call", lambda lm, rates, M, L, N, B: passed.append(M) or 1
    )
    config = SamplerConfig(length=10, block_length=4, cache=cache)
    assert roofline.floor_of_answer(DiffusionLM(SMALL), RATES, config, 100, 6) == 6
    assert passed == [110, *widths]


def test_agreement_counts_the_text_and_its_end():
    a, b = [[1, 2, 9, 5]], [[1, 3, 9, 6]]
    assert benchmark.agreement(a, b, end_id=9) == pytest.approx(200 / 3)
    assert benchmark.agreement(a, b, end_id=None) == 50.0


def test_prompts_one_by_one_have_no_padding():
    mask = torch.tensor([[False, True, True], [True, True, True]])
    batch = Spliced(embeddings=torch.arange(6.0).view(2, 3, 1), mask=mask, is_text=mask)
    first, second = benchmark.one_by_one(batch)
    assert first.embeddings.flatten().tolist() == [1.0, 2.0] and first.mask.all()
    assert second.embeddings.flatten().tolist() == [3.0, 4.0, 5.0]


def test_the_benchmark_prints_a_row_for_every_setting(small, fast_measurements, capsys):
    benchmark.main(["--device", "cpu", "--length", "8", "--block-length", "4"])
    printed = capsys.readouterr().out
    rows = ("generate_plain, 8 steps", "count 2 steps, none", "count 8 steps, prefix")
    for name in (*rows, "count 8 steps, dual", "count 2 steps, dual, compiled"):
        assert f"| {name} |" in printed
    assert "| count 8 steps, none |" not in printed  # a full pass for each token takes minutes
    assert "GFLOP/s" in printed and "nan" not in printed
    assert "torch.float32, cpu" in printed and "at once" not in printed

    # One call of each kind: plain forward, eager, compiled, its products alone, and the floor.
    for name in ("full pass", "block step"):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"| {name} |")]
        assert line.count(" ms, ") == 4 and line.endswith(" ms |")


def test_dtype_reference_steps_and_compile_all(small, monkeypatch, fast_measurements, capsys):
    steps = []
    plain = benchmark.generate_plain

    def counted(*given, max_steps):
        out = plain(*given, max_steps=max_steps)
        steps.append((max_steps, out.calls.item()))
        return out

    monkeypatch.setattr(benchmark, "generate_plain", counted)
    options = ["--dtype", "bfloat16", "--reference-steps", "3", "--compile-all"]
    benchmark.main(["--device", "cpu", "--length", "8", "--block-length", "4", *options])
    printed = capsys.readouterr().out
    assert "torch.bfloat16" in printed and steps == [(3, 3)]
    assert "| generate_plain, 8 steps | 8.0 |" in printed  # scaled up
    assert printed.count(", compiled |") == 7

    with pytest.raises(SystemExit):
        benchmark.main(["--reference-steps", "0"])
    assert "--reference-steps" in capsys.readouterr().err


@pytest.mark.long
def test_a_batch_of_unequal_prompts_has_the_ids_of_one_at_a_time(small, monkeypatch):
    lm, batch = benchmark.random_lm(benchmark.RANDOM["150m"], "cpu", None)
    lengths = batch.mask.sum(dim=1).tolist()
    assert lengths == [499 - 20 * i for i in range(8)]
    assert not batch.is_text[batch.mask].all() and not (batch.is_text & ~batch.mask).any()

    config = SamplerConfig(length=4, steps=2, stop_at_end=False)
    line = benchmark.compare_batch(lm, batch, config)
    assert line.startswith("8 of unequal length, count 2 steps, none: at once ")
    assert "one by one" in line and line.endswith("; ids equal")

    # A batch that answers with other ids is found out.
    generate = benchmark.generate

    def wrong_in_a_batch(lm, prompt, config):
        out = generate(lm, prompt, config)
        out.ids[7:] += 1
        return out

    monkeypatch.setattr(benchmark, "generate", wrong_in_a_batch)
    assert benchmark.compare_batch(lm, batch, config).endswith("; ids NOT equal")


def test_times_are_medians_taken_in_turns(monkeypatch):
    calls = []
    ticks = iter([0, 5, 10, 11, 20, 21, 30, 31, 40, 43, 50, 51])
    monkeypatch.setattr(roofline, "clock", lambda device: next(ticks))
    works = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    assert roofline.time_in_turns(works, torch.device("cpu"), rounds=3) == {"a": 3, "b": 1}
    assert calls == ["a", "a", "b", "b"] * 3  # each once to warm up


@pytest.mark.parametrize("trained, n", [(False, 7), (True, 20)])
def test_each_rule_has_each_cache_and_one_setting_is_compiled(trained, n):
    settings = benchmark.settings_of(SamplerConfig(length=8, block_length=4), trained)
    assert len(set(settings)) == n + 1 and [config.compile for config in settings].count(True) == 1
    assert benchmark.name_of(settings[-1]) == "count 2 steps, dual, compiled"
    assert all(config.stop_at_end == trained for config in settings)
    base = SamplerConfig(length=8, block_length=4)
    every = benchmark.settings_of(base, trained, compile_all=True)
    (kept,) = benchmark.settings_of(base, trained, only="refresh 2")
    assert kept.cache == "dual" and kept.refresh == 2
    with pytest.raises(ValueError, match="--only 'magic': no setting"):
        benchmark.settings_of(base, trained, only="magic")
    assert len(every) == 2 * n and [config.compile for config in every].count(True) == n


@pytest.mark.long
def test_the_toy_is_timed_with_its_wer(tiny_run, monkeypatch, fast_measurements, capsys):
    monkeypatch.setattr(compiled, "compiled_refine", lambda device: refine)
    few = [SamplerConfig(length=6, block_length=6), SamplerConfig(length=6, rule="threshold")]
    few += [SamplerConfig(length=6, cache=cache) for cache in ("prefix", "dual")]
    monkeypatch.setattr(benchmark, "settings_of", lambda *given: few)
    options = ["--run", str(tiny_run), "--length", "6", "--device", "cpu"]
    benchmark.main(["--size", "toy", *options, "--block-length", "6"])
    printed = capsys.readouterr().out.splitlines()
    count, threshold, *_ = [line for line in printed if line.startswith(("| count", "| threshold"))]
    assert count.startswith("| count 6 steps, none |") and "| 100.0 % |" in count
    assert threshold.startswith("| threshold 0.9, none |") and threshold.endswith(" % |")

    # In a batch, without a cache and with the dual one.
    in_batch = [line for line in printed if " of unequal length, " in line]
    assert len(in_batch) == 3 and all(line.endswith("ids equal") for line in in_batch)


def test_the_benchmark_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="python -m lab.benchmark: .*whisper"):
        benchmark.main(["--size", "toy", "--run", str(tmp_path)])


@pytest.mark.parametrize(
    "settings, passed",
    [
        ({"cache": "dual", "refresh": 2}, [112, 12, 112, 4]),  # the last is of a cached block
        ({"append": True}, [104, 108, 112]),
    ],
    ids=str,
)
def test_the_floor_knows_a_kept_prompt_and_appended_blocks(monkeypatch, settings, passed):
    widths = set()
    monkeypatch.setattr(
        roofline, "floor_of_call", lambda lm, rates, M, L, N, B: widths.add(M) or float(M)
    )
    config = SamplerConfig(length=12, block_length=4, **settings)
    least = roofline.floor_of_answer(DiffusionLM(SMALL), RATES, config, 100, 3)
    assert widths == set(passed) and least == pytest.approx(sum(passed[:3]))


def test_a_step_with_all_logits_has_the_same_loss_and_gradients():
    recipe = replace(train_asr.RECIPES["paper"], answer_length=8, dtype="float32")
    torch.manual_seed(0)
    shapes = train_asr.RECIPES["toy"].shapes | {"audio_context": 1.0}
    model = load_for_training(stage="stage1", random_weights="toy+toy", **shapes).model
    trained = prepare(model, train_asr.RECIPES["toy"].execution, "cpu")
    batch, _ = random_batch(model, 2, 1.0, recipe)
    losses = []
    gradients = []
    for loss_of in measure_stage1.WAYS.values():
        losses.append(measure_stage1.step(model, batch, recipe, loss_of))
        gradients.append(torch.cat([p.grad.flatten() for p in trained.values()]))
        model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    heads, rows = measure_stage1.compare_ways(model, batch, recipe)
    assert [row[1] for row in rows] == [f"{losses[0]:.4f}"] * 2 and len(heads) == len(rows[0])
