"""Every rule fills every mask, each item as if alone; impossible settings are refused."""

import random
import subprocess
import sys

import pytest
import torch

import sampler
from checkpoints.model import save_trained
from data import build_prompt, build_text_prompt, decode_answer, read_audio
from diffa import DIFFA, Spliced, splice
from diffusion_lm import DiffusionLM, LMConfig
from evaluation.ask import check_settings, make_parser, sampler_config
from evaluation.clips import hear_clips
from evaluation.screen import one_line, token_texts
from sampler import (
    SamplerConfig,
    answer,
    blocks_of,
    commit,
    generate,
    generate_plain,
    propose,
    split_evenly,
)
from speed import compiled

SMALL = LMConfig(
    width=16, n_layers=2, n_heads=2, ffn=24, vocab=40, max_length=96, mask_id=39, end_id=19
)
NAN, INF = float("nan"), float("inf")
RULES = [
    SamplerConfig(length=12, block_length=12, steps=12),
    SamplerConfig(length=12, block_length=4, steps=7),
    SamplerConfig(length=12, block_length=5, rule="threshold", threshold=0.3),  # the last has 2
    SamplerConfig(length=12, block_length=6, rule="factor", factor=2.5),
    SamplerConfig(length=12, block_length=6, rule="frechet", frechet=0.1),
]
by_rule = pytest.mark.parametrize(
    "config", RULES, ids=lambda c: f"{c.rule}-{c.block_length}-{c.steps}"
)


@pytest.fixture(autouse=True)
def no_endless_loop(monkeypatch):
    """Fails a test whose sampler would never end; no test here needs as many calls."""
    calls, forward = [], DiffusionLM.forward

    def counted(*arguments):
        if not torch.compiler.is_compiling():
            calls.append(None)
            assert len(calls) < 1500
        return forward(*arguments)

    monkeypatch.setattr(DiffusionLM, "forward", counted)


def with_(config, **changes):
    return SamplerConfig(**{**vars(config), **changes})


def text(model, *instructions):
    """Prompts without sound, left-padded."""
    rows = [torch.tensor(build_prompt(model.tokenizer, line).after) for line in instructions]
    P = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (P - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(P) >= P - len(row) for row in rows])
    return Spliced(embeddings=model.lm.embed(ids), mask=mask, is_text=mask)


@torch.inference_mode()
def heard(model, clips, instructions):
    """Prompts with sound."""
    prompts = [build_prompt(model.tokenizer, line) for line in instructions]
    return splice(model.lm, prompts, *hear_clips(model, clips, ["clip"] * len(clips)))


def traced(lm, prompt, config):
    """The generation, and copies of the ids and confidences after each step."""
    steps = []
    out = generate(lm, prompt, config, lambda ids, kept: steps.append((ids.clone(), kept.clone())))
    return out, steps


def favour_mask(model, monkeypatch):
    """Make [MASK] the model's likeliest token everywhere."""
    head, bonus = model.lm.head, torch.zeros(model.lm.config.vocab)
    bonus[model.lm.config.mask_id] = 50.0
    monkeypatch.setattr(model.lm, "head", lambda hidden: head(hidden) + bonus)


# Every rule


@by_rule
@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_an_item_in_a_batch_gets_the_answer_it_gets_alone(toy, config, cfg_scale):
    torch.manual_seed(3)
    config = with_(config, cfg_scale=cfg_scale)
    clips = [
        torch.randn(n) for n in (12_800, 3000, 7100, 400)
    ]  # the last is too short for any semantic embedding
    lines = [
        "What is said?",
        "two red birds sing and sing again until the night",
        "Why?",
        "Repeat what is said.",
    ]
    together = generate(toy.lm, heard(toy, clips, lines), config)
    assert len({tuple(row) for row in together.ids.tolist()}) > 1  # the items do differ
    for i in range(4):
        alone = generate(toy.lm, heard(toy, clips[i : i + 1], lines[i : i + 1]), config)
        assert together.ids[i].tolist() == alone.ids[0].tolist()
        assert together.calls[i] == alone.calls[0]


@by_rule
@pytest.mark.parametrize(
    "extra", [{}, {"temperature": 1.0}, {"remasking": "random"}, {"cfg_scale": 1.0}], ids=str
)
def test_mask_is_never_an_answer_though_the_model_favours_it(toy, monkeypatch, config, extra):
    favour_mask(toy, monkeypatch)
    out = generate(toy.lm, text(toy, "What?", "Why is that?"), with_(config, **extra))
    assert out.ids.shape == (2, 12)
    assert not out.ids.eq(toy.lm.config.mask_id).any()


@by_rule
def test_on_step_is_called_once_a_call(toy, config):
    out, seen = traced(toy.lm, text(toy, "What?"), config)
    assert len(seen) == out.calls.item()
    waiting = [ids.eq(toy.lm.config.mask_id).sum().item() for ids, _ in seen]
    assert waiting == sorted(waiting, reverse=True) and waiting[-1] == 0
    assert len(set([12, *waiting])) == len(waiting) + 1  # each step commits something
    for ids, kept in seen:
        assert torch.equal(kept > 0, ids != toy.lm.config.mask_id)


@by_rule
def test_a_committed_token_stays_and_blocks_are_filled_left_to_right(toy, config):
    before = torch.full((1, 12), toy.lm.config.mask_id)
    for ids, _ in traced(toy.lm, text(toy, "What?"), config)[1]:
        fixed = before != toy.lm.config.mask_id
        assert torch.equal(ids[fixed], before[fixed])
        first = int(before.eq(toy.lm.config.mask_id).int().argmax()) // config.block_length
        assert ids[0, (first + 1) * config.block_length :].eq(toy.lm.config.mask_id).all()
        before = ids


# Caches, batches, the end of the text


@pytest.fixture(scope="module")
def small():
    """A random LM that is often confident, and often ends its text."""
    torch.manual_seed(0)
    lm = DiffusionLM(SMALL).eval().requires_grad_(False)
    lm.unembedding.weight.mul_(9)
    lm.embedding.weight[SMALL.mask_id].mul_(0.1)
    return lm


def spliced(lengths, sounds, seed=0):
    """Left-padded random prompts of these lengths, with `sounds` positions of audio in each."""
    P, generator = max(lengths), torch.Generator().manual_seed(seed)
    embeddings = torch.randn(len(lengths), P, SMALL.width, generator=generator)
    mask = torch.stack([torch.arange(P) >= P - n for n in lengths])
    sound = torch.stack(
        [
            (torch.arange(P) >= P - n + 1) & (torch.arange(P) < P - n + 1 + m)
            for n, m in zip(lengths, sounds)
        ]
    )
    return Spliced(
        embeddings=torch.where(mask[..., None], embeddings, 1e3), mask=mask, is_text=mask & ~sound
    )  # padding that would be noticed


def one(prompt, i):
    """Item i alone, without its padding."""
    real = prompt.mask[i]
    return Spliced(
        embeddings=prompt.embeddings[i : i + 1, real],
        mask=prompt.mask[i : i + 1, real],
        is_text=prompt.is_text[i : i + 1, real],
    )


def sizes(config):
    """The lengths of its blocks."""
    return [block.stop - block.start for block, _ in blocks_of(config)]


def text_of(ids):
    return ids[: ids.index(SMALL.end_id)] if SMALL.end_id in ids else ids


caches = pytest.mark.parametrize("cache", ["none", "prefix", "dual"])


@by_rule
@caches
@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_random_prompts_together_get_the_answers_they_get_alone(small, config, cache, cfg_scale):
    config, dice = with_(config, cache=cache, cfg_scale=cfg_scale), random.Random(5)
    ended = 0
    for seed in range(6):
        lengths = [dice.randint(2, 60) for _ in range(dice.randint(2, 6))]
        prompt = spliced(lengths, [dice.randint(0, n - 2) for n in lengths], seed)
        together = generate(small, prompt, config)
        ended += (together.text_tokens < 12).sum()
        for i in range(len(lengths)):
            alone = generate(small, one(prompt, i), config)
            assert together.ids[i].tolist() == alone.ids[0].tolist()
            assert (
                together.calls[i] == alone.calls[0]
                and together.text_tokens[i] == alone.text_tokens[0]
            )
    assert ended  # some were dropped from the batch early


@by_rule
@caches
def test_stopping_at_the_end_changes_no_text_and_saves_calls(small, config, cache):
    prompt = spliced([9, 30, 17, 25, 12, 40, 3, 21], [5, 20, 0, 3, 8, 0, 1, 2])
    stopped, whole = (
        generate(small, prompt, with_(config, cache=cache, stop_at_end=stop))
        for stop in (True, False)
    )
    texts = [text_of(ids) for ids in whole.ids.tolist()]
    assert [text_of(ids) for ids in stopped.ids.tolist()] == texts
    assert (
        stopped.text_tokens.tolist() == whole.text_tokens.tolist() == [len(text) for text in texts]
    )
    assert (stopped.calls <= whole.calls).all() and stopped.calls.sum() < whole.calls.sum()
    assert not stopped.ids.eq(SMALL.mask_id).any()


def test_what_follows_the_end_is_filled_with_the_end_at_once(small, monkeypatch):
    monkeypatch.setattr(
        small,
        "head",
        lambda hidden: torch.zeros(*hidden.shape[:2], SMALL.vocab).index_fill(
            -1, torch.tensor(SMALL.end_id), 9.0
        ),
    )
    out = generate(small, spliced([5], [0]), SamplerConfig(length=12, block_length=4, steps=12))
    assert (
        out.ids[0].tolist() == [SMALL.end_id] * 12
        and out.calls.item() == 1
        and out.text_tokens.item() == 0
    )


@caches
@pytest.mark.parametrize("rule", ["count", "threshold"])
def test_a_cache_is_exact_where_each_block_is_committed_by_its_full_pass(small, cache, rule):
    prompt = spliced([9, 30], [5, 20])
    config = SamplerConfig(
        length=12, block_length=4, steps=3, rule=rule, threshold=1e-9, stop_at_end=False
    )
    assert torch.equal(
        generate(small, prompt, config).ids, generate(small, prompt, with_(config, cache=cache)).ids
    )


@pytest.mark.parametrize(
    "cache, passed", [("none", [21] * 6), ("prefix", [21, 12, 21, 8, 21, 4]), ("dual", [21, 4] * 3)]
)
def test_how_many_positions_each_cache_passes_through_the_model(small, monkeypatch, cache, passed):
    seen, forward = [], small.forward
    monkeypatch.setattr(
        small, "forward", lambda x, *rest: (seen.append(x.shape[1]), forward(x, *rest))[1]
    )
    generate(
        small,
        spliced([9], [5]),
        SamplerConfig(length=12, block_length=4, steps=6, cache=cache, stop_at_end=False),
    )
    assert seen == passed


@pytest.mark.parametrize(
    "settings, passed",
    [({"refresh": 2}, [21, 4, 12, 4, 21, 4]), ({"append": True}, [13, 4, 17, 4, 21, 4])],
    ids=str,
)
def test_a_kept_prompt_and_blocks_yet_to_come_are_not_passed(small, monkeypatch, settings, passed):
    seen, forward = [], small.forward
    monkeypatch.setattr(
        small, "forward", lambda x, *rest: (seen.append(x.shape[1]), forward(x, *rest))[1]
    )
    config = SamplerConfig(
        length=12, block_length=4, steps=6, cache="dual", stop_at_end=False, **settings
    )
    generate(small, spliced([9], [5]), config)
    assert seen == passed


@pytest.mark.parametrize("refresh", [1, 2, 3])
def test_keys_that_depend_on_their_own_token_alone_make_every_cache_exact(refresh):
    torch.manual_seed(0)
    one_layer = LMConfig(**{**vars(SMALL), "n_layers": 1})
    lm = DiffusionLM(one_layer).eval().requires_grad_(False)
    prompt = spliced([9, 30, 17], [5, 20, 0])
    exact = SamplerConfig(length=12, block_length=4, steps=9)
    kept = with_(exact, cache="dual", refresh=refresh)
    assert torch.equal(generate(lm, prompt, kept).ids, generate(lm, prompt, exact).ids)


@by_rule
def test_with_a_kept_prompt_an_item_gets_the_answer_it_gets_alone(small, config):
    config = with_(config, cache="dual", refresh=2)
    prompt = spliced([9, 30, 17, 25], [5, 20, 0, 3])
    together = generate(small, prompt, config)
    for i in range(4):
        alone = generate(small, one(prompt, i), config)
        assert together.ids[i].tolist() == alone.ids[0].tolist()
        assert together.calls[i] == alone.calls[0]


@caches
def test_deliberation_fills_the_unconfident_tokens_from_all_the_others(small, cache):
    prompt = spliced([9] * 4, [0] * 4, seed=5)
    config = with_(RULES[2], threshold=1e-9, cache=cache, stop_at_end=False)  # a call a block
    first, steps = traced(small, prompt, config)
    again = generate(small, prompt, with_(config, deliberate=0.6))

    # By hand: what stands behind an end is masked with it, and one pass sees all that is left.
    unconfident = steps[-1][1] < 0.6  # (B, G)
    for row, n in zip(unconfident, first.text_tokens.tolist()):
        row[n + 1 :] = row[min(n, 11)].item()
    start = first.ids.masked_fill(unconfident, SMALL.mask_id)
    x = torch.cat([prompt.embeddings, small.embed(start)], dim=1)
    logits = small.head(small(x))[:, -12:]
    logits[..., SMALL.mask_id] = -INF
    assert torch.equal(again.ids, torch.where(unconfident, logits.argmax(dim=-1), first.ids))
    assert unconfident.any() and not unconfident.all() and not torch.equal(again.ids, first.ids)
    assert torch.equal(again.calls, first.calls + unconfident.any(dim=1))


@by_rule
def test_deliberation_with_a_kept_prompt_is_as_alone_and_leaves_no_mask(small, config):
    config = with_(config, cache="dual", deliberate=0.7)
    config = with_(config, refresh=2 if config.block_length < 6 else 1)
    prompt = spliced([9, 30, 17, 25], [5, 20, 0, 3])
    together = generate(small, prompt, config)
    assert not together.ids.eq(SMALL.mask_id).any()
    for i in range(4):
        alone = generate(small, one(prompt, i), config)
        assert together.ids[i].tolist() == alone.ids[0].tolist()
        assert together.calls[i] == alone.calls[0]


@by_rule
def test_an_answer_whose_text_and_end_are_confident_is_not_filled_in_again(small, config):
    prompt = spliced([9, 30, 17, 25], [5, 20, 0, 3])
    for i in range(4):
        out, steps = traced(small, one(prompt, i), config)
        kept = steps[-1][1][0, : out.text_tokens.item() + 1]  # what the end fills has 0
        sure = generate(small, one(prompt, i), with_(config, deliberate=kept.min().item()))
        assert torch.equal(sure.ids, out.ids) and torch.equal(sure.calls, out.calls)


def test_the_command_appends_blocks_as_the_lm_was_trained():
    words = ["clip.wav", "What?", "--length", "8", "--block-length", "4"]
    parser = make_parser()
    assert sampler_config(parser.parse_args(words), 8).append is None
    assert sampler_config(parser.parse_args([*words, "--append"]), 8).append is True


@pytest.mark.parametrize(
    "words",
    [
        "--block-length 32 --append",
        "--rule count --steps 16 --block-length 16 --append",
        "--rule count --steps 32 --block-length 32 --cache dual --refresh 2",
    ],
)
def test_several_blocks_are_possible_before_the_adapters_length_is_known(words):
    args = make_parser().parse_args(["clip.wav", "What?", *words.split()])
    check_settings(args)
    with pytest.raises(ValueError, match="does nothing to an answer of one block"):
        sampler_config(args, args.block_length)


def test_steps_of_an_answer_that_grows_are_not_judged_before_its_length_is_known():
    options = ["clip.wav", "What?", "--length", "auto", "--rule", "count", "--steps"]
    check_settings(make_parser().parse_args([*options, "16"]))
    with pytest.raises(ValueError, match="5 steps for 6 blocks and 60 tokens"):
        sampler_config(make_parser().parse_args([*options, "5"]), 10, most=60)


def test_an_lm_that_appends_its_blocks_does_not_deliberate():
    lm = DiffusionLM(LMConfig(**{**vars(SMALL), "appends": True}))
    config = SamplerConfig(length=12, block_length=4, deliberate=0.5)
    with pytest.raises(ValueError, match="whole from the start"):
        generate(lm, spliced([9], [5]), config)


def test_appended_blocks_are_the_answers_to_a_prompt_that_grows(small):
    prompt = spliced([9], [0])
    config = SamplerConfig(length=12, block_length=4, steps=6, append=True, stop_at_end=False)
    out = generate(small, prompt, config)
    for start in range(0, 12, 4):
        block = SamplerConfig(length=4, steps=2, stop_at_end=False)
        ids = generate(small, prompt, block).ids  # (1, 4)
        assert torch.equal(out.ids[:, start : start + 4], ids)
        everywhere = torch.ones(1, 9 + start + 4, dtype=torch.bool)
        embeddings = torch.cat([prompt.embeddings, small.embed(ids)], dim=1)
        prompt = Spliced(embeddings=embeddings, mask=everywhere, is_text=everywhere)


def test_an_appended_answer_makes_no_calls_after_its_end(small):
    prompt = spliced([9, 30, 17], [5, 20, 0])
    config = SamplerConfig(length=60, block_length=4, append=True)
    out = generate(small, prompt, config)
    assert (out.text_tokens < 60).any()
    assert torch.equal(out.calls, (out.text_tokens.clamp(max=59) // 4 + 1) * 4)


def test_only_positions_that_wait_are_scored_and_only_rows_that_wait_are_run(small, monkeypatch):
    scored, head = [], small.head
    monkeypatch.setattr(
        small, "head", lambda hidden: (scored.append(tuple(hidden.shape[:2])), head(hidden))[1]
    )
    generate(
        small,
        spliced([9], [5]),
        SamplerConfig(length=12, block_length=4, steps=12, stop_at_end=False),
    )
    assert scored == [(1, 4), (1, 3), (1, 2), (1, 1)] * 3
    scored.clear()
    out = generate(
        small,
        spliced([9, 30, 17, 25], [5, 20, 0, 3]),
        SamplerConfig(length=12, block_length=4, rule="threshold", threshold=0.6),
    )
    assert sum(rows for rows, _ in scored) == out.calls.sum()


def test_a_cache_filled_in_two_parts_gives_the_hidden_states_of_one_pass(small):
    x, mask = torch.randn(2, 20, SMALL.width), torch.arange(20) >= torch.tensor([[0], [6]])
    everywhere, cache = torch.arange(20), small.new_cache(2, 20)
    whole = small(x, mask, cache, everywhere)
    assert torch.allclose(whole[mask], small(x, mask)[mask], atol=1e-5)
    again = small(
        x[:, 12:16], mask, cache, everywhere[12:16], torch.tensor([1, 2])
    )  # all keys are as they were
    assert torch.allclose(again, whole[:, 13:15], atol=1e-5)


@pytest.mark.parametrize("length, block, steps", [(12, 12, 12), (12, 4, 7), (12, 5, 6)])
@pytest.mark.parametrize("sound", [0, 5])
def test_without_a_cache_the_answer_is_the_plain_published_procedures(
    small, length, block, steps, sound
):
    config = SamplerConfig(length=length, block_length=block, steps=steps, stop_at_end=False)
    for seed in range(5):
        prompt = spliced([15], [sound], seed)
        assert torch.equal(
            generate(small, prompt, config).ids, generate_plain(small, prompt, config).ids
        )


# Compiled


@pytest.fixture
def compilations(monkeypatch):
    """How many graphs have been compiled, by a compiler that only counts."""
    graphs = []
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 256
    counting = torch.compile(
        sampler.refine,
        fullgraph=True,
        dynamic=False,
        backend=lambda graph, _: (graphs.append(1), graph.forward)[1],
    )
    monkeypatch.setattr(compiled, "compiled_refine", lambda device: counting)
    return graphs


@pytest.mark.long
@caches
@pytest.mark.parametrize("rule", ["count", "threshold", "factor"])
def test_nothing_is_compiled_again_for_other_lengths_and_numbers(small, compilations, rule, cache):
    config = SamplerConfig(
        length=8,
        block_length=4,
        steps=8,
        rule=rule,
        threshold=1.0,
        factor=1e-3,
        cache=cache,
        compile=True,
        stop_at_end=False,
    )
    generate(small, spliced([20], [9]), config)
    warm = len(compilations)
    assert warm == {"none": 1, "prefix": 3, "dual": 2}[cache]
    for n, number in ((3, 0.9), (64, 0.5), (33, 0.7), (2, 0.3), (47, 0.2)):
        other = with_(
            config,
            steps=round(8 * number) if rule == "count" else 8,
            threshold=number,
            factor=2 * number,
        )
        prompt = spliced([n], [n // 3], n)
        assert torch.equal(
            generate(small, prompt, other).ids,
            generate(small, prompt, with_(other, compile=False)).ids,
        )
    assert len(compilations) == warm


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"remasking": "random"},
        {"cfg_scale": 0.7, "block_length": 5},
        {"append": True},
    ],
    ids=str,
)
def test_chance_guidance_and_a_short_block_are_the_same_in_compiled_shapes(
    small, compilations, settings
):
    config, prompt = (
        SamplerConfig(
            **{
                "length": 8,
                "block_length": 4,
                "steps": 6,
                "cache": "dual",
                "compile": True,
                **settings,
            }
        ),
        spliced([20, 9, 41], [9, 0, 30]),
    )
    compiled, eager = (
        generate(small, prompt, config),
        generate(small, prompt, with_(config, compile=False)),
    )
    assert torch.equal(compiled.ids, eager.ids) and len(compilations) == 2 * len(set(sizes(config)))


@pytest.mark.long
def test_compiled_answers_are_the_eager_ones(small):
    config = SamplerConfig(
        length=8,
        block_length=4,
        steps=8,
        rule="threshold",
        threshold=0.6,
        cache="dual",
        compile=True,
    )
    for seed in range(8):
        prompt = spliced([20 + seed, 9, 41], [9, 0, 30], seed)
        compiled, eager = (
            generate(small, prompt, config),
            generate(small, prompt, with_(config, compile=False)),
        )
        assert torch.equal(compiled.ids, eager.ids) and torch.equal(compiled.calls, eager.calls)


# Each rule


@pytest.mark.parametrize(
    "length, block, steps, blocks, shares",
    [
        (12, 12, 5, [12], [5]),
        (12, 4, 7, [4, 4, 4], [3, 2, 2]),
        (10, 4, 10, [4, 4, 2], [4, 4, 2]),
        (10, 4, 5, [4, 4, 2], [2, 2, 1]),
        (10, 9, 2, [9, 1], [1, 1]),
        (10, 9, 9, [9, 1], [8, 1]),
        (10, 3, 4, [3, 3, 3, 1], [1, 1, 1, 1]),
        (18, 32, 3, [18], [3]),
    ],
)
def test_a_short_last_block_takes_its_share_of_the_steps(length, block, steps, blocks, shares):
    config = SamplerConfig(length=length, block_length=block, steps=steps)
    assert sizes(config) == blocks and [n for _, n in blocks_of(config)] == shares


def test_every_block_gets_from_one_step_to_one_a_token_and_they_add_up():
    for length in range(1, 15):
        for block in range(1, length + 1):
            for steps in range(-(-length // block), length + 1):
                config = SamplerConfig(length=length, block_length=block, steps=steps)
                shares = [n for _, n in blocks_of(config)]
                assert sum(sizes(config)) == length and sum(shares) == steps
                assert all(1 <= n <= size for n, size in zip(shares, sizes(config), strict=True))


@pytest.mark.parametrize(
    "length, block, steps",
    [(12, 12, 12), (12, 12, 5), (12, 4, 7), (12, 5, 7), (12, 4, 3), (1, 1, 1)],
)
def test_the_count_rule_makes_as_many_calls_as_steps(toy, length, block, steps):
    assert (
        generate(
            toy.lm,
            text(toy, "What?", "Why is that?"),
            SamplerConfig(length=length, block_length=block, steps=steps),
        ).calls.tolist()
        == [steps] * 2
    )


def test_threshold_1_commits_one_a_call(toy):
    assert (
        generate(
            toy.lm,
            text(toy, "What?"),
            SamplerConfig(length=12, block_length=6, rule="threshold", threshold=1.0),
        ).calls.item()
        == 12
    )


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_fast_dllm_s_second_call_in_a_full_block_is_made_only_where_it_is_asked_for(small, cache):
    config = SamplerConfig(
        length=12, block_length=5, rule="threshold", threshold=1e-9, cache=cache, stop_at_end=False
    )
    once, twice = (
        generate(small, spliced([9, 30], [5, 20]), with_(config, second_call=second))
        for second in (False, True)
    )
    assert once.calls.tolist() == [3, 3] and twice.calls.tolist() == [6, 6]
    assert torch.equal(once.ids, twice.ids)


def test_a_low_threshold_commits_a_block_a_call(toy):
    assert (
        generate(
            toy.lm,
            text(toy, "What?"),
            SamplerConfig(length=12, block_length=6, rule="threshold", threshold=1e-9),
        ).calls.item()
        == 2
    )


CONFIDENCE = torch.tensor([[0.3, 0.95, 0.6, 0.9, 0.99]])


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({"threshold": 0.5, "rule": "threshold"}, [1, 2, 3]),
        ({"threshold": 0.96, "rule": "threshold"}, [1]),  # none passes: the best of the masked
        (
            {"factor": 0.5, "rule": "factor"},
            [1, 3],
        ),  # 0.95 >= 1 - 0.5/2, 0.9 >= 1 - 0.5/3, 0.6 < 1 - 0.5/4
        ({"factor": 0.25, "rule": "factor"}, [1]),  # 0.9 < 1 - 0.25/3
        ({"factor": 0.01, "rule": "factor"}, [1]),
        ({"rule": "count"}, [1, 3]),
    ],
)
def test_what_each_rule_commits(settings, kept):
    masked = torch.tensor([[True, True, True, True, False]])  # the best is not masked
    rule = settings["rule"]
    keep = commit(CONFIDENCE, masked, rule, torch.tensor(settings.get(rule, 2.0)))
    assert keep[0].nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("delta", [0.0, 0.25, 0.9])
def test_the_frechet_rule_commits_the_longest_prefix_within_its_bound(delta):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        confidence = 1 - torch.rand(1, 8, generator=generator) ** 4
        masked = torch.rand(1, 8, generator=generator) < 0.8
        keep = commit(confidence, masked, "frechet", torch.tensor(delta))
        order = sorted((i for i in range(8) if masked[0, i]), key=lambda i: -confidence[0, i])
        n = len(order)
        values = [float(confidence[0, i]) for i in order]
        while n > 1 and sum(values[:n]) - (n - 1) - (1 - values[n - 1]) <= delta:
            n -= 1
        assert keep[0].nonzero().flatten().tolist() == sorted(order[:n])


def test_at_equal_confidences_the_frechet_rule_is_the_factor_rule():
    masked = torch.ones(1, 12, dtype=torch.bool)
    sizes = set()
    for confidence in torch.linspace(0.31, 0.99, 24):
        row = confidence.expand(1, 12)
        frechet = commit(row, masked, "frechet", torch.tensor(0.25))
        assert torch.equal(frechet, commit(row, masked, "factor", torch.tensor(0.75)))
        sizes.add(int(frechet.sum()))
    assert len(sizes) > 5


def test_a_confidence_equal_to_the_threshold_is_not_enough():
    keep = commit(
        torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), "threshold", torch.tensor(1.0)
    )
    assert keep.tolist() == [[True, False, False]]


def test_confidence_is_the_softmax_probability():
    logits = torch.randn(1, 4, 9) * 3
    chosen = logits.double().softmax(dim=-1)[..., 1:].max(dim=-1)
    tokens, confidence = propose(logits, 0)
    assert torch.equal(tokens, chosen.indices + 1)
    assert torch.allclose(confidence, chosen.values)


def test_doubts_far_below_the_precision_of_float32_keep_their_order():
    torch.manual_seed(0)
    logits = torch.randn(8, 32, 50)
    logits[..., 7] = 22 + 3 * torch.randn(8, 32)
    expected = logits.double().softmax(dim=-1)[..., 7]
    assert (1 - expected).median() < 6e-8  # the step of float32 below 1
    tokens, confidence = propose(logits, 0)
    assert (tokens == 7).all()
    assert torch.equal(confidence.argsort(dim=1), expected.argsort(dim=1))


def test_a_confident_lm_gives_the_published_answers_by_count():
    torch.manual_seed(0)
    lm = DiffusionLM(SMALL)
    differing = set()
    for _ in range(40):
        # A tenth of the proposals is within 1e-10 of certain.
        lm.unembedding.weight.data.normal_(std=6)
        real = torch.ones(1, 10, dtype=torch.bool)
        prompt = Spliced(embeddings=torch.randn(1, 10, 16), mask=real, is_text=real)
        config = SamplerConfig(length=24, block_length=24, steps=6, stop_at_end=False)
        published = generate_plain(lm, prompt, config)
        assert generate(lm, prompt, config).ids.tolist() == published.ids.tolist()
        differing.add(tuple(published.ids[0].tolist()))
    assert len(differing) > 30


def test_gumbel_noise_draws_from_the_softmax(monkeypatch):
    lm = DiffusionLM(
        LMConfig(
            width=4, n_layers=1, n_heads=1, ffn=4, vocab=5, max_length=2000, mask_id=3, end_id=4
        )
    )
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf])
    monkeypatch.setattr(lm, "head", lambda hidden: logits.expand(*hidden.shape[:2], 5).clone())
    real = torch.ones(20, 1, dtype=torch.bool)
    prompt = Spliced(
        embeddings=torch.randn(20, 1, 4), mask=real, is_text=real
    )  # unlike prompts draw unlike numbers
    drawn = generate(
        lm, prompt, SamplerConfig(length=1000, block_length=1000, steps=1, temperature=1.0)
    ).ids
    shares_drawn = drawn.flatten().bincount(minlength=5)[:3] / 20_000
    assert torch.allclose(shares_drawn, logits[:3].softmax(0), atol=0.015)


@pytest.mark.parametrize(
    "total, parts, expected", [(7, 3, [3, 2, 2]), (6, 3, [2, 2, 2]), (2, 3, [1, 1, 0])]
)
def test_parts_are_even_with_the_remainder_first(total, parts, expected):
    assert split_evenly(total, parts) == expected


# Chance and guidance


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"remasking": "random"}], ids=str)
def test_chance_repeats_by_seed_and_differs_between_seeds(toy, settings):
    prompt = text(toy, "What?", "Why is that?")
    first, again, other = (
        traced(toy.lm, prompt, SamplerConfig(length=12, seed=seed, **settings))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first[0].ids, again[0].ids)
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(first[1], other[1]))


def test_the_sampler_leaves_the_global_dice_alone(toy):
    prompt, state = text(toy, "What?"), torch.get_rng_state()
    generate(
        toy.lm,
        prompt,
        SamplerConfig(length=12, block_length=12, steps=12, temperature=1.0, remasking="random"),
    )
    assert torch.equal(torch.get_rng_state(), state)


@caches
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"remasking": "random"},
        {"temperature": 0.5, "remasking": "random", "rule": "threshold", "threshold": 0.6},
    ],
    ids=str,
)
def test_by_chance_too_an_item_gets_the_answer_it_gets_alone_in_any_batch(small, cache, settings):
    config = SamplerConfig(
        **{"length": 12, "block_length": 5, "steps": 8, "cache": cache, "seed": 3, **settings}
    )
    lengths, sounds = [9, 30, 17, 25, 40], [5, 20, 0, 3, 8]
    prompt = spliced(lengths, sounds)
    alone = [generate(small, one(prompt, i), config) for i in range(5)]
    assert len({tuple(out.ids[0].tolist()) for out in alone}) >= 3
    for rows in ([4, 1], [2, 0, 3], [0, 1, 2, 3, 4]):
        together = generate(
            small,
            Spliced(
                embeddings=prompt.embeddings[rows],
                mask=prompt.mask[rows],
                is_text=prompt.is_text[rows],
            ),
            config,
        )
        assert together.ids.tolist() == [alone[i].ids[0].tolist() for i in rows]
        assert together.calls.tolist() == [alone[i].calls.item() for i in rows]


def test_random_remasking_reports_the_confidence_of_the_model(toy):
    config = SamplerConfig(length=4, steps=1)
    (_, plain), (_, random) = (
        traced(toy.lm, text(toy, "What?"), with_(config, remasking=remasking))[1][0]
        for remasking in ("low_confidence", "random")
    )
    assert torch.equal(plain, random)


# Numbers that are not finite


@pytest.mark.parametrize("number", [NAN, INF])
@pytest.mark.parametrize("column", [slice(None), 3, SMALL.mask_id], ids=str)
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_logits_that_are_not_finite_stop_the_sampler_with_what_to_do(
    small, monkeypatch, number, column, remasking
):
    def damaged(hidden):
        logits = hidden @ small.unembedding.weight.T
        logits[:, -1, column] = number
        return logits

    monkeypatch.setattr(small, "head", damaged)
    config = SamplerConfig(length=12, block_length=4, remasking=remasking, stop_at_end=False)
    with pytest.raises(
        ValueError,
        match="NaN or infinite in torch.float32. Use --dtype float32 or bfloat16.*damaged",
    ):
        generate(small, spliced([9, 30], [5, 20]), config)
    with pytest.raises(ValueError, match="damaged"):
        generate_plain(small, spliced([9], [5]), config)


def test_weights_that_overflow_float16_stop_the_sampler_and_run_in_bfloat16(small):
    lm = DiffusionLM(SMALL).eval().requires_grad_(False)
    lm.load_state_dict(small.state_dict())
    lm.blocks[0].mlp.up.weight.mul_(2000)
    lm.blocks[0].mlp.gate.weight.mul_(2000)
    prompt = spliced([9], [5])
    with pytest.raises(ValueError, match="torch.float16"):
        generate(
            lm.half(),
            Spliced(embeddings=prompt.embeddings.half(), mask=prompt.mask, is_text=prompt.is_text),
            SamplerConfig(length=4),
        )
    lm.float().load_state_dict(small.state_dict())
    lm.bfloat16()
    assert (
        generate(
            lm,
            Spliced(
                embeddings=prompt.embeddings.bfloat16(), mask=prompt.mask, is_text=prompt.is_text
            ),
            SamplerConfig(length=4),
        ).calls.item()
        <= 4
    )


def test_guidance_0_is_one_plain_pass_and_more_changes_the_answer(toy, monkeypatch):
    prompt, batches, forward = text(toy, "What is said?"), [], toy.lm.forward
    monkeypatch.setattr(
        toy.lm, "forward", lambda x, *rest: (batches.append(len(x)), forward(x, *rest))[1]
    )
    plain, zero, more = (
        generate(toy.lm, prompt, SamplerConfig(length=12, block_length=12, steps=12, **s))
        for s in ({}, {"cfg_scale": 0.0}, {"cfg_scale": 3.0})
    )
    assert torch.equal(plain.ids, zero.ids) and not torch.equal(plain.ids, more.ids)
    assert batches == [1] * 24 + [2] * 12


def test_guidance_leads_away_from_the_answer_without_the_question(toy):
    prompt = text(toy, "What is said?")
    blind = Spliced(
        embeddings=toy.lm.embed(torch.tensor(toy.lm.config.mask_id)).expand_as(prompt.embeddings),
        mask=prompt.mask,
        is_text=prompt.is_text,
    )
    unmoved = [
        generate(
            toy.lm, blind, SamplerConfig(length=12, block_length=12, steps=12, cfg_scale=scale)
        ).ids
        for scale in (0.0, 3.0)
    ]
    assert torch.equal(*unmoved)  # a question of masks has nothing to lead from


def test_guidance_blanks_the_text_but_not_the_sound(toy, monkeypatch):
    prompt, seen, forward = heard(toy, [torch.ones(9000)], ["What?"]), [], toy.lm.forward
    monkeypatch.setattr(toy.lm, "forward", lambda x, *rest: (seen.append(x), forward(x, *rest))[1])
    generate(toy.lm, prompt, SamplerConfig(length=1, block_length=1, steps=1, cfg_scale=1.0))
    conditional, unconditional = seen[0][:, :-1]
    changed = (conditional != unconditional).any(dim=-1)
    assert torch.equal(changed, prompt.is_text[0]) and not changed.all()


# Settings that cannot work


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"length": 12, "block_length": 4, "steps": 2}, "use 3 to 12"),
        ({"length": 12, "block_length": 4, "steps": 13}, "use 3 to 12"),
        ({"length": 12, "block_length": 5, "steps": 2}, "use 3 to 12"),
        ({"length": 12, "steps": -5}, "-5 steps .* use 1 to 12"),
        ({"length": 12, "steps": 0, "rule": "threshold"}, "use 1 to 12"),
        ({"length": 12, "steps": NAN}, "use 1 to 12"),
        ({"block_length": 0}, "block_length 0 is outside 1 to"),
        ({"block_length": NAN}, "block_length nan is outside 1 to"),
        ({"length": 0}, "length 0 is outside 1 to"),
        ({"length": NAN}, "length nan is outside 1 to"),
        *(({"threshold": n}, f"threshold {n} is outside") for n in (0.0, 1.1, -1.0, NAN, -INF)),
        *(({"factor": n}, f"factor {n} is outside") for n in (0.0, -1.0, NAN, INF)),
        *(({"temperature": n}, "is outside 0 to 100") for n in (-1.0, NAN, INF, 1e300)),
        *(({"cfg_scale": n}, "is outside 0 to 100") for n in (-1.0, NAN, INF, 1e39)),
        *(({"seed": n}, "seed .* is outside 0 to 18446744073709551615") for n in (-1, 2**64)),
        ({"rule": "magic"}, "count, threshold, factor, frechet"),
        ({"refresh": 0, "cache": "dual"}, "refresh 0 is outside"),
        ({"refresh": 2}, "does nothing without a cache"),
        *(({"deliberate": n}, f"deliberate {n} is outside 0 to 1") for n in (-0.1, 1.1, NAN)),
        ({"deliberate": 0.9, "append": True}, "whole from the start"),
        ({"deliberate": 0.9, "second_call": True}, "whole from the start"),
        ({"remasking": "magic"}, "low_confidence, random"),
        ({"cache": "magic"}, "none, prefix, dual"),
    ],
)
def test_impossible_settings_are_refused_with_what_would_work(settings, said):
    with pytest.raises(ValueError, match=said):
        SamplerConfig(**settings)


def test_a_prompt_too_long_is_refused_with_the_longest_answer_possible(toy):
    prompt = text(toy, "two red birds sing " * 9)
    room = toy.lm.config.max_length - prompt.embeddings.shape[1]
    assert 0 < room < 200
    with pytest.raises(ValueError, match=f"at most {room}"):
        generate(toy.lm, prompt, SamplerConfig(length=room + 1, block_length=1, steps=room + 1))
    assert generate(
        toy.lm, prompt, SamplerConfig(length=room, block_length=room, steps=1)
    ).ids.shape == (1, room)


@pytest.mark.parametrize("n, sounds", [(0, 0), (4, 4)])
def test_guidance_without_text_to_lead_from_is_refused(small, n, sounds):
    mask = torch.ones(1, n, dtype=torch.bool)
    prompt = Spliced(
        embeddings=torch.zeros(1, n, SMALL.width),
        mask=mask,
        is_text=mask & (torch.arange(n) >= sounds),
    )
    with pytest.raises(ValueError, match="use cfg_scale 0"):
        generate(small, prompt, SamplerConfig(length=4, block_length=4, steps=4, cfg_scale=1.0))
    assert generate(small, prompt, SamplerConfig(length=4, block_length=4, steps=4)).ids.shape == (
        1,
        4,
    )


# Questions about clips


def test_answers_come_in_order_whatever_the_batches(toy):
    torch.manual_seed(4)
    clips = [torch.randn(n) for n in (12_800, 3000, 7100)]
    prompts = [
        build_prompt(toy.tokenizer, line)
        for line in ("What is said?", "Why?", "Repeat what is said.")
    ]
    config = SamplerConfig(length=12, rule="threshold", threshold=0.3)

    def audio(rows):
        return hear_clips(toy, clips[rows], ["clip"] * len(clips[rows]))

    alone, pairs, together = (
        list(answer(toy.lm, toy.tokenizer, prompts, audio, config, batch=n)) for n in (1, 2, 16)
    )
    assert alone == pairs == together and len(alone) == 3
    out = generate(toy.lm, splice(toy.lm, prompts, *audio(slice(0, 3))), config)
    assert [a.ids for a in alone] == out.ids.tolist() and [
        a.calls for a in alone
    ] == out.calls.tolist()
    assert [a.text for a in alone] == [
        decode_answer(toy.tokenizer, ids) for ids in out.ids.tolist()
    ]


def test_prompts_of_text_alone_are_answered_too(toy):
    prompts = [build_text_prompt(toy.tokenizer, line) for line in ("two red birds", "sing")]
    config = SamplerConfig(length=6)
    out = list(answer(toy.lm, toy.tokenizer, prompts, None, config))
    ids = torch.tensor(prompts[1].before)[None]
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    alone = generate(
        toy.lm, Spliced(embeddings=toy.lm.embed(ids), mask=everywhere, is_text=everywhere), config
    )
    assert len(out) == 2 and out[1].ids == alone.ids[0].tolist()


def test_block_length_and_steps_follow_the_length():
    config = SamplerConfig(length=12)
    assert (config.block_length, config.steps) == (12, 12)


# The command


@pytest.fixture
def command(toy, toy_dirs, tmp_path, monkeypatch):
    """command(clip, *options) runs sampler.py on the toy."""
    save_trained(toy, tmp_path / "adapters", whisper=toy_dirs["whisper"], llm=toy_dirs["llm"])
    places = [
        "--whisper",
        toy_dirs["whisper"],
        "--llm",
        toy_dirs["llm"],
        "--adapters",
        tmp_path / "adapters",
        "--device",
        "cpu",
    ]

    def run(clip, *options):
        monkeypatch.setattr(
            sys, "argv", list(map(str, ["sampler.py", clip, "What is said?", *places, *options]))
        )
        sampler.main()

    return run


def test_the_command_prints_the_answer(toy, command, tone, tmp_path, capsys):
    clip = tone(rate=44_100, channels=2)
    command(clip, "--length", 8, "--trace", tmp_path / "t.html")
    out = generate(
        toy.lm,
        heard(toy, [read_audio(clip)], ["What is said?"]),
        SamplerConfig(length=8, block_length=8, steps=8, rule="threshold"),
    )
    printed = capsys.readouterr()
    assert (
        printed.out == decode_answer(toy.tokenizer, out.ids[0].tolist()) + "\n"
    )  # once: $(...) reads it
    assert len(printed.err.splitlines()) == out.calls.item() + 1 and "_ _" in printed.err
    assert f"{out.calls.item()} model calls for 8 positions" in printed.err
    assert (tmp_path / "t.html").read_text().count("<section>") == out.calls.item()


def test_an_answer_of_length_auto_grows_by_blocks_until_it_ends(
    toy, command, tone, tmp_path, monkeypatch, capsys
):
    # An LM that fills a block of 4 a call, and says the end at the 7th position of an answer.
    said = [[65, 66, 67, 68], [69, 70, toy.lm.config.end_id, 71]]

    def confident(lm, hidden):
        return torch.nn.functional.one_hot(torch.tensor([said.pop(0)]), lm.config.vocab) * 50.0

    monkeypatch.setattr(DiffusionLM, "head", confident)
    command(tone(), "--length", "auto", "--block-length", 4, "--trace", tmp_path / "t.html")
    printed = capsys.readouterr().err
    assert "2 model calls for 8 positions, 6 of them text" in printed and not said


def test_the_command_can_run_the_adapters_as_another_stage(command, tone, monkeypatch):
    stages = []
    monkeypatch.setattr(
        DIFFA,
        "hear",
        lambda self, *heard, real=DIFFA.hear: stages.append(self.stage) or real(self, *heard),
    )
    for options in ((), ("--stage", "semantic")):
        command(tone(), "--length", 4, *options)
    assert stages == ["stage2", "semantic"]


def test_a_stage_whose_parts_are_missing_does_not_run_on_random_weights(command, tone):
    with pytest.raises(SystemExit, match="lacks prompts of stage1; train that stage first"):
        command(tone(), "--length", 4, "--stage", "stage1")


def test_the_command_hears_a_long_clip_only_with_cut(command, tone, capsys):
    clip = tone(seconds=1.0)
    with pytest.raises(SystemExit, match="--cut"):
        command(clip, "--length", 4)
    command(clip, "--length", 4, "--cut")
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    "options, said",
    [
        ((), "nowhere.wav: no such audio file"),
        (("--length", 12, "--rule", "count", "--steps", 0), "use 1 to 12"),
        (("--rule", "count", "--steps", -5), "-5 steps"),
        (("--block-length", 0), "block_length 0 is outside 1 to"),
        (("--temperature", "nan"), "temperature nan is outside 0 to 100"),
        (("--seed", 2**64), "seed 18446744073709551616 is outside"),
        (("--threshold", 2), "outside 1e-09 to 1"),
        (("--steps", 4), "--steps does nothing under --rule threshold; add --rule count"),
        (("--factor", 1, "--rule", "count"), "--factor does nothing under --rule count"),
        (("--refresh", 2), "refresh 2 does nothing without a cache"),
        (("--length", "auto", "--block-length", 0), "block_length 0 is outside 1 to"),
    ],
)
def test_the_command_fails_in_one_line(command, tmp_path, options, said):
    with pytest.raises(SystemExit) as stop:
        command(tmp_path / "nowhere.wav", *options)
    assert stop.value.code.startswith("sampler.py: ") and said in stop.value.code
    assert "\n" not in stop.value.code


def test_the_command_names_weights_that_are_missing(command, tone, tmp_path):
    with pytest.raises(SystemExit, match="sampler.py: .*nothing: no such directory"):
        command(tone(), "--llm", tmp_path / "nothing")
    with pytest.raises(SystemExit, match="sampler.py: .*nothing"):
        command(tone(), "--adapters", tmp_path / "nothing")


@pytest.mark.parametrize(
    "options, trained, length", [((), 6, 6), (("--length", 5), 6, 5), ((), None, 24)]
)
def test_an_answer_is_as_long_as_in_training(
    command, tone, monkeypatch, capsys, options, trained, length
):
    load = DIFFA.from_pretrained

    def loaded(*given, **settings):
        model = load(*given, **settings)
        model.answer_length = trained
        return model

    monkeypatch.setattr(DIFFA, "from_pretrained", loaded)
    command(tone(), *options)
    said = capsys.readouterr().err
    assert f"calls for {length} positions" in said
    assert ("do not record the length of their answers: --length 24" in said) == (length == 24)


@pytest.mark.parametrize(
    "name, said",
    [
        ("gone/t.html", "no folder .*gone; make it first"),
        ("", "no file but a folder"),
        ("tone.wav/t.html", "no folder"),
    ],
)
def test_a_trace_that_cannot_be_written_is_refused_before_weights_are_read(
    command, tone, tmp_path, name, said
):
    with pytest.raises(SystemExit, match=f"sampler.py: {tmp_path}.*: cannot be saved .*{said}"):
        command(tone(), "--trace", tmp_path / name, "--llm", tmp_path / "nothing")


def test_ctrl_c_ends_the_command_with_130_and_a_line(command, tone, monkeypatch, capsys):
    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(DiffusionLM, "forward", stop)
    with pytest.raises(SystemExit) as stopped:
        command(tone(), "--length", 4)
    assert stopped.value.code == 130 and "sampler.py: stopped" in capsys.readouterr().err


@pytest.mark.long
def test_a_reader_that_is_gone_ends_a_command_quietly():
    code = (
        "from checkpoints.command_line import one_line_errors\nwith one_line_errors('x.py'):\n"
        "  for n in range(99999): print(n)"
    )
    ran = subprocess.run(
        f'{sys.executable} -c "{code}" | head -1; exit ${{PIPESTATUS[0]}}',
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("0\n", "", 141)


def test_a_character_of_several_tokens_is_shown_whole_once_all_are_there(toy):
    config, tokenizer = toy.lm.config, toy.tokenizer
    ids = tokenizer.encode("two 鳥 é")
    texts = token_texts(tokenizer, [*ids, config.end_id], config.mask_id, config.end_id)
    assert "".join(texts) == "two 鳥 é" and len(texts) == len(ids) + 1
    for n in range(len(ids)):  # from the left, and with a hole in the middle
        hole = [i if k != n else config.mask_id for k, i in enumerate(ids)]
        for some in (ids[: n + 1], hole):
            shown = token_texts(tokenizer, some, config.mask_id, config.end_id)
            assert len(shown) == len(some) and "\N{REPLACEMENT CHARACTER}" not in "".join(shown)


@pytest.mark.parametrize(
    "texts, columns, shown",
    [
        (["two", " red", "_", "_", " sing"], 80, "two red _ _ sing"),
        (["two", " red", "_", "_", " sing"], 12, " red _ _ si"),
        (["a" * 50, "_"], 12, "aaaa _"),  # where it changes can be seen
        (["鳥鳥鳥鳥", "_"], 8, "鳥鳥 _"),
        (["鳥鳥鳥鳥"], 8, "鳥鳥鳥"),
        (["e\u0301" * 9], 6, "e\u0301" * 5),
        (["two\r\n", "\x1b[2Jred"], 80, "two [2Jred"),
        (["_"] * 60, 80, " ".join("_" * 40)[:79]),
    ],
)
def test_a_line_fits_the_terminal(texts, columns, shown):
    assert one_line(texts, columns) == shown
