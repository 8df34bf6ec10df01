# make ask              install, then answer three clips with the bundled weights
# make demo             the whole method at toy scale, on a fresh machine: 12 to 20 minutes on 2 CPU cores
# make demo SEED=1      another seed, in a run directory of its own
# make test             the tests
# make lint             style and formatting, as in CI; `make format` fixes what ruff can fix
# make help             all commands
#
# A command that was stopped resumes from its newest checkpoint when you run it again.

PYTHON ?= python3
SEED ?= 0
RUN ?= runs/toy$(if $(filter-out 0,$(SEED)),-$(SEED))
SMOL ?= runs/smol$(if $(filter-out 0,$(SEED)),-$(SEED))
LM ?= smollm2
TEXT ?= texts/*.txt
WHISPER ?= whisper-tiny.en
RECORDED ?=

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
TOY := --whisper $(RUN)/whisper --llm $(RUN)/llada
QUIET ?=

.DEFAULT_GOAL := help
.PHONY: help ask demo page tour test test-long coverage lint format baseline semantic ablations robustness benchmark real-encoder smol plot clean clean-runs

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -e ".[test]"
	touch $@

# ---- the method

ask: $(INSTALLED)  ## three bundled clips and the bundled weights: the first answer in seconds
	$(PY) sampler.py toy/weights/clips/*.flac "Describe the speech." --adapters toy/weights/stage2

# Corpus, stand-ins for Whisper and LLaDA, stage 1, stage 2, evaluation, a question about one clip.
# QUIET=--quiet shows no progress.
demo: $(INSTALLED)  ## both stages of DIFFA at toy scale: 12 to 20 minutes on 2 CPU cores
	mkdir -p $(RUN) && { [ -f $(RUN)/started ] || touch $(RUN)/started; }
	$(PY) -m toy.corpus --out $(RUN)/corpus --seed $(SEED) --train 6000 --test 400 $(QUIET)
	$(PY) -m toy.pretrain --corpus $(RUN)/corpus --out $(RUN) --seed $(SEED) $(QUIET)
	$(PY) train_asr.py $(TOY) --train $(RUN)/corpus/asr_train.json --out $(RUN)/stage1 --seed $(SEED) $(QUIET)
	$(PY) train_instruct.py $(TOY) --adapters $(RUN)/stage1 --train $(RUN)/corpus/instruct_train.json --out $(RUN)/stage2 --seed $(SEED) $(QUIET)
	$(PY) -m toy.evaluate --run $(RUN) --check $(QUIET)
	$(PY) sampler.py $(RUN)/corpus/audio/test/000000.wav "Describe the speech." $(TOY) --adapters $(RUN)/stage2 --trace $(RUN)/trace.html
	@echo "Look next at $(RUN)/report.md (all figures), $(RUN)/trace.html (how that answer was filled in),"
	@echo "docs/tour.md (the method in pictures), and \`make page RUN=$(RUN)\` (ask it yourself)."

# RUN may be another run, ADAPTERS any adapters; without either, the bundled ones answer.
PAGE_ADAPTERS = $(or $(ADAPTERS),$(if $(filter command environment,$(origin RUN)),$(RUN)/stage2))
page: $(INSTALLED)  ## a page that answers about your clips, at http://127.0.0.1:7860
	$(PY) -m pip install -q -e ".[page]"
	$(PY) -m lab.page $(if $(PAGE_ADAPTERS),--adapters "$(PAGE_ADAPTERS)")

tour: $(INSTALLED)  ## draw the pictures of docs/tour.md again
	$(PY) -m lab.tour

# ---- checks

test: $(INSTALLED)  ## the tests: about 4 minutes on 2 CPU cores
	$(PY) -m pytest -q -n auto --maxprocesses 4

# Many processes, compiled steps, trained ablations; CI runs them too.
test-long: $(INSTALLED)  ## the tests that take long: about 4 minutes more
	$(PY) -m pytest -q -n auto --maxprocesses 4 -m long

coverage: $(INSTALLED)  ## which lines all these tests reach
	$(PY) -m pytest -q -n auto --maxprocesses 4 -m "not slow" --cov --cov-report=term

lint: $(INSTALLED)  ## style and formatting, as in CI
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(INSTALLED)  ## fix what ruff can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# ---- experiments, after `make demo`

# Three seeds of four models; the report is RUN/ablations/report.md.
ablations: $(INSTALLED)  ## the paper's ablations: about 50 minutes
	$(PY) -m lab.ablations --run $(RUN)

# The autoregressive baseline of the ablations.
baseline: $(INSTALLED)  ## pretrain the autoregressive baseline alone
	$(PY) -m lab.baseline --run $(RUN) --seed $(SEED)

# Stage 2 with the semantic adapter alone and the same number of steps: the control of the adapter ablation.
semantic: $(INSTALLED)  ## stage 2 without the acoustic adapter
	$(PY) train_instruct.py --audio semantic $(TOY) --adapters $(RUN)/stage1 --train $(RUN)/corpus/instruct_train.json --out $(RUN)/semantic --seed $(SEED)
	$(PY) -m toy.evaluate --run $(RUN)

robustness: $(INSTALLED)  ## noise, other speeds, telephone
	$(PY) -m lab.robustness --run $(RUN)

benchmark: $(INSTALLED)  ## every sampler and cache against the published procedure
	$(PY) -m lab.benchmark --size toy --run $(RUN)

# WHISPER is a directory of the hub; its encoder stays frozen, with the window cut to the toy's 3.2 s.
# Stage 2 keeps the states of 6,000 clips in memory: 3.7 GB for tiny.en.
real-encoder: $(INSTALLED)  ## both stages with a real Whisper: WHISPER=DIR
	$(PY) train_asr.py --whisper "$(WHISPER)" --audio-context 3.2 --llm $(RUN)/llada --train $(RUN)/corpus/asr_train.json --out $(RUN)/real/stage1 --seed $(SEED)
	$(PY) train_instruct.py --whisper "$(WHISPER)" --llm $(RUN)/llada --adapters $(RUN)/real/stage1 --train $(RUN)/corpus/instruct_train.json --out $(RUN)/real/stage2 --steps 1400 --whiten --lr 2e-3 --pretrained-lr-scale 0.25 --seed $(SEED)
	$(PY) -m toy.evaluate --run $(RUN)/real --whisper "$(WHISPER)" --llm $(RUN)/llada --corpus $(RUN)/corpus

# LM is a small causal LM of the hub, TEXT plain text files. RECORDED adds a manifest of recordings,
# eight copies of each. docs/small-lm.md has costs and options.
SMOL_STAGE := --whisper "$(WHISPER)" --audio-context 8 --llm $(SMOL)/lm --answer-length 32 --workers 8 --seed $(SEED)
SMOL_STATES := --cache-encoder $(SMOL)/states
smol: $(INSTALLED)  ## a small LM learns to listen: LM=DIR WHISPER=DIR TEXT="FILES"; for one GPU
	@for f in "$(LM)/config.json" "$(LM)/tokenizer.json" "$(WHISPER)$(if $(filter %.pt,$(WHISPER)),,/config.json)"; do [ -f "$$f" ] || { echo "$$f is not there: see docs/small-lm.md for the downloads"; exit 1; }; done
	$(PY) -m corpora.texts $(TEXT) --out $(SMOL)/texts
	$(PY) -m toy.read_aloud $(SMOL)/texts/train.txt $(SMOL)/texts/test.txt --out $(SMOL)/spoken --clips 24000 --seed $(SEED) $(if $(RECORDED),--recorded "$(RECORDED)" --repeat 8)
	$(PY) -m training.adapt_lm --lm "$(LM)" --text $(SMOL)/texts/train.txt --validation $(SMOL)/texts/test.txt --out $(SMOL)/lm --seed $(SEED)
	$(PY) -m training.align $(SMOL_STAGE) $(SMOL_STATES) --train $(SMOL)/spoken/asr_train.json --out $(SMOL)/align --steps 2000 --batch 128 --dtype bfloat16
	$(PY) -m lab.spelling $(SMOL)/spoken/asr_test.json --adapters $(SMOL)/align --items 400
	$(PY) train_asr.py $(SMOL_STAGE) $(SMOL_STATES) --adapters $(SMOL)/align --train $(SMOL)/spoken/asr_train.json --out $(SMOL)/stage1 --steps 3000 --batch 128 --lr 1e-3 --dtype bfloat16
	$(PY) train_instruct.py $(SMOL_STAGE) --cache-encoder none --adapters $(SMOL)/stage1 --train $(SMOL)/spoken/instruct_train.json --out $(SMOL)/stage2 --steps 2000 --batch 64 --dtype bfloat16 --queries 16 --whiten --t-min 0.3 --lr 2e-3 --pretrained-lr-scale 0.25
	$(PY) -m evaluation.transcribe $(SMOL)/spoken/asr_test.json --adapters $(SMOL)/stage1 --block-length 8 --out $(SMOL)/spoken.jsonl
	$(PY) sampler.py $(SMOL)/spoken/instruct_test.json - --adapters $(SMOL)/stage2 --block-length 8 --batch 100 --out $(SMOL)/questions.jsonl

plot: $(INSTALLED)  ## training curves of both stages, also while they train
	$(PY) -m lab.curves $(RUN)/stage1 $(RUN)/stage2 --out $(RUN)/curves.png

# ---- cleaning

clean:  ## remove the environment and caches; runs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .coverage *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-runs:  ## remove all trained runs, after a question
	@[ -d runs ] && du -sh runs/* || { echo "no runs"; exit 0; }; \
	printf 'Remove all of these? [y/N] '; read answer && [ "$$answer" = y ] && rm -rf runs || echo "kept"
