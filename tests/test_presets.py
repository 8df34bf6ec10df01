"""Every field of every recipe, compared with the facts written out here."""

from dataclasses import asdict

import pytest

import train_asr
import train_instruct
from adapters import AdapterConfig
from training.recipe import with_steps

LIBRISPEECH_960 = 281_241  # clips
STAGE2_ITEMS = 96_874  # 127.01 hours

# What no recipe changes.
BOOKKEEPING = {
    "steps": None,
    "epochs": None,
    "seed": 0,
    "pretrained_lr_scale": 1.0,
    "save_every": 200,
    "validate_every": 0,
    "keep": 2,
}

# Both stages of the paper: AdamW, weight decay 0.05, clip 1.0, bfloat16; LLaDA's noise levels.
PAPER_OPTIMIZER = {"optimizer": "adamw", "weight_decay": 0.05, "clip": 1.0} | BOOKKEEPING
PAPER = {
    "answer_length": 128,
    "t_min": 0.0,
    "stratified": False,
    "match_embedding_scale": False,
    "shapes": {},
    "dtype": "bfloat16",
    "bucket_by_length": True,
    "whiten": False,
    "execution": {
        "accumulate": 1,
        "workers": 8,
        "cache": "none",
        "recompute": True,
        "compile": False,
        "shard": False,
        "max_unreadable": 10,
        "cut": False,
    },
}

TOY_OPTIMIZER = {"optimizer": "muon", "weight_decay": 0.05, "clip": 1.0} | BOOKKEEPING
TOY = {
    "answer_length": 18,
    "t_min": 0.5,
    "stratified": True,
    "match_embedding_scale": True,
    "shapes": {"n_queries": 8, "qformer_layers": 2, "ffn": 512, "dropout": 0.0},
    "dtype": "float32",
    "bucket_by_length": True,
    "whiten": False,
    "execution": {
        "accumulate": 1,
        "workers": 0,
        "cache": "memory",
        "recompute": False,
        "compile": False,
        "shard": False,
        "max_unreadable": 10,
        "cut": False,
    },
}

EXPECTED = [
    (
        train_asr,
        "paper",
        PAPER,
        PAPER_OPTIMIZER
        | {"epochs": 10, "batch": 128, "lr": 1e-4, "warmup": 1000, "schedule": "linear"},
    ),
    (
        train_instruct,
        "paper",
        PAPER,
        PAPER_OPTIMIZER
        | {"epochs": 10, "batch": 32, "lr": 5e-5, "warmup": 2000, "schedule": "cosine"},
    ),
    (
        train_asr,
        "toy",
        TOY,
        TOY_OPTIMIZER | {"steps": 550, "batch": 32, "lr": 2e-3, "warmup": 50, "schedule": "cosine"},
    ),
    (
        train_instruct,
        "toy",
        TOY,
        TOY_OPTIMIZER | {"steps": 650, "batch": 32, "lr": 1e-3, "warmup": 50, "schedule": "cosine"},
    ),
]


@pytest.mark.parametrize("module, name, recipe, train", EXPECTED)
def test_every_field_of_a_recipe_is_as_written_here(module, name, recipe, train):
    assert asdict(module.RECIPES[name]) == recipe | {"train": train}


def test_there_are_no_other_recipes():
    known = {(module, name) for module, name, _, _ in EXPECTED}
    found = {(module, name) for module in (train_asr, train_instruct) for name in module.RECIPES}
    assert found == known


def test_the_paper_trains_for_ten_epochs():
    asr = train_asr.RECIPES["paper"].train
    instruct = train_instruct.RECIPES["paper"].train
    assert asr.epochs == instruct.epochs == 10
    assert with_steps(train_asr.RECIPES["paper"], LIBRISPEECH_960).train.steps == 21_970
    assert with_steps(train_instruct.RECIPES["paper"], STAGE2_ITEMS).train.steps == 30_270


def test_stage_2_has_the_batch_of_the_release_and_not_of_the_paper():
    """The release's script and its checkpoint's number, 30,270 steps, say 32; the paper says 64."""
    train = train_instruct.RECIPES["paper"].train
    release, paper = 32, 64
    assert train.batch == release
    assert 10 * (STAGE2_ITEMS // release) == 30_270
    assert 10 * (STAGE2_ITEMS // paper) == 15_130


def test_the_paper_s_adapters_are_the_defaults():
    """The published shapes for Whisper small and LLaDA-8B, which `shapes={}` stands for."""
    assert asdict(AdapterConfig()) == {
        "encoder_width": 768,
        "lm_width": 4096,
        "n_heads": 12,
        "taps": (2, 5, 8, 11),
        "n_queries": 64,
        "qformer_layers": 2,
        "ffn": 3072,
        "dropout": 0.1,
        "n_prompts": 20,
    }


@pytest.mark.parametrize("kind", ["Recipe", "TrainConfig", "Execution"])
def test_settings_are_given_by_keyword_alone(kind):
    import training.recipe

    with pytest.raises(TypeError, match="positional"):
        getattr(training.recipe, kind)(1, 2, 3)
