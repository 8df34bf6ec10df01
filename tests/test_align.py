"""The warm-up by CTC, and the speech that eSpeak reads aloud for it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import ManifestError, load_manifest
from diffa import DIFFA
from lab import spelling
from lab.spelling import spell, spelled_ids
from toy import read_aloud
from training.adapt_lm import MASK_SEED
from training.align import (
    SHARPNESS,
    SILENCE_SEED,
    STAGE,
    is_too_fast,
    spelling_loss,
    table_logits,
)
from training.batches import Batch, Part
from training.examples import usable
from training.questions import QUESTIONS

END = 7


def loss_of(audio, answers):
    """spelling_loss of audio embeddings (b, A, D) and answers, with a table of one-hot rows."""
    lm = SimpleNamespace(
        config=SimpleNamespace(end_id=END, mask_id=0), embedding=torch.nn.Embedding(8, 64)
    )
    lm.embedding.weight = torch.nn.Parameter(torch.eye(8, 64), requires_grad=False)
    model = SimpleNamespace(lm=lm, device=torch.device("cpu"))
    mask = torch.ones(audio.shape[:2], dtype=torch.bool)
    part = Part(
        rows=np.arange(len(audio)),
        prompts=[],
        readable=torch.ones(len(audio), dtype=torch.bool),
        hear=lambda passes: (audio, mask),
    )
    batch = Batch(answer_ids=torch.tensor(answers), parts=lambda: iter([part]))
    (loss,) = spelling_loss(model, batch, torch.Generator().manual_seed(0), None)
    return loss.item()


def test_audio_that_spells_the_transcript_has_no_loss_and_other_audio_has():
    rows = torch.eye(8, 64)
    silence = torch.randn(1, 64, generator=torch.Generator().manual_seed(SILENCE_SEED))
    spelled = torch.cat([silence, rows[[2, 2]], silence, rows[[5]], silence])[None]  # (1, 6, D)
    assert loss_of(spelled, [[2, 5, END, END]]) < 0.01
    assert loss_of(spelled, [[5, 2, END, END]]) > 5
    assert loss_of(spelled, [[2, 5, 2, 5, 2, 5, 2]]) == 0  # more tokens than embeddings: left out


def test_a_token_of_no_transcript_in_the_batch_is_an_alternative_too():
    rows = torch.eye(8, 64)
    silence = torch.randn(1, 64, generator=torch.Generator().manual_seed(SILENCE_SEED))
    between = torch.cat([silence, rows[[2]] + 1.1 * rows[[6]], silence])[None]  # (1, 3, D)
    assert loss_of(between, [[2, END, END]]) > 1


def test_a_clip_that_is_too_short_for_its_words_is_left_out(toy, tone):
    n_tokens = len(toy.tokenizer.encode_text("on"))
    item = {"audio_filepath": str(tone()), "audio_id": "a", "input": "?", "transcription": "on"}
    item["duration"] = 0.08 * (n_tokens - 1)  # 0.08 s are one embedding
    longer = item | {"duration": 0.08 * n_tokens, "audio_id": "b"}
    assert n_tokens > 1
    assert is_too_fast(item, toy) and not is_too_fast(longer, toy)

    # Equal tokens need a silence between them.
    twice = toy.tokenizer.encode_text("oo")
    assert len(twice) == 2 and twice[0] == twice[1]
    assert is_too_fast(item | {"transcription": "oo", "duration": 0.16}, toy)

    options = {"unusable": STAGE.unusable}
    kept = usable([item, longer], "m.json", "transcription", toy, 18, **options).items
    assert [item["audio_id"] for item in kept] == ["b"]
    with pytest.raises(ManifestError, match="1 have more tokens than audio embeddings: no item"):
        usable([item], "m.json", "transcription", toy, 18, **options)


def test_logits_are_cosines_whatever_the_size_of_the_embeddings():
    audio, table = torch.randn(1, 3, 16), torch.randn(5, 16)
    logits = table_logits(audio, table)
    assert logits.shape == (1, 3, 6) and logits.abs().max() <= SHARPNESS + 1e-3
    torch.testing.assert_close(logits, table_logits(9 * audio, 0.1 * table))
    expected = SHARPNESS * torch.cosine_similarity(audio[0, 0], table[3], dim=0)
    torch.testing.assert_close(logits[0, 0, 4], expected)


def test_sentences_are_read_aloud_with_questions_about_them(tmp_path):
    (tmp_path / "train.txt").write_text("The door is open.\nSing a song!\n")
    (tmp_path / "test.txt").write_text("Never give up.\n")
    files = [str(tmp_path / "train.txt"), str(tmp_path / "test.txt"), "--out", str(tmp_path / "o")]
    few = ["--clips", "2", "--test-clips", "1"]
    read_aloud.main([*files, *few])

    spoken = load_manifest(tmp_path / "o/asr_train.json")
    assert {i["transcription"] for i in spoken} == {"the door is open", "sing a song"}
    assert all(0.3 < item["duration"] < 4 for item in spoken)
    asked = load_manifest(tmp_path / "o/instruct_test.json")
    assert [item["kind"] for item in asked] == list(QUESTIONS)
    assert asked[0]["target"] == "never give up"

    # The same again is done; another corpus is not overwritten.
    read_aloud.main([*files, *few])
    with pytest.raises(SystemExit, match="holds another corpus"):
        read_aloud.main([*files, *few, "--seed", "1"])

    # So is a corpus of other texts under the same names.
    (tmp_path / "test.txt").write_text("Never give in.\n")
    with pytest.raises(SystemExit, match="holds another corpus"):
        read_aloud.main([*files, *few])
    with pytest.raises(SystemExit, match="text of both splits"):
        read_aloud.main([files[0], files[0], "--out", str(tmp_path / "q"), *few])

    # Recordings are added in plain words.
    recordings = tmp_path / "o/recordings.json"
    item = json.loads((tmp_path / "o/asr_test.json").read_text())[0]
    recordings.write_text(json.dumps([item | {"transcription": "Press 1!"}]))
    others = [*files[:2], "--out", str(tmp_path / "p"), *few, "--recorded", str(recordings)]
    read_aloud.main([*others, "--repeat", "2"])
    words = [i["transcription"] for i in load_manifest(tmp_path / "p/asr_train.json")]
    assert words[2:] == ["press one"] * 2


def test_silence_is_not_the_embedding_of_the_mask():
    """An LM would take silence for words that are to come."""
    mask = torch.randn(16, generator=torch.Generator().manual_seed(MASK_SEED))
    assert table_logits(mask[None], torch.randn(2, 16))[0, 0] < 0.9 * SHARPNESS


def test_repeats_are_one_token_and_silence_is_none():
    best = torch.tensor([0, 3, 3, 0, 3, 1, 1, 0])
    assert spelled_ids(torch.eye(4)[best]) == [2, 2, 0]


def test_embeddings_of_words_are_read_as_these_words(toy_dirs, tone, capsys, monkeypatch):
    model = DIFFA.from_pretrained(**toy_dirs, stage="semantic").eval()
    table = model.lm.embedding.weight.detach()
    silence = torch.randn(1, table.shape[1], generator=torch.Generator().manual_seed(SILENCE_SEED))
    ids = model.tokenizer.encode_text("Two birds")
    rows = torch.cat([torch.cat([table[[i, i]], silence]) for i in ids])  # (A, D)
    mask = torch.ones(1, len(rows) + 1, dtype=torch.bool)
    mask[:, -1] = False  # what is padded is not read
    heard = torch.cat([rows, table[ids[:1]]])[None]  # (1, A + 1, D)
    monkeypatch.setattr(model.semantic, "forward", lambda state, frames: (heard, mask))

    item = {"audio_filepath": str(tone("a.wav")), "transcription": "Two birds!"}
    assert spell(model, [item]) == ["two birds"]

    # The command counts word errors.
    monkeypatch.setattr(spelling, "load_diffa", lambda *paths, **options: model)
    monkeypatch.setattr(spelling, "load_manifest", lambda path: [item] * 2)
    spelling.main(["m.json", "--items", "1"])
    assert capsys.readouterr().out.endswith("WER 0.0 % of 1 clips\n")
