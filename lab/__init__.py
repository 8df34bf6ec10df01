"""Experiments, each a command of its own; nothing else imports from here.

ablations.py       the paper's ablations at toy scale: three seeds of four models
findings.py        their report: tables, a figure, which findings reproduce
baseline.py        trains the autoregressive baseline
robustness.py      degraded recordings: noise, other speeds, telephone
benchmark.py       every sampler and cache against the published procedure
one_call.py        one call of the sampler against its floor
roofline.py        the least time that one call of the LM can take on a machine
gpu.py             what one GPU makes of full-size shapes (docs/gpu.md)
gpu_training.py    its training steps
gpu_report.py      its tables
measure_step.py    memory and time of a training step through the LM
measure_stage1.py  a step of stage 1 against the way the release computes its loss
measure_window.py  hidden states under a shorter encoder window
later_stages.py    stages 3 and 4 of DIFFA-2 at toy scale
spelling.py        WER of the warm-up alone: what the semantic adapter spells
curves.py          training curves of runs
page.py            the page of `make page`: hear a clip, ask, watch the masks fill
animation.py       an SVG animation of an answer
tour.py            draws the pictures of docs/tour.md
tour_scene.py      what these pictures have in common
tour_hearing.py    from the waveform to the audio embeddings
tour_answering.py  from the prompt to the answer
"""
