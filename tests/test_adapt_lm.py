"""A causal LM becomes a masked-diffusion LM, and text comes first."""

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from checkpoints.lm import load_lm
from checkpoints.tokenizer import load_tokenizer
from corpora import texts
from corpora.texts import is_held_out, make_texts, sentences
from data import TRANSCRIBE
from training import adapt_lm
from training.adapt_lm import Adaptation, choose_mask, load_causal, main
from training.exam import PLAIN_TOKENS, WINDOW, Exam
from training.flops import Work
from training.imitation import blurred_embeddings
from training.perplexity import pseudo_perplexity
from training.questions import QUESTIONS, VALUES, draw_attributes, draw_question, plain_words
from training.text_rows import Mixture, TextRows

LINES = [f"The {a} {b} sleeps here ." for a in ("old", "red", "big") for b in ("cat", "dog", "owl")]
MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unused>", "<other>"]


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> Path:
    """A tiny causal LM in the hub's layout of SmolLM2: bytes, chat markers, two spare tokens."""
    path = tmp_path_factory.mktemp("causal")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i + len(MARKERS) for i, letter in enumerate(letters)}
    bpe = tokenizers.models.BPE({m: i for i, m in enumerate(MARKERS)} | vocabulary, [])
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(marker, special=True, normalized=False) for marker in MARKERS]
    )
    tokenizer.save(str(path / "tokenizer.json"))

    config = {
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 24, "vocab_size": 261,
        "max_position_embeddings": 512, "rope_theta": 1e4, "rms_norm_eps": 1e-5, "eos_token_id": 2,
        "tie_word_embeddings": True, "hidden_act": "silu",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed_tokens": (261, 16), "norm": (16,)}
    for name, shape in {
        "input_layernorm": (16,), "post_attention_layernorm": (16,), "self_attn.q_proj": (16, 16),
        "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16), "self_attn.o_proj": (16, 16),
        "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
    }.items():  # fmt: skip
        shapes[f"layers.0.{name}"] = shape
    tensors = {
        f"model.{name}.weight": torch.randn(shape, generator=generator).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def adapt(causal: Path, tmp_path: Path, steps: int, *more: str) -> Path:
    text = tmp_path / "train.txt"
    text.write_text("\n".join(LINES))
    options = f"--out {tmp_path / 'lm'} --batch 4 --answer-length 40 --device cpu --dtype float32"
    options += f" --workers 0 --steps {steps} --validate-every 0 --save-every 2"
    main(["--lm", str(causal), "--text", str(text), *options.split(), *more])
    return tmp_path / "lm"


def test_an_adapted_lm_loads_as_a_diffusion_lm_and_keeps_its_table(causal, tmp_path):
    out = adapt(causal, tmp_path, 3, "--validation", str(tmp_path / "train.txt"))
    lm = load_lm(out)
    before = load_lm(causal, causal_weights=True)
    assert load_tokenizer(out, lm.config).id("<other>") == lm.config.mask_id
    others = torch.arange(261) != lm.config.mask_id
    assert torch.equal(lm.embedding.weight[others], before.embedding.weight[others])
    assert not torch.equal(lm.blocks[0].mlp.up.weight, before.blocks[0].mlp.up.weight)
    assert lm.embedding.weight.dtype == torch.bfloat16

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    exam = next(r["validation"] for r in records if "validation" in r)
    assert exam["loss"] > 0 and set(VALUES) < set(exam) and exam["copy_error"] > 0

    # The weights are saved in bfloat16, and were float32 in the exam.
    ids = load_tokenizer(out, lm.config).encode_text("\n".join(LINES))[:PLAIN_TOKENS]
    found = pseudo_perplexity(lm.float(), ids, window=WINDOW)
    assert exam["pseudo_perplexity"] == pytest.approx(found, rel=0.02)


def test_a_stopped_adaptation_resumes_to_the_same_weights(causal, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = adapt(causal, tmp_path / "a", 4)
    monkeypatch.setattr(adapt_lm, "TRAIN", replace(adapt_lm.TRAIN, keep=2))
    resumed = adapt(causal, tmp_path / "b", 4)
    (last,) = resumed.glob("checkpoint-*4.pt")
    last.unlink()  # as if it had been killed after step 2
    (first,) = resumed.glob("checkpoint-*2.pt")
    was = first.stat().st_mtime_ns
    adapt(causal, tmp_path / "b", 4)
    assert first.stat().st_mtime_ns == was  # step 2 is not trained again
    for mine, other in zip(load_lm(whole).parameters(), load_lm(resumed).parameters()):
        assert torch.equal(mine, other)


def test_an_adaptation_does_not_resume_with_another_mask_or_tokenizer(causal, tmp_path):
    source = tmp_path / "causal"
    shutil.copytree(causal, source)
    adapt(source, tmp_path, 2)
    with pytest.raises(SystemExit, match="mask_id"):
        adapt(source, tmp_path, 2, "--mask", "<unused>")

    # The ids of two letters change places.
    file = source / "tokenizer.json"
    known = json.loads(file.read_text())
    vocabulary = known["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(known))
    with pytest.raises(SystemExit, match="tokenizer"):
        adapt(source, tmp_path, 2)


def test_no_other_lm_is_overwritten(causal, tmp_path):
    shutil.copytree(causal, tmp_path / "lm")
    before = {file.name: file.read_bytes() for file in (tmp_path / "lm").iterdir()}
    with pytest.raises(SystemExit, match="holds a model, whose config.json would be overwritten"):
        adapt(causal, tmp_path, 1)
    assert {file.name: file.read_bytes() for file in (tmp_path / "lm").iterdir()} == before


def test_a_source_that_is_no_lm_is_named(causal, tmp_path):
    with pytest.raises(SystemExit, match="no such directory"):
        adapt(tmp_path / "absent", tmp_path, 1)
    shutil.copytree(causal, tmp_path / "source")
    (tmp_path / "source/tokenizer.json").unlink()
    with pytest.raises(SystemExit, match="source: holds no tokenizer.json"):
        adapt(tmp_path / "source", tmp_path, 1)


def test_prompts_fit_the_context_of_the_lm(causal):
    lm, tokenizer, _ = load_causal(causal, None, "cpu")
    lines = ["the cat", "the big old red cat sleeps here"]
    mixture = Mixture(batch=8, answer_length=60)
    wide = TextRows(tokenizer, lines, mixture, lm.config, 0)
    longest = [wide[step]["ids"].shape[1] for step in range(3)]
    config = replace(lm.config, max_length=max(longest) - 10 + 60)
    rows = TextRows(tokenizer, lines, mixture, config, 0)
    assert all(rows[step]["ids"].shape[1] <= max(longest) - 10 for step in range(8))
    with pytest.raises(ValueError, match="no prompt of 4 positions .* shorter sentences"):
        TextRows(tokenizer, lines, mixture, replace(config, max_length=64), 0)[0]


def test_sentences_that_do_not_fit_are_not_examined(causal):
    lm, tokenizer, _ = load_causal(causal, None, "cpu")
    lines = ["the cat", "the big old red cat sleeps here all the day long"]
    rows = TextRows(tokenizer, lines, Mixture(batch=8, answer_length=20), lm.config, 0)
    exam = Exam(SimpleNamespace(lm=lm, device=torch.device("cpu")), rows, n=1)
    assert [item.answer for item in exam.items("transcribe", False)] == ["the cat"]

    # Nor are prompts that do not fit the context.
    rows.room = 10
    with pytest.raises(ValueError, match="no question of kind transcribe fits the LM's context"):
        exam.items("transcribe", False)
    rows.lines = lines[1:]
    with pytest.raises(ValueError, match="no sentence of the validation fits an answer of 20"):
        Exam(SimpleNamespace(lm=lm, device=torch.device("cpu")), rows, n=1)


def test_a_perplexity_beyond_all_floats_is_infinite(causal):
    lm, _, _ = load_causal(causal, None, "cpu")
    lm.norm.weight.data.fill_(1e4)
    assert pseudo_perplexity(lm, [9, 10, 11]) == math.inf


@pytest.mark.parametrize(
    "text, options, problem",
    [
        ("\n".join(LINES), ["--answer-length", "2"], "0 of .* sentences fit an answer of 2 tokens"),
        ("日本語です", [], "no line holds a word in English letters"),
    ],
)
def test_texts_that_give_no_rows_are_an_error_and_no_endless_search(
    causal, tmp_path, text, options, problem
):
    file = tmp_path / "text.txt"
    file.write_text(text, "utf-8")
    places = ["--lm", str(causal), "--text", str(file), "--out", str(tmp_path / "lm")]
    few = ["--device", "cpu", "--steps", "1", "--validate-every", "0", "--workers", "0"]
    with pytest.raises(SystemExit, match=f"python -m training.adapt_lm: .*{problem}"):
        main([*places, *few, *options])


def test_a_batch_in_parts_has_the_same_loss_and_computes_less_padding(causal):
    lm, tokenizer, _ = load_causal(causal, None, "cpu")
    lines = [line * n for n, line in enumerate(LINES, 1)]
    rows = TextRows(tokenizer, lines, Mixture(batch=8, answer_length=300), lm.config, 0)

    def computed(accumulate: int) -> tuple[float, int]:
        options = {"lm": lm, "tokenizer": tokenizer, "autocast": False, "accumulate": accumulate}
        adaptation = Adaptation(work=Work(peak=1.0), **options)
        losses = list(adaptation.losses(rows[0], torch.Generator().manual_seed(1)))
        assert len(losses) == accumulate
        return sum(losses).item(), adaptation.work.tokens

    whole, positions = computed(1)
    in_parts, fewer = computed(4)
    assert in_parts == pytest.approx(whole, rel=1e-5)
    assert fewer < positions


def test_the_mask_is_a_free_token_or_an_error(causal):
    assert choose_mask(causal, None) == 4 and choose_mask(causal, "<unused>") == 3
    for taken in ("<|im_end|>", "<absent>"):
        with pytest.raises(ValueError, match="is free; free added tokens are: <unused>, <other>"):
            choose_mask(causal, taken)


@pytest.fixture(scope="module")
def rows(causal):
    lm, tokenizer, _ = load_causal(causal, None, "cpu")
    return lm, TextRows(tokenizer, LINES, Mixture(batch=8, answer_length=80), lm.config, 0)


def test_rows_follow_from_the_step_and_take_turns(rows):
    lm, rows = rows
    for step in range(4):
        first, again = rows[step], rows[step]
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert bool(first["is_plain"]) == (step == 3)
    assert rows[3]["ids"].shape == (16, 1) and not torch.equal(rows[0]["ids"], rows[1]["ids"])


def test_imitated_audio_spells_the_words_in_order(rows):
    _, rows = rows
    rng = random.Random(0)
    for _ in range(20):
        ids = rows.stretched("the old cat", rng)
        heard = [i for i, before in zip(ids, [None, *ids]) if i != before and i != rows.gap_id]
        assert rows.tokenizer.decode(rows.once("the old cat")) == "the old cat"
        assert set(rows.once("the old cat")) == set(heard)


def test_parts_that_do_not_divide_the_batch_are_refused(causal, tmp_path):
    with pytest.raises(SystemExit, match="--batch 4 does not divide into 3 parts"):
        adapt(causal, tmp_path, 1, "--accumulate", "3")


def test_each_length_of_sentence_is_drawn_as_often(rows):
    lm, rows = rows
    lines = ["old cats"] * 99 + ["the big old red cat sleeps"]
    mixed = TextRows(rows.tokenizer, lines, rows.mixture, lm.config, seed=0)
    rng = random.Random(0)
    answers = [mixed.fitting(mixed.plain, rng).answer for _ in range(200)]
    assert 60 < answers.count(lines[-1]) < 140  # 2 of them, if each line were drawn as often


def test_every_question_has_its_answer():
    rng = random.Random(0)
    attributes = {"gender": "woman", "speed": "fast", "pitch": "low"}
    answers = {
        kind: draw_question(kind, "open the door", attributes, "never", rng) for kind in QUESTIONS
    }
    assert answers["transcribe"] == (TRANSCRIBE, "open the door")
    assert [answers[k][1] for k in ("gender", "speed", "pitch")] == ["a woman", "fast", "low"]
    assert [answers[k][1] for k in ("first", "last")] == ["open", "door"]
    assert answers["describe"][1] == "a woman with a low voice says fast: open the door"
    assert {name: draw_attributes(rng)[name] in VALUES[name] for name in VALUES} == {
        name: True for name in VALUES
    }
    asked, said = draw_question("says", "open the door", attributes, "never", random.Random(1))
    assert said == ("no" if "never" in asked else "yes")


def test_noise_on_words_grows_with_jitter_and_leaves_text_alone(rows):
    lm, rows = rows
    ids, is_audio = rows[0]["ids"], rows[0]["is_audio"]
    moved = []
    with torch.no_grad():
        for jitter in (0.0, 0.5):
            generator = torch.Generator().manual_seed(0)
            got = blurred_embeddings(lm, ids, is_audio, rows.gap_id, 0.0, generator, jitter)
            moved.append((got - lm.embed(ids)).norm(dim=-1))
    words = is_audio & (ids != rows.gap_id)
    assert moved[0][words].max() < 1e-5 < moved[1][words].min()
    assert moved[1][~is_audio].max() == 0


# ---- texts
def test_sentences_of_letters_are_kept_whole():
    text = 'Ge1:1 In the beginning it was dark. "Come in," he\nsaid softly.'
    text += "\n%\nPay 12 dollars now. No."
    assert list(sentences(text)) == ["In the beginning it was dark.", '"Come in," he said softly.']
    assert plain_words("Don't re-enter 4*!") == "don't reenter four star"


def test_sentences_can_be_longer_than_usual(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"{'word ' * n}end." for n in range(10, 40)))
    for option, longest in (([], 20), (["--most", "30"], 30)):
        texts.main([str(tmp_path / "a.txt"), "--out", str(tmp_path), "--held-out", "20", *option])
        found = [(tmp_path / f"{s}.txt").read_text().splitlines() for s in ("train", "test")]
        assert max(len(line.split()) for line in sum(found, [])) == longest


def test_a_sentence_is_in_one_split_whatever_file_it_comes_from(tmp_path):
    for name, tail in (("a", "."), ("b", " !")):
        lines = [f"Number {word} is a word{tail}" for word in "abcdefghijklmnopqrst"]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines))
    make_texts([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out", 20.0, [])
    found = {s: (tmp_path / f"out/{s}.txt").read_text().splitlines() for s in ("train", "test")}
    assert len(found["train"]) + len(found["test"]) == 20
    assert all(is_held_out(plain_words(line), 20.0) for line in found["test"])
    assert not any(is_held_out(plain_words(line), 20.0) for line in found["train"])
    with pytest.raises(ValueError, match="no sentence of 3 to 20 words is left"):
        make_texts([tmp_path / "a.txt"], tmp_path / "none", 0.001, [])
    assert not list((tmp_path / "none").iterdir())  # one file without the other
