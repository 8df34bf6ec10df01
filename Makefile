# make demo: the whole method at tiny scale.   make test: the tests.
PYTHON ?= python3
VENV := .venv
RUN ?= runs/toy
SEED ?= 0
PY := $(VENV)/bin/python

.PHONY: demo test semantic ablations robustness plot benchmark clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -e ".[test]"
	touch $@

# A run that was stopped goes on where it was: every command resumes from its newest checkpoint.
demo: $(VENV)/installed
	mkdir -p $(RUN) && { [ -f $(RUN)/started ] || touch $(RUN)/started; }
	$(PY) corpora.py toy --out $(RUN)/corpus --seed $(SEED) --train 6000 --test 400
	$(PY) pretrain.py --corpus $(RUN)/corpus --out $(RUN) --seed $(SEED)
	$(PY) train_asr.py --whisper $(RUN)/whisper --llm $(RUN)/llada --train $(RUN)/corpus/asr_train.json --out $(RUN)/stage1 --seed $(SEED)
	$(PY) train_instruct.py --whisper $(RUN)/whisper --llm $(RUN)/llada --adapters $(RUN)/stage1 --train $(RUN)/corpus/instruct_train.json --out $(RUN)/stage2 --seed $(SEED)
	$(PY) evaluate.py --run $(RUN) --check
	$(PY) sampler.py $(RUN)/corpus/audio/test/000000.wav "Repeat the sentence." --whisper $(RUN)/whisper --llm $(RUN)/llada --adapters $(RUN)/stage2 --length 18
	$(PY) sampler.py $(RUN)/corpus/audio/test/000000.wav "Describe the speech." --whisper $(RUN)/whisper --llm $(RUN)/llada --adapters $(RUN)/stage2 --length 18 --trace $(RUN)/trace.html

# The control of the paper's adapter ablation: stage 2 with the semantic adapter alone, the same budget.
semantic: $(VENV)/installed
	$(PY) train_instruct.py --audio semantic --whisper $(RUN)/whisper --llm $(RUN)/llada --adapters $(RUN)/stage1 --train $(RUN)/corpus/instruct_train.json --out $(RUN)/semantic --seed $(SEED)
	$(PY) evaluate.py --run $(RUN)

# The paper's ablations, three seeds each, and clips with noise, at other speeds, by telephone: RUN/ablations/report.md.
ablations: $(VENV)/installed
	$(PY) ablations.py --run $(RUN)

# The last part of it alone.
robustness: $(VENV)/installed
	$(PY) robustness.py --run $(RUN)

# Curves of both stages, also while they train.
plot: $(VENV)/installed
	$(PY) curves.py $(RUN)/stage1 $(RUN)/stage2 --out $(RUN)/curves.png

# Every way of sampling against the published one, on the trained toy.
benchmark: $(VENV)/installed
	$(PY) sampler.py --benchmark --size toy --run $(RUN) --plot $(RUN)/sampling.png

test: $(VENV)/installed
	$(PY) -m pytest -q --cov --cov-report=term

clean:
	rm -rf runs $(VENV)
