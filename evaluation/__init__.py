"""Scores of a trained model: exams, word error rates, figures of results.

ask.py          the command of sampler.py: a question about an audio file
clips.py        answers questions about clips, in batches: DIFFA.answer and the commands
exams.py        the command that takes MMSU, MMAU and VoiceBench, and scores files of predictions
exam_rules.py   what each exam asks, with which sampler, and by which rules a reply is marked
exam_answers.py a model answers the questions of an exam
exam_clips.py   the sound files of an exam
exam_files.py   published items and predictions on disk: read, checked, resumed, written
exam_scores.py  the scores of an exam, counted from its predictions
exam_marks.py   how the exams' own scorers read a reply
choices.py      our own reading of a reply: which choice it names
answer_files.py answers as a JSONL that a stopped command resumes
likelihood.py   how probable an LM finds a text: equation 6, confidence, pseudo-perplexity
transcribe.py   the command that transcribes manifests
no_speech.py    the command that measures what is answered to silence, noise and music
wer.py          word error rate (WER), as it stands and after Whisper's normalisation
wer_report.py   transcripts as figures: by length and speaker, with intervals
figure.py       the one helper that draws and saves a figure
screen.py       the steps of an answer in a terminal
trace.py        an HTML page of the sampler's steps
"""
