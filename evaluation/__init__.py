"""Scores of a trained model: exams, word error rates, figures of results.

ask.py          the command of sampler.py: a question about an audio file
exams.py        the command that takes MMSU, MMAU and VoiceBench, and scores files of predictions
exam_rules.py   what each exam asks, with which sampler, and how a reply is marked
exam_files.py   published items and predictions on disk: read, checked, resumed, written
exam_scores.py  the score of an exam, counted from its file of predictions
choices.py      reading a reply: the letter of a choice, MMAU's rule, VoiceBench's refusals
likelihood.py   how probable an LM finds a text: equation 6, confidence, pseudo-perplexity
wer.py          word error rate (WER), as it stands and after Whisper's normalisation
figure.py       the one helper that draws and saves a figure
trace.py        an HTML page of the sampler's steps
"""
