"""The tour: its page, its pictures and its functions belong together, and it draws what it says."""

import re
from pathlib import Path

import pytest
import torch

from diffa import DIFFA
from lab import tour, tour_answering, tour_hearing
from lab.tour_scene import Scene, nearest_words, random_clip, with_other
from sampler import SamplerConfig
from toy.grammar import is_held_out
from toy.speech import VOICES, prepare_espeak

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/tour.md").read_text("utf-8")


@pytest.fixture(scope="module")
def scene(tiny_run, tmp_path_factory):
    data = tmp_path_factory.mktemp("espeak")
    prepare_espeak(data)
    clips = [random_clip(f"tour/{i}", data) for i in (5, 19)]
    parts = (tiny_run / name for name in ("whisper", "llada", "stage2"))
    model = DIFFA.from_pretrained(*parts).eval().requires_grad_(False)
    return Scene(model=model, clip=clips[0], clips=clips, data=data)


def test_the_page_shows_every_picture_and_names_functions_that_exist():
    assert re.findall(r"\(tour/([\w-]+)\.png\)", PAGE) == list(tour.PICTURES)
    drawn = {path.stem for path in (ROOT / "docs/tour").iterdir()}
    assert drawn == set(tour.PICTURES)
    assert sum(path.stat().st_size for path in (ROOT / "docs/tour").iterdir()) < 600_000

    sections = PAGE.split("\n## ")[1:]
    for section in sections:
        named = re.findall(r"`([\w.]+)` \(\[(\w+\.py)\]", section)
        named += [(name, file) for name, file in re.findall(r"`([\w.]+)`, \[(\w+\.py)\]", section)]
        assert named, section
        for name, file in named:
            assert re.search(rf"(def|class) {name.split('.')[-1]}\b", (ROOT / file).read_text())


def test_clips_are_held_out_and_only_what_is_named_changes(scene):
    clip = scene.clip
    assert is_held_out(clip.sentence.text) and clip.voice in sum(
        (VOICES["test", gender] for gender in ("female", "male")), []
    )
    other = with_other(clip, "pitch", scene.data)
    assert other.attributes.pitch != clip.attributes.pitch and other.pitch != clip.pitch
    assert (other.sentence, other.voice, other.rate) == (clip.sentence, clip.voice, clip.rate)
    other = with_other(clip, "words", scene.data)
    assert other.sentence.text != clip.sentence.text and other.attributes == clip.attributes
    assert [word for word, _, _ in other.words] == other.sentence.text.split()


def test_the_recorded_attention_is_that_of_the_adapter(scene):
    weights = tour_hearing.cross_attention(scene, scene.clip)  # (K, Q, T)
    config = scene.model.config
    context = scene.model.encoder.config.context
    assert weights.shape == (len(config.taps), config.n_queries, context)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:2]))


def test_nearest_words_finds_a_token_that_lies_on_the_embedding(scene, monkeypatch):
    lm = scene.model.lm
    ids = [scene.model.tokenizer.encode(word)[-1] for word in ("fox", "goat")]
    audio = 3 * lm.embedding.weight[ids][None]
    heard = (audio, torch.ones(1, 2, dtype=torch.bool))
    monkeypatch.setattr(scene.model.semantic, "forward", lambda state, frames: heard)
    words, cosines = nearest_words(scene.model, scene.clip)
    assert words == [scene.model.tokenizer.decode([i]).strip() for i in ids]
    assert cosines == pytest.approx([1, 1], abs=1e-5)


def test_the_recorded_calls_are_those_of_the_caches(scene):
    settings = {"length": 6, "block_length": 3, "steps": 4, "stop_at_end": False}
    none, prefix, dual = (
        tour_answering.recorded_calls(scene, SamplerConfig(cache=cache, **settings))
        for cache in ("none", "prefix", "dual")
    )
    L = none.shape[1]
    assert (none > 0).all() and len(none) == len(prefix) == len(dual) == 4
    assert [(row > 0).sum().item() for row in prefix] == [L, 6, L, 3]
    assert [(row > 0).sum().item() for row in dual] == [L, 3, L, 3]
    assert (dual[1] > 0)[L - 6 : L - 3].all() and (dual[3] > 0)[L - 3 :].all()


def test_the_command_draws_small_pictures_and_says_what_is_missing(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(tour, "CLIPS", 2)
    monkeypatch.setattr(tour, "FOLLOWED", 0)
    names = ["1-sound", "6-splice", "7-noise", "11-rules"]
    tour.main(["--run", str(tiny_run), "--out", str(tmp_path / "out"), "--only", *names])
    sizes = [(tmp_path / f"out/{name}.png").stat().st_size for name in names]
    assert all(2_000 < size < 100_000 for size in sizes)
    with pytest.raises(SystemExit, match="python -m lab.tour: .*whisper"):
        tour.main(["--run", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
