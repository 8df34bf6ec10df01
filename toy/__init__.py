"""A world small enough for a laptop: everything that `make demo` needs beside the method itself.

grammar.py            what the corpus says: sentences, voices' attributes, questions with answers
speech.py             eSpeak NG: its voices, its engine, sound files
corpus.py             the command that makes the corpus
read_aloud.py         the command that lets eSpeak read any sentences aloud
imitation.py          text that imitates audio embeddings, from which the LM learns
pretrain.py           the command that makes the stand-ins for the two downloads
pretrain_encoder.py   the stand-in for Whisper
pretrain_lm.py        the stand-in for LLaDA, and the one loop in which LMs learn
autoregressive.py     the autoregressive baseline: causal attention, its loss, greedy decoding
evaluate.py           the command that measures a run: word error rates, accuracies
report.py             what a run's figures promise, as a table and as pictures
compare.py            what differs between two evaluated runs
bundle.py             the command that makes toy/weights, with which `make ask` answers
"""
