# make demo: the whole method at tiny scale.   make test: the tests.
PYTHON ?= python3
VENV := .venv
RUN ?= runs/toy
SEED ?= 0
WHISPER ?= ../shared/whisper-tiny.en
SPEECH ?= ../shared/speech
HUMAN ?= runs/human
PY := $(VENV)/bin/python

.PHONY: demo test semantic real-encoder human ablations robustness plot benchmark clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -e ".[test]"
	touch $@

# A run that was stopped goes on where it was: every command resumes from its newest checkpoint.
demo: $(VENV)/installed
	mkdir -p $(RUN) && { [ -f $(RUN)/started ] || touch $(RUN)/started; }
	$(PY) -m corpora.manifests toy --out $(RUN)/corpus --seed $(SEED) --train 6000 --test 400
	$(PY) -m toy.pretrain --corpus $(RUN)/corpus --out $(RUN) --seed $(SEED)
	$(PY) train_asr.py --whisper $(RUN)/whisper --llm $(RUN)/llada --train $(RUN)/corpus/asr_train.json --out $(RUN)/stage1 --seed $(SEED)
	$(PY) train_instruct.py --whisper $(RUN)/whisper --llm $(RUN)/llada --adapters $(RUN)/stage1 --train $(RUN)/corpus/instruct_train.json --out $(RUN)/stage2 --seed $(SEED)
	$(PY) -m toy.evaluate --run $(RUN) --check
	$(PY) sampler.py $(RUN)/corpus/audio/test/000000.wav "Repeat the sentence." --whisper $(RUN)/whisper --llm $(RUN)/llada --adapters $(RUN)/stage2 --length 18
	$(PY) sampler.py $(RUN)/corpus/audio/test/000000.wav "Describe the speech." --whisper $(RUN)/whisper --llm $(RUN)/llada --adapters $(RUN)/stage2 --length 18 --trace $(RUN)/trace.html

# The control of the paper's adapter ablation: stage 2 with the semantic adapter alone, the same budget.
semantic: $(VENV)/installed
	$(PY) train_instruct.py --audio semantic --whisper $(RUN)/whisper --llm $(RUN)/llada --adapters $(RUN)/stage1 --train $(RUN)/corpus/instruct_train.json --out $(RUN)/semantic --seed $(SEED)
	$(PY) -m toy.evaluate --run $(RUN)

# The same toy with a real encoder in the place of the stand-in: WHISPER is a directory of the hub, frozen, its window cut to the
# toy's. After `make demo`, on its LM and corpus. Stage 2 keeps the states of 6,000 clips in memory, 3.7 GB at tiny.en.
real-encoder: $(VENV)/installed
	$(PY) train_asr.py --whisper $(WHISPER) --audio-context 3.2 --llm $(RUN)/llada --train $(RUN)/corpus/asr_train.json --out $(RUN)/real/stage1 --seed $(SEED)
	$(PY) train_instruct.py --whisper $(WHISPER) --llm $(RUN)/llada --adapters $(RUN)/real/stage1 --train $(RUN)/corpus/instruct_train.json --out $(RUN)/real/stage2 --steps 1400 --whiten --lr 2e-3 --inherited 0.25 --seed $(SEED)
	$(PY) -m toy.evaluate --run $(RUN)/real --whisper $(WHISPER) --llm $(RUN)/llada --corpus $(RUN)/corpus

# Stage 1 on a person's speech: SPEECH holds train.json and test.json (human.py).
human: $(VENV)/installed
	$(PY) -m lab.human corpus $(SPEECH) --out $(HUMAN)/corpus --seconds 4 --seed $(SEED)
	$(PY) -m lab.human lm --run $(HUMAN) --seed $(SEED)
	$(PY) train_asr.py --whisper $(WHISPER) --audio-context 4 --llm $(HUMAN)/llada --train $(HUMAN)/corpus/asr_train.json --out $(HUMAN)/stage1 --steps 800 --seed $(SEED)
	$(PY) -m lab.human report --run $(HUMAN) --whisper $(WHISPER)

# The paper's ablations, three seeds each, and clips with noise, at other speeds, by telephone: RUN/ablations/report.md.
ablations: $(VENV)/installed
	$(PY) -m lab.ablations --run $(RUN)

# The last part of it alone.
robustness: $(VENV)/installed
	$(PY) -m lab.robustness --run $(RUN)

# Curves of both stages, also while they train.
plot: $(VENV)/installed
	$(PY) -m lab.curves $(RUN)/stage1 $(RUN)/stage2 --out $(RUN)/curves.png

# Every way of sampling against the published one, on the trained toy.
benchmark: $(VENV)/installed
	$(PY) -m lab.benchmark --size toy --run $(RUN) --plot $(RUN)/sampling.png

test: $(VENV)/installed
	$(PY) -m pytest -q -n auto --maxprocesses 4 --cov --cov-report=term

clean:
	rm -rf runs $(VENV)
